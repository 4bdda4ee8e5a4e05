"""Executed notebooks as files: when one is still good, how it is cleaned for keeping, how it is put in place."""

import hashlib
import json
import os
import platform
import shutil
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import course_lib
from course_lib.classroom.chapters import Chapter, read_notebook, source_of
from course_lib.classroom.parameters import CourseError

__all__ = [
    "clean_for_storage",
    "failed_path",
    "final_path",
    "first_error",
    "is_current",
    "partial_path",
    "publish",
    "run_key",
    "stamp",
    "sweep_partials",
]

_WIDGET = "application/vnd.jupyter.widget-view+json"


def final_path(folder: Path, chapter: Chapter) -> Path:
    """Where a chapter that was executed to its end lies."""
    return folder / f"{chapter.name}.ipynb"


def failed_path(folder: Path, chapter: Chapter) -> Path:
    """Where a chapter lies that failed: all cells, with outputs up to the failure."""
    return folder / f"{chapter.name}.failed.ipynb"


def partial_path(folder: Path, chapter: Chapter) -> Path:
    """Where a running chapter is written: hidden, and its process in the name, so that two runs never share one."""
    return folder / f".{chapter.name}.{os.getpid()}.partial.ipynb"


def sweep_partials(folder: Path) -> None:
    """Remove what runs left behind that were killed beyond any clean-up; those of living processes stay."""
    import psutil

    for path in folder.glob(".*.partial.ipynb"):
        owner = path.name.split(".")[-3]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            path.unlink(missing_ok=True)


def publish(partial: Path, final: Path) -> None:
    """Put a finished file in its place in one step, also where the two lie on different disks."""
    try:
        os.replace(partial, final)
    except OSError:
        beside = final.with_name(f".{final.stem}.{os.getpid()}.partial.ipynb")
        try:
            shutil.copyfile(partial, beside)
            os.replace(beside, final)
        finally:
            beside.unlink(missing_ok=True)
        partial.unlink()


def run_key(chapter: Chapter, parameters: dict[str, Any]) -> str:
    """A hash of all that decides a chapter's outputs: its cells, its parameters, the library, Python and torch."""
    parts = [chapter.name, chapter.cells, parameters, _library_digest(), platform.python_version(), _torch_version()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()


def stamp(notebook: dict[str, Any], run: dict[str, Any]) -> None:
    """Record in the notebook's metadata what it was executed with, and a digest of its cells."""
    notebook["metadata"]["course_run"] = {**run, "digest": _cells_digest(notebook)}


def is_current(path: Path, key: str) -> bool:
    """Whether the file is a finished run with this key whose cells and outputs are as they were written."""
    try:
        notebook = read_notebook(path)
    except CourseError:
        return False
    run = (notebook.get("metadata") or {}).get("course_run") or {}
    return run.get("key") == key and run.get("digest") == _cells_digest(notebook)


def first_error(notebook: dict[str, Any]) -> dict[str, Any] | None:
    """The first error among a notebook's outputs, as Jupyter stores it, or None."""
    outputs = (out for cell in notebook["cells"] for out in cell.get("outputs") or ())
    return next((out for out in outputs if out.get("output_type") == "error"), None)


def clean_for_storage(notebook: dict[str, Any]) -> list[str]:
    """Make an executed notebook fit for keeping under version control, in place: the same run gives the same bytes.

    Times, run metadata, injected cells, widgets and stderr go; execution counts run from 1; a cell's id follows
    from its content, so that an edit elsewhere does not change it.

    Returns:
        one line for each cell that wrote to stderr, so that nothing is dropped unseen.

    Raises:
        CourseError: an output is an error: such a notebook is not to be stored.
    """
    error = first_error(notebook)
    if error is not None:
        raise CourseError(f"not stored, it holds an error: {error.get('ename')}: {error.get('evalue')}")
    about = notebook["metadata"]
    for unwanted in ("papermill", "widgets", "course_run", "signature"):
        about.pop(unwanted, None)
    about["kernelspec"] = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    about["language_info"] = {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"}
    notebook["cells"] = [c for c in notebook["cells"] if "injected-parameters" not in c["metadata"].get("tags", [])]
    notebook["nbformat"], notebook["nbformat_minor"] = 4, 5
    dropped, ids, count = [], set(), 0
    for position, cell in enumerate(notebook["cells"], start=1):
        cell["id"] = _stable_id(cell, ids)
        for unwanted in ("papermill", "execution", "ExecuteTime"):
            cell["metadata"].pop(unwanted, None)
        if not cell["metadata"].get("tags", True):
            del cell["metadata"]["tags"]
        if cell["cell_type"] != "code":
            continue
        executed = cell.get("execution_count") is not None
        count += executed
        cell["execution_count"] = count if executed else None
        kept = []
        for output in cell["outputs"]:
            if output.get("name") == "stderr":
                dropped.append(f"cell {position} wrote to stderr, which is not stored: {_first_line(output)}")
            elif _WIDGET not in output.get("data", {}):
                if output["output_type"] == "execute_result":
                    output["execution_count"] = cell["execution_count"]
                kept.append(output)
        cell["outputs"] = kept
    return dropped


def _first_line(output: dict[str, Any]) -> str:
    text = output.get("text", "")
    lines = (text if isinstance(text, str) else "".join(text)).strip().splitlines()
    return lines[0][:100] if lines else "(blank)"


def _stable_id(cell: dict[str, Any], taken: set[str]) -> str:
    base = hashlib.sha256(f"{cell['cell_type']}\n{source_of(cell)}".encode()).hexdigest()[:8]
    made, copy = base, 2
    while made in taken:
        made, copy = f"{base}-{copy}", copy + 1
    taken.add(made)
    return made


def _cells_digest(notebook: dict[str, Any]) -> str:
    cells = json.loads(json.dumps(notebook["cells"]))
    for cell in cells:
        cell["source"] = source_of(cell)
        for output in cell.get("outputs", ()):
            # A file splits texts into lines, a notebook in memory does not.
            for place in (output, output.get("data", {})):
                for name, value in place.items():
                    if isinstance(value, list) and all(isinstance(line, str) for line in value):
                        place[name] = "".join(value)
    return hashlib.sha256(json.dumps(cells, sort_keys=True).encode()).hexdigest()


@cache
def _library_digest() -> str:
    folder = Path(course_lib.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def _torch_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return "none"
