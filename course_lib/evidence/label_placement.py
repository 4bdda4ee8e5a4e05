"""Words beside points, without covering other words, points or lines: a small greedy search in pixels."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

__all__ = ["place_labels"]

_ANGLES = np.deg2rad([45, 135, -45, -135, 90, -90, 0, 180, 20, 160, -20, -160])
_RADII = (7, 11, 16, 23, 32, 44, 60, 80)
_LEADER_FROM = 14


def place_labels(
    ax, points, texts: Sequence[str], *, colors=None, size: float = 8.5, avoid=(), point_radius: float = 5.0
) -> list:
    """Write ``texts[i]`` beside ``points[i]``; a thin line leads to it where it had to go far.

    Call it last: the places are sought in the pixels that the axes have now. Each label takes, of some hundred places
    around its point, the one that covers least (other labels, points, ``avoid``, the axes' edge) and is nearest; two
    more rounds let early labels give way to later ones.

    Args:
        ax: axes with their final limits.
        points: ``[P, 2]`` in data units.
        texts: P labels; "" leaves the point without, but still in the way of others.
        colors: P colours, black by default.
        size: of the font, in points.
        avoid: lines to keep off where possible, each ``[M, 2]`` in data units.
        point_radius: of a marker, in points.

    Returns:
        The P annotations, ``None`` for "".

    Raises:
        ValueError: not as many texts or colours as points, or points that are not ``[P, 2]``.
    """
    xy = np.asarray(points, dtype=float).reshape(-1, 2) if len(texts) == 0 else np.asarray(points, dtype=float)
    colors = ["black"] * len(texts) if colors is None else list(colors)
    if xy.ndim != 2 or xy.shape[1:] != (2,) or len(xy) != len(texts) or len(colors) != len(texts):
        raise ValueError(
            f"points must be [P, 2] with a text and a colour each, got shape {xy.shape}, {len(texts)} texts and "
            f"{len(colors)} colours"
        )
    figure = ax.figure
    figure.draw_without_rendering()
    pixel = figure.dpi / 72  # in one point
    renderer = figure.canvas.get_renderer()
    at = ax.transData.transform(xy) if len(xy) else xy
    around = point_radius * pixel
    hard = np.column_stack([at - around, at + around])
    soft = _dots(ax, avoid, 3 * pixel)
    frame = ax.get_window_extent(renderer)
    labels, sizes = [], []
    for text, color in zip(texts, colors, strict=True):
        label = ax.text(0, 0, text, fontsize=size, color=color) if text else None
        box = label.get_window_extent(renderer) if label else None
        # Two points of air all around, so that neighbours do not read as one word.
        sizes.append((box.width + 4 * pixel, box.height + 2 * pixel) if box else (0.0, 0.0))
        if label:
            label.remove()
        labels.append(label)
    wanted = [i for i, label in enumerate(labels) if label is not None]
    chosen: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    # The most crowded points have the fewest free places, so they choose first.
    crowd = {i: int((np.abs(at - at[i]).max(axis=1) < 40 * pixel).sum()) for i in wanted}
    for sweep in range(3):
        for i in sorted(wanted, key=lambda i: (-crowd[i], i)):
            others = [box for j, (box, _) in chosen.items() if j != i]
            boxes, centres, far = _candidates(at[i], sizes[i], pixel)
            cost = 30 * _covered(boxes, np.array(others).reshape(-1, 4))
            cost += 10 * _covered(boxes, hard) + 2 * _covered(boxes, soft)
            cost += 30 * _outside(boxes, frame) + far * 0.02 * sizes[i][0] * sizes[i][1]
            if others and sweep == 2:
                cost[_covered(boxes, np.array(others)) > 0] += 1e6
            best = int(np.argmin(cost))
            chosen[i] = boxes[best], centres[best]
    made: list = [None] * len(texts)
    for i in wanted:
        offset = (chosen[i][1] - at[i]) / pixel
        distance = np.hypot(*(np.clip(at[i], chosen[i][0][:2], chosen[i][0][2:]) - at[i])) / pixel
        leader = {"arrowstyle": "-", "color": colors[i], "lw": 0.6, "shrinkA": 0, "shrinkB": point_radius}
        made[i] = ax.annotate(
            texts[i],
            xy[i],
            offset,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=size,
            color=colors[i],
            arrowprops=leader if distance > _LEADER_FROM else None,
            zorder=6,
        )
        made[i].set_in_layout(False)
    return made


def _candidates(at: np.ndarray, size: tuple[float, float], pixel: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes [M, 4] of a label in pixels, their centres, and how far each is from the point, in points."""
    half = np.array(size) / 2
    boxes, far = [], []
    for radius in _RADII:
        for angle in _ANGLES:
            towards = np.array([np.cos(angle), np.sin(angle)])
            centre = (
                at
                + towards * radius * pixel
                + np.sign(np.round(towards, 6)) * half * np.minimum(1, np.abs(towards) * 1.5)
            )
            boxes.append([*(centre - half), *(centre + half)])
            far.append(radius)
    boxes = np.array(boxes)
    return boxes, (boxes[:, :2] + boxes[:, 2:]) / 2, np.array(far, dtype=float)


def _covered(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Area in square pixels that each of the boxes shares with the others."""
    if len(others) == 0:
        return np.zeros(len(boxes))
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.clip(high - low, 0, None).prod(axis=2).sum(axis=1)


def _outside(boxes: np.ndarray, frame) -> np.ndarray:
    inner = np.array([[frame.x0, frame.y0, frame.x1, frame.y1]])
    return (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - _covered(boxes, inner)


def _dots(ax, lines, side: float) -> np.ndarray:
    """Lines in data units as small boxes along them, in pixels."""
    found = []
    for line in lines:
        at = ax.transData.transform(np.asarray(line, dtype=float))
        for start, end in pairwise(at):
            steps = max(2, int(np.hypot(*(end - start)) / side) + 1)
            centre = start + np.linspace(0, 1, steps)[:, None] * (end - start)
            found.append(np.column_stack([centre - side / 2, centre + side / 2]))
    return np.concatenate(found) if found else np.empty((0, 4))
