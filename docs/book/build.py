"""The book: the stored notebooks as web pages that need no network. Nothing is executed.

``python docs/book/build.py build/book`` copies notebooks and documents into a folder laid out like the repository, so
that links between them hold, readies them for paper and screens, and lets Sphinx write the pages.
"""

import json
import re
import shutil
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from course_lib.classroom.lessons import find_lessons, read_notebook

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NOTEBOOKS = ROOT / "notebooks"
DOCUMENTS = ["docs/claims.md", "docs/TEACHING.md", "CONTRIBUTING.md"]
ROOMS = {
    "methods": "what the course teaches: short functions on tensors",
    "evidence": "how we know: intervals, claims, pictures, sizes and times",
    "lab": "the bench: data, models, training, many replicas at once",
    "classroom": "how it reaches people: running, practice, claims, the command line",
    "": "",  # files.py and gate.py serve every room
}
WIDGET = "application/vnd.jupyter.widget-view+json"
DOORS = (
    '\n\n<p class="doors"><a href="{name}" download>Download this notebook</a>'
    '<button type="button" class="unfold">Open every fold</button></p>\n\n'
)


def pages() -> list[Path]:
    """Every notebook of the book, relative to the folder of the notebooks: a chapter's lessons, then its practice."""
    found = {}
    for lesson in find_lessons(NOTEBOOKS):
        found.setdefault(lesson.place.parts[0], []).append(lesson.place)
    for chapter, places in found.items():
        if (NOTEBOOKS / chapter / "practice.ipynb").is_file():
            places.append(Path(chapter, "practice.ipynb"))
    return [place for places in found.values() for place in places]


def readied(notebook: dict, name: str) -> dict:
    """The notebook with what a page needs: a link to itself, folds where JupyterLab folds, text in folds as text."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = opened(cell["source"])
        elif cell["cell_type"] == "code":
            fold(cell)
            for output in cell["outputs"]:
                if len(data := output.get("data") or {}) > 1:
                    data.pop(WIDGET, None)  # a slider that no kernel moves: what else it shows is better
    first = notebook["cells"][0]
    first["source"] = re.sub(r"^(# .+)\n*", lambda m: m[1] + DOORS.format(name=name), first["source"], count=1)
    return notebook


def opened(text: str) -> str:
    """Markdown whose ``<details>`` stand apart from their content: else formulas in it would stay as they are typed."""
    text = re.sub(r"^( *)(.*</summary>)(?=.*\S)", r"\1\2\n\n\1", text, flags=re.M)
    return re.sub(r"^( *)(.*\S)</details>", r"\1\2\n\n\1</details>", text, flags=re.M)


def fold(cell: dict) -> None:
    """Fold a cell's source, its output, or both behind a line that says what is there."""
    cell["source"] = cell["source"].removeprefix("# NBVAL_CHECK_OUTPUT\n")
    jupyter, tags, first = cell["metadata"].get("jupyter", {}), cell["metadata"]["tags"], cell["source"].split("\n")[0]
    source = "hide-input" in tags or jupyter.get("source_hidden") or "parameters" in tags
    answer = jupyter.get("outputs_hidden") and cell["outputs"]
    if not cell["outputs"] and cell["source"].startswith("lesson.predict("):
        tags.append("remove-cell")  # boxes to click on, which only a kernel can show
    tags[:] = [tag for tag in tags if not tag.startswith("hide-")]
    if source or answer:
        tags.append("hide-cell" if source and answer else "hide-input" if source else "hide-output")
        what = "Parameters" if "parameters" in tags else first.lstrip("# ") if first.startswith("#") else "Code"
        prompt = "After your guess: what was measured" if answer else what
        cell["metadata"]["mystnb"] = {"code_prompt_show": prompt, "code_prompt_hide": prompt}


def anchor(heading: str) -> str:
    """The anchor of a heading as JupyterLab makes it, so that a link works in both."""
    return heading.strip().replace(" ", "-")


