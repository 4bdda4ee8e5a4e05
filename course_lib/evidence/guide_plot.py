"""A decision guide as a picture: what hurts, what to try first, and what it gave, one row a pain."""

import textwrap
from collections.abc import Mapping, Sequence

from course_lib.evidence.plots import COLORS

__all__ = ["decision_guide"]

_HUES = ("blue", "orange", "green", "vermillion", "purple", "sky", "yellow", "grey")
_LINE, _PAD, _GAP = 0.19, 0.11, 0.42  # inches: a line of text, air within a box, the way of an arrow
_LETTER = 0.079  # inches, on average, at the font size used


def decision_guide(
    question: str,
    rows: Mapping[str, Sequence[str]],
    *,
    headers: Sequence[str] = (),
    note: str = "",
    widths: Sequence[float] | None = None,
    width: float = 10.0,
):
    """Draw ``question`` with an arrow to each key of ``rows``, and from there along that row's boxes.

    Texts are broken into lines by their measured width and boxes grow with them, so nothing overlaps whatever is
    written; keep a box to a dozen words for the reader's sake. A no-break space keeps "0.4 ± 0.3" on one line.

    Args:
        question: the root, such as "What hurts?".
        rows: what hurts → one text a further column, such as (first method, what it gave here, what next). All rows
            have the same number, at least one; "" leaves a place empty and ends the row's arrows.
        headers: a title over each column after the question's, or none.
        note: a line below, or none.
        widths: relative widths of the columns, the question's first; equal but for a narrow first pair if not given.
        width: of the figure in inches.

    Returns:
        A matplotlib figure, as high as its texts need.

    Raises:
        ValueError: no row, rows of different lengths, an empty key, headers or widths that do not fit the columns.
    """
    lengths = {len(steps) for steps in rows.values()}
    if len(lengths) != 1 or 0 in lengths or not all(str(pain).strip() for pain in rows):
        raise ValueError(
            f"rows must be at least one, each with the same number of texts, at least one; got "
            f"{ {pain: len(steps) for pain, steps in rows.items()} }"
        )
    columns = 2 + lengths.pop()
    widths = [0.7, 0.9, *[1.4] * (columns - 2)] if widths is None else list(widths)
    if len(widths) != columns or min(widths) <= 0 or len(headers) not in (0, columns - 1):
        raise ValueError(f"{columns} columns need {columns} widths above 0 and 0 or {columns - 1} headers")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(width, 1.0), layout="none")
    renderer = figure.canvas.get_renderer()
    usable = width - 0.3 - _GAP * (columns - 1)
    across = [usable * share / sum(widths) for share in widths]
    lefts = [0.15 + sum(across[:i]) + _GAP * i for i in range(columns)]
    broken = {
        (row, column): _broken(figure, renderer, text, across[column] - 2 * _PAD)
        for row, (pain, steps) in enumerate(rows.items())
        for column, text in enumerate((pain, *steps), start=1)
    }
    root = _broken(figure, renderer, question, across[0] - 2 * _PAD)
    heights = [
        2 * _PAD + _LINE * max(1 + text.count("\n") for (r, _), text in broken.items() if r == row)
        for row in range(len(rows))
    ]
    titles = [_broken(figure, renderer, header, across[i + 1]) for i, header in enumerate(headers)]
    top = 0.12 + (_LINE * max(1 + title.count("\n") for title in titles) + 0.1 if titles else 0)
    footer = _broken(figure, renderer, note, width - 0.4) if note else ""
    bottom = 0.12 + (_LINE * (1 + footer.count("\n")) + 0.1 if footer else 0)
    body = max(sum(heights) + 0.13 * (len(rows) - 1), 2 * _PAD + _LINE * (1 + root.count("\n")))
    height = top + body + bottom
    figure.set_size_inches(width, height)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.axis("off")
    for title, left in zip(titles, lefts[1:], strict=False):
        ax.text(left + _PAD / 2, height - 0.1, title, va="top", fontsize=9.5, color="0.35", linespacing=1.2)
    if footer:
        ax.text(width / 2, 0.1, footer, ha="center", va="bottom", fontsize=9.5, style="italic", linespacing=1.2)
    middle = bottom + body / 2
    root_height = 2 * _PAD + _LINE * (1 + root.count("\n"))
    _box(ax, lefts[0], middle, across[0], root_height, root, "grey", 0.3, "bold")
    y = height - top - (body - sum(heights) - 0.13 * (len(rows) - 1)) / 2
    for row, tall in enumerate(heights):
        hue, centre = _HUES[row % len(_HUES)], y - tall / 2
        _elbow(ax, (lefts[0] + across[0], middle), (lefts[1], centre))
        for column in range(1, columns):
            text = broken[row, column]
            if not text:
                continue
            if column > 1:
                _arrow(ax, (lefts[column - 1] + across[column - 1], centre), (lefts[column], centre))
            alpha = 0.45 if column == 1 else 0.18
            weight = "bold" if column == 1 else "normal"
            _box(ax, lefts[column], centre, across[column], tall, text, hue, alpha, weight)
        y -= tall + 0.13
    return figure


def _broken(figure, renderer, text: str, width: float) -> str:
    """``text`` in lines that are at most ``width`` inches wide as drawn in bold, the widest form used."""
    letters = max(6, int(width / _LETTER * 1.4))
    while letters > 3:
        lines = [textwrap.wrap(part, letters, break_long_words=letters <= 6) or [""] for part in text.split("\n")]
        broken = "\n".join(line for part in lines for line in part)
        drawn = figure.text(0, 0, broken, fontsize=9.5, weight="bold")
        wide = drawn.get_window_extent(renderer).width / figure.dpi
        drawn.remove()
        if wide <= width:
            return broken
        letters -= 1
    return broken


def _box(ax, left, centre, width, height, text, hue, alpha, weight) -> None:
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0,rounding_size=0.08"
    place = (left, centre - height / 2)
    ax.add_patch(FancyBboxPatch(place, width, height, boxstyle=style, facecolor=COLORS[hue], alpha=alpha, linewidth=0))
    ax.text(
        left + width / 2, centre, text, ha="center", va="center", fontsize=9.5, weight=weight, linespacing=1.2
    )  # fmt: skip


def _arrow(ax, start, end) -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "0.4", "lw": 1.1, "shrinkA": 1, "shrinkB": 1})


def _elbow(ax, start, end) -> None:
    half = start[0] + 0.4 * (end[0] - start[0])
    ax.plot([start[0], half, half], [start[1], start[1], end[1]], color="0.4", linewidth=1.1, solid_joinstyle="round")
    _arrow(ax, (half, end[1]), end)
