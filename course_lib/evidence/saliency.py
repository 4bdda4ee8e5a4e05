"""Where does a network look? One map an image, by five methods; the controls that tell a map from an edge detector.

Each map explains one logit, that of the class given for the image. All are ``[N, H, W]`` float tensors, detached. A
model runs in eval mode and gets its mode back; weights, their gradients and the global random numbers stay untouched.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from course_lib.evidence.map_agreement import rank_correlation, top_k_chance, top_k_overlap
from course_lib.evidence.measure import _eval_mode

__all__ = [
    "MAPS",
    "completeness_gap",
    "gradient_input_map",
    "gradient_map",
    "integrated_gradient_map",
    "occlusion_map",
    "rank_correlation",
    "reset_layers",
    "smooth_gradient_map",
    "top_k_chance",
    "top_k_overlap",
]


def gradient_map(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """|∂ logit / ∂ pixel|: how fast the logit moves when a pixel does; the largest of the channels' values.

    Args:
        model: gives logits ``[N, K]``, in which no image sees another once in eval mode.
        images: floating point ``[N, C, H, W]``, N ≥ 1.
        target: int64 ``[N]``, the class to explain for each image, from 0 to K − 1.

    Returns:
        ``[N, H, W]``, at least 0, in logits per unit of the normalised image.

    Raises:
        TypeError: images not floating point, target not int64.
        ValueError: shapes that do not fit, a class out of range, an output that does not depend on the image by a
            gradient (:func:`occlusion_map` needs none).

    Source: Simonyan, Vedaldi & Zisserman 2014, "Deep Inside Convolutional Networks", section 3.1.

    >>> linear = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    >>> _ = linear[1].weight.data.copy_(torch.tensor([[1.0, -2.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0]]))
    >>> gradient_map(linear, torch.ones(1, 1, 2, 2), torch.tensor([0])).tolist()
    [[[1.0, 2.0], [0.0, 3.0]]]
    """
    with _ready(model, images, target):
        return _gradient(model, images, target).abs().amax(dim=1)


def gradient_input_map(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Gradient × input, added up over channels: signed, in logits. For a linear model, what each pixel contributes.

    Arguments and errors are those of :func:`gradient_map`. Note that "input" is the *normalised* image: a pixel at the
    data set's mean is 0 and contributes nothing.

    Source: Shrikumar et al. 2016, "Not Just a Black Box".

    >>> linear = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    >>> image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    >>> found = gradient_input_map(linear, image, torch.tensor([1])).sum()
    >>> torch.allclose(found, linear(image)[0, 1])
    True
    """
    with _ready(model, images, target):
        return (_gradient(model, images, target) * images.detach()).sum(dim=1)


def smooth_gradient_map(
    model: nn.Module, images: Tensor, target: Tensor, *, noise: float = 0.15, samples: int = 25, seed: int = 0
) -> Tensor:
    """SmoothGrad: the gradient's mean over noisy copies of the image, then magnitude and largest channel.

    Args:
        model, images, target: as for :func:`gradient_map`.
        noise: the noise's standard deviation as a share of each image's range (largest − smallest value), at least 0.
        samples: noisy copies, at least 1.
        seed: of the noise, drawn apart from the global random numbers.

    Returns:
        ``[N, H, W]``, at least 0.

    Raises:
        As :func:`gradient_map`; ValueError for noise below 0 or no sample.

    Source: Smilkov et al. 2017, "SmoothGrad: Removing Noise by Adding Noise" (noise of 10 to 20 %).
    """
    _check_count("samples", samples)
    if not noise >= 0:
        raise ValueError(f"noise must be a share of the image's range of at least 0, got {noise!r}")
    with _ready(model, images, target):
        x = images.detach()
        spread = noise * (x.amax(dim=(1, 2, 3), keepdim=True) - x.amin(dim=(1, 2, 3), keepdim=True))
        generator = torch.Generator().manual_seed(seed)
        total = torch.zeros_like(x)
        for _ in range(samples):
            total += _gradient(model, x + spread * torch.randn(x.shape, generator=generator).to(x), target)
        return (total / samples).abs().amax(dim=1)


