"""Points of a study: pairs by seed, budgets kept, one graph timed for all that share it."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch

from course_lib.lab.data import load_dataset
from course_lib.lab.models import build_model
from course_lib.lab.points import Point, best_within, engine_microseconds, pareto_families, points_of
from course_lib.methods.qat import fake_quantized

COLUMNS = ["method", "level", "seed", "accuracy", "val_accuracy", "bytes", "macs", "memory", "error", "seconds"]


def frame(*rows):
    return pd.DataFrame([[*row, None, 0.1] for row in rows], columns=COLUMNS)


def point(name, val, size, macs=10, memory=10):
    return Point("dense", name, (0,), np.array([50.0]), np.array([val]), size, macs, memory)


def test_rows_become_points_with_seeds_in_order():
    points = points_of(
        frame(
            ("magnitude", 0.9, 1, 0.5, 0.6, 10, 7, 9),
            ("dense", None, 0, 0.9, 0.8, 40, 7, 9),
            ("magnitude", 0.9, 0, 0.25, 0.7, 20, 7, 9),
        )
    )
    assert list(points) == [("magnitude", 0.9), ("dense", None)]
    found = points["magnitude", 0.9]
    assert found.seeds == (0, 1)
    assert found.accuracy.tolist() == [25.0, 50.0]
    assert found.val_accuracy.tolist() == [70.0, 60.0]
    assert (found.bytes, found.macs, found.memory) == (15.0, 7.0, 9.0)
    assert found.first(1).tolist() == [25.0]
    assert found.name == "magnitude pruning, 0.9"
    assert points["dense", None].name == "dense LeNet-300-100"


def test_numbers_and_words_may_be_levels_of_one_study():
    points = points_of(frame(("qat", 4, 0, 1, 1, 1, 1, 1), ("student", "mlp8", 0, 1, 1, 1, 1, 1)))
    assert set(points) == {("qat", 4), ("student", "mlp8")}


def test_a_failed_cell_is_named():
    broken = frame(("qat", 4, 3, None, None, None, None, None))
    broken["error"] = "ValueError: no"
    with pytest.raises(RuntimeError, match=r"1 of 1 cells failed, the first at qat, level 4, seed 3: ValueError: no"):
        points_of(broken)


def test_the_best_on_validation_within_the_budget():
    points = {p.level: p for p in (point("a", 99, 500), point("b", 98, 50), point("c", 97, 40, macs=1000))}
    assert best_within(points, {}).level == "a"
    assert best_within(points, {"bytes": 100}).level == "b"
    assert best_within(points, {"bytes": 50, "macs": 10}).level == "b"
    assert best_within(points, {"bytes": 45}).level == "c"
    assert best_within(points, {"bytes": 45, "macs": 10}) is None


def test_of_equals_the_smaller_one():
    assert best_within({p.level: p for p in (point("a", 99, 500), point("b", 99, 50))}, {}).level == "b"


def test_an_unknown_limit_is_refused():
    with pytest.raises(ValueError, match=r"a budget limits some of bytes, macs, memory, got \['watts'\]"):
        best_within({}, {"watts": 1})


def test_equal_graphs_share_one_time_and_int8_is_its_own():
    images = load_dataset("digits").test.images[:16]
    dense = build_model("cnn_student", (1, 8, 8), 10, seed=0)
    pruned = copy.deepcopy(dense)
    with torch.no_grad():
        pruned.conv2.weight.mul_(0)
    small = fake_quantized(dense, activation_bits=8, calibration=images)
    times = engine_microseconds({"dense": dense, "pruned": pruned, "int8": small}, images, rounds=3)
    assert times["dense"] == times["pruned"] > 0
    assert times["int8"] > 0
    assert times["int8"] != times["dense"]


def test_families_of_the_picture_hold_levels_and_seeds():
    points = points_of(
        frame(
            *[("qat", 4, s, 0.5 + s / 10, 1, 100, 1, 1) for s in range(3)],
            *[("qat", 2, s, 0.1, 1, 50, 1, 1) for s in range(3)],
            *[("dense", None, s, 0.9, 1, 400, 1, 1) for s in range(3)],
        )
    )
    qat, dense = pareto_families(points, points, lambda key: points[key].bytes, seeds=2)
    assert (qat.name, qat.section, dense.section) == ("low-bit QAT", "3.2", "")
    assert qat.costs.tolist() == [100, 50]
    assert qat.gains.tolist() == [[50, 60], [10, 10]]
    (only,) = pareto_families(points, [("dense", None)], {("dense", None): 7.0}.get, seeds=3)
    assert only.costs.tolist() == [7.0]
