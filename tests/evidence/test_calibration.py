import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binom
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from course_lib.evidence.calibration import (  # isort: skip
    calibration_floor, expected_calibration_error, fit_class_bias, fit_temperature, reliability,
)  # fmt: skip


def make(n=400, k=6, scale=3.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(k, (n,), generator=g)
    return scale * (F.one_hot(labels, k) + torch.randn(n, k, generator=g, dtype=torch.float64)), labels


@pytest.mark.parametrize("bins", [1, 5, 15, np.int64(40)])
def test_ece_equals_torchmetrics(bins):
    for seed in range(3):
        logits, labels = make(seed=seed)
        p = logits.softmax(dim=1)
        theirs = multiclass_calibration_error(p, labels, num_classes=6, n_bins=int(bins), norm="l1").item()
        assert expected_calibration_error(p, labels, bins=bins) == pytest.approx(theirs, abs=1e-6)


def test_a_diagram_by_hand():
    p = torch.tensor([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0], [0.9, 0.1]])
    diagram = reliability(p, torch.tensor([0, 0, 1, 0]), bins=4)
    assert diagram.count.tolist() == [0, 1, 1, 2]
    assert diagram.accuracy.tolist() == pytest.approx([math.nan, 1.0, 1.0, 0.5], nan_ok=True)
    assert diagram.confidence.tolist() == pytest.approx([math.nan, 0.5, 0.75, 0.95], nan_ok=True)
    assert diagram.edges.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert diagram.error == pytest.approx((0.5 + 0.25 + 2 * abs(0.5 - 0.95)) / 4, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bins", [3, 5, 10, 15])
def test_a_confidence_on_an_edge_belongs_to_the_bin_below_it_in_every_precision(dtype, bins):
    for m in range(bins // 2 + 1, bins):  # the largest of two probabilities is above 1/2
        row = torch.tensor([[m / bins, 1 - m / bins]], dtype=dtype)
        above = torch.nextafter(row[:, :1].cpu(), torch.ones(1, 1, dtype=dtype))
        assert reliability(row, torch.tensor([0]), bins=bins).count.argmax() == m - 1
        higher = torch.cat([above, 1 - above], dim=1)
        assert reliability(higher, torch.tensor([0]), bins=bins).count.argmax() == m


def test_sure_and_right_is_calibrated_and_sure_and_wrong_is_not():
    p = F.one_hot(torch.tensor([0, 1, 2]), 3).float()
    assert expected_calibration_error(p, torch.tensor([0, 1, 2])) == 0.0
    assert expected_calibration_error(p, torch.tensor([1, 2, 0])) == 1.0
    one, labels = torch.ones(4, 1), torch.zeros(4).long()  # one class
    assert (expected_calibration_error(one, labels), fit_temperature(one, labels)) == (0.0, 1.0)


@pytest.mark.parametrize("scale", [0.5, 3.0, 30.0])
def test_temperature_equals_scipys_minimiser(scale):
    logits, labels = make(scale=scale)

    def nll(log_t):
        return F.cross_entropy(logits / math.exp(log_t), labels).item()

    theirs = math.exp(minimize_scalar(nll, bracket=(-2, 4), method="brent", tol=1e-12).x)
    assert fit_temperature(logits, labels) == pytest.approx(theirs, rel=1e-6)


def test_temperature_scales_with_the_logits():
    logits, labels = make()
    t = fit_temperature(logits, labels)
    assert fit_temperature(1e4 * logits, labels) == pytest.approx(1e4 * t, rel=1e-9)
    assert fit_temperature(logits + 100.0, labels) == pytest.approx(t, rel=1e-9)
    assert fit_temperature(logits / t, labels) == pytest.approx(1.0, rel=1e-9)
    assert fit_temperature(logits.half(), labels) == pytest.approx(t, rel=0.01)


def test_temperature_at_the_edges_is_finite():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]], requires_grad=True)
    assert fit_temperature(logits, torch.tensor([0, 1])) == pytest.approx(2e-4)  # all right: ever sharper
    assert fit_temperature(logits, torch.tensor([1, 0])) == pytest.approx(2e4)  # all wrong: ever flatter
    assert fit_temperature(torch.ones(2, 3), torch.tensor([1, 0])) == 1.0


