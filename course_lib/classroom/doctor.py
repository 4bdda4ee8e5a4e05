"""Doctor: looks at an installation, says what it found, and how to mend what is wrong."""

import os
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import course_lib
from course_lib.classroom.display import watched

__all__ = ["Finding", "examine"]

ROOT = Path(course_lib.__file__).resolve().parents[1]
TRIED_PAIR = {"torch": "2.15.0", "torchvision": "0.29.2"}
MINIMUM_PYTHON = (3, 11)
ENOUGH_DISK_GB = 2.0

OK, WARN, FAIL = "ok", "warn", "FAIL"
_STYLES = {OK: "green", WARN: "yellow", FAIL: "bold red"}


@dataclass(frozen=True)
class Finding:
    """One check: ``status`` is ``"ok"``, ``"warn"`` or ``"FAIL"``; ``mend`` says what to do unless it is ok."""

    status: str
    name: str
    found: str
    mend: str = ""


def examine(*, fast: bool = False) -> int:
    """Run every check and print the findings as they come; 1 if one is a FAIL, else 0.

    Args:
        fast: leave out what takes seconds: starting a kernel, reading the data sets that are there.
    """
    checks: list[Callable[[], Iterable[Finding]]] = [
        check_python, check_environment, check_packages, check_pair, check_processor,
        lambda: check_data(read=not fast), check_mirror, check_cache, check_onnxruntime, check_disk,
    ]  # fmt: skip
    if not fast:
        checks.append(check_kernel)
    counts = {OK: 0, WARN: 0, FAIL: 0}
    for check in checks:
        for finding in _guarded(check):
            counts[finding.status] += 1
            _show(finding)
    print(f"{counts[OK]} ok, {counts[WARN]} to know about, {counts[FAIL]} to mend")
    return 1 if counts[FAIL] else 0


def check_python() -> Iterable[Finding]:
    """The interpreter is one that the course supports."""
    found = f"{'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})"
    wanted = ".".join(map(str, MINIMUM_PYTHON))
    if sys.version_info[:2] < MINIMUM_PYTHON:
        mend = f"install Python {wanted} or newer, remove .venv, then: make PYTHON=python{wanted} setup"
        yield Finding(FAIL, "Python", found, mend)
    else:
        yield Finding(OK, "Python", found)


def check_environment() -> Iterable[Finding]:
    """It is the course's own environment, or at least somebody's environment."""
    name, conda = "environment", os.environ.get("CONDA_PREFIX")
    if Path(sys.prefix).resolve() == (ROOT / ".venv").resolve():
        yield Finding(OK, name, "the course's .venv")
    elif conda and Path(sys.prefix).resolve() == Path(conda).resolve():
        yield Finding(OK, name, f"conda, {conda}")
    else:
        mend = f"if packages are missing: make setup, then use {ROOT / '.venv'}"
        yield Finding(WARN, name, f"neither the course's .venv nor conda, but {sys.prefix}", mend)


def check_packages() -> Iterable[Finding]:
    """Every direct dependency is installed in the version of the lock."""
    from packaging.requirements import Requirement

    try:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        mend = "run the doctor in a clone of the course to compare versions"
        yield Finding(WARN, "packages", f"not compared with the lock: no {error.filename}", mend)
        return
    entries = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    here = [entry for entry in entries if entry.marker is None or entry.marker.evaluate()]
    locked = {entry.name.lower(): next(iter(entry.specifier)).version for entry in here}
    direct = [Requirement(text).name.lower() for text in project["dependencies"]]
    wrong = 0
    for package in direct:
        installed = _version(package)
        if installed is None:
            wrong += 1
            yield Finding(FAIL, package, f"missing (locked: {locked.get(package, 'no version')})", "make setup")
        elif package in locked and installed != locked[package]:
            wrong += 1
            mend = f"delete {Path('.venv', 'installed.lock')}, then: make setup"
            yield Finding(FAIL, package, f"{installed} (locked: {locked[package]})", mend)
    if not wrong:
        yield Finding(OK, "packages", f"{len(direct)} direct dependencies, as locked")


def check_pair() -> Iterable[Finding]:
    """torch and torchvision are the two that were tried together, and can be imported."""
    found = {name: _version(name) for name in TRIED_PAIR}
    shown = ", ".join(f"{name} {version or 'missing'}" for name, version in found.items())
    tried = ", ".join(f"{name} {version}" for name, version in TRIED_PAIR.items())
    if found != TRIED_PAIR:
        yield Finding(FAIL, "torch pair", shown, f"the pair that was tried is {tried}: make setup")
        return
    import torch
    import torchvision  # noqa: F401

    device = f"{torch.cuda.device_count()} CUDA device(s)" if torch.cuda.is_available() else "no CUDA device needed"
    yield Finding(OK, "torch pair", f"{shown}; {device}")


def check_processor() -> Iterable[Finding]:
    """What the timings will depend on: vector instructions, int8 dot products, cores, threads."""
    import torch

    from course_lib.classroom.machine import cpu_flags, cpu_name, int8_support, relevant_flags
    from course_lib.classroom.processes import available_cores

    flags = cpu_flags()
    told = ", ".join(relevant_flags(flags)) or "none of the known features" if flags else "features unknown"
    capability = torch.backends.cpu.get_cpu_capability()
    found = f"{cpu_name()}; {told}; torch uses {capability}"
    yield Finding(OK, "processor", found)
    if flags is not None and not int8_support(flags):
        mend = "nothing to mend: int8 may be no faster here, and such claims are then reported, not failed"
        yield Finding(WARN, "int8", "no VNNI, AMX or Arm dot product", mend)
    yield Finding(OK, "cores", f"{available_cores()} usable, torch computes with {torch.get_num_threads()} threads")


