"""Grading a folder of practice notebooks: our checks on their functions, each notebook in a process of its own.

A submission is a program by somebody else. It runs with a limit of time and memory, in a scratch folder, without
input and output; that keeps accidents apart from each other and from the teacher's files. It is no prison: whoever
must expect malice runs the whole command in a container or under a user of its own.
"""

import ast
import contextlib
import csv
import hashlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from course_lib.classroom.answers import judge
from course_lib.classroom.lessons import CourseError, notebooks_folder, read_notebook
from course_lib.classroom.runner import end_processes
from course_lib.classroom.tasks_language import TASKS
from course_lib.files import write_file

__all__ = ["grade"]

COLUMNS = ("file", "name", "task", "points", "of", "hint", "sha256")
PRELOADED = ("course_lib.classroom.grading", "course_lib.classroom.practice", "course_lib.lab", "scipy.stats")
CASES = 20_240  # every submission meets the same cases
MOST_RUNS = 12  # of one submission: what ended its process is left out in the next


def grade(
    folder: Path, *, output: Path | None = None, chapter: str | None = None, jobs: int | None = None,
    seconds: float = 20.0, memory: float = 4.0, notebooks: Path | None = None,
) -> Path:  # fmt: skip
    """Grade every notebook under ``folder``, or one notebook, into a CSV: file, name, task, points, of, hint, sha256.

    Files that ``output`` (``grades.csv`` in the folder by default) already has, unchanged, are not run again: a grading
    that was stopped goes on. By default a notebook is graded as the ``chapter`` whose tasks it has. One step of it (a
    cell, or a check) may take so many ``seconds``, and ``memory`` in gigabytes beyond the library's.
    """
    chapters = known_chapters = _chapters(notebooks)
    if chapter is not None:
        chapters = {name: tasks for name, tasks in chapters.items() if name.startswith(chapter)}
        if len(chapters) != 1:
            raise CourseError(f"no chapter {chapter!r} has practice; there are {', '.join(known_chapters)}")
    found = [Path(folder)] if Path(folder).is_file() else sorted(Path(folder).rglob("*.ipynb"))
    folder = Path(folder).parent if Path(folder).is_file() else Path(folder)
    files = {path.relative_to(folder).as_posix(): path for path in found if path.is_file()}
    files = {place: path for place, path in files.items() if not place.startswith(".") and "/." not in place}
    if not files:
        raise CourseError(f"no notebook in {folder}: a folder of submissions is needed")
    output = Path(output or folder / "grades.csv")
    known, rows = _known(output), {}
    hashes = {place: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for place, path in files.items()}
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        running = {}
        for place, path in files.items():
            if (place, hashes[place]) in known:
                rows[place] = known[place, hashes[place]]
            else:
                running[pool.submit(_grade_one, path, chapters, seconds, memory)] = place
        for future in as_completed(running):
            place, (graded, told) = running[future], future.result()
            about = {"file": place, "name": _name(place), "sha256": hashes[place]}
            rows[place] = [about | dict(zip(COLUMNS[2:6], row, strict=True)) for row in graded]
            _write(output, rows)
            print(f"{place}: {told}", flush=True)
    _write(output, rows)
    return output


def _chapters(notebooks: Path | None) -> dict[str, dict[str, int]]:
    """Chapter -> task -> points, as the solutions say."""
    found = {}
    for path in sorted((notebooks or notebooks_folder()).glob("solutions/[0-9][0-9]_*.ipynb")):
        marks = [cell["metadata"].get("nbgrader", {}) for cell in read_notebook(path)[0]["cells"]]
        found[path.stem] = {m["grade_id"].removesuffix("_check"): m["points"] for m in marks if m.get("grade")}
    return found


def _name(place: str) -> str:
    """Whose it is: the first folder of a ``practice.ipynb`` or ``02_pruning.ipynb``, else the file's own name."""
    path = Path(place)
    handed_out = path.stem == "practice" or path.stem[:2].isdigit()
    return path.parts[0] if len(path.parts) > 1 and handed_out else path.stem


def _known(output: Path) -> dict[tuple[str, str], list[dict]]:
    known: dict[tuple[str, str], list[dict]] = {}
    with contextlib.suppress(OSError, KeyError, ValueError, csv.Error):
        for row in csv.DictReader(io.StringIO(output.read_text(encoding="utf-8-sig"))):
            known.setdefault((row["file"], row["sha256"]), []).append({key: row[key] for key in COLUMNS})
    return known


def _write(output: Path, rows: dict[str, list[dict]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in (row for place in sorted(rows) for row in rows[place]):
        # A spreadsheet runs what starts like a formula.
        unsafe = {key: f"'{v}" for key, v in row.items() if isinstance(v, str) and v[:1] in ("=", "+", "-", "@")}
        writer.writerow(row | unsafe)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_file(output, text.getvalue().encode())


# --- one submission ---------------------------------------------------------------------------------------------------


def _grade_one(path: Path, chapters: dict, seconds: float, memory: float) -> tuple[list[tuple], str]:
    """Rows (task, points, of, hint), and a line for the screen."""
    try:
        cells = _cells(path)
        chapter = _chapter_of(cells, chapters)
    except Exception as error:
        told = str(error).replace(str(path), path.name)[:300]
        return [("", 0, 0, told)], told
    tasks, said = chapters[chapter], {}
    for _ in range(MOST_RUNS):
        if _run(cells, list(tasks), said, seconds, memory) or "" in said:
            break
    hints = {task: said.get(task, said.get("", "it was not reached")) for task in tasks}
    rows = [(task, 0 if hints[task] else points, points, hints[task]) for task, points in tasks.items()]
    return rows, f"{sum(row[1] for row in rows)} of {sum(tasks.values())} points in {chapter}"


def _cells(path: Path) -> list[tuple[str, str]]:
    """(task or "", source) of all code cells that are not locked."""
    found = []
    for cell in read_notebook(path)[0]["cells"]:
        mark = cell["metadata"].get("nbgrader")
        mark = mark if isinstance(mark, dict) else {}
        if cell["cell_type"] == "code" and not mark.get("grade"):
            lines = cell["source"].splitlines()
            source = "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!", "?")))
            found.append((str(mark.get("grade_id", "")) if mark.get("solution") else "", source))
    return found


