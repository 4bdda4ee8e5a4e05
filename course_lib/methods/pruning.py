"""Pruning: score the weights of a model, mask the least of them, and keep the masks through training.

A score says how much a weight is worth (higher is better, same shape as the weight), a mask what stays (``True``) and
what goes (``False``): a new criterion needs no new mask. Here weights are *set to zero*;
:func:`~course_lib.methods.surgery.remove_neurons` is what makes a network smaller.

>>> model = torch.nn.Linear(4, 2)
>>> masks = prune_(model, 0.5)
>>> int((model.weight == 0).sum()), int(masks["weight"].sum())
(4, 4)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from course_lib.gate import UnsupportedModel, computed, real_tensor, share_of, whole_number
from course_lib.methods.surgery import CouplingError, remove_neurons

__all__ = [
    "SCOPES", "CouplingError", "GradualPruning", "apply_masks_", "cubic_sparsity", "keep_masks",
    "magnitude_score", "make_masks", "nm_mask", "prunable_weights", "prune_", "rank_mask", "remove_neurons",
    "stack_masks", "taylor_score", "threshold_mask", "wanda_score",
]  # fmt: skip

SCOPES = ("global", "layer", "row")  # ranked together: all weights, a layer's, or those that make one output
Score = Callable[[str, Tensor], Tensor] | Mapping[str, Tensor]
Masks = dict[str, Tensor]


def magnitude_score(weight: Tensor) -> Tensor:
    """How far each weight is from zero: ``|w|``, any shape (Han et al. 2015).

    >>> magnitude_score(torch.tensor([0.5, -2.0]))
    tensor([0.5000, 2.0000])
    """
    return real_tensor(weight, "weight").abs()


def taylor_score(weight: Tensor, grad: Tensor) -> Tensor:
    """How much the loss moves when a weight is set to zero, to first order: ``|w · ∂L/∂w|`` (Molchanov et al. 2017).

    ``grad`` is ``weight.grad`` after ``loss.backward()``, of the weight's shape.

    >>> taylor_score(torch.tensor([2.0, -3.0]), torch.tensor([0.5, 0.0]))
    tensor([1., 0.])
    """
    weight, grad = _alike(weight, grad)
    return (weight * grad).abs()


def wanda_score(weight: Tensor, inputs: Tensor) -> Tensor:
    """How much a weight ``[out, in]`` moves its output on ``inputs [..., in]``: ``|w| · ‖x‖₂`` (Sun et al. 2024).

    Wanda. The norm is over all but ``in``; the paper ranks with ``scope="row"``.

    >>> wanda_score(torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 1.0], [4.0, 0.0]]))
    tensor([[5., 2.]])
    """
    weight, inputs = _columns(weight, inputs)
    return weight.abs() * torch.linalg.vector_norm(inputs, dim=0)


def _alike(weight: Tensor, grad: Tensor | None) -> tuple[Tensor, Tensor]:
    if grad is None:
        raise ValueError("grad is None: call loss.backward() first, and give weight.grad")
    if weight.shape != grad.shape:
        raise ValueError(f"grad must have the weight's shape {tuple(weight.shape)}, got {tuple(grad.shape)}")
    return real_tensor(weight, "weight"), real_tensor(grad, "grad")


def _columns(weight: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    weight, inputs = real_tensor(weight, "weight"), real_tensor(inputs, "inputs")
    if weight.dim() != 2 or inputs.dim() < 2 or inputs.shape[-1] != weight.shape[1]:
        given = f"got weight {tuple(weight.shape)} and inputs {tuple(inputs.shape)}"
        raise ValueError(f"a weight [out, in] and inputs [N, in] are needed, {given}")
    return weight, inputs.flatten(0, -2).to(weight.device)


def threshold_mask(weight: Tensor, alpha: float) -> Tensor:
    """The article's formula (section 3.1): ``M = 1[|W| > α · max|W|]``, ``True`` where the weight stays; α in [0, 1).

    How many weights go depends on the largest one: a single outlier can prune all the others.

    >>> threshold_mask(torch.tensor([0.9, -0.8, 0.1, -0.3]), 0.5)
    tensor([ True,  True, False, False])
    """
    size = magnitude_score(weight)
    return size > share_of(alpha, "alpha") * size.max()


def rank_mask(score: Tensor, sparsity: float) -> Tensor:
    """Prune the lowest scores: exactly ``round(sparsity * score.numel())`` of them, a half to the even number.

    ``score`` has any shape, infinities are fine; ``sparsity`` is in [0, 1). Of equal scores the first goes first.

    >>> rank_mask(torch.tensor([0.9, 0.8, 0.1, 0.3]), 0.5)
    tensor([ True,  True, False, False])
    """
    flat = real_tensor(score, "score", finite=False).flatten()
    pruned = round(share_of(sparsity, "sparsity") * len(flat))
    if pruned == 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = flat.kthvalue(pruned).values  # ten times as fast as sorting
    mask = flat > threshold
    equal = (flat == threshold).nonzero().flatten()
    mask[equal[pruned - (flat < threshold).sum() :]] = True
    return mask.view(score.shape)


def nm_mask(score: Tensor, n: int, m: int) -> Tensor:
    """Keep the ``n`` highest of every ``m`` consecutive scores along the input dimension (Mishra et al. 2021).

    That is *along the sum* of the matrix product: dimension 1 of ``[out, in]`` or ``[out, in, kh, kw]``, 0 of a vector,
    a multiple of ``m``; 1 ≤ n ≤ m. Of equal scores the first goes first.

    >>> nm_mask(torch.tensor([[0.9, 0.1, 0.4, 0.3]]), 2, 4)
    tensor([[ True, False,  True, False]])
    """
    whole_number(n, f"n of {n}:{m}", 1, whole_number(m, "m"))
    score, shape = real_tensor(score, "score", finite=False), tuple(score.shape)
    dim = min(1, len(shape) - 1)
    if not shape or shape[dim] % m:
        raise ValueError(f"{n}:{m} needs an input dimension that is a multiple of {m}, got score of shape {shape}")
    groups = score.movedim(dim, -1).unflatten(-1, (-1, m))
    lowest = groups.argsort(dim=-1, stable=True)[..., : m - n]
    mask = torch.ones_like(groups, dtype=torch.bool).scatter(-1, lowest, False)
    return mask.flatten(-2).movedim(-1, dim).contiguous()


def prunable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """What pruning may touch: matrices and kernels called weight, of linear, convolution, recurrent, attention layers.

    Biases, normalisation layers and embeddings stay whole. A weight that several layers share appears once.
    UnsupportedModel: no such weight, or one that is no plain parameter (parametrized, or a lazy layer's).

    >>> list(prunable_weights(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))))
    ['0.weight', '2.weight']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    names, weights = {p: name for name, p in model.named_parameters()}, {}
    for path, module in model.named_modules():
        if fault := computed(module):
            raise UnsupportedModel(f"cannot prune {path or 'the model'!r} ({type(module).__name__}): {fault}")
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)):
            continue
        for key, weight in module.named_parameters(recurse=False):
            if "weight" in key and weight.dim() > 1 and weight.numel():
                weights[names[weight]] = weight
    if not weights:
        raise UnsupportedModel(f"{type(model).__name__} has no weight to prune: no Linear or Conv layer is in it")
    return weights


