"""What the distillation losses demand of their input, in one place, so that all say it in the same words.

Shapes and dtypes are always checked. Values are checked wherever they can be read: inside ``torch.func.vmap`` (which
trains many replicas at once) a tensor's values are out of reach, and the value checks pass.
"""

import math
from numbers import Real

import torch
from torch import Tensor, nn

__all__ = [
    "check_features",
    "check_labelled",
    "check_labels",
    "check_logits",
    "check_pair",
    "check_teacher",
    "check_weight",
    "true",
]


def true(condition: Tensor) -> bool:
    """Truth of a boolean tensor; True where it cannot be read (inside ``vmap``, or on the meta device)."""
    try:
        return bool(condition)
    except RuntimeError:
        return True


def check_logits(name: str, logits: Tensor) -> None:
    """Logits are floating point ``[N, K]``, N ≥ 1, K ≥ 2, all finite."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        given = f"dtype {logits.dtype}" if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"{name} must be a floating-point tensor [N, K], got {given}")
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"{name} must be [N, K] with one row an image and K >= 2 classes, got shape {tuple(logits.shape)}"
        )
    if logits.shape[0] == 0:
        raise ValueError(f"{name} is an empty batch, shape {tuple(logits.shape)}: a mean over no image is not a number")
    if not true(torch.isfinite(logits).all()):
        bad = int((~torch.isfinite(logits)).sum())
        raise ValueError(
            f"{name} must be finite, got {bad} NaN or infinite of {logits.numel()} values: has the training diverged?"
        )


def check_pair(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Both are logits, of one shape, and the teacher's carry no gradient."""
    check_logits("student_logits", student_logits)
    check_logits("teacher_logits", teacher_logits)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "student_logits and teacher_logits must have the same shape [N, K], got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    if teacher_logits.requires_grad:
        raise ValueError(
            "teacher_logits require a gradient, so this loss would train the teacher towards the student: compute them "
            "with frozen(teacher), or pass teacher_logits.detach(); or are student and teacher swapped?"
        )


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Labels are int64 ``[N]`` from 0 to K − 1, for logits ``[N, K]``."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        given = f"dtype {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be an int64 tensor [N] of class indices, got {given}")
    images, classes = logits.shape
    if labels.shape != (images,):
        raise ValueError(
            f"labels must have shape ({images},) to fit logits {tuple(logits.shape)}, got {tuple(labels.shape)}"
        )
    if not true(((labels >= 0) & (labels < classes)).all()):
        raise ValueError(
            f"labels must run from 0 to {classes - 1} for {classes} classes, got {labels.min().item()} to "
            f"{labels.max().item()}"
        )


def check_labelled(labelled: Tensor, images: int) -> None:
    """The mask of images whose label counts is bool ``[N]``."""
    if not isinstance(labelled, Tensor) or labelled.dtype != torch.bool:
        given = f"dtype {labelled.dtype}" if isinstance(labelled, Tensor) else type(labelled).__name__
        raise TypeError(f"labelled must be a bool tensor [N], true where the label counts, got {given}")
    if labelled.shape != (images,):
        raise ValueError(f"labelled must have shape ({images},), one entry an image, got {tuple(labelled.shape)}")


def check_weight(name: str, weight: float | Tensor, *, most: float = math.inf) -> None:
    """A term's weight is a number from 0 to ``most``, or a tensor without dimensions that holds one."""
    if isinstance(weight, Tensor):
        if weight.dim() != 0:
            raise ValueError(
                f"{name} must be one number or a tensor without dimensions, got shape {tuple(weight.shape)}"
            )
        allowed = true(torch.isfinite(weight) & (weight >= 0) & (weight <= most))
    elif isinstance(weight, Real) and not isinstance(weight, bool):
        allowed = math.isfinite(weight) and 0 <= weight <= most
    else:
        raise TypeError(f"{name} must be a number, got {type(weight).__name__}")
    if not allowed:
        span = "at least 0 and finite" if math.isinf(most) else f"in [0, {most:g}]"
        raise ValueError(f"{name} must be {span}, got {weight}")


def check_features(student: Tensor, teacher: Tensor, *, least_dims: int) -> None:
    """Features are floating point, one row an image, with enough dimensions; the teacher's carry no gradient."""
    for name, features in (("student_features", student), ("teacher_features", teacher)):
        if not isinstance(features, Tensor) or not features.is_floating_point():
            given = f"dtype {features.dtype}" if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {given}")
        if features.dim() < least_dims:
            raise ValueError(
                f"{name} must have at least {least_dims} dimensions, the first one the images', "
                f"got shape {tuple(features.shape)}"
            )
        if features.numel() == 0:
            raise ValueError(f"{name} is empty, shape {tuple(features.shape)}")
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            "student_features and teacher_features must come from the same images, got "
            f"{student.shape[0]} and {teacher.shape[0]} rows (shapes {tuple(student.shape)} and {tuple(teacher.shape)})"
        )
    if teacher.requires_grad:
        raise ValueError(
            "teacher_features require a gradient, so this loss would train the teacher: read them from "
            "frozen(teacher), or pass teacher_features.detach()"
        )


def check_teacher(teacher: nn.Module) -> None:
    """A teacher is a module in eval mode whose parameters require no gradient."""
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher must be a torch.nn.Module, got {type(teacher).__name__}")
    training = [name or type(teacher).__name__ for name, module in teacher.named_modules() if module.training]
    if training:
        raise ValueError(
            f"the teacher is in train mode ({', '.join(training[:3])}): dropout and BatchNorm would change its "
            "answers; use frozen(teacher)"
        )
    learning = [name for name, parameter in teacher.named_parameters() if parameter.requires_grad]
    if learning:
        raise ValueError(f"the teacher's parameters require gradients ({', '.join(learning[:3])}): use frozen(teacher)")
