"""C source, compiled by this machine's compiler and called from Python."""

import ctypes
import hashlib
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from course_lib.files import cache_folder, write_file

__all__ = ["CompilerError", "compile_c", "compiler_command", "run_compiler"]

STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror")
ZIG = [sys.executable, "-m", "ziglang", "cc"]


class CompilerError(RuntimeError):
    """There is no compiler, or it refused the source; the message holds its own words."""


def compiler_command() -> list[str]:
    """The words that start a C compiler: ``cc``, else the one of the Python package ziglang."""
    if found := shutil.which("cc"):
        return [str(Path(found).absolute())]
    if importlib.util.find_spec("ziglang"):
        return ZIG
    raise CompilerError(
        "there is no C compiler 'cc' here: install one (gcc or clang), or the Python package ziglang, "
        "which brings its own: pip install ziglang"
    )


def run_compiler(source: str, target: Path, flags: Sequence[str], compiler: Sequence[str]) -> Path:
    """Compile ``source`` into the file ``target``, which is whole or not there; CompilerError if it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "source.c").write_text(source, encoding="utf-8")
        words = [*compiler, *STRICT, *flags, "-o", "result", "source.c"]
        here = {"ZIG_GLOBAL_CACHE_DIR": str(cache_folder("zig"))} | os.environ
        run = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=here)
        result = Path(folder, "result")
        if run.returncode or not result.exists():
            called = " ".join([Path(compiler[0]).name, *compiler[1:]])
            raise CompilerError(f"{called} refuses the source:\n{(run.stderr or run.stdout).strip()[:2000]}")
        return write_file(target, result.read_bytes())


def sizes_of(source: str) -> dict[str, int]:
    """The sizes that a file of :func:`~course_lib.methods.c_source.c_source` states: PIXELS, LEVELS and SCORES.

    >>> sizes_of("#define PIXELS 64\\n#define LEVELS 17\\n#define SCORES 10")
    {'PIXELS': 64, 'LEVELS': 17, 'SCORES': 10}
    """
    sizes = {name: int(value) for name, value in re.findall(r"^#define (\w+) (\d+)", source, re.M)}
    if not {"PIXELS", "LEVELS", "SCORES"} <= sizes.keys():
        raise ValueError(f"the source must define PIXELS, LEVELS and SCORES, found {', '.join(sizes) or 'none'}")
    return sizes


def score_type(source: str) -> np.dtype:
    """What the function writes: float32 where its scores are ``float *scores``, else uint8."""
    return np.dtype("<f4" if "float *scores" in source else "u1")


def as_pixels(images, sizes: dict[str, int]) -> np.ndarray:
    """Images as uint8 [N, PIXELS], each below LEVELS, so that no table is read past its end."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim < 2 or math.prod(images.shape[1:]) != sizes["PIXELS"]:
        need = f"uint8 [N, ...] with {sizes['PIXELS']} pixels an image"
        raise ValueError(f"images must be {need}, got {images.dtype} {images.shape}")
    if images.size and images.max() >= sizes["LEVELS"]:
        raise ValueError(f"pixels must be from 0 to {sizes['LEVELS'] - 1}, got {images.max()}")
    return np.ascontiguousarray(images.reshape(len(images), sizes["PIXELS"]))


def compile_c(source: str, folder: str | Path) -> Callable[[np.ndarray], np.ndarray]:
    """Compile a file of :func:`~course_lib.methods.c_source.c_source` and give its function back.

    What it returns takes grey levels uint8 [N, ...] and gives scores [N, K], uint8 (float32 from a float file). The
    shared library stays in ``folder``. CompilerError: no compiler, or its message. ValueError: images of another size,
    or with levels that the table does not have.
    """
    sizes, kind, command = sizes_of(source), score_type(source), compiler_command()
    windows = sys.platform == "win32"
    # A name of its own: a library that is loaded stays loaded under its name.
    mark = hashlib.sha256(source.encode()).hexdigest()[:12]
    target = Path(folder) / f"predict-{mark}{'.dll' if windows else '.so'}"
    run_compiler(source, target, ["-O2", "-shared", *([] if windows else ["-fPIC"])], command)
    function = ctypes.CDLL(str(target.absolute())).predict
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p]

    def call(images) -> np.ndarray:
        pixels = as_pixels(images, sizes)
        scores = np.zeros((len(pixels), sizes["SCORES"]), dtype=kind)
        for image, out in zip(pixels, scores, strict=True):
            function(image.ctypes.data, out.ctypes.data)
        return scores

    return call
