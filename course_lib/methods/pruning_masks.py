"""Scores and masks: which weights matter, and which of them stay. Pure functions on tensors.

A score says how much a weight is worth (higher is better, same shape as the weight). A mask says what stays (``True``)
and what goes (``False``). The two are separate, so that a new criterion needs no new mask.
"""

import numbers

import torch
from torch import Tensor

__all__ = ["magnitude_score", "nm_mask", "random_score", "rank_mask", "taylor_score", "threshold_mask"]


def check_share(value: float, name: str) -> float:
    """``value`` as a float, if it is a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number in [0, 1), got {value!r} ({type(value).__name__})")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")
    return float(value)


def check_weight(weight: Tensor, name: str = "weight", *, finite: bool = True) -> Tensor:
    """``weight`` without its gradient history, if it is a non-empty real tensor without NaN (by default: finite)."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(weight).__name__}")
    if weight.dtype is torch.bool or weight.is_complex():
        raise TypeError(f"{name} must hold real numbers, got dtype {weight.dtype}, shape {tuple(weight.shape)}")
    if weight.numel() == 0:
        raise ValueError(f"{name} is empty, shape {tuple(weight.shape)}: there is nothing to prune")
    weight = weight.detach()
    bad = ~torch.isfinite(weight) if finite else torch.isnan(weight)
    if bad.any():
        kind = "NaN or infinite" if finite else "NaN"
        raise ValueError(f"{name} has {int(bad.sum())} {kind} entries of {weight.numel()}, shape {tuple(weight.shape)}")
    return weight


def magnitude_score(weight: Tensor) -> Tensor:
    """How far each weight is from zero: ``|w|``, any shape (Han et al. 2015).

    >>> magnitude_score(torch.tensor([0.5, -2.0]))
    tensor([0.5000, 2.0000])
    """
    return check_weight(weight).abs()


def taylor_score(weight: Tensor, grad: Tensor | None) -> Tensor:
    """How much the loss moves when a weight is set to zero, to first order: ``|w · ∂L/∂w|``.

    ``L(w = 0) − L(w) ≈ −w · ∂L/∂w`` is the first term of the Taylor series (Molchanov et al. 2017, 2019).

    Args:
        weight: any shape.
        grad: the loss's gradient, the same shape: ``weight.grad`` after ``loss.backward()``.

    >>> taylor_score(torch.tensor([2.0, -3.0]), torch.tensor([0.5, 0.0]))
    tensor([1., 0.])
    """
    if grad is None:
        raise ValueError("grad is None: call loss.backward() first, and give weight.grad")
    weight, grad = check_weight(weight), check_weight(grad, "grad")
    if weight.shape != grad.shape:
        raise ValueError(f"grad must have the weight's shape {tuple(weight.shape)}, got {tuple(grad.shape)}")
    return (weight * grad).abs()


def random_score(weight: Tensor, *, seed: int = 0) -> Tensor:
    """A uniform score in [0, 1) that knows nothing: the baseline every criterion has to beat.

    The same shape and seed give the same score; torch's global generator is left as it was.
    """
    weight = check_weight(weight)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def threshold_mask(weight: Tensor, alpha: float) -> Tensor:
    """The article's formula (section 3.1): ``M = 1[|W| > α · max|W|]``.

    How many weights go depends on the largest one: a single outlier can prune all the others.

    Args:
        weight: any shape, finite.
        alpha: threshold as a share of the largest magnitude, in [0, 1). 0 prunes exact zeros alone.

    Returns:
        A bool mask of the weight's shape, ``True`` where the weight stays.

    >>> threshold_mask(torch.tensor([0.9, -0.8, 0.1, -0.3]), 0.5)
    tensor([ True,  True, False, False])
    """
    alpha, weight = check_share(alpha, "alpha"), check_weight(weight)
    return weight.abs() > alpha * weight.abs().max()


def rank_mask(score: Tensor, sparsity: float) -> Tensor:
    """Prune the lowest scores: exactly ``round(sparsity * score.numel())`` of them.

    ``round`` is Python's (a half goes to the even number), as in ``torch.nn.utils.prune``. Of equal scores the one that
    comes first in memory order goes first, so the same input always gives the same mask.

    Args:
        score: higher is worth more; any shape; infinities are fine, NaN is not.
        sparsity: share to prune, in [0, 1).

    Returns:
        A bool mask of the score's shape, ``True`` where the weight stays.

    >>> rank_mask(torch.tensor([0.9, 0.8, 0.1, 0.3]), 0.5)
    tensor([ True,  True, False, False])
    """
    sparsity, score = check_share(sparsity, "sparsity"), check_weight(score, "score", finite=False)
    flat, pruned = score.flatten(), round(sparsity * score.numel())
    if pruned == 0:
        return torch.ones_like(score, dtype=torch.bool)
    # Selecting the threshold is about ten times as fast as sorting all scores, and pruning while training ranks often.
    threshold = flat.kthvalue(pruned).values
    mask = flat > threshold
    equal = (flat == threshold).nonzero().flatten()
    mask[equal[pruned - int((flat < threshold).sum()) :]] = True
    return mask.view(score.shape)


def nm_mask(score: Tensor, n: int, m: int) -> Tensor:
    """Keep the ``n`` highest of every ``m`` consecutive scores along the input dimension (Mishra et al. 2021).

    Sparse tensor cores want 2:4 *along the sum* of the matrix product: dimension 1 of a linear weight ``[out, in]`` or
    of a convolution's ``[out, in, kh, kw]``; a vector has only dimension 0. Of equal scores the first goes first.

    Args:
        score: ``[out, in, ...]`` or ``[in]``; ``in`` must be a multiple of ``m``.
        n: how many stay, 1 ≤ n ≤ m.
        m: length of a group.

    Returns:
        A bool mask of the score's shape with exactly ``n`` True in every group.

    >>> nm_mask(torch.tensor([[0.9, 0.1, 0.4, 0.3]]), 2, 4)
    tensor([[ True, False,  True, False]])
    """
    for name, value in (("n", n), ("m", m)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
    if not 1 <= n <= m:
        raise ValueError(f"n:m needs 1 <= n <= m, got {n}:{m}")
    score = check_weight(score, "score", finite=False)
    if score.dim() == 0:
        raise ValueError("score must have an input dimension, got a single number (shape ())")
    dim = min(1, score.dim() - 1)
    if score.shape[dim] % m:
        raise ValueError(
            f"{n}:{m} needs an input dimension that is a multiple of {m}, "
            f"got {score.shape[dim]} (dimension {dim} of shape {tuple(score.shape)})"
        )
    groups = score.movedim(dim, -1).unflatten(-1, (-1, m))
    lowest = groups.argsort(dim=-1, stable=True)[..., : m - n]
    mask = torch.ones_like(groups, dtype=torch.bool).scatter(-1, lowest, False)
    return mask.flatten(-2).movedim(-1, dim).contiguous()
