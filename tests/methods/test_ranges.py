"""Calibration against NumPy and a brute-force search."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from course_lib.methods.quantization import choose_qparams, fake_quantize, qparams_from_range
from course_lib.methods.ranges import METHODS, calibrate, record_inputs


@pytest.fixture
def skewed():
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)).relu()
    x[17] = 40.0
    return x


@pytest.mark.parametrize("symmetric", [True, False])
def test_minmax_equals_choose_qparams(skewed, symmetric):
    ours, reference = calibrate(skewed, 8, symmetric=symmetric), choose_qparams(skewed, 8, symmetric=symmetric)
    assert torch.equal(ours.scale, reference.scale)
    assert torch.equal(ours.zero_point, reference.zero_point)


def test_percentile_is_a_quantile_at_both_ends():
    x = torch.randn(10_001, generator=torch.Generator().manual_seed(3))
    q = calibrate(x, 8, method="percentile", percentile=99)
    low, high = np.quantile(x.numpy(), [0.005, 0.995])
    assert q.scale.item() == pytest.approx((high - low) / 255, rel=0.01)
    everything = calibrate(x, 8, method="percentile", percentile=100)
    assert torch.equal(everything.scale, calibrate(x, 8).scale)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_search_finds_the_least_error_of_all_candidates(skewed, bits):
    def error(q):
        return (fake_quantize(skewed, q) - skewed).square().mean().item()

    brute = min(error(qparams_from_range(0.0, 40.0 * k / 64, bits, symmetric=False)) for k in range(1, 65))
    found = error(calibrate(skewed, bits, method="mse"))
    assert found == pytest.approx(brute, rel=1e-4)
    assert found <= error(calibrate(skewed, bits))


def test_the_search_on_a_large_tensor_looks_at_a_sample():
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    small, large = calibrate(x[:30_000], 4, method="mse"), calibrate(x, 4, method="mse")
    assert large.scale.item() == pytest.approx(small.scale.item(), rel=0.1)


def test_several_tensors_are_one_sample(skewed):
    joined, parts = calibrate(skewed), calibrate([skewed[:9].reshape(3, 3), skewed[9:], skewed[:0]])
    assert torch.equal(joined.scale, parts.scale)


@pytest.mark.parametrize("empty", [[], torch.ones(0), [torch.ones(0), torch.ones(3, 0)]])
@pytest.mark.parametrize("method", METHODS)
def test_empty_calibration(empty, method):
    with pytest.raises(ValueError, match="calibration is empty"):
        calibrate(empty, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_bad_values_and_constants(method):
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            calibrate(torch.tensor([1.0, bad]), method=method)
    for value in (0.0, 5.0, -5.0):
        x = torch.full((9,), value)
        torch.testing.assert_close(fake_quantize(x, calibrate(x, method=method)), x)


def test_bad_options():
    x = torch.ones(4)
    for options, text in (
        ({"method": "entropy"}, "unknown calibration method 'entropy'"),
        ({"bits": 9}, "from 2 to 8"),
        ({"percentile": 0}, "percentile must be above 0"),
        ({"percentile": 101}, "percentile must be above 0"),
        ({"candidates": 1}, "at least 2"),
        ({"candidates": 2.5}, "integer of at least 2"),
        ({"percentile": math.nan}, "percentile must be above 0"),
    ):
        with pytest.raises(ValueError, match=text):
            calibrate(x, **options)
    for samples, text in ((torch.tensor([1, 2]), "floating-point"), (None, "got NoneType"), ([1.0], "got float")):
        with pytest.raises(TypeError, match=text):
            calibrate(samples)


def test_recorded_inputs_are_what_the_layers_saw():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Dropout(0.9), nn.Linear(3, 2)).train()
    x = torch.randn(7, 4)
    seen = record_inputs(model, x, batch_size=3)
    assert list(seen) == ["0", "3"]
    assert torch.equal(seen["0"], x)
    torch.testing.assert_close(seen["3"], model[0](x).relu().detach())
    assert model.training
    assert model[2].training
    assert not model[0]._forward_pre_hooks


def test_recording_refuses_what_it_cannot_record():
    with pytest.raises(ValueError, match="no linear or convolution layer"):
        record_inputs(nn.ReLU(), torch.ones(2, 2))
    with pytest.raises(ValueError, match="images is empty"):
        record_inputs(nn.Linear(2, 2), torch.ones(0, 2))
