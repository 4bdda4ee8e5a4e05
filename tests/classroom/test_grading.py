"""Grading a class: our checks, hostile notebooks, and going on where it stopped."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import nbformat
import psutil
import pytest
from small_lessons import course

from course_lib.classroom import grading
from course_lib.classroom.grading import grade
from course_lib.classroom.lessons import CourseError, notebooks_folder

SOLUTION = notebooks_folder() / "solutions" / "01_concepts.ipynb"
TASKS = ("count_macs_linear", "paired_interval", "seeds_needed", "break_even_rank")
EDITS = {
    "endless_answer": "def count_macs_linear(widths):\n    while True:\n        pass",
    "endless_cell": "while True:\n    pass",
    "leaves": "import sys\nsys.exit(0)",
    "leaves_hard": "def count_macs_linear(widths):\n    import os\n    os._exit(0)",
    "no_python": "def count_macs_linear(widths) return 1",
    "hungry": "def count_macs_linear(widths):\n    return len('a' * 20 * 2**30)",
    "magic": "%time\n!ls\nlen?\ndef count_macs_linear(widths):\n"
    "    return (sum(a * b for a, b in zip(widths, widths[1:]))\n        % 10**12)",
    "imports": "import torch._dynamo\ntorch.set_default_dtype(torch.float64)\n"
    "def count_macs_linear(widths):\n    return sum(a * b for a, b in zip(widths, widths[1:]))",
    "helper": "def count_macs_linear(widths):\n    return dot(widths)",
    "meddles": "from course_lib.classroom import answers\nanswers._difference = lambda *given: ''\n"
    "def count_macs_linear(widths):\n    return 0",
    "noisy": "print('a' * 10**6)\ndef count_macs_linear(widths):\n    raise ValueError('=1+1')",
}


def notebook(name=None):
    made = nbformat.read(SOLUTION, as_version=4)
    for cell in made.cells:
        if cell.id == "count_macs_linear" and name in EDITS:
            cell.source = EDITS[name]
    if name == "helper":
        cells = [
            "import no_such_package\nimport time\ntime.sleep(99)",
            "from __future__ import annotations\nUNIT: int = 1\nNOTHING = 10 ** -9 - 1e-9",
            "def dot(w: no_such_name):\n    return sum(a * b * UNIT for a, b in zip(w, w[1:])) + NOTHING",
        ]
        made.cells[1:1] = [nbformat.v4.new_code_cell(source) for source in cells]
    return made


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """A folder of all kinds of submissions, graded once: (folder, rows by file)."""
    folder = tmp_path_factory.mktemp("submissions")
    for name in (*EDITS, "anna"):
        (folder / name).mkdir()
        nbformat.write(notebook(name), folder / name / "practice.ipynb")
    cheat = notebook("no_python")  # checks that say yes, and cells that are not there
    cheat.cells = [cell for cell in cheat.cells if cell.id not in ("paired_interval", "paired_interval-check")]
    for cell in cheat.cells:
        if cell.id.endswith("-check"):
            cell.source = "print('✓')"
    nbformat.write(cheat, folder / "bert.ipynb")
    (folder / "other").mkdir()
    nbformat.write(notebook(), folder / "other" / "bert.ipynb")
    large = notebook()
    large.cells[1].outputs = [nbformat.v4.new_output("stream", text="x" * 50_000_000)]
    nbformat.write(large, folder / "large.ipynb")
    for name, text in {"torn": '{"cells": [', "deep": "[" * 100_000, "list": "[]", "empty": ""}.items():
        (folder / f"{name}.ipynb").write_text(text)
    (folder / "strange.ipynb").write_text(json.dumps({"nbformat": 4, "cells": [{"cell_type": "code", "source": "1"}]}))
    (folder / ".ipynb_checkpoints").mkdir()
    nbformat.write(notebook(), folder / ".ipynb_checkpoints" / "anna-checkpoint.ipynb")
    found = {}
    with grade(folder, jobs=2, seconds=4, memory=3).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["file"], []).append(row)
    return folder, found


def points(rows):
    return {row["task"]: (int(row["points"]), row["hint"]) for row in rows}


def test_a_right_notebook_gets_all_points_and_no_hint(graded):
    found = graded[1]
    folders = [f"{name}/practice.ipynb" for name in ("anna", "magic", "helper", "imports")]
    for file in ("large.ipynb", "other/bert.ipynb", *folders):
        told = [(row["task"], row["points"], row["of"], row["hint"]) for row in found[file]]
        assert told == [(task, n, n, "") for task, n in zip(TASKS, "1231", strict=True)], file
    assert not any("checkpoint" in file for file in found)
    names = [found[file][0]["name"] for file in ("anna/practice.ipynb", "bert.ipynb", "other/bert.ipynb")]
    assert names == ["anna", "bert", "bert"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("endless_answer", "longer than 4 seconds"),
        ("endless_cell", "longer than 4 seconds"),
        ("leaves", "SystemExit"),
        ("leaves_hard", "ended the process"),
        ("no_python", "SyntaxError"),
        ("hungry", "MemoryError"),
        ("noisy", "raised ValueError: =1+1"),
    ],
)
def test_one_bad_answer_costs_its_own_points_alone(graded, name, hint):
    got = points(graded[1][f"{name}/practice.ipynb"])
    assert hint in got["count_macs_linear"][1]
    assert [got[task][0] for task in TASKS] == [0, 2, 3, 1]


def test_our_checks_count_and_nobody_elses(graded):
    got = points(graded[1]["bert.ipynb"])
    assert [got[task][0] for task in TASKS] == [0, 0, 3, 1]
    assert got["paired_interval"][1] == "no function paired_interval in this notebook"
    got = points(graded[1]["meddles/practice.ipynb"])
    assert {hint for _, hint in got.values()} == {"the notebook changed the checker, or the libraries it stands on"}


@pytest.mark.parametrize("name", ["torn", "deep", "list", "empty", "strange"])
def test_what_is_no_submission_has_one_row_that_says_so(graded, name):
    (row,) = graded[1][f"{name}.ipynb"]
    assert (row["task"], row["points"]) == ("", "0")
    assert row["hint"]
    assert str(graded[0]) not in row["hint"]


def test_it_goes_on_where_it_stopped(tmp_path):
    for name in ("a", "b"):
        nbformat.write(notebook(), tmp_path / f"{name}.ipynb")
    path = grade(tmp_path, jobs=1)
    first = path.read_text()
    path.write_text("".join(line for line in first.splitlines(True) if not line.startswith("b.ipynb")))
    nbformat.write(notebook("no_python"), tmp_path / "c.ipynb")
    code, said, _ = course("practice", "grade", tmp_path, "--jobs", "1")
    assert (code, "a.ipynb" in said, "b.ipynb: 7 of 7 points in 01_concepts" in said) == (0, False, True)
    assert "c.ipynb: 6 of 7 points" in said
    assert path.read_text().startswith(first)
    nbformat.write(notebook("no_python"), tmp_path / "a.ipynb")
    assert "a.ipynb: 6 of 7 points" in course("practice", "grade", tmp_path, "--chapter", "01")[1]


def test_what_ends_every_run_ends_the_grading(tmp_path, monkeypatch):
    monkeypatch.setattr(grading, "_child", None)
    nbformat.write(notebook(), tmp_path / "a.ipynb")
    rows = csv.DictReader(grade(tmp_path, jobs=1, chapter="01").read_text().splitlines())
    assert all((row["points"], "it ended the process" in row["hint"]) == ("0", True) for row in rows)


def test_what_cannot_be_graded_is_said(tmp_path):
    with pytest.raises(CourseError, match="no notebook in"):
        grade(tmp_path)
    nbformat.write(notebook(), tmp_path / "a.ipynb")
    with pytest.raises(CourseError, match=r"no chapter '09'.* there are 01_concepts, 02_pruning"):
        grade(tmp_path, chapter="09")
    with pytest.raises(CourseError, match="no solutions in "):
        grade(tmp_path, notebooks=tmp_path)
    for given in ({"seconds": 0}, {"seconds": float("nan")}, {"memory": float("inf")}, {"memory": -1}, {"jobs": -1}):
        with pytest.raises(CourseError, match=f"above 0 and at most a million, got {next(iter(given.values()))}"):
            grade(tmp_path, **given)
    (tmp_path / "roster.csv").write_text("name,mail\n")
    with pytest.raises(CourseError, match=r"roster\.csv is no table of grades"):
        grade(tmp_path, output=tmp_path / "roster.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ipynb", "roster.csv"]
    assert "Runs the code of every notebook" in course("practice", "grade", "--help")[1]
    assert course("practice", "grade")[0] == 2


@pytest.fixture
def ran(monkeypatch):
    """The submissions' names, in the order in which they were run, if nothing but their hint decides the points."""
    names = []

    def run(seconds, memory, stopped, cells, tasks, said):
        names.append(cells[0][1])
        said |= dict.fromkeys(tasks, "" if seconds > 1 else "it took longer than 1 seconds")
        return True

    monkeypatch.setattr(grading, "_run", run)
    return names


