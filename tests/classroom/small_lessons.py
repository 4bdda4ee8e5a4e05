"""Small lessons, and the command line run on them in this process."""

import contextlib
import io
import json

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

MIME = "application/vnd.compression-course.claims+json"

PARAMETERS = """\
dataset: str = "digits"
profile: str = "quick"
seed: int = 0
widths: list[int] = [8]"""


def claim(id="01.one", status="holds", **changes):
    """A record as the ledger writes it."""
    record = {"id": id, "lesson": id[:2], "sentence": f"Sentence of {id}.", "status": status}
    record |= {"holds": status == "holds"}
    record |= {"verdict": "held" if status == "holds" else "not", "measured": "97.8 ± 0.4", "dataset": "digits"}
    return record | {"profile": "quick", "seed": 0, "note": "", "expected": "", "parts": []} | changes


def show_claims_source(*claims):
    """A cell that makes claims: one output a claim."""
    shown = "; ".join(f"display({{{MIME!r}: {{'claims': [{record!r}]}}}}, raw=True)" for record in claims)
    return f"from IPython.display import display; {shown}"


def write_notebook(path, *sources, parameters=PARAMETERS, **course):
    """A lesson: heading, parameters cell, code cells."""
    cells = [new_markdown_cell("Before.\n\n# A heading"), *[new_code_cell(source) for source in sources]]
    if parameters is not None:
        cells.insert(1, new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata={"course": course} if course else {}), path)
    return path


def write_executed(path, *claims, extra=(), tags=()):
    """A notebook as a run leaves it, without running anything; ``extra`` are more outputs of its one cell."""
    outputs = [{"output_type": "display_data", "metadata": {}, "data": {MIME: {"claims": [one]}}} for one in claims]
    cell = {"cell_type": "code", "id": "a", "metadata": {"tags": list(tags)}, "execution_count": 1, "source": "1"}
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [cell | {"outputs": [*outputs, *extra]}]
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def course(*argv):
    """Run the command line in this process: exit code, standard output, standard error."""
    from course_lib.classroom.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in argv])
    return code, out.getvalue(), err.getvalue()


def outputs_of(path):
    """The outputs of a notebook's code cells, one list a cell."""
    return [cell["outputs"] for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
