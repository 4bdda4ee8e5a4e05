"""The C of an integer network as WebAssembly, the instructions that every browser runs; and a way to run it here."""

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from course_lib.lab.compile import CompilerError, as_pixels, run_compiler, sizes_of

__all__ = ["compile_wasm", "load_wasm"]

# A page writes an image into the module's memory, calls run, and reads the scores; a loop inside can be timed.
BRIDGE = """
uint8_t image[PIXELS], scores[SCORES];
uint8_t *image_at(void) { return image; }
uint8_t *scores_at(void) { return scores; }
void run(int times) { while (times-- > 0) predict(image, scores); }
"""
EXPORTS = ("image_at", "scores_at", "run")


def compile_wasm(source: str) -> bytes:
    """A file of :func:`~course_lib.methods.c_source.c_source` as a wasm module that needs nothing of its host.

    It exports ``memory``, ``image_at()`` and ``scores_at()``, where in it the grey levels go and the scores come, and
    ``run(times)``. CompilerError: the package ziglang is not installed, or its compiler refuses the source.
    """
    if not importlib.util.find_spec("ziglang"):
        raise CompilerError("wasm needs the package ziglang: pip install ziglang")
    compiler = [sys.executable, "-m", "ziglang", "cc"]
    flags = ["-target", "wasm32-freestanding", "-O2", "-s"]
    flags += ["-nostdlib", "-Wl,--no-entry"]
    flags += [f"-Wl,--export={name}" for name in EXPORTS]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "network.wasm")
        run_compiler(source + BRIDGE, target, flags, compiler)
        return target.read_bytes()


def load_wasm(module: bytes, source: str) -> Callable[[np.ndarray], np.ndarray]:
    """The function of a module, run by the package wasmtime: grey levels uint8 [N, ...] to scores uint8 [N, K].

    ``source`` is the C that it was compiled from. ImportError: wasmtime is not installed. ValueError: images of
    another size, or with levels that the table does not have.
    """
    import wasmtime

    sizes, store = sizes_of(source), wasmtime.Store()
    exports = wasmtime.Instance(store, wasmtime.Module(store.engine, module), []).exports(store)
    memory, image_at, scores_at = exports["memory"], exports["image_at"](store), exports["scores_at"](store)

    def call(images) -> np.ndarray:
        answers = []
        for image in as_pixels(images, sizes):
            memory.write(store, image.tobytes(), image_at)
            exports["run"](store, 1)
            answers.append(memory.read(store, scores_at, scores_at + sizes["SCORES"]))
        return np.frombuffer(b"".join(map(bytes, answers)), np.uint8).reshape(-1, sizes["SCORES"])

    return call
