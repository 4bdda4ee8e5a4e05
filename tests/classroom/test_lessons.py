"""Lessons: found by name, chosen by words, read without running; parameters and their values."""

import json
from pathlib import Path

import pytest
from small_lessons import course, write_notebook

from course_lib.classroom.lessons import CourseError, Lesson, find_lessons, given_value, read_notebook, select_lessons

PLACES = {
    "00": "00_start_here",
    "02.1": "02_pruning/1_which_weights",
    "02.4": "02_pruning/4_neurons_and_channels",
    "02.10": "02_pruning/10_more",
    "05.1": "05_knowledge_distillation/1_the_loss",
}
LESSONS = [Lesson(number, Path(), Path(f"{place}.ipynb")) for number, place in PLACES.items()]
NOBODYS = """practice solutions/02_pruning 02_pruning/practice 02_pruning-Copy1
    02_pruning/1_which_weights-Copy1 02_pruning/1_which_weights-failed .ipynb_checkpoints/02_pruning-checkpoint
    02_pruning/.ipynb_checkpoints/1_a Untitled
    .02_hidden 02_pruning/.~1_which_weights notes/1_a 2024_report 02 02_ 02_mine 03_(1) 02_pruning/deep/1_a"""


def test_lessons_are_found_and_nobody_elses_notebook_is(tmp_path):
    for place in [*list(PLACES.values())[::-1], *NOBODYS.split()]:
        write_notebook(tmp_path / f"{place}.ipynb")
    (tmp_path / "04_folder.ipynb").mkdir()
    (tmp_path / "06_gone.ipynb").symlink_to(tmp_path / "nowhere")
    found = find_lessons(tmp_path)
    assert {lesson.number: lesson.name for lesson in found} == PLACES
    assert [lesson.number for lesson in found] == list(PLACES)
    code, shown, _ = course("list", "--paths", "--notebooks", tmp_path)
    assert code == 0
    assert [Path(line) for line in shown.splitlines()] == [tmp_path / f"{place}.ipynb" for place in PLACES.values()]


def test_a_folder_without_lessons_and_two_of_one_number_are_refused(tmp_path):
    with pytest.raises(CourseError, match="no lesson in"):
        find_lessons(tmp_path)
    with pytest.raises(CourseError, match=r"there is no folder .*; --notebooks DIR says"):
        find_lessons(tmp_path / "none")
    for name in ("2_a", "02_b"):
        write_notebook(tmp_path / "01_c" / f"{name}.ipynb")
    with pytest.raises(CourseError, match=r"02_b\.ipynb and 2_a\.ipynb would both be lesson 01\.2: rename"):
        find_lessons(tmp_path)


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        ([], list(PLACES)),
        (["2"], ["02.1", "02.4", "02.10"]),
        (["02.4"], ["02.4"]),
        (["2.1"], ["02.1"]),
        (["Pruning"], ["02.1", "02.4", "02.10"]),
        (["notebooks/02_pruning/"], ["02.1", "02.4", "02.10"]),
        (["notebooks/02_pruning/4_neurons_and_channels.ipynb"], ["02.4"]),
        (["the_loss"], ["05.1"]),
        (["05.1 00", "02.10,02.1"], ["00", "02.1", "02.10", "05.1"]),
    ],
)
def test_words_name_lessons_in_the_courses_order(words, numbers):
    assert [lesson.number for lesson in select_lessons(LESSONS, words)] == numbers


@pytest.mark.parametrize(
    ("word", "text"),
    [("3", "no lesson '3'; there are 00, 02.1, 02.4"), ("02.2", "no lesson '02.2'"), ("prunning", "mean pruning")],
)
def test_an_unknown_word_lists_the_lessons(word, text):
    with pytest.raises(CourseError) as caught:
        select_lessons(LESSONS, ["2", word])
    assert text in str(caught.value)


