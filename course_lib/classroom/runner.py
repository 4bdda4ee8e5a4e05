"""Runner: executes chapters, each in a process of its own, several at once if wanted, and puts the results in place."""

import json
import queue
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from course_lib.classroom import outputs
from course_lib.classroom.chapters import Chapter
from course_lib.classroom.claims import collect, summary, write_claims
from course_lib.classroom.display import failure_text, progress_display, shown_path
from course_lib.classroom.parameters import CourseError
from course_lib.classroom.plan import Plan
from course_lib.classroom.processes import end_processes, start_worker

__all__ = ["Interrupted", "run_chapters"]


class Interrupted(Exception):
    """The run was ended by a signal; ``exit_code`` is the shell's convention, 130 for Ctrl-C."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


@dataclass(eq=False)
class _Execution:
    """A chapter that is running."""

    chapter: Chapter
    partial: Path
    scratch: Path
    process: Any = None
    listener: Any = None
    owned: list[Any] = field(default_factory=list)
    failure: dict[str, Any] | None = None
    notices: list[str] = field(default_factory=list)


def run_chapters(plan: Plan) -> int:
    """Execute a plan: 0 if every chapter was executed to its end, else 1.

    Old results of the chapters that are about to be executed are removed first (under ``store`` they stay until a
    finished one replaces them), so that whatever lies in the folder afterwards was finished by this run or is marked
    as failed.

    Raises:
        Interrupted: by SIGINT or SIGTERM; every process has been ended, every unfinished file removed.
        CourseError: the output folder cannot be written.
    """
    made = [folder for folder in (plan.folder, *plan.folder.parents) if not folder.exists()]
    try:
        todo = _prepare(plan)
    except OSError as error:
        raise CourseError(f"cannot write to {plan.folder}: {error.strerror or error}; see --output DIR") from None
    try:
        failed = _Run(plan, todo).execute() if todo else []
    finally:
        # A run that left nothing leaves no folder either.
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
    if plan.options.store:
        stored = [chapter.path for chapter, _ in plan.chapters if chapter.name not in failed]
        print(f"stored in {shown_path(plan.options.notebooks)}: {len(stored)} chapters; {summary(collect(stored))}")
    else:
        plan.folder.mkdir(parents=True, exist_ok=True)
        found = collect([plan.folder])
        write_claims(found, plan.folder / "claims.json")
        print(f"executed notebooks: {shown_path(plan.folder)}")
        print(f"claims:             {shown_path(plan.folder / 'claims.json')}")
        print(summary(found))
    if failed:
        print(f"{len(failed)} of {len(plan.chapters)} chapters failed: {', '.join(failed)}")
    return 1 if failed else 0


def _prepare(plan: Plan) -> list[tuple[Chapter, dict[str, Any]]]:
    plan.folder.mkdir(parents=True, exist_ok=True)
    outputs.sweep_partials(plan.folder)
    todo = []
    for chapter, values in plan.chapters:
        if plan.options.resume and outputs.is_current(plan.final(chapter), outputs.run_key(chapter, values)):
            print(f"{chapter.name}: already executed with this source and these parameters, skipped", flush=True)
            continue
        todo.append((chapter, values))
        outputs.failed_path(plan.folder, chapter).unlink(missing_ok=True)
        if not plan.options.store:
            plan.final(chapter).unlink(missing_ok=True)
    if todo:
        (plan.folder / "claims.json").unlink(missing_ok=True)
    return todo


class _Run:
    def __init__(self, plan: Plan, todo: list[tuple[Chapter, dict[str, Any]]]):
        self.plan = plan
        self.todo = todo
        self.jobs = min(plan.options.jobs, len(todo))
        # Reentrant, so that a signal handler may put into it.
        self.events: queue.SimpleQueue = queue.SimpleQueue()
        self.active: list[_Execution] = []
        self.failed: list[str] = []
        self.display = progress_display(len(todo))

    def execute(self) -> list[str]:
        """The names of the chapters that failed."""
        with tempfile.TemporaryDirectory(prefix="course-", ignore_cleanup_errors=True) as scratch, self._signals():
            try:
                with self.display:
                    waiting = list(self.todo)
                    while waiting or self.active:
                        while waiting and len(self.active) < self.jobs:
                            self._start(*waiting.pop(0), Path(scratch))
                        self._handle_next()
            finally:
                self._end_all()
        return self.failed

    @contextmanager
    def _signals(self) -> Iterator[None]:
        before = {}
        wanted = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            wanted.append(signal.SIGHUP)
        for signum in wanted:
            # Only the main thread may; elsewhere the caller's own handling stays.
            with suppress(ValueError):
                before[signum] = signal.signal(signum, lambda got, frame: self.events.put((None, got)))
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _start(self, chapter: Chapter, values: dict[str, Any], scratch: Path) -> None:
        import psutil

        plan = self.plan
        partial = outputs.partial_path(plan.folder, chapter)
        one = _Execution(chapter, partial, scratch / chapter.name)
        changed = {name: value for name, value in values.items() if value != chapter.parameters[name].default}
        job = {
            "source": str(chapter.path),
            "partial": str(partial),
            "final": str(plan.final(chapter)),
            "cwd": str(chapter.path.parent),
            "parameters": changed,
            "timeout": plan.options.timeout or None,
            "store": plan.options.store,
            "run": {"key": outputs.run_key(chapter, values), "parameters": values},
        }
        self.active.append(one)
        one.process = start_worker(job, one.scratch, jobs=self.jobs)
        with suppress(psutil.NoSuchProcess):
            one.owned.append(psutil.Process(one.process.pid))
        self.display.start(chapter.name, len(chapter.cells))
        one.listener = threading.Thread(target=self._listen, args=(one,), daemon=True)
        one.listener.start()

    def _listen(self, one: _Execution) -> None:
        for line in one.process.stdout:
            with suppress(ValueError):
                self.events.put((one, json.loads(line)))
        one.process.wait()
        self.events.put((one, {"event": "exit"}))

    def _handle_next(self) -> None:
        try:
            # The limit is for systems where waiting without one cannot be interrupted.
            one, event = self.events.get(timeout=0.5)
        except queue.Empty:
            return
        if one is None:
            raise Interrupted(event)
        match event["event"]:
            case "kernel":
                self._own(one, event["pid"])
            case "cell":
                self.display.cell(one.chapter.name, event["position"])
            case "failed":
                one.failure = event
            case "finished":
                one.notices = event["notices"]
            case "exit":
                self._finish(one)

    def _own(self, one: _Execution, pid: int) -> None:
        import psutil

        with suppress(psutil.NoSuchProcess):
            one.owned.append(psutil.Process(pid))

    def _finish(self, one: _Execution) -> None:
        name, code = one.chapter.name, one.process.returncode
        end_processes(one.owned)
        if code == 0:
            outputs.publish(one.partial, self.plan.final(one.chapter))
            self._retire(one)
            self.display.end(name, f"done, {len(one.chapter.cells)} cells")
            for notice in one.notices:
                self.display.write(f"  {name}: {notice}")
            return
        self.failed.append(name)
        kept = outputs.failed_path(self.plan.folder, one.chapter) if one.partial.is_file() else None
        if kept:
            outputs.publish(one.partial, kept)
        failure = one.failure or _died(code, one.scratch)
        self._retire(one)
        self.display.end(name, "FAILED")
        self.display.write(failure_text(name, len(one.chapter.cells), failure, kept))

    def _retire(self, one: _Execution) -> None:
        self.active.remove(one)
        if one.listener:
            one.listener.join(timeout=1.0)
            one.process.stdin.close()
            one.process.stdout.close()

    def _end_all(self) -> None:
        end_processes(owned for one in self.active for owned in one.owned)
        for one in list(self.active):
            self._retire(one)
            one.partial.unlink(missing_ok=True)


def _died(code: int, scratch: Path) -> dict[str, Any]:
    with suppress(OSError):
        log = (scratch / "log").read_text(encoding="utf-8", errors="replace")
        return {"ename": "WorkerDied", "evalue": f"its process ended with code {code}", "traceback": log}
    return {"ename": "WorkerDied", "evalue": f"its process ended with code {code}"}
