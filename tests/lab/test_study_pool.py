import functools
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import study_cells

from course_lib.lab import study_pool
from course_lib.lab.study import StudyError, make_grid, run_study, worker_pool
from course_lib.lab.study_pool import Bench, check_importable, run_cell


@pytest.fixture(scope="module")
def pool():
    with worker_pool(2) as pool:
        yield pool


def test_workers_have_one_thread_and_our_environment_and_leave_ctrl_c_to_us(pool, monkeypatch):
    monkeypatch.setenv("COURSE_CACHE", "/somewhere/else")
    frame = run_study(make_grid({"m": [None]}, range(8)), work=study_cells.surroundings)
    assert set(frame.threads) == {1}
    assert frame.deaf.all()
    assert set(frame.cache) == {"/somewhere/else"}
    assert os.getpid() not in set(frame.pid)


def test_a_pool_is_ready_and_stays_open(pool):
    assert len(pool._processes) == 2
    for _ in range(2):
        run_study(make_grid({"m": [1]}, range(3)), pool, work=study_cells.quick)
    assert pool.submit(os.getpid).result() in pool._processes
    for workers in (0, True, 1.5):
        with pytest.raises(ValueError, match="workers must be a whole number of at least 1"):
            worker_pool(workers)


def test_a_cell_that_kills_its_worker_is_a_row_and_costs_the_others_nothing(tmp_path):
    log = tmp_path / "log"
    grid = make_grid({"well": [1], "dies": [1], "dies_once": [1]}, range(3), log=str(log), pause=0.05)
    frame = run_study(grid, work=study_cells.moody, folder=tmp_path)
    deadly = frame.method == "dies"
    assert frame.error[deadly].str.startswith("BrokenProcessPool: ").all()
    assert frame.seconds[deadly].isna().all()
    assert frame.error[~deadly].isna().all()
    assert frame.value[~deadly].tolist() == [0, 10, 20, 0, 10, 20]
    tries = [tuple(line.split()[:3]) for line in log.read_text().splitlines()]
    assert {tries.count(("dies", "1", str(seed))) for seed in range(3)} <= {2, 3}
    assert max(tries.count(cell) for cell in tries) <= 3


def test_a_pool_that_was_given_and_broke_is_replaced(tmp_path):
    log = tmp_path / "log"
    with worker_pool(2) as given:
        os.kill(next(iter(given._processes)), signal.SIGKILL)
        with pytest.warns(UserWarning, match="broke the pool that was given"):
            frame = run_study(make_grid({"well": [1]}, range(4), log=str(log)), given, work=study_cells.moody)
    assert frame.value.tolist() == [0, 10, 20, 30]


def test_workers_that_cannot_start_end_the_run_with_a_reason(monkeypatch):
    monkeypatch.setattr(study_pool, "_start", study_cells.refuses)
    with pytest.raises(StudyError, match="no worker process could start"):
        run_study(make_grid({"m": [1]}, [0]), work=study_cells.quick)
    with pytest.raises(StudyError, match="no worker process could start"):
        worker_pool(1)


def test_workers_end_with_a_parent_that_is_killed():
    code = (
        "from course_lib.lab.study import worker_pool; import time\n"
        "if __name__ == '__main__':\n"
        "    pool = worker_pool(2); print(*pool._processes, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with parent.stdout:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
        parent.wait()
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "orphaned workers"
        time.sleep(0.05)


def alive(pid):
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_work_that_no_process_could_import_is_refused(monkeypatch):
    def inner(trial):
        return {}

    written = type(inner)(inner.__code__, {"__name__": "__main__"}, "written")
    written.__qualname__ = "written"
    cases = {
        "has no name in its module": [lambda trial: {}, inner, functools.partial(inner, 1)],
        "written in a notebook or at the prompt": [written],
        "not the same object|not found": [type(inner)(inner.__code__, {"__name__": "json"}, "loads")],
    }
    cases["not the same object|not found"][0].__qualname__ = "loads"
    monkeypatch.setitem(sys.modules, "__main__", type(sys)("__main__"))
    for message, functions in cases.items():
        for function in functions:
            with pytest.raises(ValueError, match=rf"cannot import work .*({message}).*a \.py file, or pass a Thread"):
                check_importable(function)
    check_importable(study_cells.quick)
    check_importable(functools.partial(study_cells.quick))


def test_a_lambda_is_for_threads(pool):
    grid = make_grid({"m": [1]}, range(3))
    for executor in (None, pool):
        with pytest.raises(ValueError, match=r"worker processes cannot import work .*lambda"):
            run_study(grid, executor, work=lambda trial: {"x": trial.seed})
    with ThreadPoolExecutor(2) as threads:
        assert run_study(grid, threads, work=lambda trial: {"x": trial.seed}).x.tolist() == [0, 1, 2]


def odd(method):
    return run_cell(study_cells.odd, make_grid({method: [1]}, [0], width=8)[0], "")


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("list", "TypeError: work must return a mapping of names to numbers or texts, got list"),
        ("array", "TypeError: work returned x of type ndarray; a number or a text fits"),
        ("taken", "ValueError: work returned a value named 'seed'"),
        ("option", "ValueError: work returned a value named 'width'"),
        ("unnamed", "ValueError: work returned a value named 7"),
    ],
)
def test_what_no_row_can_hold_is_an_error(method, error):
    row = odd(method)
    assert row["error"].startswith(error)
    assert row["values"] == {}
    assert "study_pool.py" in row["traceback"]


def test_scalars_of_any_library_are_numbers():
    row = odd("scalars")
    assert row["error"] is None
    assert [type(value) for value in row["values"].values()] == [float, int, int, bool, type(None), float]


def test_how_much_is_handed_out_at_once():
    assert Bench(None, 1).window == 2
    assert Bench(None, 4).window == 6
    with ThreadPoolExecutor(3) as threads:
        assert Bench(threads, 1).window == 4
    assert Bench(None, 10_000).window == 512
