"""Which images pay for compression? Exemplars on which two populations of networks part."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from course_lib.evidence.classes import check_predictions
from course_lib.evidence.measure import _eval_mode

__all__ = [
    "ExemplarControl",
    "Exemplars",
    "Forgotten",
    "exemplar_control",
    "find_exemplars",
    "forgotten",
    "modal_label",
    "predict_labels",
]


def predict_labels(
    models: nn.Module | Sequence[nn.Module | Callable[[Tensor], Tensor]], images: Tensor, *, batch_size: int = 512
) -> Tensor:
    """Each model's label for each image: the index of its largest logit, the smallest index where logits tie.

    Args:
        models: one, or a sequence of R, each giving logits ``[N, K]``. A module runs in eval mode, without gradients,
            and gets its mode back.
        images: ``[N, C, H, W]``, N ≥ 1.
        batch_size: images at a time.

    Returns:
        int64 ``[R, N]``, also for one model (R = 1).

    Raises:
        ValueError: no model, no image, or logits that are not ``[N, K]``.

    >>> predict_labels(lambda x: x.flatten(1), torch.tensor([[0.0, 2.0], [3.0, 1.0]]).reshape(2, 1, 1, 2))
    tensor([[1, 0]])
    """
    models = [models] if callable(models) and not isinstance(models, nn.ModuleList) else list(models)
    if not models or len(images) == 0:
        raise ValueError(f"at least one model and one image are needed, got {len(models)} and {len(images)}")
    rows = []
    for model in models:
        with _eval_mode(model if isinstance(model, nn.Module) else nn.Identity()), torch.no_grad():
            logits = torch.cat([model(part) for part in images.split(batch_size)])
        if logits.dim() != 2 or len(logits) != len(images):
            raise ValueError(f"a model must give logits [{len(images)}, K], got shape {tuple(logits.shape)}")
        ties = logits == logits.max(dim=1, keepdim=True).values
        rows.append(_first(ties))
    return torch.stack(rows)


def modal_label(predicted: Tensor) -> Tensor:
    """The label that most replicas give each image; the smallest of them where several are given equally often.

    Args:
        predicted: int64 ``[R, N]``.

    Returns:
        int64 ``[N]``.

    >>> modal_label(torch.tensor([[1, 2], [1, 0], [3, 0]])).tolist()
    [1, 0]
    """
    table, classes = check_predictions(None, None, predicted=predicted)
    counts = _counts(table, classes)
    return _first(counts == counts.max(dim=1, keepdim=True).values)


@dataclass(frozen=True, eq=False)
class Exemplars:
    """Images on which two populations part, the furthest apart first, then by position.

    Attributes:
        index: int64 ``[M]`` positions among the images.
        original, compressed: int64 ``[M]`` modal label of each population (the smallest of tied ones).
        distance: float64 ``[M]`` total variation between the two populations' shares of answers, in (0, 1]; 1 where no
            answer occurs in both.
    """

    index: Tensor
    original: Tensor
    compressed: Tensor
    distance: Tensor

    def __len__(self) -> int:
        return len(self.index)


def find_exemplars(original: Tensor, compressed: Tensor) -> Exemplars:
    """Compression-identified exemplars (PIEs): images whose most frequent label differs between two populations.

    The labels of the data are not asked: an exemplar is where the populations part, whoever is right. With ties no side
    is favoured: an image counts only if *no* label is among the most frequent ones of both populations.

    Args:
        original: int64 ``[R, N]`` predicted labels, one row a replica.
        compressed: int64 ``[S, N]`` of the same images; S may differ from R.

    Raises:
        TypeError: not int64 tensors. ValueError: shapes that do not fit, a negative label.

    Source: Hooker et al. 2019, section 3.2 (there with 30 models a population, and silent about ties).

    >>> before = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 0, 5]])
    >>> after = torch.tensor([[1, 0, 5], [7, 0, 3], [1, 2, 3]])
    >>> found = find_exemplars(before, after)
    >>> found.index.tolist(), found.original.tolist(), found.compressed.tolist()
    ([1], [2], [0])
    """
    first, second, classes = check_predictions(None, None, original=original, compressed=compressed)
    a, b = _counts(first, classes), _counts(second, classes)
    top_a, top_b = (c == c.max(dim=1, keepdim=True).values for c in (a, b))
    index = (~(top_a & top_b).any(dim=1)).nonzero().flatten()
    # Whole numbers over one common denominator, so that equal distances sort by position.
    apart = (a * len(second) - b * len(first)).abs().sum(dim=1)[index]
    index = index[torch.argsort(-apart, stable=True)]
    distance = apart.sort(descending=True).values.double() / (2 * len(first) * len(second))
    return Exemplars(index, _first(top_a[index]), _first(top_b[index]), distance)


@dataclass(frozen=True, eq=False)
class ExemplarControl:
    """How many exemplars there are, and how many would be there without compression.

    Attributes:
        observed: between all originals and all compressed replicas.
        within: int64 ``[draws]``, between two random halves of the originals: what seeds alone make.
        between: int64 ``[draws]``, between the first of those halves and the compressed replicas of the second half's
            seeds: the same design with compression added. Compare its mean with that of ``within``. The draws share
            replicas, so their scatter gives no interval.
        distance: mean over all images of the total variation between the two populations' answers, in [0, 1].
        shuffled: float64 ``[draws]``, the same after original and compressed were swapped within randomly chosen seeds:
            what it would be if compression changed nothing but the draw of a seed. (The count of exemplars would be a
            poor measure here: a majority keeps its label until half of the seeds are swapped.)
        p_value: share of shuffles that reach ``distance``, the observed one included. With R seeds it cannot be
            less than about 1 / 2^(R−1).
    """

    observed: int
    within: Tensor
    between: Tensor
    distance: float
    shuffled: Tensor
    p_value: float


def exemplar_control(original: Tensor, compressed: Tensor, *, draws: int = 200, seed: int = 0) -> ExemplarControl:
    """Count exemplars against two controls, since two groups of differently seeded networks part on some images anyway.

    Args:
        original, compressed: int64 ``[R, N]`` predicted labels, R ≥ 2, the same seeds in the same order.
        draws: random halves, and random swaps, at least 1.
        seed: of the draws.

    Raises:
        TypeError: not int64 tensors. ValueError: shapes that do not fit, R < 2, draws < 1.

    >>> same = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 1]])
    >>> control = exemplar_control(same, same.flip(1), draws=50)
    >>> control.observed, int(control.within.max()), int(control.between.min())
    (2, 0, 2)
    """
    first, second, classes = check_predictions(None, None, original=original, compressed=compressed)
    replicas, images = first.shape
    if first.shape != second.shape or replicas < 2:
        raise ValueError(
            f"the control needs at least two seeds, the same in both populations; got {replicas} originals and "
            f"{len(second)} compressed"
        )
    if not isinstance(draws, int) or isinstance(draws, bool) or draws < 1:
        raise ValueError(f"draws must be an integer of at least 1, got {draws!r}")

    def apart(a: Tensor, b: Tensor) -> int:
        return int((_counts(a, classes) - _counts(b, classes)).abs().sum())

    generator = torch.Generator().manual_seed(seed)
    within, between, shuffled = [], [], []
    for _ in range(draws):
        order = torch.randperm(replicas, generator=generator)
        one, other = order[: replicas // 2], order[replicas // 2 : 2 * (replicas // 2)]
        within.append(len(find_exemplars(first[one], first[other])))
        between.append(len(find_exemplars(first[one], second[other])))
        swap = torch.rand(replicas, 1, generator=generator) < 0.5
        shuffled.append(apart(torch.where(swap, second, first), torch.where(swap, first, second)))
    # Whole numbers until here, so that a shuffle that swaps nothing, or all, is a tie and not rounding.
    p_value = (1 + sum(value >= apart(first, second) for value in shuffled)) / (1 + draws)
    share = 2 * replicas * images
    return ExemplarControl(
        observed=len(find_exemplars(first, second)),
        within=torch.tensor(within),
        between=torch.tensor(between),
        distance=apart(first, second) / share,
        shuffled=torch.tensor(shuffled, dtype=torch.float64) / share,
        p_value=p_value,
    )


@dataclass(frozen=True, eq=False)
class Forgotten:
    """Images that the originals know and compressed replicas get wrong, the most often forgotten first.

    Attributes:
        index: int64 ``[M]`` positions among the images.
        wrong: int64 ``[M]`` how many compressed replicas get it wrong.
        wrong_original: int64 ``[M]`` how many originals do (0 unless ``least_right`` was lowered).
        answer: int64 ``[M]`` the wrong label that compressed replicas give most often (the smallest of tied ones).
    """

    index: Tensor
    wrong: Tensor
    wrong_original: Tensor
    answer: Tensor

    def __len__(self) -> int:
        return len(self.index)


def forgotten(original: Tensor, compressed: Tensor, labels: Tensor, *, least_right: float = 1.0) -> Forgotten:
    """Images that only the compressed models get wrong, ranked by how many replicas do.

    Args:
        original: int64 ``[R, N]`` predicted labels. compressed: int64 ``[S, N]``. labels: int64 ``[N]``.
        least_right: the share of originals, in (0, 1], that must be right for the image to count as known.

    Raises:
        TypeError: not int64 tensors. ValueError: shapes that do not fit, a share outside (0, 1].

    >>> labels = torch.tensor([0, 1, 2])
    >>> found = forgotten(torch.tensor([[0, 1, 2], [0, 1, 0]]), torch.tensor([[0, 2, 0], [1, 2, 0]]), labels)
    >>> found.index.tolist(), found.wrong.tolist(), found.answer.tolist()
    ([1, 0], [2, 1], [2, 1])
    """
    if not 0 < least_right <= 1:
        raise ValueError(f"least_right must be in (0, 1], got {least_right!r}")
    first, second, truth, _ = check_predictions(labels, None, original=original, compressed=compressed)
    wrong_original, wrong = (first != truth).sum(dim=0), (second != truth).sum(dim=0)
    known = len(first) - wrong_original >= least_right * len(first) - 1e-9
    index = (known & (wrong > 0)).nonzero().flatten()
    index = index[torch.argsort(-wrong[index], stable=True)]
    counts = _counts(second[:, index], int(max(second.max(), truth.max())) + 1)
    counts.scatter_(1, truth[index][:, None], 0)
    answer = _first(counts == counts.max(dim=1, keepdim=True).values)
    return Forgotten(index, wrong[index], wrong_original[index], answer)


def _counts(table: Tensor, classes: int) -> Tensor:
    """Of predicted labels [R, N], how many replicas gave each label: int64 [N, K]."""
    counts = torch.zeros(table.shape[1], classes, dtype=torch.int64)
    return counts.scatter_add_(1, table.T, torch.ones_like(table.T))


def _first(mask: Tensor) -> Tensor:
    """Of a bool [N, K], the first True of each row; argmax alone leaves open which of equals it takes."""
    places = torch.arange(mask.shape[1], 0, -1, device=mask.device)
    return (mask * places).argmax(dim=1)
