"""The README's measured part comes from the stored chapters and from nowhere else."""

import base64
import json

import pytest
from small_chapters import claim, course, write_executed

from course_lib.classroom.parameters import CourseError
from course_lib.classroom.readme import END, PICTURE, START, TAG, claims_table, readme_picture, refresh_readme

PNG = b"\x89PNG\r\n\x1a\n and so on"


def add_picture(path, data=PNG, alt="Dots on a plane.", tag=TAG):
    notebook = json.loads(path.read_text())
    output = {
        "output_type": "display_data",
        "data": {"image/png": base64.b64encode(data).decode(), "text/plain": alt},
        "metadata": {"image/png": {"alt": alt}},
    }
    cell = {"cell_type": "code", "id": "p", "metadata": {"tags": [tag]}, "execution_count": 1, "source": "2"}
    notebook["cells"] += [{"cell_type": "markdown", "id": "m", "metadata": {}, "source": "# 6 · Trade-offs"}]
    notebook["cells"] += [cell | {"outputs": [output]}]
    path.write_text(json.dumps(notebook))


@pytest.fixture
def root(tmp_path):
    write_executed(tmp_path / "notebooks" / "01_concepts.ipynb", claim("01.a"))
    path = write_executed(
        tmp_path / "notebooks" / "06_trade_offs.ipynb",
        claim("06.a", measured="40 | 41×", note="needs VNNI"),
        claim("06.b", "not here"),
    )
    add_picture(path)
    (tmp_path / "README.md").write_text(f"# Title\n\n{START}\nstale\n{END}\n\nThe end.\n")
    return tmp_path


def test_it_lifts_picture_and_claims_and_touches_nothing_else(root):
    assert refresh_readme(root, root / "notebooks") == ["README.md", PICTURE.as_posix()]
    assert (root / PICTURE).read_bytes() == PNG
    text = (root / "README.md").read_text()
    assert text.startswith(f"# Title\n\n{START}\n")
    assert text.endswith(f"{END}\n\nThe end.\n")
    assert "![Dots on a plane.](docs/pareto.png)" in text
    assert "| ✓ | Sentence of 06.a. | 40 \\| 41× (needs VNNI) |" in text
    assert "| not here | Sentence of 06.b. |" in text
    assert "6 · Trade-offs: 2 claims" in text
    assert "Of 3 claims 2 hold" in text
    assert "stale" not in text
    assert not list(root.rglob("*.partial"))


def test_a_second_time_there_is_nothing_to_do(root):
    refresh_readme(root, root / "notebooks")
    assert refresh_readme(root, root / "notebooks") == []
    assert course("readme", "--check", "--notebooks", root / "notebooks")[0] == 0


def test_check_tells_and_changes_nothing(root):
    before = (root / "README.md").read_bytes()
    code, out, _ = course("readme", "--check", "--notebooks", root / "notebooks")
    assert code == 1
    assert "README.md: not up to date" in out
    assert (root / "README.md").read_bytes() == before
    assert not (root / PICTURE).exists()


def test_another_measurement_is_noticed(root):
    refresh_readme(root, root / "notebooks")
    write_executed(root / "notebooks" / "01_concepts.ipynb", claim("01.a", measured="other"))
    assert refresh_readme(root, root / "notebooks", check=True) == ["README.md"]


def test_no_picture_or_two_are_refused(root):
    path = root / "notebooks" / "06_trade_offs.ipynb"
    add_picture(path)
    with pytest.raises(CourseError, match="got 2"):
        readme_picture(root / "notebooks")
    write_executed(path, claim("06.a"))
    with pytest.raises(CourseError, match="got 0"):
        refresh_readme(root, root / "notebooks")


@pytest.mark.parametrize("bad", [{"error": "boom"}, {}])
def test_a_failure_is_never_shown_as_a_result(root, bad):
    claims = [claim("01.a")] if bad else [claim("01.a", "fails")]
    write_executed(root / "notebooks" / "01_concepts.ipynb", *claims, **bad)
    with pytest.raises(CourseError, match=r"01_concepts|01\.a fails"):
        claims_table(root / "notebooks")
    code, _, err = course("readme", "--notebooks", root / "notebooks")
    assert code == 2
    assert "not fit to be shown" in err


def test_a_readme_without_a_place_is_refused(root):
    (root / "README.md").write_text("# Title\n")
    with pytest.raises(CourseError, match="needs one place"):
        refresh_readme(root, root / "notebooks")
    (root / "README.md").unlink()
    with pytest.raises(CourseError, match="cannot read"):
        refresh_readme(root, root / "notebooks")
