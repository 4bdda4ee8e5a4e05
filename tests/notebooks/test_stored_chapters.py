"""Every stored chapter: its parts, its cells, its outputs, and the set's coverage of the article."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
CHAPTERS = {path.stem: nbformat.read(path, as_version=4) for path in PATHS}
START = "00_start_here"
ARTICLE = {
    "01": {"1", "2.1", "2.2", "2.3"},
    "02": {"3.1", "4.1"},
    "03": {"3.2", "4.2"},
    "04": {"3.3", "4.3"},
    "05": {"3.4", "4.4"},
    "06": {"5.1", "5.2", "6.1", "6.2", "6.3"},
}
each = pytest.mark.parametrize("name", CHAPTERS)


def code(name):
    return [cell for cell in CHAPTERS[name].cells if cell.cell_type == "code"]


def prose(name):
    return "\n\n".join(cell.source for cell in CHAPTERS[name].cells if cell.cell_type == "markdown")


def test_every_chapter_of_the_map_is_here():
    assert [name[:2] for name in CHAPTERS] == ["00", *ARTICLE]


@each
def test_it_is_valid_and_small(name):
    nbformat.validate(CHAPTERS[name])
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 600_000


@each
def test_metadata_says_what_it_is(name):
    about = CHAPTERS[name].metadata["course"]
    assert about["chapter"] == name[:2]
    assert about["title"]
    assert about["minutes"] > 0
    assert 0 < about["seconds"] <= 90


@each
def test_parts_are_there_in_order(name):
    text = prose(name)
    wanted = [r"^# \d", "^## After this chapter you can", "^## Recap", "^## Exercises", "^## References"]
    if name != START:
        wanted[2:2] = ["[Bb]y hand", r"\*\*Predict first", "^## Where it breaks", "^## What we claim"]
    places = [re.search(pattern, text, re.M) for pattern in wanted]
    assert all(places), [p for p, found in zip(wanted, places, strict=True) if not found]
    # "By hand" and "Predict first" may come more than once and in either order.
    fixed = [found.start() for p, found in zip(wanted, places, strict=True) if p.startswith("^")]
    assert fixed == sorted(fixed)


@each
def test_there_is_one_parameters_cell_of_typed_literals(name):
    (cell,) = [c for c in code(name) if "parameters" in c.metadata.get("tags", [])]
    body = ast.parse(cell.source).body
    assert all(isinstance(line, ast.AnnAssign) and isinstance(line.value, ast.Constant) for line in body)
    assert {line.target.id: line.value.value for line in body} == {"dataset": "digits", "profile": "quick", "seed": 0}


@each
def test_cells_are_short_and_as_many_as_agreed(name):
    lines = [len([line for line in c.source.splitlines() if line.strip()]) for c in code(name)]
    assert max(lines) <= 20
    words = len(prose(name).split())
    if name != START:
        assert 25 <= len(CHAPTERS[name].cells) <= 45
        assert 1200 <= words <= 2500


@each
def test_it_was_executed_in_order_without_debris(name):
    cells = [cell for cell in code(name) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.get("text")


@each
def test_every_picture_has_a_text(name):
    for cell in code(name):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                assert len(output.metadata["image/png"]["alt"].split()) >= 4


@each
def test_the_last_code_cell_closes_the_ledger_and_every_claim_holds(name):
    cell = code(name)[-1]
    assert cell.source.strip().endswith("ledger.close()")
    (stored,) = [o.data for o in cell.outputs if "application/vnd.compression-course.claims+json" in o.get("data", {})]
    claims = stored["application/vnd.compression-course.claims+json"]["claims"]
    assert claims
    assert {claim["status"] for claim in claims} <= {"holds", "not here"}
    assert all(claim["chapter"] == name[:2] for claim in claims)


@each
def test_no_chapter_imports_a_chapter_or_names_this_machine(name):
    source = "\n".join(cell.source for cell in CHAPTERS[name].cells)
    assert not re.search(r"import\s+\d\d_|%run|nbimporter", source)
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(?:home|root|work|Users|tmp)/\w", text)


@each
def test_links_between_chapters_exist(name):
    for link in re.findall(r"\]\(([\w./-]+\.ipynb)\)", prose(name)):
        assert (FOLDER / link).exists(), link


def test_article_sections_are_covered_exactly_once():
    covered = [section for chapter in CHAPTERS.values() for section in chapter.metadata["course"]["sections"]]
    assert len(covered) == len(set(covered))
    for name, chapter in CHAPTERS.items():
        assert set(chapter.metadata["course"]["sections"]) == ARTICLE.get(name[:2], set())


def test_the_map_leads_from_every_section_to_its_chapter():
    rows = [line for line in prose(START).splitlines() if line.startswith("|")]
    for chapter, sections in ARTICLE.items():
        own = " ".join(line for line in rows if f"| {chapter} " in line)
        for section in sections - {"6.2"}:  # within the range 6.1–6.3
            assert section in own, (chapter, section)
