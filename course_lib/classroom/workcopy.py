"""A working copy of the notebooks, ``work/``: what a reader runs and changes there is theirs, and git never sees it.

``work/.course/`` remembers what was copied, and holds what JupyterLab is told: its settings, and the one kernel that
has the course's library. Neither the reader's own settings nor the installed packages are touched.
"""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from course_lib.classroom.lessons import CourseError, find_lessons, select_lessons
from course_lib.classroom.reports import shown_path
from course_lib.files import write_file

__all__ = ["bring_back", "open_lab", "update_copy", "write_kernel"]

FIRST = "00_start_here.ipynb"
COPIED = Path(".course", "copied.json")
NOT_COPIED = "solutions"  # whoever wants to look finds them in notebooks/; a folder of work is graded without them
# Defaults of the course: what a reader sets in JupyterLab stands above them. No news: they would ask the network.
SETTINGS = {
    "@jupyterlab/notebook-extension:tracker": {"codeCellConfig": {"lineNumbers": False, "lineWrap": True}},
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
}


def update_copy(notebooks: Path, work: Path) -> list[str]:
    """Make the copy, or bring it up to date: only notebooks that are as they were copied change.

    Returns:
        A line for each notebook that the reader has changed, even by running and saving it, and that has a newer
        version in ``notebooks``.
    """
    copied, told = _copied(work), []
    for place, data in _sources(notebooks).items():
        new, target = _hash(data), work / place
        held = _hash(target.read_bytes()) if target.exists() else None
        if held in (None, new, copied.get(place)):
            if held != new:
                _put(target, data)
            copied[place] = new
        elif copied.get(place) != new:
            word, own = place.removesuffix(".ipynb"), work.resolve() == notebooks.resolve().with_name("work")
            other = f"python -m course_lib fresh {word} --work {shown_path(work)}"  # make knows only work/
            again = f'make fresh FILES="{word}"' if own else other
            told.append(f"{shown_path(target)} is as you left it, and there is a newer one: {again} fetches that")
    _put(work / COPIED, json.dumps(copied, indent=1).encode())
    return told


def bring_back(notebooks: Path, work: Path, words: Sequence[str], *, yes: bool = False) -> int:
    """Put the course's version of some notebooks in place of the reader's, which are kept under another name.

    Args:
        words: lessons (see :func:`~course_lib.classroom.lessons.select_lessons`) or places such as
            ``02_pruning/practice``. yes: do not ask first; without a terminal nobody can answer.

    Raises:
        CourseError: nothing named, no such notebook, or nobody to ask.
    """
    sources, copied = _sources(notebooks), _copied(work)
    for place in _named(words, notebooks, sources, work):
        target, data, kept = work / place, sources[place], None
        if target.exists() and target.read_bytes() != data:
            names = (target.with_name(f"{target.stem}-mine{number or ''}.ipynb") for number in count())
            kept = next(path for path in names if not path.exists())  # by its hyphen no name of the course's
            if not yes and not _agreed(f"{shown_path(target)}: keep yours as {kept.name}, and fetch the course's?"):
                print(f"{shown_path(target)}: left as it is")
                continue
            target.rename(kept)
        print(f"{shown_path(target)}: the course's" + (f"; yours is {kept.name}" if kept else ""))
        _put(target, data)
        copied[place] = _hash(data)
    _put(work / COPIED, json.dumps(copied, indent=1).encode())
    return 0


def write_kernel(folder: Path) -> None:
    """Make this interpreter the kernel ``python3`` of whoever has ``folder`` in JUPYTER_PATH."""
    kernel = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]}
    kernel |= {"display_name": "Python 3 (ipykernel)", "language": "python", "metadata": {"debugger": True}}
    _put(folder / "kernels" / "python3" / "kernel.json", json.dumps(kernel, indent=1).encode())


def open_lab(notebooks: Path, work: Path, flags: Sequence[str]) -> int:
    """Bring the copy up to date and run JupyterLab on it until it is stopped; ``flags`` are JupyterLab's own."""
    print("\n".join(update_copy(notebooks, work)), end="", flush=True)
    own = (work / ".course").resolve()
    _put(own / "labconfig" / "default_setting_overrides.json", json.dumps(SETTINGS, indent=1).encode())
    write_kernel(own)  # found before a python3 that another installation has left
    for name in ("JUPYTER_CONFIG_PATH", "JUPYTER_PATH"):
        os.environ[name] = os.pathsep.join(filter(None, (str(own), os.environ.get(name))))
    from jupyterlab.labapp import LabApp

    ours = [f"--ServerApp.root_dir={work.resolve()}", f"--LabApp.default_url=/lab/tree/{FIRST}"]
    if getattr(os, "geteuid", lambda: 1)() == 0:  # in a container
        ours.append("--allow-root")
    LabApp.launch_instance([*ours, *flags])
    return 0


def _sources(notebooks: Path) -> dict[str, bytes]:
    """What is copied: place -> bytes."""
    if not (notebooks / FIRST).is_file():
        raise CourseError(f"there is no {FIRST} in {notebooks}; --notebooks DIR says where the lessons are")
    places = {path.relative_to(notebooks): path for path in sorted(notebooks.rglob("*.ipynb"))}
    skipped = {p for p in places if p.parts[0] == NOT_COPIED or any(part.startswith(".") for part in p.parts)}
    wanted = {p.as_posix(): path for p, path in places.items() if p not in skipped}
    # A lesson's ../../docs/ leads to docs/ in JupyterLab, which has nothing above its own folder.
    wanted |= {f"docs/{path.name}": path for path in sorted(notebooks.resolve().with_name("docs").glob("demo.*"))}
    return {place: path.read_bytes() for place, path in wanted.items()}


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _copied(work: Path) -> dict[str, str]:
    """Place -> hash of what was copied there. Where that is not known, what lies there is the reader's."""
    try:
        found = json.loads((work / COPIED).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, data)


def _named(words: Sequence[str], notebooks: Path, sources: dict[str, bytes], work: Path) -> list[str]:
    """The places that words name, in the course's order."""
    words, chosen = [word for text in words for word in text.replace(",", " ").split()], set()
    if not words:
        raise CourseError('which notebook? For instance: make fresh FILES="02.1 02_pruning/practice"')
    for word in words:
        plain = word.replace("\\", "/").removeprefix(f"{shown_path(work)}/")
        places = [place for place in (plain, f"{plain}.ipynb") if place in sources]
        chosen |= set(places or (x.place.as_posix() for x in select_lessons(find_lessons(notebooks), [word])))
    return [place for place in sources if place in chosen]


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise CourseError(f"{question} There is no terminal to ask at: --yes says so beforehand")
    print(f"{question} [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")  # nothing at all after Ctrl-D
