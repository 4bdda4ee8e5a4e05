import math
from dataclasses import replace

import numpy as np
import pytest
from IPython.core.formatters import DisplayFormatter
from scipy import stats

from course_lib.evidence import statistics

from course_lib.evidence.statistics import (  # isort: skip
    Interval, compare, difference, exactly, mean, mean_interval, paired_difference, proportion_interval, ratio,
)  # fmt: skip

SCORES = {"dense": [97.0, 98.0, 96.0], "pruned": [96.0, 97.5, 95.5]}
VALUES = [0.91, 0.95, 0.93, 0.99, 0.90, 0.94]


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_t_interval_is_scipys(level):
    found = mean_interval(VALUES, level=level)
    low, high = stats.t.interval(level, 5, loc=np.mean(VALUES), scale=stats.sem(VALUES))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert (found.n, found.level) == (6, level)


def test_bootstrap_follows_the_skew_and_its_seed():
    values = np.random.default_rng(0).exponential(size=40)
    found = mean_interval(values, method="bootstrap", seed=1)
    assert found.high - found.mean > found.mean - found.low
    assert found == mean_interval(values, method="bootstrap", seed=1)


def test_pairing_takes_out_what_the_seed_does():
    seed_effect = np.random.default_rng(0).normal(0, 5, 20)
    assert paired_difference(seed_effect + 0.3, seed_effect) > 0.299
    low, high = stats.ttest_rel(1.9 * seed_effect + 0.3, seed_effect).confidence_interval(0.95)
    found = paired_difference(1.9 * seed_effect + 0.3, seed_effect)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_wilson_against_its_formula():
    z, n, p = stats.norm.ppf(0.975), 50, 0.9
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    found = proportion_interval(45, 50)
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half))


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(0.5, 0.25, 0.75, 0.95, 3), "0.5 ± 0.2"),
        (Interval(35.12, 29.6, 40.64, n=3, unit="points"), "35.1 ± 5.5 points"),
        (Interval(55.2, 43.2, 67.2, n=3, unit="points"), "55 ± 12 points"),
        (Interval(2.45, 2.38, 2.52, n=3, unit="×"), "2.45 ± 0.07×"),
        (mean_interval([1.0, 1.0, 1.0]), "1.00 ± 0.00"),
        (exactly(202896, "bytes"), "202,896 bytes"),
        (exactly(3.961, "×"), "3.96×"),
        (exactly(math.nan, "×"), "not measured"),
    ],
)
def test_an_interval_shows_the_digits_that_it_is_worth(interval, text):
    assert str(interval) == f"{interval}" == text


def test_formats():
    interval = Interval(0.5, 0.25, 0.75, 0.95, 3)
    assert (f"{interval:.1%}", f"{interval:+.2f}") == ("50.0 ± 25.0 %", "+0.50 ± 0.25")


@pytest.mark.parametrize(
    ("verdict", "status"),
    [
        (Interval(2, 1, 3) > 1, "undecided"),
        (Interval(2, 1, 3) >= 1, "held"),
        (Interval(2, 1, 3) > 3, "not"),
        (Interval(2, 1, 3) >= 3, "undecided"),
        (Interval(2, 1, 3) < 3, "undecided"),
        (Interval(2, 1, 3) <= 3, "held"),
        (Interval(2, 1, 3) < 1, "not"),
        (Interval(2, 1, 3) <= 1, "undecided"),
        ((Interval(2, 1, 3) > 0) & (exactly(4) > 3), "held"),
        ((Interval(2, 1, 3) > 0) & (exactly(4) > 5), "not"),
        ((Interval(2, 1, 3) > 2) & (exactly(4) > 3), "undecided"),
    ],
)
def test_a_verdict_is_true_only_if_all_of_the_interval_is_beyond(verdict, status):
    assert verdict.status == status
    assert bool(verdict) == (status == "held")


def test_a_verdict_knows_what_was_measured_and_a_cell_shows_it_in_words():
    gain, times = difference([3.0, 4.0, 5.0], [2.0, 3.0, 4.5]), exactly(3.96, "×")
    both = (gain > 0) & (times > 3)
    assert both.measured == "0.8 ± 0.7 points, 3.96×"
    shown = [DisplayFormatter().format(each)[0]["text/plain"] for each in (times, both)]
    assert shown == ["3.96×", "held: 0.8 ± 0.7 points > 0, 3.96× > 3"]


def test_the_short_names_are_the_intervals():
    a, b = [3.0, 5.0, 4.0, 4.4], [4.0, 6.0, 5.0, 5.0]
    assert mean(a) == replace(mean_interval(a), unit="%")
    assert difference(a, b) == replace(paired_difference(a, b), unit="points")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: mean_interval([1.0]), "at least two values, got 1"),
        (lambda: mean_interval([1.0, float("nan")]), "finite, got nan at 1"),
        (lambda: mean_interval([[1.0, 2.0]]), r"shape \(1, 2\)"),
        (lambda: mean_interval([1.0, 2.0], level=95), "between 0 and 1"),
        (lambda: mean_interval([1.0, 2.0], method="z"), "'t' or 'bootstrap'"),
        (lambda: paired_difference([1.0, 2.0], [1.0, 2.0, 3.0]), "2 and 3 values do not make pairs"),
        (lambda: proportion_interval(5, 4), "got 5 of 4"),
        (lambda: ratio([1.0, 2.0, 3.0], [1.0, 2.0]), "3 and 2 values do not make pairs"),
        (lambda: ratio([1.0, 2.0, 3.0], [-1.0, 0.1, 1.0]), "cannot be told from 0 at 0.95: any ratio fits"),
        (lambda: ratio([1.0], [1.0]), "at least two values"),
        (lambda: compare(SCORES, against="float"), "no scores are called 'float'; there are: dense, pruned"),
        (lambda: compare({**SCORES, "few": [1.0, 2.0]}, against="dense"), "2 and 3 values do not make pairs"),
    ],
)
def test_bad_input_is_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_a_ratio_is_inside_exactly_where_the_paired_difference_is_no_difference():
    rng = np.random.default_rng(0)
    x = rng.normal(5.0, 1.0, 12)
    y = 0.8 * x + rng.normal(0.0, 0.7, 12)
    found = ratio(y, x)
    assert found.mean == pytest.approx(y.mean() / x.mean())
    assert found.low < found.mean < found.high
    assert (found.n, found.unit) == (12, "×")
    for edge in (found.low, found.high):
        gap = paired_difference(y, edge * x)
        assert min(abs(gap.low), abs(gap.high)) < 1e-9
    exact = ratio([3.0, 3.0], [4.0, 4.0])
    assert (exact.low, exact.mean, exact.high) == pytest.approx((0.75, 0.75, 0.75))


def test_each_row_is_the_mean_and_the_paired_difference():
    table = compare(SCORES, against="dense", decimals=2, covers="seeds")
    assert table.loc["pruned", "test accuracy (%)"] == f"{mean(SCORES['pruned'], ''):.2f}" == "96.33 ± 2.59"
    gain = difference(SCORES["pruned"], SCORES["dense"], "")
    assert table["against dense (points)"].tolist() == ["", f"{gain:+.2f}"]
    assert table.columns.name == "3 replicas, 95 %, ± covers seeds"
    assert list(compare(SCORES).columns) == ["test accuracy (%)"]


def test_the_corner_says_what_the_lesson_covers(monkeypatch):
    monkeypatch.setattr(statistics, "COVERS", ["training and split"])
    assert compare(SCORES).columns.name.endswith("± covers training and split")
