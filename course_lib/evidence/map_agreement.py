"""Do two maps say the same? By the order of all pixels, and by which ones come first."""

import torch
from torch import Tensor

__all__ = ["rank_correlation", "top_k_chance", "top_k_overlap"]


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation between two maps of each image; tied pixels share the mean of their ranks.

    Args:
        a, b: ``[N, H, W]`` (or ``[N, P]``), real and finite, of one shape with at least two pixels. Signed maps are
            compared with their sign; give ``a.abs()`` to compare magnitudes.

    Returns:
        float64 ``[N]`` in [−1, 1], 0 on average for unrelated maps. NaN where a map is constant: it has no order.

    Raises:
        TypeError: not tensors. ValueError: shapes that do not fit, fewer than two pixels, NaN or infinity.

    Source: Spearman 1904; used for maps by Adebayo et al. 2018.

    >>> rank_correlation(torch.tensor([[[1.0, 2.0, 2.0, 9.0]]]), torch.tensor([[[0.0, 3.0, 3.0, 4.0]]]))
    tensor([1.], dtype=torch.float64)
    """
    first, second = _pixels(a, b)
    ranks = [rank - rank.mean(dim=1, keepdim=True) for rank in (_ranks(first), _ranks(second))]
    norms = [rank.pow(2).sum(dim=1) for rank in ranks]
    # 0 / 0 gives the NaN that a constant map deserves.
    return ((ranks[0] * ranks[1]).sum(dim=1) / (norms[0] * norms[1]).sqrt()).clamp(-1, 1)


def top_k_overlap(a: Tensor, b: Tensor, *, k: int | None = None, share: float | None = None) -> Tensor:
    """Share of the k highest pixels of one map that are among the k highest of the other, for each image.

    Where pixels tie for the last places, each map draws among them at random and the expected overlap is returned: two
    constant maps overlap by chance, k / P, and not wholly.

    Args:
        a, b: as for :func:`rank_correlation`. Give ``a.abs()`` for magnitudes of signed maps.
        k: pixels from 1 to P; or
        share: of all pixels, in (0, 1], rounded to the nearest k of at least 1. One of the two must be given.

    Returns:
        float64 ``[N]`` in [0, 1]. Unrelated maps reach :func:`top_k_chance`, k / P, on average.

    Raises:
        TypeError, ValueError: as for :func:`rank_correlation`; not exactly one of k and share, or one out of range.

    >>> a, b = torch.tensor([[[9.0, 8.0, 1.0, 0.0]]]), torch.tensor([[[9.0, 1.0, 8.0, 0.0]]])
    >>> top_k_overlap(a, b, k=2).item(), top_k_chance(4, k=2)
    (0.5, 0.5)
    """
    first, second = _pixels(a, b)
    k = _count(first.shape[1], k, share)
    return (_chosen(first, k) * _chosen(second, k)).sum(dim=1) / k


def top_k_chance(pixels: int, *, k: int | None = None, share: float | None = None) -> float:
    """The overlap that :func:`top_k_overlap` gives unrelated maps of P ``pixels`` on average: k / P.

    >>> top_k_chance(64, share=0.1)  # six of 64
    0.09375
    """
    return _count(pixels, k, share) / pixels


def _ranks(rows: Tensor) -> Tensor:
    """Mean ranks along the last dimension, from 1: below + (equal + 1) / 2."""
    ordered = rows.sort(dim=1).values
    below = torch.searchsorted(ordered, rows, right=False)
    upto = torch.searchsorted(ordered, rows, right=True)
    return (below + upto + 1).double() / 2


def _chosen(rows: Tensor, k: int) -> Tensor:
    """Each pixel's chance to be among the k highest: 1, 0, or a share of the places left for those that tie."""
    last = rows.topk(k, dim=1).values[:, -1:]
    above, tied = rows > last, rows == last
    left = k - above.sum(dim=1, keepdim=True)
    return above.double() + tied.double() * left / tied.sum(dim=1, keepdim=True)


def _count(pixels: int, k: int | None, share: float | None) -> int:
    if (k is None) == (share is None):
        raise ValueError(f"give either k or share, got {k=} and {share=}")
    if share is not None:
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], got {share!r}")
        return max(1, round(share * pixels))
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= pixels:
        raise ValueError(f"k must be from 1 to the number of pixels, {pixels}; got {k!r}")
    return k


def _pixels(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    for name, value in (("a", a), ("b", b)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor of maps [N, H, W], got {type(value).__name__}")
    if a.shape != b.shape or a.dim() < 2 or a[0:1].numel() < 2:
        raise ValueError(
            f"a and b must be maps of one shape [N, H, W] with two pixels or more, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )
    rows = tuple(value.detach().double().flatten(1).contiguous() for value in (a, b))
    for name, value in zip("ab", rows, strict=True):
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} must be finite, got {int((~torch.isfinite(value)).sum())} NaN or infinite values")
    return rows
