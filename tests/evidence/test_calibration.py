import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from course_lib.evidence.calibration import (
    calibration_floor,
    expected_calibration_error,
    fit_class_bias,
    fit_temperature,
    reliability,
)


def make(n=400, k=6, scale=3.0, noise=2.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(k, (n,), generator=g)
    clean = F.one_hot(labels, k).double() + noise * torch.randn(n, k, generator=g, dtype=torch.float64) / 2
    return scale * clean, labels


@pytest.mark.parametrize("bins", [1, 5, 15, 40])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ece_equals_torchmetrics(bins, seed):
    logits, labels = make(seed=seed)
    p = logits.softmax(dim=1)
    theirs = multiclass_calibration_error(p, labels, num_classes=6, n_bins=bins, norm="l1").item()
    assert expected_calibration_error(p, labels, bins=bins) == pytest.approx(theirs, abs=1e-6)


def test_ece_equals_a_loop_and_the_bins_are_closed_on_the_right():
    p = torch.tensor([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0], [0.9, 0.1]])
    labels = torch.tensor([0, 0, 1, 0])
    diagram = reliability(p, labels, bins=4)
    assert diagram.count.tolist() == [0, 1, 1, 2]
    assert diagram.accuracy[1:].tolist() == [1.0, 1.0, 0.5]
    assert torch.isnan(diagram.confidence[0])
    assert diagram.edges.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert diagram.error == pytest.approx((0.5 + 0.25 + 2 * abs(0.5 - 0.95)) / 4, abs=1e-7)


def test_sure_and_right_is_calibrated_and_sure_and_wrong_is_not():
    p = F.one_hot(torch.tensor([0, 1, 2]), 3).float()
    assert expected_calibration_error(p, torch.tensor([0, 1, 2])) == 0.0
    assert expected_calibration_error(p, torch.tensor([1, 2, 0])) == 1.0


@pytest.mark.parametrize("scale", [0.5, 3.0, 30.0])
def test_temperature_equals_scipys_minimiser(scale):
    logits, labels = make(scale=scale)
    z, y = logits.numpy(), labels.numpy()

    def nll(log_t):
        s = z / np.exp(log_t)
        top = s.max(axis=1)
        return float(np.mean(top + np.log(np.exp(s - top[:, None]).sum(axis=1)) - s[np.arange(len(y)), y]))

    theirs = math.exp(minimize_scalar(nll, bracket=(-2, 4), method="brent", tol=1e-12).x)
    assert fit_temperature(logits, labels) == pytest.approx(theirs, rel=1e-6)


def test_temperature_scales_with_the_logits_and_keeps_every_answer():
    logits, labels = make()
    t = fit_temperature(logits, labels)
    assert fit_temperature(1e4 * logits, labels) == pytest.approx(1e4 * t, rel=1e-9)
    assert fit_temperature(logits + 100.0, labels) == pytest.approx(t, rel=1e-9)
    assert fit_temperature(logits / t, labels) == pytest.approx(1.0, rel=1e-9)
    assert torch.equal((logits / t).argmax(dim=1), logits.argmax(dim=1))


def test_temperature_repairs_an_overconfident_model():
    logits, labels = make(n=2000, scale=12.0)
    before = expected_calibration_error(logits[1000:].softmax(dim=1), labels[1000:])
    t = fit_temperature(logits[:1000], labels[:1000])
    after = expected_calibration_error((logits[1000:] / t).softmax(dim=1), labels[1000:])
    assert t > 2
    assert after < before / 3


def test_temperature_at_the_edges_is_finite():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    assert fit_temperature(logits, torch.tensor([0, 1])) == pytest.approx(1e-4)  # all right: ever sharper
    assert fit_temperature(logits, torch.tensor([1, 0])) == pytest.approx(1e4)  # all wrong: ever flatter
    assert fit_temperature(torch.ones(2, 3), torch.tensor([1, 0])) == 1.0
    logits.requires_grad_()
    fit_temperature(logits, torch.tensor([0, 0]))
    assert logits.grad is None


def test_bias_equals_scipys_minimiser_and_meets_the_share():
    logits, labels = make(n=300)
    logits[:, 3] -= 9.0
    bias = fit_class_bias(logits, labels, 3)

    def nll(b):
        moved = logits.clone()
        moved[:, 3] += b
        return F.cross_entropy(moved, labels).item()

    assert bias == pytest.approx(minimize_scalar(nll, bracket=(0, 10), tol=1e-12).x, rel=1e-5)
    logits[:, 3] += bias
    assert logits.softmax(dim=1)[:, 3].mean().item() == pytest.approx((labels == 3).double().mean().item(), rel=1e-9)


