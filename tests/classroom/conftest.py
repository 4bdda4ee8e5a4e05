"""What the tests of the classroom share: a folder of small chapters, and one run of them."""

import pytest
from small_chapters import BAD, GOOD, claim, course, show_claims_source, write_notebook


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("COURSE_DATA", "COURSE_MIRROR", "CI"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def notebooks(tmp_path_factory):
    """A folder of chapters, in a place whose name papermill would take for a format string."""
    folder = tmp_path_factory.mktemp("clone{0}") / "notebooks"
    about = {"chapter": "01", "sections": ["1", "2.1"], "title": "Good", "minutes": 40, "seconds": 2.5}
    claims = [claim(), claim("01.two", "not here", note="needs VNNI")]
    write_notebook(folder / "01_good.ipynb", GOOD, show_claims_source(*claims), **about)
    write_notebook(folder / "02_bad_index.ipynb", BAD, "print('never')")
    write_notebook(folder / "03_leaves.ipynb", "import sys; sys.exit()", "print('never')", parameters=None)
    return folder


@pytest.fixture(scope="session")
def run(notebooks, tmp_path_factory):
    """All small chapters, two at once, where a kernelspec names another python3: (code, text, errors, folder)."""
    spec = tmp_path_factory.mktemp("jupyter") / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    argv = '["/no/such/python", "-f", "{connection_file}"]'
    spec.write_text(f'{{"argv": {argv}, "language": "python", "display_name": "x"}}')
    folder = notebooks.parent / "build" / "course" / "digits-quick"
    folder.mkdir(parents=True)
    for name in ("01_good.ipynb", "02_bad_index.ipynb", "03_leaves.failed.ipynb", "claims.json"):
        (folder / name).write_text("of an earlier run")
    (folder / ".02_bad_index.999999999.partial.ipynb").write_text("of a killed run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(spec.parents[2]))
        patch.setenv("MPLBACKEND", "Agg")
        patch.delenv("OMP_NUM_THREADS", raising=False)
        given = ("--seed", 7, "-p", "alpha=0.5", "-p", "widths=[3]", "--jobs", 2)
        return *course("run", "--notebooks", notebooks, *given), folder
