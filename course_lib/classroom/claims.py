"""Claims: the ledgers of executed chapters, collected into one list and one exit code."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from course_lib.classroom.chapters import read_notebook
from course_lib.classroom.display import show_table, shown_path
from course_lib.classroom.parameters import CourseError

__all__ = ["Collection", "collect", "default_source", "notebooks_in", "show_claims", "summary", "write_claims"]

# The ledger's own, repeated here: importing it would load torch for a command that only reads files.
MIME = "application/vnd.compression-course.claims+json"
STATUSES = ("holds", "fails", "not here")

_STYLES = {"fails": "bold red", "not here": "yellow"}


@dataclass
class Collection:
    """What a set of executed notebooks says.

    Attributes:
        claims: the ledgers' records in order of the notebooks, each with the ``notebook`` that it stands in.
        errors: a line for each notebook that failed or carries an error output.
        notebooks: how many were read.
    """

    claims: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    notebooks: int = 0

    def count(self, status: str) -> int:
        """How many claims have this status."""
        return sum(claim["status"] == status for claim in self.claims)

    @property
    def exit_code(self) -> int:
        """1 if a claim fails or a chapter did; 2 if there is nothing to judge; else 0."""
        if self.errors or self.count("fails"):
            return 1
        return 0 if self.claims else 2


def notebooks_in(folder: Path) -> list[Path]:
    """The executed notebooks of a folder, failed ones included, hidden ones not."""
    return sorted(path for path in folder.glob("*.ipynb") if not path.name.startswith("."))


def default_source(notebooks: Path) -> Path:
    """The newest run under ``build/course`` beside the notebooks folder, or that folder where there is no run."""
    runs = [folder for folder in (notebooks.parent / "build" / "course").glob("*") if notebooks_in(folder)]
    return max(runs, key=lambda run: max(p.stat().st_mtime for p in notebooks_in(run)), default=notebooks)


def collect(paths: Sequence[Path]) -> Collection:
    """Read the claims of notebooks, or of all notebooks in a folder.

    In a folder, a notebook that cannot be read is one of the errors; the others are read all the same.

    Raises:
        CourseError: a path does not exist, or is a file that is no notebook or holds a damaged ledger.
    """
    found = Collection()
    for path in paths:
        if not path.exists():
            raise CourseError(f"there is no {path}; give executed notebooks or a folder of them")
        if not path.is_dir():
            _read_into(found, path)
            continue
        for file in notebooks_in(path):
            try:
                _read_into(found, file)
            except CourseError as damaged:
                found.errors.append(str(damaged))
    return found


def summary(found: Collection) -> str:
    """The claims counted, in one line.

    >>> summary(Collection([{"status": "holds"}, {"status": "not here"}], [], 1))
    '2 claims: 1 holds, 0 fail, 1 does not hold here'
    """
    if not found.claims:
        return "no claims"
    holds, fails, elsewhere = (found.count(status) for status in STATUSES)
    return (
        f"{len(found.claims)} claim{'s' * (len(found.claims) != 1)}: {holds} hold{'s' * (holds == 1)}, "
        f"{fails} fail{'s' * (fails == 1)}, {elsewhere} do{'es' * (elsewhere == 1)} not hold here"
    )


def write_claims(found: Collection, file: Path) -> None:
    """Write the collection as JSON, in one step."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.write_text(as_json(found), encoding="utf-8", newline="\n")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def as_json(found: Collection) -> str:
    """The collection as JSON text: ``claims`` and ``errors``."""
    return json.dumps({"claims": found.claims, "errors": found.errors}, indent=1, ensure_ascii=False) + "\n"


def show_claims(paths: Sequence[Path], notebooks: Path, *, json_wanted: bool = False) -> int:
    """Print the claims of the paths, or of the default source, and return the exit code.

    Raises:
        CourseError: as for :func:`collect`, or there is no claim and no failure in what was read.
    """
    sources = list(paths) or [default_source(notebooks)]
    found = collect(sources)
    if found.exit_code == 2:
        read = ", ".join(shown_path(source) for source in sources)
        raise CourseError(f"no claims in {read} ({found.notebooks} notebooks): run `python -m course_lib run` first")
    if json_wanted:
        print(as_json(found), end="")
        return found.exit_code
    kind = "" if paths else " (stored notebooks; no run yet)" if sources == [notebooks] else " (the newest run)"
    print(f"claims of {', '.join(shown_path(source) for source in sources)}{kind}")
    rows = [[claim["id"], claim["status"], claim["sentence"], _measured(claim)] for claim in found.claims]
    if rows:
        styles = [_STYLES.get(claim["status"], "") for claim in found.claims]
        show_table(["claim", "status", "sentence", "measured"], rows, styles=styles)
    for error in found.errors:
        print(f"failed: {error}")
    print(summary(found))
    return found.exit_code


def _measured(claim: dict[str, Any]) -> str:
    note = f" ({claim['note']})" if claim.get("note") else ""
    return f"{claim['measured']}{note} [{claim['dataset']}, {claim['profile']}]"


def _read_into(found: Collection, file: Path) -> None:
    notebook = read_notebook(file)
    found.notebooks += 1
    failed = f"{file.name} did not run to its end" if file.name.endswith(".failed.ipynb") else ""
    for cell in notebook["cells"]:
        for output in cell.get("outputs") or ():
            if output.get("output_type") == "error":
                failed = f"{file.name}: {output.get('ename')}: {_first_line(output.get('evalue'))}".rstrip(": ")
            ledger = (output.get("data") or {}).get(MIME)
            if ledger is not None:
                found.claims += [{**claim, "notebook": file.name} for claim in _records(ledger, file)]
    if failed:
        found.errors.append(failed)


def _first_line(value: Any) -> str:
    """The first line of a text, for a place where one line fits."""
    return str(value or "").strip().partition("\n")[0]


def _records(ledger: Any, file: Path) -> list[dict[str, Any]]:
    needed = ("id", "sentence", "measured", "status", "dataset", "profile")
    claims = ledger.get("claims") if isinstance(ledger, dict) else None
    for claim in claims if isinstance(claims, list) else [None]:
        texts = isinstance(claim, dict) and all(isinstance(claim.get(name), str) for name in needed)
        if not texts or claim["status"] not in STATUSES:
            raise CourseError(f"{file}: its claims are damaged: {str(claim)[:100]}")
    return claims
