"""Affine quantization against PyTorch's own fake quantization, and its errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from course_lib.methods.quantization import (
    QuantParams,
    choose_qparams,
    dequantize,
    fake_quantize,
    integer_range,
    qparams_from_range,
    quantize,
    straight_through,
)

BITS = range(2, 9)


def tensors(shape=(6, 5)):
    return st.tuples(st.integers(0, 2**32 - 1), st.floats(-18, 18), st.floats(-3, 3)).map(
        lambda t: (torch.randn(shape, generator=torch.Generator().manual_seed(t[0])) + t[2]) * 10.0 ** t[1]
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_fake_quantize_and_its_gradient_equal_torch(bits, symmetric, axis):
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(bits))
    q = choose_qparams(x, bits, symmetric=symmetric, axis=axis)
    # Values beyond the grid, so that clipping and its zero gradient are compared as well.
    ours, theirs = ((1.7 * x).requires_grad_() for _ in range(2))
    y = fake_quantize(ours, q)
    if axis is None:
        reference = torch.fake_quantize_per_tensor_affine(theirs, q.scale, q.zero_point, q.qmin, q.qmax)
    else:
        reference = torch.fake_quantize_per_channel_affine(
            theirs, q.scale, q.zero_point, axis % x.dim(), q.qmin, q.qmax
        )
    upstream = torch.randn_like(x)
    y.backward(upstream)
    reference.backward(upstream)
    assert torch.equal(y, reference)
    assert torch.equal(ours.grad, theirs.grad)
    assert (ours.grad == 0).any()


@settings(max_examples=60, deadline=None)
@given(tensors(), st.sampled_from(BITS), st.booleans(), st.sampled_from([None, 0, 1]))
def test_every_value_comes_back_within_half_a_step_and_zero_exactly(x, bits, symmetric, axis):
    q = choose_qparams(x, bits, symmetric=symmetric, axis=axis)
    xq = quantize(x, q)
    back = dequantize(xq, q)
    scale, _ = q.shaped_for(x)
    assert bool(((back - x).abs() <= 0.5 * scale * (1 + 1e-5) + 1e-6 * x.abs()).all())
    assert torch.equal(quantize(back, q), xq)
    assert torch.equal(fake_quantize(x, q), back)
    assert torch.equal(fake_quantize(torch.zeros_like(x), q), torch.zeros_like(x))
    assert xq.dtype == (torch.int8 if symmetric else torch.uint8)
    assert int(xq.min()) >= q.qmin
    assert int(xq.max()) <= q.qmax
    if symmetric:
        assert torch.equal(quantize(-x, q), -xq)


@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-30, 1e-45, 3e38, -3e38])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("axis", [None, 0])
def test_constant_tensors_have_a_valid_grid(value, symmetric, bits, axis):
    x = torch.full((3, 4), value)
    q = choose_qparams(x, bits, symmetric=symmetric, axis=axis)
    assert bool((torch.isfinite(q.scale) & (q.scale > 0)).all())
    torch.testing.assert_close(dequantize(quantize(x, q), q), x, rtol=1e-6, atol=1e-37)


def test_an_all_zero_channel_gets_scale_one():
    q = choose_qparams(torch.tensor([[0.0, 0.0], [1.0, -2.0]]), 8, axis=0)
    assert q.scale[0] == 1
    assert q.scale[1] == pytest.approx(2 / 127)


def test_extremes_of_float32_do_not_overflow():
    x = torch.tensor([-3.3e38, 3.3e38])
    q = choose_qparams(x, 8, symmetric=False)
    assert torch.isfinite(q.scale)
    assert torch.isfinite(dequantize(quantize(x, q), q)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_keep_their_type_and_gradient(dtype):
    x = torch.linspace(-1, 1, 9, dtype=dtype, requires_grad=True)
    y = fake_quantize(x, choose_qparams(x, 4))
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad, torch.ones_like(x))


def test_signal_to_noise_rises_by_six_decibels_a_bit():
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def decibels(bits):
        error = fake_quantize(x, choose_qparams(x, bits, symmetric=False)) - x
        return 10 * math.log10(x.square().sum() / error.square().sum())

    assert decibels(8) - decibels(4) == pytest.approx(4 * 6.02, abs=0.6)


def test_per_channel_is_the_same_as_each_channel_alone():
    x = torch.randn(4, 3, 5)
    q = choose_qparams(x, 5, axis=1)
    for channel in range(3):
        alone = choose_qparams(x[:, channel], 5)
        assert q.scale[channel] == alone.scale
        assert torch.equal(quantize(x, q)[:, channel], quantize(x[:, channel], alone))


def test_straight_through_runs_under_vmap_as_one_by_one():
    x, scale = torch.randn(3, 7), torch.tensor([0.1, 0.2, 0.3])
    zero = torch.zeros(3, dtype=torch.int32)
    batched = torch.vmap(lambda a, s, z: straight_through(a, s, z, -7, 7))(x, scale, zero)
    assert torch.equal(batched, torch.stack([straight_through(x[i], scale[i], zero[i], -7, 7) for i in range(3)]))


@pytest.mark.parametrize("bits", [1, 9, 0, -3, 16])
def test_bits_outside_two_to_eight(bits):
    with pytest.raises(ValueError, match="from 2 to 8"):
        choose_qparams(torch.ones(3), bits)
    with pytest.raises(ValueError, match="from 2 to 8"):
        integer_range(bits, symmetric=True)


@pytest.mark.parametrize("bits", [8.0, "8", None, True])
def test_bits_of_another_type(bits):
    with pytest.raises(TypeError, match="bits must be an integer"):
        choose_qparams(torch.ones(3), bits)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(bad):
    x = torch.tensor([1.0, bad])
    q = QuantParams(scale=0.1, zero_point=0, qmin=-7, qmax=7)
    for call in (lambda: choose_qparams(x), lambda: quantize(x, q), lambda: fake_quantize(x, q)):
        with pytest.raises(ValueError, match=r"shape \(2,\) holds 1 NaN or infinite value"):
            call()


@pytest.mark.parametrize("axis", [2, -3, 7])
def test_axis_out_of_range(axis):
    with pytest.raises(ValueError, match=r"axis -?\d is out of range for a tensor of shape \(2, 3\)"):
        choose_qparams(torch.ones(2, 3), axis=axis)


@pytest.mark.parametrize("axis", [0.0, "0", True])
def test_axis_of_another_type(axis):
    with pytest.raises(TypeError, match="axis must be"):
        choose_qparams(torch.ones(2, 3), axis=axis)


def test_inputs_that_are_no_floating_point_tensors():
    q = QuantParams(scale=0.1, zero_point=0, qmin=-7, qmax=7)
    for bad in (torch.tensor([1, 2]), torch.tensor([True]), torch.tensor([1j]), [1.0, 2.0], 3.0, None):
        for call in (choose_qparams, lambda x: quantize(x, q), lambda x: fake_quantize(x, q)):
            with pytest.raises(TypeError, match="floating-point"):
                call(bad)
    for bad in (torch.tensor([1.0]), torch.tensor([True]), [1]):
        with pytest.raises(TypeError, match="integers"):
            dequantize(bad, q)


def test_empty_tensors():
    for shape in ((0,), (3, 0), (0, 3)):
        with pytest.raises(ValueError, match="is empty"):
            choose_qparams(torch.ones(shape))
    q = QuantParams(scale=0.1, zero_point=0, qmin=-7, qmax=7)
    assert dequantize(quantize(torch.ones(0, 2), q), q).shape == (0, 2)


def test_scales_that_do_not_fit_the_tensor():
    q = choose_qparams(torch.ones(3, 4), axis=0)
    for x in (torch.ones(4, 3), torch.ones(()), torch.ones(2)):
        with pytest.raises(ValueError, match="3 scales along axis 0 do not fit"):
            quantize(x, q)
    with pytest.raises(ValueError, match="outside the grid"):
        dequantize(torch.full((3, 1), 500), q)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"scale": 0.0}, "positive and finite"),
        ({"scale": math.nan}, "positive and finite"),
        ({"scale": -1.0}, "positive and finite"),
        ({"qmin": 7}, "qmin must be below"),
        ({"zero_point": 8}, "zero_point must be within"),
        ({"scale": torch.ones(3)}, "do not fit axis=None"),
        ({"axis": 0}, "do not fit axis=0"),
        ({"scale": torch.ones(3), "axis": -1}, "must not be negative"),
    ],
)
def test_grids_that_make_no_sense(fields, text):
    with pytest.raises(ValueError, match=text):
        QuantParams(**{"scale": 0.1, "zero_point": 0, "qmin": -7, "qmax": 7, **fields})


def test_integer_types_and_bits_of_a_grid():
    types = {(-127, 127): torch.int8, (0, 255): torch.uint8, (-300, 5): torch.int16, (0, 70000): torch.int32}
    for (low, high), dtype in types.items():
        assert QuantParams(scale=1.0, zero_point=0, qmin=low, qmax=high).dtype == dtype
    assert [choose_qparams(torch.ones(2), bits).bits for bits in BITS] == list(BITS)
    with pytest.raises(ValueError, match="32 bits"):
        _ = QuantParams(scale=1.0, zero_point=0, qmin=0, qmax=2**40).dtype


def test_ranges_that_make_no_sense():
    for low, high in ((1.0, 0.0), (math.nan, 1.0), (0.0, math.inf)):
        with pytest.raises(ValueError, match="finite low <= high"):
            qparams_from_range(low, high)
    with pytest.raises(ValueError, match="does not fit into float32"):
        choose_qparams(torch.tensor([1e300], dtype=torch.float64))
