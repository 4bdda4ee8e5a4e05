"""Integer arithmetic against the same layers computed in float64 on the dequantized numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from course_lib.methods.integer import (
    fixed_point,
    integer_conv2d,
    integer_layer,
    integer_linear,
    integer_max_pool2d,
    quantize_bias,
    requantize,
)
from course_lib.methods.quantization import QuantParams, choose_qparams, dequantize, qparams_from_range, quantize

SEED, MAGNITUDE, OFFSET = st.integers(0, 2**31), st.floats(-4, 4), st.floats(-2, 2)


def draw(shape, seed, magnitude, offset):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + offset) * 10.0**magnitude


def on_grids(x, w, b, bits, per_channel, asymmetric_weight):
    x_q = choose_qparams(x, bits, symmetric=False)
    w_q = choose_qparams(w, bits, symmetric=not asymmetric_weight, axis=0 if per_channel else None)
    return x_q, quantize(x, x_q), w_q, quantize(w, w_q), quantize_bias(b, x_q, w_q)


def expected(y, y_q):
    """Float64 outputs on the output's integers, by the definition."""
    return (torch.round(y / y_q.scale.double()) + y_q.zero_point).clamp(y_q.qmin, y_q.qmax)


def real_bias(bias, x_q, w_q):
    return bias.double() * x_q.scale.double() * w_q.scale.double()


@settings(max_examples=80, deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 70), st.integers(1, 9)), SEED, MAGNITUDE, MAGNITUDE, OFFSET,
    st.sampled_from([4, 8]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_linear_is_within_one_step(shape, seed, mx, mw, offset, bits, per_channel, asymmetric):
    n, i, o = shape
    x, w = draw((n, i), seed, mx, offset), draw((o, i), seed + 1, mw, 0)
    b = draw((o,), seed + 2, mx + mw, 0)
    x_q, xq, w_q, wq, bq = on_grids(x, w, b, bits, per_channel, asymmetric)
    y = F.linear(dequantize(xq, x_q).double(), dequantize(wq, w_q).double(), real_bias(bq, x_q, w_q))
    y_q = choose_qparams(y.float(), 8, symmetric=False)
    yq = integer_linear(xq, x_q, wq, w_q, bq, y_q)
    assert yq.dtype == torch.uint8
    assert (yq.double() - expected(y, y_q)).abs().max() <= 1


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(3, 7), st.integers(3, 7)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)), st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(st.integers(0, 1), st.integers(0, 2)), SEED, MAGNITUDE, OFFSET, st.booleans(),
)  # fmt: skip
def test_conv_is_within_one_step(shape, kernel, stride, padding, seed, magnitude, offset, per_channel):
    n, c, o, h, w_ = shape
    x, w = draw((n, c, h, w_), seed, magnitude, offset), draw((o, c, *kernel), seed + 1, 0, 0)
    b = draw((o,), seed + 2, magnitude, 0)
    x_q, xq, w_q, wq, bq = on_grids(x, w, b, 8, per_channel, False)
    weight = dequantize(wq, w_q).double()
    y = F.conv2d(dequantize(xq, x_q).double(), weight, real_bias(bq, x_q, w_q), stride=stride, padding=padding)
    y_q = choose_qparams(y.float(), 8, symmetric=False)
    yq = integer_conv2d(xq, x_q, wq, w_q, bq, y_q, stride=stride, padding=padding)
    assert yq.shape == y.shape
    assert (yq.double() - expected(y, y_q)).abs().max() <= 1


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-12, 1e6), st.integers(-(2**31) + 1, 2**31 - 1))
def test_fixed_point_and_requantize(real, accumulator):
    factor = fixed_point(torch.tensor(real, dtype=torch.float64))
    assert 2**30 <= factor.multiplier <= 2**31
    if factor.shift < 62:
        assert factor.multiplier.item() * 2.0 ** -factor.shift.item() == pytest.approx(real, rel=2.0**-30)
    q = QuantParams(scale=1.0, zero_point=3, qmin=0, qmax=255)
    got = requantize(torch.tensor([accumulator], dtype=torch.int32), factor, q).item()
    assert abs(got - min(max(round(accumulator * real) + 3, 0), 255)) <= 1


