"""Training one model, and looking at it: batches in memory, AdamW, the best epoch chosen on validation."""

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.lab.data import Split
from course_lib.lab.loop import (
    AfterStep,
    BestEpoch,
    DivergedError,
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

__all__ = ["SCHEDULES", "DivergedError", "Evaluation", "History", "TrainConfig", "evaluate", "fit"]

SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


@dataclass(frozen=True)
class TrainConfig:
    """How to train: AdamW (Loshchilov & Hutter 2019) with a learning rate that is set anew at every step.

    Attributes:
        epochs: passes over the split, at least 1.
        batch_size: images a step, at least 1; the last batch of an epoch may be smaller.
        lr: learning rate of the first step, above 0.
        weight_decay: AdamW's decoupled decay, at least 0.
        schedule: ``"constant"``, ``"linear"`` (to 0) or ``"cosine"`` (to 0), all counted in steps, not in epochs.
    """

    epochs: int = 20
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 1e-2
    schedule: str = "cosine"

    def __post_init__(self):
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr must be a positive number, got {self.lr!r}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay must be a number of at least 0, got {self.weight_decay!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")

    def steps(self, examples: int) -> int:
        """Optimiser steps of a whole training on that many examples."""
        return self.epochs * math.ceil(examples / self.batch_size)

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of step ``step`` (from 0) out of ``steps``.

        >>> TrainConfig(lr=0.1, schedule="linear").lr_at(5, 10)
        0.05
        """
        return self.lr * SCHEDULES[self.schedule](step / steps)


@dataclass
class History:
    """What a training left behind, one entry an epoch.

    ``terms`` holds the mean of every named term that the loss function returned (always ``"loss"``). ``best_epoch``
    (from 0) is the epoch whose weights the model carries: the best on validation, or the last where there is none.
    """

    terms: dict[str, list[float]] = field(default_factory=dict)
    val_loss: list[float] = field(default_factory=list)
    val_accuracy: list[float] = field(default_factory=list)
    best_epoch: int = -1
    steps: int = 0
    seconds: float = 0.0

    @property
    def train_loss(self) -> list[float]:
        """Mean training loss of each epoch."""
        return self.terms.get("loss", [])


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One look at a model: ``accuracy`` in [0, 1], mean cross-entropy ``loss``, ``logits`` [N, K], ``labels`` [N]."""

    accuracy: float
    loss: float
    logits: Tensor
    labels: Tensor


def evaluate(model: nn.Module, split: Split, *, batch_size: int = 1024) -> Evaluation:
    """Run ``model`` in eval mode over ``split`` without gradients; its mode is as it was afterwards.

    Raises:
        ValueError: the split is empty, or the model's logits do not fit its labels.
    """
    check_split(split)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            logits = torch.cat([model(images) for images in split.images.to(device_of(model)).split(batch_size)]).cpu()
    finally:
        for module, mode in modes.items():
            module.training = mode
    logits = logits.clone()
    check_logits(logits, split.labels)
    return score(logits, split.labels)


def score(logits: Tensor, labels: Tensor) -> Evaluation:
    """Accuracy and cross-entropy of ``logits`` [N, K] against ``labels`` [N]."""
    accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
    return Evaluation(accuracy, F.cross_entropy(logits, labels).item(), logits, labels)


def fit(
    model: nn.Module,
    split: Split,
    config: TrainConfig | None = None,
    *,
    loss_fn: LossFn | None = None,
    val: Split | None = None,
    seed: int = 0,
    progress: bool = False,
    after_step: AfterStep | None = None,
) -> History:
    """Train ``model`` in place.

    Args:
        model: any module whose ``forward(images)`` gives logits ``[B, K]``; frozen parameters do not move.
        split: training images and labels.
        config: see :class:`TrainConfig`; ``None`` means its defaults.
        loss_fn: ``loss_fn(logits, labels)``, cross-entropy by default. If it has a parameter named ``index`` it gets
            the batch's positions ``[B]`` in ``split`` as well, to look up a table such as teacher logits. It returns
            a scalar, or a dict of named scalars in which ``"loss"`` is the one to minimise.
        val: where the best epoch is chosen, by accuracy, ties by loss; the model ends with that epoch's weights.
            Without it the last epoch's weights stay.
        seed: decides the order of the data and dropout; torch's global generator is left as it was.
        progress: show a bar if a person watches; nothing is ever shown when ``CI`` or ``COURSE_UNATTENDED`` is set.
        after_step: called as ``after_step({name: parameter}, step)`` after every step, without gradients: the place
            where a pruning mask is multiplied back in.

    Returns:
        A :class:`History`. The same arguments give the same weights, bit for bit, on one machine and thread count.

    Raises:
        ValueError: an empty split, labels that do not fit the logits, a loss that is no scalar or lacks ``"loss"``.
        DivergedError: the loss is no longer finite; the weights are left as they were at that step.
    """
    config = config or TrainConfig()
    check_split(split)
    loss_fn, wants_index = read_loss(loss_fn)
    device = device_of(model)
    images, labels = split.images.to(device), split.labels.to(device)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("the model has no parameter that requires a gradient: there is nothing to train")
    optimizer = make_optimizer(parameters, config.lr, config.weight_decay)
    history, best, started = History(), BestEpoch(), time.perf_counter()
    was_training, total = model.training, config.steps(len(split))
    bar = ProgressBar(config.epochs, progress)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            for epoch in range(config.epochs):
                model.train()
                sums: dict[str, float] = {}
                for index in epoch_batches(len(split), config.batch_size, seed, epoch):
                    index = index.to(device)
                    logits = model(images[index])
                    if history.steps == 0:
                        check_logits(logits, labels)
                    extra = {"index": index} if wants_index else {}
                    terms = as_terms(loss_fn(logits, labels[index], **extra))
                    check_finite(terms["loss"], history.steps, epoch, config.lr)
                    optimizer.zero_grad(set_to_none=True)
                    terms["loss"].backward()
                    set_lr(optimizer, config.lr_at(history.steps, total))
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
                bar.update(history)
        finally:
            bar.close()
            model.train(was_training)

    history.best_epoch = config.epochs - 1 if val is None else best.epoch
    best.restore(model)
    history.seconds = time.perf_counter() - started
    return history


class ProgressBar:
    """A tqdm bar over epochs for a person who watches; silent in CI and in an unattended run."""

    def __init__(self, epochs: int, wanted: bool):
        self.bar = None
        if wanted and not (os.environ.get("CI") or os.environ.get("COURSE_UNATTENDED")):
            from tqdm.auto import tqdm

            self.bar = tqdm(total=epochs, desc="epochs", leave=False)

    def update(self, history: History) -> None:
        if self.bar is not None:
            shown = {"loss": f"{history.train_loss[-1]:.3f}"} if history.train_loss else {}
            if history.val_accuracy:
                shown["val"] = f"{history.val_accuracy[-1]:.1%}"
            self.bar.set_postfix(shown)
            self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
