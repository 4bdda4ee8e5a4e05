"""GPTQ against the update it comes from, written out with a full inverse a column, and against all roundings."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

from course_lib.gate import UnsupportedModel
from course_lib.methods.gptq import gptq, gptq_layers, input_hessian
from course_lib.methods.quantization import choose_qparams, dequantize, fake_quantize, quantize


def layer_and_inputs(outputs=6, inputs=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(300, inputs, generator=generator) @ mixing  # inputs that go together
    return torch.randn(outputs, inputs, generator=generator), (x.T @ x / 300).double()


def output_error(weight, rounded, hessian):
    change = (weight - rounded).double()
    return (change @ hessian * change).sum().item()


def slow_gptq(weight, hessian, q, damping):
    """Optimal Brain Surgeon's update after each column, its inverse Hessian computed anew for the columns left."""
    w = weight.double().clone()
    h = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    for j in range(w.shape[1]):
        rounded = dequantize(quantize(w, q), q)[:, j].double()
        inverse = torch.linalg.inv(h[j:, j:])
        w[:, j:] -= ((w[:, j] - rounded) / inverse[0, 0])[:, None] * inverse[0]
        w[:, j] = rounded
    return w.float()


@pytest.mark.parametrize("slicing", [{}, {"axis": 0}, {"group": 4}])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_equals_the_update_with_a_full_inverse(bits, slicing):
    weight, hessian = layer_and_inputs()
    for symmetric in (True, False):
        q = choose_qparams(weight, bits, symmetric=symmetric, **slicing)
        found = gptq(weight, hessian, q)
        torch.testing.assert_close(found, slow_gptq(weight, hessian, q, 0.01), atol=1e-6, rtol=0)
        assert torch.equal(found, fake_quantize(found, q))  # on the grid


def test_between_the_best_rounding_and_the_nearest():
    totals = torch.zeros(3)
    for seed in range(20):
        weight, hessian = layer_and_inputs(outputs=1, inputs=5, seed=seed)
        q = choose_qparams(weight, 3)
        found = output_error(weight, gptq(weight, hessian, q, damping=1e-6), hessian)
        nearest = output_error(weight, fake_quantize(weight, q), hessian)
        grid = torch.arange(q.qmin, q.qmax + 1) * q.scale
        every = torch.tensor(list(product(grid.tolist(), repeat=5)))
        change = (weight - every).double()
        best = (change @ hessian * change).sum(dim=1).min().item()
        assert found >= best - 1e-9
        totals += torch.tensor([best, found, nearest])
    best, found, nearest = totals.tolist()
    assert (nearest - found) > 0.5 * (nearest - best)  # more than half of what rounding can gain


def test_inputs_that_have_nothing_to_do_with_each_other_leave_plain_rounding():
    weight, _ = layer_and_inputs()
    q = choose_qparams(weight, 3, axis=0)
    assert torch.equal(gptq(weight, torch.diag(torch.rand(8) + 0.1), q), fake_quantize(weight, q))


def test_an_input_that_is_always_zero_does_no_harm():
    weight, hessian = layer_and_inputs()
    hessian[2] = hessian[:, 2] = 0
    q = choose_qparams(weight, 4, axis=0)
    assert torch.equal(gptq(weight, hessian, q)[:, 2], fake_quantize(weight, q)[:, 2])


def test_layers_see_what_the_rounded_layers_before_them_give():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), torch.randn(40, 3, 6)
    before = copy.deepcopy(model.state_dict())
    rounded = gptq_layers(model, x, lambda w: choose_qparams(w, 3, axis=0))
    hidden = torch.relu(rounded[0](x)).flatten(0, 1).double()
    second, q = model[2].weight, choose_qparams(model[2].weight, 3, axis=0)
    torch.testing.assert_close(input_hessian(rounded, rounded[2], x, batch_size=7), hidden.T @ hidden / 120)
    assert torch.equal(rounded[2].weight, gptq(second, hidden.T @ hidden / 120, q))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(rounded[2].bias, model[2].bias)
    assert not rounded[0]._forward_pre_hooks


def test_a_model_in_training_mode_is_asked_as_it_will_answer():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 5)), torch.randn(40, 6)
    rounded = [gptq_layers(m, x, lambda w: choose_qparams(w, 3)) for m in (model.train(), copy.deepcopy(model).eval())]
    assert torch.equal(rounded[0][1].weight, rounded[1][1].weight)
    assert rounded[0].training


def test_a_weight_of_two_layers_is_refused():
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    with pytest.raises(UnsupportedModel, match="0 shares its weight"):
        gptq_layers(model, torch.randn(4, 5), lambda w: choose_qparams(w, 4))


def test_what_does_not_fit_is_named():
    weight, hessian = layer_and_inputs()
    q = choose_qparams(weight, 4)
    with pytest.raises(ValueError, match=r"\(7, 7\), \(6, 8\)"):
        gptq(weight, hessian[:7, :7], q)
    with pytest.raises(ValueError, match="no mean of x xᵀ"):
        gptq(weight, -hessian, q)
    model = nn.Sequential(nn.Linear(6, 5))
    with pytest.raises(ValueError, match=r"layer '0': group=4 does not divide .*; 3 would"):
        gptq_layers(model, torch.randn(4, 6), lambda w: choose_qparams(w, 4, group=4))
    with pytest.raises(ValueError, match="never called"):
        input_hessian(model, nn.Linear(6, 5), torch.randn(4, 6))


def test_the_hessian_of_a_model_in_half_precision_is_finite():
    layer, x = nn.Linear(8, 2).half(), (40 * torch.randn(640, 8)).half()
    hessian = input_hessian(layer, layer, x)
    torch.testing.assert_close(hessian, x.double().T @ x.double() / 640, rtol=1e-4, atol=1e-2)
