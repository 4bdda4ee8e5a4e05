"""Integer-only arithmetic: int8 × int8 → int32 → int8, as a processor without floating point would do it.

Jacob et al. 2018, sections 2.2 to 2.4. With x = s_x (q_x - z_x) and w = s_w (q_w - z_w), a layer is

    q_y = z_y + (s_x s_w / s_y) · (Σ (q_x - z_x)(q_w - z_w) + q_b),      q_b = round(b / (s_x s_w)) in int32,

and the one real number left, s_x s_w / s_y, is a 31-bit integer times a power of two. Every function here computes with
integers alone; the only floats are in the grids that describe them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from course_lib.methods.quantization import QuantParams, check_real, choose_qparams, quantize

__all__ = [
    "FixedPoint",
    "IntegerLayer",
    "fixed_point",
    "integer_conv2d",
    "integer_layer",
    "integer_linear",
    "integer_max_pool2d",
    "quantize_bias",
    "requantize",
]

INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class FixedPoint:
    """The real number ``multiplier · 2^-shift``; both int64, of one shape, 2^30 <= multiplier < 2^31, shift 0 to 62."""

    multiplier: Tensor
    shift: Tensor


def fixed_point(real: Tensor) -> FixedPoint:
    """Positive real numbers as 31-bit integers and shifts: relative error at most 2^-31.

    >>> m = fixed_point(torch.tensor(0.25))
    >>> m.multiplier.item() * 2.0 ** -m.shift.item()
    0.25
    """
    real = torch.as_tensor(real, dtype=torch.float64)
    if not bool((torch.isfinite(real) & (real > 0)).all()):
        raise ValueError(f"a fixed-point number here must be positive and finite, got {real.tolist()}")
    mantissa, exponent = torch.frexp(real)
    multiplier = (mantissa * 2**31).round().to(torch.int64)
    # Rounding up may reach 2^31, one bit too long.
    full = multiplier == 2**31
    multiplier, exponent = torch.where(full, multiplier // 2, multiplier), exponent + full
    shift = 31 - exponent.to(torch.int64)
    if bool((shift < 0).any()):
        raise ValueError(f"a rescaling factor of {real.max().item():g} is too large: the output's grid is far too fine")
    # Beyond 62 places any product of 62 bits is rounded to 0 or to one step.
    return FixedPoint(multiplier, shift.clamp(max=62))


def requantize(accumulator: Tensor, factor: FixedPoint, q: QuantParams) -> Tensor:
    """int32 sums → integers on the grid ``q``: multiply, shift with rounding (half up), add the zero point, clip.

    Args:
        accumulator: int32, any shape that broadcasts with ``factor``.
        factor: s_x s_w / s_y.
        q: the output's grid, one scale in all.

    Raises:
        TypeError: an accumulator of floating-point numbers, whose fractions would be lost without a word.
    """
    if accumulator.is_floating_point() or accumulator.is_complex():
        raise TypeError(f"accumulator must hold integers, got {accumulator.dtype}")
    product = accumulator.to(torch.int64) * factor.multiplier
    half = torch.where(factor.shift > 0, torch.ones_like(factor.shift) << (factor.shift - 1).clamp(min=0), 0)
    return (((product + half) >> factor.shift) + q.zero_point).clamp(q.qmin, q.qmax).to(q.dtype)


def centred(xq: Tensor, q: QuantParams, name: str) -> Tensor:
    """``xq - zero_point`` in int32."""
    if not isinstance(xq, Tensor) or xq.is_floating_point() or xq.is_complex():
        kind = xq.dtype if isinstance(xq, Tensor) else type(xq).__name__
        raise TypeError(f"{name} must be a tensor of integers, as quantize() returns it, got {kind}")
    return xq.to(torch.int32) - q.shaped_for(xq)[1]


def check_fits(terms: int, x_q: QuantParams, w_q: QuantParams, bias: Tensor | None) -> None:
    """Refuse sums that an int32 accumulator could not hold in the worst case."""
    largest_x = max(q - z for q, z in ((x_q.qmax, int(x_q.zero_point.min())), (-x_q.qmin, -int(x_q.zero_point.max()))))
    largest_w = max(q - z for q, z in ((w_q.qmax, int(w_q.zero_point.min())), (-w_q.qmin, -int(w_q.zero_point.max()))))
    worst = terms * largest_x * largest_w + (int(bias.abs().max()) if bias is not None and bias.numel() else 0)
    if worst > INT32_MAX:
        raise ValueError(
            f"a sum of {terms} products of up to {largest_x} × {largest_w}, bias included, can reach {worst}: "
            f"more than int32 holds ({INT32_MAX})"
        )


def quantize_bias(bias: Tensor, x_q: QuantParams, w_q: QuantParams) -> Tensor:
    """A bias [O] on the accumulator's own grid, step s_x s_w: int32 [O].

    Raises:
        ValueError: NaN or infinite values, or a bias so large against s_x s_w that int32 cannot hold it.
    """
    check_real(bias, "bias", empty=True)
    counts = (bias.detach().double() / (x_q.scale.double() * w_q.scale.double())).round()
    if counts.numel() and bool((counts.abs() > INT32_MAX).any()):
        raise ValueError(
            f"a bias of {bias.abs().max().item():g} is {counts.abs().max().item():.3g} steps of the accumulator: "
            "more than int32 holds; the weights' or the input's scale is too small"
        )
    return counts.to(torch.int32)


def integer_linear(
    xq: Tensor, x_q: QuantParams, wq: Tensor, w_q: QuantParams, bias: Tensor | None, y_q: QuantParams
) -> Tensor:
    """A linear layer on integers.

    Args:
        xq: inputs [N, I] on the grid ``x_q`` (one scale).
        wq: weights [O, I] on the grid ``w_q`` (one scale, or one a row: axis 0).
        bias: int32 [O] from :func:`quantize_bias`, or ``None``.
        y_q: the output's grid (one scale).

    Returns:
        Outputs [N, O] in ``y_q.dtype``: within one step of quantizing the layer computed on the dequantized numbers.

    Raises:
        TypeError: floating-point inputs. ValueError: shapes that do not fit, sums that int32 might not hold.
    """
    check_grids(x_q, w_q, y_q)
    if xq.dim() != 2 or wq.dim() != 2 or xq.shape[1] != wq.shape[1]:
        raise ValueError(f"inputs [N, I] and weights [O, I] are needed, got {tuple(xq.shape)} and {tuple(wq.shape)}")
    check_fits(wq.shape[1], x_q, w_q, bias)
    accumulator = centred(xq, x_q, "xq") @ centred(wq, w_q, "wq").T
    if bias is not None:
        accumulator = accumulator + bias
    return requantize(accumulator, rescaling(x_q, w_q, y_q), y_q)


def check_grids(x_q: QuantParams, w_q: QuantParams, y_q: QuantParams) -> None:
    if x_q.axis is not None or y_q.axis is not None or w_q.axis not in (None, 0):
        raise ValueError(
            "inputs and outputs need one scale, weights one or one an output channel (axis 0); "
            f"got axes {x_q.axis}, {y_q.axis} and {w_q.axis}"
        )


def rescaling(x_q: QuantParams, w_q: QuantParams, y_q: QuantParams) -> FixedPoint:
    return fixed_point(x_q.scale.double() * w_q.scale.double() / y_q.scale.double())


def windows(xq: Tensor, size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], fill: int) -> Tensor:
    """All windows of a feature map [N, C, H, W], the border filled with ``fill``: [N, C, H', W', kh, kw]."""
    padded = torch.nn.functional.pad(xq, (padding[1], padding[1], padding[0], padding[0]), value=fill)
    if padded.shape[2] < size[0] or padded.shape[3] < size[1]:
        raise ValueError(f"a window of {size} does not fit into {tuple(padded.shape[2:])} padded pixels")
    return padded.unfold(2, size[0], stride[0]).unfold(3, size[1], stride[1])


def integer_conv2d(
    xq: Tensor,
    x_q: QuantParams,
    wq: Tensor,
    w_q: QuantParams,
    bias: Tensor | None,
    y_q: QuantParams,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
) -> Tensor:
    """A convolution on integers: inputs [N, C, H, W], weights [O, C, kh, kw] → [N, O, H', W'].

    The border is padded with the input's zero point, the integer that stands for 0.0. Otherwise as
    :func:`integer_linear`.
    """
    check_grids(x_q, w_q, y_q)
    if xq.dim() != 4 or wq.dim() != 4 or xq.shape[1] != wq.shape[1]:
        raise ValueError(
            f"inputs [N, C, H, W] and weights [O, C, kh, kw] are needed, got {tuple(xq.shape)} and {tuple(wq.shape)}"
        )
    check_fits(wq[0].numel(), x_q, w_q, bias)
    # After the zero point is taken off, the border's integer is 0.
    patches = windows(centred(xq, x_q, "xq"), tuple(wq.shape[2:]), stride, padding, 0)
    count, _, height, width = patches.shape[:4]
    columns = patches.permute(0, 2, 3, 1, 4, 5).reshape(count * height * width, -1)
    accumulator = columns @ centred(wq, w_q, "wq").flatten(1).T
    if bias is not None:
        accumulator = accumulator + bias
    yq = requantize(accumulator, rescaling(x_q, w_q, y_q), y_q)
    return yq.reshape(count, height, width, -1).permute(0, 3, 1, 2).contiguous()


def integer_max_pool2d(
    xq: Tensor, size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int] = (0, 0)
) -> Tensor:
    """Max-pooling of integers [N, C, H, W]: order is all it needs, so the grid stays as it is."""
    return windows(xq, size, stride, padding, torch.iinfo(xq.dtype).min).amax(dim=(-1, -2))


@dataclass(frozen=True, eq=False)
class IntegerLayer:
    """A linear or convolution layer in integers, with the ReLU after it folded into the clipping of its output.

    Attributes:
        x_q, w_q, y_q: grids of input, weight and output.
        weight: int8 [O, I] or [O, C, kh, kw].
        bias: int32 [O].
        stride, padding: of a convolution.
        relu: whether the output is clipped at 0.0.
    """

    x_q: QuantParams
    w_q: QuantParams
    y_q: QuantParams
    weight: Tensor
    bias: Tensor
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    relu: bool = False

    def __call__(self, xq: Tensor) -> Tensor:
        if self.weight.dim() == 2:
            yq = integer_linear(xq, self.x_q, self.weight, self.w_q, self.bias, self.y_q)
        else:
            sizes = {"stride": self.stride, "padding": self.padding}
            yq = integer_conv2d(xq, self.x_q, self.weight, self.w_q, self.bias, self.y_q, **sizes)
        return yq.clamp(min=int(self.y_q.zero_point)) if self.relu else yq


def integer_layer(
    layer: torch.nn.Linear | torch.nn.Conv2d,
    x_q: QuantParams,
    y_q: QuantParams,
    *,
    relu: bool = False,
    per_channel: bool = True,
) -> IntegerLayer:
    """An 8-bit :class:`IntegerLayer` from a float layer and the grids of its input and output.

    Raises:
        ValueError: a convolution with groups, dilation, or padding other than zeros; it is named.
    """
    sizes = {}
    if isinstance(layer, torch.nn.Conv2d):
        if layer.groups != 1 or set(layer.dilation) != {1} or layer.padding_mode != "zeros":
            raise ValueError(f"{layer} is not supported: only groups=1, dilation=1 and zero padding are")
        if isinstance(layer.padding, str):
            raise ValueError(f"{layer} is not supported: give the padding as numbers")
        sizes = {"stride": tuple(layer.stride), "padding": tuple(layer.padding)}
    w_q = choose_qparams(layer.weight, 8, symmetric=True, axis=0 if per_channel else None)
    bias = layer.bias if layer.bias is not None else torch.zeros(len(layer.weight))
    return IntegerLayer(x_q, w_q, y_q, quantize(layer.weight, w_q), quantize_bias(bias, x_q, w_q), relu=relu, **sizes)
