"""Running chapters for real: results in place, failures shown, interruption at once, storing."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from small_chapters import GOOD, course, outputs_of, write_notebook

from course_lib.classroom.processes import available_cores

ROOT_FILES = ["01_good.ipynb", "02_bad_index.failed.ipynb", "03_leaves.failed.ipynb", "claims.json"]


def test_a_run_leaves_finished_and_failed_notebooks_and_nothing_else(run):
    code, _, errors, folder = run
    assert (code, errors) == (1, "")
    assert sorted(os.listdir(folder)) == ROOT_FILES


def test_a_chapter_gets_its_parameters_this_interpreter_and_its_share_of_the_cores(run, notebooks):
    _, _, _, folder = run
    told = outputs_of(folder / "01_good.ipynb")[2][0]["data"]["text/plain"]
    told = json.loads("".join(told).strip("'"))
    assert told == {
        "python": sys.executable,
        "cwd": str(notebooks),
        "threads": str(max(1, available_cores() // 2)),
        "unattended": "1",
        "seed": 7,
        "alpha": 0.5,
        "widths": [3],
    }


def test_a_failure_shows_cell_source_error_and_partial_notebook(run):
    _, text, _, folder = run
    assert "[1/3] 01_good: started, 4 cells" in text
    assert "01_good: done, 4 cells after" in text
    start = text.index("FAILED 02_bad_index in cell 3 of 4, In [3]\n    numbers = [1, 2]\n    print('so far')\n")
    shown = text[start : text.index("\n  partial notebook: ", start)]
    assert "----> 3 numbers[7]" in shown
    assert shown.endswith("\n  IndexError: list index out of range")
    assert "\x1b" not in text
    partial = text[start:].split("partial notebook: ")[1].splitlines()[0]
    assert partial == str(folder / "02_bad_index.failed.ipynb")
    stream, error = outputs_of(folder / "02_bad_index.failed.ipynb")[2]
    assert (stream["text"], error["ename"]) == (["so far\n"], "IndexError")
    assert "2 of 3 chapters failed: " in text


def test_leaving_early_is_a_failure_too(run):
    _, text, _, _ = run
    assert "FAILED 03_leaves in cell 2 of 3, In [1]\n    import sys; sys.exit()\n  SystemExit\n" in text


def test_a_run_ends_with_where_everything_is_and_the_claims_counted(run):
    _, text, _, folder = run
    assert f"executed notebooks: {folder}\nclaims:             {folder / 'claims.json'}\n" in text
    assert "\n2 claims: 1 holds, 0 fail, 1 does not hold here\n" in text
    written = json.loads((folder / "claims.json").read_text())
    assert [claim["id"] for claim in written["claims"]] == ["01.one", "01.two"]
    assert written["claims"][0]["measured"] == "97.8 ± 0.4"
    assert written["errors"] == [
        "02_bad_index.failed.ipynb: IndexError: list index out of range",
        "03_leaves.failed.ipynb: SystemExit",
    ]


def test_resume_runs_only_what_changed(run, notebooks, tmp_path):
    _, _, _, folder = run
    finished = folder / "01_good.ipynb"
    given = ("--seed", 7, "-p", "alpha=0.5", "-p", "widths=[3]")
    before = finished.stat().st_mtime_ns
    code, text, _ = course("run", "1", "--notebooks", notebooks, "--resume", *given)
    assert (code, finished.stat().st_mtime_ns) == (0, before)
    assert text.startswith("01_good: already executed with this source and these parameters, skipped\n")

    mine = write_notebook(tmp_path / "notebooks" / "01_good.ipynb", GOOD + "  # edited")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "01_good.ipynb").write_bytes(finished.read_bytes())
    code, text, _ = course("run", "--notebooks", mine.parent, "--output", tmp_path / "out", "--resume", *given)
    assert code == 0
    assert "01_good: done" in text
    assert "no claims" in text
    assert "# edited" in (tmp_path / "out" / "01_good.ipynb").read_text()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A good and a failing chapter stored, then the good one once more: (code, text, bytes before, between, after)."""
    folder = tmp_path_factory.mktemp("store") / "notebooks"
    noisy = "import sys, warnings\nwarnings.warn('mind this')\nprint('kept')\nseed"
    good = write_notebook(folder / "01_good.ipynb", noisy, title="Kept")
    bad = write_notebook(folder / "02_bad.ipynb", "1 / 0")
    before = bad.read_bytes()
    code, text, _ = course("run", "--notebooks", folder, "--store", "--jobs", 2)
    between = good.read_bytes()
    again, _, _ = course("run", "good", "--notebooks", folder, "--store")
    return folder, code, text, again, (before, bad.read_bytes()), (between, good.read_bytes())


