"""Small chapters, and the command line run on them in this process."""

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
alpha: float = 0.25  # of no use
widths: list[int] = [8, 32]"""

GOOD = """\
import json, os, sys, tempfile
json.dumps({"python": sys.executable, "cwd": os.getcwd(), "threads": os.environ["OMP_NUM_THREADS"],
            "unattended": os.environ["COURSE_UNATTENDED"], "seed": seed, "alpha": alpha, "widths": widths})"""

BAD = "numbers = [1, 2]\nprint('so far')\nnumbers[7]"


def claim(id="01.one", status="holds", **changes):
    """A record as the ledger writes it."""
    sentence, measured = f"Sentence of {id}.", "97.8 ± 0.4"
    record = {"id": id, "chapter": id[:2], "sentence": sentence, "holds": status == "holds", "measured": measured}
    return record | {"status": status, "dataset": "digits", "profile": "quick", "note": ""} | changes


def show_claims_source(*claims):
    """A cell that shows a ledger."""
    return f"from IPython.display import display\ndisplay({{{MIME!r}: {{'claims': {list(claims)!r}}}}}, raw=True)"


def write_notebook(path, *sources, parameters=PARAMETERS, **course):
    """A chapter: heading, parameters cell, code cells."""
    cells = [new_markdown_cell("Before.\n\n# A heading"), *[new_code_cell(source) for source in sources]]
    if parameters is not None:
        cells.insert(1, new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata={"course": course} if course else {}), path)
    return path


def write_executed(path, *claims, error=None):
    """A notebook as a run leaves it, without running anything."""
    output = {"output_type": "display_data", "metadata": {}, "data": {MIME: {"claims": list(claims)}}}
    outputs = [output] if claims else []
    if error:
        outputs.append({"output_type": "error", "ename": "ValueError", "evalue": error, "traceback": []})
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "execution_count": 1, "source": "1", "outputs": outputs}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
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
