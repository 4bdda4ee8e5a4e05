"""Grading a folder of practice notebooks: our checks on their functions, each notebook in a process of its own.

A submission is a program by somebody else. It runs with a limit of time and memory, in a scratch folder, without
input and output; that keeps accidents apart from each other and from the teacher's files. It is no prison: whoever
must expect malice runs the whole command in a container or under a user of its own.
"""

import ast
import codeop
import contextlib
import csv
import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path

from course_lib.classroom.answers import judge
from course_lib.classroom.lessons import CourseError, notebooks_folder, read_notebook
from course_lib.classroom.runner import end_processes
from course_lib.classroom.tasks_language import TASKS
from course_lib.files import write_file

__all__ = ["grade"]

COLUMNS = ("file", "name", "task", "points", "of", "hint", "sha256")
PRELOADED = ("course_lib.classroom.grading", "course_lib.classroom.practice", "course_lib.lab", "scipy.stats")
PRELOADED += ("torch._dynamo",)  # it replaces torch.manual_seed: before the seal, or who imports an optimizer breaks it
CASES = 20_240  # every submission meets the same cases
MOST_RUNS = 12  # of one submission: what ended its process is left out in the next
LIMIT = re.compile("took longer|ended the process|not reached|memory", re.IGNORECASE)  # another run may end otherwise
MAGIC = re.compile(r"(\s*)([%!?]|[\w.*]+\?\??\s*$)")


def grade(
    folder: Path, *, output: Path | None = None, chapter: str | None = None, jobs: int | None = None,
    seconds: float = 20.0, memory: float = 4.0, notebooks: Path | None = None,
) -> Path:  # fmt: skip
    """Grade every notebook under ``folder``, or one notebook, into a CSV: file, name, task, points, of, hint, sha256.

    Rows that ``output`` (``grades.csv`` in the folder by default) has stay, also with points changed by hand; a file is
    run again if it has changed, was graded as another chapter, or met a limit. By default a notebook is graded as the
    ``chapter`` whose tasks it has. One step of it (a cell, or a check) may take so many ``seconds``, and ``memory`` in
    gigabytes beyond the library's.
    """
    for option, given in (("jobs", jobs), ("seconds", seconds), ("memory", memory)):
        if given is not None and not 0 < given <= 10**6:
            raise CourseError(f"--{option} must be above 0 and at most a million, got {given}")
    chapters = known_chapters = _chapters(notebooks or notebooks_folder())
    if chapter is not None:
        chapters = {name: tasks for name, tasks in chapters.items() if name.startswith(chapter)}
        if len(chapters) != 1:
            raise CourseError(f"no chapter {chapter!r} has practice; there are {', '.join(known_chapters)}")
    found, folder = ([folder], folder.parent) if folder.is_file() else (sorted(folder.rglob("*.ipynb")), folder)
    # A name may be no UTF-8.
    places = {path.relative_to(folder).as_posix().encode(errors="backslashreplace").decode(): path for path in found}
    files = {at: path for at, path in places.items() if path.is_file() and not at.startswith(".") and "/." not in at}
    if not files:
        raise CourseError(f"no notebook in {folder}: a folder of submissions is needed")
    output = Path(output or folder / "grades.csv")
    rows, (stopped, stop) = _known(output), multiprocessing.Pipe(duplex=False)
    run, running = partial(_run, seconds, memory, stopped), {}
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        try:
            for place, path in files.items():
                running[pool.submit(_grade_one, path, place, rows.get(place, []), chapters, run)] = place
            for future in as_completed(running):
                rows[running[future]], told = future.result()
                if told:
                    _write(output, rows)
                    print(f"{running[future]}: {told}", flush=True)
        finally:
            stop.close()  # which wakes all who wait at the other end
            pool.shutdown(cancel_futures=True)
            _write(output, rows)
    return output


def _chapters(notebooks: Path) -> dict[str, dict[str, int]]:
    """Chapter -> task -> points, as the solutions say."""
    found = {}
    for path in sorted(notebooks.glob("solutions/[0-9][0-9]_*.ipynb")):
        marks = [cell["metadata"].get("nbgrader", {}) for cell in read_notebook(path)[0]["cells"]]
        found[path.stem] = {m["grade_id"].removesuffix("_check"): m["points"] for m in marks if m.get("grade")}
    if not found:
        raise CourseError(f"no solutions in {notebooks / 'solutions'}: they say what there is to grade")
    return found


def _name(place: str) -> str:
    """Whose it is: the first folder of a ``practice.ipynb`` or ``02_pruning.ipynb``, else the file's own name."""
    path = Path(place)
    return path.parts[0] if len(path.parts) > 1 and re.fullmatch(r"practice|\d\d_\w+", path.stem) else path.stem


def _known(output: Path) -> dict[str, list[dict]]:
    """File -> its rows, with commas or with the semicolons of a spreadsheet."""
    known: dict[str, list[dict]] = {}
    if not output.exists():
        return known
    with contextlib.suppress(ValueError, csv.Error):
        text = output.read_text(encoding="utf-8-sig")
        table = csv.DictReader(io.StringIO(text), restval="", delimiter=";" if ";" in text.partition("\n")[0] else ",")
        if tuple(table.fieldnames or ()) == COLUMNS:
            for row in table:
                row = {key: re.sub("^'(?=[=+@-])", "", row[key]) for key in COLUMNS}
                known.setdefault(row["file"], []).append(row)
            return known
    raise CourseError(f"{output} is no table of grades ({', '.join(COLUMNS)}; UTF-8), and stays: name another file")


