"""Rounding that looks at the inputs: where a few channels are far larger than the rest, they decide.

One idea three times. A factor s > 0 for each input channel changes nothing before rounding: ``W x = (W s) (x / s)``.
SmoothQuant (Xiao et al. 2023) takes from the loud channels of x and gives to the weights; AWQ (Lin et al. 2024) makes
the weights that meet loud channels larger, so that rounding harms them less; Wanda (Sun et al. 2024) ranks weights by
the same product, see :func:`~course_lib.methods.pruning.wanda_score`.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from course_lib.gate import eval_mode, input_hooks, real_tensor, share_of
from course_lib.methods.quantization import choose_qparams, fake_quantize, integer_range

__all__ = ["Inputs", "awq_scales", "linear_layers", "round_scaled", "rounded_inputs", "smooth_scales", "watch_inputs"]

SMALLEST = 1e-5  # a channel that is never used gets no infinite factor


@dataclass(frozen=True, eq=False)
class Inputs:
    """What went into a linear layer, a number for each channel [in]: largest and mean magnitude, and norm."""

    peak: Tensor
    mean: Tensor
    norm: Tensor


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every ``nn.Linear`` of a model by its name.

    >>> list(linear_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))))
    ['0', '2']
    """
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


@torch.no_grad()
def watch_inputs(model: nn.Module, batch: Tensor) -> dict[str, Inputs]:
    """Run ``batch`` through the model, and return what each linear layer that took part was given.

    >>> found = watch_inputs(nn.Sequential(nn.Linear(2, 1)), torch.tensor([[3.0, 1.0], [-4.0, 0.0]]))["0"]
    >>> found.peak.tolist(), found.mean.tolist(), found.norm.tolist()
    ([4.0, 1.0], [3.5, 0.5], [5.0, 1.0])
    """
    seen: dict[str, list[Tensor]] = {}

    def look(name: str, x: Tensor) -> None:
        seen.setdefault(name, []).append(x.flatten(0, -2).abs().float())

    with eval_mode(model), input_hooks(linear_layers(model), look):
        model(batch)
    sizes = {name: torch.cat(calls) for name, calls in seen.items()}
    return {name: Inputs(size.amax(0), size.mean(0), size.norm(dim=0)) for name, size in sizes.items()}


def smooth_scales(peak: Tensor, weight: Tensor, alpha: float = 0.5) -> Tensor:
    """SmoothQuant's factors [in]: ``max|x|^α / max|w|^(1 − α)``, of a layer's inputs and its weight ``[out, in]``.

    At α = 1 all channels of x / s are equally loud, and the weights bear it all; at 0 it is the other way round.

    >>> smooth_scales(torch.tensor([16.0, 1.0]), torch.tensor([[1.0, -1.0]]), 0.5)
    tensor([4., 1.])
    """
    _, alpha = _fits(peak, weight), _strength(alpha)
    return peak.clamp(min=SMALLEST) ** alpha / weight.abs().amax(dim=0).clamp(min=SMALLEST) ** (1 - alpha)


def awq_scales(mean: Tensor, alpha: float = 0.5) -> Tensor:
    """AWQ's factors [in]: ``mean|x|^α``, then divided so that the largest and the smallest have product 1.

    >>> awq_scales(torch.tensor([16.0, 1.0, 4.0]), 0.5)
    tensor([2.0000, 0.5000, 1.0000])
    """
    scales = real_tensor(mean, "mean").clamp(min=SMALLEST) ** _strength(alpha)
    return scales / (scales.max() * scales.min()).sqrt()


def round_scaled(weight: Tensor, scales: Tensor, bits: int, *, group: int | None = None) -> Tensor:
    """A weight ``[out, in]`` rounded after its columns were multiplied by ``scales`` [in], and divided by them again.

    With a step a ``group`` of columns, else a row.

    >>> round_scaled(torch.tensor([[7.0, 0.4]]), torch.tensor([1.0, 8.0]), 4)
    tensor([[7.0000, 0.3750]])
    """
    scaled = weight * _fits(scales, weight)
    return fake_quantize(scaled, choose_qparams(scaled, bits, group=group, axis=None if group else 0)) / scales


def rounded_inputs(
    model: nn.Module, peaks: Mapping[str, Tensor] | None, bits: int = 8, *,
    scales: Mapping[str, Tensor] | None = None, keep: Mapping[str, Tensor] | None = None,
) -> AbstractContextManager:  # fmt: skip
    """Within it, every linear layer's input is rounded: ``x`` becomes ``round(x / s) · s``.

    Args:
        peaks: largest magnitude of each channel [in] by the layer's name, found on other data: the layer has one step,
            made for the largest of ``peaks / s``, and what is larger is clipped. ``None``: a step a token, from itself.
        scales: s of each layer [in]; 1 where none is given.
        keep: bool [in], ``True`` for channels that stay as they are, with a step that is made without them.
    """
    low, high = integer_range(bits, symmetric=True)

    def rounded(name: str, x: Tensor) -> Tensor:
        scale = 1.0 if scales is None else scales[name]
        kept = torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device) if keep is None else keep[name]
        size = x.abs() if peaks is None else peaks[name]
        step = (size / scale).masked_fill(kept, 0.0).amax(dim=-1, keepdim=True).clamp(min=SMALLEST) / high
        marks = torch.round(x / scale / step).clamp(low, high)
        return torch.where(kept, x, marks * step * scale)

    return input_hooks(linear_layers(model), rounded)


def _strength(alpha: float) -> float:
    return alpha if alpha == 1 else share_of(alpha, "alpha")


def _fits(numbers: Tensor, weight: Tensor) -> Tensor:
    if numbers.shape != weight.shape[1:] or weight.dim() != 2:
        raise ValueError(f"a weight [out, in] takes numbers [in]; got {tuple(weight.shape)} and {tuple(numbers.shape)}")
    return real_tensor(numbers, "numbers")