def integrated_gradient_map(
    model: nn.Module, images: Tensor, target: Tensor, *, baseline: float | Tensor | None = None, steps: int = 32
) -> Tensor:
    """Integrated gradients: (image − baseline) × the mean gradient on the way between them, added up over channels.

    A map's sum is the logit of the image minus that of the baseline ("completeness"), up to the error of the midpoint
    rule over ``steps`` points: see :func:`completeness_gap`.

    Args:
        model, images, target: as for :func:`gradient_map`.
        baseline: what counts as nothing: a number, or a tensor that broadcasts to the images. By default black, the
            smallest value in ``images`` for each channel; pass it where maps of several batches are compared.
        steps: gradients along the way, at least 1.

    Returns:
        ``[N, H, W]``, signed, in logits.

    Raises:
        As :func:`gradient_map`; ValueError for a baseline that does not fit or no step.

    Source: Sundararajan, Taly & Yan 2017, "Axiomatic Attribution for Deep Networks".
    """
    _check_count("steps", steps)
    with _ready(model, images, target):
        x, start = images.detach(), _baseline(images, baseline)
        total = torch.zeros_like(x)
        for step in range(steps):
            total += _gradient(model, start + (step + 0.5) / steps * (x - start), target)
        return ((x - start) * total / steps).sum(dim=1)


def completeness_gap(
    model: nn.Module, images: Tensor, target: Tensor, maps: Tensor, *, baseline: float | Tensor | None = None
) -> Tensor:
    """|sum of the map − (logit of the image − logit of the baseline)| for each image, in logits: float64 ``[N]``.

    0 for integrated gradients with steps enough, if ``baseline`` is the one they were made with.
    """
    with _ready(model, images, target), torch.no_grad():
        start = _baseline(images, baseline)
        rows = torch.arange(len(images), device=images.device)
        change = (model(images) - model(start))[rows, target]
    return (maps.double().sum(dim=(1, 2)) - change.double()).abs()


def occlusion_map(
    model: nn.Module | Callable[[Tensor], Tensor],
    images: Tensor,
    target: Tensor,
    *,
    size: int = 2,
    stride: int = 1,
    baseline: float | Tensor | None = None,
) -> Tensor:
    """How far the logit falls when a square is covered: no gradient needed, so it works for any function.

    Args:
        model: a module, or any function from images to logits ``[N, K]`` (an int8 runtime, say).
        images, target: as for :func:`gradient_map`.
        size: side of the square in pixels, at most the image's. stride: from one square to the next, at most ``size``;
            the last square of a line always ends at the edge.
        baseline: what covers, as for :func:`integrated_gradient_map`.

    Returns:
        ``[N, H, W]``, signed, in logits: at each pixel the mean over the squares that covered it.

    Raises:
        TypeError, ValueError: as above; a size or stride that does not fit.

    Source: Zeiler & Fergus 2014, "Visualizing and Understanding Convolutional Networks", section 4.2.
    """
    _check_count("size", size)
    _check_count("stride", stride)
    with _ready(model, images, target), torch.no_grad():
        (height, width), rows = images.shape[2:], torch.arange(len(images), device=images.device)
        if size > min(height, width) or stride > size:
            raise ValueError(
                f"size must be at most the image's side, {min(height, width)}, and stride at most size, so that every "
                f"pixel is covered; got size {size} and stride {stride}"
            )
        cover = _baseline(images, baseline)
        before = model(images)[rows, target]
        total, times = images.new_zeros(len(images), height, width), images.new_zeros(height, width)
        for top in [*range(0, height - size, stride), height - size]:
            for left in [*range(0, width - size, stride), width - size]:
                where = (..., slice(top, top + size), slice(left, left + size))
                covered = images.detach().clone()
                covered[where] = cover[where]
                total[where] += (before - model(covered)[rows, target])[:, None, None]
                times[where] += 1
        return total / times


