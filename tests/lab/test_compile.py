"""Compiling C and calling it: the compiler's own words, no half-written file, no image of another size."""

import sys

import numpy as np
import pytest

from course_lib.lab import compile as module
from course_lib.lab.compile import CompilerError, compile_c, compiler_command, run_compiler

SOURCE = """
#include <stdint.h>
#define PIXELS 4
#define LEVELS 17
#define SCORES 2
void predict(const uint8_t *image, uint8_t *scores)
{
    scores[0] = image[0];
    scores[1] = (uint8_t)(image[2] + image[3]);
}
"""


@pytest.fixture
def call(tmp_path):
    try:
        return compile_c(SOURCE, tmp_path)
    except CompilerError as error:
        if "there is no C compiler" not in str(error):
            raise
        pytest.skip(str(error))


def test_images_of_any_shape_and_stride_are_answered_by_their_own_source(call, tmp_path):
    images = np.arange(16, dtype=np.uint8).reshape(4, 1, 2, 2)
    assert call(images[::2]).tolist() == [[0, 5], [8, 21]]
    assert call(images[:0]).shape == (0, 2)
    other = compile_c(SOURCE.replace("image[0]", "image[1]"), tmp_path)
    assert (call(images)[1, 0], other(images)[1, 0]) == (4, 5)


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (np.zeros((2, 5), np.uint8), r"4 pixels an image, got uint8 \(2, 5\)"),
        (np.zeros(4, np.uint8), r"got uint8 \(4,\)"),
        (np.zeros((1, 4)), "got float64"),
        (np.full((1, 4), 17, np.uint8), "from 0 to 16, got 17"),
    ],
)
def test_other_images_are_refused_before_c_reads_beyond_an_array(call, images, told):
    with pytest.raises(ValueError, match=told):
        call(images)


def test_the_compilers_words_are_passed_on_and_nothing_is_left(call, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CompilerError, match=r"refuses the source(.|\n)*unused"):
        compile_c(SOURCE.replace("{", "{ int unused;", 1), empty)
    silent = [sys.executable, "-c", "import sys; print('no room', file=sys.stderr); sys.exit(3)"]
    with pytest.raises(CompilerError, match=r" -c import sys.* refuses the source:\nno room"):
        run_compiler(SOURCE, empty / "out", [], silent)
    assert list(empty.iterdir()) == []


def test_a_missing_compiler_and_a_foreign_file_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="must define PIXELS, LEVELS and SCORES, found PIXELS"):
        compile_c("#define PIXELS 4\n", tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CompilerError, match=r"no C compiler 'cc'.*pip install ziglang"):
        compile_c(SOURCE, tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert compiler_command() == module.ZIG
