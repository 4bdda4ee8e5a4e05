"""Who pays for compression? Accuracy class by class, before and after, with intervals and with p values corrected for
having looked at every class."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from course_lib.evidence.statistics import Interval, mean_interval

__all__ = ["ClassChange", "adjust_p_values", "check_predictions", "class_accuracy", "class_change"]


@dataclass(frozen=True)
class ClassChange:
    """What compression did to one class; shares in [-1, 1], negative where something was lost.

    Attributes:
        class_index: the class.
        images: how many images of it there are.
        original, compressed: mean share of right answers over the replicas, in [0, 1].
        change: compressed − original, seed by seed.
        relative: ``change`` minus the change over all images of the same seed. Above 0 the class lost less than the
            whole, below 0 more. Weighted by ``images`` the classes' means add up to 0.
        p_value: of ``relative`` being 0, two-sided paired t test.
        adjusted_p: the same after the correction for the number of classes looked at.
    """

    class_index: int
    images: int
    original: float
    compressed: float
    change: Interval
    relative: Interval
    p_value: float
    adjusted_p: float


def class_accuracy(
    predicted: Tensor, labels: Tensor, *, num_classes: int | None = None, level: float = 0.95, clustered: bool = True
) -> list[Interval]:
    """Share of right answers in each class, with Wilson's interval, for one model or pooled over replicas.

    R replicas that answer the same n images are not R·n independent answers: what one gets wrong, the others mostly get
    wrong too. Wilson's formula is therefore given the number of independent answers that carry as much, R·n divided by
    the design effect 1 + (R − 1)·ρ, where ρ is the correlation between two replicas' answers to one image of a class.
    It comes from one analysis of variance over all classes, for a single class has too few errors to tell; it is kept
    within [0, 1], and is 1 where no two replicas ever differ. The images are the sample: the interval is about other
    images, for replicas such as these.

    Args:
        predicted: int64 ``[N]``, one model's labels, or ``[R, N]``, one row a replica. For an interval a model, call it
            with each row.
        labels: int64 ``[N]``.
        num_classes: K; the largest label plus 1 by default.
        level: confidence in (0, 1).
        clustered: ``False`` takes all R·n answers for independent, which makes intervals too narrow.

    Returns:
        K intervals within [0, 1]; their ``n`` is the number of images in the class. Near 0 and 1 they are lopsided, so
        quote ``low`` and ``high``, not ``mean ± half_width``.

    Raises:
        TypeError: not int64 tensors.
        ValueError: shapes that do not fit, a label out of range, a class without an image, a level outside (0, 1).

    Source: Wilson 1927; Kish 1965, "Survey Sampling", section 5.4 for the design effect.

    >>> labels = torch.tensor([0, 0, 0, 0, 1, 1])
    >>> zero, one = class_accuracy(torch.tensor([0, 0, 0, 1, 1, 1]), labels)
    >>> f"{zero.mean:.2f} in {zero.low:.2f} to {zero.high:.2f}", one.mean
    ('0.75 in 0.30 to 0.95', 1.0)
    """
    predicted, labels, classes = check_predictions(labels, num_classes, predicted=predicted)
    right = (predicted == labels).double()
    groups = [right[:, members] for members in _members(labels, classes)]
    effect = _design_effect(groups) if clustered else 1.0
    found = []
    for answers in groups:
        trials = answers.numel() / effect
        low, high = _wilson(float(answers.mean()), trials, level)
        found.append(Interval(float(answers.mean()), low, high, level, answers.shape[1]))
    return found


def class_change(
    original: Tensor,
    compressed: Tensor,
    labels: Tensor,
    *,
    num_classes: int | None = None,
    level: float = 0.95,
    correction: str = "holm",
) -> list[ClassChange]:
    """What compression changed class by class, and whether a class lost more than its share.

    Row r of ``compressed`` must come from the same seed as row r of ``original``. Hooker et al. ask whether a class's
    accuracy *relative to the whole* moved: a class that loses what every class loses was not singled out. They compare
    two unpaired populations with Welch's t test; here replicas are paired by seed, which takes out what a seed does to
    both. The replicas are the sample: intervals and p values are about other seeds, on these images.

    Ten classes are ten chances to find something. ``correction`` says what is done about it:

    - ``"holm"`` (1979): adjusted p values that keep the chance of *any* false alarm below the level at which they are
      read. Never less powerful than Bonferroni. Each interval stays one of its own at ``level``.
    - ``"bonferroni"``: p values times K, and intervals widened so that all K hold at once at ``level``.
    - ``"none"``: for a class that was named before looking.

    Where all replicas changed a class by exactly the same amount, t is not defined: p is then 1 for no change, else the
    sign test's 2 / 2^R, and the interval has no width.

    Args:
        original, compressed: int64 ``[R, N]`` predicted labels, R ≥ 2, the same seeds in the same order.
        labels: int64 ``[N]``.
        num_classes: K; the largest label plus 1 by default.
        level: confidence in (0, 1).
        correction: see above.

    Returns:
        K entries, class 0 first.

    Raises:
        TypeError: not int64 tensors.
        ValueError: shapes that do not fit, fewer than two replicas, a label out of range, a class without an image, an
            unknown correction, a level outside (0, 1).

    Source: Hooker et al. 2019, "What Do Compressed Deep Neural Networks Forget?", section 3.1.

    >>> labels = torch.tensor([0, 0, 1, 1])
    >>> before = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 0]])
    >>> after = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    >>> [(row.change.mean, round(row.relative.mean, 3)) for row in class_change(before, after, labels)]
    [(0.0, 0.333), (-0.6666666666666666, -0.333)]
    """
    original, compressed, labels, classes = check_predictions(
        labels, num_classes, original=original, compressed=compressed
    )
    replicas, images = original.shape
    if compressed.shape != original.shape:
        raise ValueError(
            f"both populations need the same seeds in one order, got {replicas} and {len(compressed)} rows"
        )
    if replicas < 2:
        raise ValueError("a paired difference needs at least two replicas a population, got 1: one seed says nothing")
    if correction not in ("holm", "bonferroni", "none"):
        raise ValueError(f"correction must be 'holm', 'bonferroni' or 'none', got {correction!r}")
    before, after = (original == labels), (compressed == labels)
    gained = after.long() - before.long()
    total = gained.sum(dim=1)
    each = 1 - (1 - level) / classes if correction == "bonferroni" else level
    rows = []
    for index, members in enumerate(_members(labels, classes)):
        n, moved = len(members), gained[:, members].sum(dim=1)
        # Whole numbers until the last division, so that equal changes stay equal.
        relative = (moved * images - total * n).double().numpy() / (n * images)
        rows.append(
            {
                "class_index": index,
                "images": n,
                "original": float(before[:, members].double().mean()),
                "compressed": float(after[:, members].double().mean()),
                "change": mean_interval(moved.double().numpy() / n, level=each),
                "relative": mean_interval(relative, level=each),
                "p_value": _paired_p(relative),
            }
        )
    adjusted = adjust_p_values([row["p_value"] for row in rows], method=correction)
    return [ClassChange(**row, adjusted_p=p) for row, p in zip(rows, adjusted, strict=True)]


def adjust_p_values(p_values: Sequence[float], *, method: str = "holm") -> list[float]:
    """p values that may be compared with a level as if each had been the only one.

    Args:
        p_values: at least one number in [0, 1].
        method: ``"holm"``, ``"bonferroni"`` or ``"none"``, as in :func:`class_change`.

    Raises:
        ValueError: no value, a value outside [0, 1], an unknown method.

    Source: Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure".

    >>> adjust_p_values([0.25, 0.125, 0.75])
    [0.5, 0.375, 0.75]
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or len(p) == 0 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p_values must be at least one number in [0, 1], got {p_values!r}")
    if method == "none":
        return p.tolist()
    if method == "bonferroni":
        return np.minimum(p * len(p), 1.0).tolist()
    if method != "holm":
        raise ValueError(f"method must be 'holm', 'bonferroni' or 'none', got {method!r}")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted.tolist()


