"""Codebooks: many weights share few values, found by k-means and then trained ("Deep Compression", Han et al. 2016).

Each layer's weights are clustered into 2^b values, with centroids that start evenly spaced between the smallest and the
largest weight. Then only the centroids are trained: each gets the sum of the gradients of the weights that share it.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from course_lib.gate import new_like, replace_layers, whole_number
from course_lib.methods.quantization import check_real, naming
from course_lib.methods.quantized_layers import MadeWeight, bits_by_layer, plain, refuse_made

__all__ = ["Codebook", "SharedConv2d", "SharedLinear", "kmeans_codebook", "plain", "share_weights"]


@dataclass(frozen=True, eq=False)
class Codebook:
    """``centroids`` [K] in ascending order and ``index`` (int64, the weight's shape): which centroid stands where."""

    centroids: Tensor
    index: Tensor

    def values(self) -> Tensor:
        """The weight that the codebook describes."""
        return self.centroids[self.index]


def kmeans_codebook(weight: Tensor, bits: int = 4, *, keep_zeros: bool = True, iterations: int = 50) -> Codebook:
    """Cluster ``weight`` (finite floats) into at most 2^bits (bits 1 to 8) shared values, by Lloyd's iteration.

    With ``keep_zeros`` zeros stay exactly zero and take one entry; a small weight goes to the nearest other centroid.
    It ends after ``iterations`` rounds, or when no centroid moves. The centroids have the weight's dtype.

    >>> book = kmeans_codebook(torch.tensor([0.9, 1.1, 0.0, -2.0, -2.2]), bits=2)
    >>> [round(c, 3) for c in book.centroids.tolist()], book.index.tolist()
    ([-2.1, 0.0, 1.0], [2, 2, 1, 0, 0])
    """
    entries = 2 ** whole_number(bits, "bits", 1, 8)
    iterations = whole_number(iterations, "iterations")
    values = check_real(weight, "weight").double().flatten()
    zero = (values == 0) & keep_zeros
    ordered = values[~zero].sort().values
    centroids = lloyd(ordered, entries - bool(zero.any()), iterations).to(weight.dtype).double()
    nearest = torch.bucketize(values, (centroids[1:] + centroids[:-1]) / 2)
    shared = torch.where(zero, 0.0, centroids[nearest])
    centroids, index = shared.to(weight.dtype).unique(return_inverse=True)
    return Codebook(centroids, index.view(weight.shape))


def lloyd(ordered: Tensor, clusters: int, iterations: int) -> Tensor:
    """Centroids of ascending values, float64; clusters that run empty are dropped.

    A cluster is a stretch of the values, between the middles of its centroid and the neighbouring ones.

    >>> lloyd(torch.tensor([0.0, 1.0, 8.0, 10.0]).double(), 2, 10).tolist()
    [0.5, 9.0]
    """
    distinct = ordered.unique()
    if len(distinct) <= clusters:
        return distinct if len(distinct) else torch.zeros(1).to(ordered)
    centroids = torch.linspace(ordered[0], ordered[-1], clusters, dtype=ordered.dtype)
    sums = nn.functional.pad(ordered.cumsum(0), (1, 0))
    ends = torch.tensor([0, len(ordered)], device=ordered.device)
    for _ in range(iterations):
        edges = torch.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2)
        cuts = torch.cat([ends[:1], edges, ends[1:]])
        sizes, before = cuts.diff(), centroids
        means = sums[cuts].diff() / sizes.clamp(min=1)
        centroids = torch.where(sizes > 0, means, before)
        if torch.equal(centroids, before):
            break
    return centroids[sizes > 0].unique()


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
    """Made by :func:`share_weights`."""


class SharedConv2d(Shared, nn.Conv2d):
    """Made by :func:`share_weights`."""


def share_weights(
    model: nn.Module, bits: int | dict[str, int] = 4, *, skip: Collection[str] = (), **options
) -> nn.Module:
    """A copy of ``model`` whose linear and convolution weights come from one codebook a layer, ready for fine-tuning.

    Its parameters are the centroids and the biases; :func:`plain` gives ordinary layers back. Tied layers stay tied.
    ``bits``, 1 to 8, are for all layers or by name (others, and those in ``skip``, stay as they are); ``options`` are
    those of :func:`kmeans_codebook`. UnsupportedModel: see :func:`~course_lib.gate.replace_layers`.

    >>> shared = share_weights(nn.Linear(20, 10), bits=2)
    >>> sorted(name for name, _ in shared.named_parameters()), shared.made_weight().unique().numel() <= 4
    (['bias', 'centroids'], True)
    """
    widths, skip = bits_by_layer(model, bits, "bits", 1, skip)

    def convert(name: str, layer: nn.Module) -> nn.Module:
        refuse_made(name, layer)
        with naming(name):
            book = kmeans_codebook(layer.weight, widths[name], **options)
        kind = SharedConv2d if isinstance(layer, nn.Conv2d) else SharedLinear
        return new_like(layer, kind, book.values(), codebook=book, entries=2 ** widths[name])

    return replace_layers(model, convert, skip=skip, doing="share the weights of")