def _write(output: Path, rows: dict[str, list[dict]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in (row for place in sorted(rows) for row in rows[place]):
        # A spreadsheet runs what starts like a formula.
        unsafe = {key: f"'{v}" for key, v in row.items() if isinstance(v, str) and v[:1] in ("=", "+", "-", "@")}
        writer.writerow(row | unsafe)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_file(output, text.getvalue().encode(errors="backslashreplace"))


def _grade_one(path: Path, place: str, known: list[dict], chapters: dict, run: Callable) -> tuple[list[dict], str]:
    """Its rows, and a line for the screen: "" for those ``known`` where they still say how it is."""
    about = {"file": place, "name": _name(place)}
    try:
        notebook, data = read_notebook(path)
        chapter = _chapter_of(cells := _cells(notebook), chapters)
    except Exception as error:
        told = str(error).replace(str(path), place)[:300]
        return [about | {"points": 0, "of": 0, "hint": told}], told
    about["sha256"], tasks, said = hashlib.sha256(data).hexdigest()[:12], chapters[chapter], {}
    limits = any(row["points"] == "0" and LIMIT.search(row["hint"]) for row in known)
    if {(row["task"], row["sha256"]) for row in known} == {(task, about["sha256"]) for task in tasks} and not limits:
        return known, ""
    for _ in range(MOST_RUNS):
        if run(cells, list(tasks), said) or "" in said:
            break
    hints = {task: said.get(task, said.get("", "it was not reached")) for task in tasks}
    points = {task: 0 if hints[task] else most for task, most in tasks.items()}
    rows = [about | {"task": t, "points": points[t], "of": tasks[t], "hint": hints[t]} for t in tasks]
    return rows, f"{sum(points.values())} of {sum(tasks.values())} points in {chapter}"


def _cells(notebook: dict) -> list[tuple[str, str]]:
    """(task or "", source) of all code cells that are not locked."""
    found = []
    for cell in notebook["cells"]:
        mark = made if isinstance(made := cell["metadata"].get("nbgrader"), dict) else {}
        if cell["cell_type"] == "code" and not mark.get("grade"):
            found.append((str(mark.get("grade_id", "")) if mark.get("solution") else "", cell["source"]))
    return found


def _chapter_of(cells: list[tuple[str, str]], chapters: dict) -> str:
    text = "\n".join(f"def {task}(\n{source}" for task, source in cells)
    fitting = {name: sum(f"def {task}(" in text for task in tasks) for name, tasks in chapters.items()}
    best = max(fitting, key=fitting.__getitem__)
    if len(chapters) > 1 and not fitting[best]:
        raise CourseError("it has no cell of any task")
    return best


def _run(seconds: float, memory: float, stopped: Connection, cells: list, tasks: list[str], said: dict) -> bool:
    """One run of a submission, without the steps that ``said`` knows; returns whether that was the last.

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
            while ready := wait([ours, stopped], limit):
                if stopped in ready:
                    return True
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


def _child(pipe, cells: list, tasks: list[str], done: dict[str, str], memory: float, scratch: str) -> None:
    """The process of one submission: from here to the end of the module, what runs in it."""

    def tell(**event) -> None:
        pipe.send_bytes(json.dumps(event).encode())

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; it is no fault of the submission
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
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
    answers, errors, compiled = {}, {}, codeop.Compile()  # which remembers a __future__ for the cells below, as IPython
    for number, (task, source) in enumerate(cells):
        step = f"cell of {task or f'cell {number}'}"
        if step in done:
            errors[task] = f"its cell: {done[step]}"
            continue
        tell(step=step)
        try:
            for node in _parsed(source).body:
                if task or _is_plain(node):
                    # A package that is missing here costs what needs it, not the imports below it.
                    with contextlib.nullcontext() if task else contextlib.suppress(ImportError):
                        exec(compiled(ast.Module([node], []), task or f"cell {number}", "exec"), space)
        except (Exception, SystemExit) as error:
            errors[task] = f"its cell raised {type(error).__name__}: {error}"
        if task and callable(space.get(task)):
            answers[task] = space[task]
    return {task: space[task] for task in tasks if callable(space.get(task))} | answers, errors


def _parsed(source: str) -> ast.Module:
    """Without IPython's own lines, of which only those go where Python stops: a line that goes on may start with %."""
    lines = source.split("\n")
    while True:
        try:
            return ast.parse("\n".join(lines))
        except SyntaxError as error:
            number = min(error.lineno or 1, len(lines)) - 1
            if not (magic := MAGIC.match(lines[number])):
                raise
            lines[number] = f"{magic[1]}pass"


def _is_plain(node: ast.stmt) -> bool:
    if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value:
        return not any(isinstance(part, (ast.Name, ast.Call)) for part in ast.walk(node.value))
    return isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))


def _seal() -> dict:
    """What a check stands on: if any of it is another object afterwards, nothing that it says counts."""
    import builtins

    import numpy
    import torch._dynamo

    ours = [module for name, module in list(sys.modules.items()) if name.startswith("course_lib.classroom.")]
    owners = (*ours, builtins, numpy, torch, torch.Tensor, torch.nn.functional)
    found = {(str(o), key): (id(v), id(getattr(v, "__code__", v))) for o in owners for key, v in list(vars(o).items())}
    found.pop((str(torch), "Storage"))  # set_default_dtype replaces it
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
