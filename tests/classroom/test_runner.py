"""Running lessons for real: results in place, failures shown, data checked, interruption at once, storing."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import nbformat
import psutil
import pytest
import torch
from small_lessons import MIME, claim, course, outputs_of, show_claims_source, write_notebook

from course_lib.classroom import reports, runner
from course_lib.classroom.lessons import find_lessons
from course_lib.evidence import claims
from course_lib.lab.data import Split

GOOD = """\
import json, os, sys, tempfile
json.dumps({"python": sys.executable, "cwd": os.getcwd(), "threads": os.environ["OMP_NUM_THREADS"],
            "unattended": os.environ["COURSE_UNATTENDED"], "seed": seed, "profile": profile, "widths": widths})"""
BAD = "numbers = [1, 2]\nprint('so far')\nnumbers[7]"
ODD = [{"cell_type": "code", "source": ["print('é', 1 + 1)"], "metadata": {"tags": None}}, {"cell_type": "markdown"}]
GIVEN = ("--seed", 7, "--profile", "quick")


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    """A folder of lessons, in a place whose name papermill would take for a format string."""
    folder = tmp_path_factory.mktemp("clone {0}") / "notebooks"
    made = [claim(measured="first"), claim("01.two", "not here", note="needs VNNI"), claim()]
    write_notebook(folder / "01_good.ipynb", GOOD, show_claims_source(*made))
    write_notebook(folder / "02_bad" / "1_index.ipynb", BAD, "print('never')")
    write_notebook(folder / "02_bad" / "2_leaves.ipynb", "import sys; sys.exit()", "print('never')", parameters=None)
    write_notebook(folder / "02_bad" / "3_dies.ipynb", "import os\nos.kill(os.getpid(), 9)")
    write_notebook(folder / "02_bad" / "practice.ipynb", "1 / 0")
    write_notebook(folder / "03_false.ipynb", show_claims_source(claim("03.no", "fails", measured="-3 ± 1")))
    (folder / "04_odd.ipynb").write_text(json.dumps({"cells": ODD, "nbformat": 4}), encoding="utf-8-sig")
    return folder


@pytest.fixture(scope="module")
def run(notebooks, tmp_path_factory):
    """All these lessons, two at once, where the system leads to another python3: (code, text, errors, folder)."""
    spec = tmp_path_factory.mktemp("jupyter") / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text('{"argv": ["/no/such/python"], "language": "python", "display_name": "x"}')
    folder = notebooks.parent / "build" / "course" / "digits-quick"
    write_notebook(folder / "01_good-failed.ipynb", "1")
    write_notebook(folder / "02_bad" / "1_index.ipynb", "'of an earlier run'")
    temporary = tmp_path_factory.mktemp("a place")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("JUPYTER_PATH", spec.parents[2]), ("TMPDIR", temporary), ("LC_ALL", "C")):
            patch.setenv(name, str(value))
        patch.setattr("tempfile.tempdir", None)
        patch.setattr(runner, "source_hash", lambda *sources: "one library")
        patch.delenv("OMP_NUM_THREADS", raising=False)
        patch.delenv("MKL_NUM_THREADS", raising=False)
        told = course("run", "--notebooks", notebooks, *GIVEN, "--jobs", 2)
    assert not os.listdir(temporary)
    return *told, folder


def test_a_run_leaves_what_ended_well_and_what_failed_under_another_name(run):
    code, text, errors, folder = run
    assert (code, errors) == (1, "")
    left = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    failed = {f"02_bad/{name}-failed.ipynb" for name in ("1_index", "2_leaves", "3_dies")}
    assert left == {"01_good.ipynb", "02_bad/1_index.ipynb", *failed, "03_false.ipynb", "04_odd.ipynb"}
    assert "of an earlier run" in (folder / "02_bad" / "1_index.ipynb").read_text()
    assert "\n3 of 6 lessons executed, in " in text
    assert "; 3 claims: 1 hold, 1 fail, 1 do not hold here\n" in text
    assert text.endswith("failed: 02.1, 02.2, 02.3\n")
    for path in left:
        nbformat.validate(nbformat.read(folder / path, as_version=4))


def test_a_lesson_gets_its_parameters_this_interpreter_and_its_share_of_the_cores(run, notebooks):
    told = outputs_of(run[3] / "01_good.ipynb")[2][0]["data"]["text/plain"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    expected = {"python": sys.executable, "cwd": str(notebooks), "threads": str(max(1, cores // 2)), "unattended": "1"}
    assert json.loads("".join(told).strip("'")) == expected | {"seed": 7, "profile": "quick", "widths": [8]}
    assert outputs_of(run[3] / "04_odd.ipynb")[0][0]["text"] == ["é 2\n"]


def test_a_failure_shows_the_end_of_its_traceback_once(run):
    _, text, _, folder = run
    told = text[text.index("FAILED 02.1 02_bad/1_index after ") :]
    assert "s, in cell 3, In [3]\n  | ---" in told
    assert "----> 3 numbers[7]" in told
    assert text.count("IndexError: list index out of range") == 1
    assert "\x1b" not in text
    kept = folder / "02_bad" / "1_index-failed.ipynb"
    assert f"  kept as {kept}\n" in told
    stream, error = next(outputs for outputs in outputs_of(kept) if len(outputs) == 2)
    assert (stream["text"], error["ename"]) == (["so far\n"], "IndexError")


def test_leaving_early_and_a_dead_kernel_are_failures(run):
    assert "it ended before its last cell, here:\n  | import sys; sys.exit()" in run[1]
    assert "in cell 3: the kernel died" in run[1]


def test_a_false_claim_is_told_by_its_sentence_and_measurement(run):
    assert "FALSE 03.no: Sentence of 03.no.\n      measured: -3 ± 1\n" in run[1]
    code, text, _ = course("claims", run[3] / "01_good.ipynb")
    assert (code, "first" in text, "97.8 ± 0.4 (needs VNNI) [digits, quick]" in text) == (0, False, True)
    code, text, _ = course("claims", run[3])
    assert (code, "1_index-failed.ipynb did not run to its end" in text) == (1, True)


@pytest.fixture
def todo(monkeypatch):
    """Numbers of the lessons that a run would execute; it executes none."""
    found = []
    monkeypatch.setattr(runner._Run, "execute", lambda self, lessons: found.extend(one.number for one in lessons) or 0)
    monkeypatch.setattr(runner, "claims_of", lambda paths: [])
    return found


def test_resume_skips_what_is_as_it_was_made(run, notebooks, todo, monkeypatch):
    def executed(*given, library="one library"):
        monkeypatch.setattr(runner, "source_hash", lambda *sources: library)
        todo.clear()
        told = course("run", "1", "03", "--notebooks", notebooks, "--resume", *given)[1]
        assert ("01 01_good: executed before from these bytes and values, skipped" in told) == ("01" not in todo)
        return todo

    assert executed(*GIVEN) == executed("--seed", 7) == []
    assert executed("--seed", 8, "--output", run[3]) == ["01", "03"]
    assert executed(*GIVEN, library="another library") == ["01", "03"]
    path = run[3] / "01_good.ipynb"
    path.write_text(path.read_text().replace("97.8", "99.9"))
    assert executed(*GIVEN) == ["01"]
    path.write_text(path.read_text().replace("99.9", "97.8"))


def data_set(images, classes=10):
    labels = (torch.arange(images) % classes).split([images - 20, 20])
    train, val = (Split(torch.zeros(len(part), 1, 8, 8), part) for part in labels)
    return SimpleNamespace(train=train, val=val, test=val, num_classes=10, class_names="0123456789")


def test_other_data_and_another_extra_make_another_result(tmp_path, monkeypatch):
    write_notebook(tmp_path / "n" / "01_a.ipynb", extras=["json", "no_such_module"])
    (lesson,) = (found.read() for found in find_lessons(tmp_path / "n"))

    def key(images):
        monkeypatch.setattr("course_lib.lab.data.load_dataset", lambda name: data_set(images))
        data = {"mnist": runner.check_data("mnist")}
        return runner._Run({"01": {"dataset": "mnist"}}, data, tmp_path, 1, 1, False)._key(lesson)

    keys = [key(1000), key(1000)]
    monkeypatch.setattr(runner, "find_spec", lambda name: name)
    keys += [key(1000), key(1010)]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_a_torn_result_is_not_kept(tmp_path, monkeypatch):
    def no_space(self, lesson, label, scratch):
        scratch.mkdir()
        (scratch / "executed.ipynb").write_text('{"cells": [')
        return "OSError: no space left on device"

    monkeypatch.setattr(runner._Run, "_process", no_space)
    write_notebook(tmp_path / "n" / "01_a.ipynb")
    code, text, _ = course("run", "--notebooks", tmp_path / "n", "--output", tmp_path / "out")
    assert (code, "no space left" in text, (tmp_path / "out").exists()) == (1, True, False)


def test_a_data_set_that_a_lesson_names_wrongly_is_one_sentence(tmp_path):
    write_notebook(tmp_path / "n" / "01_a.ipynb", parameters='dataset: str = "MNIST"')
    code, _, errors = course("run", "--notebooks", tmp_path / "n")
    assert (code, "unknown data set 'MNIST'" in errors, errors.count("\n")) == (2, True, 1)


def test_a_lesson_edited_during_a_run_is_executed_as_it_was_checked(tmp_path, todo, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(runner, "source_hash", lambda *sources: "one library")
    second = write_notebook(tmp_path / "n" / "02_b.ipynb", "print('original')", parameters=None)
    text = second.read_text()
    # the first lesson plays the person at the keyboard
    source = f"open({str(second)!r}, 'w').write({text.replace('original', 'edited')!r})"
    write_notebook(tmp_path / "n" / "01_a.ipynb", source)
    arguments = ("run", "--notebooks", tmp_path / "n", "--output", tmp_path / "out")
    assert course(*arguments)[0] == 0
    assert outputs_of(tmp_path / "out" / "02_b.ipynb")[0][0]["text"] == ["original\n"]
    monkeypatch.setattr(runner._Run, "execute", lambda self, lessons: todo.extend(one.number for one in lessons) or 0)
    course(*arguments, "02", "--resume")
    assert todo == ["02"]
    second.write_text(text)
    course(*arguments, "02", "--resume")
    assert todo == ["02"]


MISTAKES = [
    (["9"], "no lesson '9'"),
    (["--dataset", "minst"], "did you mean mnist"),
    (["--profile", "fast"], "profile must be one of quick, full, got 'fast'"),
    (["--seed", "-1"], "seed must be an integer from 0"),
    (["--jobs", "0"], "--jobs must be at least 1"),
    (["--store", "--seed", "1"], "--store executes lessons with their own parameters"),
    (["--output", "NOTEBOOKS"], "--output must not be the folder of the lessons"),
    (["--dataset", "mnist"], "mnist"),
]


@pytest.mark.parametrize(("arguments", "text"), MISTAKES)
def test_mistakes_are_one_sentence_before_a_kernel_starts(notebooks, arguments, text, monkeypatch, tmp_path):
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a process was started"))
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    monkeypatch.setenv("COURSE_MIRROR", (tmp_path / "none").as_uri())
    before = sorted(notebooks.parent.rglob("*"))
    arguments = [str(notebooks) if word == "NOTEBOOKS" else word for word in arguments]
    code, _, errors = course("run", "01", *arguments, "--notebooks", notebooks)
    assert code == 2
    assert errors.startswith("error: ")
    assert text.lower() in errors.lower()
    assert errors.count("\n") == 1
    assert sorted(notebooks.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("images", "classes", "code", "text"),
    [
        (1000, 10, 0, ""),
        (999, 10, 0, "warning: mnist has 999 training images, and lessons are made for 1,000: many claims"),
        (200, 10, 0, "warning: "),
        (199, 10, 2, "error: mnist has 199 training images; at least 200 are needed"),
        (1000, 9, 2, "error: mnist has no training image of class 9"),
    ],
)
def test_a_small_data_set_is_told_or_refused_before_anything_runs(
    images, classes, code, text, todo, notebooks, monkeypatch
):
    monkeypatch.setattr("course_lib.lab.data.load_dataset", lambda name: data_set(images, classes))
    told = course("run", "01", "--notebooks", notebooks, "--dataset", "mnist")
    assert (told[0], todo) == (code, [] if code else ["01"])
    said = "".join(told[1:]).splitlines()
    assert len(said) == 1 + (code == 0 and bool(text))
    assert said[0].startswith(text)


NOISY = """\
import sys, warnings
from IPython.display import Image, display
warnings.warn('mind this')
print('kept')
display({'image/png': 'iVBORw0KGgo='}, raw=True)
seed"""


def test_store_puts_clean_outputs_into_the_lessons(tmp_path):
    folder = tmp_path / "notebooks"
    good = write_notebook(folder / "01_a" / "1_good.ipynb", NOISY, title="Kept")
    held = write_notebook(folder / "01_a" / "2_false.ipynb", show_claims_source(claim(status="fails")))
    edited = write_notebook(folder / "01_a" / "3_edits.ipynb", "open('3_edits.ipynb', 'a').write(' ')")
    before = held.read_bytes(), edited.read_bytes()
    code, text, _ = course("run", "--notebooks", folder, "--store")
    assert code == 1
    assert (held.read_bytes(), edited.read_bytes()) == (before[0], before[1] + b" ")
    assert "a claim is false:\n  Sentence of 01.one. measured: 97.8 ± 0.4" in text
    assert "its file was changed while it ran, and was left as it is" in text
    assert (tmp_path / "build" / "store" / "01_a" / "2_false-failed.ipynb").is_file()
    first = good.read_bytes()
    notebook = json.loads(first)
    nbformat.validate(nbformat.from_dict(notebook))
    assert set(notebook["metadata"]) == {"course", "kernelspec", "language_info"}
    assert [cell["metadata"] for cell in notebook["cells"]] == [{}, {"tags": ["parameters"]}, {}]
    assert [cell["execution_count"] for cell in notebook["cells"][1:]] == [1, 2]
    stream, picture, result = notebook["cells"][2]["outputs"]
    assert (stream["text"], picture["data"]) == (["kept\n"], {"image/png": "iVBORw0KGgo="})
    assert (result["data"]["text/plain"], result["execution_count"]) == (["0"], 2)
    assert "  cell 3 wrote to stderr, which is not stored: " in text
    assert course("run", "01.1", "--notebooks", folder, "--store")[0] == 0
    assert good.read_bytes() == first


def test_the_line_that_jupyterlab_shows_of_a_folded_answer_does_not_give_it_away(tmp_path):
    path = write_notebook(tmp_path / "notebooks" / "01_a.ipynb", "print('the answer is 8 %')")
    notebook = json.loads(path.read_text())
    notebook["cells"][2]["metadata"]["jupyter"] = {"outputs_hidden": True}
    notebook["cells"][1]["metadata"]["jupyter"] = None
    notebook["cells"][0]["metadata"]["jupyter"] = {"outputs_hidden": True}  # of prose, which has none
    path.write_text(json.dumps(notebook))
    for _ in range(2):  # stored once more, nothing piles up
        assert course("run", "--notebooks", path.parent, "--store")[0] == 0
        curtain, answer = json.loads(path.read_text())["cells"][2]["outputs"]
        assert curtain["data"]["text/html"] == ["<!-- the answer: open it -->"]
        assert answer["text"] == ["the answer is 8 %\n"]


def test_store_keeps_what_only_an_extra_can_make_anew(tmp_path):
    folder = tmp_path / "notebooks"
    kept = write_notebook(folder / "01_a" / "1_extra.ipynb", "1 + 1", extras=["json", "no_such_module"])
    stored = write_notebook(folder / "01_a" / "2_extra.ipynb", "1 + 1", extras=["json"])
    before = kept.read_bytes()
    code, text, _ = course("run", "--notebooks", folder, "--store")
    assert (code, kept.read_bytes() == before, outputs_of(stored)[1] != []) == (0, True, True)
    assert text.count("left as it is: its stored outputs need no_such_module") == 1


def test_a_cell_has_a_time_limit(tmp_path):
    write_notebook(tmp_path / "n" / "01_sleeps.ipynb", "import time; time.sleep(100)", parameters=None)
    code, text, _ = course("run", "--notebooks", tmp_path / "n", "--output", tmp_path / "out", "--timeout", 1)
    assert code == 1
    assert "in cell 2: it took longer than 1 s (--timeout)" in text


SLEEPER = """\
import os, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
pathlib.Path("pids").write_text(f"{os.getpid()} {os.getppid()} {child.pid}")
time.sleep(100)"""


@pytest.mark.skipif(os.name == "nt", reason="signals as POSIX has them")
def test_signals_end_a_run_with_no_process_and_no_result_left(tmp_path):
    runs = {}
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        folder = tmp_path / signum.name
        write_notebook(folder / "notebooks" / "01_sleeps.ipynb", SLEEPER, parameters=None)
        (folder / "a place").mkdir()
        argv = ["sh", "-c", "trap '' INT; exec \"$@\"", "-", sys.executable, "-m", "course_lib", "run", "--notebooks"]
        env, pipes = os.environ | {"TMPDIR": str(folder / "a place")}, {"stdout": subprocess.DEVNULL, "text": True}
        process = subprocess.Popen([*argv, folder / "notebooks"], env=env, stderr=subprocess.PIPE, **pipes)
        runs[signum] = folder, process
    for signum, (folder, process) in runs.items():
        deadline = time.monotonic() + 120
        while not ((pids := folder / "notebooks" / "pids").is_file() and pids.read_text()):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        family = [psutil.Process(int(pid)) for pid in pids.read_text().split()]
        process.send_signal(signum)
        _, errors = process.communicate(timeout=30)
        expected = {signal.SIGKILL: -9}.get(signum, 128 + signum)
        assert process.returncode == expected
        if signum != signal.SIGKILL:
            assert errors == f"interrupted by {signum.name}: everything was stopped\n"
        deadline = time.monotonic() + 20
        while any(map(alive, family)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(alive, family))
        assert not (folder / "build").exists()
        while os.listdir(folder / "a place") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not os.listdir(folder / "a place")


def alive(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_mime_type_is_the_ledgers():
    assert reports.MIME == claims.MIME == MIME


@pytest.mark.skipif(os.name == "nt", reason="a terminal as POSIX has it")
def test_in_a_terminal_bars_count_the_cells(tmp_path):
    import pty

    write_notebook(tmp_path / "01_slow.ipynb", "import time; time.sleep(1)", "1 + 1")
    parent, child = pty.openpty()
    env = {n: v for n, v in os.environ.items() if n != "CI"} | {"TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-m", "course_lib", "run", "--notebooks", tmp_path, "--output", tmp_path / "out"]
    with subprocess.Popen(command, env=env, stdout=child, stderr=child):
        os.close(child)
        shown = b""
        try:
            while more := os.read(parent, 4096):
                shown += more
        except OSError:  # what Linux says when the other side has closed
            pass
    os.close(parent)
    assert b"2/4" in shown or b"3/4" in shown
    assert "done in" in shown.decode()
    assert "4 cells" not in shown.decode()


@pytest.mark.parametrize(("deaths", "told"), [(2, ""), (3, "died before replying")])
def test_a_kernel_that_lost_its_port_is_started_again(tmp_path, monkeypatch, deaths, told):
    import papermill

    tries = []

    def execute(source, executed, **options):
        tries.append(source)
        if len(tries) <= deaths:
            raise RuntimeError("Kernel died before replying to kernel_info")
        return SimpleNamespace(cells=[])

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    job = {"scratch": str(tmp_path), "cwd": str(tmp_path), "parameters": {}, "timeout": 0}
    if told:
        with pytest.raises(RuntimeError, match=told):
            runner._papermill(lambda **event: None, **job)
    else:
        assert runner._papermill(lambda **event: None, **job) == ""
    assert len(tries) == 3
