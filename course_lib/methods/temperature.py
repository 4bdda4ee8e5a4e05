"""Softmax with a temperature: p_i = exp(z_i / T) / Σ_j exp(z_j / T), and the entropy that T moves.

One formula, three uses. *Raised* while training, for teacher and student alike, it makes the small probabilities of the
wrong classes visible (Hinton, Vinyals & Dean 2015). *Fitted* on validation data it calibrates a finished model (Guo et
al. 2017, see :func:`course_lib.evidence.calibration.fit_temperature`). *Lowered* it sharpens, and steers sampling.
It never moves the arg max.
"""

import math
from numbers import Real

import torch
from torch import Tensor

__all__ = ["check_temperature", "entropy", "log_softmax_with_temperature", "softmax_with_temperature"]


def softmax_with_temperature(logits: Tensor, temperature: float | Tensor, *, dim: int = -1) -> Tensor:
    """Probabilities exp(z_i / T) / Σ_j exp(z_j / T).

    T = 1 is the plain softmax; T → 0 puts everything on the largest logit (ties share); T → ∞ tends to the uniform
    distribution. The largest logit is subtracted *before* the division, so that logits of ±1e4 and temperatures of
    1e-30 neither overflow nor give NaN in float32.

    Args:
        logits: floating point, ``[..., K]``. ``-inf`` is allowed and means "impossible", as long as one entry of each
            row is finite.
        temperature: a number above 0 without a unit, or a tensor without dimensions (under ``vmap``, one per replica).
        dim: the dimension that holds the K classes.

    Returns:
        Probabilities of the shape and dtype of ``logits``; they add up to 1 along ``dim``.

    Raises:
        TypeError: ``logits`` is not a floating-point tensor, ``temperature`` is not a number.
        ValueError: ``temperature`` is 0, negative, NaN or infinite; no class; NaN or +inf in ``logits``.

    Source: Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network", equation 1.

    >>> z = torch.tensor([2.0, 1.0, 0.0])
    >>> softmax_with_temperature(z, 1.0)
    tensor([0.6652, 0.2447, 0.0900])
    >>> softmax_with_temperature(z, 100.0)
    tensor([0.3367, 0.3333, 0.3300])
    """
    return torch.softmax(_scaled(logits, temperature, dim), dim)


def log_softmax_with_temperature(logits: Tensor, temperature: float | Tensor, *, dim: int = -1) -> Tensor:
    """Logarithm (natural) of :func:`softmax_with_temperature`, computed without ever leaving log space.

    Arguments, shape and errors are those of :func:`softmax_with_temperature`; every entry is at most 0. A probability
    too small for the dtype is 0 there and still a finite number here, which is why every loss of the course uses this.

    >>> log_softmax_with_temperature(torch.tensor([1e4, 0.0]), 1.0)
    tensor([     0., -10000.])
    """
    return torch.log_softmax(_scaled(logits, temperature, dim), dim)


def entropy(probabilities: Tensor, *, dim: int = -1) -> Tensor:
    """Entropy −Σ p log p in nats, from 0 (certain) to log K (uniform).

    Args:
        probabilities: floating point, ``[..., K]``, each in [0, 1], adding up to 1 along ``dim``; 0 · log 0 is 0.
        dim: the dimension that holds the K classes.

    Returns:
        Nats, the shape of ``probabilities`` without ``dim``. (Divide by log 2 for bits.)

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: no class, an entry outside [0, 1] or NaN, rows that do not add up to 1 (logits, perhaps).

    >>> entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    tensor([0.6931, 0.0000])
    """
    _check_float("probabilities", probabilities)
    _check_classes("probabilities", probabilities, dim)
    # Half precision adds up to 1 within about K times its own rounding, not within a fixed number.
    tolerance = 1e-5 + 4 * probabilities.shape[dim] * torch.finfo(probabilities.dtype).eps
    if not _true(((probabilities >= 0) & (probabilities <= 1 + tolerance)).all()):
        low, high = probabilities.min().item(), probabilities.max().item()
        raise ValueError(f"probabilities must lie in [0, 1], got values from {low:g} to {high:g}; are these logits?")
    total = probabilities.detach().sum(dim)
    if not _true(((total - 1).abs() <= tolerance).all()):
        raise ValueError(
            f"probabilities must add up to 1 along dim={dim}, got sums from {total.min().item():g} to "
            f"{total.max().item():g} (shape {tuple(probabilities.shape)})"
        )
    return torch.special.entr(probabilities).sum(dim)


def check_temperature(temperature: float | Tensor) -> None:
    """Refuse a temperature that is not a finite number above 0.

    >>> check_temperature(-1)
    Traceback (most recent call last):
    ValueError: temperature must be a finite number above 0, got -1 (1 leaves the softmax as it is)
    """
    if isinstance(temperature, Tensor):
        if temperature.dim() != 0:
            raise ValueError(
                f"temperature must be one number or a tensor without dimensions, got shape {tuple(temperature.shape)}"
            )
        allowed = _true(torch.isfinite(temperature) & (temperature > 0))
    elif isinstance(temperature, Real) and not isinstance(temperature, bool):
        allowed = math.isfinite(temperature) and temperature > 0
    else:
        raise TypeError(f"temperature must be a number, got {type(temperature).__name__}")
    if not allowed:
        raise ValueError(
            f"temperature must be a finite number above 0, got {temperature} (1 leaves the softmax as it is)"
        )


def _scaled(logits: Tensor, temperature: float | Tensor, dim: int) -> Tensor:
    """(z − max z) / T: the softmax of it is that of z / T, and its largest entry is 0."""
    check_temperature(temperature)
    _check_float("logits", logits)
    _check_classes("logits", logits, dim)
    largest = logits.detach().amax(dim, keepdim=True)
    if not _true(torch.isfinite(largest).all()):
        raise ValueError(
            f"logits must hold a finite number in each row and no NaN or +inf, got shape {tuple(logits.shape)} "
            f"with {int(torch.isnan(logits).sum())} NaN and {int(torch.isposinf(logits).sum())} +inf"
        )
    if not isinstance(temperature, Tensor):
        # A positive double may round to 0 in the logits' own dtype, and 0 / 0 would be NaN.
        temperature = max(float(temperature), torch.finfo(logits.dtype).tiny)
    return (logits - largest) / temperature


def _check_float(name: str, values: Tensor) -> None:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        given = f"dtype {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {given}")


def _check_classes(name: str, values: Tensor, dim: int) -> None:
    if values.dim() == 0 or values.shape[dim] == 0:
        raise ValueError(f"{name} must have at least one class along dim={dim}, got shape {tuple(values.shape)}")


def _true(condition: Tensor) -> bool:
    """Truth of a boolean tensor; True where it cannot be read (inside ``vmap``, or on the meta device)."""
    try:
        return bool(condition)
    except RuntimeError:
        return True
