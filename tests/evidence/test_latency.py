import time

import numpy as np
import pytest
import torch
from torch import nn

from course_lib.evidence.latency import Latency, LatencyTable, compare_latency, export_onnx, onnx_session
from course_lib.lab.models import build_model

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
    table = compare_latency(
        {"small": nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "file": path},
        EXAMPLE,
        rounds=3,
        warmup=1,
        sample_seconds=0.001,
    )
    assert list(table) == ["small", "file"]
    ratio = table.ratio("file", "small")
    assert ratio.mean > 3
    assert ratio.low <= ratio.mean <= ratio.high
    assert torch.get_num_threads() == threads


def test_variants_are_timed_in_turn():
    calls = []
    variants = {name: (lambda x, name=name: calls.append(name) or time.sleep(0.002)) for name in "ab"}
    compare_latency(variants, EXAMPLE, rounds=4, warmup=0, sample_seconds=1e-9)
    assert "".join(calls[-8:]) == "abbaabba"


def test_figures():
    table = LatencyTable(a=Latency((2.0, 4.0, 8.0)), b=Latency((1.0, 2.0, 4.0)))
    assert table["a"].median == 4.0
    assert table["a"].quartiles == (3.0, 6.0)
    assert table.ratio("a", "b").mean == pytest.approx(2.0)
    assert str(table["b"]) == "2,000,000 µs (1,500,000–3,000,000)"
    with pytest.raises(KeyError, match="no variant 'c'; measured were a, b"):
        table.ratio("a", "c")


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="variants is empty"):
        compare_latency({}, EXAMPLE)
    with pytest.raises(ValueError, match="rounds must be"):
        compare_latency({"a": len}, EXAMPLE, rounds=1)
    with pytest.raises(ValueError, match="gone: there is no file"):
        compare_latency({"gone": tmp_path / "gone.onnx"}, EXAMPLE)
    with pytest.raises(TypeError, match="three: cannot time a int"):
        compare_latency({"three": 3}, EXAMPLE)
