"""Softmax with a temperature: p_i = exp(z_i / T) / Σ_j exp(z_j / T), and the entropy that T moves.

One formula, three uses. *Raised* while training, for teacher and student alike, it makes the small probabilities of the
wrong classes visible (Hinton, Vinyals & Dean 2015). *Fitted* on validation data it calibrates a finished model (Guo et
al. 2017). *Lowered* it sharpens, and steers sampling. It never moves the arg max.
"""

import math
from numbers import Real

import torch
from torch import Tensor

__all__ = ["entropy", "softmax_with_temperature"]


def softmax_with_temperature(logits: Tensor, temperature: float | Tensor, *, dim: int = -1) -> Tensor:
    """Probabilities exp(z_i / T) / Σ_j exp(z_j / T).

    T = 1 is the plain softmax, T → 0 puts everything on the largest logit (ties share), T → ∞ tends to uniform. The
    largest logit is taken away *before* the division, so that neither logits of ±1e4 nor T = 1e-30 overflow.

    ``logits`` are floating point ``[..., K]``; ``-inf`` means "impossible", as long as each row has a finite entry.
    ``temperature`` is a number above 0, or a tensor without dimensions (under ``vmap``, one a replica). The answer has
    the dtype of ``logits`` (half precision is computed in float32). TypeError, ValueError: what does not fit; NaN.
    Source: Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network", equation 1.

    >>> softmax_with_temperature(torch.tensor([2.0, 1.0, 0.0]), 1.0)
    tensor([0.6652, 0.2447, 0.0900])
    >>> softmax_with_temperature(torch.tensor([2.0, 1.0, 0.0]), 100.0)
    tensor([0.3367, 0.3333, 0.3300])
    """
    T = check_number("temperature", temperature, above_zero=True)
    z = widen(check_float("logits", logits, dim, "a finite number in each row and no NaN or +inf"))
    z = z - z.detach().amax(dim, keepdim=True)
    return torch.softmax(z / at_least_tiny(T, z.dtype), dim).to(logits.dtype)


def entropy(probabilities: Tensor, *, dim: int = -1) -> Tensor:
    """Entropy −Σ p log p in nats (divide by log 2 for bits), from 0 (certain) to log K (uniform); 0 · log 0 is 0.

    ``probabilities`` are floating point ``[..., K]``, each in [0, 1], adding up to 1 along ``dim``, or it is a
    TypeError or ValueError; the answer has their shape without ``dim``, in float32 at least.

    >>> entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    tensor([0.6931, 0.0000])
    """
    p = widen(check_float("probabilities", probabilities, dim))
    # Half precision adds up to 1 within about K times its own rounding, not within a fixed number.
    slack = 1e-5 + 4 * p.shape[dim] * torch.finfo(probabilities.dtype).eps
    if not readable_truth(((p >= 0).all(dim) & ((p.sum(dim) - 1).abs() <= slack)).all()):
        raise ValueError(
            f"probabilities must lie in [0, 1] and add up to 1 along dim={dim}, got values from {p.min().item():g} to "
            f"{p.max().item():g} and sums from {p.sum(dim).min().item():g} to {p.sum(dim).max().item():g}: are these "
            "logits?"
        )
    return torch.special.entr(p.where(p > 0, 1.0)).sum(dim)  # at 0 the value would be right, and its gradient NaN


def check_number(
    name: str, value: float | Tensor, *, most: float = math.inf, above_zero: bool = False
) -> float | Tensor:
    """A finite number from 0 (or above it) to ``most``, as a float or as a tensor without dimensions."""
    if isinstance(value, Tensor) and value.dim() > 0:
        raise ValueError(f"{name} must be one number or a tensor without dimensions, got shape {tuple(value.shape)}")
    if isinstance(value, bool) or not isinstance(value, (Real, Tensor)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    value = value if isinstance(value, Tensor) else float(value)
    if not readable_truth((value > 0 if above_zero else value >= 0) & (value <= most) & (value < math.inf)):
        span = "above 0" if above_zero else "of at least 0" if most == math.inf else f"in [0, {most:g}]"
        raise ValueError(f"{name} must be a finite number {span}, got {value:g}")
    return value


def check_float(name: str, values: Tensor, dim: int = -1, content: str = "") -> Tensor:
    """``values`` if they are floating point with at least one class along ``dim``, and hold ``content`` if asked."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        given = f"dtype {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name} must be a floating-point tensor [..., K], got {given}")
    if values.dim() == 0 or values.shape[dim] == 0:
        raise ValueError(f"{name} must have at least one class along dim={dim}, got shape {tuple(values.shape)}")
    if content and not readable_truth(values.amax(dim).isfinite().all()):
        found = f"{int(values.isnan().sum())} NaN and {int(values.isposinf().sum())} +inf"
        raise ValueError(f"{name} must hold {content}, got shape {tuple(values.shape)} with {found}")
    return values


def at_least_tiny(T: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """A temperature that does not round to 0 in ``dtype``, where 0 / 0 would be NaN."""
    smallest = torch.finfo(dtype).tiny
    return T.to(dtype).clamp_min(smallest) if isinstance(T, Tensor) else max(T, smallest)


def widen(values: Tensor) -> Tensor:
    """Half precision in float32; float32 and float64 as they are."""
    return values.float() if values.dtype.itemsize < 4 else values


def readable_truth(condition: Tensor | bool) -> bool:
    """Truth of a condition; True where it cannot be read (inside ``vmap``, or on the meta device)."""
    try:
        return bool(condition)
    except RuntimeError:
        return True