MAPS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "gradient": gradient_map,
    "gradient × input": gradient_input_map,
    "SmoothGrad": smooth_gradient_map,
    "integrated gradients": integrated_gradient_map,
    "occlusion": occlusion_map,
}
"""The methods by the name that a table or picture shows; each is called with model, images and target."""


def reset_layers(model: nn.Module, *, last: int | None = None, seed: int = 0) -> nn.Module:
    """A copy of the model whose ``last`` layers (all by default) have fresh random weights.

    The control for any map: a network that knows nothing. A map that hardly changes when the weights do shows the
    image, not the network. Layers are the modules that hold parameters of their own, in the order of ``modules()``.

    Args:
        model: each of its layers has ``reset_parameters()``, as torch's own have.
        last: how many layers, counted from the output, from 0 to all; one after another gives the cascade of the paper.
        seed: of the new weights; the global random numbers are left alone.

    Raises:
        ValueError: ``last`` out of range, or a layer that cannot be reset.

    Source: Adebayo et al. 2018, "Sanity Checks for Saliency Maps".

    >>> net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> other = reset_layers(net, last=1)
    >>> torch.equal(net[0].weight, other[0].weight), torch.equal(net[2].weight, other[2].weight)
    (True, False)
    """
    fresh = copy.deepcopy(model)
    layers = [(name, m) for name, m in fresh.named_modules() if any(True for _ in m.parameters(recurse=False))]
    count = len(layers) if last is None else last
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= len(layers):
        raise ValueError(f"last must be from 0 to {len(layers)}, the number of layers with parameters; got {last!r}")
    for name, layer in layers[len(layers) - count :]:
        if not hasattr(layer, "reset_parameters"):
            raise ValueError(f"{name or 'the model'} ({type(layer).__name__}) has no reset_parameters() to call")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _, layer in layers[len(layers) - count :]:
            layer.reset_parameters()
    return fresh


def _gradient(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    x = images.detach().clone().requires_grad_()
    logits = model(x)
    if logits.requires_grad:
        right = logits[torch.arange(len(x), device=x.device), target].sum()
        (gradient,) = torch.autograd.grad(right, x, allow_unused=True)
        if gradient is not None:
            return gradient
    raise ValueError("the model's logits do not depend on the image by a gradient; occlusion_map needs none")


@contextmanager
def _ready(model: nn.Module | Callable, images: Tensor, target: Tensor) -> Iterator[None]:
    """Check the input, then eval mode with gradients on, whatever is around."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        given = f"dtype {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a floating-point tensor [N, C, H, W], got {given}")
    if images.dim() != 4 or images.numel() == 0:
        raise ValueError(f"images must be [N, C, H, W] with N >= 1, got shape {tuple(images.shape)}")
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        given = f"dtype {target.dtype}" if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target must be an int64 tensor [N] of class indices, got {given}")
    if target.shape != images.shape[:1]:
        raise ValueError(f"target must have shape ({len(images)},) to fit the images, got {tuple(target.shape)}")
    module = model if isinstance(model, nn.Module) else nn.Identity()
    with _eval_mode(module), torch.inference_mode(False), torch.enable_grad():
        with torch.no_grad():
            logits = model(images[:1].detach().clone())
        if logits.dim() != 2 or target.min() < 0 or target.max() >= logits.shape[1]:
            raise ValueError(
                f"target must be classes among the logits [N, K]; got {int(target.min())} to {int(target.max())} and "
                f"logits of shape {tuple(logits.shape)} for one image"
            )
        yield


def _baseline(images: Tensor, given: float | Tensor | None) -> Tensor:
    if given is None:
        given = images.amin(dim=(0, 2, 3)).reshape(1, -1, 1, 1)
    try:
        return torch.as_tensor(given, dtype=images.dtype, device=images.device).detach().expand(images.shape).clone()
    except RuntimeError as error:
        shapes = f"{tuple(given.shape)} does not broadcast to the images' {tuple(images.shape)}"
        raise ValueError(f"baseline must be a number or a tensor that fits the images: {shapes}") from error


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
