"""Calibration: which range of an activation the integers should cover, learnt from examples.

Weights are known when a network is quantized; activations are not, so they are recorded on calibration data. Min-max
keeps every value and lets one outlier set the step; a percentile gives up the rarest values; the search for the
smallest mean squared error weighs the two kinds of error, rounding and clipping, against each other (TensorRT's
calibrators, Migacz 2017; compared by Krishnamoorthi 2018 and Nagel et al. 2021, "A White Paper on Neural Network
Quantization").
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from course_lib.methods.quantization import (
    QuantParams,
    check_bits,
    check_real,
    integer_range,
    qparams_from_range,
    straight_through,
)

__all__ = ["METHODS", "calibrate", "record_inputs"]

METHODS = ("minmax", "percentile", "mse")

# The search looks at no more values than this: an even sample of them gives the same range to a percent.
MOST_SAMPLES = 1 << 15


def calibrate(
    samples: Tensor | Iterable[Tensor],
    bits: int = 8,
    *,
    method: str = "minmax",
    symmetric: bool = False,
    percentile: float = 99.9,
    candidates: int = 64,
) -> QuantParams:
    """One grid for an activation, from recorded values.

    Args:
        samples: finite floating-point values of any shape, as one tensor or several.
        bits: width from 2 to 8.
        method: ``"minmax"``; ``"percentile"``: the central ``percentile`` per cent of the values; ``"mse"``: of
            ``candidates`` ranges, shrunk evenly from min-max towards 0, the one with the least mean squared error.
        symmetric: see :func:`~course_lib.methods.quantization.choose_qparams`.
        percentile: share to keep, above 0 and at most 100.
        candidates: how many ranges the search tries, at least 2.

    Raises:
        ValueError: no samples, NaN or infinite values, an unknown method, bits or percentile out of range.

    >>> x = torch.cat([torch.linspace(0, 1, 999), torch.tensor([8.0])])
    >>> [round(calibrate(x, bits=4, method=m).scale.item(), 3) for m in METHODS]
    [0.533, 0.067, 0.425]
    """
    bits = check_bits(bits)
    if method not in METHODS:
        raise ValueError(f"unknown calibration method {method!r} (there are: {', '.join(METHODS)})")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must be above 0 and at most 100, got {percentile!r}")
    if not isinstance(candidates, int) or candidates < 2:
        raise ValueError(f"candidates must be an integer of at least 2, got {candidates!r}")
    if not isinstance(samples, Iterable):
        raise TypeError(f"samples must be a tensor or several, got {type(samples).__name__}")
    tensors = [samples] if isinstance(samples, Tensor) else list(samples)
    if not tensors or all(isinstance(t, Tensor) and t.numel() == 0 for t in tensors):
        raise ValueError("calibration is empty: it needs at least one recorded value")
    x = torch.cat([check_real(t, "samples", empty=True).reshape(-1).float() for t in tensors])
    low, high = x.aminmax()
    if method == "percentile":
        low, high = percentile_range(x, percentile)
    elif method == "mse":
        low, high = least_error_range(x, low, high, bits, symmetric, candidates)
    return qparams_from_range(low, high, bits, symmetric=symmetric)


def percentile_range(x: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value left when equally many are dropped at both ends."""
    dropped = math.ceil(x.numel() * (100 - percentile) / 200 - 1e-6)
    dropped = min(dropped, (x.numel() - 1) // 2)
    ordered = x.sort().values
    return ordered[dropped], ordered[x.numel() - 1 - dropped]


def least_error_range(
    x: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool, candidates: int
) -> tuple[Tensor, Tensor]:
    """Of ``candidates`` shares of [low, high], the one whose grid has the least mean squared error on ``x``."""
    # The largest values decide where clipping starts to hurt, so an even sample is taken from the sorted ones.
    stride = -(-x.numel() // MOST_SAMPLES)
    sample = x.sort().values.flip(0)[::stride]
    qmin, qmax = integer_range(bits, symmetric=symmetric)
    best = None
    for share in torch.linspace(1.0, 1.0 / candidates, candidates):
        q = qparams_from_range(low * share, high * share, bits, symmetric=symmetric)
        error = (straight_through(sample, q.scale, q.zero_point, qmin, qmax) - sample).square().mean()
        if best is None or error < best[0]:
            best = (error, low * share, high * share)
    return best[1], best[2]


def record_inputs(model: nn.Module, images: Tensor, *, batch_size: int = 512) -> dict[str, Tensor]:
    """What reaches each linear and convolution layer when ``model`` looks at ``images``, in eval mode, by layer name.

    Args:
        model: any module with ``nn.Linear`` or ``nn.Conv2d`` layers; left as it was.
        images: batch ``[N, ...]``, not empty.

    Returns:
        ``{layer name: inputs [N, ...]}``; a layer that is used twice has its inputs joined along the first dimension.
    """
    check_real(images, "images")
    recorded: dict[str, list[Tensor]] = {}

    def listen(name: str):
        return lambda module, args: recorded.setdefault(name, []).append(args[0].detach())

    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear or convolution layer to record")
    hooks = [layer.register_forward_pre_hook(listen(name)) for name, layer in layers.items()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            for batch in images.split(batch_size):
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    return {name: torch.cat(parts) for name, parts in recorded.items()}
