"""The command line on small notebooks, executed for real."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from course_lib.classroom.cli import main

PARAMETERS = 'dataset: str = "digits"\nprofile: str = "quick"\nseed: int = 0\nshare: float = 0.5'
CLAIM = (
    "from course_lib.evidence.claims import Ledger\nledger = Ledger('01', dataset=dataset)\n"
    "ledger.claim('01.x', 'The share is a half.', holds=share == 0.5, measured=share)\nledger.close()"
)


def write(folder, name, *sources):
    folder.mkdir(exist_ok=True)
    cells = [new_markdown_cell("# A chapter"), new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
    notebook = new_notebook(cells=cells + [new_code_cell(source) for source in sources])
    notebook.metadata = {
        "course": {"chapter": name[:2], "title": f"Title {name[:2]}", "sections": ["1"], "minutes": 3, "seconds": 2},
        "kernelspec": {"name": "python3", "display_name": "Python 3"},
    }
    nbformat.write(notebook, folder / f"{name}.ipynb")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "notebooks"
    write(folder, "01_good", CLAIM)
    return folder


def run(folder, *arguments):
    return main(["run", *arguments, "--notebooks", str(folder), "--output", str(folder.parent / "out")])


def executed(folder, name="01_good"):
    return nbformat.read(folder.parent / "out" / f"{name}.ipynb", as_version=4)


def test_run_then_resume_then_claims(folder, capsys):
    out = folder.parent / "out"
    assert run(folder, "-p", "share=0.5") == 0
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == ["01_good.ipynb", "claims.json"]
    stored = json.loads((out / "claims.json").read_text())["claims"]
    assert [(c["id"], c["status"]) for c in stored] == [("01.x", "holds")]
    shown = capsys.readouterr().out
    assert "claims.json" in shown
    assert "1 claim: 1 holds, 0 fail" in shown

    before = (out / "01_good.ipynb").read_bytes()
    assert run(folder, "--resume", "-p", "share=0.5") == 0
    assert (out / "01_good.ipynb").read_bytes() == before
    assert run(folder, "--resume", "-p", "share=0.25") == 1
    assert not (out / "01_good.ipynb").exists()
    assert (out / "01_good.failed.ipynb").exists()
    capsys.readouterr()

    assert main(["claims", str(out), "--notebooks", str(folder)]) == 1
    assert "01.x" in capsys.readouterr().out


def test_a_failing_chapter_is_shown_and_the_others_still_run(folder, capsys):
    write(folder, "02_bad", "wrong = 1 / 0", "never = 1")
    write(folder, "03_good", "print(seed)")
    assert run(folder, "--jobs", "2", "--seed", "7") == 1
    captured = capsys.readouterr()
    text = captured.out + captured.err
    for part in ("02_bad", "ZeroDivisionError", "wrong = 1 / 0", "02_bad.failed.ipynb"):
        assert part in text
    assert executed(folder, "03_good").cells[-1].outputs[0].text == "7\n"
    assert not (folder.parent / "out" / "02_bad.ipynb").exists()
    assert (folder.parent / "out" / "02_bad.failed.ipynb").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["9"], "no chapter '9'"),
        (["--dataset", "minst"], "did you mean mnist"),
        (["--profile", "fast"], "quick"),
        (["--seed", "-1"], "seed"),
        (["--seed", "one"], "seed"),
        (["-p", "shar=0.5"], "did you mean share"),
        (["-p", "share=half"], "share"),
        (["-p", "share"], "NAME=VALUE"),
        (["--jobs", "0"], "jobs"),
    ],
)
def test_mistakes_are_named_before_a_kernel_starts(folder, arguments, text, capsys, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a process was started"))
    assert run(folder, *arguments) == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert "Traceback" not in captured.err
    assert not (folder.parent / "out").exists()


def test_store_keeps_notebooks_clean(folder, capsys):
    assert main(["run", "--store", "--notebooks", str(folder)]) == 0
    text = (folder / "01_good.ipynb").read_text()
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert "papermill" not in text
    assert "injected" not in text
    assert [c.execution_count for c in notebook.cells if c.cell_type == "code"] == [1, 2]
    assert notebook.metadata["course"]["title"] == "Title 01"
    write(folder, "02_bad", "1 / 0")
    before = (folder / "02_bad.ipynb").read_bytes()
    assert main(["run", "02", "--store", "--notebooks", str(folder)]) == 1
    assert (folder / "02_bad.ipynb").read_bytes() == before


def test_kernel_death_is_reported(folder, capsys):
    write(folder, "02_dies", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert run(folder, "02") == 1
    assert "02_dies" in "".join(capsys.readouterr())
    assert not (folder.parent / "out" / "02_dies.ipynb").exists()


def test_ctrl_c_ends_everything_at_once(folder):
    write(folder, "02_sleeps", "import pathlib, time\npathlib.Path('started').touch()\ntime.sleep(60)")
    command = [sys.executable, "-m", "course_lib", "run", "02", "--notebooks", str(folder)]
    command += ["--output", str(folder.parent / "out")]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.time() + 60
    while not (folder / "started").exists() and time.time() < deadline:
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    asked = time.time()
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert time.time() - asked < 6
    assert b"Traceback" not in output + errors
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
    left = [p for p in (folder.parent / "out").rglob("*") if p.suffix == ".ipynb"]
    assert left == []


def test_list_and_claims_of_nothing(folder, tmp_path, capsys):
    assert main(["list", "--notebooks", str(folder)]) == 0
    assert "Title 01" in capsys.readouterr().out
    assert main(["claims", str(tmp_path / "none")]) == 2
    assert main(["list", "--notebooks", str(tmp_path / "none")]) == 2
    assert main([]) == 0
    assert "COMMAND" in capsys.readouterr().out


def test_doctor_finds_a_wrong_version(monkeypatch, capsys):
    assert main(["doctor", "--fast"]) == 0
    assert "torch 2.15.0" in capsys.readouterr().out
    from importlib import metadata

    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.0.1" if name == "torchvision" else real(name))
    code = main(["doctor", "--fast"])
    shown = capsys.readouterr().out
    assert code == 1
    assert "torchvision" in shown
    assert "make setup" in shown


def test_the_module_is_the_command_line():
    command = [sys.executable, "-m", "course_lib", "list", "--notebooks", str(Path(__file__).parents[2] / "notebooks")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "01_concepts" in shown
