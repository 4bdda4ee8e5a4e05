import math

import numpy as np
import pytest
import torch

from course_lib.evidence.pareto import dominates, dominates_surely, pareto_front


def loop(costs, gains):
    """Straight from the definition, one pair after another."""
    front = []
    for i in range(len(costs)):
        beaten = False
        for j in range(len(costs)):
            no_worse = all(c <= d for c, d in zip(costs[j], costs[i], strict=True))
            no_worse = no_worse and all(g >= h for g, h in zip(gains[j], gains[i], strict=True))
            differs = list(costs[j]) != list(costs[i]) or list(gains[j]) != list(gains[i])
            beaten = beaten or (no_worse and differs)
        front.append(not beaten)
    return front


@pytest.mark.parametrize(("c", "g"), [(1, 1), (2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("levels", [3, 6, 1000])
def test_front_equals_a_loop_with_ties_and_duplicates(c, g, levels):
    r = np.random.default_rng(levels)
    costs, gains = r.integers(levels, size=(60, c)), r.integers(levels, size=(60, g))
    assert pareto_front(costs, gains).tolist() == loop(costs.tolist(), gains.tolist())


def test_front_of_two_objectives_equals_a_sweep():
    r = np.random.default_rng(0)
    costs, gains = r.random(200), r.random(200)
    best, wanted = -np.inf, np.zeros(200, dtype=bool)
    for i in np.argsort(costs):
        wanted[i], best = gains[i] > best, max(best, gains[i])
    assert (pareto_front(costs, gains) == wanted).all()
    assert (pareto_front(torch.tensor(costs), torch.tensor(gains)) == wanted).all()
    assert (pareto_front(costs.tolist(), gains.tolist()) == wanted).all()


def test_duplicates_stand_or_fall_together_and_infinity_is_a_cost():
    assert pareto_front([1, 1, 2, 2], [5, 5, 4, 4]).tolist() == [True, True, False, False]
    assert pareto_front([math.inf, 1], [9, 8]).tolist() == [True, True]
    assert pareto_front([3], [1]).tolist() == [True]


@pytest.mark.parametrize(
    ("costs", "gains", "text"),
    [
        ([], [], "at least one; got 0 and 0"),
        ([1, 2], [1], "got 2 and 1"),
        ([1, math.nan], [1, 2], r"costs must not be NaN, got it at \[1, 0\]"),
        ([1, 2], [[1, 2], [math.nan, 1]], r"gains must not be NaN, got it at \[1, 0\]"),
        (1.0, 2.0, r"costs must have shape \[P\].* got \(\)"),
        (np.zeros((2, 2, 2)), [1, 2], r"got \(2, 2, 2\)"),
    ],
)
def test_bad_points_are_refused_in_words(costs, gains, text):
    with pytest.raises(ValueError, match=text):
        pareto_front(costs, gains)


def test_dominates_agrees_with_the_front():
    r = np.random.default_rng(1)
    costs, gains = r.integers(4, size=(30, 2)), r.integers(4, size=(30, 2))
    beaten = [any(dominates(costs[j], gains[j], costs[i], gains[i]) for j in range(30)) for i in range(30)]
    assert (~np.array(beaten) == pareto_front(costs, gains)).all()
    with pytest.raises(ValueError, match="as many costs, got 2 and 1"):
        dominates([1, 2], 1, [1], 1)
    with pytest.raises(ValueError, match="as many gains, got 1 and 2"):
        dominates(1, 1, 1, [1, 2])
    with pytest.raises(ValueError, match="gain must not be NaN"):
        dominates(1, math.nan, 1, 1)


def test_surely_needs_the_interval_and_the_cost():
    better, worse = [0.97, 0.98, 0.97, 0.98], [0.95, 0.96, 0.96, 0.96]
    assert dominates_surely(10, better, 20, worse)
    assert dominates_surely(20, better, 20, worse)
    assert not dominates_surely(21, better, 20, worse)
    assert not dominates_surely(10, worse, 20, better)
    noisy = [0.90, 0.99, 0.95, 1.00]
    verdict = dominates_surely(10, noisy, 20, worse)
    assert verdict.gain.mean > 0
    assert not verdict
    assert verdict.cost_ratio == 0.5
    assert dominates_surely(10, better, 20, worse, level=0.5).gain.level == 0.5
    assert dominates_surely([10, 5], better, [20, 5], worse).cost_ratio == 1.0
    assert not dominates_surely([10, 6], better, [20, 5], worse)
    assert not dominates_surely(10, worse, 20, worse)


def test_a_margin_asks_for_a_strictly_lower_cost():
    a, b = [0.960, 0.961, 0.959], [0.962, 0.962, 0.962]
    assert not dominates_surely(10, a, 20, b)
    assert dominates_surely(10, a, 20, b, margin=0.01)
    assert not dominates_surely(10, a, 20, b, margin=0.003)
    assert not dominates_surely(20, a, 20, b, margin=0.01)


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        ((0, [1, 2], 1, [1, 2]), {}, "finite, above 0"),
        ((math.nan, [1, 2], 1, [1, 2]), {}, "finite, above 0"),
        (([1, 2], [1, 2], 1, [1, 2]), {}, "as many for a as for b"),
        ((1, [1, 2], 1, [1, 2, 3]), {}, "do not make pairs"),
        ((1, [1], 1, [1]), {}, "at least two values"),
        ((1, [1, math.nan], 1, [1, 2]), {}, "finite"),
        ((1, [1, 2], 1, [1, 2]), {"margin": -1}, "margin must be at least 0, got -1"),
        ((1, [1, 2], 1, [1, 3]), {"level": 2}, "level must be between 0 and 1"),
    ],
)
def test_bad_comparisons_are_refused_in_words(arguments, options, text):
    with pytest.raises(ValueError, match=text):
        dominates_surely(*arguments, **options)
