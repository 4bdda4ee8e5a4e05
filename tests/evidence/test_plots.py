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


def test_colours_differ_in_lightness_or_hue_for_everybody():
    used = [colors.to_rgb(c) for c in plots.COLORS.values()]
    assert len(set(used)) == len(plots.COLORS) == 9


def test_band_is_the_t_interval(ax):
    samples = np.random.default_rng(0).normal(size=(5, 3))
    plots.band(ax, [1, 2, 3], samples, label="x")
    path = ax.collections[0].get_paths()[0].vertices
    wanted = mean_interval(samples[:, 0])
    at_first = path[path[:, 0] == 1, 1]
    assert at_first.min() == pytest.approx(wanted.low)
    assert at_first.max() == pytest.approx(wanted.high)


def test_band_refuses_a_wrong_table(ax):
    with pytest.raises(ValueError, match=r"seeds >= 2, 3\].*\(5, 4\)"):
        plots.band(ax, [1, 2, 3], np.zeros((5, 4)))


def test_dots_and_bars_draw_what_they_are_given(ax):
    plots.dots(ax, [1.0, 1.0, 2.0])
    assert [len(line.get_xdata()) for line in ax.lines] == [2, 1]
    interval = mean_interval([1.0, 2.0, 3.0])
    plots.interval_bars(ax, ["a"], [interval])
    assert list(ax.lines[2].get_xdata()) == [interval.low, interval.high]


def test_family_tree_names_everything():
    figure = plots.family_tree("root", {"one": ("blue", ["a", "b"]), "two": ("green", ["c", "d"])}, "note")
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {"root", "one", "two", "a", "b", "c", "d", "note"} <= texts
    plt.close(figure)


def test_show_stores_the_alternative_text_and_closes(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "IPython.display.display", lambda data, raw, metadata: seen.update(data=data, metadata=metadata)
    )
    figure, _ = plt.subplots()
    plots.show(figure, alt="An empty pair of axes.")
    assert seen["data"]["image/png"].startswith(b"\x89PNG")
    assert seen["metadata"] == {"image/png": {"alt": "An empty pair of axes."}}
    assert not plt.fignum_exists(figure.number)
    with pytest.raises(ValueError, match="alt must be a sentence"):
        plots.show(figure, alt="figure")


def test_heat_map_writes_every_value_and_stars_the_largest(ax):
    plots.heat_map(ax, [[1.0, 2.0, 0.5], [4.0, 3.0, 2.5]], [0.0, 0.5], ["a", "b", "c"])
    written = {text.get_position(): text.get_text() for text in ax.texts}
    assert written == {(0, 0): "1.0", (1, 0): "2.0", (2, 0): "0.5", (0, 1): "4.0 ★", (1, 1): "3.0", (2, 1): "2.5"}
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b", "c"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "0.5"]
    inks = {text.get_text(): text.get_color() for text in ax.texts}
    assert (inks["0.5"], inks["4.0 ★"]) == ("white", "black")


def test_heat_map_refuses_a_table_that_does_not_fit(ax):
    with pytest.raises(ValueError, match=r"shape \(1, 2\) to fit the labels, got \(2, 1\)"):
        plots.heat_map(ax, [[1.0], [2.0]], ["r"], ["a", "b"])
