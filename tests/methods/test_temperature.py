import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

from course_lib.methods.temperature import (
    check_temperature,
    entropy,
    log_softmax_with_temperature,
    softmax_with_temperature,
)

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [-3.0, 5.0, 0.5]], dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1, 4.0, 20])
def test_softmax_is_the_formula_in_float64(temperature):
    rows = [[math.exp(z / temperature) for z in row] for row in LOGITS.tolist()]
    expected = torch.tensor([[e / sum(row) for e in row] for row in rows], dtype=torch.float64)
    torch.testing.assert_close(softmax_with_temperature(LOGITS, temperature), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        log_softmax_with_temperature(LOGITS, temperature), expected.log(), rtol=1e-12, atol=1e-14
    )


def test_gradients_agree_with_finite_differences():
    z = LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: softmax_with_temperature(x, 3.0), z)
    assert torch.autograd.gradcheck(lambda x: log_softmax_with_temperature(x, 0.7), z)
    assert torch.autograd.gradcheck(lambda x: entropy(softmax_with_temperature(x, 2.0)), z)


def test_dim_chooses_where_the_classes_are():
    torch.testing.assert_close(softmax_with_temperature(LOGITS.T, 2.0, dim=0), softmax_with_temperature(LOGITS, 2.0).T)
    assert entropy(softmax_with_temperature(LOGITS.T, 2.0, dim=0), dim=0).shape == (2,)


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=8), st.floats(0.05, 50), st.floats(1.01, 5))
@settings(deadline=None, max_examples=60)
def test_temperature_keeps_the_order_and_raises_the_entropy(row, temperature, factor):
    z = torch.tensor(row, dtype=torch.float64)
    cool, warm = (softmax_with_temperature(z, t) for t in (temperature, temperature * factor))
    assert cool[z.argmax()] == cool.max()
    assert warm[z.argmax()] == warm.max()
    assert cool.sum() == pytest.approx(1)
    assert entropy(warm) >= entropy(cool) - 1e-12
    assert -1e-12 <= entropy(cool) <= math.log(len(row)) + 1e-12


@pytest.mark.parametrize("temperature", [1e-2, 1e-30, 1e-300])
def test_towards_zero_all_of_it_goes_to_the_largest_and_ties_share(temperature):
    z = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, -1.0]])
    expected = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]])
    torch.testing.assert_close(softmax_with_temperature(z, temperature), expected, rtol=0, atol=1e-30)


@pytest.mark.parametrize("temperature", [1e8, 1e300])
def test_towards_infinity_it_is_uniform(temperature):
    p = softmax_with_temperature(torch.tensor([[1.0, 300.0, -2.0]]), temperature)
    torch.testing.assert_close(p, torch.full((1, 3), 1 / 3))
    torch.testing.assert_close(entropy(p), torch.tensor([math.log(3)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_ten_thousand_stay_finite(dtype):
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], dtype=dtype, requires_grad=True)
    log_p = log_softmax_with_temperature(z, 0.5)
    assert log_p.isfinite().all()
    log_p.sum().backward()
    assert z.grad.isfinite().all()
    assert softmax_with_temperature(z.detach(), 1e-3).isfinite().all()


def test_an_impossible_class_has_probability_zero():
    p = softmax_with_temperature(torch.tensor([0.0, -torch.inf, 0.0]), 2.0)
    assert torch.equal(p, torch.tensor([0.5, 0.0, 0.5]))
    torch.testing.assert_close(entropy(p), torch.tensor(math.log(2)))


def test_vmap_takes_one_temperature_a_replica():
    temperatures = torch.tensor([0.5, 1.0, 8.0], dtype=torch.float64)
    mapped = vmap(lambda t: entropy(softmax_with_temperature(LOGITS, t)))(temperatures)
    each = torch.stack([entropy(softmax_with_temperature(LOGITS, t.item())) for t in temperatures])
    torch.testing.assert_close(mapped, each)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf, torch.tensor(0.0), torch.tensor(math.nan)])
def test_a_temperature_that_is_not_above_zero_is_refused(temperature):
    for function in (softmax_with_temperature, log_softmax_with_temperature):
        with pytest.raises(ValueError, match="temperature must be a finite number above 0, got"):
            function(LOGITS, temperature)


@pytest.mark.parametrize("temperature", ["2", None, True, [1.0]])
def test_a_temperature_that_is_no_number_is_refused(temperature):
    with pytest.raises(TypeError, match="temperature must be a number"):
        check_temperature(temperature)


def test_numbers_of_numpy_are_numbers_and_vectors_are_not():
    check_temperature(np.float32(2.0))
    with pytest.raises(ValueError, match=r"tensor without dimensions, got shape \(2,\)"):
        check_temperature(torch.ones(2))


@pytest.mark.parametrize(
    ("logits", "error", "text"),
    [
        ([1.0, 2.0], TypeError, "logits must be a floating-point tensor, got list"),
        (torch.tensor([1, 2]), TypeError, "got dtype torch.int64"),
        (torch.tensor(1.0), ValueError, "at least one class"),
        (torch.empty(3, 0), ValueError, r"at least one class along dim=-1, got shape \(3, 0\)"),
        (torch.tensor([1.0, math.nan]), ValueError, "with 1 NaN and 0"),
        (torch.tensor([1.0, math.inf]), ValueError, r"with 0 NaN and 1 \+inf"),
        (torch.full((2,), -math.inf), ValueError, "a finite number in each row"),
    ],
)
def test_bad_logits_are_refused(logits, error, text):
    with pytest.raises(error, match=text):
        softmax_with_temperature(logits, 1.0)


@pytest.mark.parametrize(
    ("probabilities", "error", "text"),
    [
        ([0.5, 0.5], TypeError, "got list"),
        (torch.tensor([2.0, -1.0]), ValueError, "are these logits"),
        (torch.tensor([math.nan, 1.0]), ValueError, r"\[0, 1\]"),
        (torch.tensor([0.5, 0.4]), ValueError, "add up to 1 along dim=-1, got sums from 0.9"),
    ],
)
def test_entropy_refuses_what_is_no_distribution(probabilities, error, text):
    with pytest.raises(error, match=text):
        entropy(probabilities)


def test_half_precision_distributions_are_accepted():
    p = softmax_with_temperature(torch.randn(8, 100, generator=torch.Generator().manual_seed(0)).bfloat16(), 2.0)
    assert entropy(p).isfinite().all()
