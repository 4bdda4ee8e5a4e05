import base64
import math

import numpy as np
import pandas
import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from matplotlib import pyplot as plt

from course_lib.evidence import plots
from course_lib.evidence.plots import draw_pareto, pareto_front, plot_pareto, show_source
from course_lib.evidence.statistics import mean_interval


@pytest.fixture
def ax():
    with plt.rc_context():
        plots.use_style()
        figure, axes = plt.subplots()
        yield axes
        plt.close(figure)


@pytest.fixture
def shown(monkeypatch):
    bundles = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw=False: bundles.append(data))
    return bundles


def test_a_picture_carries_its_text_into_the_page(ax, shown):
    plots.show(ax.figure, alt='One line "A" falls & another rises.')
    (bundle,) = shown
    head, data = bundle["text/html"].split("base64,")
    assert head.splitlines()[0] == "<!-- a picture: open it -->"
    assert 'alt="One line &quot;A&quot; falls &amp; another rises."' in head
    assert base64.b64decode(data.removesuffix('">')).startswith(b"\x89PNG")
    assert bundle["text/plain"] == 'One line "A" falls & another rises.'
    assert ax.figure.number not in plt.get_fignums()
    with pytest.raises(ValueError, match="a sentence that says what the picture shows, got 'a plot'"):
        plots.show(ax.figure, alt="a plot")


def test_band_is_the_t_interval(ax):
    samples = np.random.default_rng(0).normal(size=(5, 3))
    plots.band(ax, [1, 2, 3], samples, label="x")
    path = ax.collections[0].get_paths()[0].vertices
    wanted = mean_interval(samples[:, 0])
    at_first = path[path[:, 0] == 1, 1]
    assert at_first.min() == pytest.approx(wanted.low)
    assert at_first.max() == pytest.approx(wanted.high)
    assert ax.lines[0].get_ydata() == pytest.approx(samples.mean(axis=0))
    with pytest.raises(ValueError, match=r"replicas >= 2, 2\].*\(5, 3\)"):
        plots.band(ax, [1, 2], samples)


def test_curves_have_a_line_each_and_a_legend(ax, shown):
    curves = dict(zip("ab", np.random.default_rng(0).random((2, 4, 2)), strict=True))
    plots.plot_curves([1, 10], curves, alt="", xlabel="x", xscale="log", line={"dense": 0.5}, ax=ax)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b", "dense"]
    assert (ax.get_xlabel(), ax.get_xscale(), shown) == ("x", "log", [])
    plots.plot_curves([1, 10], curves, alt="Two lines with their bands.")
    assert "Two lines with their bands." in shown[0]["text/html"]


def test_scores_show_every_replica_once(ax, shown):
    plots.dots(ax, 0, [1.0, 1.0, 2.0], "black")
    points, bar, mean = ax.lines
    assert sorted(points.get_xdata()) == [1.0, 1.0, 2.0]
    wanted = mean_interval([1.0, 1.0, 2.0])
    assert bar.get_xdata() == pytest.approx([wanted.low, wanted.high])
    assert mean.get_xdata() == pytest.approx([wanted.mean])
    plots.dots(ax, 1, [1.0] * 12 + [2.0], "black")
    high = ax.lines[3]
    assert len(set(zip(high.get_xdata(), high.get_ydata(), strict=True))) == 13  # none hides another
    assert min(high.get_ydata()) > 0.4  # and none reaches the row above
    plots.plot_scores({"a": [1.0, 2.0], "b": [1.0, 1.0]}, alt="Two rows of dots and intervals.")
    assert "Two rows" in shown[0]["text/html"]


