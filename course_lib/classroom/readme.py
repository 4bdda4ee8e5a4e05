"""README: its picture and its table of claims, lifted from the stored chapters, so that neither can go stale unseen."""

import base64
import os
import re
from pathlib import Path
from typing import Any

from course_lib.classroom.chapters import chapter_paths, read_notebook, source_of
from course_lib.classroom.claims import collect
from course_lib.classroom.parameters import CourseError

__all__ = ["PICTURE", "TAG", "claims_table", "readme_picture", "refresh_readme"]

TAG = "readme-figure"
"""The tag of the one cell whose picture the README shows."""
PICTURE = Path("docs") / "pareto.png"
START, END = "<!-- measured: begin (made by `make readme`) -->", "<!-- measured: end -->"
MARKS = {"holds": "✓", "fails": "✗", "not here": "not here"}


def readme_picture(notebooks: Path) -> tuple[bytes, str]:
    """The PNG of the tagged cell, and its alternative text.

    Raises:
        CourseError: no chapter, or more than one, has a cell with the tag and a picture.
    """
    found = [
        (base64.b64decode("".join(output["data"]["image/png"])), output.get("metadata") or {})
        for path in chapter_paths(notebooks)
        for cell in read_notebook(path)["cells"]
        if TAG in (cell.get("metadata") or {}).get("tags", [])
        for output in cell.get("outputs") or ()
        if "image/png" in (output.get("data") or {})
    ]
    if len(found) != 1:
        raise CourseError(f"one cell tagged {TAG!r} with one picture is needed in {notebooks.name}/, got {len(found)}")
    picture, metadata = found[0]
    return picture, str((metadata.get("image/png") or {}).get("alt") or "")


def claims_table(notebooks: Path) -> str:
    """Every claim of the stored chapters as Markdown tables, one a chapter, folded.

    Raises:
        CourseError: a stored chapter holds an error or a claim that fails: such a state is not to be shown.
    """
    found = collect([notebooks])
    if found.errors or found.count("fails"):
        bad = found.errors or [f"{claim['id']} fails" for claim in found.claims if claim["status"] == "fails"]
        raise CourseError(f"the stored chapters are not fit to be shown: {'; '.join(bad)}")
    parts = []
    for path in chapter_paths(notebooks):
        own = [claim for claim in found.claims if claim["notebook"] == path.name]
        if not own:
            continue
        rows = [
            f"| {MARKS[claim['status']]} | {_cell(claim['sentence'])} | {_cell(_measured(claim))} |" for claim in own
        ]
        head = f"<details><summary>{_title(path)}: {len(own)} claim{'s' * (len(own) != 1)}</summary>\n\n"
        parts.append(head + "\n".join(["| | claim | measured |", "|---|---|---|", *rows]) + "\n\n</details>")
    holds = found.count("holds")
    return f"Of {len(found.claims)} claims {holds} hold in the stored run.\n\n" + "\n\n".join(parts)


def refresh_readme(root: Path, notebooks: Path, *, check: bool = False) -> list[str]:
    """Bring the README's measured part and its picture up to date, or say what is not.

    Args:
        root: the folder of ``README.md``; the picture goes to :data:`PICTURE` below it.
        notebooks: the stored chapters.
        check: change nothing.

    Returns:
        The files that were not up to date, relative to ``root``.

    Raises:
        CourseError: no README, no place in it for the measured part, or what the two functions above refuse.
    """
    readme = root / "README.md"
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise CourseError(f"cannot read {readme}: {error.strerror or error}") from None
    place = re.compile(re.escape(START) + r".*?" + re.escape(END), re.DOTALL)
    if len(place.findall(text)) != 1:
        raise CourseError(f"README.md needs one place between {START!r} and {END!r}")
    picture, alt = readme_picture(notebooks)
    made = f"{START}\n\n![{alt}]({PICTURE.as_posix()})\n\n{claims_table(notebooks)}\n\n{END}"
    wanted = {
        readme: place.sub(lambda _: made, text).encode(),
        root / PICTURE: picture,
    }
    stale = [path for path, data in wanted.items() if not path.is_file() or path.read_bytes() != data]
    for path in [] if check else stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            beside.write_bytes(wanted[path])
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    return [path.relative_to(root).as_posix() for path in stale]


def _title(path: Path) -> str:
    for cell in read_notebook(path)["cells"]:
        heading = re.search(r"^# (.+)$", source_of(cell), re.MULTILINE) if cell["cell_type"] == "markdown" else None
        if heading:
            return heading[1].strip()
    return path.stem


def _measured(claim: dict[str, Any]) -> str:
    return f"{claim['measured']} ({claim['note']})" if claim.get("note") else claim["measured"]


def _cell(text: str) -> str:
    """A text within one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
