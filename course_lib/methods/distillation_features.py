"""Distillation from inside the teacher: hints, attention maps, relations between images.

Features are read through forward hooks, so no model has to return them. :func:`tap_features` hangs a hook on one layer;
the losses are pure functions on the tensors that arrive. All go down, and all work under ``torch.func.vmap``.
"""

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from course_lib.methods.distillation_checks import check_features, check_teacher, check_weight

__all__ = [
    "attention_map",
    "attention_transfer_loss",
    "hint_loss",
    "precompute_features",
    "relational_angle_loss",
    "relational_distance_loss",
    "relational_kd_loss",
    "tap_features",
]


def tap_features(
    model: nn.Module, layer_name: str, into: MutableMapping[str, Tensor], *, adapter: nn.Module | None = None
) -> RemovableHandle:
    """Write the output of one layer into ``into[layer_name]`` at every forward pass of ``model``.

    Args:
        model: changed in place: it gets the hook, and the adapter if there is one; its own output stays as it was.
        layer_name: a name from ``model.named_modules()``, such as ``"pool1"``.
        into: any dict; each forward pass overwrites the entry.
        adapter: FitNets' regressor: maps the layer's output to the teacher's shape before it is written. It becomes the
            submodule ``<layer_name>.adapter``, so that an optimiser over ``model.parameters()`` trains it too.

    Returns:
        A handle whose ``remove()`` takes the hook (not the adapter) off again.

    Raises:
        ValueError: the model has no such layer, or the layer has an adapter already.

    >>> model, seen = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), {}
    >>> handle = tap_features(model, "0", seen)
    >>> _ = model(torch.ones(2, 4))
    >>> seen["0"].shape
    torch.Size([2, 3])
    """
    layers = dict(model.named_modules())
    if layer_name not in layers or layer_name == "":
        raise ValueError(f"no layer {layer_name!r} in the model; it has: {', '.join(name for name in layers if name)}")
    layer = layers[layer_name]
    if adapter is not None:
        if hasattr(layer, "adapter"):
            raise ValueError(f"layer {layer_name!r} has an adapter already")
        layer.adapter = adapter

    # The adapter is reached through the module that is passed in: a deep copy of the model then uses its own.
    def write(module: nn.Module, args: tuple, output: Tensor) -> None:
        into[layer_name] = output if adapter is None else module.adapter(output)

    return layer.register_forward_hook(write)


def precompute_features(
    teacher: nn.Module, images: Tensor, layer_names: Sequence[str], *, batch_size: int = 1024
) -> dict[str, Tensor]:
    """The teacher's features ``[N, ...]`` at each named layer for a fixed transfer set, computed once.

    Args:
        teacher: in eval mode and without gradients, see :func:`course_lib.methods.distillation.frozen`. Left as it was.
        images: ``[N, ...]``, N ≥ 1.
        layer_names: from ``teacher.named_modules()``.
        batch_size: images a forward pass.

    Raises:
        TypeError, ValueError: a teacher in train mode or with gradients, an unknown layer, no images.
    """
    check_teacher(teacher)
    if len(images) == 0 or batch_size < 1:
        raise ValueError(
            f"need at least one image and a batch_size of at least 1, got images {tuple(images.shape)} and {batch_size}"
        )
    seen: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {name: [] for name in layer_names}
    handles: list[RemovableHandle] = []
    try:
        for name in parts:
            handles.append(tap_features(teacher, name, seen))
        with torch.no_grad():
            for batch in images.split(batch_size):
                teacher(batch)
                for name, part in parts.items():
                    part.append(seen[name])
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(part) for name, part in parts.items()}


