import base64

import numpy as np
import pytest
from matplotlib import colors
from matplotlib import pyplot as plt

from course_lib.evidence import plots
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


def test_colours_differ_in_lightness_or_hue_for_everybody():
    assert len({colors.to_rgb(c) for c in plots.COLORS.values()}) == len(plots.COLORS) == 9


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


def test_band_refuses_a_wrong_table(ax):
    with pytest.raises(ValueError, match=r"replicas >= 2, 3\].*\(5, 4\)"):
        plots.band(ax, [1, 2, 3], np.zeros((5, 4)))


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
    assert len(set(zip(points.get_xdata(), points.get_ydata(), strict=True))) == 3  # none hides another
    wanted = mean_interval([1.0, 1.0, 2.0])
    assert bar.get_xdata() == pytest.approx([wanted.low, wanted.high])
    assert mean.get_xdata() == pytest.approx([wanted.mean])
    plots.plot_scores({"a": [1.0, 2.0], "b": [1.0, 1.0]}, alt="Two rows of dots and intervals.")
    assert "Two rows" in shown[0]["text/html"]


def test_heat_map_marks_the_largest(ax):
    plots.heat_map(ax, [[1.0, 3.0], [2.0, 0.5]], ["r", 2.0], ["a", "b"])
    assert [t.get_text() for t in ax.texts] == ["1.0", "3.0 ★", "2.0", "0.5"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["r", "2"]
    with pytest.raises(ValueError, match=r"shape \(1, 2\) to fit the labels, got \(2, 2\)"):
        plots.heat_map(ax, np.zeros((2, 2)), ["r"], ["a", "b"])