def test_fixed_point_refuses_what_it_cannot_hold():
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive and finite"):
            fixed_point(torch.tensor(bad))
    with pytest.raises(ValueError, match="too large"):
        fixed_point(torch.tensor(1e10))
    with pytest.raises(TypeError, match=r"accumulator must hold integers, got torch\.float32"):
        requantize(torch.tensor([1.5]), fixed_point(torch.tensor(0.5)), QuantParams(1.0, 0, -7, 7))
    almost_one = fixed_point(torch.tensor(1 - 2.0**-40, dtype=torch.float64))
    assert almost_one.multiplier == 2**30
    assert almost_one.shift == 30


def test_no_bias_and_shapes_that_do_not_fit():
    q = QuantParams(scale=0.1, zero_point=0, qmin=-127, qmax=127)
    x, w = torch.ones(2, 3, dtype=torch.int8), torch.ones(4, 3, dtype=torch.int8)
    assert integer_linear(x, q, w, q, None, q).shape == (2, 4)
    image, kernel = torch.ones(1, 2, 4, 4, dtype=torch.int8), torch.ones(3, 2, 3, 3, dtype=torch.int8)
    assert integer_conv2d(image, q, kernel, q, None, q).shape == (1, 3, 2, 2)
    per_input = QuantParams(scale=torch.ones(3), zero_point=0, qmin=-127, qmax=127, axis=1)
    for call, text in (
        (lambda: integer_linear(x, q, w[:, :2], q, None, q), r"inputs \[N, I\] and weights \[O, I\]"),
        (lambda: integer_linear(x, per_input, w, q, None, q), "need one scale"),
        (lambda: integer_conv2d(image, q, kernel[:, :1], q, None, q), r"inputs \[N, C, H, W\]"),
        (lambda: integer_conv2d(image[..., :2], q, kernel, q, None, q), "does not fit into"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(TypeError, match="xq must be a tensor of integers"):
        integer_linear(x.float(), q, w, q, None, q)
    with pytest.raises(TypeError, match="wq must be a tensor of integers"):
        integer_linear(x, q, w.float(), q, None, q)


def test_sums_that_int32_might_not_hold():
    q = QuantParams(scale=0.1, zero_point=0, qmin=-127, qmax=127)
    x = torch.ones(1, 140_000, dtype=torch.int8)
    with pytest.raises(ValueError, match="more than int32 holds"):
        integer_linear(x, q, x, q, None, q)
    with pytest.raises(ValueError, match="steps of the accumulator"):
        quantize_bias(torch.tensor([1e9]), q, q)


def test_max_pooling_keeps_the_order():
    x = torch.randn(2, 3, 6, 7)
    q = choose_qparams(x, 8)
    pooled = integer_max_pool2d(quantize(x, q), (2, 3), (2, 2), (1, 1))
    torch.testing.assert_close(
        dequantize(pooled, q), F.max_pool2d(dequantize(quantize(x, q), q), (2, 3), (2, 2), (1, 1))
    )


def test_a_layer_with_relu_clips_at_the_zero_point():
    layer, x = nn.Conv2d(2, 4, 3, padding=1, bias=False), torch.randn(3, 2, 5, 5)
    x_q, y_q = choose_qparams(x, 8, symmetric=False), qparams_from_range(-2.0, 2.0, 8, symmetric=False)
    yq = integer_layer(layer, x_q, y_q, relu=True, per_channel=False)(quantize(x, x_q))
    assert int(yq.min()) == int(y_q.zero_point)
    torch.testing.assert_close(dequantize(yq, y_q), layer(x).relu().clamp(max=2), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(2, 2, 3, dilation=2), nn.Conv2d(2, 2, 3, padding="same")],
)
def test_convolutions_without_an_integer_version(layer):
    q = QuantParams(scale=0.1, zero_point=0, qmin=-127, qmax=127)
    with pytest.raises(ValueError, match="is not supported"):
        integer_layer(layer, q, q)
