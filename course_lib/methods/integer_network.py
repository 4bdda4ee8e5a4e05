"""A whole network in integers: BatchNorm folded, every layer in int8, no float between the input and the logits."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from course_lib.methods.integer import IntegerLayer, integer_layer, integer_max_pool2d
from course_lib.methods.quantization import QuantParams, check_real, dequantize, quantize
from course_lib.methods.ranges import calibrate

__all__ = ["IntegerNetwork", "Pool", "fold_batchnorm", "integer_network"]


def fold_batchnorm(model: nn.Sequential) -> nn.Sequential:
    """A copy of an ``nn.Sequential`` in which each BatchNorm is part of the linear or convolution layer before it.

    In eval mode BatchNorm is y = γ (x - μ) / √(σ² + ε) + β, a scale and a shift a channel, so it can be multiplied
    into the weight and added to the bias (Jacob et al. 2018, equation 14). The copy is in eval mode: with BatchNorm
    gone there is no other.

    Raises:
        ValueError: not a flat ``nn.Sequential``, or a BatchNorm that does not follow such a layer.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU())
    >>> [type(m).__name__ for m in fold_batchnorm(net)]
    ['Conv2d', 'ReLU']
    """
    if not isinstance(model, nn.Sequential):
        raise ValueError(f"a flat nn.Sequential is needed, got {type(model).__name__}")
    folded: list[tuple[str, nn.Module]] = []
    for name, module in model.named_children():
        if not isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            folded.append((name, copy.deepcopy(module)))
            continue
        before = folded[-1][1] if folded else None
        if not isinstance(before, (nn.Linear, nn.Conv2d)) or not module.track_running_stats:
            raise ValueError(f"{name} ({module}) does not follow a linear or convolution layer, or keeps no statistics")
        fold_into_(before, module)
    names = [name for name, _ in folded]
    new = nn.Sequential()
    for name, (_, module) in zip(names, folded, strict=True):
        new.add_module(name, module)
    return new.eval()


def fold_into_(layer: nn.Linear | nn.Conv2d, norm: nn.Module) -> None:
    """Multiply a BatchNorm into ``layer``, in float64 so that nothing is lost on the way."""
    with torch.no_grad():
        gain = (norm.running_var.double() + norm.eps).rsqrt()
        shift = -norm.running_mean.double() * gain
        if norm.affine:
            gain, shift = gain * norm.weight.double(), shift * norm.weight.double() + norm.bias.double()
        bias = 0 if layer.bias is None else layer.bias.double() * gain
        dtype = layer.weight.dtype
        layer.weight.copy_(layer.weight.double() * gain.reshape(-1, *[1] * (layer.weight.dim() - 1)))
        layer.bias = nn.Parameter((bias + shift).to(dtype))


@dataclass(frozen=True)
class Pool:
    """Max-pooling: window, stride and padding in pixels."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def __call__(self, xq: Tensor) -> Tensor:
        return integer_max_pool2d(xq, self.size, self.stride, self.padding)


def flatten(xq: Tensor) -> Tensor:
    """[N, ...] → [N, features]."""
    return xq.flatten(1)


@dataclass(frozen=True, eq=False)
class IntegerNetwork:
    """Steps from integers to integers; call it on float images [N, ...] to get float logits [N, K].

    Attributes:
        steps: (name, step) pairs; a step is an :class:`~course_lib.methods.integer.IntegerLayer`, a :class:`Pool` or
            :func:`flatten`.
        x_q, y_q: grids of the images and of the logits.
    """

    steps: tuple[tuple[str, Callable[[Tensor], Tensor]], ...]
    x_q: QuantParams
    y_q: QuantParams

    def __call__(self, images: Tensor) -> Tensor:
        xq = quantize(images, self.x_q)
        for _, step in self.steps:
            xq = step(xq)
        return dequantize(xq, self.y_q)


def integer_network(
    model: nn.Sequential, calibration: Tensor, *, method: str = "minmax", per_channel: bool = True
) -> IntegerNetwork:
    """Post-training static quantization of a flat ``nn.Sequential`` to 8 bits throughout.

    Args:
        model: linear, convolution, BatchNorm, ReLU, max-pooling, flatten and dropout layers; it is not modified.
        calibration: images [N, ...] on which the ranges of all activations are chosen.
        method: see :func:`~course_lib.methods.ranges.calibrate`.
        per_channel: one weight scale an output channel instead of one a layer.

    Raises:
        ValueError: another kind of layer (it is named), empty calibration data, NaN or infinite values.
    """
    check_real(calibration, "calibration")
    model = fold_batchnorm(model)
    grid = x_q = calibrate(calibration, method=method)
    steps: list[tuple[str, Callable[[Tensor], Tensor]]] = []
    x, children = calibration, list(model.named_children())
    with torch.no_grad():
        for i, (name, module) in enumerate(children):
            x = module(x)
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                relu = i + 1 < len(children) and isinstance(children[i + 1][1], nn.ReLU)
                out = calibrate(x.relu() if relu else x, method=method)
                steps.append((name, integer_layer(module, grid, out, relu=relu, per_channel=per_channel)))
                grid = out
            elif isinstance(module, nn.MaxPool2d):
                steps.append((name, pool_of(name, module)))
            elif isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1:
                steps.append((name, flatten))
            elif isinstance(module, nn.ReLU) and i and isinstance(children[i - 1][1], (nn.Linear, nn.Conv2d)):
                pass  # the layer before it clips already
            elif not isinstance(module, (nn.Dropout, nn.Identity)):
                raise ValueError(f"{name} ({module}) has no integer version here")
    if not any(isinstance(step, IntegerLayer) for _, step in steps):
        raise ValueError("the model has no linear or convolution layer")
    return IntegerNetwork(tuple(steps), x_q, grid)


def pool_of(name: str, module: nn.MaxPool2d) -> Pool:
    def pair(value) -> tuple[int, int]:
        return (value, value) if isinstance(value, int) else tuple(value)

    if pair(module.dilation) != (1, 1) or module.ceil_mode:
        raise ValueError(f"{name} ({module}) has no integer version here: dilation=1 and ceil_mode=False are needed")
    return Pool(pair(module.kernel_size), pair(module.stride), pair(module.padding))
