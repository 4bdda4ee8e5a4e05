import json
import os
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from course_lib.lab.study import Trial, make_grid

NUMBERS = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
LEVELS = st.none() | NUMBERS | st.text()
NAMES = st.text(min_size=1).filter(lambda name: name not in ("method", "level", "seed", "error", "seconds"))
TRIALS = st.builds(
    Trial,
    st.text(min_size=1),
    LEVELS,
    st.integers(0, 2**40),
    st.dictionaries(NAMES, st.booleans() | LEVELS, max_size=4),
)


def content(trial):
    """The independent reading of what a trial is: types of numbers do not matter, booleans are none."""
    tagged = [(name, isinstance(value, bool), value) for name, value in trial.options]
    return (trial.method, trial.level, trial.seed, tuple(tagged))


@given(TRIALS, TRIALS)
def test_the_key_tells_trials_apart_as_their_content_does(a, b):
    assert (a.key == b.key) == (a == b) == (content(a) == content(b))
    assert a != a.key


@given(TRIALS)
def test_a_key_survives_copies_pickle_json_order_and_numpy(trial):
    assert pickle.loads(pickle.dumps(trial)).key == trial.key
    again = json.loads(json.dumps([trial.method, trial.level, trial.seed, trial.options]))
    assert Trial(*again).key == trial.key
    assert Trial(trial.method, trial.level, np.int64(trial.seed), trial.options[::-1]).key == trial.key
    if isinstance(trial.level, float):
        assert Trial(trial.method, np.float64(trial.level), trial.seed, dict(trial.options)).key == trial.key
    assert hash(trial) == hash(pickle.loads(pickle.dumps(trial)))


def test_a_key_is_the_same_in_another_process():
    code = "from course_lib.lab.study_grid import Trial; print(Trial('ü', 0.1, 3, {'b': True, 'a': None}).key)"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == Trial("ü", 0.1, 3, (("a", None), ("b", True))).key


def test_numbers_count_by_value_and_booleans_are_none():
    assert Trial("m", 8, 0) == Trial("m", 8.0, 0) == Trial("m", np.int32(8), 0) == Trial("m", torch.tensor(8), 0)
    assert Trial("m", -0.0, 0) == Trial("m", 0, 0)
    assert Trial("m", "8", 0) != Trial("m", 8, 0)
    assert Trial("m", 1, 0, {"x": True}) != Trial("m", 1, 0, {"x": 1})
    assert type(Trial("m", np.float32(0.5), np.int64(2)).level) is float


def test_a_trial_is_frozen_and_shows_itself():
    trial = Trial("m", 0.5, 1, {"width": 32})
    with pytest.raises(FrozenInstanceError):
        trial.level = 3
    assert repr(trial) == "Trial(method='m', level=0.5, seed=1, options=(('width', 32),))"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", 1, 0), "method must be a name"),
        ((3, 1, 0), "method must be a name, got 3"),
        (("m", [1], 0), r"level must be a number, a word or None, got \[1\]"),
        (("m", True, 0), "level must be a number"),
        (("m", float("nan"), 0), "level must be finite, got nan"),
        (("m", np.zeros(2), 0), "level must be a number"),
        (("m", 1, -1), "seed must be a whole number of at least 0, got -1"),
        (("m", 1, 0.5), "seed must be a whole number"),
        (("m", 1, True), "seed must be a whole number"),
        (("m", 1, 0, {"seed": 3}), "an option needs a name other than method, level, seed, error, seconds, got 'seed'"),
        (("m", 1, 0, {"": 3}), "an option needs a name"),
        (("m", 1, 0, {"widths": (8, 16)}), r"option widths must be .* add grids to vary it, got \(8, 16\)"),
        (("m", 1, 0, {"x": float("inf")}), "x must be finite"),
        (("m", 1, 0, (("x", 1), ("x", 2))), "given twice"),
        (("m", 1, 0, (("x", 1), ("x", "a"))), "names of their own"),
        (("m", 1, 0, ("abc",)), "options must be pairs"),
        (("m", 1, 0, 5), "options must be pairs"),
    ],
)
def test_a_trial_of_another_kind_is_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Trial(*arguments)


def test_a_grid_runs_over_methods_then_levels_then_seeds():
    grid = make_grid({"b": [2, 1], "a": np.array([0.5])}, range(2), width=32)
    assert [(t.method, t.level, t.seed) for t in grid] == [
        ("b", 2, 0),
        ("b", 2, 1),
        ("b", 1, 0),
        ("b", 1, 1),
        ("a", 0.5, 0),
        ("a", 0.5, 1),
    ]
    assert {t.options for t in grid} == {(("width", 32),)}


@pytest.mark.parametrize(
    ("levels", "seeds", "message"),
    [
        ({}, [0], "names no method"),
        ({"m": []}, [0], "levels of m: the sequence is empty"),
        ({"m": [1]}, [], "seeds: the sequence is empty"),
        ({"m": [1]}, 3, "seeds must be a sequence, got 3"),
        ({"m": "high"}, [0], "levels of m must be a sequence, got 'high'"),
        ({"m": 0.5}, [0], "levels of m must be a sequence"),
        ([("m", [1])], [0], "levels must map each method to its levels, got list"),
        ({"m": [1, 1.0]}, [0], r"holds a cell twice: Trial\(method='m', level=1.0"),
        ({"m": [1]}, [0, 1, 0], "holds a cell twice"),
        ({"m": [1]}, ["0"], "seed must be a whole number"),
    ],
)
def test_a_grid_that_is_none_is_refused(levels, seeds, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_grid(levels, seeds)
