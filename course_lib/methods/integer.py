"""Integer-only arithmetic: int8 × int8 → int32 → int8, as a processor without floating point would do it.

Jacob et al. 2018, sections 2.2 to 2.4. With x = s_x (q_x - z_x) and w = s_w (q_w - z_w), a layer is

    q_y = z_y + (s_x s_w / s_y) · (Σ (q_x - z_x)(q_w - z_w) + q_b),      q_b = round(b / (s_x s_w)) in int32,

and the one real number left, s_x s_w / s_y, is a 31-bit integer times a power of two. The only floats are in the grids.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from course_lib.gate import UnsupportedModel

from course_lib.methods.quantization import (  # isort: skip
    QuantParams, check_integers, check_real, choose_qparams, dequantize, naming, quantize, safe_scale,
)  # fmt: skip
from course_lib.methods.quantized_layers import calibrate, fold_batchnorm

__all__ = [
    "FixedPoint", "IntegerLayer", "IntegerNetwork", "fixed_point", "integer_conv2d", "integer_linear",
    "integer_max_pool2d", "integer_network", "quantize_bias", "requantize",
]  # fmt: skip

INT32_MAX = 2**31 - 1
Pair = tuple[int, int]


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
    if not bool((torch.isfinite(real) & (real > 0) & (real < INT32_MAX)).all()):
        raise ValueError(f"factors must be above 0 and below 2^31, got {real.tolist()}")
    mantissa, exponent = torch.frexp(real)
    multiplier = (mantissa * 2**31).round().to(torch.int64)
    full = multiplier == 2**31  # rounded up, one bit too long
    multiplier = torch.where(full, 2**30, multiplier)
    exponent = exponent.to(torch.int64) + full
    # Beyond 62 places any product of 62 bits is rounded to 0 or to one step.
    return FixedPoint(multiplier, (31 - exponent).clamp(max=62))


def requantize(accumulator: Tensor, factor: FixedPoint, q: QuantParams) -> Tensor:
    """int32 sums → integers on the grid ``q``: multiply, shift with rounding (half up), add the zero point, clip.

    ``accumulator`` has any shape that broadcasts with ``factor``, which is s_x s_w / s_y; ``q`` has one scale in all.
    """
    if accumulator.is_floating_point() or accumulator.is_complex():
        raise TypeError(f"accumulator must hold integers, got {accumulator.dtype}")
    half = torch.ones_like(factor.shift) << factor.shift >> 1
    shifted = (accumulator.to(torch.int64) * factor.multiplier + half) >> factor.shift
    return (shifted + q.zero_point).clamp(q.qmin, q.qmax).to(q.dtype)


def centred(xq: Tensor, q: QuantParams, name: str) -> Tensor:
    """``xq - zero_point`` in int32."""
    return (check_integers(xq, name, q) - q.shaped_for(xq)[1]).to(torch.int32)


def quantize_bias(bias: Tensor, x_q: QuantParams, w_q: QuantParams) -> Tensor:
    """A bias [O] on the accumulator's own grid, step s_x s_w: int32 [O]; ValueError if int32 cannot hold it."""
    step = x_q.scale.double() * w_q.scale.double()
    steps = (check_real(bias, "bias", empty=True).double() / step).round()
    if bool((steps.abs() > INT32_MAX).any()):
        most = f"{steps.abs().max().item():.3g} steps of the accumulator"
        raise ValueError(f"a bias is {most}, more than int32 holds: too small a scale")
    return steps.to(torch.int32)


