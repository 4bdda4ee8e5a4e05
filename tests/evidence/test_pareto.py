import math

import matplotlib.pyplot as plt
import numpy as np
import pandas
import pytest
import torch

from course_lib.evidence.pareto import draw_pareto, pareto_front, plot_pareto
from course_lib.evidence.statistics import mean_interval


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
        ([], [], r"the same points \[P\] or \[P, C\], got \(0,\), \(0,\)"),
        ([1, 2], [1], r"got \(2,\), \(1,\)"),
        ([1, math.nan], [1, 2], "must not be NaN"),
        ([1, 2], [[1, 2], [math.nan, 1]], "must not be NaN"),
        (1.0, 2.0, r"got \(\), \(\)"),
        (np.zeros((2, 2, 2)), [1, 2], r"got \(2, 2, 2\)"),
    ],
)
def test_bad_points_are_refused_in_words(costs, gains, text):
    with pytest.raises(ValueError, match=text):
        pareto_front(costs, gains)


TABLE = pandas.DataFrame(
    {
        "family": ["dense", "pruned", "pruned", "small"],
        "label": ["", "90 %", "50 %", "8"],
        "score": [[97.0, 98.0], [96.0, 97.0], [95.0, 96.0], [20.0, 30.0]],
        "bytes": [1000, 100, 500, 10],
        "macs": [1000, 1000, 1000, 10],
    }
)


def test_a_figure_shows_means_intervals_and_the_front():
    figure, ax = plt.subplots()
    assert draw_pareto(ax, TABLE, "bytes", xlabel="bytes").tolist() == [True, True, False, True]
    (front,) = [line for line in ax.lines if line.get_label() == "front of the means"]
    assert front.get_xdata().tolist() == [10, 100, 1000, 1300]
    assert front.get_ydata().tolist() == [25, 96.5, 97.5, 97.5]
    assert [t.get_text() for t in ax.texts if t.get_text()] == ["90 %", "8"]
    bars = [line for line in ax.lines if len(line.get_xdata()) == 2 and len(set(line.get_xdata())) == 1]
    wanted = mean_interval([96.0, 97.0])
    assert any(np.allclose(bar.get_ydata(), [wanted.low, wanted.high]) for bar in bars)
    points = {tuple(line.get_xdata()): line.get_alpha() for line in ax.lines if len(line.get_xdata()) == 1}
    assert points[(500,)] < points[(100,)] == 1.0
    assert ax.get_xscale() == "log"
    plt.close(figure)


def test_what_lies_below_the_floor_is_drawn_there_with_its_value():
    figure, ax = plt.subplots()
    draw_pareto(ax, TABLE, "bytes", xlabel="bytes", floor=90)
    assert "8 ↓ 25" in [t.get_text() for t in ax.texts]
    assert min(float(np.min(line.get_ydata())) for line in ax.lines if len(line.get_ydata())) == 90
    plt.close(figure)
    with pytest.raises(ValueError, match="bytes must be finite and above 0"):
        draw_pareto(ax, TABLE.assign(bytes=0), "bytes", xlabel="")


def test_panels_share_a_legend(capsys):
    plot_pareto(
        TABLE, {"bytes": "bytes of the file", "macs": "MACs"}, alt="Four models by bytes and by MACs.", floor=90
    )
    assert "Four models by bytes" in capsys.readouterr().out
    assert not plt.get_fignums()
