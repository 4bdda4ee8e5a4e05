"""Many copies of one network trained in one batched pass: what makes an interval affordable.

A network of a few thousand weights leaves a processor idle between its tiny steps. Stacking R of them along a new first
dimension and mapping the step over it (``torch.func.stack_module_state`` and ``vmap``) turns R small matrix products
into one large one. The replicas never see each other: the result is what R separate trainings would have given.
"""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from course_lib.lab.data import Split
from course_lib.lab.loop import (
    AfterStep,
    BestEpoch,
    LossFn,
    as_terms,
    check_finite,
    check_logits,
    check_split,
    device_of,
    epoch_batches,
    make_optimizer,
    read_loss,
    set_lr,
)
from course_lib.lab.training import TrainConfig, evaluate

__all__ = ["fit_replicas"]


def fit_replicas(
    make_model: Callable[[int], nn.Module],
    seeds: Sequence[int],
    split: Split | Sequence[Split],
    config: TrainConfig | None = None,
    *,
    loss_fn: LossFn | None = None,
    val: Split | None = None,
    after_step: AfterStep | None = None,
    settings: Mapping[str, Tensor] | None = None,
) -> list[nn.Module]:
    """Train one replica a seed, all at once.

    Replica ``r`` equals ``fit(make_model(seeds[r]), split, config, seed=seeds[r], ...)`` up to floating-point rounding:
    the same initial weights, the same order of the data. Dropout is the exception: its draws differ.

    Args:
        make_model: ``make_model(seed)`` gives the model to start from, fresh or already trained; all must have
            the same architecture and be on one device.
        seeds: one integer a replica; a seed may appear again where ``settings`` tells the replicas apart.
        split: the training data for all, or a sequence with one split a replica, all of the same shape.
        config: see :class:`~course_lib.lab.training.TrainConfig`.
        loss_fn: as in :func:`~course_lib.lab.training.fit`; it sees one replica at a time and runs under
            ``vmap``, so it may not branch on the values of tensors.
        val: chooses the best epoch of each replica on its own.
        after_step: as in ``fit``, but its tensors carry a leading replica dimension ``[R, ...]``.
        settings: named tensors ``[R, ...]``; slice ``r`` reaches replica ``r``'s loss as a keyword argument. That
            trains a grid of temperatures, or replicas with a table of teacher logits each, in the same pass.

    Returns:
        The trained models, in the order of ``seeds``, in the mode that ``make_model`` gave them.

    Raises:
        ValueError: no seeds, architectures or splits that differ, settings without a leading dimension of R, buffers
            that cannot be batched (a BatchNorm with ``momentum=None``), or anything that ``fit`` refuses.
        DivergedError: a replica's loss is no longer finite; the text lists the losses in the order of ``seeds``.
    """
    config = config or TrainConfig()
    seeds = [int(seed) for seed in seeds]
    if not seeds:
        raise ValueError("seeds is empty: fit_replicas needs at least one")
    models = [make_model(seed) for seed in seeds]
    check_same(models)
    settings = check_settings(settings, len(seeds))
    device = device_of(models[0])
    pick = gather(split, len(seeds), device)
    loss_fn, wants_index = read_loss(loss_fn)

    modes = [m.training for m in models[0].modules()]
    for model in models:
        model.train()
    # stack_module_state hands out leaf tensors of its own: the models themselves stay as they are until the end.
    parameters, buffers = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    if not trainable:
        raise ValueError("the models have no parameter that requires a gradient: there is nothing to train")

    def replica_terms(params, bufs, images, labels, index, own):
        logits = functional_call(skeleton, (params, bufs), (images,))
        extra = {"index": index, **own} if wants_index else own
        return as_terms(loss_fn(logits, labels, **extra))

    step_terms = vmap(replica_terms, randomness="different")
    optimizer = make_optimizer(trainable, config.lr, config.weight_decay)
    best = [BestEpoch() for _ in models]
    step, total = 0, config.steps(pick.examples)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds[0])
        check_logits(models[0].eval()(pick.images[0, :1] if pick.own else pick.images[:1]), pick.labels)
        models[0].train()
        for epoch in range(config.epochs):
            orders = [epoch_batches(pick.examples, config.batch_size, seed, epoch) for seed in seeds]
            for batch in zip(*orders, strict=True):
                index = torch.stack(batch).to(device)
                try:
                    terms = step_terms(parameters, buffers, *pick(index), index, settings)
                except RuntimeError as error:
                    if "vmap" not in str(error):
                        raise
                    raise ValueError(
                        "this model or loss cannot be batched over replicas; train it with fit, one after another. "
                        f"What vmap said: {str(error).splitlines()[0]}"
                    ) from error
                check_finite(terms["loss"], step, epoch, config.lr)
                optimizer.zero_grad(set_to_none=True)
                # Each replica's weights appear in its own loss only, so the sum's gradient is each one's own gradient.
                terms["loss"].sum().backward()
                set_lr(optimizer, config.lr_at(step, total))
                optimizer.step()
                if after_step is not None:
                    with torch.no_grad():
                        after_step(trainable, step)
                step += 1
            if val is not None:
                unstack(parameters, buffers, models)
                for model, keeper in zip(models, best, strict=True):
                    seen = evaluate(model, val)
                    keeper.offer(epoch, seen.accuracy, seen.loss, model)

    unstack(parameters, buffers, models)
    for model, keeper in zip(models, best, strict=True):
        keeper.restore(model)
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
    return models


