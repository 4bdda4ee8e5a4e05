"""Grids of experiments: method by level by seed, over processes or a cluster, with rows that outlive a killed run.

Any ``concurrent.futures.Executor`` may do the work: processes of this machine by default, threads, or a cluster through
``dask.distributed.Client(...).get_executor()``. Each finished cell is a file of its own, named by its content.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from course_lib.lab.study_grid import Trial, distinct, make_grid
from course_lib.lab.study_pool import Bench, StudyError, check_importable, worker_pool
from course_lib.lab.study_run import Run
from course_lib.lab.study_store import RowStore, identity, row_key
from course_lib.lab.study_table import check_save, save_table, table

if TYPE_CHECKING:
    import pandas

__all__ = ["StudyError", "Trial", "make_grid", "read_rows", "run_study", "worker_pool"]


def run_study(
    grid: Iterable[Trial],
    executor: Executor | None = None,
    *,
    work: Callable[[Trial], Mapping[str, object]] | None = None,
    folder: str | Path | None = None,
    name: str = "study",
    workers: int = 2,
    progress: bool = False,
    save: str | Path | None = None,
    version: str = "",
) -> "pandas.DataFrame":
    """Measure every cell of a grid; what was measured before, here or by a run beside this one, is not measured again.

    A cell that raises, or that ends its worker again and again, is a row with its ``error``; the rest goes on. Where a
    worker dies, the cells that were under way are tried again, each alone. Finished rows stay when the run is killed
    or interrupted (Ctrl-C, SIGTERM), and the next run goes on there: it tries failed rows again, finished ones never.

    Args:
        grid: distinct trials, as from :func:`make_grid`.
        executor: who does the work; it stays open. ``None`` means ``workers`` processes with one torch thread each
            (:func:`worker_pool` makes the same, to be kept for several runs). Threads use the caller's thread count.
        work: ``work(trial)`` -> named numbers or texts. Processes must be able to import it by name: no lambda, and
            nothing written in a notebook. ``None`` means ``course_lib.lab.families.measure_trial``.
        folder: where rows are kept, under ``name``; runs that share it share rows. ``None``: nothing is kept.
        name: letters, digits, '-' and '_'.
        workers: processes where ``executor`` is ``None``, at least 1.
        progress: show a bar with the time left if a person watches, never under ``CI`` or ``COURSE_UNATTENDED``.
        save: a ``.csv`` or ``.parquet`` file to write the result to, in one piece.
        version: what else the result depends on, such as the data set. Rows are kept under the trial, this text,
            torch's version and the source of ``work``: its module and all that it imports from the same package.

    Returns:
        One row a trial in the grid's order: ``method, level, seed``, the options, the measured values, ``error``
        (missing where the cell went well) and ``seconds`` (of the work alone).

    Raises:
        TypeError, ValueError: bad arguments, before anything has run.
        StudyError: no worker can start, or ``work`` was not given and the course's is not there.
    """
    import pandas  # noqa: F401  (before the first cell: a missing package must not cost the results)

    trials = distinct(list(grid))
    work = _course_work() if work is None else work
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"workers must be a whole number of at least 1, got {workers!r}")
    if not isinstance(version, str):
        raise TypeError(f"version must be a text, got {type(version).__name__}")
    if executor is not None and not isinstance(executor, Executor):
        hint = "; for dask, pass Client(...).get_executor()" if hasattr(executor, "get_executor") else ""
        raise TypeError(f"executor must be a concurrent.futures.Executor, got {type(executor).__name__}{hint}")
    check_save(save)
    salt = identity(work, version, kept=folder is not None)
    if executor is None or isinstance(executor, ProcessPoolExecutor):
        check_importable(work)
    keys = [row_key(trial.key, salt) for trial in trials]
    with tempfile.TemporaryDirectory() as scratch:
        store = RowStore(scratch if folder is None else folder, name)
        rows = Run(trials, keys, store, Bench(executor, workers), work, progress).finish()
    frame = table(trials, rows)
    if save is not None:
        save_table(frame, Path(save))
    return frame


def read_rows(folder: str | Path, name: str = "study") -> "pandas.DataFrame":
    """The rows that are there now, while a study runs or after it, sorted by method, level and seed.

    Where a cell was measured under several versions, the newest counts.
    """
    newest = {}
    for row in sorted(RowStore(folder, name).rows(), key=lambda row: row["recorded"]):
        trial = Trial(**row["trial"])
        newest[trial] = row
    order = sorted(newest, key=lambda t: (t.method, isinstance(t.level, str), str(t.level), t.seed, t.key))
    return table(order, [newest[trial] for trial in order])


def _course_work() -> Callable:
    try:
        from course_lib.lab.families import measure_trial
    except ModuleNotFoundError as error:
        if error.name != "course_lib.lab.families":
            raise
        raise StudyError("work was not given, and course_lib.lab.families is not there: pass work=...") from error
    return measure_trial
