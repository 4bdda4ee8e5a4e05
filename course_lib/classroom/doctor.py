"""Doctor: looks at an installation, says what it found, and how to mend what is wrong."""

import contextlib
import io
import os
import platform
import shutil
import struct
import sys
import sysconfig
import tempfile
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import course_lib

__all__ = ["Finding", "examine", "found", "without_torch"]

ROOT = Path(course_lib.__file__).resolve().parents[1]
OK, WARN, FAIL = "ok", "warn", "FAIL"
_INT8 = {"avx512_vnni": "VNNI", "avx_vnni": "VNNI", "amx_int8": "AMX", "dotprod": "dot product", "i8mm": "i8mm"}
_WIDE = {"avx2": "AVX2", "avx512_f": "AVX-512", "neon": "NEON", "sve": "SVE"}

Finding = tuple[str, str, str, str]
"""Status, what was looked at, what was found, and what to do unless all is well."""
Check = Callable[[], Iterator[Finding]]


def examine(more: Mapping[str, Check] | None = None, *, fast: bool = False) -> int:
    """Run every check, and ``more``, and print the findings as they come; 1 if one is to be mended, else 0.

    ``fast`` leaves out what takes seconds: starting a kernel, reading the data sets that are there.
    """
    warnings.simplefilter("ignore")  # of the tools about themselves, such as a home that cannot be written
    counts = dict.fromkeys((OK, WARN, FAIL), 0)
    checks = {"python": _python, "packages": _packages, "processor": _processor, "data": partial(_data, read=not fast)}
    checks |= {"places": _places, "onnxruntime": _onnxruntime, "jupyter": _jupyter}
    for checked, check in (checks | ({} if fast else {"kernel": _kernel}) | (more or {})).items():
        try:
            for status, name, told, mend in check():
                counts[status] += 1
                arrow = f"\n{'':18} -> {mend}" if mend else ""
                print(f"{status:5} {name:12} {' '.join(told.split())}{arrow}", flush=True)
        except Exception as error:
            counts[FAIL] += 1
            print(f"{FAIL:5} {checked:12} {type(error).__name__}: {error}\n{'':18} -> make setup")
    print(f"{counts[OK]} ok, {counts[WARN]} to know about, {counts[FAIL]} to mend")
    return 1 if counts[FAIL] else 0


def without_torch(system: str, machine: str, libc: str, bits: int) -> str:
    """What to do on a system for which the locked torch has no build, or "" where it has one.

    >>> without_torch("Linux", "x86_64", "glibc", 64)
    ''
    """
    told = ""
    if bits < 64:
        told = "torch has no build for a 32-bit Python: install a 64-bit one"
    elif system == "Darwin" and machine == "x86_64":
        told = "torch 2.3 and newer have no build for Intel Macs: use Binder or a Linux container"
        told += " (on Apple silicon, install Python for arm64: this one runs under Rosetta)"
    elif system == "Linux" and (libc != "glibc" or machine not in ("x86_64", "aarch64")):
        told = f"torch has no build for {machine} with {libc}: use a glibc container on x86_64 or aarch64"
    return told and f"{told}, or read the stored outputs, for which nothing is needed"


def found(name: str, told: object, mend: str = "", status: str = WARN) -> Finding:
    """A finding that is well if there is nothing to mend, and of that status otherwise."""
    return status if mend else OK, name, str(told), mend


def _python() -> Iterator[Finding]:
    old = sys.version_info[:2] < (3, 11)
    mend = "install Python 3.11 or newer, remove .venv, then: make PYTHON=python3.11 setup" if old else ""
    yield found("Python", f"{platform.python_version()} ({sys.executable})", mend, FAIL)
    libc = "musl" if "musl" in (sysconfig.get_config_var("HOST_GNU_TYPE") or "") else "glibc"
    mend = without_torch(platform.system(), platform.machine(), libc, struct.calcsize("P") * 8)
    yield found("system", f"{platform.system()} {platform.machine()}", mend, FAIL)
    own = Path(sys.prefix).resolve() in (ROOT / ".venv", Path(os.environ.get("CONDA_PREFIX") or ROOT).resolve())
    mend = "" if own else "neither .venv nor conda; if packages are missing: make setup"
    yield found("environment", sys.prefix, mend)


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    entries = map(Requirement, (ROOT / "requirements.lock").read_text(encoding="utf-8").split("\n")[:-1])
    locked = {e.name.lower(): str(e.specifier)[2:] for e in entries if e.marker is None or e.marker.evaluate()}
    names, wrong = [Requirement(text).name.lower() for text in project["dependencies"]], 0
    for name in names:
        try:
            # A build for one kind of processor, such as 2.15.0+cpu, is the same version.
            installed = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            installed = "missing"
        if installed != locked[name]:
            wrong += 1
            yield FAIL, name, f"{installed} (locked: {locked[name]})", "delete .venv/installed.lock, then: make setup"
    import torch
    import torchvision

    if not wrong:
        pair = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
        yield found("packages", f"{len(names)} direct dependencies, as locked; {pair}")


