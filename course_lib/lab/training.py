"""Training one model, and looking at it: batches in memory, AdamW, the best epoch chosen on validation."""

import copy
import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.gate import eval_mode, whole_number
from course_lib.lab.data import Split, Splits

__all__ = ["SCHEDULES", "DivergedError", "Evaluation", "History", "TrainConfig", "accuracy", "evaluate", "fit"]
__all__ += ["logits_of", "use_threads"]

LossFn = Callable[..., Tensor | Mapping[str, Tensor]]
AfterStep = Callable[[dict[str, Tensor], int], None]

SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


class DivergedError(RuntimeError):
    """The loss stopped being a finite number; the text says at which step, and what to try."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train: AdamW (Loshchilov & Hutter 2019) with a learning rate that is set anew at every step.

    The last batch of an epoch may be smaller than ``batch_size``, but a single image left over joins the batch before
    it (BatchNorm cannot normalise one). ``lr``, above 0, is the rate of the first step; the ``schedule``,
    ``"constant"``, ``"linear"`` (to 0) or ``"cosine"`` (to 0), is counted in steps, not in epochs.
    """

    epochs: int = 20
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 1e-2
    schedule: str = "cosine"

    def __post_init__(self):
        for name in ("epochs", "batch_size"):
            object.__setattr__(self, name, whole_number(getattr(self, name), name))
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr must be a positive number, got {self.lr!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")

    @classmethod
    def of(cls, config: "TrainConfig | None", recipe: Mapping[str, object]) -> "TrainConfig":
        """``config``, or a new one from keywords such as ``epochs=12``."""
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(recipe) - set(known)):
            raise TypeError(f"a recipe has no {', '.join(unknown)}; it has {', '.join(known)}")
        if config is not None and recipe:
            raise TypeError(f"give config, or {', '.join(recipe)}, not both")
        return config or cls(**recipe)

    def steps(self, examples: int) -> int:
        """Optimiser steps of a whole training on that many examples."""
        return self.epochs * len(batch_sizes(examples, self.batch_size))

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of step ``step`` (from 0) out of ``steps``."""
        return self.lr * SCHEDULES[self.schedule](step / steps)


@dataclass
class History:
    """What a training left behind: one entry an epoch of the mean of every named loss term (always ``"loss"``), and of
    loss and accuracy on validation. The model carries the weights of ``best_epoch`` (from 0; the last without ``val``).
    """

    terms: dict[str, list[float]] = field(default_factory=dict)
    val_loss: list[float] = field(default_factory=list)
    val_accuracy: list[float] = field(default_factory=list)
    best_epoch: int = -1
    steps: int = 0


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One look at a model: ``accuracy`` in [0, 1], mean cross-entropy ``loss``, ``logits`` [N, K], ``labels`` [N]."""

    accuracy: float
    loss: float
    logits: Tensor
    labels: Tensor


def evaluate(model: nn.Module, split: Split, *, batch_size: int = 1024) -> Evaluation:
    """Run ``model`` in eval mode over ``split`` without gradients; ValueError if logits and labels do not fit."""
    check_split(split)
    parts = split.images.to(device_of(model)).split(whole_number(batch_size, "batch_size"))
    with eval_mode(model), torch.no_grad():  # a tensor made in inference mode could not be trained with afterwards
        logits = torch.cat([forward(model, images) for images in parts]).cpu()
    check_logits(logits, split.labels)
    right = (logits.argmax(dim=1) == split.labels).double().mean().item()
    return Evaluation(right, F.cross_entropy(logits.float(), split.labels).item(), logits, split.labels)


def accuracy(models: nn.Module | Iterable[nn.Module], split: Split | Splits) -> np.ndarray:
    """Accuracy in percent of each model, float64 [R]; model r is tested on its own split where each has one."""
    return np.array([100 * evaluate(model, own).accuracy for model, own in _paired(models, split)])


def logits_of(models: nn.Module | Iterable[nn.Module], split: Split | Splits) -> Tensor:
    """What each model answers: logits [R, N, K] on its own split, or on one split for all."""
    return torch.stack([evaluate(model, own).logits for model, own in _paired(models, split)])


def _paired(models: nn.Module | Iterable[nn.Module], split: Split | Splits) -> list[tuple[nn.Module, Split]]:
    models = [models] if isinstance(models, nn.Module) else list(models)
    if not models:
        raise ValueError("there is no model to look at: models is empty")
    if isinstance(split, Split):
        return [(model, split) for model in models]
    if len(models) != len(split):
        raise ValueError(f"{len(models)} models and {len(split)} splits do not make pairs: give split[:{len(models)}]")
    return list(zip(models, split, strict=True))


