"""Affine quantization against PyTorch's own fake quantization, against loops, and its errors."""

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from course_lib.methods.quantization import (  # isort: skip
    QuantParams, choose_qparams, dequantize, fake_quantize, qparams_from_range, quantize,
    safe_scale, signal_to_noise,
)  # fmt: skip

BITS = range(2, 9)
TINY = torch.finfo(torch.float32).tiny
Q = QuantParams(scale=0.1, zero_point=0, qmin=-7, qmax=7)
ROWS, GROUPS = choose_qparams(torch.ones(3, 4), axis=0), choose_qparams(torch.ones(3, 4), group=2)


def tensors(shape=(6, 8)):
    return st.tuples(st.integers(0, 2**32 - 1), st.floats(-18, 18), st.floats(-3, 3)).map(
        lambda t: (torch.randn(shape, generator=torch.Generator().manual_seed(t[0])) + t[2]) * 10.0 ** t[1]
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_fake_quantize_and_its_gradient_equal_torch(bits, symmetric, axis):
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(bits))
    q = choose_qparams(x, np.int64(bits), symmetric=symmetric, axis=axis)
    # Values beyond the grid, so that clipping and its zero gradient are compared as well.
    ours, theirs = ((1.7 * x).requires_grad_() for _ in range(2))
    y = fake_quantize(ours, q)
    if axis is None:
        reference = torch.fake_quantize_per_tensor_affine(theirs, q.scale, q.zero_point, q.qmin, q.qmax)
    else:
        reference = torch.fake_quantize_per_channel_affine(theirs, q.scale, q.zero_point, axis % 2, q.qmin, q.qmax)
    upstream = torch.randn_like(x)
    y.backward(upstream)
    reference.backward(upstream)
    assert torch.equal(y, reference)
    assert torch.equal(ours.grad, theirs.grad)
    assert (ours.grad == 0).any()


@settings(max_examples=60, deadline=None)
@given(
    tensors(), st.sampled_from(BITS), st.booleans(), st.sampled_from([(None, None), (0, None), (1, None), (None, 4)])
)
def test_every_value_comes_back_within_half_a_step_and_zero_exactly(x, bits, symmetric, slicing):
    q = choose_qparams(x, bits, symmetric=symmetric, axis=slicing[0], group=slicing[1])
    xq = quantize(x, q)
    back = dequantize(xq, q)
    scale, _ = q.shaped_for(x)
    assert bool(((back - x).abs() <= 0.5 * scale * (1 + 1e-5) + 1e-6 * x.abs()).all())
    assert torch.equal(quantize(back, q), xq)
    assert torch.equal(fake_quantize(x, q), back)
    assert torch.equal(fake_quantize(torch.zeros_like(x), q), torch.zeros_like(x))
    assert xq.dtype == (torch.int8 if symmetric else torch.uint8)
    if symmetric:
        assert torch.equal(quantize(-x, q), -xq)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 3, 12)])
