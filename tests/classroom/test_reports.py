"""What executed lessons claim: printed, lifted into README.md, compared over seeds; and the small commands."""

import base64
import html
import io
import json
import os
import subprocess
import sys
import time
from functools import partial
from importlib import metadata

import pytest
from small_lessons import claim, course, write_executed, write_notebook

from course_lib.classroom import cli, doctor
from course_lib.classroom.reports import END, START, claims_of, refresh_readme

PNG, ALT = b"\x89PNG\r\n\x1a\n and so on", 'Dots on a plane, "quoted".'
DATA = base64.b64encode(PNG).decode()
HTML = {"text/html": f'<img alt="{html.escape(ALT)}" style="a" src="data:image/png;base64,{DATA}">'}
SHOWN = {"output_type": "display_data", "data": HTML, "metadata": {}}


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "notebooks"
    write_executed(folder / "01_concepts.ipynb", claim("01.a"), claim("01.b"))
    write_executed(folder / "06_trade_offs" / "1_pareto.ipynb", claim("06.a"))
    about = {"measured": "40 | 41×", "note": "needs VNNI", "expected": "a gain (Author 2015)"}
    headline = write_executed(folder / "06_trade_offs" / "2_more.ipynb", claim("06.b", **about), tags=["headline"])
    notebook = json.loads(headline.read_text())
    cell = {"cell_type": "code", "metadata": {"tags": ["readme-figure"]}, "source": "2", "outputs": [SHOWN]}
    headline.write_text(json.dumps(notebook | {"cells": [*notebook["cells"], cell]}))
    (tmp_path / "README.md").write_text(f"# Title\n\n{START}\nstale\n{END}\n\nThe end.\n")
    return tmp_path


def test_claims_are_printed_and_counted(root):
    code, text, _ = course("claims", "--notebooks", root / "notebooks")
    assert (code, text.splitlines()[0]) == (0, f"claims of {root / 'notebooks'}")
    assert "✓  06.b   Sentence of 06.b. (expected, not seen: a gain (Author 2015))  40 | 41× (needs VNNI) [dig" in text
    assert text.endswith("\n4 claims: 4 hold, 0 fail, 0 do not hold here\n")
    write_executed(root / "build" / "course" / "mnist-quick" / "01_concepts.ipynb", claim("01.a", "fails"))
    code, text, _ = course("claims", "--notebooks", root / "notebooks")
    assert (code, text.splitlines()[-1]) == (1, "1 claims: 0 hold, 1 fail, 0 do not hold here")


def test_a_claim_made_again_replaces_itself_and_a_damaged_one_is_named(tmp_path):
    path = write_executed(tmp_path / "01_a.ipynb", claim(measured="old"), claim("01.two"), claim(measured="new"))
    assert [(one["id"], one["measured"]) for one in claims_of([path])] == [("01.one", "new"), ("01.two", "97.8 ± 0.4")]
    for damaged in ("text", {"id": "01.x"}, claim(measured=3)):
        write_executed(path, damaged)
        code, _, errors = course("claims", path)
        assert (code, "a claim is damaged" in errors) == (2, True)
    write_executed(path)
    assert course("claims", path)[0] == 2


def test_the_readme_shows_a_picture_and_one_claim_of_each_chapter(root):
    assert refresh_readme(root / "notebooks", check=True) == ["docs/pareto.png", "README.md"]
    assert not (root / "docs").exists()
    assert course("readme", "--notebooks", root / "notebooks")[0] == 0
    assert (root / "docs" / "pareto.png").read_bytes() == PNG
    rows = [
        f"![{ALT}](docs/pareto.png)\n",
        "| chapter | one of its claims | measured |\n|---|---|---|",
        "| [01 Concepts](notebooks/01_concepts.ipynb) | Sentence of 01.a. | 97.8 ± 0.4 |",
        "| [06 Trade offs](notebooks/06_trade_offs/2_more.ipynb) | Sentence of 06.b. | 40 \\| 41× |",
    ]
    text = (root / "README.md").read_text()
    assert text == "\n\n".join(["# Title", START, "\n".join(rows), END, "The end.\n"])
    assert refresh_readme(root / "notebooks", check=True) == []
    write_executed(root / "notebooks" / "01_concepts.ipynb", claim("01.a", measured="other"))
    assert refresh_readme(root / "notebooks", check=True) == ["README.md"]