def _processor() -> Iterator[Finding]:
    import torch

    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    told = ", ".join(dict.fromkeys(label for name, label in (_WIDE | _INT8).items() if able.get(name)))
    name = able.get("cpu_name") or platform.processor() or platform.machine()
    used = f"torch uses {torch.get_num_threads()} threads and {torch.backends.cpu.get_cpu_capability()}"
    yield found("processor", f"{name}; {told or 'features unknown'}; {os.cpu_count()} cores, {used}")
    if able and not any(able.get(name) for name in _INT8):
        mend = "nothing to mend: int8 may be no faster here, and such claims are then reported, not failed"
        yield found("int8", "no VNNI, AMX or Arm dot product", mend)


def _data(read: bool = True) -> Iterator[Finding]:
    from course_lib.lab.data import DataError, load_dataset
    from course_lib.lab.download import SOURCES

    folder, chosen = _data_folder(), os.environ.get("COURSE_DATA")
    if folder.exists() and not (folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)):
        yield FAIL, "data folder", f"{folder} is no readable folder", "set COURSE_DATA to another"
        return
    mend = "fine if it has what you need; to download, set COURSE_DATA to a folder of yours"
    mend = "" if _writable(folder) else mend
    if chosen and not folder.exists():
        mend = "it does not exist: check the spelling of COURSE_DATA; a download makes it"
    yield found("data folder", folder, mend)
    yield found("data sets", "digits (inside scikit-learn)")
    for name, source in SOURCES.items():
        if not any(folder.glob(source.folder.partition("/")[0][:8] + "*")):  # the folder, or an archive beside it
            continue
        if not read:
            yield found("data sets", f"{name}: files are there, not read", "the doctor without --fast reads them")
            continue
        try:
            data = load_dataset(name, root=folder, download=False)
            yield found("data sets", f"{name}, {len(data.train) + len(data.val):,} training images")
        except DataError as error:
            yield FAIL, name, str(error), "see the text; digits needs no file"


def _places() -> Iterator[Finding]:
    from course_lib.files import cache_folder

    mirror, cache = os.environ.get("COURSE_MIRROR", ""), cache_folder("checkpoints")
    if mirror and (urlsplit(mirror).scheme not in ("http", "https", "file") or "//" not in mirror):
        mend = "set it to an address such as http://server/data, or unset it"
        yield FAIL, "mirror", f"COURSE_MIRROR is {mirror!r}", mend
    mend = "read-only: set COURSE_CACHE to a folder of yours, or lessons train anew each time"
    yield found("cache", cache, "" if _writable(cache) else mend)
    for name, folder in (("disk, course", ROOT), ("disk, data", _data_folder())):
        free = shutil.disk_usage(_nearest(folder)).free / 1e9
        mend = "" if free >= 2 else "free 2 GB, or set COURSE_DATA to a larger disk"
        yield found(name, f"{free:.1f} GB free at {folder}", mend)


def _onnxruntime() -> Iterator[Finding]:
    import numpy as np
    import onnxruntime
    from onnx import parser

    text = '<ir_version: 10, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { y = Add(x, x) }'
    model = parser.parse_model(text).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    right = session.run(None, {"x": np.array([1, 2], dtype=np.float32)})[0].tolist() == [2, 4]
    yield found("ONNX Runtime", onnxruntime.__version__, "" if right else "it adds wrongly: make setup", FAIL)


def _jupyter() -> Iterator[Finding]:
    """JupyterLab starts what the name python3 leads to, which another installation may have taken."""
    from jupyter_client.kernelspec import KernelSpecManager

    spec = KernelSpecManager().get_kernel_spec("python3")
    program = Path(shutil.which(spec.argv[0]) or spec.argv[0])
    # A bare name is replaced by the interpreter that runs JupyterLab.
    own = spec.argv[0] in ("python", "python3") or program.parent.resolve() == Path(sys.executable).parent.resolve()
    mend = f"move {spec.resource_dir} away: any Jupyter but `make lab` takes it for the course's kernel"
    yield found("Jupyter", f"its kernel python3 is {'this Python' if own else program}", "" if own else mend)


def _kernel() -> Iterator[Finding]:
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    from course_lib.classroom.runner import run_lessons

    with tempfile.TemporaryDirectory(prefix="course-") as folder, contextlib.redirect_stdout(io.StringIO()) as told:
        nbformat.write(new_notebook(cells=[new_code_cell("assert 1 + 1 == 2")]), Path(folder, "00_trial.ipynb"))
        good = run_lessons(Path(folder), output=Path(folder, "out"), timeout=60) == 0
    mend = "" if good else "make setup; if a firewall guards this machine, allow connections to 127.0.0.1"
    yield found("kernel", "starts and computes" if good else told.getvalue()[-300:], mend, FAIL)


def _data_folder() -> Path:
    from course_lib.files import cache_folder

    chosen = os.environ.get("COURSE_DATA")
    return Path(chosen).expanduser().absolute() if chosen else cache_folder("data")


def _nearest(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _writable(folder: Path) -> bool:
    nearest = _nearest(folder)
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
