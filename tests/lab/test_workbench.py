"""What the cells of a study share: the dense network at any width, epochs for any number of images, one training."""

import pytest
import torch

from course_lib.lab import workbench
from course_lib.lab.models import build_model
from course_lib.lab.workbench import BLENDS, Workbench, narrow_lenet


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))


def test_narrow_lenet_at_full_width_is_lenet300():
    ours = narrow_lenet((1, 8, 8), 10, (300, 100), seed=4)
    theirs = build_model("lenet300", (1, 8, 8), 10, seed=4)
    for (name, a), (other, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)


def test_narrow_lenet_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    narrow_lenet((1, 8, 8), 10, (3, 2), seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_impossible_widths_are_refused():
    with pytest.raises(ValueError, match="hidden must be two positive widths"):
        narrow_lenet((1, 8, 8), 10, (0, 4))


def test_widths_scale_and_leave_one_neuron():
    assert Workbench(width=0.1).hidden == (30, 10)
    assert Workbench(width=2).hidden == (600, 200)
    assert Workbench(width=1e-6).hidden == (1, 1)


def test_many_images_get_fewer_epochs_and_blends_fewer_still(monkeypatch):
    bench = Workbench()
    assert bench.config(24).epochs == 24
    assert Workbench(profile="full").config(24).epochs == 48
    assert bench.config(24, copies=BLENDS).epochs == 24 // (BLENDS + 1)
    assert bench.config(1, copies=99).epochs == 1
    monkeypatch.setattr(workbench, "FULL_EPOCHS_UP_TO", len(bench.data.train) / 2)
    assert bench.config(24).epochs == 12


def test_a_network_is_trained_once_and_again_for_another_bench(monkeypatch):
    bench = Workbench(width=0.05)
    first = bench.trained(epochs=1)
    monkeypatch.setattr(workbench, "fit", None)
    again = bench.trained(epochs=1)
    assert torch.equal(first.fc1.weight, again.fc1.weight)
    assert not again.training
    for other in (Workbench(width=0.05, seed=1), Workbench(width=0.05, split_seed=1), Workbench(width=0.06)):
        with pytest.raises(TypeError):
            other.trained(epochs=1)


def test_answers_are_the_teachers_on_images_and_blends():
    bench = Workbench(seed=3)
    lesson = bench.answers()
    assert len(lesson.split) == (BLENDS + 1) * len(bench.data.train)
    some = slice(len(bench.data.train) - 2, len(bench.data.train) + 2)
    with torch.no_grad():
        expected = bench.teacher()(lesson.split.images[some])
    assert torch.allclose(lesson.settings["teacher"][0, some], expected, atol=1e-4)


def test_distilled_differs_from_trained_alone():
    bench = Workbench(width=0.05)
    assert not torch.equal(bench.distilled(epochs=4).fc1.weight, bench.trained(epochs=4).fc1.weight)


@pytest.mark.parametrize(
    ("options", "text"), [({"profile": "fast"}, "profile must be one of"), ({"width": 0}, "width must be above 0")]
)
def test_impossible_benches_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        Workbench(**options)
