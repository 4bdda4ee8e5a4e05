"""Every stored lesson: its parts, its cells, its outputs, and the set's coverage of the article."""

import re

import nbformat
import pytest

from course_lib.classroom.lessons import find_lessons, notebooks_folder
from course_lib.classroom.reports import claims_of

FOLDER = notebooks_folder()
LESSONS = {lesson.number: lesson.read() for lesson in find_lessons(FOLDER)}
ARTICLE = {
    "01": {"1", "2.1", "2.2", "2.3"},
    "02": {"3.1", "4.1"},
    "03": {"3.2", "4.2"},
    "04": {"3.3", "4.3"},
    "05": {"3.4", "4.4"},
    "06": {"5.1", "5.2", "6.1", "6.2", "6.3"},
}
PARAMETERS = {"dataset": "digits", "profile": "quick", "seed": 0}
each = pytest.mark.parametrize("number", LESSONS)


def code(number):
    return [cell for cell in LESSONS[number].notebook["cells"] if cell["cell_type"] == "code"]


def prose(number):
    return "\n\n".join(c["source"] for c in LESSONS[number].notebook["cells"] if c["cell_type"] == "markdown")


def hidden(cell, part):
    return bool(cell["metadata"].get("jupyter", {}).get(f"{part}_hidden"))


def texts(value):
    return value if isinstance(value, str) else "".join(value)


@each
def test_it_is_valid_small_and_says_what_it_is(number):
    data, text = LESSONS[number].data, prose(number)
    nbformat.validate(nbformat.reads(data.decode(), as_version=4))
    assert len(data) < 1_000_000
    about = LESSONS[number].notebook["metadata"]["course"]
    assert about["lesson"] == number
    assert about["title"]
    assert 0 < about["minutes"] <= 30
    # Chapter 08 trains language models, once: what its lessons share stays in the cache.
    assert 0 < about["seconds"] <= (150 if number.startswith("08") else 60)
    assert "sections" in about
    assert text.lstrip().startswith("# ")
    for heading in re.findall(r"^#+ .*", text, re.M):
        assert not re.search(r"[$\\]", heading), f"a table of contents shows the raw formula: {heading}"
    assert "parameters" in code(number)[0]["metadata"]["tags"]
    assert LESSONS[number].parameters == PARAMETERS


@each
def test_visible_code_is_read_aloud(number):
    for cell in code(number):
        assert "# fmt:" not in cell["source"]
        if hidden(cell, "source"):
            assert "hide-input" in cell["metadata"]["tags"], "JupyterLab folds it, the book does not"
            assert cell["source"].startswith("# "), "a folded cell is named by its first line"
        else:
            assert "hide-input" not in cell["metadata"]["tags"], "the book folds it, JupyterLab does not"
            lines = cell["source"].splitlines()
            assert max(map(len, lines), default=0) <= 88, max(lines, key=len)
            assert len([line for line in lines if line.strip()]) <= 20, cell["source"]


@each
def test_it_was_executed_in_order_without_debris(number):
    cells = [cell for cell in code(number) if cell["source"].strip()]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr", output.get("text")
            shown = texts(output.get("text") or output.get("data", {}).get("text/plain", ""))
            assert not re.search(r"\b\w*Warning\b:|Traceback", shown)


@each
def test_every_picture_has_a_text(number):
    for cell in code(number):
        for output in cell["outputs"]:
            data = output.get("data", {})
            alts = re.findall(r"<img\b(?:[^>]*\balt=\"([^\"]*)\")?[^>]*>", texts(data.get("text/html", "")))
            if "image/png" in data or "image/svg+xml" in data:
                alts += [about.get("alt", "") for about in output["metadata"].values()] or [""]
            assert all(len(alt.split()) >= 4 for alt in alts), (cell["source"][:200], alts)


@each
def test_what_follows_predict_first_is_folded(number):
    asked = False
    for cell in LESSONS[number].notebook["cells"]:
        if cell["cell_type"] == "markdown":
            asked |= "**Predict first" in cell["source"]
        elif asked and cell.get("outputs"):
            assert hidden(cell, "outputs"), f"its output gives the answer away: {cell['source'][:200]}"
            asked = False
        if cell.get("outputs") and hidden(cell, "outputs"):
            shown = "".join(cell["outputs"][0].get("data", {}).get("text/html", ""))
            assert shown.startswith("<!--"), f"JupyterLab shows this line of what is folded: {cell['source'][:200]}"


@each
def test_every_stored_claim_holds(number):
    claims = claims_of([LESSONS[number].path])
    assert claims
    for claim in claims:
        assert claim["status"] == "holds" or (claim["status"] == "not here" and claim["note"]), claim["sentence"]
        assert claim["lesson"] == number
        assert claim["id"].startswith(f"{number[:2]}.")
        assert (claim["dataset"], claim["profile"], claim["seed"]) == ("digits", "quick", 0)


def test_no_two_claims_have_one_id():
    ids = [claim["id"] for claim in claims_of(lesson.path for lesson in LESSONS.values())]
    assert len(set(ids)) == len(ids), [id for id in ids if ids.count(id) > 1]


@each
def test_it_names_no_machine_imports_no_notebook_and_its_links_lead_back_on_and_up(number):
    sources = "\n".join(cell["source"] for cell in LESSONS[number].notebook["cells"])
    assert not re.search(r"import\s+\d\d_|%run|nbimporter", sources)
    assert not re.search(rb"(?<![\w./])/(?:home|root|work|Users|tmp)/\w", LESSONS[number].data)
    order, here = list(LESSONS), LESSONS[number].path
    links = [here.parent / link for link in re.findall(r"\]\((?!https?://|#|mailto:)([^)\s#]+)", prose(number))]
    assert [link for link in links if not link.exists()] == []
    place, reached = order.index(number), {link.resolve() for link in links}
    wanted = {order[0], *order[max(place - 1, 0) : place], *order[place + 1 : place + 2]} - {number}
    assert {other for other in wanted if LESSONS[other].path.resolve() not in reached} == set()


def test_article_sections_are_covered_exactly_once():
    covered = [(number[:2], section) for number, lesson in LESSONS.items() for section in lesson.sections]
    assert len(covered) == len(set(covered))
    assert all(section in ARTICLE.get(chapter, ()) for chapter, section in covered)
    assert {section for _, section in covered} == set().union(*ARTICLE.values())