def chapter_name(folder: str) -> str:
    """A chapter's folder as a reader sees it.

    >>> chapter_name("06_trade_offs")
    '06 Trade-offs'
    """
    number, _, name = Path(folder).stem.partition("_")
    return f"{number} {name.replace('trade_offs', 'trade-offs').replace('_', ' ').capitalize()}"


def contents(places: list[Path]) -> str:
    """The tables of contents of the chapters."""
    chapters = {}
    for place in places:
        chapters.setdefault(place.parts[0], []).append(f"notebooks/{place.with_suffix('').as_posix()}")
    return "\n".join(tree(chapter_name(chapter), listed) for chapter, listed in chapters.items())


def tree(caption: str, listed: list[str]) -> str:
    """A table of contents in MyST's words."""
    lines = ["```{toctree}", *([f":caption: {caption}"] if caption else []), ":maxdepth: 1", "", *listed, "```", ""]
    return "\n".join(lines)


def glossary(notebook: dict) -> str:
    """The words of chapter 00 as a page of its own, which search knows and any page can point to."""
    text = next(c["source"] for c in notebook["cells"] if re.search(r"^## Words$", c["source"], re.M))
    words = re.split(r"^## ", text.split("## Words\n")[1], flags=re.M)[0].replace(" Open what you need.", "")
    words = re.sub(r"<details><summary><b>(.+?)</b></summary>", r"## \1", words)  # a page has room for all of them
    return "# Words\n" + words.replace("</details>", "")


def reference(folder: Path) -> list[str]:
    """Write a page for each public module and one for each room; what the table of contents lists."""
    library, listed = ROOT / "course_lib", []
    for room, about in ROOMS.items():
        found = sorted((library / room).glob("*.py")) if room else [library / "files.py", library / "gate.py"]
        names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in found if p.stem != "__init__"]
        # Imported here, once, and not by each process that reads pages.
        names = [name for name in names if hasattr(import_module(name), "__all__")]
        for name in names:
            page = f"{name.removeprefix('course_lib.')}\n{'=' * len(name)}\n\n.. automodule:: {name}\n   :members:\n"
            (folder / f"{name}.rst").write_text(page, encoding="utf-8")
        if room:
            text = f"# {room}: {about}\n\n{tree('', names)}"
            (folder / f"{room}.md").write_text(text, encoding="utf-8")
        listed += [f"reference/{name}" for name in ([room] if room else names)]
    return listed


def stage(folder: Path) -> list[Path]:
    """Write the book's sources into a folder; the notebooks in it."""
    places = pages()
    for place in places:
        target = folder / "notebooks" / place
        target.parent.mkdir(parents=True, exist_ok=True)
        notebook = readied(read_notebook(NOTEBOOKS / place)[0], place.name)
        target.write_text(json.dumps(notebook), encoding="utf-8")
    (folder / "reference").mkdir()
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("book", "*.json"))
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        (folder / document).write_text(text.replace(" ± ", "\u00a0±\u00a0"), encoding="utf-8")
    (folder / "glossary.md").write_text(glossary(read_notebook(NOTEBOOKS / places[0])[0]), encoding="utf-8")
    shelf = ["glossary", "docs/claims", "docs/TEACHING", "CONTRIBUTING"]
    text = (HERE / "index.md").read_text(encoding="utf-8")
    text += contents(places) + tree("Beside the lessons", shelf) + tree("The library", reference(folder / "reference"))
    (folder / "index.md").write_text(text, encoding="utf-8")
    return places


def main(out: Path) -> int:
    """Build the book into ``out``; Sphinx's exit code: any warning is an error."""
    from sphinx.cmd.build import main as sphinx

    with tempfile.TemporaryDirectory() as work:
        source, site = Path(work, "source"), Path(work, "site")
        source.mkdir()
        places = stage(source)
        told = ["-b", "html", "-W", "-n", "-q", "-j", "2", "-c", str(HERE), "-d", f"{work}/doctrees"]
        code = sphinx([*told, str(source), str(site)])
        if code == 0:
            for place in places:
                shutil.copy(NOTEBOOKS / place, site / "notebooks" / place)
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(site, out)
            print(f"the book: {out / 'index.html'}")
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
