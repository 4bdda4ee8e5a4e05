"""Worker: the process that executes one chapter through papermill and tells its parent how it goes.

``python -m course_lib.classroom.worker JOB.json`` is started by the runner. Events leave on standard output, one JSON
object a line; the exit code alone says whether the chapter was executed to its end.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from course_lib.classroom.outputs import clean_for_storage, first_error, stamp

__all__ = ["main", "run_job"]

Emit = Callable[[dict[str, Any]], None]

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class ChapterFailed(Exception):
    """A chapter that did not reach its end: the cell (its position and its ``In [count]``) and the error."""

    def __init__(self, ename: str, evalue: str, *, cell: dict | None = None, position: int = 0, trace: str = ""):
        super().__init__(f"{ename}: {evalue}")
        self.event = {
            "event": "failed",
            "ename": ename,
            "evalue": _ANSI.sub("", evalue),
            "position": position,
            "count": cell.get("execution_count") if cell else None,
            "source": cell["source"] if cell else "",
            "traceback": _ANSI.sub("", trace),
        }


def run_job(job: dict[str, Any], emit: Emit) -> int:
    """Execute a chapter and write it to ``job["partial"]``; 0 if it was executed to its end, else 1.

    Args:
        job: ``source`` and ``partial`` (paths), ``cwd``, ``parameters`` to inject, ``timeout`` (seconds a cell, or
            None), ``store`` (clean it for keeping), ``run`` (what to record in the metadata), ``final`` (where the
            parent will put it).
        emit: called with ``{"event": "kernel" | "cell" | "failed" | "finished", ...}``.
    """
    started = time.monotonic()
    try:
        notebook = _execute(job, emit)
        _check_executed(notebook)
        emit({"event": "finished", "notices": _write(notebook, job, time.monotonic() - started)})
        return 0
    except ChapterFailed as failure:
        emit(failure.event)
    except Exception as error:
        traceback.print_exc()
        emit(ChapterFailed(type(error).__name__, str(error), trace=traceback.format_exc()).event)
    return 1


def main(argv: list[str]) -> int:
    """Run the job of a file; for a process of its own, whose standard streams it takes over."""
    job = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    # Whatever a kernel or a library prints goes to the log: only events may reach the parent.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, args=(Path(job["partial"]), Path(argv[0]).parent), daemon=True).start()

    def emit(event):
        try:
            events.write(json.dumps(event) + "\n")
        except OSError:
            # Nobody listens any more: the thread above ends everything, this one must not write another file.
            threading.Event().wait(60)
            raise

    return run_job(job, emit)


def _end_with_parent(partial: Path, scratch: Path) -> None:
    # The parent writes nothing: this returns when it is gone, however it went.
    os.read(0, 1)
    import psutil

    from course_lib.classroom.processes import end_processes

    children = psutil.Process().children(recursive=True)
    for child in children:
        # Stopped, not killed: papermill would notice a dead kernel and write the partial notebook once more.
        with contextlib.suppress(psutil.Error):
            child.suspend()
    partial.unlink(missing_ok=True)
    shutil.rmtree(scratch, ignore_errors=True)
    with contextlib.suppress(OSError):
        scratch.parent.rmdir()
    end_processes(children, wait_s=0.0)
    os._exit(1)


def _execute(job: dict[str, Any], emit: Emit) -> Any:
    """The executed notebook. papermill saves to the partial path as it goes, so that a failure leaves its outputs."""
    with warnings.catch_warnings():
        # The tools' own deprecations are no business of a reader's; warnings inside the kernel are not touched.
        warnings.simplefilter("ignore")
        import papermill
        from nbclient.exceptions import CellTimeoutError, DeadKernelError
        from papermill.exceptions import PapermillExecutionError

        current: dict[str, Any] = {"position": 0, "cell": None}

        def cell_started(cell, cell_index):
            if "injected-parameters" not in cell.metadata.get("tags", []):
                current["position"] += 1
            current["cell"] = cell
            emit({"event": "cell", "position": current["position"]})

        try:
            return papermill.execute_notebook(
                _literal(job["source"]),
                _literal(job["partial"]),
                parameters=job["parameters"],
                cwd=job["cwd"],
                kernel_name="python3",
                language="python",
                progress_bar=False,
                execution_timeout=job["timeout"],
                record_timing=False,
                kernel_manager_class=_kernel_manager(emit),
                on_cell_start=cell_started,
            )
        except PapermillExecutionError as error:
            trace = "\n".join(error.traceback)
            raise ChapterFailed(error.ename, error.evalue, **current, trace=trace) from None
        except CellTimeoutError:
            text = f"the cell took longer than {job['timeout']} s (--timeout)"
            raise ChapterFailed("TimeoutError", text, **current) from None
        except DeadKernelError:
            text = "the kernel died; out of memory, or a crash in compiled code"
            raise ChapterFailed("DeadKernelError", text, **current) from None


def _kernel_manager(emit: Emit) -> type:
    """A manager whose kernel is this interpreter, whatever kernelspec the name ``python3`` leads to on the machine."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from jupyter_core.paths import jupyter_runtime_dir

    # In the run's own folder, it goes with it; the default is a file among all others in the system's.
    connection = Path(jupyter_runtime_dir()) / f"course-{os.getpid()}.json"
    connection.parent.mkdir(parents=True, exist_ok=True)

    class CourseKernelManager(AsyncKernelManager):
        kernel_spec = KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            display_name="Python 3 (ipykernel)",
            language="python",
        )
        connection_file = str(connection)
        shutdown_wait_time = 2.0

        async def start_kernel(self, **kwargs):
            await super().start_kernel(**kwargs)
            emit({"event": "kernel", "pid": self.provisioner.pid})

    return CourseKernelManager


def _literal(path: str) -> str:
    """papermill fills in paths as format strings."""
    return path.replace("{", "{{").replace("}", "}}")


def _check_executed(notebook: Any) -> None:
    # papermill takes sys.exit() for a good end, and marks the cells after it as completed.
    position = 0
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        position += "injected-parameters" not in tags
        if cell.cell_type != "code" or not cell.source.strip() or "skip-execution" in tags:
            continue
        error = first_error({"cells": [cell]})
        if error:
            raise ChapterFailed(error["ename"], error["evalue"], cell=cell, position=position)
        if cell.execution_count is None:
            raise ChapterFailed("NotExecuted", "the run ended before this cell", cell=cell, position=position)


def _write(notebook: Any, job: dict[str, Any], seconds: float) -> list[str]:
    """Write the finished notebook over the partial one; the returned lines are for the user."""
    import nbformat

    data = json.loads(nbformat.writes(notebook))
    notices = []
    if job["store"]:
        notices = clean_for_storage(data)
    else:
        data["metadata"]["papermill"] |= {"input_path": job["source"], "output_path": job["final"]}
        stamp(data, {**job["run"], "seconds": round(seconds, 1)})
    text = nbformat.writes(nbformat.from_dict(data))
    Path(job["partial"]).write_text(text + "\n", encoding="utf-8", newline="\n")
    return notices


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
