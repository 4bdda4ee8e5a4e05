"""Intervals: how sure a handful of replicas makes us, and whether a difference is more than their scatter."""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partialmethod
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas

__all__ = ["Interval", "Verdict", "compare", "difference", "exactly", "mean", "mean_interval", "paired_difference"]
__all__ += ["proportion_interval", "ratio"]

RELATIONS = {">": operator.gt, "≥": operator.ge, "<": operator.lt, "≤": operator.le}


@dataclass(frozen=True, repr=False)
class Interval:
    """A mean with the interval that covers it at confidence ``level``, from ``n`` values (n = 1: an exact number).

    ``format(interval, ".1f")`` gives ``mean ± half width`` and the unit; with a ``%`` format, shares of one hundred.
    Compared with a number it gives a :class:`Verdict`: ``interval > 10`` holds if *all* of it lies above 10.

    >>> f"{Interval(0.9712, 0.9688, 0.9736, 0.95, 8):.1%}"
    '97.1 ± 0.2 %'
    >>> gain = Interval(0.3, 0.1, 0.5, 0.95, 8, "points")
    >>> str(gain > 0), str(gain > 0.2)
    ('held: 0.3 ± 0.2 points > 0', 'undecided: 0.3 ± 0.2 points > 0.2')
    """

    mean: float
    low: float
    high: float
    level: float = 0.95
    n: int = 1
    unit: str = ""

    @property
    def half_width(self) -> float:
        """Half the interval's length."""
        return (self.high - self.low) / 2

    def _judged(self, relation: str, bound: float) -> "Verdict":
        low, high = (RELATIONS[relation](end, bound) for end in (self.low, self.high))
        status = "held" if low and high else "undecided" if low or high else "not"
        return Verdict(status, ((self, relation, float(bound)),))

    __gt__, __ge__ = partialmethod(_judged, ">"), partialmethod(_judged, "≥")
    __lt__, __le__ = partialmethod(_judged, "<"), partialmethod(_judged, "≤")

    def __format__(self, spec: str) -> str:
        if math.isnan(self.mean):
            return "not measured"  # an optional tool is not installed
        exact = self.n == 1 and self.low == self.high
        if not spec and exact:
            spec = ",.0f" if float(self.mean).is_integer() else ".3g"
        elif not spec:  # as many decimals as the half width is worth: one or two of its digits
            decimals = 1 if self.half_width >= 0.1 else math.ceil(-math.log10(self.half_width or 1e-2))
            spec = f",.{0 if self.half_width >= 10 else min(decimals, 6)}f"
        scale, spec, unit = (100, spec[:-1] + "f", " %") if spec.endswith("%") else (1, spec, self.unit)
        unit = unit if unit in ("", "×", " %") else f" {unit}"
        value = f"{scale * self.mean:{spec}}"
        if exact:
            return value + unit
        return f"{value} ± {scale * self.half_width:{spec.lstrip('+')}}{unit}"

    def __repr__(self) -> str:  # what a cell that ends in an interval shows
        return format(self)


@dataclass(frozen=True, repr=False)
class Verdict:
    """What an interval says of a bound: ``status`` is ``"held"``, ``"not"`` (all of it beyond) or ``"undecided"``.

    A verdict is true only where it is held. ``a & b`` holds where both do.

    >>> bool(Interval(3.96, 3.96, 3.96, unit="×") > 3)
    True
    """

    status: str
    parts: tuple[tuple[Interval, str, float], ...]

    def __bool__(self) -> bool:
        return self.status == "held"

    def __and__(self, other: "Verdict") -> "Verdict":
        both = {self.status, other.status}
        status = "not" if "not" in both else "undecided" if "undecided" in both else "held"
        return Verdict(status, self.parts + other.parts)

    @property
    def measured(self) -> str:
        """The intervals in words, such as ``"35.1 ± 5.5 points"``."""
        return ", ".join(str(interval) for interval, _, _ in self.parts)

    def __repr__(self) -> str:
        return f"{self.status}: " + ", ".join(f"{i} {relation} {bound:g}" for i, relation, bound in self.parts)


def mean_interval(
    values: Sequence[float], *, level: float = 0.95, method: str = "t", resamples: int = 2000, seed: int = 0
) -> Interval:
    """Interval of the mean of independent values, one a replica.

    ``values`` are at least two finite numbers, ``level`` is in (0, 1); otherwise ValueError. ``method`` is ``"t"``,
    Student's interval (right for values that scatter like a bell, close enough for most others from about ten on), or
    ``"bootstrap"``, BCa (Efron 1987), for skewed values.

    >>> interval = mean_interval([1.0, 2.0, 3.0, 4.0])
    >>> round(interval.low, 3), interval.mean, round(interval.high, 3)
    (0.446, 2.5, 4.554)
    """
    data = _checked(values, level)
    if method not in ("t", "bootstrap"):
        raise ValueError(f"method must be 't' or 'bootstrap', got {method!r}")
    average, n = float(data.mean()), len(data)
    if np.ptp(data) == 0:
        return Interval(average, average, average, level, n)
    from scipy import stats

    if method == "t":
        low, high = stats.t.interval(level, n - 1, loc=average, scale=stats.sem(data))
    else:
        rng = np.random.default_rng(seed)
        found = stats.bootstrap((data,), np.mean, confidence_level=level, n_resamples=resamples, rng=rng)
        low, high = found.confidence_interval
    return Interval(average, float(low), float(high), level, n)


