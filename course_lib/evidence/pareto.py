"""Which compressed models are worth having: those that no other beats at once in cost and gain; and their picture."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from course_lib.evidence.plots import COLORS, MARKERS, show
from course_lib.evidence.statistics import mean_interval

if TYPE_CHECKING:
    import pandas

__all__ = ["draw_pareto", "pareto_front", "plot_pareto"]

_HUES = ("blue", "orange", "green", "vermillion", "purple", "sky", "black", "grey")
_FAINT = 0.4


def pareto_front(costs, gains) -> np.ndarray:
    """Mask [P] of the points that no other point dominates.

    One point dominates another if it costs no more in any cost, gains no less in any gain, and differs in at least one:
    of exact duplicates both are on the front, or neither.

    Args:
        costs: [P], or [P, C] for several (bytes, MACs, ...); less is better. Infinity is a value like others, NaN none.
        gains: [P] or [P, G] (accuracy, ...); more is better.

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

    Args:
        table: one row a model, with columns ``family``, ``label`` (written beside points on the front), ``score`` (an
            array [R] each, one number a replica), and those named in ``costs``.
        costs: column of the table -> label of its axis, such as ``{"bytes": "bytes of the file"}``.
        options: ``ylabel`` and ``floor`` of :func:`draw_pareto`.
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
) -> np.ndarray:
    """Draw the rows of ``table`` (see :func:`plot_pareto`): cost to the right (log), score upwards, the front as steps.

    A dot is a mean over replicas, its bar the 95 % interval. What another point dominates is faint. The front is that
    of the means: whether a step of it is more than luck, a paired difference says.

    Args:
        floor: scores below are drawn there, with an arrow and their value, so that one bad model does not squeeze the
            good ones.

    Returns:
        Mask of the rows on the front.
    """
    costs = table[cost].to_numpy(dtype=float)
    if not (np.isfinite(costs) & (costs > 0)).all():
        raise ValueError(f"{cost} must be finite and above 0 for a log axis, got {costs.min()} to {costs.max()}")
    spans = [mean_interval(score) for score in table["score"]]
    means = np.array([span.mean for span in spans])
    front, shown = pareto_front(costs, means), np.maximum(means, floor)
    ax.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    ax.xaxis.set_minor_formatter("")  # its numbers run into each other within a decade
    order = [i for i in np.lexsort((means, costs)) if front[i]]
    corners = [*costs[order], costs.max() * 1.3], [*shown[order], shown[order[-1]]]
    ax.step(*corners, where="post", color="0.35", linewidth=1.2, zorder=1.5, label="front of the means")
    for number, family in enumerate(table["family"].unique()):
        color = COLORS[_HUES[number % len(_HUES)]]
        marker = MARKERS[(number + number // len(_HUES)) % len(MARKERS)]  # the ninth has the first's colour alone
        rows = [i for i in np.argsort(costs, kind="stable") if table["family"].iloc[i] == family]
        ax.plot(costs[rows], shown[rows], color=color, linewidth=0.8, alpha=_FAINT)
        ax.plot([], [], color=color, marker=marker, linewidth=0.8, label=family)
        for i in rows:
            alpha = 1.0 if front[i] else _FAINT
            ax.plot(costs[i], shown[i], marker=marker, color=color, markersize=7, alpha=alpha, zorder=3)
            if spans[i].high > floor:
                ax.plot([costs[i]] * 2, [max(spans[i].low, floor), spans[i].high], color=color, alpha=alpha)
            text = [str(table["label"].iloc[i])] if front[i] else []
            text += [f"↓ {means[i]:.0f}"] if means[i] < floor else []
            ax.annotate(" ".join(text), (costs[i], shown[i]), (5, -9), textcoords="offset points", fontsize=8)
    return front
