"""Chapters: the notebooks of the course, found by their names and read without executing anything."""

import difflib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import course_lib
from course_lib.classroom.parameters import CourseError, Parameter, read_parameters

__all__ = ["Chapter", "chapter_paths", "load_chapter", "notebooks_folder", "read_notebook", "select", "source_of"]

_CHAPTER_NAME = re.compile(r"(\d+)_([\w-]+)")


@dataclass(frozen=True)
class Chapter:
    """One notebook and what it says about itself.

    Attributes:
        path: the notebook, absolute.
        number: the leading digits of its name, such as ``"02"``.
        title: from the metadata, else its first heading, else its name.
        sections: the article's sections that it covers.
        minutes: reading time, None where it is not told. seconds: run time on two cores, None where it is not told.
        parameters: the names of its ``parameters`` cell, in order, each with type and default.
        cells: (kind, source) of every cell.
    """

    path: Path
    number: str
    title: str
    sections: tuple[str, ...] = ()
    minutes: float | None = None
    seconds: float | None = None
    parameters: dict[str, Parameter] = field(default_factory=dict)
    cells: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """The file's name without its ending, such as ``"02_pruning"``."""
        return self.path.stem


def notebooks_folder() -> Path:
    """The course's own ``notebooks/``, beside the library."""
    return Path(course_lib.__file__).resolve().parents[1] / "notebooks"


def read_notebook(path: Path) -> dict[str, Any]:
    """The notebook as nested dicts, checked just enough that its cells can be walked.

    Raises:
        CourseError: the file cannot be read, is no JSON, or is no notebook of format 4.
    """
    try:
        notebook = json.loads(path.read_bytes())
    except OSError as error:
        raise CourseError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise CourseError(f"{path} is no notebook, or a damaged one: {error}") from None
    cells = notebook.get("cells") if isinstance(notebook, dict) and notebook.get("nbformat") == 4 else None
    if not isinstance(cells, list) or not all(isinstance(c, dict) and "cell_type" in c for c in cells):
        raise CourseError(f"{path} is no Jupyter notebook of format 4")
    return notebook


def source_of(cell: dict[str, Any]) -> str:
    """A cell's source as one text: the format allows a list of lines as well.

    >>> source_of({"source": ["a = 1\\n", "b = 2"]})
    'a = 1\\nb = 2'
    """
    source = cell.get("source", "")
    return source if isinstance(source, str) else "".join(source)


def chapter_paths(folder: Path) -> list[Path]:
    """The chapters of a folder in the order of their numbers: every ``<digits>_<name>.ipynb``.

    Raises:
        CourseError: there is no such folder, or no chapter in it.
    """
    if not folder.is_dir():
        raise CourseError(f"there is no folder {folder}; --notebooks DIR says where the chapters are")
    paths = [path for path in folder.resolve().glob("*.ipynb") if _CHAPTER_NAME.fullmatch(path.stem)]
    if not paths:
        raise CourseError(f"no chapter in {folder}: chapters are called like 02_pruning.ipynb")
    return sorted(paths, key=lambda path: (int(path.stem.partition("_")[0]), path.stem))


def select(paths: list[Path], wanted: list[str]) -> list[Path]:
    """The chapters that the words name, in the course's order, each once; all of them for no words.

    A word is a number (``2``, ``02``), a name (``pruning``) or both (``02_pruning``, ``02_pruning.ipynb``).

    Raises:
        CourseError: a word that names no chapter.

    >>> select([Path("01_concepts.ipynb"), Path("02_pruning.ipynb")], ["2"])[0].name
    '02_pruning.ipynb'
    """
    words = [word for given in wanted for word in given.replace(",", " ").split()]
    chosen = {path for word in words for path in _named(paths, word)}
    return [path for path in paths if path in chosen] if words else list(paths)


def load_chapter(path: Path) -> Chapter:
    """Read a chapter's metadata, parameters and sources.

    Raises:
        CourseError: the notebook cannot be read, or its ``parameters`` cell holds something else than literals.
    """
    notebook = read_notebook(path)
    cells = tuple((cell["cell_type"], source_of(cell)) for cell in notebook["cells"])
    tagged = [c for c in notebook["cells"] if "parameters" in (c.get("metadata") or {}).get("tags", [])]
    about = (notebook.get("metadata") or {}).get("course") or {}
    sections = about.get("sections") or ()
    return Chapter(
        path=path,
        number=path.stem.partition("_")[0],
        title=str(about.get("title") or _first_heading(cells) or path.stem),
        sections=(sections,) if isinstance(sections, str) else tuple(str(section) for section in sections),
        minutes=about.get("minutes"),
        seconds=about.get("seconds"),
        parameters=read_parameters(source_of(tagged[0]), path.name) if tagged else {},
        cells=cells,
    )


def _named(paths: list[Path], word: str) -> list[Path]:
    wanted = Path(word).name.removesuffix(".ipynb").lower()
    if wanted.isdecimal():
        found = [path for path in paths if int(path.stem.partition("_")[0]) == int(wanted)]
    else:
        found = [path for path in paths if wanted in (path.stem.lower(), path.stem.lower().partition("_")[2])]
    if found:
        return found
    names = [path.stem for path in paths]
    endings = {name.partition("_")[2]: name for name in names}
    near = difflib.get_close_matches(wanted, [*names, *endings], n=1)
    hint = f" (did you mean {endings.get(near[0], near[0])}?)" if near else ""
    raise CourseError(f"there is no chapter {word!r}{hint}; the chapters are {', '.join(names)}")


def _first_heading(cells: tuple[tuple[str, str], ...]) -> str:
    for kind, source in cells:
        heading = re.search(r"^#+\s+(.+)$", source, flags=re.MULTILINE) if kind == "markdown" else None
        if heading:
            return heading[1].strip()
    return ""