def _chapter_of(cells: list[tuple[str, str]], chapters: dict) -> str:
    text = "\n".join(f"def {task}(\n{source}" for task, source in cells)
    fitting = {name: sum(f"def {task}(" in text for task in tasks) for name, tasks in chapters.items()}
    best = max(fitting, key=fitting.__getitem__)
    if len(chapters) > 1 and not fitting[best]:
        raise CourseError("it has no cell of any task")
    return best


def _run(cells: list, tasks: list[str], said: dict[str, str], seconds: float, memory: float) -> bool:
    """One run of a submission, without the steps that ``said`` knows; returns whether it reached its end.

    ``said`` gets for each task what the check says, "" for a pass, and for a step that ended the process how.
    """
    import psutil

    context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    if sys.platform != "win32":
        context.set_forkserver_preload(list(PRELOADED))
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="practice-", ignore_cleanup_errors=True) as scratch:
        process = context.Process(target=_child, args=(theirs, cells, tasks, said, memory, scratch), daemon=True)
        process.start()
        theirs.close()
        step, limit = "", seconds + 60  # a slow machine imports slowly
        try:
            while ours.poll(limit):
                event = json.loads(ours.recv_bytes(1_000_000))  # never pickle: that would run what they send
                if "over" in event:
                    return True
                step, limit = event.get("step", step), seconds
                said |= event.get("said", {})
            said[step] = f"it took longer than {seconds:g} seconds"
        except (EOFError, OSError, ValueError):
            process.join(5)
            said[step] = f"it ended the process (exit code {process.exitcode}); sys.exit, or too much memory?"
        finally:
            with contextlib.suppress(psutil.Error):
                end_processes([psutil.Process(process.pid)])
            process.join(5)
    return False


# --- in the child -----------------------------------------------------------------------------------------------------


def _child(pipe, cells: list, tasks: list[str], done: dict[str, str], memory: float, scratch: str) -> None:
    def tell(**event) -> None:
        pipe.send_bytes(json.dumps(event).encode())

    seal = _seal()
    _confine(scratch, memory)
    answers, errors = _execute(cells, tasks, done, tell)
    for task in tasks:
        if task in done:
            continue
        tell(step=task)
        if not seal.items() <= _seal().items():
            told = "the notebook changed the checker, or the libraries it stands on"
        elif task not in answers:
            told = errors.get(task, f"no function {task} in this notebook")
        else:
            result = judge(TASKS[task], answers[task], CASES)
            told = "" if result.passed else result.text
        tell(said={task: told[:500]})
    tell(over=True)


def _execute(cells, tasks, done, tell) -> tuple[dict, dict]:
    """The functions that the notebook defines, and why some are missing. Of unmarked cells only what costs nothing."""
    space: dict = {"__name__": "__main__"}
    answers, errors = {}, {}
    for number, (task, source) in enumerate(cells):
        step = f"cell of {task or f'cell {number}'}"
        if step in done:
            errors[task] = f"its cell: {done[step]}"
            continue
        tell(step=step)
        try:
            for node in ast.parse(source).body:
                if task or _is_plain(node):
                    # A package that is missing here costs what needs it, not the imports below it.
                    with contextlib.nullcontext() if task else contextlib.suppress(ImportError):
                        exec(compile(ast.Module([node], []), task or f"cell {number}", "exec"), space)
        except (Exception, SystemExit) as error:
            errors[task] = f"its cell raised {type(error).__name__}: {error}"
        if task and callable(space.get(task)):
            answers[task] = space[task]
    return {task: space[task] for task in tasks if callable(space.get(task))} | answers, errors


def _is_plain(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign):
        with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            ast.literal_eval(node.value)
            return True
    return isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))


def _seal() -> dict:
    """What a check stands on: if any of it is another object afterwards, nothing that it says counts."""
    import builtins

    import numpy
    import torch

    ours = [module for name, module in list(sys.modules.items()) if name.startswith("course_lib.classroom.")]
    owners = (*ours, builtins, numpy, torch, torch.Tensor, torch.nn.functional)
    found = {(str(o), key): (id(v), id(getattr(v, "__code__", v))) for o in owners for key, v in list(vars(o).items())}
    return found | {task: (id(it), id(it.answer), id(it.cases), it.says) for task, it in TASKS.items()}


def _confine(scratch: str, memory: float) -> None:
    import torch

    torch.set_num_threads(1)
    os.chdir(scratch)
    kept = ("PATH", "LANG", "LC_ALL", "SYSTEMROOT", "OMP_NUM_THREADS")
    keep = {key: os.environ[key] for key in kept if key in os.environ}
    os.environ.clear()
    os.environ.update(keep, HOME=scratch, TMPDIR=scratch, COURSE_CACHE=scratch, MPLBACKEND="Agg")
    tempfile.tempdir = scratch
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        import psutil

        most = psutil.Process().memory_info().vms + int(memory * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**8, 10**8))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
