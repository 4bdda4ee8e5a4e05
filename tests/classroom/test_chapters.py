"""Chapters: found by name, chosen by words, read without running."""

import json
from pathlib import Path

import pytest
from small_chapters import write_notebook

from course_lib.classroom.chapters import chapter_paths, load_chapter, notebooks_folder, read_notebook, select
from course_lib.classroom.parameters import CourseError

PATHS = [Path(f"{name}.ipynb") for name in ("01_concepts", "02_pruning", "05_knowledge_distillation", "10_more")]


def test_the_courses_own_chapters_are_found():
    assert notebooks_folder() == Path(__file__).parents[2] / "notebooks"
    assert chapter_paths(notebooks_folder())[0].name == "00_start_here.ipynb"


def test_chapters_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("10_last", "9_nine", "00_start", "notes", ".01_x.9.partial", "02_pruning-copy"):
        (tmp_path / f"{name}.ipynb").touch()
    assert [path.stem for path in chapter_paths(tmp_path)] == ["00_start", "02_pruning-copy", "9_nine", "10_last"]


def test_a_folder_without_chapters_is_refused(tmp_path):
    with pytest.raises(CourseError, match="no chapter in"):
        chapter_paths(tmp_path)
    with pytest.raises(CourseError, match=r"there is no folder .*; --notebooks DIR says"):
        chapter_paths(tmp_path / "none")


@pytest.mark.parametrize(
    "word", ["2", "02", "pruning", "Pruning", "02_pruning", "02_pruning.ipynb", "a/02_pruning.ipynb"]
)
def test_a_word_names_a_chapter(word):
    assert select(PATHS, [word]) == [PATHS[1]]


def test_words_are_put_in_order_and_doubles_dropped():
    assert select(PATHS, ["10,02", "pruning 1"]) == [PATHS[0], PATHS[1], PATHS[3]]
    assert select(PATHS, []) == PATHS


def test_an_unknown_word_lists_the_chapters():
    with pytest.raises(CourseError, match="no chapter '3'; the chapters are 01_concepts, 02_pruning, 05_know"):
        select(PATHS, ["2", "3"])
    with pytest.raises(CourseError, match=r"no chapter 'prunning' \(did you mean 02_pruning\?\)"):
        select(PATHS, ["prunning"])


def test_a_chapter_tells_about_itself(tmp_path):
    about = {"sections": ["1", 2.1], "title": "T", "minutes": 40, "seconds": 30}
    chapter = load_chapter(write_notebook(tmp_path / "01_one.ipynb", "a = 1", parameters="n: int = 3", **about))
    assert (chapter.name, chapter.number, chapter.title, chapter.sections) == ("01_one", "01", "T", ("1", "2.1"))
    assert (chapter.minutes, chapter.seconds, chapter.parameters["n"].default) == (40, 30, 3)
    assert chapter.cells[1:] == (("code", "n: int = 3"), ("code", "a = 1"))


def test_without_metadata_the_heading_is_the_title(tmp_path):
    chapter = load_chapter(write_notebook(tmp_path / "07_mine.ipynb", "# no heading: code", parameters=None))
    assert (chapter.title, chapter.sections, chapter.parameters, chapter.minutes) == ("A heading", (), {}, None)
    bare = {"cells": [{"cell_type": "code", "source": ["# x\n", "1"]}], "metadata": {}, "nbformat": 4}
    (tmp_path / "08_bare.ipynb").write_text(json.dumps(bare))
    assert load_chapter(tmp_path / "08_bare.ipynb").title == "08_bare"
    assert load_chapter(tmp_path / "08_bare.ipynb").cells == (("code", "# x\n1"),)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"nbformat": 3, "cells": []}', '{"nbformat": 4, "cells": [1]}', "\x00"]
)
def test_what_is_no_notebook_is_named(tmp_path, text):
    path = tmp_path / "01_x.ipynb"
    path.write_text(text)
    with pytest.raises(CourseError, match=r"01_x\.ipynb is no "):
        read_notebook(path)


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(CourseError, match=r"cannot read .*01_x\.ipynb: No such file"):
        read_notebook(tmp_path / "01_x.ipynb")
