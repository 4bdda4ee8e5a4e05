"""Low rank: one wide layer as two thin ones, by the singular value decomposition."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from course_lib.gate import (  # isort: skip
    UnsupportedModel, check_model, own_forward, real_tensor, replace_layers, weight_layers, whole_number,
)  # fmt: skip

__all__ = ["factorize", "rank_for_bytes"]


def factorize(layer: nn.Module, rank: int | Mapping[str, int]) -> nn.Sequential | nn.Module:
    """The best layer of this rank: ``W = U Σ Vᵀ ≈ (U √Σ)(√Σ Vᵀ)``, two thin layers (Eckart & Young 1936).

    A linear layer becomes ``Linear(in, rank)`` and ``Linear(rank, out)``; an ungrouped ``nn.Conv2d`` a convolution to
    ``rank`` channels and a 1×1 convolution (Denil et al. 2013). A model is copied; ``rank``, in [1, min(out, in·kh·kw)]
    may then be ``{name: rank}``; one number leaves the layers that it would not make smaller as they are.
    UnsupportedModel: see :mod:`course_lib.gate`; groups. ValueError: a rank or name that does not fit, NaN weights.

    >>> [tuple(thin.weight.shape) for thin in factorize(nn.Linear(100, 50), 8)]
    [(8, 100), (50, 8)]
    """
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        return _factorize_model(layer, rank)
    matrix = _matrix(layer, rank)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return _thin_layers(layer, root[:, None] * v[:rank], u[:, :rank] * root)


def rank_for_bytes(layer: nn.Linear | nn.Conv2d, budget: int) -> int:
    """The largest rank whose two thin weights take at most ``budget`` bytes: ``r · (out + in·kh·kw) · bytes each``.

    >>> rank_for_bytes(nn.Linear(100, 50), 5000)
    8
    """
    rows, columns = layer.weight.flatten(1).shape
    one = (rows + columns) * layer.weight.element_size()
    if budget < one:
        raise ValueError(f"rank 1 takes {one} bytes, the budget is {budget}")
    return min(int(budget // one), rows, columns)


def _matrix(layer: nn.Linear | nn.Conv2d, rank: int) -> Tensor:
    check_model(layer, "factorize")
    if getattr(layer, "groups", 1) > 1 or own_forward(layer) or hasattr(layer, "made_weight"):
        need = "a layer without groups, without a forward of its own, whose weight is a parameter"
        raise UnsupportedModel(f"cannot factorize {layer}: {need}, is needed")
    matrix = real_tensor(layer.weight, "weight").flatten(1)
    whole_number(rank, f"rank of a weight {tuple(matrix.shape)}", 1, min(matrix.shape))
    return matrix


def _thin_layers(layer: nn.Linear | nn.Conv2d, first: Tensor, second: Tensor) -> nn.Sequential:
    rank = len(first)
    if isinstance(layer, nn.Conv2d):
        where = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, 1, False, layer.padding_mode)
        a, b = nn.Conv2d(layer.in_channels, rank, *where), nn.Conv2d(rank, layer.out_channels, 1)
    else:
        a, b = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features)
    for new, matrix in ((a, first), (b, second)):
        values = matrix.view_as(new.weight).to(layer.weight).contiguous()
        new.weight = nn.Parameter(values, layer.weight.requires_grad)
    b.bias = copy.deepcopy(layer.bias)
    return nn.Sequential(a, b).train(layer.training)


def _factorize_model(model: nn.Module, rank: int | Mapping[str, int]) -> nn.Module:
    ranks = rank if isinstance(rank, Mapping) else dict.fromkeys(weight_layers(model), rank)
    if unknown := sorted(ranks.keys() - weight_layers(model).keys()):
        raise ValueError(f"rank names no linear or convolution layer of the model: {unknown}")

    def convert(name: str, layer: nn.Module) -> nn.Module:
        rows, columns = layer.weight.flatten(1).shape
        pays = ranks is rank or rank * (rows + columns) < rows * columns
        return factorize(layer, ranks[name]) if pays else layer

    others: list[str] = []
    if ranks is rank:  # what it does not name stays as it is
        others = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        others += [n for n, _ in model.named_modules() if n and not any(f"{r}.".startswith(f"{n}.") for r in ranks)]
    return replace_layers(model, convert, skip=others, doing="factorize")