def check_layer(x: Tensor, x_q: QuantParams, w: Tensor, w_q: QuantParams, bias: Tensor | None, y_q: QuantParams):
    """Refuse grids and shapes that do not fit, and sums that an int32 accumulator could not hold in the worst case."""
    axes, groups = zip(*((q.axis, q.group) for q in (x_q, w_q, y_q)), strict=True)
    if (axes[0], axes[2]) != (None, None) or axes[1] not in (None, 0) or any(groups):
        need = "inputs and outputs need one scale, weights one or one an output channel (axis 0)"
        raise ValueError(f"{need}; got for input, weight, output the axes {axes} and groups {groups}")
    if x.dim() != w.dim() or x.shape[1] != w.shape[1]:
        need = "inputs [N, I] and weights [O, I]" if w.dim() == 2 else "inputs [N, C, H, W] and weights [O, C, kh, kw]"
        raise ValueError(f"{need} are needed, got {tuple(x.shape)} and {tuple(w.shape)}")
    reach = [max(q.qmax - int(q.zero_point.min()), int(q.zero_point.max()) - q.qmin) for q in (x_q, w_q)]
    terms = w[0].numel()
    worst = terms * reach[0] * reach[1] + (int(bias.abs().max()) if bias is not None and bias.numel() else 0)
    if worst > INT32_MAX:
        sums = f"a sum of {terms} products of up to {reach[0]} × {reach[1]}, bias included,"
        raise ValueError(f"{sums} can reach {worst}: more than int32 holds ({INT32_MAX})")


def integer_linear(
    xq: Tensor, x_q: QuantParams, wq: Tensor, w_q: QuantParams, bias: Tensor | None, y_q: QuantParams
) -> Tensor:
    """A linear layer on integers: inputs [N, I], weights [O, I], bias int32 [O] or ``None`` → [N, O] in ``y_q.dtype``.

    Within one step of quantizing the layer computed on the dequantized numbers. ``x_q`` and ``y_q`` have one scale,
    ``w_q`` one or one a row (axis 0). TypeError: floats. ValueError: shapes that do not fit, sums beyond int32.
    """
    check_layer(xq, x_q, wq, w_q, bias, y_q)
    accumulator = centred(xq, x_q, "xq") @ centred(wq, w_q, "wq").T
    return rescaled(accumulator, x_q, w_q, bias, y_q)


def rescaled(total: Tensor, x_q: QuantParams, w_q: QuantParams, bias: Tensor | None, y_q: QuantParams) -> Tensor:
    """Sums [..., O] and their bias in steps of s_x s_w → integers in steps of s_y."""
    factor = fixed_point(x_q.scale.double() * w_q.scale.double() / y_q.scale.double())
    return requantize(total if bias is None else total + bias, factor, y_q)


def windows(xq: Tensor, size: Pair, stride: Pair, padding: Pair, fill: int) -> Tensor:
    """All windows of a feature map [N, C, H, W], the border filled with ``fill``: [N, C, H', W', kh, kw]."""
    padded = nn.functional.pad(xq, (padding[1], padding[1], padding[0], padding[0]), value=fill)
    if padded.shape[2] < size[0] or padded.shape[3] < size[1]:
        raise ValueError(f"a window of {size} does not fit into {tuple(padded.shape[2:])} padded pixels")
    return padded.unfold(2, size[0], stride[0]).unfold(3, size[1], stride[1])


def integer_conv2d(
    xq: Tensor, x_q: QuantParams, wq: Tensor, w_q: QuantParams, bias: Tensor | None, y_q: QuantParams,
    *, stride: Pair = (1, 1), padding: Pair = (0, 0),
) -> Tensor:  # fmt: skip
    """A convolution on integers: inputs [N, C, H, W], weights [O, C, kh, kw] → [N, O, H', W'].

    The border is padded with the input's zero point, the integer that stands for 0.0. Otherwise as
    :func:`integer_linear`: each window is one of its inputs.
    """
    check_layer(xq, x_q, wq, w_q, bias, y_q)
    # After the zero point is taken off, the border's integer is 0.
    patches = windows(centred(xq, x_q, "xq"), tuple(wq.shape[2:]), stride, padding, 0)
    columns = patches.permute(0, 2, 3, 1, 4, 5).flatten(3)  # [N, H', W', C · kh · kw]
    accumulator = columns @ centred(wq, w_q, "wq").flatten(1).T
    return rescaled(accumulator, x_q, w_q, bias, y_q).movedim(3, 1).contiguous()


