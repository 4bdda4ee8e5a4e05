import pytest
from IPython.core.formatters import DisplayFormatter

from course_lib.evidence import tables
from course_lib.evidence.statistics import difference, mean
from course_lib.evidence.tables import compare, show_source

SCORES = {"dense": [97.0, 98.0, 96.0], "pruned": [96.0, 97.5, 95.5]}


def test_each_row_is_the_mean_and_the_paired_difference():
    table = compare(SCORES, against="dense", decimals=2, covers="seeds")
    assert table.loc["pruned", "test accuracy (%)"] == f"{mean(SCORES['pruned'], ''):.2f}" == "96.33 ± 2.59"
    gain = difference(SCORES["pruned"], SCORES["dense"], "")
    assert table["against dense (points)"].tolist() == ["", f"{gain:+.2f}"]
    assert table.columns.name == "3 replicas, 95 %, ± covers seeds"
    assert list(compare(SCORES).columns) == ["test accuracy (%)"]


def test_the_corner_says_what_the_lesson_covers(monkeypatch):
    monkeypatch.setattr(tables, "COVERS", ["training and split"])
    assert compare(SCORES).columns.name.endswith("± covers training and split")


def test_what_does_not_pair_is_refused():
    with pytest.raises(ValueError, match="no scores are called 'float'; there are: dense, pruned"):
        compare(SCORES, against="float")
    with pytest.raises(ValueError, match="2 and 3 values do not make pairs"):
        compare({**SCORES, "few": [1.0, 2.0]}, against="dense")


def example(x):
    """What is not shown.

    >>> not this
    """

    def inner():
        """Nor this."""
        return "but this"

    return inner() + x  # and this


def test_the_source_comes_without_docstrings():
    shown = show_source(example)
    assert str(shown) == (
        'def example(x):\n    def inner():\n        return "but this"\n\n    return inner() + x  # and this'
    )
    data, _ = DisplayFormatter().format(shown)
    assert data["text/markdown"] == f"```python\n{shown}\n```"
    assert data["text/plain"] == str(shown)
