"""Grids of experiments: what is a cell, what a row, and what outlives a failure, a death and a kill."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas
import psutil
import pytest
import study_cells

from course_lib.lab.study import Trial, make_grid, run_study

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Level:
    sparsity: float
    bits: int = 4


@dataclass(frozen=True)
class Other:
    sparsity: float
    bits: int = 4


@pytest.fixture
def threads():
    with ThreadPoolExecutor(4) as threads:
        yield threads


def lines(log):
    return log.read_text().splitlines() if log.exists() else []


# Cells


def test_a_cell_is_its_content():
    a = Trial("m", np.float64(8.0), np.int64(3), {"b": 1, "a": np.float32(0.5)})
    b = Trial("m", 8, 3, (("a", 0.5), ("b", 1)))
    assert (a, hash(a), a.key) == (b, hash(b), b.key)


def test_cells_that_differ_have_keys_that_differ():
    levels = [None, 8, 8.5, "8", (8, 4), ((8,), 4), Level(8), Level(8, 3), Other(8), True]
    trials = [Trial("m", level, 0) for level in levels]
    trials += [Trial("n", 8, 0), Trial("m", 8, 1), Trial("m", 8, 0, {"a": 1}), Trial("m", 8, 0, {"a": 2})]
    assert len({trial.key for trial in trials}) == len(trials)
    code = "from course_lib.lab.study import Trial; print(Trial('m', (0.92, 4), 0, {'a': 1}).key)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == Trial("m", (0.92, 4), 0, {"a": 1}).key  # in another process


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("m", 1, -1), "seed must be an integer of at least 0, got -1"),
        (("m", 1, 0, {"seed": 1}), "an option needs a name other than method, level, seed, error, seconds"),
        (("m", object(), 0), "a object has no stable content"),
        (("m", float("nan"), 0), "not JSON compliant"),
    ],
)
def test_bad_cells_are_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        _ = Trial(*arguments).key


def test_a_grid_is_every_level_with_every_seed():
    grid = make_grid({"a": [Level(0.5)], "b": [1, (2, 3)]}, range(2), width=7)
    assert [(t.method, t.level, t.seed) for t in grid] == [
        ("a", Level(0.5), 0), ("a", Level(0.5), 1), ("b", 1, 0), ("b", 1, 1), ("b", (2, 3), 0), ("b", (2, 3), 1),
    ]  # fmt: skip
    assert {t.options for t in grid} == {(("width", 7),)}
    for levels, message in (
        ({}, "grid is empty"),
        ({"a": "word"}, "levels must map"),
        ({"a": None}, "a list of levels"),
        ({"a": 0.5}, "a list of levels"),
        (["a"], "levels must map"),
        ({"a": [1, 1.0]}, "a cell twice"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            make_grid(levels, [0])

    with pytest.raises(TypeError, match=r"seeds be a list or a range; got .* and 3"):
        make_grid({"a": [1]}, 3)


# Rows


def test_rows_come_in_the_order_of_the_grid(threads):
    grid = make_grid({"late": [3], "soon": [1, 2]}, [0, 1], width=5)

    def work(trial):
        time.sleep(0.03 * trial.level)
        return {"level_again": trial.level, trial.method: 1}

    frame = run_study(grid, threads, work=work)
    assert [Trial(row.method, row.level, row.seed, {"width": 5}) for row in frame.itertuples()] == grid
    assert list(frame) == ["method", "level", "seed", "width", "level_again", "late", "soon", "error", "seconds"]
    assert frame.level_again.tolist() == [3, 3, 1, 1, 2, 2]
    assert (frame.seconds >= 0.03).all()


def test_what_a_row_holds(threads):
    grid = make_grid({m: [Level(1)] for m in ("good", "object", "taken", "none", "option")}, [0], width=1)
    frame = run_study(grid, threads, work=study_cells.odd)
    good = frame.iloc[0]
    assert (good.level, good.a, good.b, good.d) == (Level(1), 0.5, 3, True)
    assert (good.c, pandas.isna(good.e), good.f) == ([0, 1], True, [1, "x"])
    says = ["TypeError: work must return numbers", "'seed'", "TypeError", "'width'"]
    assert all(text in error for text, error in zip(says, frame.error[1:], strict=True))


def test_failing_cells_are_rows_and_are_tried_again_while_finished_ones_are_not(tmp_path, threads):
    log = tmp_path / "log"
    grid = make_grid({"fails": [1], "exits": [1], "well": [1]}, [0, 1], log=str(log))
    log.with_suffix(".bad").touch()
    first = run_study(grid, threads, work=study_cells.moody, folder=tmp_path)
    assert first.error[:4].tolist() == ["ValueError: no luck with 1"] * 2 + ["SystemExit: enough"] * 2
    assert first.error.isna().tolist() == [False] * 4 + [True] * 2
    log.with_suffix(".bad").unlink()
    second = run_study(grid, threads, work=study_cells.moody, folder=tmp_path)
    assert second.error.isna().tolist() == [True, True, False, False, True, True]
    tried = [line.split()[0] for line in lines(log)]
    assert [tried.count(method) for method in ("fails", "exits", "well")] == [4, 4, 2]
    pandas.testing.assert_frame_equal(first[4:], second[4:])


def test_rows_are_kept_by_content(tmp_path, threads):
    log = tmp_path / "log"
    small, large = (make_grid({"m": [(1, 2)]}, range(n), log=str(log)) for n in (2, 5))
    common = {"executor": threads, "work": study_cells.logged, "folder": tmp_path}
    run_study(small, **common)
    frame = run_study(large[::-1], **common)
    assert frame.value.tolist() == [40, 30, 20, 10, 0]
    assert len(lines(log)) == 5
    torn = next((tmp_path / "study").glob("*.json"))
    torn.write_text(torn.read_text()[:-9])
    run_study(large, **common)
    assert len(lines(log)) == 6
    run_study(small, **common, version="mnist")
    run_study(small, **common, name="other")
    run_study(small, threads, work=study_cells.logged)
    assert len(lines(log)) == 12
    assert {path.suffix for path in (tmp_path / "study").iterdir()} == {".json"}


class Client:
    def get_executor(self):
        raise AssertionError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": [("m", 1, 0)]}, "a grid holds trials, got "),
        ({"workers": 0}, "workers must be an integer of at least 1, got 0"),
        ({"name": "a/b"}, "name must be letters"),
        ({"executor": Client()}, r"got Client; for dask, pass Client\(...\).get_executor\(\)"),
        ({"work": lambda trial: {}}, "worker processes cannot import <function .*lambda"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(tmp_path, arguments, message):
    grid = make_grid({"m": [1]}, [0], log=str(tmp_path / "log"))
    with pytest.raises((TypeError, ValueError), match=message):
        run_study(**{"grid": grid, "work": study_cells.logged, "folder": tmp_path / "rows", **arguments})
    assert list(tmp_path.iterdir()) == []


def test_rows_are_kept_under_the_source_of_the_work(tmp_path, threads, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "some_work"
    package.mkdir()
    (package / "__init__.py").write_text("def work(trial):\n    return {'x': 1}\n")
    import some_work

    grid = make_grid({"m": [1]}, [0])
    for change in ("", "# another line\n"):
        (package / "helper.py").write_text(change)
        run_study(grid, threads, work=some_work.work, folder=tmp_path)
    assert len(list((tmp_path / "study").iterdir())) == 2
    held = 3
    with pytest.raises(ValueError, match="a plain function that holds no variables"):
        run_study(grid, threads, work=lambda t: {"x": held}, folder=tmp_path)
    assert run_study(grid, threads, work=lambda t: {"x": held}).x.tolist() == [3]


def test_who_stops_a_study_on_a_given_executor_stops_what_is_queued(tmp_path, monkeypatch):
    log = tmp_path / "log"

    def interrupted(future):
        raise KeyboardInterrupt

    monkeypatch.setattr("course_lib.lab.study._row", interrupted)
    with ThreadPoolExecutor(1) as given, pytest.raises(KeyboardInterrupt) as stopped:
        run_study(make_grid({"m": [1]}, range(20), log=str(log), pause=0.05), given, work=study_cells.logged)
    assert stopped.tb is not None
    assert len(lines(log)) < 9


# Workers


def test_what_a_notebook_defines_is_refused_before_a_worker_dies_of_it(monkeypatch):
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    monkeypatch.setattr(Other, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "Other", Other, raising=False)
    for grid in (make_grid({"m": [(1, Other(8))]}, [0]), make_grid({"m": [1]}, [0], how=Other(8))):
        with pytest.raises(ValueError, match=r"cannot import Trial\(.*Other\(.*it was written in a notebook"):
            run_study(grid, work=study_cells.quick)


def test_workers_have_one_thread_and_our_environment(monkeypatch):
    monkeypatch.setenv("COURSE_CACHE", "/somewhere/else")
    frame = run_study(make_grid({"m": [None]}, range(4)), work=study_cells.surroundings)
    assert (set(frame.threads), set(frame.cache)) == ({1}, {"/somewhere/else"})


def test_a_cell_that_kills_its_worker_is_a_row_and_costs_the_others_nothing(tmp_path):
    log = tmp_path / "log"
    grid = make_grid({"well": [1], "dies": [1], "also well": [1]}, range(2), log=str(log), pause=0.02)
    frame = run_study(grid, work=study_cells.moody, folder=tmp_path)
    deadly = frame.method == "dies"
    assert frame.error[deadly].str.startswith("BrokenProcessPool: ").all()
    assert frame.seconds[deadly].isna().all()
    assert frame.value[~deadly].tolist() == [0, 10, 0, 10]
    assert frame.error[~deadly].isna().all()
    tries = [tuple(line.split()[:3]) for line in lines(log)]
    assert {tries.count(("dies", "1", str(seed))) for seed in range(2)} <= {1, 2}
    once = run_study(make_grid({"dies_once": [1]}, [0], log=str(log)), work=study_cells.moody, workers=1)
    assert once.value.tolist() == [0]


def test_a_pool_that_was_given_and_broke_is_replaced(tmp_path):
    with ProcessPoolExecutor(1) as given:
        given.submit(os.getpid).result()
        os.kill(next(iter(given._processes)), signal.SIGKILL)
        frame = run_study(make_grid({"m": [1]}, range(3)), given, work=study_cells.quick)
    assert frame.double.tolist() == [2, 3, 4]


SCRIPT = """
import sys
import study_cells
from course_lib.lab.study import make_grid, run_study
if __name__ == "__main__":
    grid = make_grid({"m": [1]}, range(12), log=sys.argv[2], pause=0.15)
    run_study(grid, work=study_cells.logged, folder=sys.argv[1])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_goes_on_without_repeating_a_finished_cell(tmp_path, number):
    log, script = tmp_path / "log", tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path), str(log)],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.DEVNULL,
        # Whoever started the tests may have told them to ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    kept = tmp_path / "study"
    try:
        until(lambda: kept.is_dir() and len(list(kept.glob("*.json"))) >= 4)
    finally:
        process.send_signal(number)
        process.wait()
    workers = {int(line.split()[3]) for line in lines(log)}
    until(lambda: not any(alive(pid) for pid in workers))
    finished, begun = len(list(kept.glob("*.json"))), len(lines(log))
    assert 4 <= finished <= begun < 12
    assert begun - finished <= 5  # two at work, three in the pool's queue
    with ThreadPoolExecutor(4) as threads:
        grid = make_grid({"m": [1]}, range(12), log=str(log), pause=0.15)
        frame = run_study(grid, threads, work=study_cells.logged, folder=tmp_path)
    assert frame.value.tolist() == [10 * seed for seed in range(12)]
    assert len(lines(log)) == begun + 12 - finished


def until(condition, seconds=40):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
