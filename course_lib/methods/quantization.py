"""Affine quantization: real numbers on an evenly spaced grid of at most 2^8 integers, and back.

A value x is stored as the integer ``q = clamp(round(x / scale) + zero_point, qmin, qmax)`` and read as
``(q - zero_point) · scale`` (Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference"; Krishnamoorthi 2018 for per-channel scales). The gradient through the rounding is
the straight-through estimator (Bengio et al. 2013). Neighbours: :mod:`~course_lib.methods.ranges` chooses ranges for
activations, :mod:`~course_lib.methods.qat` puts the quantizer into a network, :mod:`~course_lib.methods.integer`
computes with the integers themselves.
"""

import operator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "QuantParams",
    "choose_qparams",
    "dequantize",
    "fake_quantize",
    "integer_range",
    "qparams_from_range",
    "quantize",
    "straight_through",
]

# A smaller scale would have an infinite inverse in float32.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class QuantParams:
    """A grid: how integers between ``qmin`` and ``qmax`` stand for real numbers.

    Attributes:
        scale: step of the grid, float32, above 0; shape [] for the whole tensor or [C] for one step a channel.
        zero_point: the integer that stands for 0.0, int32, between qmin and qmax; same shape as ``scale``.
        qmin: smallest integer.
        qmax: largest integer, above qmin.
        axis: the tensor's dimension that counts the C channels (not negative), or ``None`` for one scale in all.

    Numbers are accepted for ``scale`` and ``zero_point`` and become tensors.

    >>> QuantParams(scale=0.1, zero_point=0, qmin=-127, qmax=127).dtype
    torch.int8
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    axis: int | None = None

    def __post_init__(self):
        scale = torch.as_tensor(self.scale).detach().to(torch.float32)
        zero_point = torch.as_tensor(self.zero_point, device=scale.device).detach().to(torch.int32)
        if zero_point.dim() == 0:
            zero_point = zero_point.expand(scale.shape).contiguous()
        if not self.qmin < self.qmax:
            raise ValueError(f"qmin must be below qmax, got qmin={self.qmin}, qmax={self.qmax}")
        if scale.shape != zero_point.shape or scale.dim() != (0 if self.axis is None else 1):
            fits = "shape []" if self.axis is None else "shape [C]"
            raise ValueError(
                f"scale {tuple(scale.shape)} and zero_point {tuple(zero_point.shape)} do not fit axis={self.axis}: "
                f"both need {fits}"
            )
        if self.axis is not None and self.axis < 0:
            raise ValueError(f"axis of QuantParams must not be negative, got {self.axis}")
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise ValueError(f"scale must be positive and finite, got {scale.tolist()}")
        if not bool(((zero_point >= self.qmin) & (zero_point <= self.qmax)).all()):
            raise ValueError(f"zero_point must be within [{self.qmin}, {self.qmax}], got {zero_point.tolist()}")
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "zero_point", zero_point)

    @property
    def bits(self) -> int:
        """Bits that one integer of this grid takes when packed."""
        return (self.qmax - self.qmin).bit_length()

    @property
    def dtype(self) -> torch.dtype:
        """The smallest integer type that holds qmin to qmax; unsigned if there is nothing below 0."""
        bytes_first = (torch.uint8, torch.int8) if self.qmin >= 0 else (torch.int8, torch.uint8)
        for dtype in (*bytes_first, torch.int16, torch.int32):
            if torch.iinfo(dtype).min <= self.qmin and self.qmax <= torch.iinfo(dtype).max:
                return dtype
        raise ValueError(f"[{self.qmin}, {self.qmax}] does not fit into 32 bits")

    def shaped_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point, shaped to broadcast against ``x``; ValueError if ``x`` does not fit."""
        if self.axis is None:
            return self.scale, self.zero_point
        if self.axis >= x.dim() or x.shape[self.axis] != self.scale.numel():
            raise ValueError(
                f"{self.scale.numel()} scales along axis {self.axis} do not fit a tensor of shape {tuple(x.shape)}"
            )
        shape = [1] * x.dim()
        shape[self.axis] = -1
        return self.scale.view(shape), self.zero_point.view(shape)


def check_bits(bits: int) -> int:
    """``bits`` as an int between 2 and 8, or a clear error."""
    try:
        if isinstance(bits, bool):
            raise TypeError
        bits = operator.index(bits)
    except TypeError:
        raise TypeError(f"bits must be an integer from 2 to 8, got {bits!r}") from None
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be from 2 to 8, got {bits}")
    return bits