def check_predictions(labels: Tensor | None, num_classes: int | None, **predicted: Tensor) -> tuple:
    """Predicted labels as ``[R, N]`` each, then the labels, then K; or an error in words. For this room's own use.

    ``labels`` may be ``None``; K is then one more than the largest predicted label.

    Raises:
        TypeError: not int64 tensors. ValueError: shapes that do not fit, no image, labels out of range.
    """
    given = dict(predicted) if labels is None else {**predicted, "labels": labels}
    for name, value in given.items():
        if not isinstance(value, Tensor) or value.dtype != torch.int64:
            kind = f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be an int64 tensor of class indices, got {kind}")
        if value.dim() not in (1,) if name == "labels" else value.dim() not in (1, 2):
            shape = "[N]" if name == "labels" else "[N] or [R, N], one row a replica"
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
        if value.numel() == 0:
            raise ValueError(f"{name} must hold at least one image, got shape {tuple(value.shape)}")
    if len({value.shape[-1] for value in given.values()}) > 1 or len({v.dim() for v in predicted.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in given.items())
        raise ValueError(f"all must be about the same images in the same order, got {shapes}")
    tables = [value.detach().cpu().reshape(-1, value.shape[-1]) for value in predicted.values()]
    truth = None if labels is None else labels.detach().cpu()
    source = [truth] if truth is not None and num_classes is None else [t for t in (*tables, truth) if t is not None]
    largest, smallest = max(int(t.max()) for t in source), min(int(t.min()) for t in [*tables, *source])
    classes = largest + 1 if num_classes is None else num_classes
    if not isinstance(classes, int) or isinstance(classes, bool) or smallest < 0 or largest >= classes:
        raise ValueError(f"labels must run from 0 to num_classes - 1, got {smallest} to {largest}, {num_classes=}")
    return (*tables, classes) if truth is None else (*tables, truth, classes)


def _members(labels: Tensor, classes: int) -> list[Tensor]:
    empty = (torch.bincount(labels, minlength=classes) == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"every class needs an image, got none of class {empty[0]} among {len(labels)}")
    return [(labels == index).nonzero().flatten() for index in range(classes)]


def _design_effect(groups: list[Tensor]) -> float:
    """Of 0/1 answers [R, n] by class: 1 where replicas err independently, R where they always agree."""
    replicas, images = groups[0].shape[0], sum(answers.shape[1] for answers in groups)
    if replicas == 1:
        return 1.0
    within = sum(float((a - a.mean(dim=0)).pow(2).sum()) for a in groups) / (images * (replicas - 1))
    if within == 0 or images == len(groups):
        return float(replicas)
    spread = sum(float((a.mean(dim=0) - a.mean()).pow(2).sum()) for a in groups)
    between = replicas * spread / (images - len(groups))
    correlation = (between - within) / (between + (replicas - 1) * within)
    return 1 + (replicas - 1) * max(correlation, 0.0)


def _wilson(share: float, trials: float, level: float) -> tuple[float, float]:
    """As statistics.proportion_interval, for a number of trials that need not be whole."""
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, such as 0.95; got {level!r}")
    from scipy import stats

    z2 = float(stats.norm.ppf((1 + level) / 2)) ** 2
    centre = share + z2 / (2 * trials)
    half = math.sqrt(z2 * (share * (1 - share) / trials + z2 / (4 * trials**2)))
    scale = 1 + z2 / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def _paired_p(differences: np.ndarray) -> float:
    if np.ptp(differences) == 0:
        return 1.0 if differences[0] == 0 else 2.0 / 2 ** len(differences)
    from scipy import stats

    return float(stats.ttest_1samp(differences, 0.0).pvalue)
