"""Runs that are killed, interrupted, or not alone."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas
import psutil
import pytest
import study_cells
from study_script import grid_of

from course_lib.lab.study import make_grid, read_rows, run_study
from course_lib.lab.study_run import Bar

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def script(folder, log, pause, cells):
    """The same study in a process of its own."""
    arguments = [sys.executable, str(Path(__file__).with_name("study_script.py")), folder, log, pause, cells]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen([*map(str, arguments), str(folder / "result.csv")], env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def starts(log):
    """How often each cell was started, and by whom."""
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return Counter(tuple(line[:3]) for line in lines), {int(line[3]) for line in lines}


def finished(folder):
    return {path.stem for path in (folder / "study").glob("*.json")}


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)


def test_a_run_killed_half_way_goes_on_without_repeating_a_finished_cell(tmp_path):
    log = tmp_path / "log"
    with script(tmp_path, log, 0.15, 12) as process:
        until(lambda: len(finished(tmp_path)) >= 4)
        process.send_signal(signal.SIGKILL)
        process.wait()
    _, workers = starts(log)
    until(lambda: not any(psutil.pid_exists(pid) for pid in workers))
    known, before = finished(tmp_path), starts(log)[0]
    assert 4 <= len(known) < 12
    torn = tmp_path / "study" / f"{min(known)}.json"
    torn.write_text(torn.read_text()[:-9])

    frame = run_study(grid_of(log, 0.15, 12), work=study_cells.logged, folder=tmp_path)
    assert frame.error.isna().all()
    assert frame.value.tolist() == [0, 10, 20, 30, 40, 50] * 2
    after = starts(log)[0]
    repeated = sum(after[cell] > 1 for cell in after)
    # The torn row, and the cells that were under way: at most one a worker.
    assert 1 <= repeated <= 3
    assert sum(after.values()) - sum(before.values()) == 12 - len(known) + 1
    assert not list((tmp_path / "study").glob("*.lock"))


def test_two_runs_at_the_same_time_share_the_cells(tmp_path):
    log = tmp_path / "log"
    grid = grid_of(log, 0.1, 24)
    with script(tmp_path, log, 0.1, 24) as process:
        until(lambda: len(finished(tmp_path)) >= 2)
        frame = run_study(grid[::-1], work=study_cells.logged, folder=tmp_path)
        assert process.wait(20) == 0
    counts, workers = starts(log)
    assert len(counts) == 24
    assert set(counts.values()) == {1}
    assert len(workers) == 4
    other = pandas.read_csv(tmp_path / "result.csv")
    assert frame.error.isna().all()
    assert other.error.isna().all()
    columns = ["method", "level", "seed", "value", "seconds"]
    pandas.testing.assert_frame_equal(other[columns], frame[::-1].reset_index(drop=True)[columns], check_dtype=False)


def test_runs_in_threads_of_one_process_share_them_as_well(tmp_path):
    grid = make_grid({"fails": [1], "well": [1]}, range(6), log=str(tmp_path / "log"), pause=0.02)
    (tmp_path / "log.bad").touch()

    def run(cells):
        with ThreadPoolExecutor(2) as threads:
            return run_study(cells, threads, work=study_cells.moody, folder=tmp_path)

    with ThreadPoolExecutor(3) as runs:
        frames = list(runs.map(run, [grid, grid[::-1], grid[6:] + grid[:6]]))
    assert set(starts(tmp_path / "log")[0].values()) == {1}, "an error met by one run is not met again by the others"
    assert [frame.error.isna().sum() for frame in frames] == [6, 6, 6]


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize("processes", [True, False])
def test_an_interrupted_run_leaves_its_finished_rows_and_nobody_at_work(tmp_path, number, kind, processes):
    log = tmp_path / "log"
    grid = make_grid({"m": [1]}, range(40), log=str(log), pause=0.1)
    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]

    def interrupt():
        until(lambda: len(finished(tmp_path)) >= 3)
        os.kill(os.getpid(), number)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    with ThreadPoolExecutor(2) as threads, pytest.raises(kind):
        run_study(grid, None if processes else threads, work=study_cells.logged, folder=tmp_path)
    watcher.join()
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == handlers
    begun, workers = starts(log)
    assert 3 <= len(finished(tmp_path)) <= len(begun) < 12
    if not processes:
        assert len(begun) - len(finished(tmp_path)) <= 2, "a cell that was waiting was begun after all"
    if processes:
        until(lambda: not any(psutil.pid_exists(pid) for pid in workers))
    time.sleep(0.15)
    assert starts(log)[0] == begun, "somebody is still at work"

    rows = read_rows(tmp_path)
    assert rows.value.tolist() == [10 * seed for seed in rows.seed]
    with ThreadPoolExecutor(8) as threads:
        assert run_study(grid, threads, work=study_cells.logged, folder=tmp_path).error.isna().all()
    after = starts(log)[0]
    assert {after[("m", "1", str(seed))] for seed in rows.seed} == {1}


def test_an_interrupted_run_does_not_wait_for_long_cells(tmp_path):
    log = tmp_path / "log"
    grid = make_grid({"m": [1]}, range(2), log=str(log), pause=60)

    def interrupt():
        until(lambda: len(starts(log)[0]) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_study(grid, work=study_cells.logged, folder=tmp_path)
    watcher.join()
    assert time.monotonic() - started < 30
    until(lambda: not any(psutil.pid_exists(pid) for pid in starts(log)[1]), 5)
    assert finished(tmp_path) == set()


def test_the_bar_is_for_a_person(monkeypatch, capsys, tmp_path):
    grid = make_grid({"fails": [1], "well": [1]}, range(2), log=str(tmp_path / "log"))
    (tmp_path / "log.bad").touch()
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("COURSE_UNATTENDED", raising=False)

    def shown(progress=True):
        with ThreadPoolExecutor(2) as threads:
            run_study(grid, threads, work=study_cells.moody, folder=tmp_path, progress=progress)
        return capsys.readouterr().err

    assert "cells" in shown()
    again = shown()
    assert "2/4" in again, "cells that were known count from the start"
    assert shown(progress=False) == ""
    for name in ("CI", "COURSE_UNATTENDED"):
        monkeypatch.setenv(name, "1")
        assert shown() == ""
        monkeypatch.delenv(name)


def test_the_bar_counts_errors(monkeypatch, capsys):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("COURSE_UNATTENDED", raising=False)
    bar = Bar(3, 1, True)
    bar.update(True)
    bar.update(False)
    bar.bar.refresh()
    bar.close()
    assert "errors=1" in capsys.readouterr().err
