"""How many answers changed? Accuracy may stand still while a model breaks some answers and repairs as many."""

from dataclasses import dataclass

import torch
from torch import Tensor

from course_lib.evidence.classes import check_predictions

__all__ = ["Flips", "agreement", "churn", "flips", "pairwise_churn"]


def churn(a: Tensor, b: Tensor) -> Tensor:
    """Share of images on which a model's answer changed: accuracy may stand still while it moves.

    Args:
        a, b: int64 ``[N]`` or ``[R, N]`` predicted labels of the same shape; row r of one against row r of the other.

    Returns:
        float64 ``[R]`` in [0, 1], ``[1]`` for single models.

    Raises:
        TypeError: not int64 tensors. ValueError: shapes that differ.

    Source: Milani Fard et al. 2016, "Launch and Iterate: Reducing Prediction Churn".

    >>> churn(torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 1, 2, 0]])).tolist()
    [0.25]
    """
    first, second, _ = check_predictions(None, None, a=a, b=b)
    if first.shape != second.shape:
        raise ValueError(f"a and b must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    return (first != second).double().mean(dim=1)


def agreement(a: Tensor, b: Tensor) -> Tensor:
    """Share of images on which the answer stayed: 1 − :func:`churn`, in [0, 1]; float64 ``[R]``.

    >>> agreement(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 0])).tolist()
    [0.75]
    """
    return 1 - churn(a, b)


def pairwise_churn(predicted: Tensor) -> Tensor:
    """Churn between every two replicas of one population: the yardstick, for another seed churns too.

    Args:
        predicted: int64 ``[R, N]``, R ≥ 2.

    Returns:
        float64 ``[R·(R − 1)/2]``, pairs in the order (0, 1), (0, 2), ..., (1, 2), ...

    >>> pairwise_churn(torch.tensor([[0, 1], [0, 1], [1, 1]])).tolist()
    [0.0, 0.5, 0.5]
    """
    table, _ = check_predictions(None, None, predicted=predicted)
    if len(table) < 2:
        raise ValueError(f"pairs need at least two replicas, got predicted of shape {tuple(predicted.shape)}")
    i, j = torch.triu_indices(len(table), len(table), offset=1)
    return churn(table[i], table[j])


@dataclass(frozen=True, eq=False)
class Flips:
    """Churn by kind, float64 ``[R]`` each: right → wrong, wrong → right, wrong → otherwise wrong. Together: the churn.

    ``broken − repaired`` is the accuracy that was lost.
    """

    broken: Tensor
    repaired: Tensor
    moved: Tensor


def flips(a: Tensor, b: Tensor, labels: Tensor) -> Flips:
    """Sort the answers that changed from ``a`` to ``b`` by what the change did. Arguments and errors as in churn.

    >>> found = flips(torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 3, 3]), torch.tensor([0, 1, 3, 1]))
    >>> found.broken.item(), found.repaired.item(), found.moved.item()
    (0.25, 0.25, 0.25)
    """
    churn(a, b)
    first, second, truth, _ = check_predictions(labels, None, a=a, b=b)
    before, after = first == truth, second == truth
    kinds = (before & ~after, ~before & after, ~before & ~after & (first != second))
    return Flips(*(kind.double().mean(dim=1) for kind in kinds))
