"""Who does a study's work: worker processes of our own, or any executor; and what one of them does with one cell."""

import contextlib
import functools
import multiprocessing
import os
import pickle
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from course_lib.lab.study_grid import COLUMNS, Trial, plain

__all__ = ["Bench", "StudyError", "check_importable", "run_cell", "worker_pool"]


class StudyError(RuntimeError):
    """A study cannot run at all; the text says why."""


def worker_pool(workers: int = 2) -> ProcessPoolExecutor:
    """Processes as :func:`~course_lib.lab.study.run_study` starts them, ready and waiting: one torch thread each.

    Use it as a context manager and give it to several runs, so that their start (a second or two) is paid once. The
    workers end when their parent does, even if it is killed.

    Raises:
        ValueError: ``workers`` is no whole number of at least 1.
        StudyError: a worker process cannot start.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"workers must be a whole number of at least 1, got {workers!r}")
    pool = _new_pool(workers)
    ready: set[int] = set()
    try:
        # Each submission may start one process; all have started when as many have answered.
        while len(ready) < workers:
            ready |= {future.result() for future in [pool.submit(_hello, 0.02) for _ in range(workers)]}
    except BrokenProcessPool as error:
        pool.shutdown(wait=False, cancel_futures=True)
        raise StudyError(_NO_START) from error
    return pool


class Bench:
    """An executor that is replaced when its processes die.

    Attributes:
        window: how many cells to hand over at once, so that a run beside this one finds some to take.
        processes: whether the work goes to processes of this machine, by name.
    """

    def __init__(self, executor: Executor | None, workers: int):
        self.given, self.pool, self.probes = executor, executor, []
        self.processes = executor is None or isinstance(executor, ProcessPoolExecutor)
        self.workers = workers if executor is None else _workers(executor)
        self.window = min(self.workers + max(1, self.workers // 2), 512)

    def submit(self, *args) -> Future:
        """Hand over one call, if need be to a new pool in place of a broken one.

        Raises:
            StudyError: no worker can start.
        """
        while True:
            if self.pool is None:
                self.pool = _new_pool(self.workers)
                self.probes = [self.pool.submit(_hello, 0.0) for _ in range(self.workers)]
            try:
                return self.pool.submit(*args)
            except BrokenProcessPool:
                self.replace()

    def replace(self) -> None:
        """Put a broken pool away; the next call starts another.

        Raises:
            StudyError: none of the workers had come so far as to answer.
        """
        if self.pool is self.given:
            warnings.warn("a worker died and broke the pool that was given; going on with a new one", stacklevel=2)
        else:
            wait(self.probes, timeout=10)
            if not any(probe.done() and not probe.cancelled() and not probe.exception() for probe in self.probes):
                raise StudyError(_NO_START)
            self.close()
        self.pool = None

    def close(self, *, kill: bool = False) -> None:
        """End our own workers, if need be in the middle of a cell. A pool that was given stays as it is."""
        if self.pool is None or self.pool is self.given:
            return
        if kill:
            for process in list((getattr(self.pool, "_processes", None) or {}).values()):
                with contextlib.suppress(Exception):
                    process.kill()
        self.pool.shutdown(wait=True, cancel_futures=True)


def run_cell(work: Callable | bytes, trial: Trial, attempt: str) -> dict:
    """Measure one trial, wherever this is called: the row's ``values``, or its ``error``, and its ``seconds``."""
    started = time.perf_counter()
    values, error, trace = {}, None, None
    try:
        if isinstance(work, bytes):
            work = pickle.loads(work)
        values = _values(work(trial), {*COLUMNS, *dict(trial.options)})
    except (Exception, SystemExit) as problem:
        error, trace = f"{type(problem).__name__}: {problem}", traceback.format_exc()
    return {"values": values, "error": error, "seconds": time.perf_counter() - started, "traceback": trace}


def check_importable(work: Callable) -> None:
    """Refuse a function that a worker process could not import by name.

    Raises:
        ValueError: a lambda, a function within a function, or one written in a notebook or at the prompt.
    """
    function = work.func if isinstance(work, functools.partial) else work
    label = f"{function.__module__}.{function.__qualname__}"
    main = sys.modules["__main__"]
    reason = None
    if "<lambda>" in label or "<locals>" in label:
        reason = "it has no name in its module"
    elif function.__module__ == "__main__" and not (getattr(main, "__spec__", None) or getattr(main, "__file__", None)):
        reason = "it was written in a notebook or at the prompt"
    else:
        try:
            pickle.dumps(work)
        except Exception as error:
            reason = str(error)
    if reason:
        where = "move it to the top of a .py file, or pass a ThreadPoolExecutor"
        raise ValueError(f"worker processes cannot import work {label}: {reason}; {where}")


_NO_START = (
    "no worker process could start; in a script, call run_study under `if __name__ == '__main__':` "
    "(what a worker printed may say more)"
)


def _values(given: object, taken: set[str]) -> dict:
    if not isinstance(given, Mapping):
        raise TypeError(f"work must return a mapping of names to numbers or texts, got {type(given).__name__}")
    values = {name: plain(value) for name, value in given.items()}
    for name, value in values.items():
        if not isinstance(name, str) or name in taken:
            raise ValueError(f"work returned a value named {name!r}, which is no name, or a column's already")
        if not (value is None or isinstance(value, (bool, int, float, str))):
            raise TypeError(f"work returned {name} of type {type(value).__name__}; a number or a text fits")
    return values


def _workers(executor: Executor) -> int:
    client = getattr(executor, "_client", None)
    if client is not None and hasattr(client, "nthreads"):
        return max(1, sum(client.nthreads().values()))
    return getattr(executor, "_max_workers", None) or 128


def _new_pool(workers: int) -> ProcessPoolExecutor:
    # A fork server has torch imported once for all its workers; on macOS frameworks do not bear a fork.
    method = "forkserver" if sys.platform == "linux" else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["torch"])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(dict(os.environ),))


def _start(environment: dict[str, str]) -> None:
    # The fork server keeps the environment of its own start.
    import signal

    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)
    # Ctrl-C reaches a whole group of processes; what it means here, the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import torch

    torch.set_num_threads(1)


def _end_with(parent) -> None:
    # A worker whose parent was killed would wait for its next cell for ever.
    parent.join()
    os._exit(1)


def _hello(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()
