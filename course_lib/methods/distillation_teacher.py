"""The teacher's side of distillation: a copy that only answers, and its answers computed once."""

import copy
from functools import cache

import torch
from torch import Tensor, nn

from course_lib.methods.distillation_checks import check_teacher

__all__ = ["frozen", "precompute_logits"]


class _Frozen:
    """Mixed in front of a module's own class by :func:`frozen`."""

    def train(self, mode: bool = True):
        return super().train(False)

    def forward(self, *args, **kwargs):
        # A part of the teacher may have been put into train mode on its own.
        super().train(False)
        with torch.no_grad():
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        return _empty_frozen, (type(self).__bases__[1],), self.__dict__


@cache
def _frozen_class(module_class: type[nn.Module]) -> type[nn.Module]:
    return type(f"Frozen{module_class.__name__}", (_Frozen, module_class), {"__doc__": module_class.__doc__})


def _empty_frozen(module_class: type[nn.Module]) -> nn.Module:
    return object.__new__(_frozen_class(module_class))


def frozen(teacher: nn.Module) -> nn.Module:
    """A copy of ``teacher`` that only answers: always in eval mode, never with gradients.

    The teacher that was passed in stays as it was, weights, mode and all; the copy shares no memory with it. The copy
    has the same class, names and ``state_dict``; its ``train()`` keeps it in eval mode, also when it is called through
    a module that contains it, and its forward pass runs without gradients.

    Raises:
        TypeError: not a ``torch.nn.Module``.

    >>> teacher = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    >>> expert = frozen(teacher).train()
    >>> expert.training, expert(torch.ones(2, 4)).requires_grad, teacher.training
    (False, False, True)
    """
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher must be a torch.nn.Module, got {type(teacher).__name__}")
    still = copy.deepcopy(teacher).requires_grad_(False)
    if not isinstance(still, _Frozen):
        still.__class__ = _frozen_class(type(still))
    return still.train()


def precompute_logits(teacher: nn.Module, images: Tensor, *, batch_size: int = 1024) -> Tensor:
    """The teacher's logits ``[N, K]`` for a fixed transfer set, computed once: the student's epochs look them up.

    Args:
        teacher: in eval mode, no parameter requiring a gradient; :func:`frozen` sees to both.
        images: ``[N, ...]``, N ≥ 1, as the teacher takes them.
        batch_size: images a forward pass.

    Raises:
        TypeError: not a module. ValueError: a teacher in train mode or with gradients, no images, a batch size below 1.

    >>> precompute_logits(frozen(nn.Linear(4, 3)), torch.ones(5, 4)).shape
    torch.Size([5, 3])
    """
    check_teacher(teacher)
    if len(images) == 0 or batch_size < 1:
        raise ValueError(
            f"need at least one image and a batch_size of at least 1, got images {tuple(images.shape)} and {batch_size}"
        )
    with torch.no_grad():
        return torch.cat([teacher(batch) for batch in images.split(batch_size)])