def paired_difference(a: Sequence[float], b: Sequence[float], *, level: float = 0.95, method: str = "t") -> Interval:
    """Interval of the mean of ``a[i] - b[i]``: what two methods differ by, replica for replica.

    Pairing takes out what a replica's luck does to both, so the interval is often far narrower than two intervals.

    >>> paired_difference([3.0, 4.0, 5.0], [2.0, 3.0, 4.0]).mean
    1.0
    """
    first, second = _pairs(a, b)
    return mean_interval(first - second, level=level, method=method)


def proportion_interval(successes: int, trials: int, *, level: float = 0.95) -> Interval:
    """Wilson's interval (1927) of a share, such as the accuracy of *one* model on a test set of ``trials`` images.

    >>> interval = proportion_interval(262, 270)
    >>> f"{interval.low:.3f} {interval.high:.3f}"
    '0.943 0.985'
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"successes must be in 0..trials and trials above 0, got {successes!r} of {trials!r}")
    from scipy import stats

    found = stats.binomtest(int(successes), int(trials)).proportion_ci(level, method="wilson")
    return Interval(successes / trials, float(found.low), float(found.high), level, trials)


def mean(values: Sequence[float], unit: str = "%") -> Interval:
    """The mean of one score array, ``values`` [R], with its 95 % interval.

    >>> str(mean([97.0, 98.0, 96.5, 97.5]))
    '97.2 ± 1.0 %'
    """
    return replace(mean_interval(values), unit=unit)


def difference(a: Sequence[float], b: Sequence[float], unit: str = "points") -> Interval:
    """How far score array ``a`` [R] is above ``b`` [R], replica for replica, with its 95 % interval.

    >>> str(difference([97.0, 98.0, 96.5], [96.0, 96.5, 95.5]))
    '1.2 ± 0.7 points'
    """
    return replace(paired_difference(a, b), unit=unit)


def ratio(a: Sequence[float], b: Sequence[float], unit: str = "×") -> Interval:
    """How many times as large the mean of ``a`` [R] is as that of ``b`` [R], with Fieller's 95 % interval (1954).

    The ratio r is inside where the mean of ``a - r * b`` cannot be told from 0. No single pair is divided, of which one
    may have next to no gap; and the interval need not be symmetric. ValueError: the mean of ``b`` cannot be told from
    0, so that any ratio fits; no pairs.

    >>> str(ratio([3.0, 5.0, 4.0, 4.4], [4.0, 6.0, 5.0, 5.0]))
    '0.82 ± 0.08×'
    """
    y, x = (_checked(values) for values in _pairs(a, b))
    from scipy import stats

    quantile = float(stats.t.ppf(0.975, len(y) - 1))
    (vy, vyx), (_, vx) = np.cov(np.stack([y, x])) / len(y) * quantile**2
    p, q, r = x.mean() ** 2 - vx, y.mean() * x.mean() - vyx, y.mean() ** 2 - vy
    if p <= 0:
        raise ValueError(f"the denominators' mean {x.mean():.3g} cannot be told from 0 at 0.95: any ratio fits")
    half = float(math.sqrt(max(q**2 - p * r, 0.0)) / p)
    return Interval(float(y.mean() / x.mean()), float(q / p) - half, float(q / p) + half, 0.95, len(y), unit)


def exactly(value: float, unit: str = "") -> Interval:
    """A number that was counted and has no interval, such as bytes or MACs, for a claim.

    >>> str(exactly(3.96, "×") > 3)
    'held: 3.96× > 3'
    """
    return Interval(float(value), float(value), float(value), unit=unit)


def compare(
    scores: Mapping[str, np.ndarray], against: str | None = None, *, value: str = "test accuracy (%)",
    unit: str = "points", decimals: int = 1, covers: str = "",
) -> "pandas.DataFrame":  # fmt: skip
    """A DataFrame of texts, one row a name: each mean with its 95 % interval, and the paired difference to one.

    ``scores``: name -> array [R], one number a replica, in the same order for all. ``against`` is the row that the
    others are compared with, ``value`` the heading of the means, ``unit`` that of the differences; ``covers`` is what ±
    covers, for the corner of the table: by default what the current lesson's replicas differ in.

    >>> compare({"a": [97.0, 98.0], "b": [96.0, 96.5]}, against="b").loc["a"].tolist()
    ['97.5 ± 6.4', '+1.2 ± 3.2']
    """
    import pandas as pd

    if against is not None and against not in scores:
        raise ValueError(f"no scores are called {against!r}; there are: {', '.join(scores)}")
    rows = {}
    for name, values in scores.items():
        rows[name] = {value: f"{mean(values, ''):.{decimals}f}"}
        if against is not None:
            gain = "" if name == against else f"{difference(values, scores[against], ''):+.{decimals}f}"
            rows[name][f"against {against} ({unit})"] = gain
    table = pd.DataFrame.from_dict(rows, orient="index")
    counts = sorted({len(values) for values in scores.values()})
    replicas = f"{'/'.join(map(str, counts))} replicas, 95 %"
    covers = covers or (COVERS[-1] if COVERS else "")
    table.columns.name = replicas + (f", ± covers {covers}" if covers else "")
    return table


COVERS: list[str] = []
"""What the replicas of the current lesson differ in; set by the lesson, read by :func:`compare`."""


def _pairs(a: Sequence[float], b: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} and {len(second)} values do not make pairs: give the same replicas, in order")
    return first, second


def _checked(values: Sequence[float], level: float = 0.95) -> np.ndarray:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1:
        raise ValueError(f"values must be a sequence of numbers, got an array of shape {data.shape}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, such as 0.95; got {level!r}")
    if len(data) < 2:
        raise ValueError(f"an interval needs at least two values, got {len(data)}: one seed says nothing")
    if not np.isfinite(data).all():
        where = int(np.argmin(np.isfinite(data)))
        raise ValueError(f"every value must be finite, got {data[where]} at {where}")
    return data
