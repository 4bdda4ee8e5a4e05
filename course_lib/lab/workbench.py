"""The networks that many cells of a study start from: one dense network, one teacher and one transfer set a seed.

Each is trained once, whichever cell asks first, and kept by :func:`~course_lib.lab.checkpoints.train_or_load`:
processes that ask at the same time wait for the one that trains.
"""

import functools
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from course_lib.lab.blends import blended, follow_teacher, teacher_answers
from course_lib.lab.checkpoints import train_or_load
from course_lib.lab.data import DataSplits, load_dataset
from course_lib.lab.deep_compression import Lesson
from course_lib.lab.models import build_model
from course_lib.lab.training import TrainConfig, fit

__all__ = ["Workbench", "narrow_lenet"]

PROFILES = {"quick": 1, "full": 2}
BLENDS = 3
FULL_EPOCHS_UP_TO = 2_500
"""Training images up to which epochs are as written; beyond, the number of steps stays what it is there."""


def narrow_lenet(
    input_shape: tuple[int, int, int], num_classes: int, hidden: tuple[int, int], *, seed: int | None = None
) -> nn.Module:
    """LeNet-300-100 with other widths, under the same names; ``hidden=(300, 100)`` is ``build_model("lenet300")``.

    >>> narrow_lenet((1, 8, 8), 10, (30, 10)).fc2
    Linear(in_features=30, out_features=10, bias=True)
    """
    if min(hidden) < 1:
        raise ValueError(f"hidden must be two positive widths, got {hidden}")
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        first, second = hidden
        return nn.Sequential(
            OrderedDict(
                flatten=nn.Flatten(),
                fc1=nn.Linear(math.prod(input_shape), first),
                relu1=nn.ReLU(),
                fc2=nn.Linear(first, second),
                relu2=nn.ReLU(),
                logits=nn.Linear(second, num_classes),
            )
        )


@functools.cache
def _data(dataset: str, split_seed: int) -> DataSplits:
    return load_dataset(dataset, seed=split_seed)


@functools.cache
def _code() -> str:
    from course_lib.lab.families import measure_trial
    from course_lib.lab.study_store import identity

    return identity(measure_trial, "", kept=True)


@dataclass(frozen=True)
class Workbench:
    """What one seed's cells share.

    Attributes:
        dataset, split_seed: as for :func:`~course_lib.lab.data.load_dataset`.
        seed: of the networks: initial weights and order of the images.
        profile: ``"quick"``, or ``"full"`` with twice the epochs.
        width: the dense network is LeNet-300-100 with its hidden layers this many times as wide.
    """

    dataset: str = "digits"
    split_seed: int = 0
    seed: int = 0
    profile: str = "quick"
    width: float = 1.0

    def __post_init__(self):
        if self.profile not in PROFILES:
            raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {self.profile!r}")
        if not self.width > 0:
            raise ValueError(f"width must be above 0, got {self.width!r}")

    @property
    def data(self) -> DataSplits:
        """The data set, loaded once a process."""
        return _data(self.dataset, self.split_seed)

    @property
    def hidden(self) -> tuple[int, int]:
        """Widths of the dense network's hidden layers."""
        return max(1, round(300 * self.width)), max(1, round(100 * self.width))

    def config(self, epochs: int, *, copies: int = 0, **options) -> TrainConfig:
        """A training of ``epochs`` passes over the training images, fewer where there are many images.

        With ``copies`` blends the passes are over a split that many times longer, for the same number of steps.
        """
        share = PROFILES[self.profile] * min(1.0, FULL_EPOCHS_UP_TO / len(self.data.train)) / (copies + 1)
        return TrainConfig(epochs=max(1, round(epochs * share)), **options)

    def build(self, name: str = "lenet300") -> nn.Module:
        """An untrained network of this seed: ``"lenet300"`` at the bench's width, or any name of ``build_model``."""
        shape, classes = self.data.input_shape, self.data.num_classes
        if name == "lenet300":
            return narrow_lenet(shape, classes, self.hidden, seed=self.seed)
        return build_model(name, shape, classes, seed=self.seed)

    def keep(
        self, name: str, make: Callable[[], nn.Module], train: Callable[[nn.Module], nn.Module | None], **key
    ) -> nn.Module:
        """``train(make())``, trained once and kept under this bench, ``key`` and the source of the code."""
        data = self.data
        content = [data.name, self.split_seed, list(data.mean), list(data.std), data.train.labels]
        mine = {"data": content, "seed": self.seed, "profile": self.profile, "width": self.width, "code": _code()}
        return train_or_load(name, make, train, key={**mine, **key}).eval()

    def trained(self, name: str = "lenet300", *, epochs: int = 15, lr: float = 2e-3) -> nn.Module:
        """That network, trained on the labels."""
        config = self.config(epochs, lr=lr)

        def train(model: nn.Module) -> None:
            fit(model, self.data.train, config, val=self.data.val, seed=self.seed)

        return self.keep("trained", lambda: self.build(name), train, model=name, config=config)

    def teacher(self) -> nn.Module:
        """The larger network that students learn from: ``"cnn_teacher"``."""
        return self.trained("cnn_teacher", epochs=6)

    def labels(self) -> Lesson:
        """Training images with their labels."""
        return Lesson(self.data.train, self.data.val)

    def answers(self) -> Lesson:
        """Training images and blends of them, with the teacher's answers beside the labels."""
        split, answers = _transfer(self)
        return Lesson(split, self.data.val, follow_teacher, {"teacher": answers[None]})

    def distilled(self, name: str = "lenet300", *, epochs: int = 24, lr: float = 2e-3) -> nn.Module:
        """That network, trained on labels and the teacher's answers, for as many steps as ``epochs`` alone."""
        config = self.config(epochs, copies=BLENDS, lr=lr)

        def train(model: nn.Module) -> None:
            lesson = self.answers()
            loss = functools.partial(lesson.loss_fn, teacher=lesson.settings["teacher"][0])
            fit(model, lesson.split, config, loss_fn=loss, val=lesson.val, seed=self.seed)

        return self.keep("distilled", lambda: self.build(name), train, model=name, config=config)


@functools.lru_cache(maxsize=4)
def _transfer(bench: Workbench):
    split = blended(bench.data.train, BLENDS, seed=bench.seed)
    return split, teacher_answers(bench.teacher(), split)