def hint_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean squared difference between a student's (adapted) features and the teacher's hint.

    Args:
        student_features: floating point ``[N, ...]``, after the adapter.
        teacher_features: the same shape, without gradient.

    Returns:
        A scalar in squared units of the features, averaged over images and features, at least 0. (The paper sums over
        features and halves; the mean keeps one weight usable for every width.)

    Raises:
        TypeError, ValueError: not floating-point tensors, shapes that differ, teacher features with a gradient.

    Source: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", equation 3.
    """
    check_features(student_features, teacher_features, least_dims=1)
    if student_features.shape != teacher_features.shape:
        raise ValueError(
            f"student_features {tuple(student_features.shape)} and teacher_features {tuple(teacher_features.shape)} "
            "must have the same shape: give tap_features an adapter from the first to the second"
        )
    return F.mse_loss(student_features, teacher_features)


def attention_map(features: Tensor) -> Tensor:
    """Where a layer looks: the mean square over channels at each position, scaled to length 1 for each image.

    Args:
        features: floating point ``[N, C, H, W]``; the number of channels is averaged away.

    Returns:
        ``[N, H·W]``, at least 0, Euclidean length 1 (0 where all features are 0).

    Raises:
        ValueError: not four dimensions.

    Source: Zagoruyko & Komodakis 2017, "Paying More Attention to Attention", section 3.1.

    >>> attention_map(torch.tensor([[[[3.0, 0.0]], [[0.0, 0.0]]]]))
    tensor([[1., 0.]])
    """
    if features.dim() != 4:
        raise ValueError(f"an attention map needs features [N, C, H, W], got shape {tuple(features.shape)}")
    return F.normalize(features.pow(2).mean(dim=1).flatten(start_dim=1), dim=1)


def attention_transfer_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Squared distance between the two attention maps, averaged over images.

    Args:
        student_features: floating point ``[N, C_s, H, W]``.
        teacher_features: ``[N, C_t, H, W]``, any number of channels, without gradient.

    Returns:
        A scalar without unit in [0, 2].

    Raises:
        TypeError, ValueError: not floating-point tensors, heights or widths that differ, teacher features with a
            gradient.

    Source: Zagoruyko & Komodakis 2017, equation 2 (one pair of layers, p = 2).
    """
    check_features(student_features, teacher_features, least_dims=4)
    student_map, teacher_map = attention_map(student_features), attention_map(teacher_features)
    if student_features.shape[2:] != teacher_features.shape[2:]:
        raise ValueError(
            "attention maps must have the same height and width, got "
            f"{tuple(student_features.shape[2:])} and {tuple(teacher_features.shape[2:])}: choose layers of equal size"
        )
    return (student_map - teacher_map).pow(2).sum(dim=1).mean()


def relational_distance_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Huber difference between the two nets' distances among the images of a batch, each in units of their mean.

    Args:
        student_features: floating point ``[N, ...]`` with N ≥ 2, flattened to ``[N, D_s]``; D_s need not be D_t.
        teacher_features: ``[N, ...]`` for the same images, without gradient.

    Returns:
        A scalar without unit, averaged over the N² pairs, at least 0.

    Raises:
        TypeError, ValueError: not floating-point tensors, different or fewer than two images, teacher features with a
            gradient.

    Source: Park et al. 2019, "Relational Knowledge Distillation", equations 5 to 7.
    """
    student, teacher = _rows(student_features, teacher_features, least=2)
    return F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))


def relational_angle_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Huber difference between the two nets' cosines of the angle at the middle of every three images of a batch.

    Arguments and errors are those of :func:`relational_distance_loss`, with N ≥ 3. The work grows with N³.

    Returns:
        A scalar without unit, averaged over the N³ triples, at least 0.

    Source: Park et al. 2019, equations 8 to 10.
    """
    student, teacher = _rows(student_features, teacher_features, least=3)
    return F.smooth_l1_loss(_cosines(student), _cosines(teacher))


def relational_kd_loss(
    student_features: Tensor, teacher_features: Tensor, *, distance: float = 25.0, angle: float = 50.0
) -> Tensor:
    """``distance`` · :func:`relational_distance_loss` + ``angle`` · :func:`relational_angle_loss`.

    The default weights are those of Park et al. 2019 for classification. Add cross-entropy yourself.

    Raises:
        TypeError, ValueError: as in the two parts; a negative weight.
    """
    check_weight("distance", distance)
    check_weight("angle", angle)
    distances = relational_distance_loss(student_features, teacher_features)
    return distance * distances + angle * relational_angle_loss(student_features, teacher_features)


def _rows(student: Tensor, teacher: Tensor, *, least: int) -> tuple[Tensor, Tensor]:
    check_features(student, teacher, least_dims=2)
    if student.shape[0] < least:
        raise ValueError(f"relations need a batch of at least {least} images, got {student.shape[0]}")
    return student.flatten(start_dim=1), teacher.flatten(start_dim=1)


def _relative_distances(rows: Tensor) -> Tensor:
    """``[N, N]`` Euclidean distances divided by the mean over pairs of different images."""
    n = rows.shape[0]
    squared = (rows[:, None] - rows[None]).pow(2).sum(dim=2)
    # A root has no finite slope at 0, where each image meets itself.
    distances = torch.where(squared > 0, squared.clamp_min(torch.finfo(rows.dtype).tiny).sqrt(), 0.0)
    mean = distances.sum() / (n * (n - 1))
    return distances / mean.clamp_min(torch.finfo(rows.dtype).eps)


def _cosines(rows: Tensor) -> Tensor:
    """``[N, N, N]``: entry (j, i, k) is the cosine at image j between the directions to i and to k."""
    directions = F.normalize(rows[None] - rows[:, None], dim=2)
    return directions @ directions.transpose(1, 2)
