"""Practice: ``check`` in a notebook, and the students' notebooks made from the solutions.

``notebooks/solutions/NN_name.ipynb`` is the source, with nbgrader's metadata. ``generate`` writes the student's
``notebooks/NN_name/practice.ipynb``: what nbgrader's generate_assignment would write (a test compares them).
"""

import difflib
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import nbformat

from course_lib.classroom.answers import Result, judge
from course_lib.classroom.lessons import CourseError, notebooks_folder
from course_lib.classroom.tasks_language import TASKS
from course_lib.classroom.tasks_losses import dense_networks
from course_lib.files import write_file

__all__ = ["TASKS", "check", "dense_networks", "generate", "student_version"]

STUB = ("# YOUR CODE HERE", "raise NotImplementedError()")


def check(name: str, function: Callable) -> Result:
    """Try a learner's ``function`` as the answer to the task ``name``; says one line, and never raises.

    >>> check("count_macs_linear", lambda widths: None)
    count_macs_linear: not yet. It returned None every time (is a return missing?); a whole number is expected.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(str(name), TASKS, n=1)
        return Result(str(name), False, f"no task has this name{f'; did you mean {near[0]!r}?' if near else '.'}")
    result = judge(TASKS[name], function)
    if os.environ.get("NBGRADER_EXECUTION") and not result:
        raise AssertionError(result.text)  # nbgrader counts a cell that raises as failed, and no other
    return result


# --- the student's notebooks ------------------------------------------------------------------------------------------


def student_version(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A solution notebook without its solutions and outputs, with nbgrader's locks and checksums; a new one."""
    student = nbformat.from_dict(notebook)
    for cell in student.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if (mark := cell.metadata.get("nbgrader")) is None:
            continue
        if mark.solution:
            cell.source = _blanked(cell.source)
        cell.metadata["deletable"] = False
        if not mark.solution:
            cell.metadata["editable"] = False
        mark.update(checksum=_checksum(cell), cell_type=cell.cell_type)
    return student


def _blanked(source: str) -> str:
    pattern = re.compile(r"^([ \t]*)### BEGIN SOLUTION\n.*?### END SOLUTION[^\n]*", re.DOTALL | re.MULTILINE)
    return pattern.sub(lambda found: "\n".join(found[1] + line for line in STUB), source)


def _checksum(cell: nbformat.NotebookNode) -> str:
    """nbgrader's own: over the source, the kind of cell, its id and points."""
    mark = cell.metadata.nbgrader
    locked = mark.grade or (mark.locked and not mark.solution)
    parts = [cell.source, cell.cell_type, str(mark.grade), str(mark.solution), str(locked), mark.grade_id]
    parts += [str(float(mark.points))] if mark.grade else []
    return hashlib.md5("".join(parts).encode(), usedforsecurity=False).hexdigest()


def generate(notebooks: Path | None = None, *, check: bool = False) -> list[Path]:
    """Write ``practice.ipynb`` of each chapter from its solution, where it differs; returns those that did.

    ``check`` changes nothing. CourseError: there are no solutions.
    """
    folder, stale = notebooks or notebooks_folder(), []
    if not (sources := sorted(folder.glob("solutions/[0-9][0-9]_*.ipynb"))):
        raise CourseError(f"no solutions in {folder / 'solutions'}")
    for source in sources:
        student = student_version(nbformat.read(source, as_version=4))
        path, text = folder / source.stem / "practice.ipynb", nbformat.writes(student) + "\n"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path)
            if not check:
                path.parent.mkdir(exist_ok=True)
                write_file(path, text.encode())
    return stale
