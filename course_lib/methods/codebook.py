"""Codebooks: many weights share few values, found by k-means and then trained (Deep Compression's second stage).

Han, Mao, Dally 2016, "Deep Compression": each layer's weights are clustered into 2^b values in one dimension, with
centroids that start evenly spaced between the smallest and the largest weight (the initialisation that kept large
weights best). Afterwards only the centroids are trained: a centroid's gradient is the sum of the gradients of the
weights that share it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from course_lib.methods.layers import MadeWeight, new_like, plain, replace_layers
from course_lib.methods.quantization import check_real

__all__ = ["Codebook", "SharedConv2d", "SharedLinear", "kmeans_codebook", "plain", "share_weights"]


@dataclass(frozen=True, eq=False)
class Codebook:
    """``centroids`` [K] in ascending order and ``index`` (int64, the weight's shape): which centroid stands where."""

    centroids: Tensor
    index: Tensor

    def values(self) -> Tensor:
        """The weight that the codebook describes."""
        return self.centroids[self.index]


def kmeans_codebook(
    weight: Tensor, bits: int = 4, *, keep_zeros: bool = True, iterations: int = 50, dtype: torch.dtype | None = None
) -> Codebook:
    """Cluster the values of ``weight`` into at most 2^bits shared ones by Lloyd's iteration in one dimension.

    Args:
        weight: finite floating-point tensor of any shape, not empty.
        bits: width of an index, 1 to 8.
        keep_zeros: zeros stay exactly zero and take one of the 2^bits entries (if there are any): a pruned weight
            stays so.
        iterations: at most so many rounds, at least 1; it ends earlier when no assignment changes.
        dtype: round the centroids to this type (say ``torch.float16``, half the bytes in a file) before they are used.

    Returns:
        :class:`Codebook`, centroids in the dtype of ``weight``; fewer than 2^bits if the weight has fewer distinct
        values.

    >>> book = kmeans_codebook(torch.tensor([0.9, 1.1, 0.0, -2.0, -2.2]), bits=2)
    >>> [round(c, 3) for c in book.centroids.tolist()], book.index.tolist()
    ([-2.1, 0.0, 1.0], [2, 2, 1, 0, 0])
    """
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"bits must be an integer from 1 to 8, got {bits!r}")
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be from 1 to 8, got {bits}")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations must be an integer of at least 1, got {iterations!r}")
    values = check_real(weight, "weight").double().flatten().cpu().numpy()
    has_zeros = keep_zeros and bool((values == 0).any())
    free = values[values != 0] if has_zeros else values
    centroids = lloyd(np.sort(free), 2**bits - has_zeros, iterations)
    if dtype is not None:
        centroids = torch.from_numpy(centroids).to(dtype).double().numpy()
        if not np.isfinite(centroids).all():
            raise ValueError(f"weights up to {np.abs(values).max():g} do not fit into {dtype}")
    centroids = np.unique(np.append(centroids, 0.0) if has_zeros else centroids)
    index = nearest(values, centroids)
    if has_zeros:
        zero = int(np.searchsorted(centroids, 0.0))
        # A small weight may lie nearest to zero; it stays a weight, or pruning would go on unasked.
        away = free_index(values, np.delete(centroids, zero))
        index = np.where(values == 0, zero, away + (away >= zero)) if len(centroids) > 1 else index
    used, index = np.unique(index, return_inverse=True)
    shared = torch.from_numpy(centroids[used]).to(weight.device, weight.dtype)
    return Codebook(shared, torch.from_numpy(index.reshape(weight.shape)).to(weight.device))


def nearest(values: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Index of the nearest of ascending ``centroids``."""
    return np.searchsorted((centroids[1:] + centroids[:-1]) / 2, values)


def free_index(values: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """As :func:`nearest`; zeros everywhere if there is no centroid."""
    return nearest(values, centroids) if len(centroids) else np.zeros(values.shape, dtype=np.int64)


def lloyd(ordered: np.ndarray, clusters: int, iterations: int) -> np.ndarray:
    """Centroids of ascending values; clusters that run empty are dropped."""
    if clusters == 0 or len(ordered) == 0:
        return np.zeros(0)
    distinct = np.unique(ordered)
    if len(distinct) <= clusters:
        return distinct
    centroids = np.linspace(ordered[0], ordered[-1], clusters) if clusters > 1 else np.array([ordered.mean()])
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    last = None
    for _ in range(iterations):
        edges = np.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2)
        cuts = np.concatenate([[0], edges, [len(ordered)]])
        if last is not None and np.array_equal(cuts, last):
            break
        last, sizes = cuts, np.diff(cuts)
        means = np.diff(sums[cuts]) / np.maximum(sizes, 1)
        centroids = np.where(sizes > 0, means, centroids)
    return np.unique(centroids[sizes > 0])


class Shared(MadeWeight):
    """The weight is ``centroids[index]``; the index is fixed and the centroids are what the optimiser moves."""

    def __init__(self, *args, codebook: Codebook, entries: int, **kwargs):
        super().__init__(*args, **kwargs)
        del self.weight
        # Filled up with unused zeros to one length, so that replicas with different codebooks can be stacked.
        centroids = nn.functional.pad(codebook.centroids, (0, entries - len(codebook.centroids)))
        self.centroids = nn.Parameter(centroids)
        self.register_buffer("index", codebook.index.clone())
        # Zero is no centroid to train: what was pruned stays pruned.
        self.register_buffer("moves", (centroids != 0).to(centroids.dtype))

    def made_weight(self) -> Tensor:
        return (self.centroids * self.moves)[self.index]


class SharedLinear(Shared, nn.Linear):
    """``nn.Linear`` whose weights share trained values; made by :func:`share_weights`."""


class SharedConv2d(Shared, nn.Conv2d):
    """``nn.Conv2d`` whose weights share trained values; made by :func:`share_weights`."""


def share_weights(
    model: nn.Module, bits: int | dict[str, int] = 4, *, keep_zeros: bool = True, iterations: int = 50
) -> nn.Module:
    """A copy of ``model`` whose linear and convolution weights come from one codebook a layer, ready for fine-tuning.

    Args:
        model: a trained network, perhaps pruned; it is not modified.
        bits: width of the indices, 1 to 8, for all layers or by layer name (layers not named stay as they are).
        keep_zeros, iterations: see :func:`kmeans_codebook`.

    Returns:
        The copy; its trainable parameters are the centroids and the biases. :func:`plain` gives ordinary layers back.

    >>> shared = share_weights(nn.Linear(20, 10), bits=2)
    >>> sorted(name for name, _ in shared.named_parameters()), shared.made_weight().unique().numel() <= 4
    (['bias', 'centroids'], True)
    """
    names = {name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    if isinstance(bits, dict) and set(bits) - names:
        unknown = sorted(set(bits) - names)
        raise ValueError(f"bits names no linear or convolution layer: {unknown} (there are: {sorted(names)})")

    def convert(name: str, layer: nn.Module) -> nn.Module:
        if isinstance(layer, MadeWeight):
            raise ValueError(f"{name} is {type(layer).__name__} already; take plain(model) first")
        if isinstance(bits, dict) and name not in bits:
            return layer
        width = bits[name] if isinstance(bits, dict) else bits
        book = kmeans_codebook(layer.weight.detach(), width, keep_zeros=keep_zeros, iterations=iterations)
        kind = SharedConv2d if isinstance(layer, nn.Conv2d) else SharedLinear
        return new_like(layer, kind, book.values(), codebook=book, entries=2**width)

    return replace_layers(model, convert)
