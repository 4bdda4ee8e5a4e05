from itertools import combinations

import pytest
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

from course_lib.evidence.guide_plot import decision_guide

LONG = "a method whose name and reason fill several lines of a narrow box, with one Donaudampfschifffahrtsgesellschaft"
ROWS = {
    "download size": ("prune, share, Huffman", "44× fewer bytes", "distil first"),
    "RAM while it runs": (LONG, "a tenth", LONG),
    "latency": ("int8", LONG, ""),
}


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def parts(figure):
    (ax,) = figure.axes
    renderer = figure.canvas.get_renderer()
    texts = [(t.get_text(), t.get_window_extent(renderer)) for t in ax.texts if t.get_text()]
    boxes = [p.get_window_extent(renderer) for p in ax.patches if isinstance(p, FancyBboxPatch)]
    return texts, boxes


@pytest.mark.parametrize("width", [7.0, 10.0, 13.0])
@pytest.mark.parametrize("rows", [ROWS, dict(list(ROWS.items())[:1])])
def test_nothing_overlaps_and_every_text_is_inside_its_box(rows, width):
    headers = ("it hurts here", "first method", "measured in this chapter on this machine", "then")
    figure = decision_guide("What hurts?", rows, headers=headers, note=LONG, width=width)
    texts, boxes = parts(figure)
    assert not [(a, b) for (a, p), (b, q) in combinations(texts, 2) if p.overlaps(q)]
    assert not [1 for p, q in combinations(boxes, 2) if p.overlaps(q)]
    inside = [any(b.contains(*t.min) and b.contains(*t.max) for b in boxes) for _, t in texts]
    assert sum(inside) == len(boxes)
    page = figure.bbox
    assert all(t.x0 >= 0 and t.x1 <= page.width and t.y0 >= 0 and t.y1 <= page.height for _, t in texts)
    assert figure.get_figwidth() == width


def test_every_word_is_there_and_an_empty_place_has_no_box():
    texts, boxes = parts(decision_guide("What hurts?", ROWS))
    said = {" ".join(text.split()) for text, _ in texts}
    assert {"What hurts?", "download size", "44× fewer bytes", "distil first", "a tenth", "latency"} <= said
    assert len(boxes) == 1 + 3 + 9 - 1


def test_a_no_break_space_holds():
    words = "error is not above that of the dense network: 0.4\u00a0±\u00a00.3\u00a0points"
    texts, _ = parts(decision_guide("What?", {"size": (words,)}, width=5.0))
    assert any("0.4\u00a0±\u00a00.3\u00a0points" in text for text, _ in texts)


@pytest.mark.parametrize(
    ("rows", "options", "text"),
    [
        ({}, {}, "rows must be at least one"),
        ({"a": ("x",), "b": ("x", "y")}, {}, r"same number of texts.* got \{'a': 1, 'b': 2\}"),
        ({"a": ()}, {}, "at least one"),
        ({" ": ("x",)}, {}, "rows must be"),
        ({"a": ("x",)}, {"headers": ("one",)}, "3 columns need 3 widths above 0 and 0 or 2 headers"),
        ({"a": ("x",)}, {"widths": (1, 1)}, "3 columns need"),
        ({"a": ("x",)}, {"widths": (1, 1, 0)}, "3 columns need"),
    ],
)
def test_what_does_not_fit_is_refused(rows, options, text):
    with pytest.raises(ValueError, match=text):
        decision_guide("What?", rows, **options)
    assert not plt.get_fignums()