def test_nothing_unfit_gets_into_the_readme(root):
    before = (root / "README.md").read_bytes()
    write_executed(root / "notebooks" / "01_concepts.ipynb", claim("01.a", "fails"))
    assert "01_concepts is not fit to be shown" in course("readme", "--notebooks", root / "notebooks")[2]
    write_executed(root / "notebooks" / "01_concepts.ipynb", extra=[SHOWN], tags=["readme-figure"])
    assert "may be tagged 'readme-figure', got 2" in course("readme", "--notebooks", root / "notebooks")[2]
    assert (root / "README.md").read_bytes() == before
    write_executed(root / "notebooks" / "01_concepts.ipynb")
    (root / "README.md").write_text("# Title\n")
    assert "README.md needs one place" in course("readme", "--notebooks", root / "notebooks")[2]


def part(value, low, high):
    return {"value": value, "low": low, "high": high, "n": 8, "bound": 0, "relation": ">", "unit": ""}


def test_replicate_tells_where_each_claim_held_and_keeps_earlier_runs(root, monkeypatch):
    made = []

    def run_lessons(notebooks, *, lessons, seed, dataset, profile, output, jobs, resume):
        made.append((seed, output.name, jobs, resume))
        seed, mnist = int(seed), dataset == "mnist"
        sentence = "Sentence of 01.a" + ", reworded." * (seed == 2)
        good = claim("01.a", parts=[part(seed, seed - 0.6, seed + 0.6)], measured=f"{seed}.0", sentence=sentence)
        bad = claim("06.a", "not here" if mnist else "fails", verdict="undecided", expected="a gain", lesson="06.1")
        write_executed(output / "01_concepts.ipynb", good)
        write_executed(output / "06_trade_offs" / "1_pareto.ipynb", bad)
        return 1

    monkeypatch.setattr("course_lib.classroom.runner.run_lessons", run_lessons)
    again = ("replicate", "--jobs", 2, "--notebooks", root / "notebooks", "--seeds")
    assert course(*again, "0 1")[0] == 0
    assert course(*again, "3", "--dataset", "mnist")[0] == 0
    assert made[0] == ("0", "digits-0", 2, True)
    assert [name for _, name, _, _ in made] == ["digits-0", "digits-1", "mnist-3"]
    page = (root / "docs" / "claims.md").read_text()
    assert "Of 2 claims 1 hold in every run on the default data (digits). Of 2 intervals 2 contain the mean" in page
    assert "## 01 01_concepts\n\n| claim | digits 0 | digits 1 | mnist 3 |\n|---|---|---|---|\n" in page
    assert "\n| Sentence of 01.a | ✓ 0.0 | ✓ 1.0 | ✓ 3.0 |\n" in page
    assert "| Sentence of 06.a. *Expected, not seen: a gain.* | ? 97.8 ± 0.4 | ? 97.8 ± 0.4 | ? 97.8 ± 0.4 |" in page
    assert course(*again, "2")[0] == 0
    page = (root / "docs" / "claims.md").read_text()
    assert "| Sentence of 01.a, reworded. |  |  | ✓ 2.0 |  |" in page
    (root / "build" / "replicate" / "digits-2" / "01_concepts-failed.ipynb").touch()
    assert course(*again, "2")[0] == 1
    page = (root / "docs" / "claims.md").read_text()
    assert "Sentence of 01.a, reworded." not in page, "that lesson fails now"
    assert course(*again, "00 0,0", "--profile", "full")[0] == 0
    assert [name for _, name, _, _ in made][-1:] == ["digits-full-0"]
    runs = json.loads((root / "docs" / "claims.json").read_text())
    assert list(runs) == ["digits 0", "digits 1", "digits 2", "digits-full 0", "mnist 3"]
    made.clear()
    for seeds, says in (("0 x", "got 'x'"), ("", "--seeds takes at least one")):
        code, _, errors = course(*again, seeds)
        assert (code, says in errors, made) == (2, True, [])
    (root / "docs" / "claims.json").write_text("<<<<<<< HEAD\n")
    assert "claims.json is damaged" in course(*again, "0")[2]
    (root / "docs" / "claims.json").unlink()
    monkeypatch.setattr("course_lib.classroom.runner.run_lessons", lambda *a, **k: 130)
    assert course(*again, "0")[0] == 130


