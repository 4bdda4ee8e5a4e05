"""One run of a study: cells claimed, handed out, collected, tried again where a worker died, and stopped in order."""

import contextlib
import os
import pickle
import signal
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from concurrent.futures.process import BrokenProcessPool

from course_lib.lab.study_grid import Trial
from course_lib.lab.study_pool import Bench, run_cell
from course_lib.lab.study_store import RowStore

__all__ = ["Run"]

POLL = 0.1
"""Seconds between two looks at what others are doing."""


class Run:
    """Brings every trial of a grid to a row.

    A future that fails (not: a cell whose work raised, which is a result) means that a worker died. Who was to blame
    cannot be seen where several cells were under way, so each of them is tried again alone; one that dies alone twice
    is recorded as an error. No cell is tried more than three times.
    """

    def __init__(
        self, trials: list[Trial], keys: list[str], store: RowStore, bench: Bench, work: Callable, progress: bool
    ):
        self.trials, self.keys, self.store, self.bench = trials, keys, store, bench
        self.work = pickle.dumps(work) if bench.processes else work
        self.rows: dict[int, dict] = {}
        self.failed_before: dict[int, str] = {}
        self.claims: dict[int, object] = {}
        self.flying: dict[Future, int] = {}
        self.suspects: deque[int] = deque()
        self.deaths: dict[int, int] = {}
        self.progress = progress

    def finish(self) -> list[dict]:
        """All rows, in the order of the trials.

        Raises:
            StudyError: no worker can start.
        """
        for position, key in enumerate(self.keys):
            row = self.store.read(key)
            if row is not None and row["error"] is None:
                self.rows[position] = row
            elif row is not None:
                self.failed_before[position] = row["attempt"]
        todo = deque(position for position in range(len(self.trials)) if position not in self.rows)
        self.bar = Bar(len(self.trials), len(self.rows), self.progress)
        try:
            with _terminable():
                while todo or self.flying or self.suspects:
                    busy = self._hand_out(todo)
                    self._collect()
                    todo.extend(busy)
        except BaseException:
            self._stop()
            raise
        else:
            self.bench.close()
        finally:
            self.bar.close()
        return [self.rows[position] for position in range(len(self.trials))]

    def _hand_out(self, todo: deque[int]) -> list[int]:
        """Fill the executor; returns the cells that another run has claimed."""
        if self.suspects:
            if not self.flying:
                self._launch(self.suspects.popleft())
            return []
        busy = []
        while todo and len(self.flying) < self.bench.window:
            position = todo.popleft()
            if position not in self.claims:
                claim = self.store.claim(self.keys[position])
                if claim is None:
                    busy.append(position)
                    continue
                self.claims[position] = claim
            if (row := self._made_elsewhere(position)) is not None:
                self._take(position, row)
            else:
                self._launch(position)
        if busy and not self.flying:
            time.sleep(POLL)
        return busy

    def _made_elsewhere(self, position: int) -> dict | None:
        # An error from before this run is tried again; one that a run beside this one met meanwhile is not.
        row = self.store.read(self.keys[position])
        if row is None or (row["error"] is not None and row["attempt"] == self.failed_before.get(position)):
            return None
        return row

    def _launch(self, position: int) -> None:
        # The attempt's own number keeps a cluster from answering out of its memory.
        future = self.bench.submit(run_cell, self.work, self.trials[position], uuid.uuid4().hex)
        self.flying[future] = position

    def _collect(self) -> None:
        if not self.flying:
            return
        done, _ = wait(self.flying, timeout=POLL, return_when=FIRST_COMPLETED)
        alone = len(self.flying) == 1
        problems = [self._land(future, alone) for future in done]
        if any(isinstance(problem, BrokenProcessPool) for problem in problems):
            # The others fail in the same moment; what had come back before counts.
            wait(self.flying)
            for future in list(self.flying):
                self._land(future, alone)
            self.bench.replace()

    def _land(self, future: Future, alone: bool) -> BaseException | None:
        position = self.flying[future]
        problem = CancelledError("the executor gave it up") if future.cancelled() else future.exception()
        if problem is None:
            self._record(position, future.result())
        else:
            self._died(position, problem, alone)
        del self.flying[future]
        return problem

    def _died(self, position: int, problem: BaseException, alone: bool) -> None:
        self.deaths[position] = self.deaths.get(position, 0) + alone
        if self.deaths[position] > 1:
            text = f"{type(problem).__name__}: {problem}"
            self._record(position, {"values": {}, "error": text, "seconds": None, "traceback": None})
        else:
            self.suspects.append(position)

    def _record(self, position: int, result: dict) -> None:
        trial = self.trials[position]
        content = {"method": trial.method, "level": trial.level, "seed": trial.seed, "options": trial.options}
        self._take(position, self.store.write(self.keys[position], {"trial": content, **result}))

    def _take(self, position: int, row: dict) -> None:
        self.rows[position] = row
        self.store.release(self.keys[position], self.claims.pop(position))
        self.bar.update(row["error"] is not None)

    def _stop(self) -> None:
        """Keep what has come back, cancel the rest, end our workers, give the claims back."""
        for future in self.flying:
            future.cancel()
        for future, position in self.flying.items():
            if position not in self.rows and future.done() and not future.cancelled() and not future.exception():
                self._record(position, future.result())
        self.bench.close(kill=True)
        for position, claim in list(self.claims.items()):
            self.store.release(self.keys[position], claim)
        self.claims.clear()


class Bar:
    """A tqdm bar over cells with the time left, for a person who watches; silent in CI and in an unattended run."""

    def __init__(self, total: int, known: int, wanted: bool):
        self.bar, self.errors = None, 0
        if wanted and not (os.environ.get("CI") or os.environ.get("COURSE_UNATTENDED")):
            from tqdm.auto import tqdm

            self.bar = tqdm(total=total, initial=known, desc="cells", leave=False)

    def update(self, failed: bool) -> None:
        """Count one cell."""
        self.errors += failed
        if self.bar is not None:
            if self.errors:
                self.bar.set_postfix({"errors": self.errors})
            self.bar.update()

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()


@contextlib.contextmanager
def _terminable():
    """Let SIGTERM end a run as Ctrl-C does, where it would end the process without a word."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def leave(number, frame):
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
