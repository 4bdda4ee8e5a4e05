"""Runner: executes lessons through papermill, each in a process of its own, and puts in place what ended well.

A lesson's bytes are read once: they are checked, executed, and remembered for ``resume``. Results are made in a
temporary folder: whatever lies in the output folder under a lesson's own name was executed to its end.
``python -m course_lib.classroom.runner JOB`` is the process for one lesson. It tells on standard output what went
wrong, and ends itself and its kernel when its standard input closes: the runner is gone.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import course_lib
from course_lib.classroom.lessons import CourseError, Lesson, find_lessons, given_value, read_notebook, select_lessons
from course_lib.classroom.reports import claims_of, count_claims, shown_path, watched
from course_lib.classroom.workcopy import write_kernel
from course_lib.files import source_hash, write_file

__all__ = ["check_data", "end_processes", "run_lessons", "usable_cores"]

LIBRARY = Path(course_lib.__file__).resolve().parent
FEW_IMAGES, TOO_FEW_IMAGES = 1000, 200
SHOWN_LINES = 14
CELL_MARKS = ("papermill", "execution", "ExecuteTime", "lines_to_next_cell")  # what tools leave in a cell
WIDGET = "application/vnd.jupyter.widget-view+json"
# Where outputs are folded, JupyterLab shows the first line of the first: without this, the answer itself.
FOLDED = {"text/html": ["<!-- the answer: open it -->"], "text/plain": ["The answer:"]}


def run_lessons(
    notebooks: Path, lessons: Iterable[str] = (), *, output: Path | None = None, jobs: int = 1, timeout: int = 3600,
    resume: bool = False, store: bool = False, **settings: str | None,
) -> int:  # fmt: skip
    """Execute lessons and count their claims, after everything that was asked is checked and the data are loaded.

    ``lessons`` are words that say which (see :func:`~course_lib.classroom.lessons.select_lessons`); ``settings`` are
    texts for ``dataset``, ``profile`` and ``seed``, for the lessons that have them.
    ``jobs`` lessons run at once and share the cores; ``resume`` leaves out what was executed from the same bytes,
    values, library; ``store`` puts the results, cleaned, into ``notebooks`` itself, but no lesson with a false claim.

    Returns 0; 1 if a lesson did not reach its end or a claim is false; 130 after Ctrl-C and 143 after SIGTERM, when
    everything was stopped and nothing unfinished was kept. What to correct in what was asked is a CourseError.
    """
    given = {name: given_value(name, text) for name, text in settings.items() if text is not None}
    if store and (given or resume or output):
        raise CourseError("--store executes lessons with their own parameters, into notebooks/; it takes only --jobs")
    if jobs < 1 or timeout < 0:
        raise CourseError(f"--jobs must be at least 1 and --timeout at least 0, got {jobs} and {timeout}")
    if output and output.resolve() == notebooks.resolve():
        raise CourseError("--output must not be the folder of the lessons themselves; --store is what writes there")
    lessons = [lesson.read() for lesson in select_lessons(find_lessons(notebooks), list(lessons))]
    values = {one.number: {n: given.get(n, default) for n, default in one.parameters.items()} for one in lessons}
    data_keys = {n: check_data(n) for n in sorted({v.get("dataset", "digits") for v in values.values()} - {"digits"})}
    build, data = notebooks.resolve().parent / "build", given.get("dataset", "digits")
    folder = output or build / "course" / f"{data}-{given.get('profile', 'quick')}"
    run = _Run(values, data_keys, build / "store" if store else folder.absolute(), timeout, jobs, store)
    if stopped := run.execute([lesson for lesson in lessons if not (resume and run.is_current(lesson))]):
        print(f"interrupted by {signal.Signals(stopped).name}: everything was stopped", file=sys.stderr)
        return 128 + stopped
    done = [run.final(lesson) for lesson in lessons if lesson.number not in run.failed]
    claims = claims_of(done)
    false = [claim for claim in claims if claim["status"] == "fails"]
    for claim in false:
        print(f"FALSE {claim['id']}: {claim['sentence']}\n      measured: {claim['measured']}")
    where = shown_path(notebooks if store else folder)
    print(f"{len(done)} of {len(lessons)} lessons executed, in {where}; {count_claims(claims)}")
    if run.failed:
        print(f"failed: {', '.join(sorted(run.failed))}")
    return 1 if run.failed or false else 0


def check_data(name: str) -> str:
    """Load a data set once before anything runs, say if it is small, and return a hash of it.

    CourseError if it is missing or damaged, has fewer than 200 training images, or a class without any.
    """
    import torch

    from course_lib.lab.checkpoints import checkpoint_key
    from course_lib.lab.data import DataError, load_dataset

    try:
        data = load_dataset(name)
    except (DataError, ValueError) as error:
        raise CourseError(" ".join(str(error).split())) from None
    labels = torch.cat([data.train.labels, data.val.labels])
    absent = [data.class_names[i] for i, count in enumerate(labels.bincount(minlength=data.num_classes)) if not count]
    if absent:
        raise CourseError(f"{name} has no training image of class {', '.join(absent)}: use a subset with every class")
    few = f"{name} has {len(labels)} training images"
    if len(labels) < TOO_FEW_IMAGES:
        raise CourseError(f"{few}; at least {TOO_FEW_IMAGES} are needed, and lessons are made for {FEW_IMAGES:,}")
    if len(labels) < FEW_IMAGES:
        print(f"warning: {few}, and lessons are made for {FEW_IMAGES:,}: many claims will not hold here", flush=True)
    return checkpoint_key(train=data.train, val=data.val, test=data.test)


class _Run:
    """A run of lessons; ``failed`` has the numbers of those that did not reach their end."""

    def __init__(self, values: dict[str, dict], data: dict, folder: Path, timeout: int, jobs: int, store: bool):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.values, self.data, self.folder = values, data, folder
        self.timeout, self.jobs, self.store = timeout, jobs, store
        self.signal, self.failed, self.processes, self.lock = 0, set(), [], threading.Lock()
        label = TextColumn("{task.description}", markup=False)
        columns = (label, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bars = Progress(*columns, transient=True, disable=not watched())

    def final(self, lesson: Lesson) -> Path:
        return lesson.path if self.store else self.folder / lesson.place

    def is_current(self, lesson: Lesson) -> bool:
        """Whether the result was made from these bytes, values and library, and is as it was made."""
        with contextlib.suppress(CourseError):
            notebook, _ = read_notebook(self.final(lesson))
            run = notebook["metadata"].get("course_run")
            if isinstance(run, dict) and run.get("key") == self._key(lesson) and run.get("cells") == _digest(notebook):
                self._say(f"{lesson.number} {lesson.name}: executed before from these bytes and values, skipped")
                return True
        return False

    def execute(self, lessons: list[Lesson]) -> int:
        """Execute the lessons, ``jobs`` at once; returns the signal that ended the run, or 0."""

        def note(signum, frame):
            self.signal = self.signal or signum

        # Also where SIGINT came in ignored, as behind nohup: a run that is told to stop stops.
        before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            with (
                tempfile.TemporaryDirectory(prefix="course-", ignore_cleanup_errors=True) as scratch,
                ThreadPoolExecutor(self.jobs) as pool,
                self.bars,
            ):
                pending = {pool.submit(self._one, lesson, Path(scratch, lesson.number)) for lesson in lessons}
                try:
                    while pending and not self.signal:
                        # Handlers only leave a note: it is looked at here, where nothing can be torn in the middle.
                        done, pending = wait(pending, timeout=0.1, return_when=FIRST_COMPLETED)
                        for future in done:
                            future.result()
                finally:
                    with self.lock:
                        stopped, self.signal = self.signal, self.signal or -1
                        end_processes(self.processes)
                    pool.shutdown(cancel_futures=True)
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
        return stopped

    def _one(self, lesson: Lesson, scratch: Path) -> None:
        label, key, started = f"{lesson.number} {lesson.name}", self._key(lesson), time.monotonic()
        failure = self._process(lesson, label, scratch)
        if self.signal:
            return
        seconds, executed = round(time.monotonic() - started, 1), scratch / "executed.ipynb"
        kept = self.folder / lesson.place.with_name(f"{lesson.path.stem}-failed.ipynb")
        if self.store and not failure:
            if absent := [name for name in lesson.extras if find_spec(name) is None]:
                self._say(f"{label}: executed, and left as it is: its stored outputs need {', '.join(absent)}")
                return
            false = [c for c in claims_of([executed]) if c["status"] == "fails"]
            if lesson.path.read_bytes() != lesson.data:
                failure = "its file was changed while it ran, and was left as it is"
            elif false:
                told = (f"\n  {c['sentence']} measured: {c['measured']}" for c in false)
                failure = "a claim is false:" + "".join(told)
        if failure:
            self.failed.add(lesson.number)
            self._say(f"FAILED {label} after {seconds} s, {failure}")
            with contextlib.suppress(CourseError):
                read_notebook(executed)  # it may not be there, or be torn, as by a full disk
                kept.parent.mkdir(parents=True, exist_ok=True)
                self._say(f"  kept as {shown_path(write_file(kept, executed.read_bytes()))}")
            return
        notebook, _ = read_notebook(executed)
        notices = _clean(notebook, self.store)
        if not self.store:
            # If the library changed in the meantime, nobody knows which one was executed: no key.
            key = key if key == self._key(lesson) else ""
            run = {"key": key, "cells": _digest(notebook), "seconds": seconds, "parameters": self.values[lesson.number]}
            notebook["metadata"]["course_run"] = run
        text = json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        self.final(lesson).parent.mkdir(parents=True, exist_ok=True)
        write_file(self.final(lesson), text.encode("utf-8", "surrogatepass"))
        kept.unlink(missing_ok=True)
        self._say("\n".join([f"{label}: done in {seconds} s", *notices]))

    def _process(self, lesson: Lesson, label: str, scratch: Path) -> str:
        """Execute into ``scratch / "executed.ipynb"``; returns what went wrong, or "" if every cell was executed."""
        import psutil

        fresh = {"outputs": [], "execution_count": None}
        cells = [{**c, **fresh} if "outputs" in c else c for c in lesson.notebook["cells"]]
        changed = {n: v for n, v in self.values[lesson.number].items() if v != lesson.parameters[n]}
        job = {"scratch": str(scratch), "cwd": str(lesson.path.parent), "parameters": changed, "timeout": self.timeout}
        write_kernel(scratch)  # whatever kernel the name python3 leads to here, a lesson gets this interpreter
        write_file(scratch / "source.ipynb", json.dumps({**lesson.notebook, "cells": cells}).encode())
        with self.lock, open(scratch / "log", "wb") as log:
            if self.signal:
                return "interrupted"
            command = [sys.executable, "-m", __name__, json.dumps(job)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            process = subprocess.Popen(command, **pipes, env=_environment(scratch, self.jobs), start_new_session=True)
            self.processes.append(psutil.Process(process.pid))
        bar, failure = self.bars.add_task(label, total=len(cells)), ""
        if self.bars.disable:
            self._say(f"{label}: {len(cells)} cells")
        with process.stdin, process.stdout:
            for event in map(json.loads, process.stdout):
                self.bars.update(bar, completed=event.get("cell"))
                failure = event.get("failed", failure)
            code = process.wait()
        self.bars.remove_task(bar)
        if code and not failure:
            log_end = (scratch / "log").read_text(encoding="utf-8", errors="replace").strip()[-600:]
            failure = f"its process ended with code {code}\n{log_end}".strip()
        return failure

    def _key(self, lesson: Lesson) -> str:
        """A hash of all that decides what comes out."""
        decides = (LIBRARY / name for name in ("methods", "evidence", "lab", "files.py", "gate.py"))
        values, found = self.values[lesson.number], [name for name in lesson.extras if find_spec(name)]
        parts = [lesson.name, hashlib.sha256(lesson.data).hexdigest(), values, source_hash(*decides), found]
        parts.append(self.data.get(values.get("dataset")))
        return hashlib.sha256(repr([*parts, platform.python_version(), version("torch")]).encode()).hexdigest()

    def _say(self, text: str) -> None:
        self.bars.console.print(text, markup=False, highlight=False, soft_wrap=True)


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _environment(scratch: Path, jobs: int) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}  # pictures belong in the notebook
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
        env[name] = env.get(name) or env.get("OMP_NUM_THREADS") or str(max(1, usable_cores() // jobs))
    if not os.access(Path.home(), os.W_OK):
        env.setdefault("MPLCONFIGDIR", str(scratch.parent / "matplotlib"))
    python_path = os.pathsep.join(filter(None, (str(LIBRARY.parent), env.get("PYTHONPATH"))))
    env |= {"PYTHONPATH": python_path, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "TMPDIR": str(scratch)}
    env |= {"JUPYTER_PATH": str(scratch), "JUPYTER_PLATFORM_DIRS": "1", "JUPYTER_RUNTIME_DIR": str(scratch / "runtime")}
    env |= {"IPYTHONDIR": str(scratch / "ipython")}  # nobody's start-up files
    return env | {"COURSE_UNATTENDED": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}


def end_processes(processes: Iterable[Any]) -> None:
    """Kill processes and their descendants; each is stopped before its children are listed, so none slips away."""
    import psutil

    known, fresh = [], list(processes)
    while fresh:
        children = []
        for process in fresh:
            with contextlib.suppress(psutil.Error):
                process.suspend()
                known.append(process)
                children += process.children()
        fresh = children
    for process in known:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(known, timeout=1)


def _digest(notebook: dict[str, Any]) -> str:
    """Of the cells with their outputs, to notice that somebody changed a result."""
    content = [("".join(cell["source"]), cell.get("outputs")) for cell in notebook["cells"]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _clean(notebook: dict[str, Any], store: bool) -> list[str]:
    """Take out what the tools left, and for storing what belongs to one run; a line for each text that is dropped."""
    dropped, about = [], notebook["metadata"]
    for tool in ("papermill", "course_run", "signature", *(["widgets"] if store else [])):
        about.pop(tool, None)
    if store:
        about["kernelspec"] = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
        about["language_info"] = {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"}
    for position, cell in enumerate(notebook["cells"], start=1):
        for tool in (*CELL_MARKS, *([] if cell["metadata"]["tags"] else ["tags"])):
            cell["metadata"].pop(tool, None)
        cell["source"] = cell["source"].splitlines(keepends=True)
        for output in list(cell.get("outputs", ())) if store else ():
            if output.get("name") == "stderr":
                first = "".join(output["text"]).strip().partition("\n")[0][:100]
                dropped.append(f"  cell {position} wrote to stderr, which is not stored: {first}")
            if output.get("name") == "stderr" or WIDGET in output.get("data", ()):
                cell["outputs"].remove(output)
        folded = store and cell.get("outputs") and cell["metadata"].get("jupyter")
        if isinstance(folded, dict) and folded.get("outputs_hidden"):
            cell["outputs"].insert(0, {"output_type": "display_data", "data": dict(FOLDED), "metadata": {}})
    return dropped


def _work(scratch: str, **job: Any) -> int:
    """The process for one lesson."""
    # Whatever a kernel or a library prints goes to the log: only events may reach the runner.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    threading.Thread(target=_end_with_runner, args=(Path(scratch),), daemon=True).start()
    if failure := _papermill(lambda **event: events.write(json.dumps(event) + "\n"), scratch, **job):
        events.write(json.dumps({"failed": failure}) + "\n")
    return 1 if failure else 0


def _papermill(tell: Callable, scratch: str, cwd: str, parameters: dict[str, Any], timeout: int) -> str:
    """Execute ``source.ipynb`` into ``executed.ipynb``; returns what went wrong, or ""."""
    warnings.simplefilter("ignore")  # the tools' own deprecations; warnings inside the kernel are not touched
    # A grammar for links that jsonschema would compile first, which takes a second; no notebook needs it.
    sys.modules.setdefault("rfc3987_syntax", None)
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    position = 0

    def cell_started(cell, cell_index):
        nonlocal position
        position += "injected-parameters" not in cell.metadata.get("tags", ())
        tell(cell=position)

    paths = (f"{scratch}/{name}.ipynb" for name in ("source", "executed"))
    paths = (path.replace("{", "{{").replace("}", "}}") for path in paths)  # papermill takes them for format strings
    options = {"kernel_name": "python3", "language": "python", "progress_bar": False, "start_timeout": 180}
    options |= {"parameters": parameters, "cwd": cwd, "execution_timeout": timeout or None}
    try:
        notebook = _patiently(papermill.execute_notebook, *paths, on_cell_start=cell_started, **options)
    except PapermillExecutionError as error:
        trace = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", "\n".join(error.traceback)).strip().splitlines()
        lines = trace[-SHOWN_LINES:] or [f"{error.ename}: {error.evalue}"]
        return "\n".join([f"in cell {position}, In [{error.exec_count}]", *(f"  | {line}" for line in lines)])
    except CellTimeoutError:
        return f"in cell {position}: it took longer than {timeout} s (--timeout)"
    except DeadKernelError:
        return f"in cell {position}: the kernel died, out of memory or by a crash in compiled code"
    # papermill takes sys.exit() for a good end, and marks the cells after it as completed.
    for cell in notebook.cells:
        left = any(output.output_type == "error" for output in cell.get("outputs", ()))
        if left or (cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None):
            return f"it ended before its last cell, here:\n  | {cell.source.strip()[:300]}"
    return ""


def _patiently(execute: Callable, *paths: str, **options: Any) -> Any:
    """Try again, three times in all, where the kernel was gone before it answered: nothing was executed by then.

    Kernels that start at the same moment may take one port, which each had found free, and one of them ends.
    """
    for left in (2, 1, 0):
        try:
            return execute(*paths, **options)
        except RuntimeError as error:
            if "died before replying" not in str(error) or not left:
                raise


def _end_with_runner(scratch: Path) -> None:
    os.read(0, 1)  # the runner writes nothing: this returns when it is gone
    import psutil

    children = psutil.Process().children()
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.suspend()  # papermill would notice a dead kernel and write once more
    shutil.rmtree(scratch, ignore_errors=True)
    with contextlib.suppress(OSError):
        scratch.parent.rmdir()
    end_processes(children)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(_work(**json.loads(sys.argv[1])))
