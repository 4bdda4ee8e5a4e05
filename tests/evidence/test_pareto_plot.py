from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib import colors
from matplotlib import pyplot as plt
from matplotlib.text import Text

from course_lib.evidence import plots
from course_lib.evidence.pareto import pareto_front
from course_lib.evidence.pareto_plot import Family, draw_pareto, pareto_figure
from course_lib.evidence.statistics import mean_interval


@pytest.fixture(autouse=True)
def style():
    with plt.rc_context():
        plots.use_style()
        yield
    plt.close("all")


def families(count=9, seeds=5, seed=0):
    r = np.random.default_rng(seed)
    made = []
    for i in range(count):
        costs = np.exp(r.uniform(8, 13, size=4))
        gains = (97 - 40000 / costs * r.uniform(0.2, 1, size=4))[:, None] + 0.3 * r.normal(size=(4, seeds))
        section = "" if i % 3 else f"3.{i + 1}"
        made.append(Family(f"family {i}", costs, gains, [f"{i}{j} %" for j in range(4)], section))
    return made


def markers(ax):
    return [line for line in ax.lines if line.get_linestyle() == "None"]


def words(ax):
    return [(t.get_text(), Text.get_window_extent(t)) for t in ax.texts]


def test_masks_are_the_front_of_the_means_and_the_rest_is_faint():
    made = families()
    _, ax = plt.subplots()
    masks = draw_pareto(ax, made, xlabel="bytes", ylabel="accuracy, %")
    costs = np.concatenate([f.costs for f in made])
    means = np.concatenate([f.gains.mean(axis=1) for f in made])
    wanted = pareto_front(costs, means)
    assert np.concatenate(masks).tolist() == wanted.tolist()
    drawn = markers(ax)
    assert [line.get_xdata()[0] for line in drawn] == costs.tolist()
    assert [line.get_ydata()[0] for line in drawn] == pytest.approx(means.tolist())
    assert [line.get_alpha() == 1.0 for line in drawn] == wanted.tolist()
    assert ax.get_xscale() == "log"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("bytes", "accuracy, %")


def test_bars_are_t_intervals():
    made = families(1)
    _, ax = plt.subplots()
    draw_pareto(ax, made, xlabel="bytes")
    bars = [line.get_ydata() for line in ax.lines if len(line.get_xdata()) == 2 and line.get_linewidth() == 1.8]
    wanted = [mean_interval(row) for row in made[0].gains]
    assert [list(bar) for bar in bars] == [pytest.approx([w.low, w.high]) for w in wanted]
    assert ax.get_ylim()[0] < min(w.low for w in wanted)
    assert ax.get_ylim()[1] > max(w.high for w in wanted)


def test_the_front_is_a_step_line_from_its_cheapest_point_to_the_edge():
    _, ax = plt.subplots()
    draw_pareto(ax, [Family("a", [10, 100, 1000], [90.0, 95.0, 94.0])], xlabel="bytes")
    (front,) = [line for line in ax.lines if line.get_color() == "0.35"]
    assert front.get_xydata()[:-1].tolist() == [[10, 90], [100, 90], [100, 95]]
    assert front.get_xydata()[-1].tolist() == [ax.get_xlim()[1], 95]


@pytest.mark.parametrize("seed", range(3))
def test_words_overlap_neither_each_other_nor_the_frame(seed):
    figure = pareto_figure({"bytes": families(seed=seed)}, ylabel="accuracy, %", floor=90, panel_size=(9, 5))
    figure.canvas.draw()
    (ax,) = figure.axes
    found = words(ax)
    assert len(found) >= 12
    assert not [(a, b) for (a, p), (b, q) in combinations(found, 2) if p.overlaps(q)]
    frame = ax.get_window_extent()
    assert all(frame.x0 - 1 <= b.x0 and b.x1 <= frame.x1 + 1 for _, b in found)


def test_front_points_carry_their_level_and_the_articles_methods_their_section():
    made = [
        Family("a", [10, 20], [95, 94], ["first", "second"], "3.1"),
        Family("b", [30, 40], [96, 90], ["third", "4"]),
    ]
    _, ax = plt.subplots()
    draw_pareto(ax, made, xlabel="bytes")
    assert sorted(t.get_text() for t in ax.texts) == ["3.1", "3.1 · first", "third"]


def test_below_the_floor_a_point_is_drawn_at_it_with_its_value():
    _, ax = plt.subplots()
    draw_pareto(ax, [Family("a", [10, 20], [[40.0, 41.0], [95.0, 96.0]])], xlabel="bytes", floor=90)
    assert [line.get_ydata()[0] for line in markers(ax)] == [90, 95.5]
    assert [t.get_text() for t in ax.texts] == ["↓ 40.5"]
    assert 88 < ax.get_ylim()[0] < 90


def test_panels_share_looks_and_one_legend_that_covers_nothing():
    made = families(10)
    few = [made[3], made[7]]
    figure = pareto_figure(
        {"bytes": made, "MACs": few, "latency, µs": made}, ylabel="accuracy, %", title="All", floor=90
    )
    figure.canvas.draw()
    first, second, _ = figure.axes
    assert [ax.get_xlabel() for ax in figure.axes] == ["bytes", "MACs", "latency, µs"]
    assert [ax.get_ylabel() for ax in figure.axes] == ["accuracy, %", "", ""]
    assert markers(second)[0].get_marker() == markers(first)[12].get_marker()
    assert markers(second)[0].get_markerfacecolor() == markers(first)[12].get_markerfacecolor()
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names[0] == "family 0 (article 3.1)"
    assert names[1] == "family 1"
    assert len(names) == 11
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    assert not any(box.overlaps(ax.get_tightbbox()) for ax in figure.axes)


def test_no_two_of_sixteen_families_look_alike():
    made = [Family(f"f{i}", [1 + i], [i]) for i in range(16)]
    _, ax = plt.subplots()
    draw_pareto(ax, made, xlabel="bytes")
    looks = {
        (m.get_marker(), colors.to_hex(m.get_markerfacecolor()), colors.to_hex(m.get_markeredgecolor()))
        for m in markers(ax)
    }
    assert len(looks) == 16


def test_families_take_tensors_lists_and_single_measurements():
    one = Family("a", torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert one.gains.shape == (2, 2)
    assert one.labels == ("", "")
    assert Family("b", [1, 2], [3, 4]).gains.shape == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([1, 2], [[1, 2]]), r"a: gains must be \[2, seeds\].* \(1, 2\)"),
        (([], []), r"gains must be \[0, seeds\]"),
        ((1, [1]), "gains must be"),
        (([0, 1], [1, 2]), "above 0 for a log axis"),
        (([1, np.nan], [1, 2]), "above 0 for a log axis"),
        (([1, 2], [1, np.inf]), "gains finite"),
        (([1, 2], [1, 2], ["x"]), "1 labels do not fit 2 levels"),
    ],
)
def test_bad_families_are_refused_in_words(arguments, text):
    with pytest.raises(ValueError, match=text):
        Family("a", *arguments)


def test_there_must_be_families_of_different_names_and_a_panel():
    _, ax = plt.subplots()
    for bad in ([], [Family("a", [1], [1]), Family("a", [2], [2])]):
        with pytest.raises(ValueError, match="at least one, of different names"):
            draw_pareto(ax, bad, xlabel="bytes")
    with pytest.raises(ValueError, match="at least one cost, got none"):
        pareto_figure({}, ylabel="accuracy")
