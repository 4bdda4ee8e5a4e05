"""Affine quantization: real numbers on an evenly spaced grid of at most 2^8 integers, and back.

A value x is stored as ``q = clamp(round(x / scale) + zero_point, qmin, qmax)`` and read as ``(q - zero_point) · scale``
(Jacob et al. 2018; Krishnamoorthi 2018 for a scale a channel). The gradient through the rounding is the
straight-through estimator (Bengio et al. 2013). Every scale of the library comes from :func:`safe_scale`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from course_lib.gate import real_tensor, whole_number

__all__ = [
    "QuantParams", "choose_qparams", "dequantize", "fake_quantize", "integer_range", "qparams_from_range",
    "quantize", "signal_to_noise", "straight_through",
]  # fmt: skip

SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # a smaller one would have an infinite inverse in float32


@dataclass(frozen=True, eq=False)
class QuantParams:
    """A grid: how integers between ``qmin`` and ``qmax`` stand for real numbers.

    ``scale`` is the step, float32, above 0: [] for the whole tensor, [C] for one a channel (which dimension ``axis``
    counts, not negative), or [..., n / group] for one a ``group`` of consecutive numbers of the last dimension.
    ``zero_point``, int32, is the integer that stands for 0.0, in the same shape.

    >>> QuantParams(scale=0.1, zero_point=0, qmin=-127, qmax=127).dtype
    torch.int8
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    axis: int | None = None
    group: int | None = None

    def __post_init__(self):
        scale = torch.as_tensor(self.scale).detach().to(torch.float32)
        zero_point = torch.as_tensor(self.zero_point, device=scale.device).detach().to(torch.int32)
        zero_point = zero_point.expand(scale.shape).contiguous() if zero_point.dim() == 0 else zero_point
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "zero_point", zero_point)
        object.__setattr__(self, "qmin", int(self.qmin))
        object.__setattr__(self, "qmax", int(self.qmax))
        if not self.qmin < self.qmax:
            raise ValueError(f"qmin must be below qmax, got qmin={self.qmin}, qmax={self.qmax}")
        if self.axis is not None and (self.axis < 0 or self.group is not None):
            raise ValueError(f"axis must not be negative, and None with a group; got {self.axis}, group={self.group}")
        fits = scale.dim() > 0 if self.group is not None else scale.dim() == (self.axis is not None)
        if scale.shape != zero_point.shape or not fits:
            shapes = f"scale {tuple(scale.shape)} and zero_point {tuple(zero_point.shape)}"
            raise ValueError(f"{shapes} do not fit axis={self.axis}, group={self.group}")
        if not (scale.isfinite() & (scale > 0)).all():
            raise ValueError(f"scale must be positive and finite in float32, got {scale.tolist()}")
        if not ((zero_point >= self.qmin) & (zero_point <= self.qmax)).all():
            raise ValueError(f"zero_point must be within [{self.qmin}, {self.qmax}], got {zero_point.tolist()}")

    @property
    def bits(self) -> int:
        """Bits that one integer of this grid takes when packed; scales not counted."""
        return (self.qmax - self.qmin).bit_length()

    @property
    def dtype(self) -> torch.dtype:
        """The smallest integer type that holds qmin to qmax; unsigned if there is nothing below 0."""
        kinds = (torch.uint8, torch.int8, torch.int16, torch.int32)
        return next(k for k in kinds if torch.iinfo(k).min <= self.qmin and self.qmax <= torch.iinfo(k).max)

    def shaped_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point, shaped to broadcast against ``x``; ValueError if ``x`` does not fit."""
        shape, given = tuple(self.scale.shape), tuple(x.shape)
        if self.group is not None:
            fits = given == (*shape[:-1], shape[-1] * self.group)
        else:
            fits = self.axis is None or given[self.axis : self.axis + 1] == shape
        if not fits:
            along = f"along axis {self.axis}" if self.group is None else f"for groups of {self.group}"
            raise ValueError(f"scales of shape {shape} {along} do not fit a tensor of shape {given}")
        return tuple(spread(t, x.dim(), self.axis, self.group) for t in (self.scale, self.zero_point))


def check_real(x: Tensor, name: str = "x", *, empty: bool = False) -> Tensor:
    """``x`` detached and in float32 at least, if it holds finite floating-point numbers; a clear error otherwise."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a torch.Tensor of floating-point numbers, got {kind}")
    return x.detach() if empty and x.numel() == 0 else real_tensor(x, name)


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """What is found wrong inside is said with the name of the layer."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {layer!r}: {error}") from error


def integer_range(bits: int, *, symmetric: bool) -> tuple[int, int]:
    """(qmin, qmax) of 2 to 8 bits: ±(2^(bits-1) - 1) when symmetric (-x and x equally well off), or 0 to 2^bits - 1.

    >>> integer_range(8, symmetric=True), integer_range(4, symmetric=False)
    ((-127, 127), (0, 15))
    """
    bits = whole_number(bits, "bits", 2, 8)
    top = 2 ** (bits - 1) - 1
    return (-top, top) if symmetric else (0, 2**bits - 1)


def slices(x: Tensor, axis: int | None, group: int | None) -> Tensor:
    """``x`` arranged so that the last dimension holds what shares a scale: [n], [C, n] or [..., n / group, group]."""
    if group is None:
        return x.flatten() if axis is None else x.movedim(axis, 0).reshape(x.shape[axis], -1)
    group, length = whole_number(group, "group"), x.shape[-1] if x.dim() else 1
    if x.dim() == 0 or length % group:
        fits = max(g for g in range(1, min(group, length) + 1) if length % g == 0)
        raise ValueError(f"group={group} does not divide the last dimension of shape {tuple(x.shape)}; {fits} would")
    return x.unflatten(-1, (-1, group))


def spread(scale: Tensor, dims: int, axis: int | None, group: int | None) -> Tensor:
    """The way back from :func:`slices`: a number a slice, shaped to broadcast against ``dims`` dimensions."""
    if group is not None:
        return scale.repeat_interleave(group, dim=-1)
    return scale if axis is None else scale.view([-1 if d == axis else 1 for d in range(dims)])


def safe_scale(largest: Tensor, top: float) -> Tensor:
    """The step, float32, that puts ``largest`` (not negative) at the number ``top``; nothing here branches on values.

    All zeros get step 1; a step never lies below the smallest normal float32, whose inverse is finite.
    """
    step = largest.double() / top
    return torch.where(step > 0, step.clamp(min=SMALLEST_SCALE), 1.0).float()


def scale_and_zero(low: Tensor, high: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Step and zero point of the grid over [low, high] and 0, symmetric if ``qmin`` is negative."""
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    if qmin < 0:
        scale = safe_scale(torch.maximum(-low, high), qmax)
        return scale, torch.zeros_like(scale)
    scale = safe_scale(high - low, qmax)
    return scale, (-low / scale).round().clamp(qmin, qmax)