@pytest.mark.parametrize("group", [1, 4, 12])
def test_a_group_is_quantized_as_if_it_were_alone(shape, group, symmetric):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    q = choose_qparams(x, 5, symmetric=symmetric, group=group)
    assert q.scale.shape == (*shape[:-1], 12 // group)
    xq, back, fake = quantize(x, q), dequantize(quantize(x, q), q), fake_quantize(x, q)
    for rows in np.ndindex(*shape[:-1]):
        for g in range(12 // group):
            part = (*rows, slice(g * group, (g + 1) * group))
            alone = choose_qparams(x[part], 5, symmetric=symmetric)
            assert (q.scale[(*rows, g)], q.zero_point[(*rows, g)]) == (alone.scale, alone.zero_point)
            assert torch.equal(xq[part], quantize(x[part], alone))
            assert torch.equal(back[part], dequantize(xq[part], alone))
            assert torch.equal(fake[part], back[part])


@pytest.mark.parametrize(("shape", "group", "fits"), [((2, 10), 4, 2), ((10,), 32, 10), ((3, 7), 2, 1), ((), 1, 1)])
def test_groups_that_do_not_divide(shape, group, fits):
    with pytest.raises(ValueError, match=rf"group={group} does not divide the last dimension of .*; {fits} would"):
        choose_qparams(torch.ones(shape), group=group)


@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-30, 1e-38, 1e-45, 3e38, -3e38])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("slicing", [{}, {"axis": 0}, {"group": 2}])
def test_constant_tensors_have_a_valid_grid(value, symmetric, bits, slicing):
    x = torch.full((3, 4), value)
    q = choose_qparams(x, bits, symmetric=symmetric, **slicing)
    assert bool((q.scale >= TINY).all())
    assert bool(torch.isfinite(1 / q.scale).all())
    torch.testing.assert_close(dequantize(quantize(x, q), q), x, rtol=1e-6, atol=0.6 * TINY)


def test_the_one_way_to_a_scale():
    largest = torch.tensor([254.0, 0.0, 1e-45, 1e-38])
    assert safe_scale(largest, 127).tolist() == [2.0, 1.0, TINY, TINY]
    assert safe_scale(torch.tensor(300.0, dtype=torch.float16), 127).item() == pytest.approx(300 / 127, rel=1e-7)
    q = choose_qparams(torch.tensor([[0.0, 0.0], [1.0, -2.0]]), 8, axis=0)
    assert q.scale.tolist() == pytest.approx([1, 2 / 127])
    wide = torch.tensor([-3.3e38, 3.3e38])  # max - min is no float32
    q = choose_qparams(wide, 8, symmetric=False)
    torch.testing.assert_close(dequantize(quantize(wide, q), q), wide, rtol=0.01, atol=0)


@pytest.mark.parametrize(("low", "high", "scale", "zero"), [(-1, 3, 4 / 3, 1), (1, 3, 1, 0), (-3, -1, 1, 3)])
def test_asymmetric_ranges_are_widened_to_zero(low, high, scale, zero):
    q = qparams_from_range(low, high, bits=2, symmetric=False)
    assert (q.scale.item(), q.zero_point.item()) == (pytest.approx(scale), zero)
    assert qparams_from_range(low, high, bits=2).scale == max(-low, high)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_keep_their_type_and_lose_nothing(dtype):
    x = (torch.randn(200, generator=torch.Generator().manual_seed(0)) * 0.01).to(dtype).requires_grad_()
    q, exact = choose_qparams(x, 8), choose_qparams(x.float(), 8)
    assert q.scale == exact.scale
    assert torch.equal(quantize(x, q), quantize(x.float(), exact))
    y = fake_quantize(x, q)
    assert y.dtype == dtype
    torch.testing.assert_close(y, dequantize(quantize(x, q), q).to(dtype), rtol=1e-6, atol=0)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_integer_types_and_bits_of_a_grid():
    types = {(-127, 127): torch.int8, (-128, 0): torch.int8, (-129, 0): torch.int16, (0, 255): torch.uint8}
    for (low, high), dtype in {**types, (0, 256): torch.int16, (0, 70000): torch.int32}.items():
        assert QuantParams(scale=1.0, zero_point=0, qmin=low, qmax=high).dtype == dtype
    for symmetric in (True, False):
        assert [choose_qparams(torch.ones(2), bits, symmetric=symmetric).bits for bits in BITS] == list(BITS)


def test_a_grid_stays_as_it_was_made():
    grid = QuantParams(0.1, 0, -127, 127)
    with pytest.raises(FrozenInstanceError):
        grid.scale = torch.tensor(0.2)