def test_the_command_line_says_what_it_can_and_what_it_cannot(tmp_path):
    assert "replicate" in course()[1]
    assert course("run", "--resum=3")[0] == 2
    assert course("lst")[0] == 2
    assert course("list", "--notebooks", tmp_path / "none")[0] == 2
    command = [sys.executable, "-m", "course_lib", "list", "--notebooks"]
    write_notebook(tmp_path / "01_a.ipynb", title="Größe und Θ")
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    shown = subprocess.run([*command, tmp_path], env=env, capture_output=True, text=True, check=True).stdout
    assert "01      Gr??e und ?" in shown


def test_folders_in_the_environment_are_meant_from_here(tmp_path, monkeypatch):
    write_notebook(tmp_path / "01_a.ipynb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COURSE_DATA", "data")
    monkeypatch.setenv("COURSE_CACHE", "")
    assert course("list", "--notebooks", tmp_path)[0] == 0
    assert (os.environ["COURSE_DATA"], os.environ["COURSE_CACHE"]) == (str(tmp_path / "data"), "")
    monkeypatch.setenv("COURSE_CACHE", "~no_such_user/cache")
    code, _, errors = course("list", "--notebooks", tmp_path)
    assert (code, errors.startswith("error: COURSE_CACHE is '~no_such_user/cache'"), errors.count("\n")) == (2, True, 1)


def test_in_a_terminal_long_texts_fold(root, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys, "stdout", screen)
    assert cli.main(["claims", "--notebooks", str(root / "notebooks")]) == 0
    assert max(map(len, screen.getvalue().splitlines()[2:])) <= 60
    assert "Author 2015" in screen.getvalue()


def test_bench_compares_in_turn_and_says_what_is_wanted(monkeypatch):
    slow, fast = (partial(time.sleep, seconds) for seconds in (0.08, 0.01))
    pairs = {"replicas": (slow, fast, 1, 3.0), "loss": (fast, fast, 2, 1.9)}
    monkeypatch.setattr(cli, "bench_pairs", lambda: pairs)
    code, text, _ = course("bench")
    assert (code, "at least 3x is wanted" in text, "at most 1.9x is wanted" in text) == (0, True, True)
    pairs["replicas"] = (fast, fast, 1, 3.0)
    assert course("bench")[0] == 1


def test_the_doctor_finds_a_wrong_version_and_a_kernel_from_elsewhere(monkeypatch, tmp_path):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.0.1" if name == "torchvision" else real(name))
    spec = tmp_path / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text('{"argv": ["/no/such/python", "-m", "x"], "language": "python", "display_name": "x"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("COURSE_MIRROR", "server/data")
    code, text, _ = course("doctor", "--fast")
    assert code == 1
    assert "FAIL  torchvision  0.0.1 (locked: 0.29.2" in text
    assert f"its kernel python3 is /no/such/python\n{'':18} -> move {spec.parent} away" in text
    assert "FAIL  mirror       COURSE_MIRROR is 'server/data'" in text


def test_the_doctor_reads_what_it_calls_fine(monkeypatch, tmp_path):
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    file.parent.mkdir(parents=True)
    file.write_text("<html>please log in</html>")
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    code, text, _ = course("doctor", "--fast")
    assert (code, "warn  data sets    mnist: files are there, not read\n" in text) == (0, True)
    found = list(doctor._data())
    assert [status for status, name, _, _ in found if name == "mnist"] == ["FAIL"]
    monkeypatch.setenv("COURSE_DATA", str(file))
    assert [status for status, *_ in doctor._data()] == ["FAIL"]
    monkeypatch.setenv("COURSE_DATA", str(tmp_path / "mispelt"))
    assert "check the spelling" in next(iter(doctor._data()))[3]


def test_the_doctor_tries_a_kernel():
    assert [(status, found) for status, _, found, _ in doctor._kernel()] == [("ok", "starts and computes")]


def test_the_doctor_names_systems_without_torch():
    for system in (("Darwin", "arm64"), ("Linux", "aarch64"), ("Windows", "AMD64")):
        assert doctor.without_torch(*system, "glibc", 64) == ""
    assert "Intel Macs" in doctor.without_torch("Darwin", "x86_64", "glibc", 64)
    assert "musl" in doctor.without_torch("Linux", "x86_64", "musl", 64)
    assert "riscv64" in doctor.without_torch("Linux", "riscv64", "glibc", 64)
    assert "32-bit" in doctor.without_torch("Linux", "armv7l", "glibc", 32)
