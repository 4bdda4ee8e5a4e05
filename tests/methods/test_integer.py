"""Integer arithmetic against the same layers in float64 on the dequantized numbers, and whole networks."""

import math
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from course_lib.gate import UnsupportedModel

from course_lib.methods.integer import (  # isort: skip
    IntegerLayer, fixed_point, integer_conv2d, integer_layer, integer_linear,
    integer_max_pool2d, integer_network, quantize_bias, requantize,
)  # fmt: skip
from course_lib.methods.quantization import QuantParams, choose_qparams, dequantize, qparams_from_range, quantize
from course_lib.methods.quantized_layers import fake_quantized

SEED, MAGNITUDE, OFFSET = st.integers(0, 2**31), st.floats(-4, 4), st.floats(-2, 2)
Q = QuantParams(scale=0.1, zero_point=0, qmin=-127, qmax=127)


def draw(shape, seed, magnitude, offset):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + offset) * 10.0**magnitude


def assert_within_one_step(layer, float_layer, x, w, b, x_q, w_q):
    """``layer`` on integers against ``float_layer`` in float64 on what they stand for, rounded by the definition."""
    xq, wq, bq = quantize(x, x_q), quantize(w, w_q), quantize_bias(b, x_q, w_q)
    bias = bq.double() * x_q.scale.double() * w_q.scale.double()
    inputs = dequantize(xq, x_q).double(), dequantize(wq, w_q).double(), bias
    y, largest = float_layer(*inputs), float_layer(*(part.abs() for part in inputs))
    y = torch.where(y.abs() > 1e-6 * largest, y, 0.0)  # dequantize ends in float32: of a sum that cancels noise is left
    y_q = choose_qparams(y.float(), 8, symmetric=False)
    expected = (torch.round(y / y_q.scale.double()) + y_q.zero_point).clamp(y_q.qmin, y_q.qmax)
    yq = layer(xq, x_q, wq, w_q, bq, y_q)
    assert (yq.dtype, yq.shape) == (torch.uint8, y.shape)
    assert (yq.double() - expected).abs().max() <= 1


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 70), st.integers(1, 9)), SEED, MAGNITUDE, MAGNITUDE, OFFSET,
    st.sampled_from([4, 8]), st.booleans(), st.booleans(),
)  # fmt: skip
@example((1, 39, 1), 15818, 0.0, 0.0, -1.625, 4, False, True)  # the sum is exactly 0
def test_linear_is_within_one_step(shape, seed, mx, mw, offset, bits, per_channel, asymmetric):
    n, i, o = shape
    x, w = draw((n, i), seed, mx, offset), draw((o, i), seed + 1, mw, 0)
    b = draw((o,), seed + 2, mx + mw, 0)
    x_q = choose_qparams(x, bits, symmetric=False)
    w_q = choose_qparams(w, bits, symmetric=not asymmetric, axis=0 if per_channel else None)
    assert_within_one_step(integer_linear, F.linear, x, w, b, x_q, w_q)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(3, 7), st.integers(3, 7)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)), st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(st.integers(0, 1), st.integers(0, 2)), SEED, MAGNITUDE, OFFSET, st.booleans(),
)  # fmt: skip
def test_conv_is_within_one_step(shape, kernel, stride, padding, seed, magnitude, offset, per_channel):
    n, c, o, h, w_ = shape
    x, w = draw((n, c, h, w_), seed, magnitude, offset), draw((o, c, *kernel), seed + 1, 0, 0)
    b = draw((o,), seed + 2, magnitude, 0)
    x_q, w_q = choose_qparams(x, 8, symmetric=False), choose_qparams(w, 8, axis=0 if per_channel else None)
    ours, theirs = (partial(f, stride=stride, padding=padding) for f in (integer_conv2d, F.conv2d))
    assert_within_one_step(ours, theirs, x, w, b, x_q, w_q)


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-12, 1e6), st.integers(-(2**31) + 1, 2**31 - 1))
def test_fixed_point_and_requantize(real, accumulator):
    factor = fixed_point(torch.tensor(real, dtype=torch.float64))
    assert 2**30 <= factor.multiplier < 2**31
    if factor.shift < 62:
        assert factor.multiplier.item() * 2.0 ** -factor.shift.item() == pytest.approx(real, rel=2.0**-30)
    q = QuantParams(scale=1.0, zero_point=3, qmin=0, qmax=255)
    got = requantize(torch.tensor([accumulator], dtype=torch.int32), factor, q).item()
    assert abs(got - min(max(round(accumulator * real) + 3, 0), 255)) <= 1