def check_real(x: Tensor, name: str = "x", *, finite: bool = True, empty: bool = False) -> Tensor:
    """``x`` detached, if it is a tensor of finite real floating-point numbers; a clear error otherwise."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of floating-point numbers, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must hold floating-point numbers, got {x.dtype} of shape {tuple(x.shape)}")
    if x.numel() == 0 and not empty:
        raise ValueError(f"{name} is empty (shape {tuple(x.shape)}): a range needs at least one value")
    if finite and not bool(torch.isfinite(x).all()):
        count = int((~torch.isfinite(x)).sum())
        raise ValueError(
            f"{name} of shape {tuple(x.shape)} holds {count} NaN or infinite value{'s' * (count > 1)}: "
            "no grid contains them"
        )
    return x.detach()


def integer_range(bits: int, *, symmetric: bool) -> tuple[int, int]:
    """(qmin, qmax): ±(2^(bits-1) - 1) when symmetric, 0 to 2^bits - 1 when not.

    The symmetric grid gives up one integer so that -x and x are always equally well represented.

    >>> integer_range(8, symmetric=True), integer_range(2, symmetric=True), integer_range(4, symmetric=False)
    ((-127, 127), (-1, 1), (0, 15))
    """
    bits = check_bits(bits)
    largest = 2 ** (bits - 1) - 1
    return (-largest, largest) if symmetric else (0, 2**bits - 1)


def choose_qparams(x: Tensor, bits: int = 8, *, symmetric: bool = True, axis: int | None = None) -> QuantParams:
    """The grid that just covers the values of ``x`` (min-max), with 0.0 on it exactly.

    Args:
        x: floating-point tensor of any shape, not empty, all finite.
        bits: width from 2 to 8.
        symmetric: ``True``: zero point 0 and integers ±(2^(bits-1) - 1), in int8. ``False``: integers 0 to 2^bits -
            1, in uint8; the range [min, max] is widened to contain 0.
        axis: dimension with one scale for each of its slices; ``None`` for one scale in all. May be negative.

    Returns:
        QuantParams. Every value of ``x`` comes back within half a step. A tensor (or channel) of zeros gets scale 1.

    Raises:
        TypeError: ``x`` is no floating-point tensor, or ``bits`` or ``axis`` is no integer.
        ValueError: bits outside 2 to 8, an empty tensor, NaN or infinite values, an axis that ``x`` does not have.

    >>> q = choose_qparams(torch.tensor([-1.0, 0.0, 0.5, 2.0]), bits=4)
    >>> round(q.scale.item(), 4), q.zero_point.item(), q.qmin, q.qmax
    (0.2857, 0, -7, 7)
    """
    bits = check_bits(bits)
    x = check_real(x)
    axis = check_axis(axis, x)
    if axis is None:
        low, high = x.aminmax()
    else:
        low, high = x.movedim(axis, 0).reshape(x.shape[axis], -1).aminmax(dim=1)
    return qparams_from_range(low, high, bits, symmetric=symmetric, axis=axis)


def check_axis(axis: int | None, x: Tensor) -> int | None:
    """``axis`` counted from the front, or a clear error."""
    if axis is None:
        return None
    try:
        if isinstance(axis, bool):
            raise TypeError
        index = operator.index(axis)
    except TypeError:
        raise TypeError(f"axis must be an integer or None, got {axis!r}") from None
    if not -x.dim() <= index < x.dim():
        raise ValueError(f"axis {index} is out of range for a tensor of shape {tuple(x.shape)}")
    return index % x.dim()


def qparams_from_range(
    low: Tensor | float, high: Tensor | float, bits: int = 8, *, symmetric: bool = True, axis: int | None = None
) -> QuantParams:
    """The grid that covers [low, high] (scalars, or [C] with ``axis``), widened to contain 0.

    >>> q = qparams_from_range(-1.0, 3.0, bits=2, symmetric=False)
    >>> round(q.scale.item(), 4), q.zero_point.item()
    (1.3333, 1)
    """
    qmin, qmax = integer_range(bits, symmetric=symmetric)
    # In float64 the difference of two float32 ends cannot overflow.
    low, high = (torch.as_tensor(end).detach().to(torch.float64) for end in (low, high))
    if not bool((torch.isfinite(low) & torch.isfinite(high) & (low <= high)).all()):
        raise ValueError(f"a range needs finite low <= high, got low={low.tolist()}, high={high.tolist()}")
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = torch.maximum(-low, high) / qmax if symmetric else (high - low) / (qmax - qmin)
    if bool((step > torch.finfo(torch.float32).max).any()):
        raise ValueError(f"a step of {step.max().item():g} does not fit into float32")
    scale = torch.where(step > 0, step.clamp(min=SMALLEST_SCALE), 1.0).to(torch.float32)
    zero_point = torch.zeros_like(scale) if symmetric else (qmin - low / scale).round().clamp(qmin, qmax)
    return QuantParams(scale, zero_point, qmin, qmax, axis)


def quantize(x: Tensor, q: QuantParams) -> Tensor:
    """Integers of ``x`` on the grid ``q``: round half to even, then clip to [qmin, qmax].

    Args:
        x: finite floating-point tensor, any shape that fits ``q`` (it may be empty).
        q: see :func:`choose_qparams`.

    Returns:
        Tensor of the shape of ``x`` in ``q.dtype``: int8 for a symmetric grid, uint8 for an asymmetric one.

    >>> q = QuantParams(scale=0.5, zero_point=0, qmin=-7, qmax=7)
    >>> quantize(torch.tensor([-9.0, -0.5, 0.0, 0.6, 1.0]), q).tolist()
    [-7, -1, 0, 1, 2]
    """
    x = check_real(x, empty=True)
    scale, zero_point = q.shaped_for(x)
    return to_grid(x, scale, zero_point).clamp(q.qmin, q.qmax).to(q.dtype)


def to_grid(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Grid coordinates of ``x``, rounded but not clipped, in floating point (float32 at least)."""
    return torch.round(x.to(torch.promote_types(x.dtype, torch.float32)) * (1.0 / scale)) + zero_point


