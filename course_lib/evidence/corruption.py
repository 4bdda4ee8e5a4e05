"""Images made worse in measured steps: how much noise, blur or shift a network stands before and after compression.

Every kind takes a severity with a unit; 0 gives the images back bit for bit. One seed gives one draw: the noise of a
higher severity is the noise of a lower one, amplified, so that a curve over severities has no jitter of its own.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.evidence.exemplars import predict_labels

__all__ = ["CORRUPTIONS", "Corruption", "corrupt", "robustness_curve"]


@dataclass(frozen=True)
class Corruption:
    """A kind of damage: a sentence for a reader, what severity measures, its largest value, and how it is done.

    ``apply(images, severity, generator, low, high)`` gives new images; it is never called with severity 0.
    """

    description: str
    unit: str
    largest: float
    whole: bool
    apply: Callable[[Tensor, float, torch.Generator, Tensor, Tensor], Tensor]


def corrupt(
    images: Tensor, kind: str, severity: float, *, seed: int = 0, low: float | None = None, high: float | None = None
) -> Tensor:
    """A damaged copy of normalised images.

    Args:
        images: floating point ``[N, C, H, W]``, finite, on any device; N may be 0.
        kind: a name in :data:`CORRUPTIONS`:
            ``"noise"``, Gaussian, severity = its standard deviation in units of the normalised images (whose own is 1);
            ``"salt_and_pepper"``, severity = share of pixels, in [0, 1], set to ``low`` or ``high`` in all channels;
            ``"blur"``, Gaussian, severity = its standard deviation in pixels (edges are continued);
            ``"shift"``, severity = whole pixels, each image up, down, left or right; ``low`` moves in;
            ``"contrast"``, severity = share of contrast taken away, in [0, 1]; at 1 an image is its channels' means.
        severity: 0 is the identity, exactly.
        seed: of what is random. Image i's draw depends on the seed, its position and the images' shape; severities of
            one seed share it.
        low, high: black and white in units of the images; by default the smallest and the largest value of each
            channel among the images given.

    Returns:
        A new tensor of the same shape, dtype and device.

    Raises:
        TypeError: images not floating point. ValueError: not ``[N, C, H, W]``, NaN or infinity, an unknown kind, a
            severity that is negative, not finite, too large or (shift) not whole.

    Source: after Hendrycks & Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions".

    >>> image = torch.tensor([[[[0.0, 1.0], [2.0, 5.0]]]])
    >>> corrupt(image, "contrast", 0.5)
    tensor([[[[1.0000, 1.5000],
              [2.0000, 3.5000]]]])
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        given = f"dtype {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a floating-point tensor [N, C, H, W], got {given}")
    if images.dim() != 4 or 0 in images.shape[1:]:
        raise ValueError(f"images must have shape [N, C, H, W], got {tuple(images.shape)}")
    if not torch.isfinite(images).all():
        raise ValueError(f"images must be finite, got {int((~torch.isfinite(images)).sum())} NaN or infinite values")
    if kind not in CORRUPTIONS:
        raise ValueError(f"kind must be one of {', '.join(CORRUPTIONS)}; got {kind!r}")
    how = CORRUPTIONS[kind]
    number = isinstance(severity, (int, float)) and not isinstance(severity, bool) and math.isfinite(severity)
    if not number or not 0 <= severity <= how.largest or (how.whole and severity != int(severity)):
        raise ValueError(f"severity of {kind} is the {how.unit}, from 0 to {how.largest:g}; got {severity!r}")
    if severity == 0 or len(images) == 0:
        return images.detach().clone()
    x = images.detach()
    dark = x.amin(dim=(0, 2, 3)) if low is None else x.new_full((x.shape[1],), low)
    light = x.amax(dim=(0, 2, 3)) if high is None else x.new_full((x.shape[1],), high)
    # Drawn on the processor, so that every device gets the same damage.
    generator = torch.Generator().manual_seed(seed)
    return how.apply(x, severity, generator, dark.reshape(1, -1, 1, 1), light.reshape(1, -1, 1, 1)).to(x.dtype)