def integer_max_pool2d(xq: Tensor, size: Pair, stride: Pair, padding: Pair = (0, 0)) -> Tensor:
    """Max-pooling of integers [N, C, H, W]: order is all it needs, so the grid stays as it is."""
    return windows(xq, size, stride, padding, torch.iinfo(xq.dtype).min).amax(dim=(-1, -2))


@dataclass(frozen=True, eq=False)
class IntegerLayer:
    """A layer in integers: int8 ``weight`` [O, I] or [O, C, kh, kw], int32 ``bias`` [O], and the grids of input,
    weight and output; ``relu`` clips the output at 0.0.
    """

    x_q: QuantParams
    w_q: QuantParams
    y_q: QuantParams
    weight: Tensor
    bias: Tensor
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    relu: bool = False

    def __call__(self, xq: Tensor) -> Tensor:
        grids = (xq, self.x_q, self.weight, self.w_q, self.bias, self.y_q)
        linear = self.weight.dim() == 2
        yq = integer_linear(*grids) if linear else integer_conv2d(*grids, stride=self.stride, padding=self.padding)
        return yq.clamp(min=int(self.y_q.zero_point)) if self.relu else yq


def integer_layer(
    layer: nn.Linear | nn.Conv2d, x_q: QuantParams, y_q: QuantParams, *, relu: bool, per_channel: bool
) -> IntegerLayer:
    """An 8-bit layer from a float one, which may have no groups or dilation."""
    sizes = {}
    if isinstance(layer, nn.Conv2d):
        if layer.groups != 1 or set(layer.dilation) != {1}:
            raise UnsupportedModel(f"{layer} is not supported: groups=1, dilation=1 are needed")
        sizes = {"stride": tuple(layer.stride), "padding": tuple(layer.padding)}
    bias = layer.bias.detach() if layer.bias is not None else torch.zeros(len(layer.weight))
    w_q = room_for_bias(layer.weight.detach(), bias, x_q, per_channel)
    return IntegerLayer(x_q, w_q, y_q, quantize(layer.weight, w_q), quantize_bias(bias, x_q, w_q), relu=relu, **sizes)


def room_for_bias(weight: Tensor, bias: Tensor, x_q: QuantParams, per_channel: bool) -> QuantParams:
    """The 8-bit grid of a weight, coarser where int32 could not hold the bias, finer where the bias is all there is."""
    w_q = choose_qparams(weight, 8, axis=0 if per_channel else None)
    rows = (weight if per_channel else weight.reshape(1, -1)).flatten(1)
    largest = check_real(bias, "bias").abs() if per_channel else bias.abs().amax()
    least = (largest.double() / x_q.scale.double() / 2**28).float()
    dead = (rows == 0).all(dim=1).view_as(w_q.scale) & (least > 0)
    scale = safe_scale(torch.where(dead, least, torch.maximum(w_q.scale, least)), 1)
    return QuantParams(scale, w_q.zero_point, w_q.qmin, w_q.qmax, w_q.axis)


@dataclass(frozen=True, eq=False)
class IntegerNetwork:
    """Steps from integers to integers; call it on float images [N, ...] to get float logits [N, K].

    ``steps`` are (name, step) pairs: :class:`IntegerLayer`, or max-pooling, clipping at 0.0 or flattening; ``x_q`` and
    ``y_q`` are the grids of the images and of the logits.
    """

    steps: tuple[tuple[str, Callable[[Tensor], Tensor]], ...]
    x_q: QuantParams
    y_q: QuantParams

    def scores(self, images: Tensor) -> Tensor:
        """The integers of the logits [N, K], on the grid ``y_q``."""
        xq = quantize(images, self.x_q)
        for _, step in self.steps:
            xq = step(xq)
        return xq

    def __call__(self, images: Tensor) -> Tensor:
        return dequantize(self.scores(images), self.y_q)


