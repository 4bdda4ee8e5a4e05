"""The networks of the course: small, plain, and built from a name, an input shape and a number of classes."""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from itertools import pairwise

import torch
from torch import nn

__all__ = ["MODELS", "build_model"]

Build = Callable[[tuple[int, int, int], int], nn.Module]  # of an input shape and a number of classes


def _chain(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _mlp(*hidden: int) -> Build:
    def build(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        widths, layers = [math.prod(input_shape), *hidden], {"flatten": nn.Flatten()}
        for i, (inputs, outputs) in enumerate(pairwise(widths), 1):
            layers |= {f"fc{i}": nn.Linear(inputs, outputs), f"relu{i}": nn.ReLU()}
        return _chain(**layers, logits=nn.Linear(widths[-1], num_classes))

    return build


def _lenet5(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    channels, height, width = input_shape
    # Two unpadded 5×5 convolutions leave nothing of an 8×8 digit; padded ones keep the network's shape on small images.
    padding = 0 if min(height, width) >= 16 else 2
    shrink = 4 - 2 * padding
    after = [((side - shrink) // 2 - shrink) // 2 for side in (height, width)]
    return _chain(
        conv1=nn.Conv2d(channels, 20, 5, padding=padding), relu1=nn.ReLU(), pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(20, 50, 5, padding=padding), relu2=nn.ReLU(), pool2=nn.MaxPool2d(2), flatten=nn.Flatten(),
        fc1=nn.Linear(50 * after[0] * after[1], 500), relu3=nn.ReLU(), logits=nn.Linear(500, num_classes),
    )  # fmt: skip


def _cnn_teacher(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    channels, height, width = input_shape

    def block(i: int, inside: int, outside: int) -> dict[str, nn.Module]:
        # BatchNorm brings its own shift, which makes the convolution's bias redundant.
        conv = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
        return {f"conv{i}": conv, f"bn{i}": nn.BatchNorm2d(outside), f"relu{i}": nn.ReLU()}

    return _chain(
        **block(1, channels, 32), **block(2, 32, 64), pool2=nn.MaxPool2d(2), **block(3, 64, 64), pool3=nn.MaxPool2d(2),
        flatten=nn.Flatten(), fc1=nn.Linear(64 * (height // 4) * (width // 4), 128), relu4=nn.ReLU(),
        logits=nn.Linear(128, num_classes),
    )  # fmt: skip


def _cnn_student(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    channels, height, width = input_shape
    return _chain(
        conv1=nn.Conv2d(channels, 8, 3, padding=1), relu1=nn.ReLU(), pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(8, 16, 3, padding=1), relu2=nn.ReLU(), pool2=nn.MaxPool2d(2), flatten=nn.Flatten(),
        logits=nn.Linear(16 * (height // 4) * (width // 4), num_classes),
    )  # fmt: skip


MODELS: Mapping[str, Build] = {
    "lenet300": _mlp(300, 100),  # the MLP of Deep Compression (LeCun et al. 1998; Han et al. 2016)
    "lenet5": _lenet5,  # in its 20-50-500 form
    "cnn_teacher": _cnn_teacher,
    "cnn_student": _cnn_student,
    **{f"mlp{width}": _mlp(width) for width in (8, 32, 128, 1024)},  # one hidden layer
}
"""Every name that :func:`build_model` knows."""


def build_model(
    name: str, input_shape: tuple[int, int, int], num_classes: int, *, seed: int | None = None
) -> nn.Module:
    """An untrained network in training mode: images [N, C, H, W] float32 → logits [N, num_classes].

    ``name`` is one of :data:`MODELS`, ``input_shape`` (C, H, W) of one image, and ``num_classes`` at least 2; else it
    is a ValueError. ``seed`` makes the initial weights a function of the seed and leaves torch's global generator as it
    was; ``None`` draws from that.

    >>> model = build_model("lenet300", (1, 28, 28), 10, seed=0)
    >>> sum(p.numel() for p in model.parameters())
    266610
    """
    if name not in MODELS:
        close = get_close_matches(str(name), MODELS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown model {name!r}{hint} (there are: {', '.join(MODELS)})")
    shape = tuple(int(n) if hasattr(n, "__index__") else n for n in input_shape)
    if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"input_shape must be three positive integers (channels, height, width), got {input_shape!r}")
    if not hasattr(num_classes, "__index__") or isinstance(num_classes, bool) or num_classes < 2:
        raise ValueError(f"num_classes must be an integer of at least 2, got {num_classes!r}")
    if min(shape[1:]) < 4 and not name.startswith(("mlp", "lenet300")):
        raise ValueError(f"{name} needs images of at least 4×4 pixels, got input_shape={input_shape}")
    if seed is None:
        return MODELS[name](shape, num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))
        return MODELS[name](shape, num_classes)