def test_store_puts_clean_outputs_into_the_chapters(stored):
    folder, code, text, again, _, (first, second) = stored
    assert (code, again) == (1, 0)
    assert first == second
    assert first.endswith(b"}\n")
    notebook = json.loads(first)
    assert notebook["metadata"]["course"] == {"title": "Kept"}
    assert b"papermill" not in first
    assert [cell["execution_count"] for cell in notebook["cells"][1:]] == [1, 2]
    stream, result = notebook["cells"][2]["outputs"]
    assert (stream["text"], result["data"]["text/plain"], result["execution_count"]) == (["kept\n"], ["0"], 2)
    assert "01_good: cell 3 wrote to stderr, which is not stored: " in text
    assert b"UserWarning" not in first
    assert f"stored in {folder}: 1 chapters; no claims" in text


def test_store_leaves_a_failing_chapter_as_it_was(stored):
    folder, _, text, _, (before, after), _ = stored
    assert before == after
    assert sorted(os.listdir(folder)) == ["01_good.ipynb", "02_bad.ipynb"]
    kept = folder.parent / "build" / "store" / "02_bad.failed.ipynb"
    assert f"partial notebook: {kept}" in text
    assert kept.is_file()


SLEEPER = """\
import os, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path("pids-{name}").write_text(f"{{os.getpid()}} {{os.getppid()}} {{child.pid}}")
time.sleep(60)"""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Runs of sleeping chapters, ended by each signal: {signal: (exit code, seconds, errors, folder, processes)}."""
    signals = {signal.SIGINT: 2, signal.SIGTERM: 1, signal.SIGKILL: 1}
    runs = {}
    for signum, chapters in signals.items():
        folder = tmp_path_factory.mktemp(signum.name)
        for number in range(1, chapters + 1):
            source = SLEEPER.format(name=number)
            write_notebook(folder / "notebooks" / f"0{number}_sleeps.ipynb", source)
        scratch = folder / "tmp"
        scratch.mkdir()
        argv = [sys.executable, "-m", "course_lib", "run", "--notebooks", folder / "notebooks", "--jobs", "2"]
        env = os.environ | {"TMPDIR": str(scratch)}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        runs[signum] = folder, chapters, subprocess.Popen(argv, env=env, **pipes)
    found = {}
    for signum, (folder, chapters, process) in runs.items():
        deadline = time.monotonic() + 60
        while len(pids := [f.read_text() for f in folder.glob("notebooks/pids-*")]) < chapters or not all(pids):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        family = [psutil.Process(int(pid)) for text in pids for pid in text.split()]
        sent = time.monotonic()
        process.send_signal(signum)
        _, errors = process.communicate(timeout=30)
        found[signum] = process.returncode, time.monotonic() - sent, errors, folder, family
    return found


@pytest.mark.parametrize(("signum", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_at_once_with_nothing_left(interrupted, signum, expected):
    code, seconds, errors, folder, family = interrupted[signum]
    assert code == expected
    assert seconds < 3
    assert errors == f"interrupted by {signum.name}: everything was stopped; unfinished outputs were removed\n"
    assert not [process for process in family if alive(process)]
    assert not (folder / "build").exists()
    assert not os.listdir(folder / "tmp")


def test_kernels_end_even_when_the_run_is_killed(interrupted):
    _, _, _, folder, family = interrupted[signal.SIGKILL]
    deadline = time.monotonic() + 5
    while any(alive(process) for process in family) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [process for process in family if alive(process)]
    assert not list(folder.rglob("*partial*"))
    assert not os.listdir(folder / "tmp")


def alive(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
