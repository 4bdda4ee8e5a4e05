"""What a student is taught with: images to ask the teacher about, and the loss that listens to its answers.

On the images that the teacher was trained with, its answers say little more than the labels do. Blends of two such
images (Zhang et al. 2018, "mixup") are new inputs, and the teacher says what they are. That is function matching (Beyer
et al. 2022): many inputs, the same view for teacher and student.
"""

import torch
from torch import Tensor, nn

from course_lib.lab.data import Split
from course_lib.lab.training import evaluate
from course_lib.methods.distillation import kd_loss

__all__ = ["blended", "follow_teacher", "teacher_answers"]


def blended(split: Split, copies: int = 3, *, seed: int = 0) -> Split:
    """``split`` followed by ``copies`` times as many blends: ``(1 - λ) · image + λ · another``, λ uniform in [0, 0.5).

    A blend keeps the label of its larger part.

    Args:
        split: N images.
        copies: at least 0; 0 gives the split as it is.
        seed: draws the partners and λ; torch's global generator is left as it was.

    Returns:
        A split of ``(copies + 1) · N`` images.

    >>> four = Split(torch.zeros(4, 1, 2, 2), torch.arange(4))
    >>> len(blended(four, 2)), blended(four, 2).labels.tolist()
    (12, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3])
    """
    if isinstance(copies, bool) or not isinstance(copies, int) or copies < 0:
        raise ValueError(f"copies must be a whole number of at least 0, got {copies!r}")
    generator, count = torch.Generator().manual_seed(seed), len(split)
    images = [split.images]
    for _ in range(copies):
        partner = torch.randperm(count, generator=generator)
        share = 0.5 * torch.rand(count, 1, 1, 1, generator=generator)
        images.append((1 - share) * split.images + share * split.images[partner])
    return Split(torch.cat(images), split.labels.repeat(copies + 1))


def teacher_answers(teacher: nn.Module, split: Split) -> Tensor:
    """The teacher's logits [N, K] for the images of ``split``, in eval mode and without gradients."""
    return evaluate(teacher, split).logits


def follow_teacher(logits: Tensor, labels: Tensor, index: Tensor, teacher: Tensor) -> Tensor:
    """Half the labels, half soft targets at T = 2: a loss for ``fit_replicas(..., settings={"teacher": [R, N, K]})``.

    The low temperature suits small students (Hinton et al. 2015 found 2.5 to 4 best for 30 units).
    """
    return kd_loss(logits, teacher[index], labels, temperature=2.0, alpha=0.5)