def robustness_curve(
    models: nn.Module | Sequence[nn.Module],
    images: Tensor,
    labels: Tensor,
    kind: str,
    severities: Sequence[float],
    *,
    seed: int = 0,
) -> Tensor:
    """Accuracy of each replica at each severity; every replica and severity meets the same draw of the damage.

    Args:
        models: one, or a sequence of R. images ``[N, C, H, W]``; labels int64 ``[N]``.
        kind, seed: see :func:`corrupt`. severities: S of them.

    Returns:
        float64 ``[R, S]`` in [0, 1], as :func:`course_lib.evidence.plots.band` takes it.

    Raises:
        ValueError: labels that do not fit the images, no severity, and what :func:`corrupt` refuses.

    >>> eye = lambda x: x.flatten(1)
    >>> pictures = torch.eye(2).reshape(2, 1, 1, 2)
    >>> robustness_curve(eye, pictures, torch.tensor([0, 1]), "contrast", [0, 0.5, 1]).tolist()
    [[1.0, 1.0, 0.5]]
    """
    if len(severities) == 0:
        raise ValueError("severities must hold at least one number, got none")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels must have shape ({len(images)},) to fit the images, got {tuple(labels.shape)}")
    columns = [predict_labels(models, corrupt(images, kind, severity, seed=seed)) == labels for severity in severities]
    return torch.stack([column.double().mean(dim=1) for column in columns], dim=1)


def _noise(x: Tensor, severity: float, generator: torch.Generator, low: Tensor, high: Tensor) -> Tensor:
    return x + severity * torch.randn(x.shape, generator=generator).to(x)


def _salt_and_pepper(x: Tensor, severity: float, generator: torch.Generator, low: Tensor, high: Tensor) -> Tensor:
    shape = (len(x), 1, *x.shape[2:])
    hit = (torch.rand(shape, generator=generator, dtype=torch.float64) < severity).to(x.device)
    salt = (torch.rand(shape, generator=generator) < 0.5).to(x.device)
    return torch.where(hit, torch.where(salt, high, low), x)


def _blur(x: Tensor, severity: float, generator: torch.Generator, low: Tensor, high: Tensor) -> Tensor:
    reach = max(1, math.ceil(3 * severity))
    steps = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (steps / severity) ** 2)
    kernel = (kernel / kernel.sum()).to(x).reshape(1, 1, -1)
    for dim in (2, 3):
        moved = x.movedim(dim, -1)
        lines = F.pad(moved.reshape(-1, 1, moved.shape[-1]), (reach, reach), mode="replicate")
        x = F.conv1d(lines, kernel).reshape(moved.shape).movedim(-1, dim)
    return x


def _shift(x: Tensor, severity: float, generator: torch.Generator, low: Tensor, high: Tensor) -> Tensor:
    step, (height, width) = int(severity), x.shape[2:]
    towards = torch.randint(4, (len(x),), generator=generator)
    moved = low.expand(x.shape).clone()
    if step < height:
        moved[towards == 0, :, step:] = x[towards == 0, :, : height - step]
        moved[towards == 1, :, : height - step] = x[towards == 1, :, step:]
    if step < width:
        moved[towards == 2, :, :, step:] = x[towards == 2, :, :, : width - step]
        moved[towards == 3, :, :, : width - step] = x[towards == 3, :, :, step:]
    return moved


def _contrast(x: Tensor, severity: float, generator: torch.Generator, low: Tensor, high: Tensor) -> Tensor:
    mean = x.mean(dim=(2, 3), keepdim=True)
    return mean + (1 - severity) * (x - mean)


CORRUPTIONS: dict[str, Corruption] = {
    "noise": Corruption("Gaussian noise on every pixel", "standard deviation", math.inf, False, _noise),
    "salt_and_pepper": Corruption("pixels turned black or white", "share of pixels", 1.0, False, _salt_and_pepper),
    "blur": Corruption("Gaussian blur", "standard deviation in pixels", 100.0, False, _blur),
    "shift": Corruption("moved up, down, left or right", "whole number of pixels", math.inf, True, _shift),
    "contrast": Corruption("contrast taken away", "share of contrast", 1.0, False, _contrast),
}
"""Kinds of damage by name; add one of your own under a name of its own."""
