"""Slides for a teacher: a deck of each stored lesson, which needs no network. Nothing is executed.

``python docs/book/slides.py build/slides`` writes a page a lesson. On the slides are headings, formulas, tables,
pictures, claims, questions, and code where a section has nothing else; prose stands in the speaker's notes (press S).
"""

import html
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin

from course_lib.classroom.lessons import find_lessons
from course_lib.classroom.reports import MIME

HERE = Path(__file__).resolve().parent
SPOKEN_OF = ("Recap", "Check yourself")  # sections whose text is on the slide
LEFT_OUT = ("References",)
MOST_LINES = 14  # of code on a slide
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="stylesheet" href="reveal/reveal.css">
<link rel="stylesheet" href="slides.css">
</head>
<body>
{body}
</body>
</html>
"""
DECK = """<div class="reveal"><div class="slides">
{slides}
</div></div>
<script src="reveal/reveal.js"></script>
<script src="reveal/notes.js"></script>
<script>
MathJax = {{options: {{enableMenu: false}}}};
Reveal.initialize({{
  hash: true, slideNumber: "c/t", transition: "none",
  width: 1024, height: 768, margin: 0.04, center: false, plugins: [RevealNotes],
}});
</script>
<script src="reveal/tex-svg.js"></script>"""


def formula(content: str, options: dict) -> str:
    """A formula between the marks that MathJax looks for."""
    marks = r"\[{}\]" if options["display_mode"] else r"\({}\)"
    return marks.format(html.escape(content))


MARKDOWN = MarkdownIt("commonmark").enable("table").use(dollarmath_plugin, renderer=formula)


@dataclass
class Slide:
    """What is seen, what is said, and code in case that nothing else is seen."""

    heading: str
    shown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    full: bool = False  # has a picture or a table: the next one needs a slide of its own

    def __str__(self) -> str:
        begins = self.heading.startswith("<h1")  # with why, not with code
        shown, notes = self.shown or ([] if begins else self.code[:1]), self.notes
        if not shown and notes:
            shown, notes = notes[:1], notes[1:]
        return f"<section>\n{self.heading}\n{''.join(shown)}\n<aside class='notes'>{''.join(notes)}</aside>\n</section>"


def blocks(text: str):
    """The kind, the source and the page's form of each top-level piece of Markdown."""
    tokens, start = MARKDOWN.parse(text), 0
    for end, token in enumerate(tokens):
        if token.level == 0 and token.nesting <= 0:
            piece = tokens[start : end + 1]
            page = MARKDOWN.renderer.render(piece, MARKDOWN.options, {})
            page = re.sub(r'<a href="(?!https?:)[^"]*">(.*?)</a>', r"\1", page, flags=re.S)  # lessons are elsewhere
            inside = next((t.content for t in piece if t.type == "inline"), token.content)
            yield token.type, inside, page
            start = end + 1


def slides_of(notebook: dict, title: str) -> list[Slide]:
    """The slides of a lesson; what stands before its first heading has one of its own."""
    slides, section = [Slide(f"<h1>{title}</h1>")], ""

    def room() -> Slide:
        if slides[-1].full:
            slides.append(Slide(slides[-1].heading))
        return slides[-1]

    for cell in notebook["cells"]:
        for kind, text, page in blocks(cell["source"]) if cell["cell_type"] == "markdown" else ():
            if kind == "heading_close":
                section = text
                slides.append(Slide(page))
            elif section in LEFT_OUT or (section in SPOKEN_OF and text.startswith("*")):  # the links to other lessons
                continue
            elif text.startswith(question := "**Predict first.**"):
                asked = MARKDOWN.render(text.removeprefix(question))
                slides += [Slide("<h2>Predict first</h2>", [asked]), Slide("<h2>Measured</h2>")]
            elif kind in ("table_close", "math_block") or section in SPOKEN_OF:
                room().shown.append(f"<div class='wide'>{page}</div>")
            else:
                slides[-1].notes.append(page)
        if cell["cell_type"] == "code":
            folded = {"hide-input", "parameters"} & set(cell["metadata"]["tags"])
            dull = folded or re.match(r"show_source|lesson\.|(# .*\n)?lesson =|(import|from) ", cell["source"])
            if not dull and len(cell["source"].splitlines()) <= MOST_LINES:
                slides[-1].code.append(f"<pre><code>{html.escape(cell['source'])}</code></pre>")
            for output in cell["outputs"]:
                data = output.get("data") or {}
                page = "".join(data.get("text/html", ""))
                if "text/markdown" in data:  # show_source
                    slides[-1].code.append(MARKDOWN.render("".join(data["text/markdown"])))
                elif MIME in data:
                    claims = sum("class='claim'" in part for part in slides[-1].shown)
                    if claims == (1 if slides[-1].full else 4):  # more would not fit
                        slides.append(Slide(slides[-1].heading))
                    slides[-1].shown.append(f"<div class='claim'>{page}</div>")
                elif "<img" in page or "<table" in page:
                    slide = room()
                    slide.shown.append(f"<div class='wide'>{page}</div>")
                    slide.full = True
    return [slide for slide in slides if slide.shown or slide.notes or slide.code]


def main(out: Path) -> None:
    """Write the decks, and a page that leads to them; nothing old goes before all lessons are read."""
    pages = {}
    for lesson in map(lambda found: found.read(), find_lessons(HERE.parents[1] / "notebooks")):
        title = html.escape(f"{lesson.number} {lesson.title}")
        deck = DECK.format(slides="\n".join(map(str, slides_of(lesson.notebook, title))))
        pages[f"{lesson.number}.html"] = title, PAGE.format(title=title, body=deck)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(HERE / "vendor" / "reveal", out / "reveal")
    shutil.copy(HERE / "static" / "slides.css", out)
    for path in (HERE / "vendor" / "mathjax").iterdir():
        shutil.copy(path, out / "reveal")
    for name, (_, page) in pages.items():
        (out / name).write_text(page, encoding="utf-8")
    links = [f"<li><a href='{name}'>{title}</a></li>" for name, (title, _) in pages.items()]
    keys = "S opens the speaker's notes, O shows all slides, F fills the screen."
    body = f"<main><h1>Slides</h1><p>{keys}</p><ul>{''.join(links)}</ul></main>"
    (out / "index.html").write_text(PAGE.format(title="Slides", body=body), encoding="utf-8")
    print(f"the slides: {out / 'index.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