def choose_qparams(
    x: Tensor, bits: int = 8, *, symmetric: bool = True, axis: int | None = None, group: int | None = None
) -> QuantParams:
    """The grid that just covers the values of ``x`` (min-max), with 0.0 on it: they come back within half a step.

    ``x``: finite floats of any shape, not empty; zeros alone get scale 1. ``symmetric``: zero point 0 and integers
    ±(2^(bits-1) - 1), in int8; or 0 to 2^bits - 1, in uint8. ``axis``: the dimension with one scale for each of its
    slices; or ``group``: numbers of the last dimension that share a scale, a divisor of its length.

    >>> q = choose_qparams(torch.tensor([-1.0, 0.0, 0.5, 2.0]), bits=4)
    >>> round(q.scale.item(), 4), q.zero_point.item(), q.qmin, q.qmax
    (0.2857, 0, -7, 7)
    """
    x = check_real(x)
    axis = axis if axis is None else whole_number(axis, "axis", -x.dim(), x.dim() - 1) % x.dim()
    low, high = slices(x, axis, group).aminmax(dim=-1)
    return qparams_from_range(low, high, bits, symmetric=symmetric, axis=axis, group=group)


def qparams_from_range(
    low: Tensor | float, high: Tensor | float, bits: int = 8, *, symmetric: bool = True, **slicing: int | None
) -> QuantParams:
    """The grid over [low, high] and 0: scalars, or a number a slice, with ``axis`` or ``group``.

    >>> q = qparams_from_range(-1.0, 3.0, bits=2, symmetric=False)
    >>> round(q.scale.item(), 4), q.zero_point.item()
    (1.3333, 1)
    """
    low, high = (torch.as_tensor(end, dtype=torch.float64) for end in (low, high))
    if not (low.isfinite() & high.isfinite() & (low <= high)).all():
        raise ValueError(f"a range needs finite low <= high, got low={low.tolist()}, high={high.tolist()}")
    qmin, qmax = integer_range(bits, symmetric=symmetric)
    scale, zero_point = scale_and_zero(low, high, qmin, qmax)
    return QuantParams(scale, zero_point, qmin, qmax, **slicing)


