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

NETS = {
    "mlp": (nn.Flatten(), nn.Linear(2 * 6 * 5, 12), nn.ReLU(), nn.Linear(12, 7)),
    "cnn": (
        nn.Conv2d(2, 6, (3, 3), padding=(1, 1)), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(6, 4, (1, 2)), nn.ReLU(),
        nn.MaxPool2d(3, 1, 1), nn.Flatten(), nn.Linear(12, 7),
    ),
}  # fmt: skip


@pytest.fixture(params=NETS)
def case(request, tmp_path):
    """A network in integers, its file, and images [N, 2, 6, 5]."""
    torch.manual_seed(0)
    net, images = nn.Sequential(*NETS[request.param]), torch.randn(2000, 2, 6, 5)
    for layer in net:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    network = integer_network(net, images[:100])
    return network, write_tflite(network, tmp_path / "net.tflite", (2, 6, 5)), images


def ours(network, images):
    return network.scores(images).numpy().astype(int)


def theirs(network, path, images, resolver="AUTO"):
    """What LiteRT answers, as our unsigned integers."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    engine = Interpreter(str(path), num_threads=1, experimental_op_resolver_type=OpResolverType[resolver])
    given, answer = engine.get_input_details()[0], engine.get_output_details()[0]
    for details, grid in ((given, network.x_q), (answer, network.y_q)):
        assert details["quantization"] == (grid.scale.item(), grid.zero_point.item() - 128)
    engine.resize_tensor_input(given["index"], (len(images), 6, 5, 2))
    engine.allocate_tensors()
    xq = (quantize(images, network.x_q).int() - 128).to(torch.int8)
    engine.set_tensor(given["index"], xq.movedim(1, 3).contiguous().numpy())
    engine.invoke()
    return engine.get_tensor(answer["index"]).astype(int) + 128


def test_the_engine_computes_the_same_integers_from_one_byte_a_weight(case):
    network, path, images = case
    # Its float32 factors may turn a tie the other way, and no more.
    gap = np.abs(theirs(network, path, images) - ours(network, images))
    assert gap.max() <= 1
    assert (gap > 0).mean() < 1e-3
    weights = sum(step.weight.numel() for _, step in network.steps if isinstance(step, integer.IntegerLayer))
    assert weights < path.stat().st_size < 4000


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors have other kernels")
def test_the_built_in_kernels_round_twice(case, monkeypatch):
    """The high word of the product, rounded, then the rest of the shift, rounded: with that, not one score differs."""
    network, path, images = case

    def round_twice(accumulator, factor, q):
        left, right = (31 - factor.shift).clamp(min=0), (factor.shift - 31).clamp(min=0)
        high = ((accumulator.long() << left) * factor.multiplier + 2**30) >> 31
        y = (high + (torch.ones_like(right) << right >> 1)) >> right
        return (y + q.zero_point).clamp(q.qmin, q.qmax).to(q.dtype)

    found = theirs(network, path, images, "BUILTIN_WITHOUT_DEFAULT_DELEGATES")
    assert 0 < (found != ours(network, images)).mean() < 0.2
    monkeypatch.setattr(integer, "requantize", round_twice)
    np.testing.assert_array_equal(found, ours(network, images))


@pytest.mark.parametrize(("stride", "border"), [(2, 1), (1, 2)])
def test_a_border_that_the_engine_has_not(stride, border, tmp_path):
    layer = nn.Conv2d(1, 2, 3, stride=stride, padding=border)
    network = integer_network(nn.Sequential(layer, nn.Flatten()), torch.randn(9, 1, 8, 8))
    with pytest.raises(UnsupportedModel, match=f"border of .{border}, {border}. around 8×8 cannot be written"):
        write_tflite(network, tmp_path / "x.tflite", (1, 8, 8))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written(tmp_path):
    network = integer_network(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), torch.randn(9, 1, 8, 8))
    with pytest.raises(ValueError, match=r"does not take images of shape \(1, 8, 9\)"):
        write_tflite(network, tmp_path / "x.tflite", (1, 8, 9))
    foreign = IntegerNetwork((*network.steps, ("soft", torch.nn.Identity())), network.x_q, network.y_q)
    with pytest.raises(UnsupportedModel, match=r"'soft' .* cannot be written: linear"):
        write_tflite(foreign, tmp_path / "x.tflite", (1, 8, 8))
    with pytest.raises(OSError, match="nowhere"):
        write_tflite(network, tmp_path / "nowhere" / "x.tflite", (1, 8, 8))
    assert not list(tmp_path.iterdir())
