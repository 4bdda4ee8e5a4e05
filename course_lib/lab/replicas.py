"""Many copies of one network trained in one batched pass: what makes an interval affordable.

A network of a few thousand weights leaves a processor idle between its tiny steps. Stacking R of them along a new first
dimension and mapping the step over it (``torch.func.stack_module_state`` and ``vmap``) turns R small matrix products
into one large one. The replicas never see each other: the result is what R separate trainings would have given.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from course_lib.gate import UnsupportedModel, check_model, copy_model, eval_mode
from course_lib.lab.data import DataSplits, Split, Splits
from course_lib.lab.models import build_model

from course_lib.lab.training import (  # isort: skip
    AfterStep, BestEpoch, LossFn, TrainConfig, as_terms, check_finite, check_logits, check_split, check_trainable,
    device_of, epoch_batches, evaluate, fit, forward, make_optimizer, progress_bar, read_loss,
)  # fmt: skip

__all__ = ["fit_replicas", "train", "train_many"]

LARGEST_BATCHED_CONV = 200_000
"""Multiply-accumulates of convolutions an image above which batching replicas no longer pays (measured: 0.8 times)."""


def train_many(
    model: str | Callable[[int], nn.Module] | Sequence[nn.Module], data: DataSplits | Split | Splits,
    seeds: Sequence[int], *, start: Sequence[int] | None = None, config: TrainConfig | None = None,
    loss_fn: LossFn | None = None, after_step: AfterStep | None = None,
    settings: Mapping[str, Tensor] | None = None, best_on: Split | None = None, **recipe,
) -> list[nn.Module]:  # fmt: skip
    """Train one network a seed, all at once, each on its own training images where the data has them.

    Args:
        model: a name of :data:`~course_lib.lab.models.MODELS`; ``make_model(seed)``; or one network a seed, trained
            on as copies.
        data: what to train on; of a whole data set its ``train`` part.
        seeds: decide the order of the images, and the initial weights unless ``start`` has other seeds for these.
        config, recipe: a :class:`TrainConfig`, or its fields as keywords: ``epochs=12, lr=4e-3``.
        loss_fn, after_step, settings: as in :func:`fit_replicas`.
        best_on: validation images on which each network's best epoch is chosen; by default the last epoch stays.
    """
    seeds, split = [int(s) for s in seeds], data.train if isinstance(data, DataSplits) else data
    start = seeds if start is None else [int(s) for s in start]
    if len(start) != len(seeds):
        raise ValueError(f"{len(start)} start seeds for {len(seeds)} seeds: give one for each")
    if isinstance(split, Splits):
        if len(split) < len(seeds):
            raise ValueError(f"{len(seeds)} seeds, but the data has splits for {len(split)} replicas")
        split = split[: len(seeds)]
    if isinstance(model, str):
        models = [_named(model, data, s) for s in start]
    elif callable(model) and not isinstance(model, nn.Module):
        models = [model(s) for s in start]
    else:
        models = [copy_model(m) for m in ([model] if isinstance(model, nn.Module) else model)]
        if len(models) != len(seeds):
            raise ValueError(f"{len(models)} networks for {len(seeds)} seeds: give one for each")
    given = iter(models)
    options = {"loss_fn": loss_fn, "val": best_on, "after_step": after_step, "settings": settings, "progress": True}
    return fit_replicas(lambda seed: next(given), seeds, split, TrainConfig.of(config, recipe), **options)


def train(
    model: str | nn.Module, data: DataSplits | Split, seed: int = 0, *, config: TrainConfig | None = None,
    best_on: Split | None = None, loss_fn: LossFn | None = None, after_step: AfterStep | None = None, **recipe,
) -> nn.Module:  # fmt: skip
    """Train one network with the usual loop, and return it: options as for :func:`train_many`.

    >>> from course_lib.lab.data import load_dataset
    >>> data = load_dataset()
    >>> net = train("mlp8", data.train.subset(range(64)), epochs=1)
    """
    split = data.train if isinstance(data, DataSplits) else data
    check_split(split)
    if isinstance(model, str):
        model = _named(model, data, int(seed))
    options = {"loss_fn": loss_fn, "val": best_on, "after_step": after_step, "progress": True}
    fit(model, split, TrainConfig.of(config, recipe), seed=int(seed), **options)
    return model


def _named(name: str, data: DataSplits | Split | Splits, seed: int) -> nn.Module:
    """The network of that name which fits the data."""
    if isinstance(data, DataSplits):
        return build_model(name, data.input_shape, data.num_classes, seed=seed)
    pool = data.pool if isinstance(data, Splits) else data
    return build_model(name, tuple(pool.images.shape[1:]), int(pool.labels.max()) + 1, seed=seed)


def fit_replicas(
    make_model: Callable[[int], nn.Module], seeds: Sequence[int], split: Split | Sequence[Split],
    config: TrainConfig | None = None, *, loss_fn: LossFn | None = None, val: Split | None = None,
    after_step: AfterStep | None = None, settings: Mapping[str, Tensor] | None = None, progress: bool = False,
) -> list[nn.Module]:  # fmt: skip
    """Train one replica a seed, all at once.

    Replica ``r`` equals ``fit(make_model(seeds[r]), split, config, seed=seeds[r], ...)`` up to floating-point rounding:
    the same initial weights, the same order of the data. Dropout is the exception: its draws differ. Networks for which
    one batched pass would be slower (large convolutions), and those that ``vmap`` cannot map, take each step one
    replica after another, with the same result.

    Args:
        make_model: gives the model to start from, fresh or already trained; all need one architecture and device.
        seeds: one integer a replica; a seed may appear again where ``settings`` tells the replicas apart.
        split: the training data for all, or a sequence with one split a replica, all of the same shape.
        loss_fn: as in :func:`~course_lib.lab.training.fit`; it sees one replica at a time, usually under ``vmap``, so
            it should not branch on the values of tensors.
        val: chooses the best epoch of each replica on its own.
        after_step: as in ``fit``, but its tensors carry a leading replica dimension ``[R, ...]``.
        settings: named tensors ``[R, ...]``; slice ``r`` reaches replica ``r``'s loss as a keyword argument. That
            trains a grid of temperatures, or replicas with a table of teacher logits each, in the same pass.

    Raises:
        ValueError: no seeds, architectures or splits that differ, settings without a leading dimension of R, or
            anything that ``fit`` refuses.
        DivergedError: a replica's loss is no longer finite; the text lists the losses in the order of ``seeds``.
    """
    config = config or TrainConfig()
    seeds = [int(seed) for seed in seeds]
    if not seeds:
        raise ValueError("seeds is empty: fit_replicas needs at least one")
    models = [make_model(seed) for seed in seeds]
    check_same(models)
    check_trainable(models[0])
    settings, device = check_settings(settings, len(seeds)), device_of(models[0])
    pool, positions = _pooled(split, len(seeds))
    pool_images, pool_labels, positions = pool.images.to(device), pool.labels.to(device), positions.to(device)
    loss_fn, wants_index = read_loss(loss_fn)
    modes = [m.training for m in models[0].modules()]
    # A deep copy, not a move to "meta": only so does it know which names share a tensor.
    skeleton = copy_model(models[0], "train replicas of", plain=False).train()
    # stack_module_state hands out leaf tensors of its own: the models themselves stay as they are until the end.
    parameters, buffers = stack_module_state(models)
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}

    def replica_terms(params, bufs, images, labels, index, own):
        logits = forward(lambda x: functional_call(skeleton, (params, bufs), (x,)), images)
        return as_terms(loss_fn(logits, labels, **({"index": index, **own} if wants_index else own)))

    def one_after_another(*stacked):
        rows = [replica_terms(*(_slice(part, r) for part in stacked)) for r in range(len(seeds))]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    with eval_mode(models[0]), torch.no_grad():
        check_logits(forward(models[0], pool_images[:1]), pool_labels)
    refuse_new_buffers(skeleton, pool_images[:2])
    large = len(seeds) == 1 or convolution_macs(models[0], pool_images[:1]) > LARGEST_BATCHED_CONV
    step_terms = one_after_another if large else vmap(replica_terms, randomness="different")
    optimizer, best = make_optimizer(trainable, config), [BestEpoch() for _ in models]
    step, examples = 0, positions.shape[1]
    total = config.steps(examples)
    with torch.random.fork_rng(devices=[]), progress_bar(config.epochs, progress) as advance:
        torch.manual_seed(seeds[0] % 2**63)
        for epoch in range(config.epochs):
            orders = [epoch_batches(examples, config.batch_size, seed, epoch) for seed in seeds]
            for batch in zip(*orders, strict=True):
                index = torch.stack(batch).to(device)
                where = positions.gather(1, index)
                inputs = (pool_images[where], pool_labels[where], index, settings)
                if step == 0 and not large and not can_batch(step_terms, parameters, buffers, inputs):
                    step_terms = one_after_another
                terms = step_terms(parameters, buffers, *inputs)
                check_finite(terms["loss"], step, epoch, config.lr)
                optimizer.zero_grad(set_to_none=True)
                # Each replica's weights appear in its own loss only, so the sum's gradient is each one's own gradient.
                terms["loss"].sum().backward()
                optimizer.param_groups[0]["lr"] = config.lr_at(step, total)
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
            advance()
    unstack(parameters, buffers, models)
    for model, keeper in zip(models, best, strict=True):
        keeper.restore(model)
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
    return models


def _pooled(split: Split | Sequence[Split], replicas: int) -> tuple[Split, Tensor]:
    """The images of all replicas, and the positions [R, N] of each one's own among them."""
    if isinstance(split, Split):
        check_split(split)
        return split, torch.arange(len(split)).expand(replicas, -1)
    if len(split) != replicas:
        raise ValueError(f"{len(split)} splits for {replicas} seeds: give one split, or one for each seed")
    if isinstance(split, Splits):
        return split.pool, split.index
    for one in split:
        check_split(one)
        if one.images.shape != split[0].images.shape:
            shapes = f"{tuple(split[0].images.shape)} and {tuple(one.images.shape)}"
            raise ValueError(f"the replicas' splits must have the same shape to be batched, got {shapes}")
    pool = Split(torch.cat([s.images for s in split]), torch.cat([s.labels for s in split]))
    return pool, torch.arange(len(pool)).view(replicas, -1)


