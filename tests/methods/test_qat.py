"""Fake-quantized networks: on the grid, trainable, batchable, and reversible."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from course_lib.methods.qat import FakeQuantConv2d, FakeQuantLinear, fake_quantized, plain
from course_lib.methods.quantization import choose_qparams
from course_lib.methods.ranges import calibrate, record_inputs


def small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )


@pytest.fixture
def images():
    return torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(5))


def torch_grid(weight, bits, axis):
    q = choose_qparams(weight, bits, axis=axis)
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(weight, q.scale, q.zero_point, q.qmin, q.qmax)
    return torch.fake_quantize_per_channel_affine(weight, q.scale, q.zero_point, axis, q.qmin, q.qmax)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_outputs_equal_a_network_put_together_from_torch_functions(images, bits, per_channel):
    model = small_net()
    quantized = fake_quantized(
        model, weight_bits=bits, activation_bits=8, calibration=images, per_channel=per_channel, method="percentile"
    )
    x, axis = images, 0 if per_channel else None
    inputs = record_inputs(model, images)
    for name, layer in model.named_children():
        if name in inputs:
            q = calibrate(inputs[name], 8, method="percentile")
            x = torch.fake_quantize_per_tensor_affine(x, q.scale, q.zero_point, q.qmin, q.qmax)
            weight = torch_grid(layer.weight.detach(), bits, axis)
            conv = isinstance(layer, nn.Conv2d)
            x = F.conv2d(x, weight, layer.bias, padding=1) if conv else F.linear(x, weight, layer.bias)
        else:
            x = layer(x)
    torch.testing.assert_close(quantized(images), x, rtol=0, atol=1e-5)


def test_training_moves_the_weights_and_stays_on_the_grid(images):
    model = small_net()
    before = model[4].weight.clone()
    quantized = fake_quantized(model, weight_bits=2, per_channel=False)
    optimizer = torch.optim.SGD(quantized.parameters(), lr=0.5)
    labels = torch.arange(20) % 3
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(quantized(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < losses[0]
    assert isinstance(quantized[4], FakeQuantLinear)
    assert isinstance(quantized[0], FakeQuantConv2d)
    assert quantized[4].made_weight().unique().numel() <= 3
    assert quantized[4].weight.unique().numel() > 100
    assert torch.equal(model[4].weight, before)


def test_plain_holds_the_quantized_weights(images):
    quantized = fake_quantized(small_net(), weight_bits=3)
    ordinary = plain(quantized)
    assert type(ordinary[0]) is nn.Conv2d
    assert type(ordinary[4]) is nn.Linear
    assert set(ordinary.state_dict()) == set(small_net().state_dict())
    torch.testing.assert_close(ordinary(images), quantized(images))


def test_replicas_in_one_vmapped_pass_equal_one_by_one(images):
    models = [fake_quantized(small_net(s), weight_bits=3, activation_bits=4, calibration=images) for s in range(3)]
    params, buffers = stack_module_state(models)
    loss = vmap(lambda p, b: functional_call(models[0], (p, b), (images,)).square().mean())(params, buffers)
    loss.sum().backward()
    for r, model in enumerate(models):
        alone = model(images).square().mean()
        alone.backward()
        torch.testing.assert_close(loss[r], alone)
        torch.testing.assert_close(params["4.weight"].grad[r], model[4].weight.grad)


def test_zero_channels_and_skipped_layers(images):
    model = small_net()
    model[4].weight.data[0] = 0
    quantized = fake_quantized(model, weight_bits=4, skip=("6",))
    assert torch.isfinite(quantized(images)).all()
    assert type(quantized[6]) is nn.Linear
    assert "weight_bits=4" in repr(quantized)


def test_errors_leave_the_model_alone(images):
    model = small_net()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for options, text in (
        ({"weight_bits": 1}, "from 2 to 8"),
        ({"activation_bits": 9, "calibration": images}, "from 2 to 8"),
        ({"activation_bits": 8}, "calibration is None"),
        ({"activation_bits": 8, "calibration": images[:0]}, "images is empty"),
        ({"activation_bits": 8, "calibration": images * float("nan")}, "NaN"),
        ({"skip": ("5",)}, r"skip names no linear or convolution layer: \['5'\]"),
    ):
        with pytest.raises(ValueError, match=text):
            fake_quantized(model, **options)
    with pytest.raises(ValueError, match="FakeQuantConv2d already"):
        fake_quantized(fake_quantized(model))
    with pytest.raises(ValueError, match="no linear or convolution layer"):
        fake_quantized(nn.ReLU())
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