def dequantize(xq: Tensor, q: QuantParams) -> Tensor:
    """Real numbers, float32, that the integers ``xq`` stand for: (xq - zero_point) · scale.

    >>> dequantize(torch.tensor([-7, 0, 2]), QuantParams(scale=0.5, zero_point=0, qmin=-7, qmax=7)).tolist()
    [-3.5, 0.0, 1.0]
    """
    if not isinstance(xq, Tensor) or xq.is_floating_point() or xq.is_complex() or xq.dtype == torch.bool:
        kind = xq.dtype if isinstance(xq, Tensor) else type(xq).__name__
        raise TypeError(f"xq must be a tensor of integers as quantize() returns it, got {kind}")
    scale, zero_point = q.shaped_for(xq)
    whole = xq.to(torch.int64)
    if whole.numel() and not (q.qmin <= int(whole.min()) and int(whole.max()) <= q.qmax):
        raise ValueError(
            f"xq runs from {int(whole.min())} to {int(whole.max())}, outside the grid's [{q.qmin}, {q.qmax}]"
        )
    return (whole - zero_point).to(torch.float32) * scale


def fake_quantize(x: Tensor, q: QuantParams) -> Tensor:
    """``dequantize(quantize(x))`` in one step, with a gradient that trains: the straight-through estimator.

    The gradient is 1 where ``x`` lies inside the grid and 0 where it was clipped (Bengio et al. 2013; the convention of
    ``torch.fake_quantize_per_tensor_affine``). No gradient reaches ``scale``.

    Args:
        x: finite floating-point tensor; under ``torch.func.vmap`` use :func:`straight_through`, which checks nothing.
        q: see :func:`choose_qparams`.

    Returns:
        Tensor of the shape and dtype of ``x``.

    >>> x = torch.tensor([0.6, 9.0], requires_grad=True)
    >>> y = fake_quantize(x, QuantParams(scale=0.5, zero_point=0, qmin=-7, qmax=7))
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([0.5, 3.5], [1.0, 0.0])
    """
    check_real(x, empty=True)
    return straight_through(x, *q.shaped_for(x), q.qmin, q.qmax)


def straight_through(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """The arithmetic of :func:`fake_quantize` on ``scale`` and ``zero_point`` that already broadcast against ``x``."""
    with torch.no_grad():
        coordinates = to_grid(x, scale, zero_point)
        inside = ((coordinates >= qmin) & (coordinates <= qmax)).to(x.dtype)
        grid = ((coordinates.clamp(qmin, qmax) - zero_point) * scale).to(x.dtype)
    # x - x.detach() is exactly zero, so the result lies on the grid to the last bit and still carries x's gradient.
    return grid + inside * (x - x.detach())