def check_data(*, read: bool = True) -> Iterable[Finding]:
    """The folder of the data sets: usable, and what is in it is whole."""
    from course_lib.lab.data import DATASETS, DataError, load_dataset
    from course_lib.lab.sources import SOURCES

    folder, chosen = data_folder(), bool(os.environ.get("COURSE_DATA"))
    origin = "COURSE_DATA" if chosen else "the default"
    if folder.exists() and not (folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)):
        yield Finding(FAIL, "data folder", f"{folder} ({origin}) is no readable folder", "set COURSE_DATA to another")
        return
    if not _writable(folder):
        mend = "fine for a shared folder that has what you need; to download, set COURSE_DATA to a folder of yours"
        there = "read-only" if folder.exists() else "does not exist and cannot be made"
        yield Finding(WARN, "data folder", f"{folder} ({origin}), {there}", mend)
    elif chosen and not folder.exists():
        mend = "check the spelling of COURSE_DATA; the folder is made at the first download"
        yield Finding(WARN, "data folder", f"{folder} ({origin}) does not exist yet", mend)
    else:
        state = "" if folder.exists() else ", made at the first download"
        yield Finding(OK, "data folder", f"{folder} ({origin}){state}")
    sources = [SOURCES[name] for name in DATASETS if name in SOURCES]
    there = [s.name for s in sources if any((folder / p).exists() for p in (s.folder, *s.archives))]
    sound = ["digits (inside scikit-learn)"]
    for name in there:
        try:
            if read:
                load_dataset(name, root=folder, download=False)
            sound.append(name)
        except DataError as error:
            yield Finding(FAIL, name, str(error), "see the text; digits needs no file")
    yield Finding(OK, "data sets", ", ".join(sound))


def check_mirror() -> Iterable[Finding]:
    """A mirror for downloads, where one is set, is an address."""
    mirror = os.environ.get("COURSE_MIRROR", "")
    if mirror and (urlsplit(mirror).scheme not in ("http", "https", "file") or "//" not in mirror):
        mend = "set COURSE_MIRROR to an address such as http://server/data, or unset it"
        yield Finding(FAIL, "mirror", f"COURSE_MIRROR is {mirror!r}", mend)
    else:
        yield Finding(OK, "mirror", mirror or "none set: data sets come from their own addresses")


def check_cache() -> Iterable[Finding]:
    """Trained models can be kept."""
    from course_lib.lab.checkpoints import cache_folder

    folder = cache_folder()
    if _writable(folder):
        yield Finding(OK, "cache", str(folder))
    else:
        yield Finding(FAIL, "cache", f"{folder} cannot be written", "set COURSE_CACHE to a folder of yours")


def check_onnxruntime() -> Iterable[Finding]:
    """ONNX Runtime computes."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", ends[:1], ends[1:])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (doubled,) = session.run(None, {"x": np.array([1.0, 2.0], dtype=np.float32)})
    right = doubled.tolist() == [2.0, 4.0]
    found = f"{onnxruntime.__version__} computes" if right else f"1 + 1 and 2 + 2 are {doubled.tolist()}"
    yield Finding(OK if right else FAIL, "ONNX Runtime", found, "" if right else "make setup")


def check_disk() -> Iterable[Finding]:
    """There is room for results, data sets and trained models."""
    for name, folder in (("disk, course", ROOT), ("disk, data", data_folder())):
        free = shutil.disk_usage(_nearest(folder)).free / 1e9
        mend = "" if free >= ENOUGH_DISK_GB else f"free {ENOUGH_DISK_GB:g} GB, or set COURSE_DATA to a larger disk"
        yield Finding(WARN if mend else OK, name, f"{free:.1f} GB free at {folder}", mend)


def check_kernel() -> Iterable[Finding]:
    """A kernel of this interpreter starts, as it does for a chapter, and computes."""
    from course_lib.classroom.trial import run_trial

    found = run_trial()
    good = found.startswith("1 + 1 = 2")
    mend = "make setup; if a firewall guards this machine, allow connections to 127.0.0.1"
    yield Finding(OK if good else FAIL, "kernel", found, "" if good else mend)


def data_folder() -> Path:
    """Where data sets are looked for, as :func:`course_lib.lab.data.load_dataset` does."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("COURSE_DATA")
    folder = Path(chosen).expanduser() if chosen else user_cache_path("compression-course", appauthor=False) / "data"
    return folder.absolute()


def _version(package: str) -> str | None:
    try:
        # A build for a processor, such as 2.15.0+cpu, is the same version.
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def _nearest(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _writable(folder: Path) -> bool:
    nearest = _nearest(folder)
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def _guarded(check: Callable[[], Iterable[Finding]]) -> Iterable[Finding]:
    name = getattr(check, "__name__", "check").removeprefix("check_")
    try:
        yield from check()
    except Exception as error:
        name = "data" if name == "<lambda>" else name
        yield Finding(FAIL, name, f"{type(error).__name__}: {error}", "make setup")


def _show(finding: Finding) -> None:
    line = f"{finding.status:5} {finding.name:13} {' '.join(finding.found.split())}"
    if finding.mend:
        line += f"\n{'':5} {'':13} -> {finding.mend}"
    if not watched():
        print(line, flush=True)
        return
    from rich.console import Console
    from rich.text import Text

    text = Text(line)
    text.stylize(_STYLES[finding.status], 0, len(finding.status))
    Console(file=sys.stdout).print(text, soft_wrap=True)
