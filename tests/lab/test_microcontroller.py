"""On an emulated core: the same integers, and costs that agree with other ways to count."""

import numpy as np
import pytest
import torch
from torch import nn

from course_lib.lab import microcontroller
from course_lib.lab.compile import CompilerError
from course_lib.lab.microcontroller import BOARDS, CORES, BoardTooSmall, Cost, cross_compile
from course_lib.methods.c_source import c_source, float_c_source, pixel_table
from course_lib.methods.integer import integer_network

MISSING = microcontroller.missing_packages()
needs_extra = pytest.mark.skipif(bool(MISSING), reason="pip install ziglang unicorn to test this")

ADD = """
#include <stdint.h>
#define PIXELS 2
#define LEVELS 256
#define SCORES 1
static volatile uint8_t seen[100];
void predict(const uint8_t *image, uint8_t *scores)
{
    volatile uint8_t local[200];
    for (int i = 0; i < 200; i++)
        local[i] = image[0];
    seen[image[0] % 100] = image[1];
    scores[0] = (uint8_t)(local[7] + seen[image[0] % 100]);
}
"""


@pytest.fixture(scope="module")
def zig_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("zig")


@pytest.fixture(autouse=True)
def one_cache_for_all(zig_cache, monkeypatch):
    """What the compiler builds for a core takes seconds, once."""
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", str(zig_cache))


def cnn():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4))
    grey = torch.randint(0, 17, (12, 1, 4, 4), dtype=torch.uint8)
    network = integer_network(model, grey / 16)
    source = c_source(network, (1, 4, 4), pixel_table(network.x_q, [0.0], [1.0], 17))
    return source, grey.numpy(), network.scores(grey / 16).numpy()


@needs_extra
@pytest.mark.parametrize(("core", "optimize"), [*((core, "-Os") for core in CORES), ("Cortex-M4", "-O3")])
def test_every_score_on_every_core_is_that_of_python(core, optimize):
    source, grey, expected = cnn()
    np.testing.assert_array_equal(cross_compile(source, core, optimize)(grey), expected)


@needs_extra
@pytest.mark.parametrize("core", ["Cortex-M0", "Cortex-M4F"])
def test_floats_come_back_as_floats(core):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    grey = np.arange(16, dtype=np.uint8).reshape(4, 1, 2, 2)
    with torch.no_grad():
        expected = model((torch.tensor(grey) / 16 - 0.5) / 0.25).numpy()
    program = cross_compile(float_c_source(model, 0.5, 0.25, 17), core)
    np.testing.assert_allclose(program(grey), expected, rtol=1e-5, atol=1e-5)


@needs_extra
def test_instructions_are_those_that_the_core_carries_out():
    """Counted by runs here; by single instructions there, which a core without conditional ones must agree with."""
    import unicorn as uc

    source, grey, _ = cnn()
    program, single = cross_compile(source, "Cortex-M0"), [0]
    make = program._core

    def counting():
        core, arm = make()
        core.hook_add(uc.UC_HOOK_CODE, lambda *_: single.__setitem__(0, single[0] + 1))
        return core, arm

    program._core = counting
    assert program.measure(grey[:1]).instructions == single[0] > 1000
    assert program.measure(grey[:1], count=False).instructions is None


@needs_extra
def test_ram_is_variables_and_the_deepest_stack_and_constants_are_flash():
    program, images = cross_compile(ADD, "Cortex-M4"), np.array([[1, 2], [3, 4]], np.uint8)
    cost = program.measure(images)
    assert program(images).tolist() == [[3], [7]]
    assert 200 <= cost.stack <= 240
    assert cost.ram == 100 + cost.stack
    assert 40 < cost.flash < 400
    table = "static const uint8_t big[5000] = {1, 2, 3};\nvoid predict"
    larger = cross_compile(ADD.replace("void predict", table).replace("local[7]", "big[image[1]]"), "Cortex-M4")
    assert 4940 < larger.flash - program.flash < 5060


@needs_extra
def test_a_stack_without_end_and_the_compilers_words_are_told():
    endless = ADD.replace("local[200]", "local[90000]").replace("i < 200", "i < 90000")
    with pytest.raises(BoardTooSmall, match="a stack of more than 65,536 bytes"):
        cross_compile(endless, "Cortex-M4")(np.zeros((1, 2), np.uint8))
    with pytest.raises(CompilerError, match=r"refuses the source(.|\n)*nonsense"):
        cross_compile(ADD.replace("scores[0]", "nonsense[0]"))


def test_a_board_says_what_it_lacks():
    sizes = [(board.flash // 1024, board.ram // 1024, board.megahertz) for board in BOARDS]
    assert sizes == [(32, 4, 48), (256, 16, 16), (1024, 128, 168)]
    small = BOARDS[0]
    small.check(Cost(flash=32 * 1024, ram=4 * 1024, stack=0, instructions=None))
    with pytest.raises(BoardTooSmall, match=r"54,488 bytes of flash are needed, the NUCLEO-F031K6 has 32,768$"):
        small.check(Cost(flash=54_488, ram=100, stack=0, instructions=1))
    with pytest.raises(BoardTooSmall, match=r"flash.*; 6,272 bytes of RAM are needed"):
        small.check(Cost(flash=92_728, ram=6_272, stack=0, instructions=1))


def test_an_unknown_core_and_a_missing_package_are_named(monkeypatch):
    with pytest.raises(ValueError, match="one of Cortex-M0, Cortex-M4, Cortex-M4F; got 'Z80'"):
        cross_compile(ADD, "Z80")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert microcontroller.missing_packages() == ["ziglang", "unicorn"]
    with pytest.raises(CompilerError, match="pip install ziglang unicorn"):
        cross_compile(ADD)