def test_requantize_by_hand():
    half, q = fixed_point(torch.tensor(0.5)), QuantParams(scale=1.0, zero_point=10, qmin=0, qmax=15)
    assert (half.multiplier, half.shift) == (2**30, 31)
    sums = torch.tensor([-5, -3, -1, 0, 1, 3, 5, 300])
    assert requantize(sums, half, q).tolist() == [8, 9, 10, 10, 11, 12, 13, 15]  # half up: -2.5 becomes -2
    largest = fixed_point(torch.tensor(2.0**31 - 2, dtype=torch.float64))
    assert (largest.multiplier, largest.shift) == (2**31 - 2, 0)
    assert requantize(torch.tensor([1]), largest, QuantParams(1.0, 0, -(2**31), 2**31 - 1)).item() == 2**31 - 2
    almost_one = fixed_point(torch.tensor(1 - 2.0**-40, dtype=torch.float64))
    assert (almost_one.multiplier, almost_one.shift) == (2**30, 30)
    assert fixed_point(torch.tensor(1e-30)).shift == 62
    for bad in (0.0, math.nan, 1e10):
        with pytest.raises(ValueError, match=r"above 0 and below 2\^31"):
            fixed_point(torch.tensor(bad))
    with pytest.raises(TypeError, match=r"accumulator must hold integers, got torch\.float32"):
        requantize(torch.tensor([1.5]), half, q)


def test_shapes_and_grids_that_do_not_fit():
    x, w = torch.ones(2, 3, dtype=torch.int8), torch.ones(4, 3, dtype=torch.int8)
    image, kernel = torch.ones(1, 2, 4, 4, dtype=torch.int8), torch.ones(3, 2, 3, 3, dtype=torch.int8)
    per_input = QuantParams(scale=torch.ones(3), zero_point=0, qmin=-127, qmax=127, axis=1)
    grouped = QuantParams(scale=torch.ones(4, 1), zero_point=0, qmin=-127, qmax=127, group=3)
    for call, error, text in (
        (lambda: integer_linear(x, Q, w[:, :2], Q, None, Q), ValueError, r"inputs \[N, I\] and weights \[O, I\]"),
        (lambda: integer_linear(x, per_input, w, Q, None, Q), ValueError, "need one scale"),
        (lambda: integer_linear(x, Q, w, grouped, None, Q), ValueError, "need one scale"),
        (lambda: integer_conv2d(image, Q, kernel[:, :1], Q, None, Q), ValueError, r"inputs \[N, C, H, W\]"),
        (lambda: integer_conv2d(image[..., :2], Q, kernel, Q, None, Q), ValueError, "does not fit into"),
        (lambda: quantize_bias(torch.tensor([math.nan]), Q, Q), ValueError, "bias has 1 NaN"),
        (lambda: integer_linear(x.float(), Q, w, Q, None, Q), TypeError, "xq must be a tensor of integers"),
        (lambda: integer_linear(x, Q, w.float(), Q, None, Q), TypeError, "wq must be a tensor of integers"),
    ):
        with pytest.raises(error, match=text):
            call()


def test_sums_that_int32_might_not_hold():
    fits = (2**31 - 1) // 127**2
    x = torch.ones(1, fits + 1, dtype=torch.int8)
    room = torch.tensor([2**31 - 1 - fits * 127**2], dtype=torch.int32)
    integer_linear(x[:, :fits], Q, x[:, :fits], Q, room, Q)
    with pytest.raises(ValueError, match="bias included"):
        integer_linear(x[:, :fits], Q, x[:, :fits], Q, room + 1, Q)
    with pytest.raises(ValueError, match="more than int32 holds"):
        integer_linear(x, Q, x, Q, None, Q)
    for zero_point, qmin, reach in ((100, 0, 155), (200, 0, 200), (50, -128, 178)):
        uneven = QuantParams(scale=0.1, zero_point=zero_point, qmin=qmin, qmax=qmin + 255)
        with pytest.raises(ValueError, match=f"{reach} × 127"):
            integer_linear(x.to(uneven.dtype), uneven, x, Q, None, Q)
    one, bias = QuantParams(1.0, 0, -7, 7), torch.tensor([2**31 - 1, 1 - 2**31], dtype=torch.float64)
    assert torch.equal(quantize_bias(bias, one, one), bias.int())
    with pytest.raises(ValueError, match="more than int32 holds"):
        quantize_bias(bias + 1, one, one)


def test_max_pooling_keeps_the_order():
    x = torch.randn(2, 3, 6, 7)
    q = choose_qparams(x, 8)
    pooled = integer_max_pool2d(quantize(x, q), (2, 3), (2, 2), (1, 1))
    reference = F.max_pool2d(dequantize(quantize(x, q), q), (2, 3), (2, 2), (1, 1))
    torch.testing.assert_close(dequantize(pooled, q), reference)


