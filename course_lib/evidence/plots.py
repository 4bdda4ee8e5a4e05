"""Pictures in one style: colours that survive colour-blindness and a beamer, intervals drawn, and a text for each."""

import base64
import html
import io
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from course_lib.evidence.statistics import mean_interval

__all__ = ["COLORS", "band", "heat_map", "plot_curves", "plot_scores", "show", "use_style"]

_NAMES = "blue orange green vermillion purple sky black yellow grey"
_CODES = "#0072B2 #E69F00 #009E73 #D55E00 #CC79A7 #56B4E9 #000000 #F0E442 #7F7F7F"
COLORS = dict(zip(_NAMES.split(), _CODES.split(), strict=True))
"""Okabe and Ito's palette (2008), and a grey for what only serves as a background."""

CYCLE, MARKERS = list(COLORS.values())[:7], "osD^vPX*"


def use_style() -> None:
    """Set the course's look for every figure of this process: sizes for a beamer, light grid, no box."""
    import matplotlib as mpl
    from cycler import cycler

    mpl.rc("axes", prop_cycle=cycler(color=CYCLE), grid=True, axisbelow=True, titlesize=12, labelsize=11)
    mpl.rc("axes.spines", top=False, right=False)
    mpl.rc("figure", dpi=90, figsize=(7.5, 3.6))
    mpl.rc("figure.constrained_layout", use=True)
    mpl.rc("font", size=10.5)
    mpl.rc("grid", alpha=0.3)
    mpl.rc("legend", frameon=False)
    mpl.rc("lines", linewidth=2.0)


def show(figure, *, alt: str) -> None:
    """Display ``figure`` with the alternative text ``alt``, a sentence for who cannot see the picture, and close it.

    It is stored as an HTML image: JupyterLab shows no alternative text of a bare PNG.
    """
    if len(alt.split()) < 4:
        raise ValueError(f"alt must be a sentence that says what the picture shows, got {alt!r}")
    import matplotlib.pyplot as plt
    from IPython.display import display

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    # Of a folded output JupyterLab shows the first line as text.
    image = f'<img alt="{html.escape(alt)}" style="max-width:100%" src="data:image/png;base64,{data}">'
    display({"text/html": f"<!-- a picture: open it -->\n{image}", "text/plain": alt}, raw=True)


def plot_scores(scores: Mapping[str, Sequence[float]], *, xlabel: str = "test accuracy (%)", alt: str, title: str = ""):
    """Show one row a name of ``scores`` (name -> array [R]): a dot a replica, and the mean with its 95 % interval."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7.5, 0.9 + 0.55 * len(scores)))
    for row, (values, color) in enumerate(zip(scores.values(), itertools.cycle(CYCLE), strict=False)):
        dots(ax, row, values, color)
    ax.set_yticks(range(len(scores)), list(scores))
    ax.set(ylim=(len(scores) - 0.5, -0.6), xlabel=xlabel, title=title)
    show(figure, alt=alt)


def dots(ax, row: float, values: Sequence[float], color: str) -> None:
    """Draw each of ``values`` as a dot in ``row``, close ones above each other, and mean and interval over them."""
    values = np.sort(np.asarray(values, dtype=float))
    near = (values[-1] - values[0]) / 60 or 1.0
    heights, last = [], -np.inf
    for value in values:
        heights.append(heights[-1] + 0.09 if value - last < near else 0.0)
        last = value
    spread = np.minimum(heights, 0.45)
    ax.plot(values, row - 0.05 - spread, "o", color=color, alpha=0.5, markersize=5, markeredgewidth=0)
    interval = mean_interval(values)
    ax.plot([interval.low, interval.high], [row + 0.15] * 2, color=color, linewidth=3, solid_capstyle="butt")
    ax.plot([interval.mean], [row + 0.15], "d", color=color, markersize=7)


def plot_curves(
    x: Sequence[float], curves: Mapping[str, np.ndarray], *, alt: str, xlabel: str = "", ylabel: str = "",
    title: str = "", xscale: str = "linear", line: Mapping[str, float] | None = None, ax=None,
) -> None:  # fmt: skip
    """Show one line with its 95 % band a name of ``curves`` (name -> array [R, len(x)]).

    Args:
        x: positions, and ``xscale`` their scale (``"log"``).
        line: name -> height of a dashed line across, such as the dense network's accuracy.
        ax: draw here and leave showing to the caller.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots() if ax is None else (ax.figure, ax)
    for (name, samples), marker in zip(curves.items(), itertools.cycle(MARKERS), strict=False):
        band(axes, x, samples, label=name, marker=marker, markersize=5)
    for name, height in (line or {}).items():
        axes.axhline(height, color="black", linestyle="--", linewidth=1, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title, xscale=xscale)
    axes.legend()
    if ax is None:
        show(figure, alt=alt)


def band(ax, x, samples, *, label: str | None = None, color: str | None = None, level: float = 0.95, **line):
    """Draw the mean of ``samples`` [replicas ≥ 2, len(x)] over ``x`` and its t interval at ``level`` as a band."""
    x, samples = np.asarray(x, dtype=float), np.asarray(samples, dtype=float)
    if samples.ndim != 2 or samples.shape[1] != len(x) or len(samples) < 2:
        raise ValueError(f"samples must have shape [replicas >= 2, {len(x)}], a column for each x; got {samples.shape}")
    found = [mean_interval(column, level=level) for column in samples.T]
    (drawn,) = ax.plot(x, [i.mean for i in found], label=label, color=color, **line)
    low, high = [i.low for i in found], [i.high for i in found]
    ax.fill_between(x, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)
    return drawn


def heat_map(ax, values, rows, columns, *, fmt: str = ".1f", best: bool = True) -> None:
    """Draw ``values`` [len(rows), len(columns)] as coloured cells with their numbers, the largest marked by a star."""
    values = np.asarray(values, dtype=float)
    if values.shape != (len(rows), len(columns)):
        raise ValueError(f"values must have shape ({len(rows)}, {len(columns)}) to fit the labels, got {values.shape}")
    ax.imshow(values, cmap="cividis", aspect="auto")
    middle = (values.min() + values.max()) / 2
    for place, value in np.ndenumerate(values):
        star = " ★" if best and place == np.unravel_index(values.argmax(), values.shape) else ""
        ink = "white" if value < middle else "black"
        ax.text(place[1], place[0], f"{value:{fmt}}{star}", ha="center", va="center", color=ink)
    ax.set_xticks(range(len(columns)), [f"{c:g}" if isinstance(c, float) else c for c in columns])
    ax.set_yticks(range(len(rows)), [f"{r:g}" if isinstance(r, float) else r for r in rows])
    ax.grid(False)
