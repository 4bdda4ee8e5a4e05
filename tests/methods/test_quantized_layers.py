"""Fake-quantized networks, calibration and folding: on the grid, trainable, batchable, reversible, tied, refused."""

import copy
import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from small_nets import settle
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from course_lib.gate import UnsupportedModel
from course_lib.methods.quantization import choose_qparams, fake_quantize, qparams_from_range

from course_lib.methods.quantized_layers import (  # isort: skip
    METHODS, calibrate, fake_quantized, fold_batchnorm, plain,
    recorded_inputs,
)  # fmt: skip


def small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip


@pytest.fixture
def images():
    return torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(5))


def torch_grid(weight, bits, axis):
    q = choose_qparams(weight, bits, axis=axis)
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(weight, q.scale, q.zero_point, q.qmin, q.qmax)
    return torch.fake_quantize_per_channel_affine(weight, q.scale, q.zero_point, axis, q.qmin, q.qmax)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [2, {"0": 8, "4": 2, "6": 3}])
def test_outputs_equal_a_network_put_together_from_torch_functions(images, bits, per_channel):
    model = small_net()
    options = {"activation_bits": 8, "calibration": images, "per_channel": per_channel, "method": "percentile"}
    quantized = fake_quantized(model, weight_bits=bits, **options)
    x, axis, inputs = images, 0 if per_channel else None, recorded_inputs(model, images)
    for name, layer in model.named_children():
        if name in inputs:
            q = calibrate(inputs[name], 8, method="percentile")
            x = torch.fake_quantize_per_tensor_affine(x, q.scale, q.zero_point, q.qmin, q.qmax)
            weight = torch_grid(layer.weight.detach(), bits[name] if isinstance(bits, dict) else bits, axis)
            x = F.conv2d(x, weight, layer.bias, padding=1) if name == "0" else F.linear(x, weight, layer.bias)
        else:
            x = layer(x)
    torch.testing.assert_close(quantized(images), x, rtol=0, atol=1e-5)


def test_groups_lie_along_what_is_summed_up(images):
    model = small_net()
    quantized = fake_quantized(model, weight_bits=3, group=4, skip=["0"])
    for name in ("4", "6"):
        weight = model.get_submodule(name).weight.detach()
        expected = fake_quantize(weight, choose_qparams(weight, 3, group=4))
        assert torch.equal(quantized.get_submodule(name).made_weight(), expected)
    whole = fake_quantized(nn.Sequential(nn.Conv2d(2, 3, 2)), weight_bits=4, group=8)[0]  # a group is a channel
    assert torch.equal(whole.made_weight(), torch_grid(whole.weight.detach(), 4, 0))
    with pytest.raises(ValueError, match=r"layer '0': group=4 does not divide the last dimension of shape \(4, 9\); 3"):
        fake_quantized(model, group=4)


def test_defaults(images):
    layer = fake_quantized(small_net(), activation_bits=8, calibration=images)[0]
    assert (layer.weight_bits, layer.activation_bits, layer.axis, layer.group) == (8, 8, 0, None)
    assert (calibrate(images).qmin, calibrate(images).qmax) == (0, 255)
    rare = torch.arange(-1000.0, 1001)  # 2 of 2001 are dropped at each end
    assert calibrate(rare, method="percentile").scale.item() == pytest.approx(1996 / 255)


def test_plain_holds_the_quantized_weights(images):
    quantized = fake_quantized(small_net(), weight_bits=3)
    ordinary = plain(quantized)
    assert [type(m) for m in ordinary] == [type(m) for m in small_net()]
    assert set(ordinary.state_dict()) == set(small_net().state_dict())
    torch.testing.assert_close(ordinary(images), quantized(images))
    again = plain(ordinary)
    assert torch.equal(again(images), ordinary(images))
    assert again[0].weight is not ordinary[0].weight


@pytest.mark.parametrize("options", [{}, {"group": 8}])
def test_replicas_in_one_vmapped_pass_equal_one_by_one(images, options):
    options |= {"weight_bits": 3, "activation_bits": 4, "calibration": images, "skip": ["0"]}
    models = [fake_quantized(small_net(s), **options) for s in range(3)]
    params, buffers = stack_module_state(models)
    loss = vmap(lambda p, b: functional_call(models[0], (p, b), (images,)).square().mean())(params, buffers)
    loss.sum().backward()
    for r, model in enumerate(models):
        alone = model(images).square().mean()
        alone.backward()
        torch.testing.assert_close(loss[r], alone)
        torch.testing.assert_close(params["4.weight"].grad[r], model[4].weight.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("row", [[0.0] * 4, [1e-38, 0.0, -1e-39, 0.0], [1e-4, 0, -1e-4, 0]])
@pytest.mark.parametrize("slicing", [{"axis": 0}, {"group": 2}])
def test_dead_channels_and_half_precision(dtype, row, slicing):
    net = nn.Linear(4, 3)
    net.weight.data[1] = torch.tensor(row)
    net = net.to(dtype)
    weight = plain(fake_quantized(net, group=slicing.get("group"))).weight
    assert weight.dtype == dtype
    assert torch.equal(weight, fake_quantize(net.weight, choose_qparams(net.weight, 8, **slicing)))
    assert (weight[1] - net.weight[1]).abs().max() <= 1.2e-38 + 0.01 * net.weight[1].abs().max()


def test_tied_layers_stay_tied():
    net, x = nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9, bias=False), nn.Linear(9, 3)), torch.randn(6, 9)
    net[2].weight = net[0].weight
    quantized = fake_quantized(net, weight_bits=4, activation_bits=8, calibration=x)
    assert quantized[0].weight is quantized[2].weight
    assert quantized[0].input_scale != quantized[2].input_scale
    ordinary = plain(quantized)
    assert ordinary[0].weight is ordinary[2].weight
    assert sum(p.numel() for p in ordinary.parameters()) == sum(p.numel() for p in net.parameters())
    with pytest.raises(UnsupportedModel, match="'2' shares its weight with another layer: both need the same"):
        fake_quantized(net, weight_bits={"0": 4, "2": 3})
    assert type(fake_quantized(net, weight_bits={"3": 3})[0]) is nn.Linear


