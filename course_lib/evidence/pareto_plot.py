"""The picture of trade-offs: families of models by cost and gain, seeds as bars, the front as a step line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from course_lib.evidence.label_placement import place_labels
from course_lib.evidence.pareto import pareto_front
from course_lib.evidence.plots import COLORS
from course_lib.evidence.statistics import mean_interval

__all__ = ["Family", "draw_pareto", "pareto_figure"]

_HUES = ("blue", "orange", "green", "vermillion", "purple", "sky", "black", "yellow")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">", "h")
_FAINT = 0.45


@dataclass(frozen=True, eq=False)
class Family:
    """One method at several levels.

    Attributes:
        name: as the legend shows it.
        costs: L numbers above 0, one a level.
        gains: ``[L, R]``, one row a level and one column a seed, or ``[L]`` for single measurements; in the unit of the
            vertical axis.
        labels: L short texts such as "90 %", written beside points on the front; or none.
        section: of the article, such as "3.1": written beside each of the family's points, on the front or not.

    Raises:
        ValueError: costs, gains and labels that do not fit each other, costs not finite and above 0, gains not finite.
    """

    name: str
    costs: Sequence[float]
    gains: Sequence
    labels: Sequence[str] = field(default=())
    section: str = ""

    def __post_init__(self):
        costs, gains = (np.asarray(_plain(value), dtype=float) for value in (self.costs, self.gains))
        gains = gains[:, None] if gains.ndim == 1 else gains
        if costs.ndim != 1 or gains.ndim != 2 or len(costs) != len(gains) or not gains.size:
            raise ValueError(
                f"{self.name}: gains must be [{costs.size}, seeds], one row for each cost; got costs of shape "
                f"{costs.shape} and gains of shape {gains.shape}"
            )
        if not (np.isfinite(costs) & (costs > 0)).all() or not np.isfinite(gains).all():
            raise ValueError(f"{self.name}: costs must be finite and above 0 for a log axis, and gains finite")
        if len(self.labels) not in (0, len(costs)):
            raise ValueError(f"{self.name}: {len(self.labels)} labels do not fit {len(costs)} levels")
        object.__setattr__(self, "costs", costs)
        object.__setattr__(self, "gains", gains)
        object.__setattr__(self, "labels", tuple(self.labels) or ("",) * len(costs))


def draw_pareto(
    ax,
    families: Sequence[Family],
    *,
    xlabel: str,
    ylabel: str = "",
    floor: float | None = None,
    level: float = 0.95,
    looks: Mapping[str, tuple[str, str, bool]] | None = None,
) -> list[np.ndarray]:
    """Draw the families into ``ax``: log cost to the right, gain upwards, the front over all of them as a step line.

    A dot is the mean over seeds, its bar the t interval at ``level``. What another point dominates is faint. The front
    is that of the means; whether a step of it is more than seeds is for
    :func:`~course_lib.evidence.pareto.dominates_surely`.

    Args:
        ax: empty axes. Set a title before, for labels are placed in the pixels that the axes have now.
        families: at least one.
        xlabel, ylabel: with their units.
        floor: gains below are drawn at the floor, with an arrow and their value, so that one bad model does not squeeze
            the good ones.
        level: of the bars.
        looks: colour name, marker and whether it is filled, by family, for pictures that share a legend; by order if
            not given.

    Returns:
        One bool mask a family: which of its levels are on the front.

    Raises:
        ValueError: no family, or two of one name.
    """
    names = [family.name for family in families]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"families must be at least one, of different names; got {names}")
    looks = looks or _looks(names)
    sizes = [len(family.costs) for family in families]
    costs = np.concatenate([family.costs for family in families])
    means = np.concatenate([family.gains.mean(axis=1) for family in families])
    front = pareto_front(costs, means)
    masks = np.split(front, np.cumsum(sizes)[:-1])
    lowest = min(means.min(), _lowest(families, level)) if floor is None else floor
    highest = max(means.max(), max(b for f in families for _, b in _bars(f, level)))
    shown = np.maximum(means, lowest)
    pad = 0.07 * ((highest - lowest) or 1.0)
    ax.set_xscale("log")
    ax.set(xlabel=xlabel, ylabel=ylabel, ylim=(lowest - pad, highest + pad))
    wide = max(costs.max() / costs.min(), 1.5) ** 0.08
    ax.set_xlim(costs.min() / wide, costs.max() * wide)
    _ticks(ax)
    line = _step(costs[front], shown[front], ax.get_xlim()[1])
    ax.plot(*line.T, color="0.35", linewidth=1.4, zorder=1.5)
    ax.fill_between(*line.T, lowest - pad, color="0.5", alpha=0.07, linewidth=0, zorder=0.5)
    texts, colors, bars = [], [], []
    for family, mask in zip(families, masks, strict=True):
        hue = looks[family.name][0]
        at = np.maximum(family.gains.mean(axis=1), lowest)
        order = np.argsort(family.costs, kind="stable")
        ax.plot(family.costs[order], at[order], color=COLORS[hue], linewidth=0.9, alpha=_FAINT, zorder=2)
        for x, y, mean, on, (low, high), text in zip(
            family.costs, at, family.gains.mean(axis=1), mask, _bars(family, level), family.labels, strict=True
        ):
            alpha = 1.0 if on else _FAINT
            if high > low and high > lowest:
                ax.plot([x, x], [max(low, lowest), high], color=COLORS[hue], linewidth=1.8, alpha=alpha, zorder=2.5)
                bars.append([[x, max(low, lowest)], [x, high]])
            ax.plot(x, y, linestyle="", alpha=alpha, zorder=3.5 if on else 3, **_marker(looks[family.name], on))
            words = [family.section, text if on else "", f"↓ {mean:.3g}" if mean < lowest else ""]
            texts.append(" · ".join(word for word in words if word))
            colors.append("black" if on else "0.4")
    place_labels(ax, np.column_stack([costs, shown]), texts, colors=colors, avoid=[line, *bars])
    return masks


def pareto_figure(
    panels: Mapping[str, Sequence[Family]],
    *,
    ylabel: str,
    title: str = "",
    floor: float | None = None,
    level: float = 0.95,
    panel_size: tuple[float, float] = (4.6, 4.2),
):
    """One panel a cost (bytes, MACs, latency), the same families in each, one legend below.

    Args:
        panels: families by the label of the horizontal axis. A family keeps its look from panel to panel.
        ylabel, title, floor, level: as in :func:`draw_pareto`.
        panel_size: inches of one panel.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: no panel, and what :func:`draw_pareto` refuses.
    """
    if not panels:
        raise ValueError("panels must hold families for at least one cost, got none")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    known = {family.name: family for families in panels.values() for family in families}
    looks = _looks(list(known))
    width = len(panels) * panel_size[0]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(width, panel_size[1]), sharey=True, squeeze=False, layout="constrained"
    )
    if title:
        figure.suptitle(title, fontsize=12)
    entries = [Line2D([], [], linewidth=0.9, **_marker(look, True), color=COLORS[look[0]]) for look in looks.values()]
    names = [f"{f.name} (article {f.section})" if f.section else f.name for f in known.values()]
    entries.append(Line2D([], [], color="0.35", linewidth=1.4))
    for columns in range(min(len(entries), 6), 0, -1):
        legend = figure.legend(
            entries, [*names, "front of the means"], loc="outside lower center", ncols=columns, frameon=False
        )
        box = legend.get_window_extent(figure.canvas.get_renderer())
        if box.width <= 0.97 * figure.bbox.width or columns == 1:
            break
        legend.remove()
    figure.set_size_inches(width, panel_size[1] + box.height / figure.dpi)
    for position, (ax, (xlabel, families)) in enumerate(zip(axes[0], panels.items(), strict=True)):
        draw_pareto(
            ax, families, xlabel=xlabel, ylabel="" if position else ylabel, floor=floor, level=level, looks=looks
        )
    return figure


def _plain(values):
    return values.detach().cpu().numpy() if hasattr(values, "detach") else values


def _looks(names: Sequence[str]) -> dict[str, tuple[str, str, bool]]:
    """A colour and a marker each; where the colours start again, the markers are hollow."""
    count = len(_HUES)
    return {n: (_HUES[i % count], _MARKERS[i % len(_MARKERS)], i < count) for i, n in enumerate(names)}


def _marker(look: tuple[str, str, bool], on_front: bool) -> dict:
    hue, marker, filled = look
    color = COLORS[hue]
    edge = color if not filled else "black" if on_front else COLORS["grey"] if hue == "yellow" else color
    return {
        "marker": marker,
        "markersize": 7.5,
        "markerfacecolor": color if filled else "white",
        "markeredgecolor": edge,
        "markeredgewidth": 0.9 if filled else 2.0,
    }


def _bars(family: Family, level: float) -> list[tuple[float, float]]:
    if family.gains.shape[1] < 2:
        return [(float(row[0]), float(row[0])) for row in family.gains]
    found = [mean_interval(row, level=level) for row in family.gains]
    return [(interval.low, interval.high) for interval in found]


def _lowest(families: Sequence[Family], level: float) -> float:
    return min(low for family in families for low, _ in _bars(family, level))


def _step(costs: np.ndarray, gains: np.ndarray, right: float) -> np.ndarray:
    """The best gain that a budget buys, as corners [M, 2] of a step line up to the axes' right edge."""
    corners, best = [], None
    for cost, gain in sorted(zip(costs, gains, strict=True)):
        if best is not None:
            corners.append((cost, best))
        corners.append((cost, gain))
        best = gain
    return np.array([*corners, (right, best)])


def _ticks(ax) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = ax.get_xlim()
    subs = (1, 2, 5) if high / low < 300 else (1,)
    ax.xaxis.set_major_locator(LogLocator(subs=subs))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    """A tick's number: 500, 2k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
