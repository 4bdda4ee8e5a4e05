"""Rounding that looks at the inputs: each factor against its formula in a loop, hooks against arithmetic by hand."""

import pytest
import torch
from torch import nn

from course_lib.methods.outliers import (  # isort: skip
    awq_scales, linear_layers, round_scaled, rounded_inputs, smooth_scales, watch_inputs,
)  # fmt: skip
from course_lib.methods.quantization import choose_qparams, fake_quantize


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).requires_grad_(False)


def test_what_went_in_is_what_a_loop_sees(model):
    batch = torch.randn(5, 4, 6)  # texts, tokens, channels
    found = watch_inputs(model, batch)
    assert list(found) == list(linear_layers(model)) == ["0", "2"]
    for name, inputs in {"0": batch, "2": model[:2](batch)}.items():
        for channel in range(inputs.shape[-1]):
            x = inputs[..., channel].flatten()
            seen = [float(kind[channel]) for kind in (found[name].peak, found[name].mean, found[name].norm)]
            assert seen == pytest.approx([max(map(abs, x.tolist())), float(x.abs().mean()), float(x.norm())], rel=1e-5)
    assert not model[0]._forward_pre_hooks


def test_the_papers_factors_channel_by_channel():
    peak, weight = torch.rand(5) * 10, torch.randn(3, 5)
    for alpha in (0, 0.3, 1):
        smooth = [float(peak[i]) ** alpha / max(map(abs, weight[:, i].tolist())) ** (1 - alpha) for i in range(5)]
        torch.testing.assert_close(smooth_scales(peak, weight, alpha), torch.tensor(smooth))
        raw = torch.tensor([float(p) ** alpha for p in peak])
        torch.testing.assert_close(awq_scales(peak, alpha), raw / (raw.max() * raw.min()) ** 0.5)
    assert smooth_scales(torch.zeros(2), torch.zeros(1, 2)).isfinite().all()
    torch.testing.assert_close(awq_scales(torch.zeros(3), 0.5), torch.ones(3))


def test_factors_are_divided_out_again_and_matter_only_through_rounding():
    weight, scales = torch.randn(4, 12), torch.rand(12) + 0.5
    for group in (None, 3):
        grid = choose_qparams(weight * scales, 4, group=group, axis=None if group else 0)
        expected = fake_quantize(weight * scales, grid) / scales
        torch.testing.assert_close(round_scaled(weight, scales, 4, group=group), expected)
    torch.testing.assert_close(round_scaled(weight, torch.full((12,), 4.0), 4), round_scaled(weight, torch.ones(12), 4))


@pytest.mark.parametrize("scaled", [False, True])
def test_inputs_are_rounded_within_and_as_before_after_it(model, scaled):
    batch = torch.randn(7, 6)
    before, peaks = model(batch), {name: i.peak for name, i in watch_inputs(model, batch).items()}
    scales = {name: torch.rand(len(peak)) + 0.5 for name, peak in peaks.items()} if scaled else None

    def by_hand(x, name):
        s = scales[name] if scaled else torch.ones(x.shape[-1])
        step = float((peaks[name] / s).max()) / 127
        return torch.round(x / s / step).clamp(-127, 127) * step * s

    expected = model[2](by_hand(model[:2](by_hand(batch, "0")), "2"))
    with rounded_inputs(model, peaks, scales=scales):
        torch.testing.assert_close(model(batch), expected)
    assert torch.equal(model(batch), before)


def test_a_step_a_token_a_channel_in_float_and_clipping():
    layer = nn.Sequential(nn.Linear(3, 3, bias=False))
    layer[0].weight.data = torch.eye(3)
    x = torch.tensor([[100.0, 0.5, -0.25], [1.0, 0.5, -0.25]])
    with rounded_inputs(layer, None, bits=2):  # marks at -1, 0, 1 times the token's largest
        assert layer(x).tolist() == [[100.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    keep, peaks = {"0": torch.tensor([True, False, False])}, {"0": torch.tensor([100.0, 0.25, 0.25])}
    with rounded_inputs(layer, peaks, bits=2, keep=keep):  # the step is made without the kept one; 0.5 is clipped
        assert layer(x).tolist() == [[100.0, 0.25, -0.25], [1.0, 0.25, -0.25]]
    with pytest.raises(RuntimeError), rounded_inputs(layer, peaks):
        raise RuntimeError
    assert torch.equal(layer(x), x)


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match=r"takes numbers \[in\]; got \(2, 3\) and \(2,\)"):
        round_scaled(torch.ones(2, 3), torch.ones(2), 4)
    with pytest.raises(ValueError, match="alpha"):
        awq_scales(torch.ones(3), 1.5)


def test_all_calls_of_a_layer_count_and_the_model_stays_as_it_was():
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = 0.1 * torch.eye(2)
    found = watch_inputs(nn.Sequential(layer, layer), torch.full((3, 2), 5.0))["0"]
    assert found.peak.tolist() == [5.0, 5.0]
    torch.testing.assert_close(found.mean, torch.full((2,), 2.75))
    torch.testing.assert_close(found.norm, torch.full((2,), (3 * 25.25) ** 0.5))
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    x = torch.randn(50, 4)
    torch.testing.assert_close(watch_inputs(net, x)["2"].peak, x.abs().amax(0), rtol=1e-4, atol=1e-4)
    assert net[0].num_batches_tracked == 0
    assert net.training
