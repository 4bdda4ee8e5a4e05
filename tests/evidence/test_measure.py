import time

import numpy as np
import pytest
import torch
from torch import nn

from course_lib.evidence.measure import (  # isort: skip
    Latency, LatencyTable, compare_latency, count_macs, count_parameters, export_onnx, onnx_session, sparsity,
    stored_bytes,
)  # fmt: skip
from course_lib.gate import UnsupportedModel
from course_lib.lab.models import build_model


def test_parameters_shared_once_and_nonzero():
    layer = nn.Linear(4, 4)
    twice = nn.Sequential(layer, layer)
    assert count_parameters(twice) == 20
    layer.weight.data[0] = 0
    assert count_parameters(layer, nonzero=True) == 20 - 4 - int((layer.bias == 0).sum())


def test_sparsity_is_of_weights_not_of_biases():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    nn.init.zeros_(model[0].bias)
    assert sparsity(model) == 0
    model[0].weight.data.zero_()
    assert sparsity(model) == pytest.approx(20 / 30)
    with pytest.raises(ValueError, match="no weight"):
        sparsity(nn.ReLU())


def brute_force_macs(model, shape):
    macs = []

    def hook(layer, inputs, output):
        macs.append(output[0].numel() * layer.weight[0].numel())

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    model.eval()(torch.zeros(1, *shape))
    for handle in handles:
        handle.remove()
    return sum(macs)


GROUPS = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, groups=2), nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (build_model("lenet5", (1, 12, 10), 10, seed=0), (1, 12, 10)),
        (build_model("cnn_teacher", (1, 12, 10), 10, seed=0), (1, 12, 10)),
        (GROUPS, (4, 16, 16)),
    ],
)
def test_macs_by_brute_force_and_counting_changes_nothing(model, shape):
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = count_macs(model, shape)
    assert model.training
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert found == brute_force_macs(model, shape)


def test_macs_of_a_transformer_are_not_lost_on_the_fast_path():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    before = torch.backends.mha.get_fastpath_enabled()
    projections = 5 * (4 * 16 * 16 + 2 * 16 * 32)
    attention = 2 * 5 * 5 * 16
    assert count_macs(layer, (5, 16)) == projections + attention
    assert torch.backends.mha.get_fastpath_enabled() == before


class Net(nn.Module):
    def __init__(self, forward, **parts):
        super().__init__()
        self.weight, self.vector = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
        self.compute = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.compute(self, x)


def recurrent(kind, **options):
    return Net(lambda net, x: net.rnn(x)[0], rnn=kind(8, 16, batch_first=True, **options))


@pytest.mark.parametrize(
    ("model", "shape", "by_hand"),
    [
        (recurrent(nn.LSTM), (10, 8), 10 * 4 * (8 + 16) * 16),
        (recurrent(nn.LSTM, num_layers=2, bidirectional=True), (10, 8), 2 * 10 * 4 * 16 * ((8 + 16) + (32 + 16))),
        (recurrent(nn.GRU), (10, 8), 10 * 3 * (8 + 16) * 16),
        (recurrent(nn.RNN), (10, 8), 10 * (8 + 16) * 16),
        (nn.LSTMCell(8, 16), (8,), 4 * (8 + 16) * 16),
        (Net(lambda net, x: net.pair(x, x), pair=nn.Bilinear(4, 4, 5)), (4,), 80),
        (Net(lambda net, x: net.pair(x, x), pair=nn.Bilinear(4, 4, 5)), (3, 4), 240),
        (Net(lambda net, x: torch.einsum("bi,ij,bj->b", x, net.weight, x)), (4,), 16 + 4),
        (nn.ConvTranspose2d(2, 3, 3), (2, 5, 5), 25 * 2 * 3 * 9),
        (nn.Conv1d(2, 3, 3), (2, 5), 3 * 2 * 3 * 3),
        (nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2)), torch.zeros(3, 5, dtype=torch.long), 5 * 8),
        (nn.Linear(8, 2).half(), np.array([8]), 16),
        (nn.Linear(8, 2), (np.int64(8),), 16),
        (torch.compile(nn.Linear(8, 2)), (8,), 16),
        (nn.ReLU(), (4,), 0),
        (Net(lambda net, x: torch.mv(net.weight, x[0])), (4,), 16),
        (Net(lambda net, x: x @ nn.functional.normalize(net.vector, dim=0)), (4,), 4),  # a weight that is computed
        (Net(lambda net, x: torch.dot(net.vector, x[0])), (4,), 4),
        # Element-wise work, looking up and joining are no multiply-accumulates, also where a parameter takes part.
        (Net(lambda net, x: torch.cat([x * net.vector, net.weight])), (4,), 0),
        (nn.Sequential(nn.PReLU(4), nn.LayerNorm((4, 4)), nn.BatchNorm1d(4), nn.GroupNorm(2, 4)), (4, 4), 0),
    ],
)
def test_macs_by_hand(model, shape, by_hand):
    assert count_macs(model, shape) == by_hand
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize(
    ("forward", "operator", "weight"),
    [
        (lambda net, x: torch.cdist(x, net.weight), "aten::_cdist_forward", "weight"),
    ],
)
def test_an_operator_that_nobody_counts_is_refused_by_name(forward, operator, weight):
    with pytest.raises(UnsupportedModel, match=f"{operator}, which applies {weight}"):
        count_macs(Net(forward), (4,))
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((), "input_shape must be"),
        ((0, 8, 8), "input_shape must be"),
        ((1, 8.0, 8), "input_shape must be"),
        ((5,), r"does not take an input of shape \(1, 5\)"),
    ],
)
def test_bad_shapes_are_named(shape, text):
    with pytest.raises((TypeError, ValueError), match=text):
        count_macs(nn.Linear(4, 2), shape)