def prune_(model: nn.Module, sparsity: float, *, scope: str = "global", score: Score | None = None) -> Masks:
    """Set the least important of :func:`prunable_weights` to zero, in place; returns ``{name: mask of what stays}``.

    ``sparsity``, in [0, 1), is the share of zeros afterwards: exactly ``round(sparsity · count)`` of all weights, or in
    each layer or row (``scope``, one of :data:`SCOPES`), as in ``torch.nn.utils.prune``; zeros that are there already
    count, and go first. ``score(name, weight)`` or ``{name: tensor}`` has the weight's shape; default
    :func:`magnitude_score`. ValueError, and the model is as it was: what does not fit, NaN or infinite weights.
    """
    weights = prunable_weights(model)
    for name, module in model.named_modules() if scope == "row" else ():
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            told = f"a row of {name}.weight ({type(module).__name__}) belongs to an input, not to an output"
            raise ValueError(f"{told}: scope='row' does not fit, take 'layer'")
    masks = make_masks(weights, sparsity, scope=scope, score=score)
    apply_masks_(model, masks)
    return masks


def make_masks(weights: Mapping, sparsity: float, *, scope: str = "global", score: Score | None = None) -> Masks:
    """Masks that leave ``1 - sparsity`` of the weights, without touching them: see :func:`prune_`."""
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {SCOPES}, got {scope!r}")
    if not weights:
        raise ValueError("there is no weight to prune")
    scores = {name: _score_of(name, weight, score) for name, weight in weights.items()}
    if scope == "global":
        flat = [s.flatten().cpu() for s in scores.values()]
        parts = rank_mask(torch.cat(flat), sparsity).split([len(s) for s in flat])
    elif scope == "layer":
        parts = [rank_mask(s, sparsity) for s in scores.values()]
    else:
        parts = [torch.stack([rank_mask(row, sparsity) for row in s]) for s in scores.values()]
    pairs = zip(weights.items(), parts, strict=True)
    return {name: mask.view_as(w).to(w.device) & (w != 0) for (name, w), mask in pairs}


@torch.no_grad()
def _score_of(name: str, weight: Tensor, score: Score | None) -> Tensor:
    """The score of one weight, with what is zero already at the very end: pruning twice brings no weight back."""
    real_tensor(weight, name)
    if isinstance(score, Mapping) and name not in score:
        raise ValueError(f"score has no entry for {name!r}; it has: {', '.join(map(str, score)) or 'none'}")
    find = score.get if isinstance(score, Mapping) else score or (lambda name, weight: magnitude_score(weight))
    value = find(name, weight.detach().clone())
    value = real_tensor(value, f"the score of {name}", finite=False)
    if value.shape != weight.shape:
        raise ValueError(f"the score of {name} must have shape {tuple(weight.shape)}, got {tuple(value.shape)}")
    return value.to(weight.device).masked_fill(weight == 0, -math.inf)


