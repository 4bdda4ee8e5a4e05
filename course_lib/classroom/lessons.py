"""Lessons: the course's notebooks, found by their names and read without executing anything.

``notebooks/00_start_here.ipynb`` is lesson 00, ``notebooks/02_pruning/4_neurons_and_channels.ipynb`` is lesson 02.4.
Everything else in the folder is somebody's own: practice, solutions, copies, checkpoints, hidden files.
"""

import ast
import difflib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import course_lib

__all__ = ["CourseError", "Lesson", "find_lessons", "given_value", "notebooks_folder", "read_notebook"]
__all__ += ["select_lessons"]

PROFILES, MAX_SEED = ("quick", "full"), 2**32 - 1
_NAME = re.compile(r"(\d{1,2})_([a-z0-9_]+)", re.ASCII | re.IGNORECASE)


class CourseError(Exception):
    """Something that the user can mend: the text says what was given and what fits. Exit code 2."""


def given_value(name: str, text: str) -> str | int:
    """What a text from the command line means as ``dataset``, ``profile`` or ``seed``; CourseError if it is none.

    >>> given_value("seed", "7")
    7
    """
    if name == "seed":
        if not re.fullmatch(r"\s*\d{1,10}\s*", text, re.ASCII) or int(text) > MAX_SEED:
            raise CourseError(f"seed must be an integer from 0 to {MAX_SEED}, got {text!r}")
        return int(text)
    choices = PROFILES
    if name == "dataset" and text == "digits":
        return text  # before torch is loaded
    if name == "dataset":
        from course_lib.lab.data import DATASETS as choices
    if text not in choices:
        hint = _meant(text.lower(), choices)
        raise CourseError(f"{name} must be one of {', '.join(choices)}, got {text!r}{hint}")
    return text


@dataclass(frozen=True)
class Lesson:
    """One notebook of the course; all but the first three attributes come from :meth:`read`."""

    number: str  # such as "00" or "02.4"
    path: Path  # absolute
    place: Path  # relative to the folder of the notebooks
    title: str = ""  # as the metadata say, else the first heading, else the file's name
    sections: tuple[str, ...] = ()  # of the article
    minutes: float | None = None  # reading time, as the metadata say
    seconds: float | None = None  # run time
    extras: tuple[str, ...] = ()  # modules that its stored outputs need and a learner's installation lacks
    parameters: dict[str, Any] = field(default_factory=dict)  # name -> default
    data: bytes = b""  # the bytes that were read
    notebook: dict[str, Any] = field(default_factory=dict)  # what they say, made sound

    @property
    def name(self) -> str:
        """As a reader sees it, such as ``"02_pruning/4_neurons_and_channels"``."""
        return self.place.with_suffix("").as_posix()

    def read(self) -> "Lesson":
        """The same lesson with everything that its file says; CourseError if that cannot be read."""
        notebook, data = read_notebook(self.path)
        told = notebook["metadata"].get("course")
        about, cells = told if isinstance(told, dict) else {}, notebook["cells"]
        prose = "\n".join(cell["source"] for cell in cells if cell["cell_type"] == "markdown")
        heading = re.search(r"^#+[ \t]+(.+)$", prose, re.MULTILINE)
        title = str(about.get("title") or (heading[1].strip() if heading else self.path.stem))
        sections, extras = (tuple(map(str, about.get(name) or ())) for name in ("sections", "extras"))
        tagged = next((cell["source"] for cell in cells if "parameters" in cell["metadata"]["tags"]), "")
        return replace(
            self, title=title, sections=sections, extras=extras,
            minutes=about.get("minutes"), seconds=about.get("seconds"),
            parameters=_parameters(tagged, self.place), data=data, notebook=notebook,
        )  # fmt: skip


def notebooks_folder() -> Path:
    """The course's own ``notebooks/``, beside the library."""
    return Path(course_lib.__file__).resolve().parents[1] / "notebooks"


def find_lessons(folder: Path) -> list[Lesson]:
    """The lessons in a folder in the course's order, unread.

    A flat ``02_mine.ipynb`` beside a folder ``02_pruning/`` that has lessons is no lesson: the folder is the chapter.
    """
    if not folder.is_dir():
        raise CourseError(f"there is no folder {folder}; --notebooks DIR says where the lessons are")
    folder, found = folder.resolve(), []
    for path in sorted([*folder.glob("*.ipynb"), *folder.glob("*/*.ipynb")]):
        steps = [_NAME.fullmatch(step) for step in path.relative_to(folder).with_suffix("").parts]
        if all(steps) and path.is_file():
            found.append((tuple(int(step[1]) for step in steps), path))
    nested, lessons = {key[0] for key, _ in found if len(key) == 2}, {}
    for key, path in sorted(found):
        if len(key) == 2 or key[0] not in nested:
            number = f"{key[0]:02d}" + "".join(f".{part}" for part in key[1:])
            if number in lessons:
                both = f"{lessons[number].path.name} and {path.name}"
                raise CourseError(f"{both} would both be lesson {number}: rename the one that is your own")
            lessons[number] = Lesson(number, path, path.relative_to(folder))
    if not lessons:
        raise CourseError(f"no lesson in {folder}: they are called like 02_pruning/1_which_weights.ipynb")
    return list(lessons.values())