SPOILT = {"activation_bits": 8, "calibration": torch.ones(2, 1, 8, 8) * math.nan}


@pytest.mark.parametrize(("options", "text"), [
    ({"weight_bits": 1}, "weight_bits must be an integer from 2"), ({"weight_bits": {"4": 9}}, r"weight_bits\['4'\]"),
    ({"weight_bits": {"5": 4}}, r"weight_bits names no linear or convolution layer: \['5'\]"),
    ({"activation_bits": 8}, "calibration is None"), ({"activation_bits": 9}, "from 2 to 8"),
    ({"activation_bits": 8, "calibration": torch.ones(0, 1, 8, 8)}, "images is empty"), (SPOILT, "NaN"),
    ({"skip": ("nope",)}, "nope"),
])  # fmt: skip
def test_what_cannot_be_quantized(options, text):
    with pytest.raises(ValueError, match=text):
        fake_quantized(small_net(), **options)


def test_models_that_cannot_be_quantized():
    model = small_net()
    model[6].weight.data[0, 0] = math.nan
    for unfit, text in (
        (model, "layer '6': x has 1 NaN"), (fake_quantized(small_net()), "'0' is FakeQuantConv2d already"),
        (nn.ReLU(), "no linear or convolution layer"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            fake_quantized(unfit)


def test_a_layer_that_calibration_does_not_reach():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.spare = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x, both=False):
            return (self.main(input=x), self.spare(x)) if both else self.main(input=x)

    with pytest.raises(UnsupportedModel, match="'spare' is not reached"):
        fake_quantized(Heads(), activation_bits=8, calibration=torch.ones(3, 2))
    fake_quantized(Heads(), activation_bits=8, calibration=torch.ones(3, 2), skip=["spare"])


def test_recorded_inputs_are_what_the_layers_saw():
    relu = nn.ReLU(inplace=True)
    model = nn.Sequential(relu, nn.Linear(4, 3), relu, nn.Dropout(0.9), nn.Linear(3, 3)).train()
    model.append(model[4])  # used twice
    model[3].eval()
    x = torch.randn(7, 4)
    before = x.clone()
    seen = recorded_inputs(model, x, batch_size=7)
    assert torch.equal(x, before)
    hidden = model[1](x.relu()).relu().detach()
    for name, parts in {"1": [x.relu()], "4": [hidden, model[4](hidden)]}.items():
        torch.testing.assert_close(seen[name], parts)
    assert [len(part) for part in recorded_inputs(model, x, batch_size=3)["1"]] == [3, 3, 1]
    assert (model.training, model[3].training) == (True, False)
    assert not model[1]._forward_pre_hooks
    (tokens,) = recorded_inputs(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)), torch.tensor([[1, 4], [0, 0]]))["1"]
    assert tokens.shape == (2, 2, 4)


@pytest.fixture
def skewed():
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)).relu()
    x[17] = 40.0
    return x


@pytest.mark.parametrize("symmetric", [True, False])
def test_minmax_equals_choose_qparams_and_several_tensors_are_one_sample(skewed, symmetric):
    reference = choose_qparams(skewed - 1, 8, symmetric=symmetric)
    for samples in (skewed - 1, [skewed[:9].reshape(3, 3) - 1, (skewed[9:] - 1), skewed[:0]]):
        ours = calibrate(samples, 8, symmetric=symmetric)
        assert (ours.scale, ours.zero_point) == (reference.scale, reference.zero_point)


def test_percentile_is_a_quantile_at_both_ends():
    x = torch.randn(10_001, generator=torch.Generator().manual_seed(3))
    low, high = np.quantile(x.numpy(), [0.005, 0.995])
    scale = calibrate(x, 8, method="percentile", percentile=99).scale
    assert scale.item() == pytest.approx((high - low) / 255, rel=0.01)
    assert calibrate(x, method="percentile", percentile=100).scale == calibrate(x).scale
    # Of ten values at 80 %, one is dropped at each end; of three at 1 %, the middle one is left.
    assert calibrate(torch.arange(1.0, 11), method="percentile", percentile=80).scale.item() == pytest.approx(9 / 255)
    assert calibrate(torch.arange(1.0, 4), method="percentile", percentile=1).scale.item() == pytest.approx(2 / 255)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 8])
