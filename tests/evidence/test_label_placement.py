from itertools import combinations

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.text import Text

from course_lib.evidence.label_placement import place_labels


@pytest.fixture
def ax():
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.set(xlim=(0, 10), ylim=(0, 10))
    yield axes
    plt.close(figure)


def boxes(labels):
    labels = [label for label in labels if label]
    labels[0].figure.canvas.draw()
    # The text alone: an annotation's own extent holds its arrow too.
    return [Text.get_window_extent(label) for label in labels]


def crowded(n=18, seed=0):
    return np.random.default_rng(seed).uniform(3, 7, size=(n, 2))


def test_labels_of_a_crowd_overlap_neither_each_other_nor_leave_the_axes(ax):
    points = crowded()
    ax.plot(*points.T, "o")
    found = boxes(place_labels(ax, points, [f"level {i}" for i in range(18)]))
    assert len(found) == 18
    assert not [1 for a, b in combinations(found, 2) if a.overlaps(b)]
    frame = ax.get_window_extent()
    assert all(frame.x0 <= b.x0 and b.x1 <= frame.x1 and frame.y0 <= b.y0 and b.y1 <= frame.y1 for b in found)


def test_labels_keep_off_the_points_and_stay_near(ax):
    points = np.array([[5, 5], [5.4, 5.1], [8, 2]])
    labels = place_labels(ax, points, ["one", "two", "three"], point_radius=4)
    at = ax.transData.transform(points)
    for i, box in enumerate(boxes(labels)):
        assert not any(box.x0 <= x <= box.x1 and box.y0 <= y <= box.y1 for x, y in at)
        assert np.hypot(*(np.clip(at[i], box.min, box.max) - at[i])) * 72 / ax.figure.dpi < 20


def test_the_place_in_the_picture_is_the_place_that_was_sought(ax):
    """After a second drawing nothing has moved, and labels do not move the axes."""
    points = crowded(6)
    before = ax.get_position().bounds
    labels = place_labels(ax, points, list("abcdef"))
    first = [b.bounds for b in boxes(labels)]
    ax.figure.canvas.draw()
    assert ax.get_position().bounds == before
    assert np.allclose(first, [b.bounds for b in boxes(labels)])


def test_lines_are_kept_off_where_there_is_room(ax):
    line = [[0, 5], [10, 5]]
    (label,) = place_labels(ax, [[5, 5]], ["word"], avoid=[line])
    (box,) = boxes([label])
    y = ax.transData.transform([[5, 5]])[0, 1]
    assert box.y0 > y or box.y1 < y


def test_empty_texts_are_left_out_and_nothing_is_no_error(ax):
    labels = place_labels(ax, [[1, 1], [2, 2]], ["", "b"], colors=["red", "blue"])
    assert labels[0] is None
    assert labels[1].get_text() == "b"
    assert labels[1].get_color() == "blue"
    assert [t.get_text() for t in ax.texts] == ["b"]
    assert place_labels(ax, [], []) == []


def test_what_does_not_fit_is_refused(ax):
    for points, texts, colors in (([[1, 1]], ["a", "b"], None), ([1, 2], ["a", "b"], None), ([[1, 1]], ["a"], [])):
        with pytest.raises(ValueError, match=r"points must be \[P, 2\] with a text and a colour each"):
            place_labels(ax, points, texts, colors=colors)