def test_a_layer_with_relu_clips_at_the_zero_point():
    layer, x = nn.Conv2d(2, 4, 3, padding=1, bias=False), torch.randn(3, 2, 5, 5)
    x_q, y_q = choose_qparams(x, 8, symmetric=False), qparams_from_range(-2.0, 2.0, 8, symmetric=False)
    yq = integer_layer(layer, x_q, y_q, relu=True, per_channel=False)(quantize(x, x_q))
    assert int(yq.min()) == int(y_q.zero_point)
    torch.testing.assert_close(dequantize(yq, y_q), layer(x).relu().clamp(max=2), atol=0.05, rtol=0)


def conv_net(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8, affine=False), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(),
        nn.Linear(16, 10),
    )  # fmt: skip
    net(torch.randn(50, 1, 8, 8))  # BatchNorm learns what it will be folded with
    return net


@pytest.fixture
def images():
    return torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("per_channel", [True, False])
def test_integers_follow_the_float_network(images, per_channel, dtype):
    net = conv_net().to(dtype)
    integers = integer_network(net, images, per_channel=per_channel)
    assert net.training
    with torch.no_grad():
        logits = net.eval().float()(images)
    error = (integers(images) - logits).square().mean().sqrt() / logits.std()
    assert error < (0.02 if per_channel else 0.04)
    layers = [step for _, step in integers.steps if isinstance(step, IntegerLayer)]
    assert [name for name, _ in integers.steps] == ["0", "3", "6", "7", "9", "12"]
    assert all(s.weight.dtype == torch.int8 and s.y_q.dtype == torch.uint8 for s in layers)
    # After a ReLU all integers lie above zero.
    assert [(s.relu, s.y_q.zero_point.item() == 0) for s in layers] == [(True, True)] * 3 + [(False, False)]


def test_a_relu_anywhere_and_modules_used_twice(images):
    relu, pool = nn.ReLU(inplace=True), nn.MaxPool2d(2, padding=1)
    net = nn.Sequential(
        relu, nn.Conv2d(1, 4, 3), pool, relu, nn.Conv2d(4, 4, 3, padding=1), relu, pool, nn.Flatten(),
        nn.Linear(36, 8), nn.Dropout(), relu, relu, nn.Linear(8, 8), nn.Sequential(nn.Identity(), relu),
    )  # fmt: skip
    before = images.clone()
    integers = integer_network(net, images)
    assert torch.equal(images, before)
    with torch.no_grad():
        logits = net.eval()(images.clone())
    assert (integers(images) - logits).abs().max() <= 4 * integers.y_q.scale
    assert integers(images).min() == 0


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("factor", [0.0, 1e-38, 1e-42, 1e-20])
@pytest.mark.parametrize("all_channels", [True, False])
def test_what_is_left_of_dead_channels_is_their_bias(images, per_channel, factor, all_channels):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Linear(6, 4))
    net[1].weight.data[: None if all_channels else 2] *= factor
    net[1].bias.data[0] = 0.01
    integers = integer_network(net, images, per_channel=per_channel)
    with torch.no_grad():
        hidden, logits = net[:2](images), net(images)
    first = integers.steps[1][1]
    bias = first.bias.double() * first.x_q.scale.double() * first.w_q.scale.double()
    if per_channel or all_channels:
        torch.testing.assert_close(bias.float(), net[1].bias.detach(), rtol=0.02, atol=1e-3)
    got = dequantize(first(quantize(images.flatten(1), integers.x_q)), first.y_q)
    assert (got - hidden).abs().max() <= 3 * first.y_q.scale
    assert (integers(images) - logits).abs().max() <= 4 * integers.y_q.scale


@pytest.mark.parametrize(("model", "text"), [
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sigmoid()), r"'1' \(Sigmoid\(\)\) has no counterpart"),
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2, ceil_mode=True)), "'1' .*ceil_mode=False"),
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2, dilation=2)), "'1' .*dilation=1"),
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(2)), "'1' .*has no counterpart"),
    (nn.Sequential(nn.Conv2d(1, 2, 3, padding="same")), "'0' .*zero padding in numbers"),
    (nn.Sequential(nn.Conv2d(1, 2, 3, dilation=2)), "layer '0': .*groups=1"),
    (nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 2, 3, padding_mode="circular")), "'1' .*zero padding"),
    (nn.Sequential(nn.Linear(8, 2)), r"'0' .* gets \(64, 1, 8, 8\)"),
    (nn.Sequential(nn.Flatten()), "no linear or convolution layer"),
    (nn.Sequential(nn.Flatten(), fake_quantized(nn.Linear(64, 2))), "'1' is FakeQuantLinear already"),
])  # fmt: skip
def test_networks_without_an_integer_version(images, model, text):
    with pytest.raises(UnsupportedModel, match=text):
        integer_network(model, images)


def test_calibration_images_that_do_not_fit(images):
    with pytest.raises(ValueError, match="calibration is empty"):
        integer_network(conv_net(), images[:0])
    net = conv_net()
    net[9].bias.data[0] = math.nan
    with pytest.raises(ValueError, match="layer '9'"):
        integer_network(net, images)
