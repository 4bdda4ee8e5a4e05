import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

from course_lib.methods.temperature import check_number, entropy, softmax_with_temperature

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [-3.0, 5.0, 0.5]], dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1, 4.0, 20, np.float32(2), torch.tensor(3.0)])
def test_softmax_is_the_formula_in_float64(temperature):
    rows = [[math.exp(z / float(temperature)) for z in row] for row in LOGITS.tolist()]
    expected = torch.tensor([[e / sum(row) for e in row] for row in rows], dtype=torch.float64)
    p = softmax_with_temperature(LOGITS, temperature)
    torch.testing.assert_close(p, expected, rtol=1e-12, atol=0)
    along = softmax_with_temperature(LOGITS.T, temperature, dim=0)
    torch.testing.assert_close(along, p.T)
    torch.testing.assert_close(entropy(along, dim=0), torch.distributions.Categorical(p).entropy())


def test_gradients_agree_with_finite_differences():
    z = LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: softmax_with_temperature(x, 3.0), z)
    assert torch.autograd.gradcheck(lambda x: entropy(softmax_with_temperature(x, 2.0)), z)


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=8), st.floats(0.05, 50), st.floats(1.01, 5))
@settings(deadline=None, max_examples=40)
def test_temperature_keeps_the_order_and_raises_the_entropy(row, temperature, factor):
    z = torch.tensor(row, dtype=torch.float64)
    cool, warm = (softmax_with_temperature(z, t) for t in (temperature, temperature * factor))
    assert cool[z.argmax()] == cool.max()
    assert warm[z.argmax()] == warm.max()
    assert -1e-12 <= entropy(cool) <= entropy(warm) + 1e-12 <= math.log(len(row)) + 2e-12


@pytest.mark.parametrize("temperature", [1e-30, 1e-300, torch.tensor(1e-300, dtype=torch.float64)])
def test_towards_zero_all_of_it_goes_to_the_largest_and_ties_share(temperature):
    z = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, -1.0]])
    expected = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]])
    torch.testing.assert_close(softmax_with_temperature(z, temperature), expected, rtol=0, atol=1e-30)
    torch.testing.assert_close(
        softmax_with_temperature(z, 1e300), torch.full((2, 3), 1 / 3)
    )  # uniform at the other end


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_and_impossible_logits_and_half_precision(dtype):
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], dtype=dtype, requires_grad=True)
    extreme = softmax_with_temperature(z, 1e-3)
    assert extreme.dtype == dtype
    torch.testing.assert_close(extreme.float(), torch.tensor([[1.0, 0.0, 0.0], [1 / 3] * 3]), rtol=4e-3, atol=0)
    extreme[:, 0].sum().backward()
    assert z.grad.isfinite().all()
    p = softmax_with_temperature(torch.tensor([0.0, -torch.inf, 0.0], dtype=dtype), 2.0)
    assert p.tolist() == [0.5, 0.0, 0.5]
    assert entropy(p).item() == pytest.approx(math.log(2), rel=1e-6)  # computed in float32
    many = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    exact = softmax_with_temperature(many.to(dtype).double(), 2.0)
    ours = softmax_with_temperature(many.to(dtype), 2.0)
    torch.testing.assert_close(ours, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert entropy(ours).dtype == torch.float32


def test_vmap_takes_one_temperature_a_replica():
    temperatures = torch.tensor([0.5, 1.0, 8.0], dtype=torch.float64)
    mapped = vmap(lambda t: entropy(softmax_with_temperature(LOGITS, t)))(temperatures)
    each = torch.stack([entropy(softmax_with_temperature(LOGITS, t.item())) for t in temperatures])
    torch.testing.assert_close(mapped, each)


@pytest.mark.parametrize(
    ("temperature", "error", "text"),
    [
        (0, ValueError, "finite number above 0, got 0"),
        (math.nan, ValueError, "got nan"),
        (math.inf, ValueError, "got inf"),
        (torch.tensor(0.0), ValueError, "above 0, got 0"),
        (torch.tensor(math.nan), ValueError, "got nan"),
        (torch.ones(2), ValueError, r"tensor without dimensions, got shape \(2,\)"),
        ("2", TypeError, "temperature must be a number, got str"),
    ],
)
def test_a_temperature_that_is_no_number_above_zero_is_refused(temperature, error, text):
    with pytest.raises(error, match=text):
        softmax_with_temperature(LOGITS, temperature)


def test_numbers_with_both_ends():
    for value in (0, np.float64(1.0), torch.tensor(1.0)):
        assert check_number("alpha", value, most=1.0) == float(value)
    for value in (1.01, -0.01, torch.tensor(1.5), torch.tensor(-1.0)):
        with pytest.raises(ValueError, match=r"alpha must be a finite number in \[0, 1\], got"):
            check_number("alpha", value, most=1.0)


def softmax(logits):
    return softmax_with_temperature(logits, 1.0)


@pytest.mark.parametrize(
    ("function", "values", "error", "text"),
    [
        (softmax, [1.0, 2.0], TypeError, "logits must be a floating-point tensor .* got list"),
        (softmax, torch.tensor([1, 2]), TypeError, "got dtype torch.int64"),
        (softmax, torch.empty(3, 0), ValueError, r"at least one class along dim=-1, got shape \(3, 0\)"),
        (softmax, torch.tensor([1.0, math.nan]), ValueError, "with 1 NaN and 0"),
        (softmax, torch.tensor([1.0, math.inf]), ValueError, r"with 0 NaN and 1 \+inf"),
        (softmax, torch.full((2,), -math.inf), ValueError, "a finite number in each row"),
        (entropy, [0.5, 0.5], TypeError, "got list"),
        (entropy, torch.tensor([2.0, -1.0]), ValueError, "are these logits"),
        (entropy, torch.tensor([math.nan, 1.0]), ValueError, r"\[0, 1\]"),
        (entropy, torch.tensor([0.5, 0.5001]), ValueError, "add up to 1 along dim=-1.*sums from 1"),
    ],
)
def test_what_is_no_logits_or_no_distribution_is_refused(function, values, error, text):
    with pytest.raises(error, match=text):
        function(values)


@pytest.mark.parametrize("row", [[200.0, 0.0, 0.0], [1.0, 0.0, -math.inf]])
def test_the_gradient_of_entropy_at_a_probability_of_zero(row):
    logits = torch.tensor([row], requires_grad=True)
    entropy(softmax_with_temperature(logits, 1.0)).sum().backward()
    p = torch.tensor([row]).double().softmax(dim=1)
    q = p.clamp(min=1e-300)
    expected = -p * (q.log() - (p * q.log()).sum())  # of −Σ p log p by the logits
    torch.testing.assert_close(logits.grad.double(), expected, rtol=1e-5, atol=1e-7)