def fit(
    model: nn.Module, split: Split, config: TrainConfig | None = None, *, loss_fn: LossFn | None = None,
    val: Split | None = None, seed: int = 0, progress: bool = False, after_step: AfterStep | None = None,
) -> History:  # fmt: skip
    """Train ``model`` in place.

    Args:
        model: any module whose ``forward(images)`` gives logits ``[B, K]``; frozen parameters do not move.
        loss_fn: ``loss_fn(logits, labels)``, cross-entropy by default. If it has a parameter named ``index`` it gets
            the batch's positions ``[B]`` in ``split`` as well, to look up a table such as teacher logits. It returns
            a scalar, or a dict of named scalars in which ``"loss"`` is the one to minimise.
        val: where the best epoch is chosen, by accuracy, ties by loss; the model ends with that epoch's weights.
            Without it the last epoch's weights stay.
        seed: decides the order of the data and dropout; torch's global generator is left as it was.
        after_step: called as ``after_step({name: parameter}, step)`` after every step, without gradients: the place
            where a pruning mask is multiplied back in.

    The same arguments give the same weights, bit for bit, on one machine and thread count. ValueError: an empty split,
    labels that do not fit the logits, a loss that is no scalar or lacks ``"loss"``. DivergedError: the loss is no
    longer finite; the weights are left as they were at that step.
    """
    seed = int(seed)
    config = config or TrainConfig()
    check_split(split)
    check_trainable(model)
    loss_fn, wants_index = read_loss(loss_fn)
    device = device_of(model)
    images, labels = split.images.to(device), split.labels.to(device)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(parameters, config)
    history, best = History(), BestEpoch()
    modes, total = [(m, m.training) for m in model.modules()], config.steps(len(split))
    try:
        with torch.random.fork_rng(devices=[]), progress_bar(config.epochs, progress) as advance:
            torch.manual_seed(seed)
            for epoch in range(config.epochs):
                model.train()
                sums: dict[str, float] = {}
                for index in epoch_batches(len(split), config.batch_size, seed, epoch):
                    index = index.to(device)
                    logits = forward(model, images[index])
                    if history.steps == 0:
                        check_logits(logits, labels)
                    extra = {"index": index} if wants_index else {}
                    terms = as_terms(loss_fn(logits, labels[index], **extra))
                    check_finite(terms["loss"], history.steps, epoch, config.lr)
                    optimizer.zero_grad(set_to_none=True)
                    terms["loss"].backward()
                    optimizer.param_groups[0]["lr"] = config.lr_at(history.steps, total)
                    optimizer.step()
                    if after_step is not None:
                        with torch.no_grad():
                            after_step(parameters, history.steps)
                    history.steps += 1
                    for name, value in terms.items():
                        sums[name] = sums.get(name, 0.0) + float(value.detach()) * len(index)
                for name, value in sums.items():
                    history.terms.setdefault(name, []).append(value / len(split))
                if val is not None:
                    seen = evaluate(model, val)
                    history.val_loss.append(seen.loss)
                    history.val_accuracy.append(seen.accuracy)
                    best.offer(epoch, seen.accuracy, seen.loss, model)
                advance()
    finally:
        for module, mode in modes:
            module.training = mode
    history.best_epoch = config.epochs - 1 if val is None else best.epoch
    best.restore(model)
    return history


def use_threads(wanted: int = 2) -> int:
    """Set torch's threads to ``wanted``, but to no more than this process has cores, nor than ``$OMP_NUM_THREADS``.

    Whatever starts several lessons at once sets that for them, and a number written into a lesson must not override it.
    """
    wanted = whole_number(wanted, "wanted")
    # Only where it exists does this tell the cores that a container or taskset leaves to the process.
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    # OpenMP allows a list, one number a nesting level, and passes over what it cannot read.
    outermost = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    threads = min(wanted, cores, int(outermost) if outermost.isdecimal() and int(outermost) else wanted)
    torch.set_num_threads(threads)
    return threads


class BestEpoch:
    """Remembers the weights of the best epoch so far: highest accuracy, then lowest loss, then earliest."""

    def __init__(self):
        self.epoch, self.rank, self.state = -1, None, None

    def offer(self, epoch: int, accuracy: float, loss: float, model: nn.Module) -> None:
        rank = (accuracy, -loss)
        if self.rank is None or rank > self.rank:
            self.epoch, self.rank, self.state = epoch, rank, copy.deepcopy(model.state_dict())

    def restore(self, model: nn.Module) -> None:
        if self.state is not None:
            model.load_state_dict(self.state)


BAR_DELAY = 2.0  # seconds: what is over by then needs no bar


