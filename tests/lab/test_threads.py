"""The number of threads is the smallest of what is wanted, what is there and what is allowed."""

import pytest
import torch

from course_lib.lab import threads
from course_lib.lab.threads import use_threads


@pytest.fixture(autouse=True)
def four_cores(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "_cores", lambda: 4)
    yield
    torch.set_num_threads(before)


def test_it_is_what_is_wanted_up_to_the_cores():
    assert use_threads(3) == torch.get_num_threads() == 3
    assert use_threads(9) == torch.get_num_threads() == 4


@pytest.mark.parametrize(
    ("limit", "used"), [("1", 1), (" 2 ", 2), ("2,1", 2), ("8", 3), ("", 3), ("0", 3), ("many", 3)]
)
def test_the_environment_can_only_lower_it(monkeypatch, limit, used):
    monkeypatch.setenv("OMP_NUM_THREADS", limit)
    assert use_threads(3) == torch.get_num_threads() == used


@pytest.mark.parametrize("wanted", [0, -1, 1.5, True])
def test_a_bad_wish_is_named(wanted):
    with pytest.raises(ValueError, match="wanted"):
        use_threads(wanted)


def test_cores_are_those_of_this_process(monkeypatch):
    monkeypatch.undo()
    assert threads._cores() >= 1
