"""Distillation with few labels, many students at once: who drew which labels, what the teachers said, who was taught.

A transfer set is a split whose labels are only partly known. Every replica draws its own labels and has its own
teacher, so that an interval over replicas covers the luck of that draw as well.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from course_lib.lab.data import Split
from course_lib.lab.replicas import fit_replicas
from course_lib.lab.training import TrainConfig, evaluate
from course_lib.methods.distillation import kd_loss

__all__ = ["answer_table", "draw_labels", "label_mask", "teach"]


def draw_labels(split: Split, count: int, classes: int, *, seed: int) -> Tensor:
    """Positions ``[count]`` of the images that get a label: equally many of each class, drawn by the seed.

    Raises:
        ValueError: ``count`` is no multiple of ``classes`` above 0, or a class has too few images.

    >>> split = Split(torch.zeros(6, 1, 1, 1), torch.tensor([0, 1, 0, 1, 1, 0]))
    >>> split.labels[draw_labels(split, 4, 2, seed=0)].tolist()
    [0, 0, 1, 1]
    """
    if classes < 1 or count < 1 or count % classes:
        raise ValueError(f"count must be a positive multiple of the {classes} classes, got {count}")
    # A stream of its own: with the plain seed, the draw would be the first epoch's order of the same replica.
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed((seed * 1_000_003 + 999_983) % 2**63))
    drawn = [order[split.labels[order] == k][: count // classes] for k in range(classes)]
    for k, part in enumerate(drawn):
        if len(part) < count // classes:
            raise ValueError(f"class {k} has {len(part)} images, needed are {count // classes} for {count} labels")
    return torch.cat(drawn)


def label_mask(images: int, drawn: Sequence[Tensor]) -> Tensor:
    """Bool ``[R, images]``, true where replica r knows the label: at the positions ``drawn[r]``.

    >>> label_mask(4, [torch.tensor([0, 3])])
    tensor([[ True, False, False,  True]])
    """
    return torch.stack([torch.isin(torch.arange(images), positions) for positions in drawn])


def answer_table(models: Sequence[nn.Module], split: Split | Sequence[Split]) -> Tensor:
    """Logits ``[R, N, K]`` of R models, on one split or on one split each (all of one length)."""
    splits = [split] * len(models) if isinstance(split, Split) else split
    return torch.stack([evaluate(model, part).logits for model, part in zip(models, splits, strict=True)])


def teach(
    make_model: Callable[[int], nn.Module],
    seeds: Sequence[int],
    split: Split | Sequence[Split],
    tables: Sequence[Tensor],
    labelled: Tensor,
    config: TrainConfig,
    *,
    temperature: float | Sequence[float],
    alpha: float | Sequence[float],
) -> list[list[nn.Module]]:
    """Distil G groups of R students in one batched pass, with :func:`~course_lib.methods.distillation.kd_loss`.

    Args:
        make_model, config: as in :func:`~course_lib.lab.replicas.fit_replicas`.
        seeds: one a replica, the same in every group, so that groups can be compared in pairs.
        split: the transfer set for all, or G · R of them, group by group.
        tables: one a group: the teachers' logits ``[R, N, K]``, row i for image i.
        labelled: bool ``[R, N]``: whose label counts, see :func:`label_mask`.
        temperature, alpha: one number for all, or one a group.

    Returns:
        One list of R trained students a group.

    Raises:
        ValueError: tables or mask of another shape, a number of temperatures or alphas that is not G, and what
            ``fit_replicas`` and ``kd_loss`` refuse.
    """
    groups, replicas = len(tables), len(seeds)
    for table in tables:
        if table.dim() != 3 or table.shape[:2] != labelled.shape or len(table) != replicas:
            raise ValueError(
                f"tables must be [R, N, K] and labelled [R, N] for R = {replicas} seeds, "
                f"got {tuple(table.shape)} and {tuple(labelled.shape)}"
            )
    settings = {"teacher": torch.cat(list(tables)), "labelled": labelled.repeat(groups, 1)}
    for name, value in (("temperature", temperature), ("alpha", alpha)):
        numbers = torch.as_tensor(value, dtype=torch.float32)
        if numbers.dim() > 1 or (numbers.dim() == 1 and len(numbers) != groups):
            raise ValueError(f"{name} must be one number or one for each of {groups} groups, got {value!r}")
        settings[name] = numbers.expand(groups).repeat_interleave(replicas)
    if not (settings["temperature"] > 0).all() or not ((settings["alpha"] >= 0) & (settings["alpha"] <= 1)).all():
        raise ValueError(f"temperatures must be above 0 and alphas in [0, 1], got {temperature!r} and {alpha!r}")

    def loss(logits, labels, index, teacher, labelled, temperature, alpha):
        rows, known = teacher[index], labelled[index]
        return kd_loss(logits, rows, labels, temperature=temperature, alpha=alpha, labelled=known)

    models = fit_replicas(make_model, list(seeds) * groups, split, config, loss_fn=loss, settings=settings)
    return [models[g * replicas : (g + 1) * replicas] for g in range(groups)]
