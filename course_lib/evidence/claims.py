"""The claims ledger: a chapter's sentences that carry a number, each with what was measured and whether it holds."""

import html
from dataclasses import asdict, dataclass

__all__ = ["MIME", "Claim", "ClaimFailed", "Ledger"]

MIME = "application/vnd.compression-course.claims+json"
DEFAULT_DATASET = "digits"
DEFAULT_PROFILE = "quick"
MARKS = {"holds": "✓ holds", "fails": "✗ fails", "not here": "– does not hold here"}


class ClaimFailed(AssertionError):
    """A claim is false on the data that it is made for; the text lists sentence and measurement."""


@dataclass(frozen=True)
class Claim:
    """One sentence and what became of it.

    ``status`` is ``"holds"``, ``"fails"`` (false where the sentence is promised: the default data set and profile) or
    ``"not here"`` (false on another data set, profile or processor: a lesson, not an error).
    """

    id: str
    chapter: str
    sentence: str
    holds: bool
    measured: str
    status: str
    dataset: str
    profile: str
    note: str = ""

    def _repr_html_(self) -> str:
        return (
            f"<p><b>{MARKS[self.status]}</b> · {html.escape(self.sentence)} <i>({html.escape(self.measured)})</i></p>"
        )


class Ledger:
    """Collects a chapter's claims; :meth:`close` in its last cell shows the table and fails the run if one is false.

    Args:
        chapter: such as ``"01"``.
        dataset, profile: what this run is on. A false claim fails only on ``digits`` with the ``quick`` profile.

    >>> ledger = Ledger("00", dataset="mnist")
    >>> ledger.claim("00.sum", "Two and two make four.", holds=2 + 2 == 4, measured=4).status
    'holds'
    >>> ledger.claim("00.five", "Two and two make five.", holds=2 + 2 == 5, measured=4).status
    'not here'
    """

    def __init__(self, chapter: str, *, dataset: str = DEFAULT_DATASET, profile: str = DEFAULT_PROFILE):
        self.chapter, self.dataset, self.profile = str(chapter), dataset, profile
        self.claims: list[Claim] = []

    def claim(
        self, id: str, sentence: str, *, holds: bool, measured: object, hardware: str = "", here: bool = True
    ) -> Claim:
        """Record one claim.

        Args:
            id: unique in the ledger; convention ``"<chapter>.<word>"``.
            sentence: the claim as a reader meets it.
            holds: a bool, computed from measurements. (A 0-d tensor or a numpy bool is read as one.)
            measured: the value, or a text with value and interval.
            hardware: what the claim needs of the processor, if anything, such as ``"VNNI"``.
            here: whether this machine has it; where it has not, a false claim is reported instead of failing.

        Raises:
            ValueError: an empty sentence or id, or an id given before. TypeError: ``holds`` is no truth value.
        """
        if not id or not sentence.strip():
            raise ValueError(f"a claim needs an id and a sentence, got {id!r} and {sentence!r}")
        if any(known.id == id for known in self.claims):
            raise ValueError(f"the claim {id!r} is already in the ledger: ids are unique")
        truth = holds.item() if hasattr(holds, "item") else holds
        if not isinstance(truth, bool):
            raise TypeError(f"holds must be a bool, got {type(holds).__name__} {holds!r}")
        binding = self.dataset == DEFAULT_DATASET and self.profile == DEFAULT_PROFILE and here
        status = "holds" if truth else "fails" if binding else "not here"
        note = f"needs {hardware}" if hardware else ""
        made = Claim(id, self.chapter, sentence, truth, str(measured), status, self.dataset, self.profile, note)
        self.claims.append(made)
        return made

    def close(self) -> None:
        """Show the table, which also stores it in the notebook for ``python -m course_lib claims``.

        Raises:
            ClaimFailed: at least one claim has the status ``"fails"``.
            ValueError: the ledger is empty.
        """
        if not self.claims:
            raise ValueError(f"the ledger of chapter {self.chapter} is empty: a chapter without a claim proves nothing")
        from IPython.display import display

        records = {"claims": [asdict(claim) for claim in self.claims]}
        display({MIME: records, "text/html": self._repr_html_(), "text/plain": str(self)}, raw=True)
        false = [claim for claim in self.claims if claim.status == "fails"]
        if false:
            lines = "\n".join(f"  {claim.id}: {claim.sentence} (measured: {claim.measured})" for claim in false)
            raise ClaimFailed(f"{len(false)} of {len(self.claims)} claims do not hold:\n{lines}")

    def __str__(self) -> str:
        width = max((len(claim.id) for claim in self.claims), default=0)
        return "\n".join(f"{c.status:8} {c.id:{width}}  {c.sentence}  [{c.measured}]" for c in self.claims)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td style='text-align:left;white-space:nowrap'>{MARKS[c.status]}</td>"
            f"<td style='text-align:left'><code>{html.escape(c.id)}</code></td>"
            f"<td style='text-align:left'>{html.escape(c.sentence)}</td>"
            f"<td style='text-align:left'>{html.escape(c.measured)}{' (' + c.note + ')' if c.note else ''}</td></tr>"
            for c in self.claims
        )
        head = "".join(f"<th style='text-align:left'>{name}</th>" for name in ("", "claim", "sentence", "measured"))
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