def test_defaults_and_nothing_at_all():
    for q in (choose_qparams(torch.tensor([-1.0, 2.0])), qparams_from_range(-1.0, 2.0)):
        assert (q.scale.item(), q.qmin, q.qmax, q.axis, q.group) == (pytest.approx(2 / 127), -127, 127, None, None)
    nothing = torch.ones(0, 2)
    assert dequantize(quantize(nothing, Q), Q).shape == fake_quantize(nothing, Q).shape == (0, 2)


def test_decibels():
    x = torch.tensor([1.0, -1.0])
    assert signal_to_noise(x, x) == math.inf
    assert signal_to_noise(torch.zeros(2), x) == -math.inf
    assert signal_to_noise(x, 0.9 * x) == pytest.approx(20)


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda: choose_qparams(torch.ones(3), 1), ValueError, "bits must be an integer from 2 to 8, got 1"),
    (lambda: choose_qparams(torch.ones(2, 3), axis=2), ValueError, "axis must be an integer from -2 to 1, got 2"),
    (lambda: choose_qparams(torch.ones(2, 4), group=0), ValueError, "group must be an integer of at least 1"),
    (lambda: choose_qparams(torch.ones(2, 4), axis=0, group=2), ValueError, "None with a group"),
    (lambda: choose_qparams(torch.ones(3, 0)), ValueError, r"is empty, shape \(3, 0\)"),
    (lambda: choose_qparams(torch.tensor([1e300], dtype=torch.float64)), ValueError, "finite in float32"),
    (lambda: qparams_from_range(1.0, 0.0), ValueError, "finite low <= high"),
    (lambda: qparams_from_range(0.0, math.inf), ValueError, "finite low <= high"),
    (lambda: dequantize(torch.tensor([1.0]), Q), TypeError, "integers"),
    (lambda: dequantize(torch.tensor([-7, 8]), Q), ValueError, r"from -7 to 8, outside the grid's \[-7, 7\]"),
    (lambda: quantize(torch.ones(4, 3), ROWS), ValueError, r"scales of shape \(3,\) along axis 0 do not fit"),
    (lambda: quantize(torch.ones(()), ROWS), ValueError, "along axis 0 do not fit"),
    (lambda: quantize(torch.ones(3, 2), GROUPS), ValueError, "for groups of 2 do not fit"),
    (lambda: quantize(torch.ones(2, 4), GROUPS), ValueError, "for groups of 2 do not fit"),
    (lambda: signal_to_noise(torch.ones(2), torch.ones(3)), ValueError, "shapes differ"),
    (lambda: signal_to_noise(torch.ones(2), torch.ones(2).long()), TypeError, "approximation must be"),
    (lambda: QuantParams(0.0, 0, -7, 7), ValueError, "positive and finite"),
    (lambda: QuantParams(0.1, 0, 7, 7), ValueError, "qmin must be below"),
    (lambda: QuantParams(0.1, 8, -7, 7), ValueError, "zero_point must be within"),
    (lambda: QuantParams(torch.ones(3), 0, -7, 7), ValueError, "do not fit axis=None"),
    (lambda: QuantParams(0.1, 0, -7, 7, group=4), ValueError, "do not fit axis=None, group=4"),
    (lambda: QuantParams(torch.ones(3), torch.zeros(2), -7, 7, axis=0), ValueError, "do not fit axis=0"),
    (lambda: QuantParams(torch.ones(3), 0, -7, 7, axis=-1), ValueError, "must not be negative"),
])  # fmt: skip
def test_what_does_not_fit(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("call", [choose_qparams, lambda x: quantize(x, Q), lambda x: fake_quantize(x, Q)])
def test_inputs_that_are_no_finite_floats(call):
    for bad in (torch.tensor([1, 2]), torch.tensor([1j]), [1.0, 2.0]):
        with pytest.raises(TypeError, match="floating-point"):
            call(bad)
    with pytest.raises(ValueError, match=r"x has 2 NaN or infinite entries of 3, shape \(3,\)"):
        call(torch.tensor([1.0, math.nan, -math.inf]))