def submission(path, hint=""):
    made = notebook()
    made.cells.insert(0, nbformat.v4.new_code_cell(path.stem.encode(errors="replace").decode()))
    nbformat.write(made, path)
    return path


def test_what_is_known_stays_unless_it_may_be_otherwise_now(tmp_path, ran):
    a, _, c = (submission(tmp_path / f"{name}.ipynb") for name in "abc")
    path = grade(tmp_path, jobs=1)
    by_hand = path.read_text().replace("b.ipynb,b,paired_interval,2", "b.ipynb,b,paired_interval,1").replace(",", ";")
    path.write_text(by_hand, encoding="utf-8-sig")
    c.unlink()
    grade(a, jobs=1)
    grade(tmp_path, jobs=1)
    assert path.read_text() == by_hand.replace(";", ",")
    assert ran == ["a", "b", "c"]
    grade(a, chapter="02")
    grade(a)
    assert ran[3:] == ["a", "a"], "those zeros were another chapter's"
    submission(tmp_path / "d.ipynb")
    for seconds in (1, 30, 30):
        grade(tmp_path, jobs=1, seconds=seconds)
    assert ran[5:] == ["d", "d"], "the limit was a smaller one"


def test_names_and_hints_may_hold_anything(tmp_path, ran, monkeypatch):
    try:
        submission(tmp_path / "=\udcff.ipynb")
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system takes no such name")
    monkeypatch.setattr(grading, "_run", lambda *given: given[-1].update(dict.fromkeys(TASKS, "\ud800 ü")))
    for _ in range(2):
        rows = list(csv.DictReader(grade(tmp_path).read_text("utf-8").splitlines()))
        assert [row["file"] for row in rows] == ["'=\\udcff.ipynb"] * 4
        assert {row["hint"] for row in rows} == {"\\ud800 ü"}
    assert grading._name("monday/20231234.ipynb") == "20231234"
    assert grading._name("anna/02_pruning.ipynb") == "anna"


