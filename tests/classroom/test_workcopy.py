"""The working copy: brought up to date where the reader changed nothing, and never written over."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_lessons import course, write_notebook

from course_lib.classroom.lessons import notebooks_folder
from course_lib.classroom.workcopy import update_copy

ROOT = Path(__file__).parents[2]
FIRST, SECOND = "00_start_here.ipynb", "02_pruning/1_which_weights.ipynb"


@pytest.fixture
def folders(tmp_path):
    """A small course and the place for its copy."""
    for place in (FIRST, SECOND, "02_pruning/practice.ipynb", "solutions/02_pruning.ipynb"):
        write_notebook(tmp_path / "notebooks" / place, "1 + 1")
    write_notebook(tmp_path / "notebooks" / "02_pruning" / ".ipynb_checkpoints" / "1_which_weights-checkpoint.ipynb")
    return tmp_path / "notebooks", tmp_path / "work"


def fresh(folders, *words, answer=None, monkeypatch=None):
    if answer is not None:
        terminal = io.StringIO(answer)
        terminal.isatty = lambda: True
        monkeypatch.setattr(sys, "stdin", terminal)
    return course("fresh", "--notebooks", folders[0], "--work", folders[1], *words)


def notebooks_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.ipynb"))


def test_what_the_reader_left_alone_follows_the_course_and_what_they_changed_stays(folders):
    source, work = folders
    assert update_copy(source, work) == []
    assert notebooks_of(work) == [FIRST, SECOND, "02_pruning/practice.ipynb"]
    saved = json.loads((work / SECOND).read_text())
    (work / SECOND).write_text(json.dumps(saved | {"metadata": {"kernelspec": {"name": "python3"}}}))
    mine = (work / SECOND).read_bytes()
    assert update_copy(source, work) == [], "no newer version: nothing to tell"

    for place in (FIRST, SECOND):
        write_notebook(source / place, "2 + 2")
    (work / "02_pruning" / "practice.ipynb").unlink()
    (line,) = update_copy(source, work)
    assert str(work / SECOND) in line
    assert 'make fresh FILES="02_pruning/1_which_weights"' in line
    assert (work / SECOND).read_bytes() == mine
    assert (work / FIRST).read_bytes() == (source / FIRST).read_bytes()
    assert (work / "02_pruning" / "practice.ipynb").exists()


def test_where_nothing_is_remembered_everything_is_the_readers(folders):
    source, work = folders
    mine = write_notebook(work / SECOND, "mine").read_bytes()
    assert len(update_copy(source, work)) == 1
    (work / ".course" / "copied.json").write_text("torn {")
    assert len(update_copy(source, work)) == 1
    assert (work / SECOND).read_bytes() == mine
    write_notebook(work.with_name("elsewhere") / SECOND, "mine")
    (line,) = update_copy(source, work.with_name("elsewhere"))
    assert f"python -m course_lib fresh 02_pruning/1_which_weights --work {work.with_name('elsewhere')} f" in line


def test_fresh_asks_and_keeps_what_was_there(folders, monkeypatch):
    source, work = folders
    update_copy(source, work)
    write_notebook(work / SECOND, "mine")
    assert "left as it is" in fresh(folders, "02", answer="", monkeypatch=monkeypatch)[1], "Ctrl-D is no"
    for count in ("", "1"):
        write_notebook(work / SECOND, f"mine{count}")
        mine, theirs = (work / SECOND).read_bytes(), (source / SECOND).read_bytes()
        code, out, _ = fresh(folders, "02", answer="n\n", monkeypatch=monkeypatch)
        assert (code, (work / SECOND).read_bytes()) == (0, mine)
        assert "left as it is" in out
        assert fresh(folders, "02.1", answer="y\n", monkeypatch=monkeypatch)[0] == 0
        assert (work / SECOND).read_bytes() == theirs
        assert (work / f"02_pruning/1_which_weights-mine{count}.ipynb").read_bytes() == mine
    write_notebook(source / SECOND, "3 + 3")
    assert update_copy(source, work) == [], "what was brought back follows the course again"
    assert (work / SECOND).read_bytes() == (source / SECOND).read_bytes()


def test_fresh_without_a_terminal_needs_yes(folders, monkeypatch):
    source, work = folders
    update_copy(source, work)
    practice = work / "02_pruning" / "practice.ipynb"
    write_notebook(practice, "mine")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    code, _, err = fresh(folders, "02_pruning/practice")
    assert (code, "--yes" in err, "mine" in practice.read_text()) == (2, True, True)
    assert fresh(folders, practice, "--yes")[0] == 0
    assert practice.read_bytes() == (source / "02_pruning" / "practice.ipynb").read_bytes()


@pytest.mark.parametrize(("words", "says"), [((), "which notebook"), (("07",), "no lesson '07'")])
def test_fresh_says_what_it_does_not_know(folders, words, says):
    code, _, err = fresh(folders, *words)
    assert (code, says in err) == (2, True)


def test_links_of_the_copy_lead_to_notebooks_of_the_copy(tmp_path):
    update_copy(notebooks_folder(), tmp_path)
    places = notebooks_of(tmp_path)
    assert len(places) > 30
    assert (tmp_path / "docs" / "demo.html").exists()
    for place in places:
        cells = json.loads((tmp_path / place).read_text(encoding="utf-8"))["cells"]
        for cell in (cell for cell in cells if cell["cell_type"] == "markdown"):
            for link in re.findall(r"\]\((?!https?://|#|mailto:)([^)\s#]+)", "".join(cell["source"])):
                # JupyterLab has nothing above its own folder: what leads beyond ends there.
                step = Path(os.path.normpath(Path("/", place).parent / link)).relative_to("/")
                assert (tmp_path / step).exists(), (place, link)


def test_practice_in_the_copy_is_graded(tmp_path):
    place = Path("04_temperature", "practice.ipynb")
    (tmp_path / place.parent).mkdir()
    shutil.copy(notebooks_folder() / "solutions" / "04_temperature.ipynb", tmp_path / place)
    code, out, _ = course("practice", "grade", tmp_path / place)
    points = out.split(" points")[0].split(": ")[1].split(" of ")
    assert (code, points[0] == points[1], (tmp_path / place).with_name("grades.csv").exists()) == (0, True, True)


def test_lab_takes_jupyterlabs_flags_and_gives_it_this_python_and_our_settings(folders, monkeypatch):
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyterlab.labapp import LabApp
    from jupyterlab_server.settings_utils import _get_overrides

    (elsewhere := folders[1].with_name("elsewhere") / "kernels" / "python3").mkdir(parents=True)
    (elsewhere / "kernel.json").write_text('{"argv": ["/no/such/python"], "display_name": "x", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(elsewhere.parents[1]))
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "")
    seen = []
    monkeypatch.setattr(LabApp, "launch_instance", seen.extend)
    monkeypatch.setattr(os, "geteuid", lambda: 0, raising=False)
    flags = ["--no-browser", "--port", "9000"]
    assert course("lab", "--notebooks", folders[0], "--work", folders[1], *flags)[0] == 0
    assert seen[-3:] == flags
    assert "--allow-root" in seen
    assert f"--ServerApp.root_dir={folders[1].resolve()}" in seen
    assert KernelSpecManager().get_kernel_spec("python3").argv[0] == sys.executable
    settings = _get_overrides("")[0]
    assert settings["@jupyterlab/notebook-extension:tracker"]["codeCellConfig"]["lineWrap"] is True
    assert settings["@jupyterlab/apputils-extension:notification"]["fetchNews"] == "false"


def test_git_does_not_see_the_copy():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git clone")
    asked = subprocess.run(["git", "check-ignore", f"work/{FIRST}"], cwd=ROOT, capture_output=True, check=False)
    assert asked.returncode == 0