def test_heat_map_marks_the_largest(ax):
    plots.heat_map(ax, [[1.0, 3.0], [2.0, 0.5]], ["r", 2.0], ["a", "b"])
    assert [t.get_text() for t in ax.texts] == ["1.0", "3.0 ★", "2.0", "0.5"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["r", "2"]
    with pytest.raises(ValueError, match=r"shape \(1, 2\) to fit the labels, got \(2, 2\)"):
        plots.heat_map(ax, np.zeros((2, 2)), ["r"], ["a", "b"])


# Pareto


def loop(costs, gains):
    """Straight from the definition, one pair after another."""

    def beats(j, i):
        no_worse = all(costs[j] <= costs[i]) and all(gains[j] >= gains[i])
        return no_worse and (any(costs[j] != costs[i]) or any(gains[j] != gains[i]))

    return [not any(beats(j, i) for j in range(len(costs))) for i in range(len(costs))]


@pytest.mark.parametrize(("c", "g"), [(1, 1), (2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("levels", [3, 6, 1000])
def test_front_equals_a_loop_with_ties_and_duplicates(c, g, levels):
    r = np.random.default_rng(levels)
    costs, gains = r.integers(levels, size=(60, c)), r.integers(levels, size=(60, g))
    assert pareto_front(costs, gains).tolist() == loop(costs, gains)


def test_infinity_is_a_cost_and_one_point_is_a_front():
    assert pareto_front([math.inf, 1], [9, 8]).tolist() == [True, True]
    assert pareto_front(torch.tensor([3]), [1]).tolist() == [True]


@pytest.mark.parametrize(
    ("costs", "gains", "text"),
    [
        ([], [], r"the same points \[P\] or \[P, C\], got \(0,\), \(0,\)"),
        ([1, 2], [1], r"got \(2,\), \(1,\)"),
        ([1, 2], [[1, 2], [math.nan, 1]], "must not be NaN"),
        (1.0, 2.0, r"got \(\), \(\)"),
        (np.zeros((2, 2, 2)), [1, 2], r"got \(2, 2, 2\)"),
    ],
)
def test_bad_points_are_refused_in_words(costs, gains, text):
    with pytest.raises(ValueError, match=text):
        pareto_front(costs, gains)


ROWS = [
    ("dense", "", [97.0, 98.0], 1000, 1000),
    ("pruned", "90 %", [96.0, 97.0], 100, 1000),
    ("pruned", "50 %", [95.0, 96.0], 500, 1000),
    ("small", "8", [20.0, 30.0], 10, 10),
]
TABLE = pandas.DataFrame(ROWS, columns=["family", "label", "score", "bytes", "macs"])


def test_a_figure_shows_means_intervals_and_the_front(ax):
    draw_pareto(ax, TABLE, "bytes", xlabel="bytes")
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


def test_what_lies_below_the_floor_is_drawn_there_with_its_value(ax):
    draw_pareto(ax, TABLE, "bytes", xlabel="bytes", floor=90)
    assert "8 ↓ 25" in [t.get_text() for t in ax.texts]
    assert min(float(np.min(line.get_ydata())) for line in ax.lines if len(line.get_ydata())) == 90
    with pytest.raises(ValueError, match="bytes must be finite and above 0"):
        draw_pareto(ax, TABLE.assign(bytes=0), "bytes", xlabel="")


def test_sixteen_families_can_be_told_apart(ax):
    rows = [(f"family {i}", "", [90.0, 91.0], 10 + i) for i in range(16)]
    draw_pareto(ax, pandas.DataFrame(rows, columns=["family", "label", "score", "bytes"]), "bytes", xlabel="bytes")
    lines = [line for line in ax.lines if str(line.get_label()).startswith("family")]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines) == 16


def test_panels_share_a_legend(capsys):
    plot_pareto(TABLE, {"bytes": "bytes", "macs": "MACs"}, alt="Four models by bytes and by MACs.", floor=90)
    assert "Four models by bytes" in capsys.readouterr().out
    assert not plt.get_fignums()


# Source


def example(x):
    """What is not shown.

    >>> not this
    """

    def inner():
        """Nor this."""
        return "but this"

    return inner() + x  # and this


def test_the_source_comes_without_docstrings():
    shown = show_source(example)
    body = '    def inner():\n        return "but this"\n\n    return inner() + x  # and this'
    assert str(shown) == f"def example(x):\n{body}"
    data, _ = DisplayFormatter().format(shown)
    assert data["text/markdown"] == f"```python\n{shown}\n```"
    assert data["text/plain"] == str(shown)
