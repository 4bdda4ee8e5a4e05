"""Pruning a model: score its weights, mask them, and keep the masks through training.

>>> model = torch.nn.Linear(4, 2)
>>> masks = prune_(model, 0.5)
>>> int((model.weight == 0).sum()), int(masks["weight"].sum())
(4, 4)

Score and surgery are separate: here weights are *set to zero*; :func:`remove_neurons` is what makes a network smaller.
"""

import math
from collections.abc import Callable, Mapping
from difflib import get_close_matches

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from course_lib.methods.pruning_masks import (
    check_share,
    check_weight,
    magnitude_score,
    nm_mask,
    random_score,
    rank_mask,
    taylor_score,
    threshold_mask,
)
from course_lib.methods.surgery import CouplingError, remove_neurons

__all__ = [
    "SCOPES",
    "CouplingError",
    "GradualPruning",
    "apply_masks_",
    "cubic_sparsity",
    "keep_masks",
    "magnitude_score",
    "make_masks",
    "nm_mask",
    "prunable_weights",
    "prune_",
    "random_score",
    "rank_mask",
    "remove_neurons",
    "stack_masks",
    "taylor_score",
    "threshold_mask",
]

SCOPES = ("global", "layer")
"""``"global"`` ranks all weights together; ``"layer"`` ranks within each layer, so that all are equally sparse."""

Score = Callable[[str, Tensor], Tensor] | Mapping[str, Tensor]


def prunable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that pruning may touch: of linear and convolution layers, no biases, no normalisation layers.

    A weight that several layers share appears once, under the name that ``model.named_parameters()`` gives it.

    Raises:
        ValueError: there is none, or a layer's weight is not a plain parameter (parametrized, or not yet initialised).

    >>> list(prunable_weights(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))))
    ['0.weight', '2.weight']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    names = {id(p): name for name, p in model.named_parameters()}
    weights: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        if not isinstance(module, (nn.Linear, _ConvNd)):
            continue
        weight = module._parameters.get("weight")
        if weight is None:
            raise ValueError(
                f"the weight of {path or 'the model'!r} is no plain parameter (torch.nn.utils.prune or a "
                "parametrization computes it): make it permanent first (torch.nn.utils.prune.remove(layer, 'weight'))"
            )
        if isinstance(weight, nn.parameter.UninitializedParameter):
            raise ValueError(f"the weight of {path!r} has no shape yet (a lazy layer): run the model once first")
        if weight.numel():
            weights[names[id(weight)]] = weight
    if not weights:
        raise ValueError(f"the model ({type(model).__name__}) has no weight to prune: no Linear or Conv layer is in it")
    return weights


def make_masks(
    weights: Mapping[str, Tensor], sparsity: float, *, scope: str = "global", score: Score | None = None
) -> dict[str, Tensor]:
    """Masks that leave ``1 - sparsity`` of the weights, without touching them: see :func:`prune_`."""
    sparsity = check_share(sparsity, "sparsity")
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(map(repr, SCOPES))}, got {scope!r}")
    if not weights:
        raise ValueError("there is no weight to prune: weights is empty")
    scores = {}
    for name, weight in weights.items():
        weight = check_weight(weight, name)
        # What is zero already goes first, whatever the criterion says: pruning twice never brings a weight back.
        scores[name] = _score_of(name, weight, score).to(weight.device).masked_fill(weight == 0, -math.inf)
    if scope == "layer":
        masks = {name: rank_mask(s, sparsity) for name, s in scores.items()}
    else:
        device = next(iter(scores.values())).device
        mask = rank_mask(torch.cat([s.flatten().to(device) for s in scores.values()]), sparsity)
        parts = mask.split([s.numel() for s in scores.values()])
        masks = {name: part.view(s.shape).to(s.device) for (name, s), part in zip(scores.items(), parts, strict=True)}
    return {name: mask & (weights[name].detach() != 0) for name, mask in masks.items()}


def _score_of(name: str, weight: Tensor, score: Score | None) -> Tensor:
    if score is None:
        return magnitude_score(weight)
    if isinstance(score, Mapping):
        if name not in score:
            raise ValueError(f"score has no entry for {name!r}; it has: {', '.join(map(str, score)) or 'none'}")
        value = score[name]
    elif callable(score):
        with torch.no_grad():
            value = score(name, weight.clone())
    else:
        raise TypeError(f"score must be a function (name, weight) or a dict of tensors, got {type(score).__name__}")
    value = check_weight(value, f"the score of {name}", finite=False)
    if value.shape != weight.shape:
        raise ValueError(f"the score of {name} must have shape {tuple(weight.shape)}, got {tuple(value.shape)}")
    return value if value.is_floating_point() else value.double()