def test_bias_needs_the_class_and_another():
    logits, labels = make(n=20)
    for bad in (torch.full((20,), 2), labels.clamp_min(3)):
        with pytest.raises(ValueError, match="labels must hold class 2 and others, got a share of"):
            fit_class_bias(logits, bad, 2)
    for index in (-1, 6, True, 1.0):
        with pytest.raises(ValueError, match="class_index must be an integer from 0 to 5"):
            fit_class_bias(logits, labels, index)


def test_floor_of_one_bin_is_the_mean_deviation_of_a_binomial_share():
    from scipy.stats import binom

    n, q = 40, 0.8
    p = torch.tensor([[q, 1 - q]], dtype=torch.float64).expand(n, 2)
    successes = np.arange(n + 1)
    exact = float(binom.pmf(successes, n, q) @ np.abs(successes / n - q))
    assert calibration_floor(p, bins=15, draws=4000) == pytest.approx(exact, rel=0.03)


def test_floor_falls_with_the_images_and_a_calibrated_model_stands_on_it():
    logits, _ = make(n=8000, scale=2.0)
    p = logits.softmax(dim=1)
    floors = [calibration_floor(p[:n], draws=40) for n in (100, 400, 8000)]
    assert floors[0] > 1.5 * floors[1] > 3 * floors[2] > 0
    labels = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(7)).squeeze(1)
    assert expected_calibration_error(p[:400], labels[:400]) == pytest.approx(floors[1], rel=0.6)
    sure = F.one_hot(torch.arange(6)).float()
    assert calibration_floor(sure) == 0.0


def test_floor_follows_its_seed_alone_and_leaves_everything_as_it_was():
    p = make()[0].softmax(dim=1)
    kept, state = p.clone(), torch.random.get_rng_state()
    assert calibration_floor(p, draws=3, seed=1) == calibration_floor(p, draws=3, seed=1)
    assert calibration_floor(p, draws=3, seed=1) != calibration_floor(p, draws=3, seed=2)
    assert torch.equal(p, kept)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ([[0.5, 0.5]], TypeError, "got list"),
        (torch.ones(2, 2).long(), TypeError, "floating-point tensor"),
        (torch.full((4,), 0.25), ValueError, r"must be \[N, K\]"),
        (torch.empty(0, 2), ValueError, "N >= 1"),
        (torch.full((2, 2), math.nan), ValueError, "finite, got 4 NaN"),
        (torch.tensor([[3.0, -2.0]]), ValueError, "are these logits"),
    ],
)
def test_floor_refuses_what_is_no_table_of_probabilities(given, error, text):
    with pytest.raises(error, match=text):
        calibration_floor(given)


def test_floor_needs_a_draw():
    for draws in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="draws must be an integer of at least 1"):
            calibration_floor(torch.full((4, 2), 0.5), draws=draws)


P, Y = torch.full((4, 2), 0.5), torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(
    "function", [expected_calibration_error, fit_temperature, lambda p, y: fit_class_bias(p, y, 0)]
)
@pytest.mark.parametrize(
    ("rows", "labels", "error", "text"),
    [
        ([[0.5, 0.5]], Y, TypeError, "got list"),
        (P.long(), Y, TypeError, "floating-point tensor"),
        (P, Y.float(), TypeError, "labels must be an int64 tensor .* got dtype torch.float32"),
        (P, [0, 1, 0, 1], TypeError, "got list"),
        (P[0], Y, ValueError, r"must be \[N, K\]"),
        (P[:0], Y[:0], ValueError, r"N >= 1 .* got shape \(0, 2\)"),
        (P[:, :1], Y, ValueError, "K >= 2"),
        (P, Y[:3], ValueError, r"labels must have shape \(4,\)"),
        (P, Y + 1, ValueError, "0 to 1 for 2 classes, got 1 to 2"),
        (P, Y - 1, ValueError, "got -1 to 0"),
        (P * torch.nan, Y, ValueError, "finite, got 8 NaN"),
    ],
)
def test_bad_input_is_refused_in_words(function, rows, labels, error, text):
    with pytest.raises(error, match=text):
        function(rows, labels)


def test_probabilities_must_be_probabilities_and_bins_a_count():
    with pytest.raises(ValueError, match="are these logits"):
        expected_calibration_error(torch.tensor([[3.0, -2.0]]), Y[:1])
    with pytest.raises(ValueError, match=r"off by 0\.5"):
        expected_calibration_error(torch.tensor([[1.0, 0.5]]), Y[:1])
    for bins in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="bins must be an integer of at least 1"):
            expected_calibration_error(P, Y, bins=bins)