def output_shape(network: Callable[[Tensor], Tensor], input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the answer to one image; ValueError if the network does not take images of ``input_shape``."""
    try:
        with torch.no_grad():
            return tuple(network(torch.zeros(2, *input_shape)).shape[1:])
    except (IndexError, RuntimeError, ValueError) as error:
        raise ValueError(f"the network does not take images of shape {tuple(input_shape)}: {error}") from error


def float_steps(model: nn.Sequential) -> list[tuple[str, nn.Module]]:
    """What a chain does to an image when it is deployed: BatchNorm folded, Dropout and Identity left out, in float32.

    UnsupportedModel: names a step that is no linear, convolution, ReLU, max-pooling or flatten layer, or a convolution
    with padding other than zeros in numbers.
    """
    nothing = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)
    steps = [(n, m) for n, m in fold_batchnorm(model).float()._modules.items() if not isinstance(m, nothing)]
    for name, module in steps:
        flat = type(module) is not nn.Flatten or (module.start_dim, module.end_dim) == (1, -1)
        if not flat or type(module) not in (nn.Linear, nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Flatten):
            known = "linear, convolution, BatchNorm, ReLU, max-pooling, flatten and dropout layers have one"
            raise UnsupportedModel(f"{name!r} ({module}) has no counterpart here: {known}")
        if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
            raise UnsupportedModel(f"{name!r} ({module}) is not supported: zero padding in numbers is needed")
    if not any(isinstance(module, (nn.Linear, nn.Conv2d)) for _, module in steps):
        raise UnsupportedModel("the model has no linear or convolution layer")
    return steps


def integer_network(
    model: nn.Sequential, calibration: Tensor, *, method: str = "minmax", per_channel: bool = True
) -> IntegerNetwork:
    """Post-training static quantization of a chain to 8 bits throughout: int8 weights, uint8 activations.

    ``model`` has linear, convolution, BatchNorm, ReLU, max-pooling, flatten and dropout layers and is not modified. The
    ranges are chosen on images ``calibration`` [N, ...] by a ``method`` of
    :func:`~course_lib.methods.quantized_layers.calibrate`; ``per_channel`` gives each output channel a weight scale.
    UnsupportedModel: another kind of layer, or one whose input has no batch in front. ValueError: NaN, no images.

    >>> net, images = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(100, 4)
    >>> bool((integer_network(net, images)(images) - net(images)).abs().max() < 0.1)
    True
    """
    x = check_real(calibration, "calibration").float().clone()
    chain, steps = float_steps(model), []
    grid = x_q = calibrate(x, method=method)
    for (name, module), (_, after) in zip(chain, [*chain[1:], ("", None)], strict=True):
        if x.dim() != {nn.Linear: 2, nn.Conv2d: 4, nn.MaxPool2d: 4}.get(type(module), x.dim()):
            raise UnsupportedModel(f"{name!r} ({module}) gets {tuple(x.shape)}; [N, I] or [N, C, H, W] is needed")
        with torch.no_grad():
            x = module(x)
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            relu = isinstance(after, nn.ReLU)
            with naming(name):
                out = calibrate(x.relu() if relu else x, method=method)
                step = integer_layer(module, grid, out, relu=relu, per_channel=per_channel)
            grid = out
        elif isinstance(module, nn.ReLU):
            step = partial(torch.clamp, min=int(grid.zero_point))
        elif isinstance(module, nn.MaxPool2d):
            step = partial(integer_max_pool2d, **pool_sizes(name, module))
        else:
            step = partial(torch.flatten, start_dim=1)
        if not (isinstance(module, nn.ReLU) and steps and getattr(steps[-1][1], "relu", False)):
            steps.append((name, step))  # the layer before a ReLU clips already
    return IntegerNetwork(tuple(steps), x_q, grid)


def pool_sizes(name: str, module: nn.MaxPool2d) -> dict[str, Pair]:
    """Window, stride and padding in pixels of an ``nn.MaxPool2d``, if it is of the plain kind."""
    if module.dilation not in (1, (1, 1), [1, 1]) or module.ceil_mode or module.return_indices:
        raise UnsupportedModel(f"{name!r} ({module}) has no counterpart here: dilation=1, ceil_mode=False are needed")
    sizes = {"size": module.kernel_size, "stride": module.stride, "padding": module.padding}
    return {key: (value, value) if isinstance(value, int) else tuple(value) for key, value in sizes.items()}