def prune_(
    model: nn.Module, sparsity: float, *, scope: str = "global", score: Score | None = None
) -> dict[str, Tensor]:
    """Set the least important weights of linear and convolution layers to zero, in place.

    Args:
        model: any module; biases and normalisation layers stay whole.
        sparsity: share of the weights that are zero afterwards, in [0, 1). The count is exact:
            ``round(sparsity · count)`` over all weights (``"global"``) or in each layer (``"layer"``), as in
            ``torch.nn.utils.prune``.
            Weights that are zero already count, and go first: prune to 0.5 and then to 0.8, and 80 % are gone.
            Asking for less than is gone changes nothing.
        scope: one of :data:`SCOPES`.
        score: ``score(name, weight)`` or a dict ``{name: tensor}``, higher is worth more, of the weight's shape;
            :func:`magnitude_score` by default.

    Returns:
        ``{parameter name: bool mask}``, ``True`` where the weight stays, for :func:`apply_masks_`
        and :func:`keep_masks`.

    Raises:
        ValueError: a sparsity outside [0, 1), an unknown scope, NaN or infinite weights, NaN scores, a score that is
            missing or of another shape, a model without such layers. The model is as it was.
    """
    weights = prunable_weights(model)
    masks = make_masks(weights, sparsity, scope=scope, score=score)
    apply_masks_(weights, masks)
    return masks


@torch.no_grad()
def apply_masks_(model: nn.Module | Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set every weight to zero whose mask is ``False``, in place.

    Args:
        model: a module, or a dict of its parameters by name as ``after_step`` of a training gets it.
        masks: ``{parameter name: bool tensor of its shape}``; parameters without a mask stay as they are.

    Raises:
        ValueError: a name that is not there, a mask of another shape. Nothing is changed then.
        TypeError: a mask that is no bool tensor.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False)) if isinstance(model, nn.Module) else model
    if not isinstance(parameters, Mapping):
        raise TypeError(f"model must be a module or a dict of parameters, got {type(model).__name__}")
    for name, mask in masks.items():
        if name not in parameters:
            close = get_close_matches(str(name), list(parameters), n=3, cutoff=0.4)
            raise ValueError(
                f"no parameter is called {name!r}; the closest: {', '.join(close) or 'none'} "
                "(a frozen parameter is not handed to after_step: leave its mask out)"
            )
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
            given = f"dtype {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"the mask of {name!r} must be a bool tensor, got {given}")
        if mask.shape != parameters[name].shape:
            fits = tuple(parameters[name].shape)
            raise ValueError(f"the mask of {name!r} must have the weight's shape {fits}, got {tuple(mask.shape)}")
    for name, mask in masks.items():
        parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)


def keep_masks(masks: Mapping[str, Tensor]) -> Callable[[Mapping[str, Tensor], int], None]:
    """An ``after_step`` callback that holds pruned weights at zero.

    An optimiser moves a pruned weight even where its gradient is zero: momentum remembers old gradients. Multiplying
    the mask back in after every step is what makes zero stay zero.
    """

    def after_step(parameters: Mapping[str, Tensor], step: int) -> None:
        apply_masks_(parameters, masks)

    return after_step


def stack_masks(masks: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Masks of R replicas as one dict of ``[R, ...]`` masks, for :func:`keep_masks` in a batched training."""
    if not masks:
        raise ValueError("masks is empty: give one dict for each replica")
    if any(set(one) != set(masks[0]) for one in masks):
        raise ValueError("the replicas' masks have different names: all must come from one architecture")
    return {name: torch.stack([one[name] for one in masks]) for name in masks[0]}


def cubic_sparsity(step: int, steps: int, final: float) -> float:
    """How much is pruned after ``step`` of ``steps``: ``final · (1 − (1 − step/steps)³)`` (Zhu & Gupta 2017).

    Fast while much is redundant, slow near the end. From ``steps`` on it stays at ``final``.

    >>> [round(cubic_sparsity(t, 4, 0.8), 4) for t in range(6)]
    [0.0, 0.4625, 0.7, 0.7875, 0.8, 0.8]
    """
    final = check_share(final, "final")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps!r}")
    if not step >= 0:
        raise ValueError(f"step must be at least 0, got {step!r}")
    return final if step >= steps else final * (1.0 - (1.0 - step / steps) ** 3)


class GradualPruning:
    """An ``after_step`` callback that prunes while training, along :func:`cubic_sparsity` (Zhu & Gupta 2017).

    Args:
        model: tells which parameters are pruned; with ``replicas`` one of the models to be stacked.
        final: sparsity at the end, in [0, 1).
        steps: optimiser steps until ``final`` is reached.
        every: steps between two rankings; in between the masks are held.
        scope, score: as in :func:`prune_`.
        replicas: the parameters will carry a leading replica dimension; each replica is ranked on its own.

    Attributes:
        masks: the masks now in force (empty before the first ranking).
    """

    def __init__(
        self,
        model: nn.Module,
        final: float,
        steps: int,
        *,
        every: int = 1,
        scope: str = "global",
        score: Score | None = None,
        replicas: bool = False,
    ):
        cubic_sparsity(0, steps, final)
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every!r}")
        self.names, self.final, self.steps, self.every = list(prunable_weights(model)), final, steps, every
        self.options, self.replicas, self.masks = {"scope": scope, "score": score}, replicas, {}

    def __call__(self, parameters: Mapping[str, Tensor], step: int) -> None:
        done = step + 1
        if done == self.steps or (done < self.steps and done % self.every == 0):
            share = cubic_sparsity(done, self.steps, self.final)
            weights = {name: parameters[name].detach() for name in self.names}
            if self.replicas:
                rows = range(len(next(iter(weights.values()))))
                each = [make_masks({n: w[r] for n, w in weights.items()}, share, **self.options) for r in rows]
                self.masks = stack_masks(each)
            else:
                self.masks = make_masks(weights, share, **self.options)
        apply_masks_(parameters, self.masks)
