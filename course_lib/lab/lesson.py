"""A lesson's set-up in one statement: data and seeds for every replica, threads, style, and the claims ledger."""

import numpy as np
import torch

from course_lib.evidence.claims import Claim, Ledger
from course_lib.evidence.plots import use_style
from course_lib.evidence.statistics import COVERS, Verdict
from course_lib.lab import predictions
from course_lib.lab.data import DataError, Split, load_replicas
from course_lib.lab.language import Text, load_text
from course_lib.lab.training import use_threads

__all__ = ["PROFILES", "Lesson"]

PROFILES = ("quick", "full")
FEWEST_IMAGES = 1000
PARTS = {"train": "training", "val": "validation", "test": "test"}


class Lesson:
    """What a lesson starts with; printing what runs on what.

    Args:
        number: such as ``"02.1"``.
        dataset: one of :data:`~course_lib.lab.data.DATASETS`.
        profile: ``"quick"``, or ``"full"`` with twice the replicas and all training images.
        seed: another seed draws everything anew: initial weights, the order of images, every replica's split.
        replicas: how many networks stand behind every interval in the quick profile on the digits; other data sets,
            whose images are larger, take at most 8.
        text: the lesson is about text, the same for every ``dataset`` and seed, and ``data`` is that of ``load_text``.

    ``data`` has each replica's ``train`` and ``test``, and ``val`` for all; ``seeds``, int64 [R], one for each replica
    (``seeds + 1000`` are others); ``covers`` says what ± covers. DataError: the data set is not there, or not usable.
    """

    def __init__(
        self, number: str, *, dataset: str = "digits", profile: str = "quick", seed: int = 0, replicas: int = 24,
        threads: int = 2, text: bool = False, quiet: bool = False,
    ):  # fmt: skip
        if profile not in PROFILES:
            raise ValueError(f"profile must be one of {', '.join(map(repr, PROFILES))}; got {profile!r}")
        use_threads(threads)
        use_style()
        torch.manual_seed(int(seed))
        count = (replicas if text or dataset == "digits" else min(replicas, 8)) * (2 if profile == "full" else 1)
        limit = {} if profile == "quick" else {"most": None}
        self.number, self.dataset, self.profile, self.seed = number, dataset, profile, int(seed)
        self.data = load_text() if text else load_replicas(dataset, count, seed=seed, **limit)
        # Far apart, so that neither other seeds of the course nor `seeds + 1000` meet these.
        self.seeds = np.arange(count) + 100_000 * self.seed
        fixed = isinstance(self.data.test, Split)
        self.covers = "training" + ("" if text else " and choice of training images" if fixed else " and split")
        COVERS[:] = [self.covers]
        self.ledger = Ledger(number, dataset=dataset, profile=profile, seed=self.seed)
        if not text and (missing := self.data.num_classes - len(self.data.val.labels.unique())):
            raise DataError(f"{missing} of the {self.data.num_classes} classes of {dataset} have no images here")
        if not quiet:
            print(self)

    def claim(self, id: str, sentence: str, holds: Verdict | bool, **options) -> Claim:
        """Record a claim and show it: see :meth:`course_lib.evidence.claims.Ledger.claim`."""
        return self.ledger.claim(id, sentence, holds, **options)

    def predict(self, question: str, options: str = "abc") -> None:
        """Ask the reader for an answer and a confidence; optional, and silent where no person is."""
        predictions.ask(question, options)

    def own_calibration(self) -> None:
        """Show how well the reader's own predictions were calibrated."""
        predictions.own_calibration()

    def __str__(self) -> str:
        if isinstance(self.data, Text):
            lengths = [f"{len(getattr(self.data, part)):,} {name}" for part, name in PARTS.items()]
            what = f"text, the same for every dataset: {', '.join(lengths)} symbols of {len(self.data.alphabet)} kinds"
            return f"{what}; {len(self.seeds)} replicas; ± covers {self.covers}"
        train, test = self.data.train.images_each, self.data.test
        fixed = isinstance(test, Split)
        each = f"its own {train:,} training" + ("" if fixed else f" and {test.images_each:,} test") + " images"
        common = f"{len(self.data.val):,} validation" + (f" and {len(test):,} test" if fixed else "")
        few = "" if len(self.data.train.pool) >= FEWEST_IMAGES else (
            f"\nThat is fewer than the {FEWEST_IMAGES:,} training images that the course is made for: "
            "intervals will be wide, and some claims will not hold."
        )  # fmt: skip
        replicas = f"{self.dataset}: {len(self.seeds)} replicas, each with {each}"
        return f"{replicas}; {common} images for all; ± covers {self.covers}{few}"