def _slice(part, r: int):
    return {name: _slice(value, r) for name, value in part.items()} if isinstance(part, dict) else part[r]


def convolution_macs(model: nn.Module, image: Tensor) -> int:
    """Multiply-accumulates of the convolutions in one forward pass of ``image`` [1, C, H, W]."""
    from torch.utils.flop_counter import FlopCounterMode

    with eval_mode(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    counts = counter.get_flop_counts().get("Global", {})
    return sum(flops for operator, flops in counts.items() if "conv" in str(operator)) // 2


def can_batch(step_terms: Callable, parameters: dict, buffers: dict, inputs: tuple) -> bool:
    """Whether ``vmap`` can map this model and loss; everything is as before afterwards."""
    kept = {name: tensor.clone() for name, tensor in buffers.items()}
    state = torch.get_rng_state()
    try:
        with torch.no_grad():
            step_terms(parameters, buffers, *inputs)
    except RuntimeError as error:
        if "vmap" not in str(error) and "atching rule" not in str(error):  # a recurrent layer has none
            raise
        return False
    finally:
        torch.set_rng_state(state)
        for name, tensor in buffers.items():
            tensor.copy_(kept[name])
    return True


def refuse_new_buffers(model: nn.Module, images: Tensor) -> None:
    """Refuse a forward pass that puts a new tensor in a buffer's place, which a functional call would lose."""
    probe = copy_model(model, "train replicas of", plain=False)
    before = dict(probe.named_buffers())
    with torch.no_grad(), torch.random.fork_rng(devices=[]), contextlib.suppress(Exception):  # told in training itself
        probe(images)
    if new := [name for name, buffer in probe.named_buffers() if before.get(name) is not buffer]:
        cure = "write into it instead (self.mean.mul_(0.9).add_(...))"
        raise UnsupportedModel(f"the forward pass puts a new tensor in the place of the buffer {new[0]!r}: {cure}")


def check_same(models: list[nn.Module]) -> None:
    """Refuse models that cannot be stacked, by name."""
    first, owner = {name: tuple(t.shape) for name, t in models[0].state_dict().items()}, {}
    for r, model in enumerate(models):
        shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        if type(model) is not type(models[0]) or shapes != first:
            differ = ", ".join(sorted(n for n in {*first, *shapes} if first.get(n) != shapes.get(n))) or "the class"
            kinds = f"({type(model).__name__}) is another network than replica 0 ({type(models[0]).__name__})"
            raise ValueError(f"replica {r} {kinds}; differing: {differ}; one batched pass needs one architecture")
        if any(model is other for other in models[:r]):
            raise ValueError("make_model returned the same object twice: return a new model, or a copy, for each seed")
        lines = zip(repr(model).splitlines(), repr(models[0]).splitlines(), strict=False)
        if other := next((f"{a.strip()} where replica 0 has {b.strip()}" for a, b in lines if a != b), ""):
            raise ValueError(f"replica {r} is another network: {other}; one batched pass needs one architecture")
        check_model(model, "train replicas of", plain=False)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and owner.setdefault(parameter, r) != r:
                raise ValueError(f"replicas {owner[parameter]} and {r} share {name}: make_model must make a new one")


def check_settings(settings: Mapping[str, Tensor] | None, replicas: int) -> dict[str, Tensor]:
    """Settings as tensors whose first dimension counts the replicas."""
    checked = {name: torch.as_tensor(value) for name, value in (settings or {}).items()}
    for name, value in checked.items():
        if value.dim() == 0 or value.shape[0] != replicas:
            need = f"settings[{name!r}] must have one entry for each of the {replicas} seeds"
            raise ValueError(f"{need}, got shape {tuple(value.shape)}")
    return checked


def unstack(parameters: dict[str, Tensor], buffers: dict[str, Tensor], models: list[nn.Module]) -> None:
    """Write slice ``r`` of every stacked tensor into model ``r``."""
    with torch.no_grad():
        for r, model in enumerate(models):
            for name, own in [*model.named_parameters(), *model.named_buffers()]:
                own.copy_((parameters if name in parameters else buffers)[name][r])
