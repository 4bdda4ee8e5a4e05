"""What a training step needs, shared by :mod:`course_lib.lab.training` and :mod:`course_lib.lab.replicas`."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.lab.data import Split

LossFn = Callable[..., Tensor | Mapping[str, Tensor]]
AfterStep = Callable[[dict[str, Tensor], int], None]


class DivergedError(RuntimeError):
    """The loss stopped being a finite number; the text says at which step, and what to try."""


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


def epoch_batches(examples: int, batch_size: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """Positions of one epoch's batches, shuffled by (seed, epoch) alone, so that a batched run can repeat them."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    yield from torch.randperm(examples, generator=generator).split(batch_size)


def make_optimizer(parameters: Mapping[str, Tensor], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW as every training here uses it."""
    return torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=weight_decay, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the step to come."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def read_loss(loss_fn: LossFn | None) -> tuple[LossFn, bool]:
    """The loss to call, and whether it wants the batch's positions."""
    if loss_fn is None:
        return F.cross_entropy, False
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable as loss_fn(logits, labels), got {type(loss_fn).__name__}")
    try:
        return loss_fn, "index" in inspect.signature(loss_fn).parameters
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
    """Refuse a split without a single image."""
    if len(split) == 0:
        raise ValueError("the split is empty: there is no image to train on or to look at")


def check_logits(logits: Tensor, labels: Tensor) -> None:
    """Refuse logits that do not fit the labels."""
    if logits.dim() != 2:
        raise ValueError(f"the model must return logits [N, K], got shape {tuple(logits.shape)}")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()}, but the model has {logits.shape[1]} logits: "
            f"build it with num_classes={int(labels.max()) + 1}"
        )


def check_finite(loss: Tensor, step: int, epoch: int, lr: float) -> None:
    """Stop a training whose loss is no longer a number."""
    if not torch.isfinite(loss).all():
        raise DivergedError(
            f"the loss is {loss.detach().tolist()} at step {step} (epoch {epoch}); "
            f"try a learning rate below {lr:g}, and look for NaN or infinity in the images or in the loss function"
        )


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lives."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