@torch.no_grad()
def apply_masks_(model: nn.Module | Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set every weight to zero whose mask is ``False``, in place; parameters without a mask stay as they are.

    ``model`` is a module, or a dict of parameters by name as ``after_step`` gets it; those of R replicas ``[R, ...]``
    take a mask for each or one for all. ValueError, TypeError: a mask's name, shape or dtype; nothing is changed then.
    """
    single = isinstance(model, nn.Module)
    parameters = dict(model.named_parameters(remove_duplicate=False)) if single else model
    for name, mask in masks.items():
        if name not in parameters:
            close = ", ".join(get_close_matches(str(name), list(parameters), n=3, cutoff=0.4)) or "none"
            raise ValueError(f"no parameter is called {name!r}; the closest: {close} (a frozen one has no step)")
        if getattr(mask, "dtype", None) is not torch.bool:
            given = getattr(mask, "dtype", type(mask).__name__)
            raise TypeError(f"the mask of {name!r} must be a bool tensor, got {given}")
        shape = parameters[name].shape
        if mask.shape != shape and (single or len(shape) < 3 or mask.shape != shape[1:]):
            given = f"{tuple(shape)}, got {tuple(mask.shape)}"
            raise ValueError(f"the mask of {name!r} must have the weight's shape {given}")
    for name, mask in masks.items():
        parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)


def keep_masks(masks: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]) -> Callable[[Mapping, int], None]:
    """An ``after_step`` callback that holds pruned weights at zero, where momentum and weight decay would move them.

    ``masks`` are those of one model, or a list with those of each of R replicas that are trained in one pass.
    """
    masks = masks if isinstance(masks, Mapping) else stack_masks(masks)

    def after_step(parameters: Mapping[str, Tensor], step: int) -> None:
        apply_masks_(parameters, masks)

    return after_step


def stack_masks(masks: Sequence[Mapping[str, Tensor]]) -> Masks:
    """Masks of R replicas as one dict of ``[R, ...]`` masks."""
    if not masks or any(one.keys() != masks[0].keys() for one in masks):
        names = list(map(list, masks))
        raise ValueError(f"masks of replicas need the same names, for at least one replica; got {names}")
    return {name: torch.stack([one[name] for one in masks]) for name in masks[0]}


def cubic_sparsity(step: int, steps: int, final: float) -> float:
    """Pruned after ``step`` of ``steps``: ``final · (1 − (1 − step/steps)³)``, then ``final`` (Zhu & Gupta 2017).

    >>> [round(cubic_sparsity(t, 4, 0.8), 4) for t in range(6)]
    [0.0, 0.4625, 0.7, 0.7875, 0.8, 0.8]
    """
    if not (step >= 0 and steps >= 1):
        raise ValueError(f"step must be at least 0 and steps must be at least 1, got {step} and {steps}")
    return share_of(final, "final") * (1 - (1 - min(step / steps, 1)) ** 3)


class GradualPruning:
    """An ``after_step`` callback that prunes while training, along :func:`cubic_sparsity` (Zhu & Gupta 2017).

    ``model`` tells which parameters are pruned (of R replicas ``[R, ...]`` each is ranked on its own), ``final`` the
    sparsity after ``steps`` optimiser steps, ``every`` the steps between two rankings; in between ``masks`` are held.
    ``options`` are ``scope`` and ``score`` of :func:`prune_`.
    """

    def __init__(self, model: nn.Module, final: float, steps: int, *, every: int = 1, **options):
        weights = prunable_weights(model)
        make_masks(weights, final, **options)  # whatever does not fit is said before the training starts
        if frozen := [name for name, weight in weights.items() if not weight.requires_grad]:
            raise ValueError(f"{', '.join(frozen)}: a frozen weight has no step to be pruned after; unfreeze it first")
        self.shapes = {name: weight.shape for name, weight in weights.items()}
        self.final, self.steps, self.every = final, whole_number(steps, "steps"), whole_number(every, "every")
        self.options, self.masks = options, {}

    def __call__(self, parameters: Mapping[str, Tensor], step: int) -> None:
        apply_masks_(parameters, self.masks)  # first: what is pruned must not come back
        done = step + 1
        if done == self.steps or (done < self.steps and done % self.every == 0):
            weights = {name: parameters[name].detach() for name in self.shapes}
            self.masks = self.rank(weights, cubic_sparsity(done, self.steps, self.final))
            apply_masks_(parameters, self.masks)

    def rank(self, weights: dict[str, Tensor], sparsity: float) -> dict[str, Tensor]:
        if all(weights[name].shape == shape for name, shape in self.shapes.items()):
            return make_masks(weights, sparsity, **self.options)
        count = len(next(iter(weights.values())))
        replicas = [{name: weight[r] for name, weight in weights.items()} for r in range(count)]
        return stack_masks([make_masks(one, sparsity, **self.options) for one in replicas])
