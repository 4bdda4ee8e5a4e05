"""The C of a network as WebAssembly: the same integers, and what is said where something is missing."""

import numpy as np
import pytest
import torch
from torch import nn

from course_lib.lab import wasm
from course_lib.lab.compile import CompilerError
from course_lib.methods.c_source import c_source, pixel_table
from course_lib.methods.integer import integer_network

pytest.importorskip("ziglang", reason="ziglang is not installed")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 5))
    return integer_network(net, torch.randn(100, 2, 4, 4))


@pytest.fixture(scope="module")
def source(network):
    return c_source(network, (2, 4, 4), pixel_table(network.x_q, [0.5, 0.4], [0.2, 0.3], 9))


def test_it_computes_the_networks_integers(network, source):
    pytest.importorskip("wasmtime", reason="wasmtime is not installed")
    module = wasm.compile_wasm(source)
    assert module[:8] == b"\0asm\x01\0\0\0"
    levels = np.random.default_rng(0).integers(0, 9, (300, 2, 4, 4), dtype=np.uint8)
    mean, std = torch.tensor([0.5, 0.4]).view(2, 1, 1), torch.tensor([0.2, 0.3]).view(2, 1, 1)
    expected = network.scores((torch.from_numpy(levels) / 8 - mean) / std)
    run = wasm.load_wasm(module, source)
    np.testing.assert_array_equal(run(levels), expected)
    with pytest.raises(ValueError, match="pixels must be from 0 to 8, got 9"):
        run(levels + 1)


def test_a_compiler_that_refuses_or_is_missing(source, monkeypatch):
    with pytest.raises(CompilerError, match="undeclared identifier"):
        wasm.compile_wasm(source.replace("int32_t sum", "int32_t sun"))
    monkeypatch.setattr(wasm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CompilerError, match="wasm needs the package ziglang: pip install ziglang"):
        wasm.compile_wasm(source)