def test_bytes_of_zeros_halves_shared_and_empty(monkeypatch):
    import safetensors.torch

    model = nn.Linear(100, 100)
    full = stored_bytes(model)
    assert full == len(safetensors.torch.save(model.state_dict()))
    for value in (0.0, float("nan")):
        nn.init.constant_(model.weight, value)
        assert stored_bytes(model) == full
    assert stored_bytes(nn.Sequential(model, nn.ReLU(), model)) < 1.05 * full
    assert stored_bytes(model.half()) < 0.55 * full
    assert stored_bytes(nn.ReLU()) > 0
    real = safetensors.torch.load_file
    monkeypatch.setattr(safetensors.torch, "load_file", lambda p: {n: t + 1 for n, t in real(p).items()})
    with pytest.raises(RuntimeError, match="was not read back"):
        stored_bytes(nn.Linear(2, 2))


# Latency

EXAMPLE = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    model = build_model("cnn_teacher", (1, 8, 8), 10, seed=0)
    return model, export_onnx(model, EXAMPLE[:1], tmp_path_factory.mktemp("onnx") / "m.onnx")


def test_the_exported_network_gives_the_same_logits_at_any_batch(teacher_file):
    model, path = teacher_file
    assert model.training
    session = onnx_session(path)
    for images in (EXAMPLE, EXAMPLE[:1]):
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        np.testing.assert_allclose(logits, model.eval()(images).detach().numpy(), rtol=1e-4, atol=1e-5)
    model.train()
    assert [p.name for p in path.parent.iterdir()] == ["m.onnx"]


def test_a_slower_variant_is_seen_as_slower(teacher_file):
    _, path = teacher_file
    threads = torch.get_num_threads()
    variants = {"small": nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "file": path}
    table = compare_latency(variants, EXAMPLE, rounds=3, warmup=1, sample_seconds=0.001)
    assert list(table) == ["small", "file"]
    assert table.ratio("file", "small").mean > 3
    assert torch.get_num_threads() == threads


def test_variants_are_timed_in_turn():
    calls = []
    variants = {name: (lambda x, name=name: calls.append(name) or time.sleep(0.002)) for name in "ab"}
    compare_latency(variants, EXAMPLE, rounds=4, warmup=0, sample_seconds=1e-9)
    assert "".join(calls[-8:]) == "abbaabba"


def test_three_rounds_are_for_warmth_and_fifteen_count_on_one_thread():
    threads = []
    table = compare_latency({"a": lambda x: threads.append(torch.get_num_threads())}, EXAMPLE, sample_seconds=1e-9)
    assert len(table["a"].samples) == 15
    assert threads == [1] * (4 + 3 + 15)  # four calls find out how long one takes
    calls = []
    variants = {"a": lambda x: calls.append(0) or time.sleep(0.001)}
    compare_latency(variants, EXAMPLE, rounds=2, warmup=0, sample_seconds=0.02)
    assert 4 + 2 * 2 < len(calls) <= 4 + 2 * 20  # as often in a row as fills 20 ms


def test_figures():
    table = LatencyTable(a=Latency((2.0, 4.0, 8.0)), b=Latency((1.0, 2.0, 4.0)))
    assert table["a"].median == 4.0
    assert table.ratio("a", "b") > 1.9
    assert table.ratio("a", "b").unit == "×"
    uneven = LatencyTable(a=Latency((1.0, 4.0)), b=Latency((1.0, 1.0))).ratio("a", "b")
    assert uneven.mean == pytest.approx(2.0)  # the geometric mean
    assert uneven.low * uneven.high == pytest.approx(4.0)
    assert uneven.n == 2
    assert str(table["b"]) == "2,000,000 µs (1,500,000–3,000,000)"
    with pytest.raises(KeyError, match="no variant 'c'; measured were a, b"):
        table.ratio("a", "c")


def test_bad_input_is_named(tmp_path):
    for variants, options, error, text in (
        ({}, {}, ValueError, "variants is empty"),
        ({"gone": tmp_path / "gone.onnx"}, {}, ValueError, "gone: there is no file"),
        ({"three": 3}, {}, TypeError, "three: cannot time a int"),
        ({"a": len}, {"rounds": 1}, ValueError, "rounds must be an integer of at least 2"),
        ({"a": len}, {"warmup": -1}, ValueError, "warmup must be"),
        ({"a": len}, {"threads": 0}, ValueError, "threads must be"),
    ):
        with pytest.raises(error, match=text):
            compare_latency(variants, EXAMPLE, **options)
