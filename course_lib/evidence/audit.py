"""What was lost besides a digit of accuracy: classes, single answers, exemplars, robustness, and where a network looks.

Answers are predicted labels, int64 [R, N]: row r is replica r, column n an image. ``labels`` are [N], or [R, N] where
each replica has images of its own. Scores are float64 arrays in percent, one number a replica, for
:func:`~course_lib.evidence.statistics.mean` and :func:`~course_lib.evidence.statistics.difference`.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from course_lib.gate import eval_mode

__all__ = ["Exemplars", "churn", "class_recall", "find_exemplars", "map_agreement", "noise_curve", "occlusion_map"]


def class_recall(answers: Tensor, labels: Tensor) -> np.ndarray:
    """Share of each class's images that a replica answers right, percent [R, K]; NaN where it has none of a class.

    >>> class_recall(torch.tensor([[0, 1, 1], [0, 0, 1]]), torch.tensor([0, 0, 1])).tolist()
    [[50.0, 100.0], [100.0, 100.0]]
    """
    (answers,), labels = _checked(labels, answers)
    right, classes = answers == labels, range(int(labels.max()) + 1)
    shares = [torch.where(labels == k, right.double(), torch.nan).nanmean(dim=1) for k in classes]
    return 100 * torch.stack(shares, dim=1).numpy()


def churn(before: Tensor, after: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    """Answers that changed, in percent of the images, one number a replica [R]: accuracy may stand still meanwhile.

    ``"broken"``: right → wrong; ``"repaired"``: wrong → right; ``"otherwise"``: wrong → otherwise wrong; ``"changed"``:
    all of them (Milani Fard et al. 2016).

    >>> found = churn(torch.tensor([[0, 1, 2, 0]]), torch.tensor([[0, 0, 3, 3]]), torch.tensor([0, 1, 3, 1]))
    >>> {name: share.tolist() for name, share in found.items()}
    {'broken': [25.0], 'repaired': [25.0], 'otherwise': [25.0], 'changed': [75.0]}
    """
    (before, after), labels = _checked(labels, before, after)
    was, now, moved = before == labels, after == labels, before != after
    kinds = {"broken": was & ~now, "repaired": ~was & now, "otherwise": ~was & ~now & moved, "changed": moved}
    return {name: 100 * kind.double().mean(dim=1).numpy() for name, kind in kinds.items()}


@dataclass(frozen=True, eq=False)
class Exemplars:
    """Images on which two populations part, by what it means, each the furthest apart first: int64 positions [M].

    ``broken``: only the first population's most frequent answer is right; ``repaired``: only the second's;
    ``otherwise``: neither's.
    """

    broken: Tensor
    repaired: Tensor
    otherwise: Tensor


def find_exemplars(before: Tensor, after: Tensor, labels: Tensor) -> Exemplars:
    """Compression-identified exemplars (Hooker et al. 2019, section 3.2): images whose most frequent answer changed.

    Both populations [R, N] answer the same N images. Where answers tie, an image counts only if no answer leads in
    both. Seeds alone make some exemplars: count them between two populations that differ in nothing else.

    >>> before = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 0, 5]])
    >>> after = torch.tensor([[1, 0, 5], [7, 0, 3], [1, 2, 3]])
    >>> find_exemplars(before, after, torch.tensor([1, 2, 3])).broken.tolist()
    [1]
    """
    (before, after), labels = _checked(labels, before, after)
    if (labels != labels[:1]).any():
        raise ValueError("exemplars need the same images for all replicas: labels [N], or equal rows")
    classes = int(max(before.max(), after.max(), labels.max())) + 1
    first, second = (nn.functional.one_hot(answers, classes).sum(dim=0) for answers in (before, after))
    lead, other = (counts == counts.max(dim=1, keepdim=True).values for counts in (first, second))
    parted = ~(lead & other).any(dim=1)
    order = torch.argsort(-(first - second).abs().sum(dim=1), stable=True)
    was, now = (leading.gather(1, labels[0][:, None])[:, 0] for leading in (lead, other))
    kinds = (was & ~now, now & ~was, ~was & ~now)
    return Exemplars(*(order[(parted & kind)[order]] for kind in kinds))


def noise_curve(models: Iterable[nn.Module], split, severities: Sequence[float], *, seed: int = 0) -> np.ndarray:
    """Accuracy in percent [R, S] under Gaussian noise of S standard deviations, in units of the normalised images.

    Every replica and severity meets the same draw, amplified, so that a curve has no jitter of its own. ``split`` has
    ``images`` and ``labels``, or is a sequence of such, one a replica.
    """
    models = list(models)
    splits = [split] * len(models) if hasattr(split, "images") else list(split)
    rows = []
    for model, own in zip(models, splits, strict=True):
        noise = torch.randn(own.images.shape, generator=torch.Generator().manual_seed(seed))
        with eval_mode(model), torch.no_grad():
            right = [model(own.images + s * noise).argmax(dim=1) == own.labels for s in severities]
        rows.append([100 * found.double().mean().item() for found in right])
    return np.array(rows)


def occlusion_map(model: nn.Module | Callable, images: Tensor, target: Tensor, *, size=2, stride=1) -> Tensor:
    """How far the target's logit falls when a square is covered (Zeiler & Fergus 2014): no gradient is needed.

    ``model``, a module or any function, gives logits [N, K] of ``images`` [N, C, H, W]; ``target``, int64 [N], is the
    class to explain. Squares of ``size`` pixels, every ``stride`` and at the edge, are covered with each channel's
    smallest value. Returns [N, H, W], in logits: at each pixel the mean over the squares that covered it.
    """
    (height, width), rows = images.shape[2:], torch.arange(len(images))
    if not 1 <= stride <= size <= min(height, width):
        raise ValueError(f"1 <= stride <= size <= {min(height, width)} pixels is needed, got {stride} and {size}")
    dark = images.amin(dim=(0, 2, 3), keepdim=True)
    total, times = images.new_zeros(len(images), height, width), images.new_zeros(height, width)
    with eval_mode(model if isinstance(model, nn.Module) else nn.Identity()), torch.no_grad():
        before = model(images)[rows, target]
        for top in [*range(0, height - size, stride), height - size]:
            for left in [*range(0, width - size, stride), width - size]:
                where = (..., slice(top, top + size), slice(left, left + size))
                covered = images.clone()
                covered[where] = dark
                total[where] += (before - model(covered)[rows, target])[:, None, None]
                times[where] += 1
    return total / times


def map_agreement(a: Tensor, b: Tensor) -> np.ndarray:
    """Spearman's rank correlation of two maps of each image [N, H, W]: float64 [N] in [−1, 1]; NaN for a constant map.

    >>> map_agreement(torch.tensor([[[1.0, 2.0, 2.0, 9.0]]]), torch.tensor([[[0.0, 3.0, 3.0, 4.0]]])).round(9).tolist()
    [1.0]
    """
    from scipy import stats

    if a.shape != b.shape or a.dim() < 2:
        raise ValueError(f"a and b must be maps of one shape [N, H, W], got {tuple(a.shape)} and {tuple(b.shape)}")
    pairs = zip(*(maps.detach().double().flatten(1).numpy() for maps in (a, b)), strict=True)
    with warnings.catch_warnings(action="ignore"):  # of a constant map, which deserves its NaN
        return np.array([stats.spearmanr(x, y).statistic for x, y in pairs])


def _checked(labels: Tensor, *answers: Tensor) -> tuple[list[Tensor], Tensor]:
    """Answers [R, N] each, and labels [R, N], as int64 tensors that fit each other."""
    tables = [torch.as_tensor(table) for table in answers]
    labels = torch.as_tensor(labels)
    shapes = ", ".join(str(tuple(table.shape)) for table in (*tables, labels))
    first = tables[0]
    fits = all(t.dim() == 2 and t.numel() and t.shape == first.shape for t in tables)
    if not fits or labels.shape not in (first.shape, first.shape[1:]):
        raise ValueError(f"answers must be [R, N] with the same replicas, labels [N] or [R, N]; got {shapes}")
    if any(table.is_floating_point() or table.dtype is torch.bool or table.min() < 0 for table in (*tables, labels)):
        raise TypeError("answers and labels must be class numbers from 0, not shares or logits: take argmax first")
    return [table.long() for table in tables], labels.long().expand(first.shape)
