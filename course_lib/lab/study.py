"""Grids of experiments: method by level by seed, on any executor, with rows that outlive a killed run.

The work may be done by processes of this machine (the default), by threads, or by a cluster through
``dask.distributed.Client(...).get_executor()``. Each finished cell is a file of its own, named by its content.
"""

import contextlib
import hashlib
import inspect
import itertools
import json
import multiprocessing
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from course_lib.files import source_hash, write_file
from course_lib.gate import whole_number
from course_lib.lab.checkpoints import file_word, stable_content
from course_lib.lab.training import progress_bar

if TYPE_CHECKING:
    import pandas

__all__ = ["Trial", "make_grid", "run_study"]

COLUMNS = ("method", "level", "seed", "error", "seconds")


@dataclass(frozen=True)
class Trial:
    """One cell of a grid: a method, how hard it presses, a seed, and whatever else determines the result.

    ``level`` is a number, a word, ``None``, or a tuple or a frozen dataclass of them. ``options`` are pairs (name,
    value) sorted by name; a mapping is taken as well.

    >>> trial = Trial("prune+share", (0.92, 4), seed=0, options={"model": "lenet300"})
    >>> trial.options, trial == Trial("prune+share", (0.92, 4.0), 0, (("model", "lenet300"),))
    ((('model', 'lenet300'),), True)
    """

    method: str
    level: object
    seed: int
    options: tuple[tuple[str, object], ...] = ()

    def __post_init__(self):
        options = dict(self.options)
        if taken := options.keys() & COLUMNS:
            raise ValueError(f"an option needs a name other than {', '.join(COLUMNS)}, got {taken.pop()!r}")
        object.__setattr__(self, "seed", whole_number(self.seed, "seed", 0))
        object.__setattr__(self, "options", tuple(sorted(options.items())))

    @property
    def key(self) -> str:
        """A sha256 of the content, the same in every process and on every machine; ValueError for NaN and infinity."""
        content = stable_content([self.method, self.level, self.seed, self.options], "trial")
        return hashlib.sha256(json.dumps(content, allow_nan=False).encode()).hexdigest()


def make_grid(levels: Mapping[str, Iterable], seeds: Iterable[int], **options) -> list[Trial]:
    """Every method at each of its ``levels`` (``[None]`` if it has none) with every seed; add grids to vary an option.

    >>> [(t.method, t.level, t.seed) for t in make_grid({"dense": [None], "int": [8, 4]}, seeds=[0])]
    [('dense', None, 0), ('int', 8, 0), ('int', 4, 0)]
    """
    lists = [*levels.values(), seeds] if isinstance(levels, Mapping) else [None]
    if any(isinstance(given, str) or not isinstance(given, Iterable) for given in lists):
        told = "levels must map each method to a list of levels ([None] for none), and seeds be a list or a range"
        raise TypeError(f"{told}; got {levels!r} and {seeds!r}")
    pairs = [(method, level) for method, given in levels.items() for level in given]
    grid = [Trial(*pair, seed, options) for pair, seed in itertools.product(pairs, list(seeds))]
    _by_key(grid)
    return grid


def run_study(
    grid: Iterable[Trial], executor: Executor | None = None, *, work: Callable[[Trial], Mapping[str, object]],
    folder: str | Path | None = None, name: str = "study", workers: int = 2, version: str = "", progress: bool = False,
) -> "pandas.DataFrame":  # fmt: skip
    """Measure every cell of a grid; what was measured before is not measured again.

    A cell that raises is a row with its ``error``; the rest goes on. Cells that are lost, because a process died, are
    tried again one after another. A run that was killed goes on where it stood, and tries failed rows again.

    Args:
        grid: distinct trials, as from :func:`make_grid`.
        executor: who does the work; it stays open. ``None`` means ``workers`` processes with one torch thread each.
        work: ``work(trial)`` -> named numbers, texts or lists of them. Processes import it by name: no lambda, and
            nothing written in a notebook.
        folder: where rows are kept, under ``name``. ``None``: nothing is kept.
        version: what else the result depends on, such as the data set. Rows are kept under the trial, this text,
            torch's version and the source of ``work`` (its whole package).

    Returns one row a trial in the grid's order: ``method, level, seed``, the options, the measured values, ``error``
    (missing where the cell went well) and ``seconds`` (of the work alone). BrokenProcessPool: no worker can start; a
    script needs ``if __name__ == "__main__":`` around the call.
    """
    import pandas

    trials, workers, paths, rows = _by_key(grid), whole_number(workers, "workers"), {}, {}
    if executor is not None and not isinstance(executor, Executor):
        hint = "; for dask, pass Client(...).get_executor()" if hasattr(executor, "get_executor") else ""
        raise TypeError(f"executor must be a concurrent.futures.Executor, got {type(executor).__name__}{hint}")
    if executor is None or isinstance(executor, ProcessPoolExecutor):
        _check_importable(work, *trials.values())
    if folder is not None:
        salt, kept = _identity(work, version), Path(folder) / file_word(name)
        kept.mkdir(parents=True, exist_ok=True)
        paths = {key: kept / f"{hashlib.sha256(f'{key} {salt}'.encode()).hexdigest()}.json" for key in trials}
        rows = {key: row for key, path in paths.items() if (row := _read(path)) and row["error"] is None}
    missing = {key: trial for key, trial in trials.items() if key not in rows}
    measured = _measured(missing, work, executor, workers)
    with contextlib.closing(measured), progress_bar(len(missing), progress, "cells") as advance:
        for key, row in measured:
            if paths:
                write_file(paths[key], json.dumps({"trial": str(trials[key]), **row}).encode())
            rows[key] = row
            advance()
    records = []
    for key, t in trials.items():
        cell = {"method": t.method, "level": t.level, "seed": t.seed, **dict(t.options), **rows[key]["values"]}
        records.append(cell | {name: rows[key][name] for name in ("error", "seconds")})
    names = [n for n in dict.fromkeys(itertools.chain(*records)) if n not in COLUMNS]
    return pandas.DataFrame(records, columns=[*COLUMNS[:3], *names, *COLUMNS[3:]])


