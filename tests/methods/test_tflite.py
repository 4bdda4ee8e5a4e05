"""``.tflite`` files: what LiteRT computes from them, integer for integer, and what is refused."""

import platform

import numpy as np
import pytest
import torch
from torch import nn

from course_lib.gate import UnsupportedModel
from course_lib.methods import integer
from course_lib.methods.integer import IntegerNetwork, integer_network
from course_lib.methods.quantization import quantize
from course_lib.methods.tflite import write_tflite

pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed")


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(2 * 6 * 5, 12), nn.ReLU(), nn.Linear(12, 7))


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 6, (3, 3), padding=(1, 1)), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(6, 4, (1, 2)), nn.ReLU(),
        nn.MaxPool2d(3, 1, 1), nn.Flatten(), nn.Linear(12, 7),
    )  # fmt: skip


@pytest.fixture(params=[mlp, cnn])
def case(request, tmp_path):
    """A network in integers, its file, images in integers [N, C, H, W], and its integer scores [N, 7]."""
    torch.manual_seed(0)
    net, images = request.param().eval(), torch.randn(2000, 2, 6, 5)
    network = integer_network(net, images[:100])
    return network, write_tflite(network, tmp_path / "net.tflite", (2, 6, 5)), quantize(images, network.x_q)


def scores(network, xq):
    for _, step in network.steps:
        xq = step(xq)
    return xq.numpy().astype(int)


def run(path, xq, resolver="AUTO"):
    """What LiteRT answers, as our unsigned integers."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    engine = Interpreter(str(path), num_threads=1, experimental_op_resolver_type=OpResolverType[resolver])
    images, answer = engine.get_input_details()[0]["index"], engine.get_output_details()[0]["index"]
    engine.resize_tensor_input(images, (len(xq), 6, 5, 2))
    engine.allocate_tensors()
    engine.set_tensor(images, (xq.int() - 128).to(torch.int8).movedim(1, 3).contiguous().numpy())
    engine.invoke()
    return engine.get_tensor(answer).astype(int) + 128


def test_the_engine_computes_the_same_integers(case):
    network, path, xq = case
    # Its float32 factors may turn a tie the other way, and no more.
    gap = np.abs(run(path, xq) - scores(network, xq))
    assert gap.max() <= 1
    assert (gap > 0).mean() < 1e-3


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors have other kernels")
def test_the_built_in_kernels_round_twice(case, monkeypatch):
    """The high word of the product, rounded, then the rest of the shift, rounded: with that, not one score differs."""
    network, path, xq = case

    def round_twice(accumulator, factor, q):
        left, right = (31 - factor.shift).clamp(min=0), (factor.shift - 31).clamp(min=0)
        high = ((accumulator.long() << left) * factor.multiplier + 2**30) >> 31
        y = (high + (torch.ones_like(right) << right >> 1)) >> right
        return (y + q.zero_point).clamp(q.qmin, q.qmax).to(q.dtype)

    theirs = run(path, xq, "BUILTIN_WITHOUT_DEFAULT_DELEGATES")
    assert 0 < (theirs != scores(network, xq)).mean() < 0.2
    monkeypatch.setattr(integer, "requantize", round_twice)
    np.testing.assert_array_equal(theirs, scores(network, xq))


def test_the_file_holds_one_byte_a_weight_and_says_its_grids(case):
    from ai_edge_litert.interpreter import Interpreter

    network, path, _ = case
    layers = [step for _, step in network.steps if isinstance(step, integer.IntegerLayer)]
    data = path.read_bytes()
    assert data[4:8] == b"TFL3"
    assert sum(len(x.weight.flatten()) for x in layers) < len(data) < 4000
    engine = Interpreter(str(path))
    for details, grid in ((engine.get_input_details()[0], network.x_q), (engine.get_output_details()[0], network.y_q)):
        assert details["quantization"] == (grid.scale.item(), grid.zero_point.item() - 128)


@pytest.mark.parametrize(
    ("net", "text"),
    [
        (nn.Conv2d(1, 2, 3, stride=2, padding=1), "border of .1, 1. around 8×8 cannot be written"),
        (nn.Conv2d(1, 2, 3, padding=2), "border of .2, 2. around 8×8"),
    ],
)
def test_a_border_that_the_engine_has_not(net, text, tmp_path):
    network = integer_network(nn.Sequential(net, nn.Flatten()), torch.randn(9, 1, 8, 8))
    with pytest.raises(UnsupportedModel, match=text):
        write_tflite(network, tmp_path / "x.tflite", (1, 8, 8))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written(tmp_path):
    network = integer_network(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), torch.randn(9, 1, 8, 8))
    with pytest.raises(ValueError, match=r"does not take images of shape \(1, 8, 9\)"):
        write_tflite(network, tmp_path / "x.tflite", (1, 8, 9))
    foreign = IntegerNetwork((*network.steps, ("soft", torch.nn.Identity())), network.x_q, network.y_q)
    with pytest.raises(UnsupportedModel, match=r"'soft' .* cannot be written: linear"):
        write_tflite(foreign, tmp_path / "x.tflite", (1, 8, 8))
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="nowhere"):
        write_tflite(network, tmp_path / "nowhere" / "x.tflite", (1, 8, 8))
