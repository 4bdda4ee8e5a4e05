"""Pictures in one style: colours that survive colour-blindness and a beamer, intervals drawn, and a text for each.

And the source of a function, to be read in a lesson.
"""

import ast
import base64
import html
import inspect
import io
import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from course_lib.evidence.statistics import mean_interval

if TYPE_CHECKING:
    import pandas

__all__ = ["COLORS", "band", "heat_map", "pareto_front", "plot_curves", "plot_pareto", "plot_scores"]
__all__ += ["show", "show_source", "use_style"]

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
    spread = np.array(heights) * min(1.0, 0.45 / (max(heights) or 1.0))  # every dot is to be seen
    ax.plot(values, row - 0.05 - spread, "o", color=color, alpha=0.5, markersize=5, markeredgewidth=0)
    interval = mean_interval(values)
    ax.plot([interval.low, interval.high], [row + 0.15] * 2, color=color, linewidth=3, solid_capstyle="butt")
    ax.plot([interval.mean], [row + 0.15], "d", color=color, markersize=7)


def plot_curves(
    x: Sequence[float], curves: Mapping[str, np.ndarray], *, alt: str, xlabel: str = "", ylabel: str = "",
    title: str = "", xscale: str = "linear", line: Mapping[str, float] | None = None, ax=None,
) -> None:  # fmt: skip
    """Show one line with its 95 % band a name of ``curves`` (name -> array [R, len(x)]).

    ``line``: name -> height of a dashed line across, such as the dense network's accuracy. With ``ax`` it is drawn
    there, and showing is left to the caller.
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


def band(ax, x, samples, *, label: str | None = None, color: str | None = None, **line):
    """Draw the mean of ``samples`` [replicas ≥ 2, len(x)] over ``x`` and its 95 % t interval as a band."""
    x, samples = np.asarray(x, dtype=float), np.asarray(samples, dtype=float)
    if samples.ndim != 2 or samples.shape[1] != len(x) or len(samples) < 2:
        raise ValueError(f"samples must have shape [replicas >= 2, {len(x)}], a column for each x; got {samples.shape}")
    found = [mean_interval(column) for column in samples.T]
    (drawn,) = ax.plot(x, [i.mean for i in found], label=label, color=color, **line)
    low, high = [i.low for i in found], [i.high for i in found]
    ax.fill_between(x, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)
    return drawn


def heat_map(ax, values, rows, columns) -> None:
    """Draw ``values`` [len(rows), len(columns)] as coloured cells with their numbers, the largest marked by a star."""
    values = np.asarray(values, dtype=float)
    if values.shape != (len(rows), len(columns)):
        raise ValueError(f"values must have shape ({len(rows)}, {len(columns)}) to fit the labels, got {values.shape}")
    ax.imshow(values, cmap="cividis", aspect="auto")
    middle = (values.min() + values.max()) / 2
    for place, value in np.ndenumerate(values):
        star = " ★" if place == np.unravel_index(values.argmax(), values.shape) else ""
        ink = "white" if value < middle else "black"
        ax.text(place[1], place[0], f"{value:.1f}{star}", ha="center", va="center", color=ink)
    ax.set_xticks(range(len(columns)), [f"{c:g}" if isinstance(c, float) else c for c in columns])
    ax.set_yticks(range(len(rows)), [f"{r:g}" if isinstance(r, float) else r for r in rows])
    ax.grid(False)


def pareto_front(costs, gains) -> np.ndarray:
    """Mask [P] of the points that no other point dominates.

    One point dominates another if it costs no more in any cost, gains no less in any gain, and differs in at least one:
    of exact duplicates both are on the front, or neither. ``costs`` are [P], or [P, C] for several (less is better),
    ``gains`` [P] or [P, G] (more is better). Infinity is a value like others, NaN none.

    >>> pareto_front([1, 2, 3, 3], [0.90, 0.95, 0.95, 0.99]).tolist()
    [True, True, False, True]
    """
    cost, gain = (np.asarray(values, dtype=float) for values in (costs, gains))
    if not (cost.ndim in (1, 2) and gain.ndim in (1, 2) and len(cost) == len(gain) > 0):
        raise ValueError(f"costs and gains must be about the same points [P] or [P, C], got {cost.shape}, {gain.shape}")
    if np.isnan(cost).any() or np.isnan(gain).any():
        raise ValueError("costs and gains must not be NaN")
    down = np.concatenate([cost.reshape(len(cost), -1), -gain.reshape(len(gain), -1)], axis=1)
    no_worse = (down[:, None, :] <= down[None, :, :]).all(axis=2)
    return ~(no_worse & ~no_worse.T).any(axis=0)


def plot_pareto(table: "pandas.DataFrame", costs: Mapping[str, str], *, alt: str, title: str = "", **options) -> None:
    """Show one panel a cost, the same families in each, with one legend below.

    ``table`` has a row a model, with columns ``family``, ``label`` (written beside points on the front), ``score`` (an
    array [R] each, one number a replica), and those named in ``costs``: column -> label of its axis. ``options`` are
    ``ylabel`` and ``floor`` of :func:`draw_pareto`.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(costs), figsize=(4.6 * len(costs) + 2, 4.9), sharey=True, squeeze=False)
    for ax, (cost, xlabel) in zip(axes[0], costs.items(), strict=True):
        draw_pareto(ax, table, cost, xlabel=xlabel, **options)
        options["ylabel"] = ""
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 1 + 2 * len(costs)))
    figure.suptitle(title)
    show(figure, alt=alt)


