"""Four and eight bits a weight, as they are stored today: a table of levels, a code a weight, a scale a group.

int4 with a scale a group (as GPTQ, AWQ and ONNX Runtime store it), NF4 (Dettmers et al. 2023, "QLoRA"), fp8 in the form
e4m3 (Micikevicius et al. 2022) and MXFP4 (Open Compute Project 2023). ``encode(weight, group)`` takes finite floats,
one scale for ``group`` consecutive numbers of the last dimension, which it has to divide (``None``: one in all), and
finds the level nearest to weight / scale. :attr:`Encoded.bits` counts the scales too.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from course_lib.methods.quantization import check_real, choose_qparams, safe_scale, slices, spread

__all__ = ["Encoded", "fp8_encode", "int4_encode", "mxfp4_encode", "nf4_encode"]


def nf4_levels() -> Tensor:
    """The 16 numbers of NF4: quantiles of the normal distribution, one more above 0 than below, scaled to [-1, 1]."""
    outermost = 0.9677083  # (1 - 1/30 + 1 - 1/32) / 2, in the paper's own digits: so the levels are its own to the bit
    below, above = (torch.special.ndtri(torch.linspace(outermost, 0.5, n).double()) for n in (8, 9))
    return torch.cat([-below, above[:-1].flip(0)]).float() / below[0].float()


LEVELS = {
    "int4": torch.tensor([*range(8), *range(-8, 0)]).float(),  # two's complement: code 15 stands for -1
    "nf4": nf4_levels(),
    "fp8": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float(),
    "mxfp4": torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]),
}
"""What a code stands for, before it is multiplied by its scale: 16 or 256 numbers a format (of fp8's two are NaN)."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """Encoded weights: ``codes``, uint8 in the weight's shape, are positions in the :data:`LEVELS` of the ``format``.

    ``scale`` is float32, [] or [..., n / group]; ``scale_bits`` is what one takes in a file.

    >>> [encode(torch.ones(8, 64)).bits for encode in (int4_encode, nf4_encode, fp8_encode, mxfp4_encode)]
    [4.5, 4.5, 8.0625, 4.25]
    """

    format: str
    codes: Tensor
    scale: Tensor
    group: int | None
    scale_bits: int

    def values(self) -> Tensor:
        """The weights, float32, that the codes stand for."""
        levels = LEVELS[self.format].to(self.codes.device)[self.codes.long()]
        return levels * spread(self.scale, levels.dim(), None, self.group)

    @property
    def bits(self) -> float:
        """True bits a weight: its code and its share of the scales."""
        code = int(math.log2(len(LEVELS[self.format])))
        return code + self.scale_bits * self.scale.numel() / self.codes.numel()


def largest_of_groups(weight: Tensor, group: int | None) -> Tensor:
    """The largest absolute value of each group."""
    return slices(check_real(weight, "weight"), None, group).abs().amax(dim=-1)


def scaled(weight: Tensor, scale: Tensor, group: int | None) -> Tensor:
    """Each weight over the scale of its group, float32."""
    return weight.detach().float() / spread(scale, weight.dim(), None, group)


def rounded_scale(scale: Tensor) -> Tensor:
    """A scale rounded to 16 bits, as it is stored; bfloat16 has float32's range, so it stays above 0 and finite."""
    return scale.bfloat16().float().clamp(max=torch.finfo(torch.bfloat16).max)


def int4_encode(weight: Tensor, group: int | None = 32) -> Encoded:
    """Evenly spaced: integers ±7 times a 16-bit scale.

    >>> int4_encode(torch.tensor([[7.0, 3.4, -1.0, 0.0]]), group=4).values().tolist()
    [[7.0, 3.0, -1.0, 0.0]]
    """
    scale = rounded_scale(choose_qparams(weight, 4, group=group).scale)
    marks = torch.round(scaled(weight, scale, group)).clamp(-7, 7)
    return Encoded("int4", (marks.to(torch.int8) & 0xF).to(torch.uint8), scale, group, 16)


def nf4_encode(weight: Tensor, group: int | None = 32) -> Encoded:
    """Spaced so that each of the 16 levels is used as often as the others if weights are normally distributed.

    >>> nf4_encode(torch.tensor([[2.0, 0.1, -2.0, 0.0]]), group=4).codes.tolist()
    [[15, 8, 0, 7]]
    """
    scale = rounded_scale(safe_scale(largest_of_groups(weight, group), 1))
    levels = LEVELS["nf4"].to(weight.device)
    halfway = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(scaled(weight, scale, group), halfway)
    return Encoded("nf4", codes.to(torch.uint8), scale, group, 16)


def fp8_encode(weight: Tensor, group: int | None = None) -> Encoded:
    """Floats of 8 bits, e4m3 (4 for the exponent, 3 behind the point, up to 448), times a 32-bit scale.

    >>> fp8_encode(torch.tensor([448.0, 0.3, -17.0])).values().tolist()
    [448.0, 0.3125, -16.0]
    """
    scale = safe_scale(largest_of_groups(weight, group), 448)
    rounded = scaled(weight, scale, group).clamp(-448, 448).to(torch.float8_e4m3fn)
    return Encoded("fp8", rounded.view(torch.uint8), scale, group, 32)


def mxfp4_encode(weight: Tensor, group: int = 32) -> Encoded:
    """Floats of 4 bits, e2m1, times a power of two, 8 bits: the largest in the block over 4, the largest of e2m1.

    >>> mxfp4_encode(torch.tensor([[7.0, 2.4, -0.3, 0.0]]), group=4).values().tolist()
    [[6.0, 2.0, -0.5, 0.0]]
    """
    power = torch.frexp(safe_scale(largest_of_groups(weight, group), 4)).exponent - 1
    scale = torch.exp2(power.clamp(-127, 127).float())
    numbers, levels = scaled(weight, scale, group), LEVELS["mxfp4"][:8].to(weight.device)
    halfway = (levels[1:] + levels[:-1]) / 2
    below, above = (torch.bucketize(numbers.abs(), halfway, right=right) for right in (False, True))
    magnitude = torch.where(below % 2 == 0, below, above)  # they differ halfway only: the even code is taken
    codes = magnitude + 8 * torch.signbit(numbers)
    return Encoded("mxfp4", codes.to(torch.uint8), scale, group, 8)