class gather:
    """Takes ``[R, B]`` positions to images ``[R, B, C, H, W]`` and labels ``[R, B]``, from one split or from R."""

    def __init__(self, split: Split | Sequence[Split], replicas: int, device: torch.device):
        self.own = not isinstance(split, Split)
        splits = list(split) if self.own else [split]
        if self.own and len(splits) != replicas:
            raise ValueError(f"{len(splits)} splits for {replicas} seeds: give one split, or one for each seed")
        for one in splits:
            check_split(one)
            if one.images.shape != splits[0].images.shape:
                shapes = f"{tuple(splits[0].images.shape)} and {tuple(one.images.shape)}"
                raise ValueError(f"the replicas' splits must have the same shape to be batched, got {shapes}")
        self.examples = len(splits[0])
        self.images, self.labels = splits[0].images.to(device), splits[0].labels.to(device)
        if self.own:
            self.images = torch.stack([one.images for one in splits]).to(device)
            self.labels = torch.stack([one.labels for one in splits]).to(device)
            self.rows = torch.arange(replicas, device=device)[:, None]

    def __call__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        where = (self.rows, index) if self.own else (index,)
        return self.images[where], self.labels[where]


def check_same(models: list[nn.Module]) -> None:
    """Refuse models that cannot be stacked, by name."""
    first = {name: tuple(t.shape) for name, t in models[0].state_dict().items()}
    for r, model in enumerate(models):
        shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        if type(model) is not type(models[0]) or shapes != first:
            differ = sorted(name for name in {*first, *shapes} if first.get(name) != shapes.get(name))
            raise ValueError(
                f"replica {r} ({type(model).__name__}) is another network than replica 0 ({type(models[0]).__name__}); "
                f"differing: {', '.join(differ) or 'the class'}; one batched pass needs one architecture"
            )
        if any(model is other for other in models[:r]):
            raise ValueError(
                "make_model returned the same object twice: return a new model, or a deepcopy, for each seed"
            )
    for name, module in models[0].named_modules():
        if (
            isinstance(module, nn.modules.batchnorm._BatchNorm)
            and module.track_running_stats
            and module.momentum is None
        ):
            raise ValueError(
                f"{name}: a BatchNorm with momentum=None averages over a step count that cannot be batched; "
                "give it a momentum, or train with fit one after another"
            )


def check_settings(settings: Mapping[str, Tensor] | None, replicas: int) -> dict[str, Tensor]:
    """Settings as tensors whose first dimension counts the replicas."""
    checked = {name: torch.as_tensor(value) for name, value in (settings or {}).items()}
    for name, value in checked.items():
        if value.dim() == 0 or value.shape[0] != replicas:
            shape = tuple(value.shape)
            raise ValueError(
                f"settings[{name!r}] must have one entry for each of the {replicas} seeds, got shape {shape}"
            )
    return checked


def unstack(parameters: dict[str, Tensor], buffers: dict[str, Tensor], models: list[nn.Module]) -> None:
    """Write slice ``r`` of every stacked tensor into model ``r``."""
    with torch.no_grad():
        for r, model in enumerate(models):
            for name, own in [*model.named_parameters(), *model.named_buffers()]:
                own.copy_((parameters if name in parameters else buffers)[name][r])
