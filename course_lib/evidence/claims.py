"""The claims ledger: a lesson's sentences that carry a number, each with what was measured and whether it holds."""

import html
import math
from dataclasses import asdict, dataclass, field

from course_lib.evidence.statistics import Verdict

__all__ = ["MIME", "Claim", "ClaimFailed", "Ledger"]

MIME = "application/vnd.compression-course.claims+json"
DEFAULT_DATASET, DEFAULT_PROFILE = "digits", "quick"
MARKS = {"holds": "✓", "fails": "✗", "not here": "–"}


class ClaimFailed(AssertionError):
    """A claim is false on the data that it is made for; the text lists sentence and measurement."""


@dataclass(frozen=True)
class Claim:
    """One sentence and what became of it; in a notebook it shows itself and stores its numbers.

    ``status`` is ``"holds"``, ``"fails"`` (false where the sentence is promised: the default data set and profile) or
    ``"not here"`` (false on another data set, profile or processor: a lesson, not an error). ``verdict`` is
    ``"held"``, ``"not"`` or ``"undecided"``. ``expected`` names what the literature expects and was not seen.
    ``parts`` has one dict an interval: value, low, high, n, relation, bound, unit.
    """

    id: str
    lesson: str
    sentence: str
    holds: bool
    verdict: str
    status: str
    measured: str
    dataset: str
    profile: str
    seed: int = 0
    note: str = ""
    expected: str = ""
    parts: tuple[dict, ...] = field(default=())

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        aside = f" Expected, not seen: {self.expected}." if self.expected else ""
        unseen = " (not measured here)" if "not measured" in self.measured else " (does not hold here)"
        sentence = self.sentence + (unseen if self.status == "not here" else "") + aside
        measured, mark = self.measured + (f"; {self.note}" if self.note else ""), MARKS[self.status]
        return {
            MIME: {"claims": [asdict(self)]},
            "text/html": f"<p><b>{mark}</b> {html.escape(sentence)} <i>{html.escape(measured)}</i></p>",
            "text/plain": f"{mark} {sentence} [{measured}]",
        }


class Ledger:
    """Collects a lesson's claims. A claim that is made again under its id replaces the earlier one.

    ``dataset``, ``profile`` and ``seed`` are what this run is on: a false claim fails on ``digits``, ``quick``, only.

    >>> ledger = Ledger("00", dataset="mnist")
    >>> ledger.claim("00.sum", "Two and two make four.", 2 + 2 == 4, measured=4).status
    'holds'
    >>> ledger.claim("00.five", "Two and two make five.", 2 + 2 == 5, measured=4).status
    'not here'
    """

    def __init__(self, lesson: str, *, dataset: str = DEFAULT_DATASET, profile: str = DEFAULT_PROFILE, seed: int = 0):
        self.lesson, self.dataset, self.profile, self.seed = str(lesson), dataset, profile, int(seed)
        self._claims: dict[str, Claim] = {}

    @property
    def claims(self) -> list[Claim]:
        """The claims in the order in which they were first made."""
        return list(self._claims.values())

    def claim(
        self, id: str, sentence: str, holds: Verdict | bool, *,
        measured: object = None, expected: str = "", hardware: str = "", here: bool = True,
    ) -> Claim:  # fmt: skip
        """Record one claim.

        Args:
            id: such as ``"02.sign-mask"``; it stands for one ``sentence``, as a reader meets it, or is a ValueError.
            holds: a :class:`~course_lib.evidence.statistics.Verdict` such as ``cost > 10``, or a bool.
            measured: for a bool: the value, or a text with it (else TypeError). A verdict knows its own.
            expected: what the literature expects and this claim refutes, with its source.
            hardware: what the claim needs of the processor, such as ``"VNNI"``; ``here``: whether this machine has it.
                Where it has not, a false claim is reported instead of failing.
        """
        if not id or not sentence.strip():
            raise ValueError(f"a claim needs an id and a sentence, got {id!r} and {sentence!r}")
        known = self._claims.get(id)
        if known is not None and known.sentence != sentence:
            raise ValueError(f"the id {id!r} stands for another sentence already: {known.sentence!r}")
        parts, verdict = (), getattr(holds, "status", None)
        if isinstance(holds, Verdict):
            parts = tuple(
                dict(value=i.mean, low=i.low, high=i.high, n=i.n, relation=relation, bound=bound, unit=i.unit)
                for i, relation, bound in holds.parts
                if all(map(math.isfinite, (i.mean, i.low, i.high, bound)))  # no JSON; NaN: a tool is not installed
            )
            measured = holds.measured if measured is None else measured
            truth = bool(holds)
        else:
            truth = holds.item() if hasattr(holds, "item") else holds
            if not isinstance(truth, bool):
                raise TypeError(f"holds must be a verdict such as `gain > 0`, or a bool; got {type(holds).__name__}")
            if measured is None:
                raise TypeError("a bool does not say what was measured: compare an Interval, or give measured=")
            verdict = "held" if truth else "not"
        binding = self.dataset == DEFAULT_DATASET and self.profile == DEFAULT_PROFILE and here
        status = "holds" if truth else "fails" if binding else "not here"
        note = f"needs {hardware}" if hardware else ""
        about = (self.dataset, self.profile, self.seed, note, expected, parts)
        self._claims[id] = Claim(id, self.lesson, sentence, truth, verdict, status, str(measured), *about)
        return self._claims[id]

    def close(self) -> None:
        """Raise :class:`ClaimFailed` if a claim has the status ``"fails"``; ValueError if there is none at all."""
        if not self._claims:
            raise ValueError(f"the ledger of lesson {self.lesson} is empty: a lesson without a claim proves nothing")
        false = [f"  {c.id}: {c.sentence} (measured: {c.measured})" for c in self.claims if c.status == "fails"]
        if false:
            raise ClaimFailed(f"{len(false)} of {len(self._claims)} claims do not hold:\n" + "\n".join(false))
