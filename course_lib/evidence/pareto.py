"""Which compressed models are worth having? Those that no other beats at once in cost and in gain."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from course_lib.evidence.statistics import Interval, paired_difference

__all__ = ["Dominance", "dominates", "dominates_surely", "pareto_front"]


def pareto_front(costs, gains) -> np.ndarray:
    """Mask of the points that no other point dominates.

    One point dominates another if it costs no more in any cost, gains no less in any gain, and differs in at least one.
    Exact duplicates do not dominate each other: both are on the front, or neither.

    Args:
        costs: ``[P]``, or ``[P, C]`` for several (bytes, MACs, ...); less is better. Any array, tensor or list.
        gains: ``[P]`` or ``[P, G]`` (accuracy, ...); more is better.

    Returns:
        bool ``[P]``.

    Raises:
        ValueError: no point, NaN, or costs and gains of different lengths. (Infinity is a value like others.)

    >>> pareto_front([1, 2, 3, 3], [0.90, 0.95, 0.95, 0.99]).tolist()
    [True, True, False, True]
    """
    cost, gain = _table("costs", costs), _table("gains", gains)
    if len(cost) != len(gain) or len(cost) == 0:
        raise ValueError(
            f"costs and gains must be about the same points, at least one; got {len(cost)} and {len(gain)}"
        )
    down = np.concatenate([cost, -gain], axis=1)
    no_worse = (down[:, None, :] <= down[None, :, :]).all(axis=2)
    return ~(no_worse & ~no_worse.T).any(axis=0)


def dominates(cost_a, gain_a, cost_b, gain_b) -> bool:
    """Whether point a dominates point b, taken at their word: no interval. See :func:`dominates_surely` for seeds.

    Args:
        cost_a, cost_b: a number, or one for each of C costs; less is better.
        gain_a, gain_b: a number, or one for each of G gains; more is better.

    Raises:
        ValueError: NaN, or numbers of costs or gains that differ.

    >>> dominates(1, 0.95, 2, 0.95), dominates(1, 0.95, 1, 0.95), dominates(1, 0.90, 2, 0.95)
    (True, False, False)
    """
    sides = []
    for name, a, b in (("cost", cost_a, cost_b), ("gain", gain_a, gain_b)):
        pair = [_table(name, np.atleast_1d(_array(value))[None]) for value in (a, b)]
        if pair[0].shape != pair[1].shape:
            raise ValueError(f"a and b must have as many {name}s, got {pair[0].shape[1]} and {pair[1].shape[1]}")
        sides.append(pair)
    (ca, cb), (ga, gb) = sides
    no_worse = (ca <= cb).all() and (ga >= gb).all()
    return bool(no_worse and ((ca < cb).any() or (ga > gb).any()))


@dataclass(frozen=True)
class Dominance:
    """The verdict of :func:`dominates_surely`; true or false like a bool.

    Attributes:
        holds: whether a dominates b.
        gain: interval of a's gain minus b's, seed by seed.
        cost_ratio: a's cost / b's, the largest of several; at most 1 where a is no dearer.
    """

    holds: bool
    gain: Interval
    cost_ratio: float

    def __bool__(self) -> bool:
        return self.holds


def dominates_surely(
    cost_a: float | Sequence[float],
    gains_a: Sequence[float],
    cost_b: float | Sequence[float],
    gains_b: Sequence[float],
    *,
    level: float = 0.95,
    margin: float = 0.0,
) -> Dominance:
    """Whether a dominates b beyond the scatter of seeds: no dearer, and the paired interval of the gain above 0.

    Args:
        cost_a, cost_b: above 0; a number (the mean over seeds where it varies), or one for each of C costs.
        gains_a, gains_b: one a seed, the same R ≥ 2 seeds in the same order.
        level: confidence in (0, 1), of the two-sided interval.
        margin: in units of the gain. Above 0, a must be strictly cheaper and may give away less than that: the interval
            must lie above −margin ("not inferior").

    Raises:
        ValueError: costs that are not finite and above 0, or differ in number; a negative margin; gains that do not
            pair or are not finite, fewer than two.

    >>> verdict = dominates_surely(900, [0.96, 0.97, 0.98], 1000, [0.95, 0.96, 0.96])
    >>> bool(verdict), verdict.cost_ratio, f"{verdict.gain:.3f}"
    (False, 0.9, '0.013 ± 0.014')
    """
    a, b = (np.atleast_1d(_array(cost)) for cost in (cost_a, cost_b))
    if a.shape != b.shape or a.ndim != 1 or not all((np.isfinite(c) & (c > 0)).all() for c in (a, b)):
        raise ValueError(f"costs must be finite, above 0 and as many for a as for b; got {cost_a!r} and {cost_b!r}")
    if not margin >= 0:
        raise ValueError(f"margin must be at least 0, got {margin!r}")
    gain = paired_difference(gains_a, gains_b, level=level)
    cheaper = (a <= b).all() and (margin == 0 or (a < b).any())
    return Dominance(bool(cheaper and gain.low > -margin), gain, float((a / b).max()))


def _array(values) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    return np.asarray(values, dtype=np.float64)


def _table(name: str, values) -> np.ndarray:
    table = _array(values)
    if table.ndim not in (1, 2):
        raise ValueError(f"{name} must have shape [P], or [P, C] for several of them; got {table.shape}")
    table = table.reshape(len(table), -1) if table.size else table.reshape(len(table), 0)
    if np.isnan(table).any():
        raise ValueError(f"{name} must not be NaN, got it at {np.argwhere(np.isnan(table))[0].tolist()}")
    return table