def to_grid(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Grid coordinates of ``x``, rounded half to even but not clipped, in float32 at least."""
    # PyTorch too multiplies by the inverse of the scale: so a tie falls to the same side.
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.round(x * (1.0 / scale)) + zero_point


def quantize(x: Tensor, q: QuantParams) -> Tensor:
    """Integers of ``x`` on the grid ``q``: round half to even, then clip to [qmin, qmax].

    ``x`` holds finite floats (or nothing) in a shape that fits ``q``; int8 for a symmetric grid, else uint8.

    >>> q = QuantParams(scale=0.5, zero_point=0, qmin=-7, qmax=7)
    >>> quantize(torch.tensor([-9.0, -0.5, 0.0, 0.6, 1.0]), q).tolist()
    [-7, -1, 0, 1, 2]
    """
    x = check_real(x, empty=True)
    scale, zero_point = q.shaped_for(x)
    return to_grid(x, scale, zero_point).clamp(q.qmin, q.qmax).to(q.dtype)


def dequantize(xq: Tensor, q: QuantParams) -> Tensor:
    """Real numbers, float32, that the integers ``xq`` stand for: (xq - zero_point) · scale.

    >>> dequantize(torch.tensor([-7, 0, 2]), QuantParams(scale=0.5, zero_point=0, qmin=-7, qmax=7)).tolist()
    [-3.5, 0.0, 1.0]
    """
    xq = check_integers(xq, "xq", q)
    scale, zero_point = q.shaped_for(xq)
    return (xq - zero_point).to(torch.float32) * scale


def check_integers(xq: Tensor, name: str, q: QuantParams) -> Tensor:
    """``xq`` as int64, if it holds integers of the grid ``q``; a clear error otherwise."""
    if not isinstance(xq, Tensor) or xq.is_floating_point() or xq.is_complex() or xq.dtype == torch.bool:
        kind = getattr(xq, "dtype", type(xq).__name__)
        raise TypeError(f"{name} must be a tensor of integers as quantize() returns it, got {kind}")
    low, high = (int(end) for end in xq.aminmax()) if xq.numel() else (q.qmin, q.qmax)
    if low < q.qmin or high > q.qmax:
        raise ValueError(f"{name} runs from {low} to {high}, outside the grid's [{q.qmin}, {q.qmax}]")
    return xq.to(torch.int64)


def fake_quantize(x: Tensor, q: QuantParams) -> Tensor:
    """``dequantize(quantize(x))`` in one step, with a gradient that trains: the straight-through estimator.

    It is 1 where ``x`` lies inside the grid and 0 where it was clipped (Bengio et al. 2013; the convention of
    ``torch.fake_quantize_per_tensor_affine``); none reaches ``scale``. Shape and dtype stay those of ``x``.

    >>> x = torch.tensor([0.6, 9.0], requires_grad=True)
    >>> y = fake_quantize(x, QuantParams(scale=0.5, zero_point=0, qmin=-7, qmax=7))
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([0.5, 3.5], [1.0, 0.0])
    """
    check_real(x, empty=True)
    return straight_through(x, *q.shaped_for(x), q.qmin, q.qmax)


def straight_through(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """The arithmetic of :func:`fake_quantize`, without checks: ``scale`` and ``zero_point`` broadcast against ``x``."""
    with torch.no_grad():
        marks = to_grid(x, scale, zero_point)
        inside = ((marks >= qmin) & (marks <= qmax)).to(x.dtype)
        on_grid = ((marks.clamp(qmin, qmax) - zero_point) * scale).to(x.dtype)
    # x - x.detach() is exactly zero: the value of the grid, the gradient of x.
    return on_grid + inside * (x - x.detach())


def signal_to_noise(x: Tensor, approximation: Tensor) -> float:
    """Signal-to-quantization-noise ratio in decibels: 10 · log10(Σx² / Σ(x - approximation)²); inf if they are equal.

    >>> round(signal_to_noise(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])), 2)
    20.0
    """
    x, y = check_real(x).double(), check_real(approximation, "approximation").double()
    if x.shape != y.shape:
        raise ValueError(f"shapes differ: {tuple(x.shape)} and {tuple(y.shape)}")
    ratio = x.square().sum() / (x - y).square().sum()
    return math.inf if torch.equal(x, y) else 10 * ratio.log10().item()