def test_a_lesson_tells_about_itself(tmp_path):
    about = {"lesson": "01.1", "sections": ["1", 2.1], "title": "T", "minutes": 40, "seconds": 30}
    write_notebook(tmp_path / "01_one" / "1_a.ipynb", "a = 1", parameters="n: int = 3", **about)
    write_notebook(tmp_path / "07_mine.ipynb", "# no heading: code", parameters=None)
    one, mine = (lesson.read() for lesson in find_lessons(tmp_path))
    assert (one.number, one.title, one.sections, one.minutes, one.seconds) == ("01.1", "T", ("1", "2.1"), 40, 30)
    assert one.parameters == {"n": 3}
    assert one.data == one.path.read_bytes()
    assert (mine.title, mine.sections, mine.parameters, mine.minutes) == ("A heading", (), {}, None)
    _, shown, _ = course("list", "--notebooks", tmp_path)
    assert [line.split() for line in shown.splitlines()[1:]] == [
        ["01.1", "T", "1,", "2.1", "40", "30"],
        ["07", "A", "heading", "-", "-", "-"],
    ]


ODD_CELLS = [
    {"cell_type": "code", "source": ["a = 1\n", "a"], "metadata": {"tags": None}, "outputs": None},
    {"cell_type": "markdown", "source": None, "metadata": None},
    {"cell_type": "code", "metadata": {"tags": "parameters"}, "outputs": [3, {"output_type": "stream", "text": "x"}]},
    {"cell_type": "raw"},
]


@pytest.mark.parametrize("about", [{}, {"metadata": None}, {"metadata": {"course": 7}}, {"nbformat_minor": None}])
def test_odd_notebooks_are_read(tmp_path, about):
    path = tmp_path / "08_bare.ipynb"
    path.write_text(json.dumps({"cells": ODD_CELLS, "nbformat": 4} | about), encoding="utf-8-sig")
    lesson = find_lessons(tmp_path)[0].read()
    assert (lesson.title, lesson.parameters) == ("08_bare", {})
    assert [cell["source"] for cell in lesson.notebook["cells"]] == ["a = 1\na", "", "", ""]
    assert all(cell["metadata"]["tags"] == [] for cell in lesson.notebook["cells"])
    assert [cell.get("outputs") for cell in lesson.notebook["cells"]] == [[], None, [ODD_CELLS[2]["outputs"][1]], None]


NO_NOTEBOOKS = ["", "[1]", '{"nbformat": 3, "cells": []}', '{"nbformat": 4, "cells": [1]}', "\x00", "[" * 100_000]
NO_NOTEBOOKS += ['{"nbformat": 4, "cells": [{}]}', '{"nbformat": 4}']


@pytest.mark.parametrize("text", NO_NOTEBOOKS)
def test_what_is_no_notebook_is_named(tmp_path, text):
    (tmp_path / "01_x.ipynb").write_text(text)
    with pytest.raises(CourseError, match=r"01_x\.ipynb is no "):
        read_notebook(tmp_path / "01_x.ipynb")
    code, shown, _ = course("list", "--notebooks", tmp_path)
    assert (code, "not readable" in shown) == (0, True)
    with pytest.raises(CourseError, match=r"cannot read .*01_y\.ipynb: No such file"):
        read_notebook(tmp_path / "01_y.ipynb")


def test_a_parameters_cell_holds_literals_only(tmp_path):
    def parameters(source):
        write_notebook(tmp_path / "02_x.ipynb", parameters=source)
        return find_lessons(tmp_path)[0].read().parameters

    source = '"""Doc."""\n# comment\na: int = 1\nb = "x"\nc: float | None = None\nd = -2.5'
    assert parameters(source) == {"a": 1, "b": "x", "c": None, "d": -2.5}
    for source in ("a = b", "import os", "a: int", "x.y = 1", "a += 1", "a, b = 1, 2"):
        with pytest.raises(CourseError, match=r"02_x\.ipynb: .* holds .*; only name: type = literal fits"):
            parameters(source)
    with pytest.raises(CourseError, match=r"the parameters cell is no Python: .*line 1"):
        parameters("a = (")


@pytest.mark.parametrize(
    ("name", "good", "bad", "told"),
    [
        ("seed", ["0", "4294967295"], ["-1", "4294967296", "1.5", "", "9" * 5000], "an integer from 0 to 4294967295"),
        ("profile", ["quick", "full"], ["fast", "Ful"], "profile must be one of quick, full"),
        ("dataset", ["digits", "kmnist"], ["mnits"], r"cifar10, got 'mnits' \(did you mean mnist\?\)"),
    ],
)
def test_texts_of_the_command_line_have_ranges(name, good, bad, told):
    assert [str(given_value(name, text)) for text in good] == good
    for text in bad:
        with pytest.raises(CourseError, match=told):
            given_value(name, text)