def draw_pareto(
    ax, table: "pandas.DataFrame", cost: str, *, xlabel: str, ylabel: str = "test accuracy (%)", floor: float = -np.inf
) -> None:
    """Draw the rows of ``table`` (see :func:`plot_pareto`): cost to the right (log), score upwards, the front as steps.

    A dot is a mean over replicas, its bar the 95 % interval. What another point dominates is faint. The front is that
    of the means: whether a step of it is more than luck, a paired difference says. Scores below ``floor`` are drawn
    there, with an arrow and their value: one bad model does not squeeze the good ones.
    """
    from matplotlib.ticker import EngFormatter, LogLocator

    faint, hues = 0.4, [color for name, color in COLORS.items() if name != "yellow"]
    costs = table[cost].to_numpy(dtype=float)
    if not (np.isfinite(costs) & (costs > 0)).all():
        raise ValueError(f"{cost} must be finite and above 0 for a log axis, got {costs.min()} to {costs.max()}")
    spans = [mean_interval(score) for score in table["score"]]
    means = np.array([span.mean for span in spans])
    front, shown = pareto_front(costs, means), np.maximum(means, floor)
    ax.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k
    ax.xaxis.set_minor_formatter("")
    order = [i for i in np.lexsort((means, costs)) if front[i]]
    corners = [*costs[order], costs.max() * 1.3], [*shown[order], shown[order[-1]]]
    ax.step(*corners, where="post", color="0.35", linewidth=1.2, zorder=1.5, label="front of the means")
    for number, family in enumerate(table["family"].unique()):
        color = hues[number % len(hues)]
        marker = MARKERS[(number + number // len(hues)) % len(MARKERS)]  # the ninth has the first's colour alone
        rows = [i for i in np.argsort(costs, kind="stable") if table["family"].iloc[i] == family]
        ax.plot(costs[rows], shown[rows], color=color, linewidth=0.8, alpha=faint)
        ax.plot([], [], color=color, marker=marker, linewidth=0.8, label=family)
        for i in rows:
            alpha = 1.0 if front[i] else faint
            ax.plot(costs[i], shown[i], marker=marker, color=color, markersize=7, alpha=alpha, zorder=3)
            if spans[i].high > floor:
                ax.plot([costs[i]] * 2, [max(spans[i].low, floor), spans[i].high], color=color, alpha=alpha)
            text = [str(table["label"].iloc[i])] if front[i] else []
            text += [f"↓ {means[i]:.0f}"] if means[i] < floor else []
            above = front[i] and order.index(i) % 2  # by turns, as neighbours on the front lie close
            offset, align = ((5, 5), "bottom") if above else ((5, -4), "top")
            ax.annotate(" ".join(text), (costs[i], shown[i]), offset, textcoords="offset points", va=align, fontsize=8)


@dataclass(frozen=True)
class Source:
    """Python source that shows itself as a highlighted block in a notebook."""

    text: str

    def __str__(self) -> str:
        return self.text

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        return {"text/markdown": f"```python\n{self.text}\n```", "text/plain": self.text}


def show_source(function: Callable) -> Source:
    """The source of a library function without its docstring, to be read in a lesson.

    >>> print(show_source(use_style).text.splitlines()[0])
    def use_style() -> None:
    """
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    lines = source.splitlines()
    drop: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            first = node.body[0]
            drop.update(range(first.lineno, first.end_lineno + 1))
            if len(node.body) > 1 and not lines[first.end_lineno].strip():
                drop.add(first.end_lineno + 1)
    return Source("\n".join(line for number, line in enumerate(lines, 1) if number not in drop))
