"""How far a quantized tensor is from the original: the article's biased grid, and signal-to-noise in decibels."""

import math

import torch
from torch import Tensor

from course_lib.methods.quantization import check_real

__all__ = ["floor_quantize", "signal_to_noise"]


def floor_quantize(w: Tensor, s: float) -> Tensor:
    """The article's formula Q(w) = ⌊w · s⌋ / s, with s grid points a unit (s above 0); biased by half a step.

    >>> floor_quantize(torch.tensor([-0.26, 0.04, 0.19]), 10).tolist()
    [-0.30000001192092896, 0.0, 0.10000000149011612]
    """
    check_real(w, "w", empty=True)
    if not (math.isfinite(s) and s > 0):
        raise ValueError(f"s must be a positive number of grid points a unit, got {s!r}")
    return torch.floor(w * s) / s


def signal_to_noise(x: Tensor, approximation: Tensor) -> float:
    """Signal-to-quantization-noise ratio in decibels: 10 · log10(Σx² / Σ(x - approximation)²); inf if they are equal.

    >>> round(signal_to_noise(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])), 2)
    20.0
    """
    x, approximation = check_real(x).double(), check_real(approximation, "approximation").double()
    if x.shape != approximation.shape:
        raise ValueError(f"shapes differ: {tuple(x.shape)} and {tuple(approximation.shape)}")
    noise = (x - approximation).square().sum().item()
    signal = x.square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
