"""Distillation from inside the teacher: hints, attention maps, relations between images.

Features are read through forward hooks, so no model has to return them. The losses are pure functions on the tensors
that arrive; all go down, all run under ``torch.func.vmap``, all compute in float32 at least.
"""

from collections.abc import MutableMapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from course_lib.gate import UnsupportedModel
from course_lib.methods.temperature import check_float, widen

__all__ = ["attention_map", "attention_map_loss", "hint_loss", "relational_distance_loss", "tap_features"]


def tap_features(
    model: nn.Module, layer_name: str, into: MutableMapping[str, Tensor], *, adapter: nn.Module | None = None
) -> RemovableHandle:
    """Write the output of one layer into ``into[layer_name]`` at every forward pass of ``model``.

    The model is changed in place: it gets the hook; its own output stays as it was. ``adapter``, FitNets' regressor,
    maps the layer's output to the teacher's shape before it is written, and becomes the submodule
    ``<layer_name>.adapter``, so that an optimiser over ``model.parameters()`` trains it too. Returns a handle whose
    ``remove()`` takes the hook (not the adapter) off again; also a context manager.

    Raises:
        ValueError: the model has no such layer, or the layer has an adapter already.
        UnsupportedModel: (a ValueError) one module under several names, whose outputs would overwrite one another.
        TypeError: (in the forward pass) the layer's output is not one tensor.

    >>> model, seen = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), {}
    >>> with tap_features(model, "0", seen):
    ...     _ = model(torch.ones(2, 4))
    >>> seen["0"].shape
    torch.Size([2, 3])
    """
    layers = dict(model.named_modules(remove_duplicate=False))
    if layer_name not in layers or layer_name == "":
        raise ValueError(f"no layer {layer_name!r} in the model; it has: {', '.join(name for name in layers if name)}")
    layer = layers[layer_name]
    if len(names := [name for name, module in layers.items() if module is layer]) > 1:
        cure = f"its last output would overwrite the others; give {layer_name!r} a module of its own"
        raise UnsupportedModel(f"{', '.join(names)} are one {type(layer).__name__}: {cure}")
    if adapter is not None:
        if hasattr(layer, "adapter"):
            raise ValueError(f"layer {layer_name!r} has an adapter already")
        layer.adapter = adapter

    # The adapter is reached through the module that is passed in: a deep copy of the model then uses its own.
    def write(module: nn.Module, args: tuple, output: Tensor) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(f"layer {layer_name!r} gives a {type(output).__name__}, not one tensor: tap another layer")
        # A copy: an activation that works in place would change it on the way.
        into[layer_name] = output.clone() if adapter is None else module.adapter(output.clone())

    return layer.register_forward_hook(write)


def hint_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean squared difference between a student's (adapted) features and the teacher's hint, both ``[N, ...]``.

    The teacher's come without gradient. (The paper sums over features and halves; the mean keeps one weight usable for
    every width: Romero et al. 2015, "FitNets", equation 3.) TypeError, ValueError: what does not fit, with its shape.

    >>> hint_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))
    tensor(2.)
    """
    student, teacher = checked(student_features, teacher_features, same=slice(None))
    return (student - teacher).pow(2).mean()


def attention_map(features: Tensor) -> Tensor:
    """Where a layer looks: the mean square over channels at each position, scaled to length 1 for each image.

    ``features`` are ``[N, C, H, W]``, the map ``[N, H·W]``, at least 0, of Euclidean length 1 (0 where all features are
    0). Zagoruyko & Komodakis 2017, "Paying More Attention to Attention", section 3.1.

    >>> attention_map(torch.tensor([[[[3.0, 0.0]], [[0.0, 0.0]]]]))
    tensor([[1., 0.]])
    """
    if check_float("features", features).dim() != 4:
        raise ValueError(f"an attention map needs features [N, C, H, W], got shape {tuple(features.shape)}")
    energy = relative(widen(features)).pow(2).mean(dim=1).flatten(start_dim=1)
    return F.normalize(energy, dim=1)


def attention_map_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Squared distance between the two attention maps, averaged over images: a scalar without unit in [0, 2].

    Features are ``[N, C, H, W]``, with any number of channels each, the teacher's without gradient. Zagoruyko &
    Komodakis 2017, equation 2 (one pair of layers, p = 2; they weigh it with 1,000 after a *mean* over positions, which
    is 1,000 / (H·W) on this sum). TypeError, ValueError: what does not fit, with its shape.
    """
    student, teacher = checked(student_features, teacher_features, same=slice(2, None))
    difference = attention_map(student) - attention_map(teacher)
    return difference.pow(2).sum(dim=1).mean()


def relational_distance_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Huber difference between the two nets' distances among the images of a batch, each in units of their mean.

    Features are ``[N, ...]`` for the same N ≥ 2 images, of any size each, the teacher's without gradient; the scalar
    has no unit and is averaged over the N² pairs (Park et al. 2019, "Relational Knowledge Distillation", equations 5 to
    7). TypeError, ValueError: what does not fit, with its shape.
    """
    student, teacher = checked(student_features, teacher_features, same=slice(0, 1), least=2)
    return F.smooth_l1_loss(relative_distances(student), relative_distances(teacher))


def relative_distances(features: Tensor) -> Tensor:
    """``[N, N]`` Euclidean distances between rows, divided by the mean over pairs of different rows."""
    rows = features.flatten(start_dim=1)
    rows = relative((rows - rows.mean(dim=0))[None])[0]
    squared = (rows[:, None] - rows[None]).pow(2).sum(dim=2)
    # A root has no finite slope at 0, where each image meets itself.
    distances = torch.where(squared > 0, squared, 1.0).sqrt() * (squared > 0)
    mean = distances.sum() / (len(rows) * (len(rows) - 1))
    return distances / mean.clamp_min(torch.finfo(rows.dtype).eps)


def relative(values: Tensor) -> Tensor:
    """Values over the largest of each first index, a constant for gradients: no square overflows or vanishes."""
    largest = values.detach().abs().flatten(start_dim=1).amax(dim=1).clamp_min(torch.finfo(values.dtype).tiny)
    return values / largest.view(-1, *[1] * (values.dim() - 1))


def checked(student: Tensor, teacher: Tensor, *, same: slice, least: int = 1) -> tuple[Tensor, Tensor]:
    """Features of as many images and equal ``shape[same]``, in float32 at least, the teacher's without gradient."""
    shapes = [tuple(check_float(f"{n}_features", f).shape) for n, f in (("student", student), ("teacher", teacher))]
    if shapes[0][0] != shapes[1][0] or shapes[0][same] != shapes[1][same] or shapes[0][0] < least:
        given = f"student_features {shapes[0]} and teacher_features {shapes[1]} must come from the same images"
        cure = "give tap_features an adapter, or choose layers of equal size"
        raise ValueError(f"{given}, at least {least}, and fit: {cure}")
    if teacher.requires_grad:
        cure = "read them from frozen(teacher), or pass teacher_features.detach()"
        raise ValueError(f"teacher_features require a gradient, so this loss would train the teacher: {cure}")
    return widen(student), widen(teacher)
