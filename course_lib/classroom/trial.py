"""Trial: one small notebook executed exactly as a chapter is, to see whether kernels start here."""

import json
import sys
import tempfile
import threading
import time
from pathlib import Path

from course_lib.classroom.processes import end_processes, start_worker

__all__ = ["run_trial"]

_SOURCE = "import sys\nprint(1 + 1, sys.executable)"
_CELL = {"cell_type": "code", "id": "trial", "metadata": {}, "execution_count": None, "outputs": [], "source": _SOURCE}


def run_trial(*, timeout_s: float = 60.0) -> str:
    """Execute ``1 + 1`` in a kernel; a sentence that begins with ``1 + 1 = 2`` if all is well."""
    import psutil

    with tempfile.TemporaryDirectory(prefix="course-", ignore_cleanup_errors=True) as folder:
        notebook, executed = Path(folder, "trial.ipynb"), Path(folder, "executed.ipynb")
        notebook.write_text(json.dumps({"cells": [_CELL], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
        paths = {"source": str(notebook), "partial": str(executed), "final": str(executed), "cwd": folder}
        job = {**paths, "parameters": {}, "timeout": int(timeout_s), "store": False, "run": {}}
        started = time.monotonic()
        process = start_worker(job, Path(folder, "scratch"), jobs=1)
        root = psutil.Process(process.pid)
        alarm = threading.Timer(timeout_s, end_processes, [[root]])
        alarm.start()
        try:
            # Not communicate(): it closes the input, by which the worker knows that we live.
            events = process.stdout.read().decode()
            process.wait()
        finally:
            late = not alarm.is_alive()
            alarm.cancel()
            end_processes([root])
            process.wait()
            process.stdin.close()
            process.stdout.close()
        if late:
            return f"no answer within {timeout_s:g} s"
        if process.returncode:
            return _failure(events, Path(folder, "scratch", "log"))
        text = "".join(json.loads(executed.read_text(encoding="utf-8"))["cells"][0]["outputs"][0]["text"])
    total, interpreter = text.strip().split(" ", 1)
    if interpreter != sys.executable:
        return f"another interpreter answered: {interpreter}"
    return f"1 + 1 = {total} in {time.monotonic() - started:.1f} s"


def _failure(events: str, log: Path) -> str:
    for line in events.splitlines():
        event = json.loads(line)
        if event["event"] == "failed":
            return f"{event['ename']}: {event['evalue']}"
    return "its process died: " + " ".join(log.read_text(encoding="utf-8", errors="replace").split())[-300:]