def select_lessons(lessons: list[Lesson], words: list[str]) -> list[Lesson]:
    """The lessons that the words name, in the course's order, each once; all of them for no words.

    A word is a number (``02`` for the whole chapter, ``02.4`` for one lesson) or a name (``pruning``, ``02_pruning``,
    ``holding_the_zeros``, a path); several may stand in one text.

    >>> made = [Lesson("02.1", Path(), Path("02_pruning/1_a.ipynb")), Lesson("03", Path(), Path("03_b.ipynb"))]
    >>> [lesson.number for lesson in select_lessons(made, ["2"])]
    ['02.1']
    """
    chosen, names = set(), {lesson.number: _names(lesson) for lesson in lessons}
    for word in (wanted := [word for text in words for word in text.replace(",", " ").split()]):
        plain = re.sub(r"^.*notebooks/|\.ipynb$|/$", "", word.replace("\\", "/").lower())
        if number := re.fullmatch(r"(\d+)(\.\d+)?", plain):
            plain = f"{int(number[1]):02d}" + (f".{int(number[2][1:])}" if number[2] else "")
        fitting = {number for number in names if plain in names[number]}
        if not fitting:
            hint = _meant(plain, set().union(*names.values()))
            raise CourseError(f"no lesson {word!r}{hint}; there are {', '.join(names)}")
        chosen |= fitting
    return [lesson for lesson in lessons if lesson.number in chosen or not wanted]


def read_notebook(path: Path) -> tuple[dict[str, Any], bytes]:
    """A notebook of format 4 as nested dicts, and its bytes; CourseError if it is none.

    What odd files lack or leave null is filled in: ``metadata``, ``tags``, ``source`` (always one text), ``outputs``.
    """
    try:
        data = path.read_bytes()
        notebook = json.loads(data.decode("utf-8-sig"))
    except OSError as error:
        raise CourseError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CourseError(f"{path} is no notebook, or a damaged one: {error}") from None
    cells = notebook.get("cells") if isinstance(notebook, dict) and notebook.get("nbformat") == 4 else None
    kinds = ("code", "markdown", "raw")
    if not isinstance(cells, list) or any(not isinstance(c, dict) or c.get("cell_type") not in kinds for c in cells):
        raise CourseError(f"{path} is no Jupyter notebook of format 4")
    if type(notebook.get("nbformat_minor")) is not int:
        notebook["nbformat_minor"] = 4
    for part in (notebook, *cells):
        part["metadata"] = part["metadata"] if isinstance(part.get("metadata"), dict) else {}
    for cell in cells:
        tags, source = cell["metadata"].get("tags"), cell.get("source") or ""
        cell["metadata"]["tags"] = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
        cell["source"] = source if isinstance(source, str) else "".join(map(str, source))
        if cell["cell_type"] == "code":
            outputs = cell["outputs"] if isinstance(cell.get("outputs"), list) else []
            cell["outputs"] = [output for output in outputs if isinstance(output, dict)]
    return notebook, data


def _meant(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _names(lesson: Lesson) -> set[str]:
    """All words that name a lesson."""
    parts = lesson.place.with_suffix("").parts
    names = {lesson.number, lesson.number[:2], lesson.name, *parts, *(part.partition("_")[2] for part in parts)}
    return {name.lower() for name in names}


def _parameters(source: str, place: Path) -> dict[str, Any]:
    """Name -> default of each line ``name: type = literal``."""
    found = {}
    try:
        statements = ast.parse(source).body
    except (SyntaxError, ValueError) as error:
        raise CourseError(f"{place}: the parameters cell is no Python: {error}") from None
    for line in statements:
        if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant):
            continue  # a text that explains
        try:
            target = line.target if isinstance(line, ast.AnnAssign) else line.targets[0]
            found[target.id] = ast.literal_eval(line.value)
        except (AttributeError, TypeError, ValueError):
            told = ast.unparse(line)
            raise CourseError(f"{place}: the parameters cell holds {told!r}; only name: type = literal fits") from None
    return found
