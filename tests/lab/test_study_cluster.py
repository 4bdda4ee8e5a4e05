"""A study on a real dask cluster of two worker processes."""

import os
import signal
import threading
import time
from concurrent.futures import Executor

import pytest
import study_cells

from course_lib.lab.study import make_grid, run_study

distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def client():
    import dask

    # One death is enough to give a cell up, and dead workers are back soon.
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1, "logging.distributed": "critical"}),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def test_a_cluster_measures_a_grid(client, tmp_path):
    executor = client.get_executor()
    assert isinstance(executor, Executor)
    log = tmp_path / "log"
    grid = make_grid({"fails": [1], "well": [1]}, range(6), log=str(log), pause=0.05)
    log.with_suffix(".bad").touch()
    frame = run_study(grid, executor, work=study_cells.moody, folder=tmp_path)
    assert frame.error[:6].tolist() == ["ValueError: no luck with 1"] * 6
    assert frame.value[6:].tolist() == [0, 10, 20, 30, 40, 50]
    workers = {line.split()[3] for line in log.read_text().splitlines()}
    assert len(workers) == 2
    assert str(os.getpid()) not in workers
    log.with_suffix(".bad").unlink()
    again = run_study(grid, executor, work=study_cells.moody, folder=tmp_path)
    assert again.error.isna().all(), "a cluster must not answer out of its memory"
    assert len(log.read_text().splitlines()) == 18


def test_a_cluster_takes_functions_without_a_name(client):
    frame = run_study(make_grid({"m": [1]}, range(3)), client.get_executor(), work=lambda t: {"x": 100 + t.seed})
    assert frame.x.tolist() == [100, 101, 102]


def test_a_worker_killed_half_way_costs_no_cell(client, tmp_path):
    log = tmp_path / "log"
    grid = make_grid({"well": [1]}, range(12), log=str(log), pause=0.1)

    def kill():
        while not log.exists() or len(log.read_text().splitlines()) < 5:
            time.sleep(0.01)
        os.kill(int(log.read_text().splitlines()[-1].split()[3]), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    frame = run_study(grid, client.get_executor(), work=study_cells.moody, folder=tmp_path)
    killer.join()
    assert frame.error.isna().all()
    assert frame.value.tolist() == [10 * seed for seed in range(12)]
    tries = [line.split()[2] for line in log.read_text().splitlines()]
    assert 12 < len(tries) <= 12 + 3
