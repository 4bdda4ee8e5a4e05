"""A room: what a teacher must know beforehand about one machine and N learners, as on a JupyterHub."""

import contextlib
import io
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from course_lib.classroom.doctor import Check, Finding, found
from course_lib.classroom.lessons import CourseError, find_lessons, notebooks_folder, read_notebook
from course_lib.classroom.runner import run_lessons, usable_cores
from course_lib.files import cache_folder

__all__ = ["room_for"]

LESSON = "02.1"
SERVER = """
import psutil
from jupyterlab.labapp import LabApp

LabApp.initialize_server(argv=["--no-browser", "--port=0", "--allow-root"])
print(psutil.Process().memory_full_info().uss)
"""
# The last cell of the measured lesson: the most memory that its kernel ever held, how much of that are files of the
# installation, which all kernels of a machine share, and the processor's seconds.
KERNEL = """
import json, sys, psutil
me = psutil.Process()
try:
    import resource
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
except ImportError:
    most = me.memory_info().peak_wset
print(json.dumps([most, getattr(me.memory_info(), "shared", 0), sum(me.cpu_times()[:2])]))
"""


def room_for(learners: int) -> Check:
    """The doctor's check of a room: versions, disk, memory, time, ports, data.

    Memory and time are those of lesson 02.1, which it runs. CourseError: fewer than one learner.
    """
    if learners < 1:
        raise CourseError(f"--room takes the number of learners, at least 1, got {learners}")
    return partial(_room, learners)


def _room(learners: int) -> Iterator[Finding]:
    lessons = {lesson.number: lesson.read() for lesson in find_lessons(notebooks_folder())}
    yield found("room", f"{learners} learners, each with one open lesson, on {usable_cores()} cores")
    yield from _once(learners)
    yield from _measured(learners, lessons[LESSON].path)
    seconds = [lesson.seconds for lesson in lessons.values() if lesson.seconds]
    yield found("lesson", f"on two quiet cores {statistics.median(seconds):g} s, at most {max(seconds):g}")


def _once(learners: int) -> Iterator[Finding]:
    """What is looked up: versions, disk, ports, data, cache."""
    import torch

    told = f"Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}: the same on all"
    yield found("versions", told)
    installed, copy = (sum(map(os.path.getsize, _files(f))) for f in (Path(sys.prefix), notebooks_folder()))
    told = f"{installed / 1e9:.1f} GB once for {sys.prefix}, {learners * copy / 1e6:.0f} MB for all working copies"
    yield found("disk", told)
    taken = [port for port in (8000, 8888) if not _free(port)]
    told = "8888 for `make lab`, 8000 for a JupyterHub, and five a kernel on 127.0.0.1; none of them leaves the machine"
    yield found("ports", told, f"{taken} is taken: make lab takes the next, a hub needs --port" if taken else "")
    told, mend = "only the digits, which are installed; COURSE_DATA names a folder for more", ""
    if data := os.environ.get("COURSE_DATA"):
        told = f"COURSE_DATA is {data}"
        folder = Path(data).expanduser().absolute()
        way = [path for path in (*folder.rglob("*"), folder, *folder.parents) if path.exists()]
        closed = [path for path in way if not path.stat().st_mode & (0o001 if path.is_dir() else 0o004)]
        cure = f"chmod -R a+rX {data}, and a+x the folders above it"
        mend = f"{cure}: others do not get into {closed[0]}" if closed else ""
    yield found("data", told, mend)
    cache = cache_folder("checkpoints")
    told = "" if os.environ.get("COURSE_CACHE") else "; COURSE_CACHE names one cache for all"
    yield found("trained", f"{len(_files(cache))} files in {cache}{told}")


def _measured(learners: int, lesson: Path) -> Iterator[Finding]:
    """What is measured by running a lesson: memory and time."""
    import psutil

    most, shared, seconds = _kernel(lesson)
    server = float(subprocess.run([sys.executable, "-c", SERVER], capture_output=True, check=True).stdout.split()[-1])
    needed, free = shared + learners * (most - shared + server), psutil.virtual_memory().available
    told = f"{(most - shared) / 1e6:.0f} MB a kernel that runs {lesson.stem}, {server / 1e6:.0f} MB a server, "
    told += f"{shared / 1e6:.0f} MB shared by all: {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free"
    yield found("memory", told, "" if needed < free else "laptops, pairs, or more memory: a kernel without it dies")
    wait = learners * seconds / usable_cores()
    told = f"{lesson.stem} takes {seconds:.0f} s of processor time; started by all at once it takes {wait:.0f} s"
    mend = "laptops, pairs, or half the room reads while the other half runs"
    yield found("time", told, "" if wait < 120 else mend)


def _kernel(lesson: Path) -> list[float]:
    """Bytes that the kernel of a lesson holds at most, those that others share, and its seconds of processor time."""
    notebook, _ = read_notebook(lesson)
    last = {"cell_type": "code", "execution_count": None, "id": "room", "metadata": {}, "outputs": [], "source": KERNEL}
    with tempfile.TemporaryDirectory(prefix="course-") as folder, contextlib.redirect_stdout(io.StringIO()) as told:
        place, out = Path(folder, "00_room.ipynb"), Path(folder, "out")
        place.write_text(json.dumps(notebook | {"cells": [*notebook["cells"], last]}), encoding="utf-8")
        run_lessons(place.parent, output=out, timeout=600)
        if not (out / place.name).exists():
            raise CourseError(f"{lesson.stem} does not run here: {told.getvalue()[-300:]}")
        return json.loads("".join(json.loads((out / place.name).read_bytes())["cells"][-1]["outputs"][0]["text"]))


def _free(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) != 0


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