@pytest.mark.parametrize("mask", [-65504.0, -1e9, -1e30, torch.finfo(torch.float32).min])
def test_a_masked_class_changes_neither_temperature_nor_bias(mask):
    logits, labels = make(n=300)
    masked = torch.cat([logits, torch.full((300, 1), mask)], dim=1)
    assert fit_temperature(masked, labels) == pytest.approx(fit_temperature(logits, labels), rel=1e-6)
    some, less = logits.clone(), labels.clone()
    less[:10], some[:10, 0] = 1, -1e4
    bias = fit_class_bias(some, less, 0)
    some[:10, 0] = mask
    assert fit_class_bias(some, less, 0) == pytest.approx(bias, rel=1e-6)


def test_bias_equals_scipys_minimiser_and_meets_the_share():
    logits, labels = make(n=300)
    logits[:, 3] -= 9.0
    bias = fit_class_bias(logits, labels, np.int64(3))

    def nll(b):
        return F.cross_entropy(logits + b * F.one_hot(torch.tensor(3), 6), labels).item()

    assert bias == pytest.approx(minimize_scalar(nll, bracket=(0, 10), tol=1e-12).x, rel=1e-5)
    logits[:, 3] += bias
    assert logits.softmax(dim=1)[:, 3].mean().item() == pytest.approx((labels == 3).double().mean().item(), rel=1e-9)


def test_bias_needs_the_class_and_another():
    logits, labels = make(n=20)
    for bad in (torch.full((20,), 2), labels.clamp_min(3)):
        with pytest.raises(ValueError, match="labels must hold class 2 and others, got a share of"):
            fit_class_bias(logits, bad, 2)
    with pytest.raises(ValueError, match=r"class_index must be an integer from 0 to 5"):
        fit_class_bias(logits, labels, 6)


def test_floor_of_one_bin_is_the_mean_deviation_of_a_binomial_share():
    n, q = 40, 0.8
    p = torch.tensor([[q, 1 - q]], dtype=torch.float64).expand(n, 2)
    successes = np.arange(n + 1)
    exact = float(binom.pmf(successes, n, q) @ np.abs(successes / n - q))
    assert calibration_floor(p, bins=15, draws=4000) == pytest.approx(exact, rel=0.03)


def test_floor_falls_with_the_images_and_follows_its_seed_alone():
    p = make(n=8000, scale=2.0)[0].softmax(dim=1)
    floors = [calibration_floor(p[:n], draws=40) for n in (100, 400, 8000)]
    assert floors[0] > 1.5 * floors[1] > 3 * floors[2] > 0
    state = torch.random.get_rng_state()
    one, again, other = (calibration_floor(p, draws=3, seed=s) for s in (1, 1, 2))
    assert one == again != other
    assert torch.equal(torch.random.get_rng_state(), state)


P, Y = torch.full((4, 2), 0.5), torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize("function", [expected_calibration_error, fit_temperature])
@pytest.mark.parametrize(
    ("rows", "labels", "error", "text"),
    [
        (P.long(), Y, TypeError, "floating-point tensor"),
        (P, Y.float(), TypeError, "labels an int64 tensor .* and torch.float32"),
        (P[0], Y, ValueError, r"must be \[N, K\]"),
        (P[:0], Y[:0], ValueError, r"N >= 1 .* got shapes \(0, 2\)"),
        (P, Y + 1, ValueError, "0 to 1 for 2 classes, got 1 to 2"),
        (P * torch.nan, Y, ValueError, "finite, got 8 NaN"),
    ],
)
def test_bad_input_is_refused_in_words(function, rows, labels, error, text):
    with pytest.raises(error, match=text):
        function(rows, labels)


def test_probabilities_must_be_probabilities_and_counts_counts():
    with pytest.raises(ValueError, match="are these logits"):
        expected_calibration_error(torch.tensor([[3.0, -2.0]]), Y[:1])
    with pytest.raises(ValueError, match=r"off by 0\.5"):
        expected_calibration_error(torch.tensor([[1.0, 0.5]]), Y[:1])
    with pytest.raises(ValueError, match="bins must be an integer of at least 1"):
        expected_calibration_error(P, Y, bins=0)
    with pytest.raises(TypeError, match="draws must be an integer of at least 1"):
        calibration_floor(P, draws=2.5)
    with pytest.raises(TypeError, match="got list"):
        calibration_floor([[0.5, 0.5]])
