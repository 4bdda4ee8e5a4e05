"""An evening in JupyterLab, in a real browser: `make lab`, open, look, run, run again, follow a link, save, close."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).parents[2]
LESSON = "02_pruning/1_which_weights.ipynb"
MINE = [
    "from course_lib.evidence import Ledger, exactly\nledger = Ledger('00')",
    "ledger.claim('00.four', 'Two and two make four.', exactly(2 + 2, '') > 3)",
    "print('claims:', len(ledger.claims))",
    "ledger.claim('00.four', 'Two and two make five.', exactly(2 + 2, '') > 3)",
    "from course_lib.lab.download import obtain\nobtain('mnist', 'no-such-folder', download=False)",
    "from course_lib.lab.predictions import ask\nask('00-1', 'ab')",
]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def lab(tmp_path_factory, browser):
    """JupyterLab on a copy of the course, for a person without settings: (address, token, folder of the copy)."""
    home = tmp_path_factory.mktemp("home")
    notebooks, work = home / "notebooks", home / "work"
    shutil.copytree(ROOT / "notebooks", notebooks, ignore=shutil.ignore_patterns("solutions", ".*"))
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    mine = new_notebook(cells=[new_code_cell(source) for source in MINE], metadata={"kernelspec": kernel})
    nbformat.write(mine, notebooks / "mine.ipynb")
    unwanted = ("CI", "COURSE_UNATTENDED", "COURSE_DATA", "JUPYTER_PATH", "JUPYTER_CONFIG_PATH")
    env = {name: value for name, value in os.environ.items() if name not in unwanted}
    env |= {f"JUPYTER_{kind}_DIR": str(home / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    env |= {"COURSE_CACHE": str(home / "cache"), "IPYTHONDIR": str(home / "ipython"), "OMP_NUM_THREADS": "1"}
    flags = ["--no-browser", "--port", "0", "--notebooks", notebooks, "--work", work]
    before = contents(notebooks)
    with open(home / "log", "wb") as log:
        command = [sys.executable, "-m", "course_lib", "lab", *flags]
        server = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
    try:
        for _ in range(600):
            if found := list((home / "RUNTIME").glob("jpserver-*.json")):
                about = json.loads(found[0].read_text())
                yield about["url"].replace("localhost", "127.0.0.1"), about["token"], work
                break
            assert server.poll() is None, (home / "log").read_text()
            time.sleep(0.1)
        else:
            pytest.fail((home / "log").read_text())
    finally:
        server.terminate()
        server.wait(30)
    assert contents(notebooks) == before, "git would see what a reader did"


@pytest.fixture
def page(lab, browser):
    """A window, and afterwards the hosts that it spoke to."""
    hosts = set()
    window = browser.new_page(viewport={"width": 1024, "height": 900})
    window.set_default_timeout(60_000)
    window.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    yield window
    window.close()
    assert hosts - {None} == {"127.0.0.1"}, hosts


def opened(page, lab, place):
    """A notebook in a fresh workspace, with its kernel."""
    page.goto(f"{lab[0]}lab/tree/{place}?reset&token={lab[1]}", wait_until="domcontentloaded")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_selector("text=| Idle")


def downwards(page):
    """Scroll from the notebook's top to its end: JupyterLab keeps in the page only what is near the window."""
    below, panel = 0, "document.querySelector('.jp-WindowedPanel-outer')"
    while below < page.evaluate(f"{panel}.scrollHeight"):
        page.evaluate(f"{panel}.scrollTop = {below}")
        page.wait_for_timeout(150)
        yield
        below += 600


def reached(page, text):
    """The cell with that text, scrolled to."""
    cell = page.locator(".jp-Notebook .jp-Cell", has_text=text)
    assert any(cell.count() for _ in downwards(page)), f"no cell says {text!r}"
    cell.scroll_into_view_if_needed()
    return cell


WIDE = """[...document.querySelectorAll(`.jp-Notebook .jp-RenderedMarkdown, .jp-Notebook .cm-scroller,
    .jp-Notebook .jp-OutputArea-output`)].filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth)
    .map(e => e.innerText.slice(0, 60))"""
PICTURES = "[...document.querySelectorAll('.jp-Notebook img')].map(picture => [picture.alt, picture.width])"


def test_a_lesson_reads_well(page, lab):
    opened(page, lab, LESSON)
    seen = {}
    for width in (1280, 1024):
        page.set_viewport_size({"width": width, "height": 900})
        for _ in downwards(page):
            seen |= dict(page.evaluate(PICTURES))
            assert page.evaluate(WIDE) == [], f"to be scrolled sideways at {width} pixels"
    assert seen
    assert all(len(alt.split()) >= 4 and shown > 300 for alt, shown in seen.items()), seen


def test_what_follows_predict_first_is_folded_and_links_stay_in_the_copy(page, lab):
    opened(page, lab, LESSON)
    cell = reached(page, 'compare(scores, against="by magnitude")')
    assert cell.locator("table").count() == 0
    cell.locator(".jp-OutputPlaceholder").click()
    assert "by sign" in cell.locator("table").inner_text()
    reached(page, "back: ").locator("a", has_text="02.2").click()
    page.wait_for_selector(".lm-TabBar-tab.lm-mod-current >> text=2_holding_the_zeros.ipynb")
    page.wait_for_selector("h1:visible >> text=Holding the zeros")


def test_running_again_mistakes_and_boxes(page, lab):
    opened(page, lab, "mine.ipynb")
    cells = page.locator(".jp-CodeCell")

    def run(number):
        cell = cells.nth(number)
        before = cell.locator(".jp-InputPrompt").inner_text()
        cell.locator(".cm-content").click()
        page.keyboard.press("Control+Enter")
        for _ in range(600):
            if (now := cell.locator(".jp-InputPrompt").inner_text()) not in (before, "[*]:"):
                return cell.locator(".jp-Cell-outputArea").inner_text()
            page.wait_for_timeout(100)
        raise AssertionError(f"cell {number} does not end: {now}")

    shown = [run(number) for number in (0, 1, 1, 2, 3, 4, 5)]
    assert "✓ Two and two make four." in shown[2]
    assert "claims: 1" in shown[3]
    assert "stands for another sentence already" in shown[4]
    assert shown[5].strip().startswith("DataError: mnist is not complete")
    assert "Traceback" not in shown[5]
    assert "an answer is optional" in shown[6]
    page.keyboard.press("Control+S")
    page.wait_for_function("!document.querySelector('.lm-TabBar-tab.lm-mod-current.jp-mod-dirty')")
    saved = nbformat.read(lab[2] / "mine.ipynb", as_version=4)
    assert saved.cells[1].execution_count == 3
