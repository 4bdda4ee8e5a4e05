"""Processes that execute chapters: what they inherit, how they are started, how they are ended, kernels included."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import course_lib

if TYPE_CHECKING:
    import psutil

__all__ = ["available_cores", "end_processes", "kernel_environment", "start_worker"]

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def available_cores() -> int:
    """Cores that this process may use, which a container or a batch system may have limited."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def kernel_environment(base: Mapping[str, str], scratch: Path, *, jobs: int) -> dict[str, str]:
    """The environment of one chapter's process and kernel.

    Args:
        base: the environment to start from. Thread counts that the user has set there stay.
        scratch: a folder of this chapter alone, for connection files and IPython's profile: neither a start-up file
            of the user's nor another chapter's profile gets into a run.
        jobs: how many chapters share the cores.
    """
    env = dict(base)
    # A backend chosen for a terminal would keep the pictures out of the notebook.
    env.pop("MPLBACKEND", None)
    threads = env.get("OMP_NUM_THREADS") or str(max(1, available_cores() // jobs))
    for name in _THREADS:
        env[name] = env.get(name) or threads
    env.setdefault("PYTHONHASHSEED", "0")
    env |= {
        "COURSE_UNATTENDED": "1",
        "IPYTHONDIR": str(scratch / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(scratch / "runtime"),
        "JUPYTER_PLATFORM_DIRS": "1",
        "JUPYTER_PREFER_ENV_PATH": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    root = Path(course_lib.__file__).resolve().parents[1]
    if (root / "pyproject.toml").is_file():
        # In a clone that was not installed, the kernel must find the same course_lib as this process.
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), env.get("PYTHONPATH"))))
    return env


def start_worker(job: Mapping[str, Any], scratch: Path, *, jobs: int) -> subprocess.Popen:
    """Start the process that executes one chapter, in a group of its own: Ctrl-C reaches it through us only.

    Its standard output carries events, one JSON object a line; its standard input stays open for as long as we live,
    and its end is the worker's sign that we are gone; what else is printed goes to ``scratch/log``.
    """
    scratch.mkdir(parents=True)
    (scratch / "job.json").write_text(json.dumps(job), encoding="utf-8")
    windows = os.name == "nt"
    with open(scratch / "log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "course_lib.classroom.worker", str(scratch / "job.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=kernel_environment(os.environ, scratch, jobs=jobs),
            start_new_session=not windows,
            creationflags=subprocess.CREATE_NEW_PROCESS_GROUP if windows else 0,
        )


def end_processes(roots: Iterable["psutil.Process"], *, wait_s: float = 2.0) -> None:
    """Kill processes and all their descendants at once.

    Each is stopped before its children are listed, until no new one turns up: none can start another unseen. Returns
    when all are dead, after ``wait_s`` seconds at the latest.
    """
    import psutil

    roots = list(roots)
    known: dict[int, psutil.Process] = {}
    while True:
        fresh = [process for process in _with_descendants(roots) if process.pid not in known]
        if not fresh:
            break
        for process in fresh:
            known[process.pid] = process
            _try(process.suspend)
    for process in known.values():
        _try(process.kill)
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline and any(_alive(process) for process in known.values()):
        time.sleep(0.02)


def _with_descendants(roots: Iterable["psutil.Process"]) -> list["psutil.Process"]:
    import psutil

    found = []
    for root in roots:
        try:
            # A process number may have been given to another program since.
            if root.is_running():
                found += [root, *root.children(recursive=True)]
        except psutil.Error:
            continue
    return found


def _alive(process: "psutil.Process") -> bool:
    import psutil

    try:
        # What nobody has waited for yet is dead all the same.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _try(action) -> None:
    import psutil

    with contextlib.suppress(psutil.Error):
        action()
