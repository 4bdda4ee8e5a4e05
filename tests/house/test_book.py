"""The book and the slides, written as `make book slides` does, read as files and in a headless Chromium."""

import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from course_lib.classroom.lessons import find_lessons, read_notebook
from course_lib.classroom.reports import claims_of

ROOT = Path(__file__).parents[2]
LESSONS = find_lessons(ROOT / "notebooks")
each = pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.number)
PHONE, LAPTOP = {"width": 390, "height": 800}, {"width": 1280, "height": 800}

# What sticks out on the right and cannot be scrolled by itself: the theme cuts it off.
OUTSIDE = """() => {
  const rolls = (e) =>
    e && e.tagName != "ARTICLE" && (/auto|scroll/.test(getComputedStyle(e).overflowX) || rolls(e.parentElement));
  const wide = [document.documentElement, ...document.querySelectorAll("article *")].filter((e) => {
    const box = e.getBoundingClientRect();
    return box.width && box.right > document.documentElement.clientWidth + 1 && !rolls(e);
  });
  return wide.map((e) => e.outerHTML.slice(0, 100));
}"""
PROSE = """() => [...document.querySelectorAll("article :is(p, li, td), .toc-tree")].map((e) => {
  const copy = e.cloneNode(true);
  copy.querySelectorAll("code, pre, script").forEach((part) => part.remove());
  return copy.textContent;
})"""


def write(kind, folder):
    """What `make book` or `make slides` runs."""
    pytest.importorskip("myst_nb", reason="the book's tools are not installed: make setup-dev")
    command = [sys.executable, f"docs/book/{kind}.py", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    return write("build", tmp_path_factory.mktemp("made") / "book")


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    return write("slides", tmp_path_factory.mktemp("made") / "slides")


class Page(HTMLParser):
    """The tags of a page, its anchors, and what it links to."""

    def __init__(self, path):
        super().__init__()
        self.path, self.tags = path, []
        self.feed(path.read_text(encoding="utf-8"))
        self.anchors = {value for _, given in self.tags for name, value in given.items() if name == "id"}

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def all(self, tag, attribute):
        return [given[attribute] for name, given in self.tags if name == tag and attribute in given]


@pytest.fixture(scope="module")
def pages(book):
    return {path: Page(path) for path in book.rglob("*.html") if "_static" not in path.parts}


@pytest.fixture
def tab(browser):
    """An empty page of the browser that takes nothing from outside and has no error: what it asked for is kept."""
    opened = browser.new_page(viewport=PHONE)
    wrong = []
    opened.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else wrong.append(asked.url))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    yield opened
    opened.close()
    assert wrong == []


def go(tab, path):
    tab.goto(path.as_uri())
    tab.evaluate("() => window.MathJax?.startup?.promise")


def of(book, lesson):
    return book / "notebooks" / lesson.place.with_suffix(".html")


def test_every_lesson_and_its_practice_are_in_the_book_and_no_solution_is(book, pages):
    places = [lesson.place for lesson in LESSONS]
    places += [path.relative_to(ROOT / "notebooks") for path in (ROOT / "notebooks").glob("[0-9]*/practice.ipynb")]
    for place in places:
        page = pages[book / "notebooks" / place.with_suffix(".html")]
        assert place.name in [given.get("href") for name, given in page.tags if name == "a" and "download" in given]
        assert page.path.with_suffix(".ipynb").read_bytes() == (ROOT / "notebooks" / place).read_bytes()
    assert len(list(book.rglob("*.ipynb"))) == len(places)
    for page in ("claims", "TEACHING"):
        assert book / "docs" / f"{page}.html" in pages
    assert "掩码" in (book / "glossary.html").read_text(encoding="utf-8")
    assert "course_lib.methods.pruning.rank_mask" in pages[book / "reference/course_lib.methods.pruning.html"].anchors


