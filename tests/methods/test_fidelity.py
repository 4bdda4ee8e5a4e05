"""The article's floor, and decibels."""

import math

import numpy as np
import pytest
import torch

from course_lib.methods.fidelity import floor_quantize, signal_to_noise


def test_floor_is_biased_by_half_a_step_and_round_is_not():
    w = torch.rand(200_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    s = 10
    assert (floor_quantize(w, s) - w).mean().item() == pytest.approx(-0.5 / s, abs=1e-3)
    np.testing.assert_allclose(floor_quantize(w, s).numpy(), np.floor(w.numpy() * s) / s)


@pytest.mark.parametrize("s", [0, -1.0, math.nan, math.inf])
def test_grid_points_must_be_positive(s):
    with pytest.raises(ValueError, match="positive number of grid points"):
        floor_quantize(torch.ones(2), s)


def test_signal_to_noise_edges():
    x = torch.tensor([1.0, -1.0])
    assert signal_to_noise(x, x) == math.inf
    assert signal_to_noise(torch.zeros(2), x) == -math.inf
    assert signal_to_noise(x, torch.zeros(2)) == pytest.approx(0.0)
    with pytest.raises(ValueError, match="shapes differ"):
        signal_to_noise(x, torch.ones(3))
    for bad, error, text in (
        ([1.0, -1.0], TypeError, "approximation must be a torch.Tensor"),
        (torch.tensor([1, -1]), TypeError, "floating-point"),
        (torch.tensor([1.0, math.nan]), ValueError, "approximation .* holds 1 NaN or infinite value:"),
    ):
        with pytest.raises(error, match=text):
            signal_to_noise(x, bad)
    with pytest.raises(TypeError, match=r"w must be a torch\.Tensor"):
        floor_quantize([0.3], 10)