@pytest.mark.skipif(os.name == "nt", reason="signals as POSIX has them")
def test_who_stops_the_grading_leaves_no_process(tmp_path):
    command = [sys.executable, "-m", "course_lib", "practice", "grade", "--jobs", "1", "--seconds", "1000"]
    handlers, runs = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}, {}
    for number, handler in handlers.items():
        (folder := tmp_path / number.name).mkdir()
        made = notebook("endless_cell")
        busy = f"import os\nopen({str(folder / 'pid')!r}, 'w').write(str(os.getpid()))\nwhile True:\n    pass"
        next(cell for cell in made.cells if cell.id == "count_macs_linear").source = busy
        for name in "abc":
            nbformat.write(made, folder / f"{name}.ipynb")
        start = partial(signal.signal, number, handler)  # whoever started the tests may ignore Ctrl-C
        runs[number] = folder, subprocess.Popen([*command, folder], stderr=subprocess.PIPE, preexec_fn=start)
    for number, (folder, process) in runs.items():
        deadline = time.monotonic() + 100
        while not ((file := folder / "pid").exists() and file.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        child = psutil.Process(int(file.read_text()))
        process.send_signal(number)
        process.communicate(timeout=20)
        assert process.returncode == (130 if number == signal.SIGINT else -number)
        assert (folder / "grades.csv").exists() == (number == signal.SIGINT)
        psutil.wait_procs([child], timeout=10)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
