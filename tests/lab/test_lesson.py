import pytest
import torch
from data_files import idx_files, write

from course_lib.evidence.statistics import COVERS
from course_lib.lab.lesson import Lesson


def test_a_lesson_says_what_runs_on_what(capsys):
    lesson = Lesson("02.1", replicas=3, seed=2, threads=1)
    assert capsys.readouterr().out == (
        "digits: 3 replicas, each with its own 1,257 training and 270 test images; "
        "270 validation images for all; ± covers training and split\n"
    )
    assert lesson.seeds.tolist() == [200_000, 200_001, 200_002]
    assert (len(lesson.data.train), COVERS) == (3, ["training and split"])
    made = lesson.claim("02.x", "So.", True, measured=1)
    assert (made.lesson, made.seed, lesson.ledger.claims) == ("02.1", 2, [made])
    assert len(Lesson("02.1", replicas=2, profile="full", quiet=True).seeds) == 4


def test_the_same_seed_draws_the_same(capsys):
    draws = []
    for seed in (0, 0, 1):
        Lesson("02.1", replicas=2, seed=seed, threads=1, quiet=True)
        draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dataset": "mnits"}, "unknown data set 'mnits'.*did you mean 'mnist'"),
        ({"profile": "fast"}, "profile must be one of 'quick', 'full'; got 'fast'"),
    ],
)
def test_unknown_settings_are_named(change, text):
    with pytest.raises(ValueError, match=text):
        Lesson("02.1", **change)


def test_other_data_have_a_fixed_test_set_and_a_small_one_is_told(tmp_path, monkeypatch, capsys):
    write(tmp_path / "MNIST/raw", idx_files(train=1000, test=30))
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    lesson = Lesson("02.1", dataset="mnist", threads=1)
    assert capsys.readouterr().out == (
        "mnist: 8 replicas, each with its own 720 training images; "
        "100 validation and 30 test images for all; ± covers training and choice of training images\n"
    )
    assert lesson.covers == "training and choice of training images"
    write(tmp_path / "MNIST/raw", idx_files(train=300, test=30))
    Lesson("02.1", dataset="mnist", threads=1)
    assert "fewer than the 1,000 training images that the course is made for" in capsys.readouterr().out


def test_a_lesson_on_text_loads_no_images(monkeypatch, capsys):
    monkeypatch.setenv("COURSE_DATA", "/nowhere")
    lesson = Lesson("08.1", dataset="cifar10", replicas=3, profile="full", text=True, threads=1)
    train, val, test = (len(tokens) for tokens in (lesson.data.train, lesson.data.val, lesson.data.test))
    assert capsys.readouterr().out == (
        f"text, the same for every dataset: {train:,} training, {val:,} validation, {test:,} test symbols "
        f"of {len(lesson.data.alphabet)} kinds; 6 replicas; ± covers training\n"
    )
    assert COVERS == ["training"]