def test_the_search_finds_the_least_error_of_all_candidates(skewed, bits, symmetric):
    def error(q):
        return (fake_quantize(skewed, q) - skewed).square().mean().item()

    grids = [qparams_from_range(0.0, 40.0 * k / 64, bits, symmetric=symmetric) for k in range(1, 65)]
    found = error(calibrate(skewed, bits, method="mse", symmetric=symmetric))
    assert found == pytest.approx(min(map(error, grids)), rel=1e-4)


def test_the_search_on_a_large_tensor_looks_at_a_sample():
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    small, large = calibrate(x[:30_000], 4, method="mse"), calibrate(x, 4, method="mse")
    assert large.scale.item() == pytest.approx(small.scale.item(), rel=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_constants_and_half_precision(method):
    for value in (0.0, 5.0, -5.0, 1e-38):
        x = torch.full((9,), value)
        torch.testing.assert_close(fake_quantize(x, calibrate(x, method=method)), x, rtol=1e-6, atol=1.2e-38)
    half = torch.linspace(-1, 3, 99).half()
    assert calibrate(half, method=method).scale == calibrate(half.float(), method=method).scale


@pytest.mark.parametrize(("samples", "options", "error", "text"), [
    (torch.ones(4), {"method": "entropy"}, ValueError, "method must be one of minmax, .*, got 'entropy'"),
    (torch.ones(4), {"bits": 9}, ValueError, "from 2 to 8"),
    (torch.ones(4), {"percentile": 0}, ValueError, "percentile above 0 and at most 100, got"),
    (torch.tensor([1.0, math.inf]), {}, ValueError, "samples has 1 NaN or infinite"),
    (torch.ones(4), {"percentile": math.nan}, ValueError, "percentile above 0 and at most 100, got"),
    (torch.ones(4), {"candidates": 1}, ValueError, "at least 2"),
    (torch.tensor([1, 2]), {}, TypeError, "floating-point"), (None, {}, TypeError, "not iterable"),
    ([1.0], {}, TypeError, "got float"), ([], {}, ValueError, "calibration is empty"),
    ([torch.ones(0), torch.ones(3, 0)], {}, ValueError, "calibration is empty"),
])  # fmt: skip
def test_bad_options(samples, options, error, text):
    with pytest.raises(error, match=text):
        calibrate(samples, **options)


def test_folding_keeps_the_function_and_the_model(images):
    net = settle(
        nn.Sequential(
            nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6, eps=0.3), nn.ReLU(),
            nn.Sequential(nn.Conv2d(6, 8, 3, groups=2), nn.BatchNorm2d(8, affine=False)), nn.Flatten(),
            nn.Linear(128, 16), nn.BatchNorm1d(16),
        )
    )  # fmt: skip
    state = copy.deepcopy(net.state_dict())
    folded = fold_batchnorm(net)
    assert [name for name, _ in folded.named_children()] == ["0", "2", "3_0", "4", "5"]
    assert not folded.training
    assert all(torch.equal(state[name], t) for name, t in net.state_dict().items())
    torch.testing.assert_close(folded(images), net.eval()(images), rtol=1e-4, atol=1e-5)


def test_modules_used_twice_are_folded_once_for_each_use():
    relu, linear, norm = nn.ReLU(), nn.Linear(5, 5), nn.BatchNorm1d(5)
    net = settle(nn.Sequential(linear, norm, relu, linear, relu, linear, norm))
    x = torch.randn(9, 5)
    folded = fold_batchnorm(net)
    assert len(folded) == 5
    assert torch.equal(folded[2].weight, linear.weight)
    torch.testing.assert_close(folded(x), net.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model", "text"), [
    (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)), "'1' .* does not follow a linear or convolution layer"),
    (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(7)), "with 7 outputs"),
    (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)), "keeps no statistics"),
    (nn.Linear(3, 3), "nn.Sequential"),
    (fake_quantized(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))), "FakeQuantLinear already; take plain"),
])  # fmt: skip
def test_folding_refuses_what_it_cannot_fold(model, text):
    with pytest.raises(UnsupportedModel, match=text):
        fold_batchnorm(model)


def test_folding_keeps_names_apart_and_what_is_frozen():
    torch.manual_seed(0)
    layers = {"fc": nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "fc_0": nn.Linear(4, 4), "out": nn.Linear(4, 2)}
    net, x = nn.Sequential(OrderedDict(layers)).eval(), torch.randn(20, 4)
    torch.testing.assert_close(fold_batchnorm(net)(x), net(x))
    frozen = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2)).requires_grad_(False)
    assert not any(p.requires_grad for p in fold_batchnorm(frozen).parameters())
    bare = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))
    bare(x)
    torch.testing.assert_close(fold_batchnorm(bare)(x), bare.eval()(x), rtol=1e-5, atol=1e-5)
