"""Intervals: how sure a handful of seeds makes us, and whether a difference is more than their scatter."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Interval", "mean_interval", "paired_difference", "proportion_interval", "ratio_interval"]


@dataclass(frozen=True)
class Interval:
    """A mean with the interval that covers it at confidence ``level``, from ``n`` values.

    ``format(interval, ".1f")`` gives ``mean ± half width``; with a ``%`` format both are shares of one hundred.

    >>> f"{Interval(0.9712, 0.9688, 0.9736, 0.95, 8):.1%}"
    '97.1 ± 0.2 %'
    >>> f"{Interval(0.3, 0.1, 0.5, 0.95, 8):+.1f}"
    '+0.3 ± 0.2'
    """

    mean: float
    low: float
    high: float
    level: float
    n: int

    @property
    def half_width(self) -> float:
        """Half the interval's length."""
        return (self.high - self.low) / 2

    def excludes(self, value: float) -> bool:
        """Whether ``value`` lies outside the interval."""
        return not self.low <= value <= self.high

    def __format__(self, spec: str) -> str:
        spec = spec or ".3g"
        plain = spec.lstrip("+")
        if spec.endswith("%"):
            return f"{100 * self.mean:{spec[:-1]}f} ± {100 * self.half_width:{plain[:-1]}f} %"
        return f"{self.mean:{spec}} ± {self.half_width:{plain}}"

    def __str__(self) -> str:
        return format(self)


def mean_interval(
    values: Sequence[float], *, level: float = 0.95, method: str = "t", resamples: int = 2000, seed: int = 0
) -> Interval:
    """Interval of the mean of independent values, one a seed.

    Args:
        values: at least two finite numbers, any sequence or 1-D array.
        level: confidence in (0, 1).
        method: ``"t"``, Student's interval (right for the mean of values that scatter like a bell, and close enough for
            most others from about ten on), or ``"bootstrap"``, BCa (Efron 1987), for skewed values.
        resamples, seed: of the bootstrap.

    Raises:
        ValueError: fewer than two values, a value that is not finite, a level outside (0, 1), an unknown method.

    >>> interval = mean_interval([1.0, 2.0, 3.0, 4.0])
    >>> round(interval.low, 3), interval.mean, round(interval.high, 3)
    (0.446, 2.5, 4.554)
    """
    data = _checked(values, level)
    mean, n = float(data.mean()), len(data)
    if method not in ("t", "bootstrap"):
        raise ValueError(f"method must be 't' or 'bootstrap', got {method!r}")
    if np.ptp(data) == 0:
        return Interval(mean, mean, mean, level, n)
    from scipy import stats

    if method == "t":
        half = float(stats.t.ppf((1 + level) / 2, n - 1)) * float(data.std(ddof=1)) / math.sqrt(n)
        return Interval(mean, mean - half, mean + half, level, n)
    found = stats.bootstrap(
        (data,), np.mean, confidence_level=level, n_resamples=resamples, rng=np.random.default_rng(seed)
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high), level, n)


def paired_difference(a: Sequence[float], b: Sequence[float], *, level: float = 0.95, method: str = "t") -> Interval:
    """Interval of the mean of ``a[i] - b[i]``: what two methods differ by, seed for seed.

    Pairing takes out what a seed does to both, so the interval is often far narrower than the two intervals suggest.

    Raises:
        ValueError: the two have different lengths, or what :func:`mean_interval` refuses.

    >>> paired_difference([3.0, 4.0, 5.0], [2.0, 3.0, 4.0]).mean
    1.0
    """
    first, second = _flat(a), _flat(b)
    if first.shape != second.shape:
        raise ValueError(
            f"{len(first)} and {len(second)} values do not make pairs: give the same seeds to both, in one order"
        )
    return mean_interval(first - second, level=level, method=method)


def proportion_interval(successes: int, trials: int, *, level: float = 0.95) -> Interval:
    """Wilson's interval (1927) of a share, such as the accuracy of *one* model on a test set of ``trials`` images.

    >>> interval = proportion_interval(262, 270)
    >>> f"{interval.low:.3f} {interval.high:.3f}"
    '0.943 0.985'
    """
    if not (isinstance(trials, int) and isinstance(successes, int) and 0 <= successes <= trials and trials > 0):
        raise ValueError(f"successes must be in 0..trials and trials above 0, got {successes!r} of {trials!r}")
    _check_level(level)
    from scipy import stats

    found = stats.binomtest(successes, trials).proportion_ci(level, method="wilson")
    return Interval(successes / trials, float(found.low), float(found.high), level, trials)


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float], *, level: float = 0.95) -> Interval:
    """Fieller's interval (1954) of the ratio of two means whose values come in pairs, such as the share of a gap.

    The ratio r is inside where the mean of ``numerators - r * denominators`` cannot be told from 0 at ``level``. It
    needs no division of single pairs, of which one may have next to no gap; and it need not be symmetric.

    Args:
        numerators, denominators: as many finite numbers, at least two, in one order.
        level: confidence in (0, 1).

    Raises:
        ValueError: the two have different lengths; the mean of the denominators cannot be told from 0, so that any
            ratio fits; or what :func:`mean_interval` refuses.

    >>> interval = ratio_interval([3.0, 5.0, 4.0, 4.4], [4.0, 6.0, 5.0, 5.0])
    >>> round(interval.mean, 2), round(interval.low, 2), round(interval.high, 2)
    (0.82, 0.72, 0.89)
    """
    y, x = _checked(numerators, level), _checked(denominators, level)
    if len(y) != len(x):
        raise ValueError(f"{len(y)} and {len(x)} values do not make pairs: give the same seeds to both, in one order")
    from scipy import stats

    quantile = float(stats.t.ppf((1 + level) / 2, len(y) - 1))
    (vy, vyx), (_, vx) = np.cov(np.stack([y, x])) / len(y) * quantile**2
    a, b, c = x.mean() ** 2 - vx, y.mean() * x.mean() - vyx, y.mean() ** 2 - vy
    if a <= 0:
        raise ValueError(
            f"the denominators have mean {x.mean():.3g}, not to be told from 0 at level {level:g}: any ratio fits"
        )
    half = float(math.sqrt(max(b**2 - a * c, 0.0)) / a)
    return Interval(float(y.mean() / x.mean()), float(b / a) - half, float(b / a) + half, level, len(y))


def _flat(values: Sequence[float]) -> np.ndarray:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1:
        raise ValueError(f"values must be a sequence of numbers, got an array of shape {data.shape}")
    return data


def _checked(values: Sequence[float], level: float) -> np.ndarray:
    data = _flat(values)
    if len(data) < 2:
        raise ValueError(f"an interval needs at least two values, got {len(data)}: one seed says nothing")
    if not np.isfinite(data).all():
        raise ValueError(
            f"every value must be finite, got {data[~np.isfinite(data)][0]} at {np.argmin(np.isfinite(data))}"
        )
    _check_level(level)
    return data


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, such as 0.95; got {level!r}")