def test_links_lead_to_pages_and_headings_that_exist_and_nothing_is_asked_of_another_address(pages):
    for path, page in pages.items():
        for link in page.all("a", "href"):
            parts = urlsplit(link)
            if parts.scheme or not link.strip("#"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors, f"{path}: {link}"
        asked = page.all("script", "src") + page.all("img", "src") + page.all("link", "href")
        assert not [link for link in asked if urlsplit(link).scheme not in ("", "data")], path


@each
def test_pictures_claims_and_folds_are_those_of_the_notebook(book, pages, lesson):
    page, cells = pages[of(book, lesson)], read_notebook(lesson.path)[0]["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    shown = "".join("".join(output.get("data", {}).get("text/html", "")) for output in outputs)
    pictures = [given for name, given in page.tags if name == "img"]
    assert len(pictures) >= shown.count("<img")
    assert all(len(given.get("alt", "").split()) > 3 for given in pictures)
    text = page.path.read_text(encoding="utf-8")
    for claim in claims_of([lesson.path]):
        assert claim["measured"] in text
    folded = [cell for cell in cells if cell["metadata"].get("jupyter", {}).get("outputs_hidden") and cell["outputs"]]
    assert len(re.findall(r"<summary[^>]*>\s*<p[^>]*collapsed[^>]*>After your guess", text)) == len(folded)
    assert not any("open" in given for name, given in page.tags if name == "details")


@each
def test_a_lesson_reads_well_on_a_phone_and_a_laptop(book, tab, lesson):
    go(tab, of(book, lesson))
    formulas = tab.locator("article .math").count()
    assert tab.locator("article .math mjx-container svg").count() >= formulas
    assert tab.locator("mjx-merror, [data-mjx-error]").count() == 0
    assert not re.search(r"\$\\?[a-z]|\\\(|\\frac", "\n".join(tab.evaluate(PROSE)), re.I), "a formula as it was typed"
    tab.click("button.unfold")
    assert tab.locator("article details:not([open])").count() == 0
    for size in (PHONE, LAPTOP):
        tab.set_viewport_size(size)
        assert tab.evaluate(OUTSIDE) == [], size


def test_other_pages_fit_a_phone(book, tab):
    names = "index glossary docs/claims docs/TEACHING CONTRIBUTING genindex reference/course_lib.gate"
    for name in names.split():
        go(tab, book / f"{name}.html")
        assert tab.evaluate(OUTSIDE) == [], name


def test_a_reader_opens_a_fold_goes_on_searches_and_turns_off_the_light(book, tab):
    first, second = LESSONS[:2]
    tab.set_viewport_size(LAPTOP)
    go(tab, of(book, first))
    fold = tab.locator("article details.hide", has_text="After your guess").first
    assert not fold.locator("table, img").first.is_visible()
    fold.locator("summary").click()
    assert fold.locator("table, img").first.is_visible()
    tab.locator(f"article a[href$='{second.path.stem}.html']").first.click()
    assert tab.url == of(book, second).as_uri()
    tab.click("a.prev-page")
    assert tab.url == of(book, first).as_uri()
    before = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    for _ in range(3):
        tab.locator(".theme-toggle:visible").first.click()
        if tab.evaluate("document.body.dataset.theme") == "dark":
            break
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != before
    tab.fill("input.sidebar-search", "sparsity")
    tab.press("input.sidebar-search", "Enter")
    tab.wait_for_selector("#search-results li a")
    assert "notebooks/02_pruning" in "".join(a.get_attribute("href") for a in tab.locator("#search-results a").all())


@each
def test_a_deck_shows_pictures_and_claims_and_keeps_the_prose_for_the_speaker(slides, lesson):
    text = (slides / f"{lesson.number}.html").read_text(encoding="utf-8")
    shown, spoken = re.sub("<aside.*?</aside>", "", text, flags=re.S), re.findall("<aside.*?</aside>", text, re.S)
    stored = json.dumps(read_notebook(lesson.path)[0])
    assert shown.count("<img") == stored.count("<img alt")
    assert shown.count("class='claim'") == len(claims_of([lesson.path]))
    assert len(re.sub("<[^>]+>", "", "".join(spoken))) > 1000
    assert not re.search(r'(src|href)="https?:', shown)


def test_prose_before_the_first_heading_has_a_slide_of_its_own():
    pytest.importorskip("mdit_py_plugins", reason="the book's tools are not installed: make setup-dev")
    spec = importlib.util.spec_from_file_location("slides", ROOT / "docs" / "book" / "slides.py")
    spec.loader.exec_module(made := importlib.util.module_from_spec(spec))
    cells = [{"cell_type": "markdown", "source": "Before.\n\n# Heading\n\nAfter."}]
    assert [slide.notes for slide in made.slides_of({"cells": cells}, "T")] == [
        ["<p>Before.</p>\n"],
        ["<p>After.</p>\n"],
    ]


def test_a_deck_runs_in_the_browser(slides, tab):
    tab.set_viewport_size({"width": 1024, "height": 768})
    go(tab, slides / "index.html")
    tab.click(f"a >> text={LESSONS[-1].number}")
    tab.wait_for_function("window.Reveal?.isReady()")
    tab.evaluate("() => MathJax.startup.promise")
    for number in range(tab.evaluate("Reveal.getTotalSlides()")):
        tab.evaluate(f"Reveal.slide({number})")
        size = tab.evaluate("(s => [s.scrollHeight - s.clientHeight, s.innerText.length])(Reveal.getCurrentSlide())")
        assert size[0] <= 1, f"slide {number} is too long"
        assert size[1] > 0