@contextmanager
def progress_bar(total: int, wanted: bool, what: str = "epochs") -> Iterator[Callable[[], object]]:
    """Gives ``advance()``, which moves a bar for a person who watches; silent in an unattended run."""
    if not wanted or os.environ.get("CI") or os.environ.get("COURSE_UNATTENDED"):
        yield lambda: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=what, leave=False, delay=BAR_DELAY) as bar:
        yield bar.update


def batch_sizes(examples: int, batch_size: int) -> list[int]:
    """Sizes of an epoch's batches."""
    full, rest = divmod(examples, batch_size)
    sizes = [batch_size] * full + [rest] * (rest > 0)
    return [*sizes[:-2], sizes[-2] + 1] if rest == 1 and full and batch_size > 1 else sizes


def epoch_batches(examples: int, batch_size: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """Positions of one epoch's batches, shuffled by (seed, epoch) alone, so that a batched run can repeat them."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    yield from torch.randperm(examples, generator=generator).split(batch_sizes(examples, batch_size))


def forward(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """``model(images)``, with a clear word for what goes wrong there most often."""
    try:
        logits = model(images)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        cure = "use a batch_size of at least 2, and 2 images or more"
        raise ValueError(f"BatchNorm cannot normalise a batch of {len(images)}: {cure}") from error
    except RuntimeError as error:
        kinds = {p.dtype for p in model.parameters()} if isinstance(model, nn.Module) else set()
        if images.dtype in kinds or not kinds or "type" not in str(error):
            raise
        names = ", ".join(sorted(map(str, kinds)))
        raise ValueError(f"the model is {names} and the images are {images.dtype}: model.float() fits both") from error
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model must return logits [N, K], got a {type(logits).__name__}")
    return logits


def make_optimizer(parameters: Mapping[str, Tensor], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW as every training here uses it."""
    return torch.optim.AdamW(parameters.values(), lr=config.lr, weight_decay=config.weight_decay, fused=True)


def read_loss(loss_fn: LossFn | None) -> tuple[LossFn, bool]:
    """The loss to call, and whether it wants the batch's positions."""
    if loss_fn is None:
        return F.cross_entropy, False
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable as loss_fn(logits, labels), got {type(loss_fn).__name__}")
    try:
        function = loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn
        return loss_fn, "index" in inspect.signature(function).parameters
    except ValueError:  # some built-in callables have no signature to read
        return loss_fn, False


def as_terms(result: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a loss function returned, as a dict with the key ``"loss"``."""
    terms = dict(result) if isinstance(result, Mapping) else {"loss": result}
    if "loss" not in terms:
        raise ValueError(f"a loss function's dict needs the key 'loss', got {sorted(terms)}")
    for name, value in terms.items():
        if not isinstance(value, Tensor) or value.dim() != 0:
            shape = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the loss term {name!r} must be a scalar tensor, got {shape}; did you mean .mean()?")
    return terms


def check_split(split: Split) -> None:
    """Refuse what is no split, or one without a single image."""
    if not isinstance(split, Split):
        hint = ", such as data.train[0], or use train_many" if isinstance(split, Sequence) else ""
        raise TypeError(f"split must be one Split{hint}; got {type(split).__name__}")
    if len(split) == 0:
        raise ValueError("the split is empty: there is no image to train on or to look at")


def check_trainable(model: nn.Module) -> None:
    """Refuse what cannot be trained: no module, no shape yet, nothing that requires a gradient."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name} has no shape yet (a lazy layer): run the model once on an image first")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no parameter that requires a gradient: there is nothing to train")


def check_logits(logits: Tensor, labels: Tensor) -> None:
    """Refuse logits that do not fit the labels."""
    if logits.dim() != 2:
        raise ValueError(f"the model must return logits [N, K], got shape {tuple(logits.shape)}")
    if broken := int(logits.isnan().any(dim=1).sum()):
        raise ValueError(f"{broken} of {len(logits)} rows of logits hold NaN: the model answers nothing for them")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        cure = f"build it with num_classes={int(labels.max()) + 1}"
        found = f"labels run from {labels.min()} to {labels.max()}, but the model has {logits.shape[1]} logits"
        raise ValueError(f"{found}: {cure}")


def check_finite(loss: Tensor, step: int, epoch: int, lr: float) -> None:
    """Stop a training whose loss is no longer a number."""
    if not torch.isfinite(loss).all():
        cure = f"try a learning rate below {lr:g}, and look for NaN or infinity in the images or in the loss function"
        raise DivergedError(f"the loss is {loss.detach().tolist()} at step {step} (epoch {epoch}); {cure}")


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lives."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