def _by_key(grid: Iterable[Trial]) -> dict[str, Trial]:
    """The cells by their keys, if there are any and none is there twice."""
    trials = {}
    for trial in grid:
        if not isinstance(trial, Trial):
            raise TypeError(f"a grid holds trials, got {trial!r}")
        if trial.key in trials:
            raise ValueError(f"the grid holds a cell twice: {trial}")
        trials[trial.key] = trial
    if not trials:
        raise ValueError("the grid is empty")
    return trials


def _measured(trials: dict[str, Trial], work: Callable, given: Executor | None, workers: int) -> Iterator[tuple]:
    """(key, row) of every trial: all at once, then alone those that were lost with a process that died."""
    lost, flying = [], {}
    pool = given or _new_pool(workers)
    try:
        for key, trial in trials.items():
            try:
                flying[_submit(pool, work, trial)] = key
            except BrokenExecutor:
                lost.append(key)
        for future in as_completed(flying):
            if isinstance(future.exception(), BrokenExecutor):
                lost.append(flying[future])
            else:
                yield flying[future], _row(future)
    finally:
        for future in flying:
            future.cancel()  # a pool that was given would go on
        if pool is not given:
            pool.shutdown(cancel_futures=True)
    while lost:  # who is to blame is seen where each is alone
        with _new_pool(1) as alone:
            while lost:
                row = _row(_submit(alone, work, trials[lost[0]]))
                yield lost.pop(0), row
                if row["seconds"] is None:  # it took the worker with it
                    break


def _submit(pool: Executor, work: Callable, trial: Trial) -> Future:
    return pool.submit(_cell, work, trial, time.time_ns())  # the time keeps a cluster from answering out of its memory


def _row(future: Future) -> dict:
    problem = future.exception()  # of the worker: a cell whose work raised has a result
    lost = {"values": {}, "error": f"{type(problem).__name__}: {problem}", "seconds": None}
    return lost if problem else future.result()


def _new_pool(workers: int) -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start)
    pool.submit(os.getpid).result()  # where no worker can start, this says so before any cell is blamed
    return pool


def _start() -> None:
    import torch

    torch.set_num_threads(1)
    # A worker whose parent was killed would wait for its next cell for ever.
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _cell(work: Callable, trial: Trial, attempt: int) -> dict:
    """One trial's row: its ``values``, or its ``error``, and its ``seconds``."""
    started, values, error = time.perf_counter(), {}, None
    try:
        values = json.loads(json.dumps(dict(work(trial)), default=_plain))
        if taken := {*COLUMNS, *dict(trial.options)} & values.keys():
            raise ValueError(f"work returned a value named {taken.pop()!r}, which is a column's name already")
    except (Exception, SystemExit) as problem:
        values, error = {}, f"{type(problem).__name__}: {problem}"
    return {"values": values, "error": error, "seconds": time.perf_counter() - started}


def _plain(value: object) -> object:
    """numpy's and torch's numbers as Python's."""
    if not hasattr(value, "tolist"):
        raise TypeError(f"work must return numbers, texts or lists of them, got {value!r}")
    return value.tolist()


def _check_importable(*needed: object) -> None:
    for given in needed:
        try:
            if b"__main__" in pickle.dumps(given) and not hasattr(sys.modules["__main__"], "__file__"):
                raise ValueError("it was written in a notebook or at the prompt")
        except Exception as error:
            cure = "move it to the top of a .py file, or pass a ThreadPoolExecutor"
            raise ValueError(f"worker processes cannot import {given!r}: {error}; {cure}") from None


def _identity(work: Callable, version: str) -> str:
    """What besides the trial determines a row: the function, the source of its package, torch, the caller's word."""
    import torch

    if not inspect.isfunction(work) or work.__closure__:
        raise ValueError(f"rows that are kept need a plain function that holds no variables, got {work!r}: use options")
    module, package = (sys.modules.get(n) for n in (work.__module__, work.__module__.partition(".")[0]))
    file = getattr(package, "__file__", None) or getattr(module, "__file__", None)
    source = source_hash(file) if file else inspect.getsource(work)
    return json.dumps([work.__module__, work.__qualname__, source, torch.__version__, version])


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
