"""Swapping layers, and back."""

import pytest
import torch
from torch import nn

from course_lib.methods.layers import MadeWeight, new_like, plain, replace_layers


def test_plain_leaves_ordinary_models_equal_and_apart():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.Flatten(), nn.Linear(54, 2, bias=False))
    copy, x = plain(model), torch.randn(2, 4, 6, 6)
    assert torch.equal(copy(x), model(x))
    assert copy[0].weight is not model[0].weight


def test_a_shared_layer_stays_shared():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    new = replace_layers(model, lambda name, old: new_like(old, nn.Linear, old.weight.detach() * 2))
    assert new[0] is new[2]
    assert torch.equal(new[0].weight, layer.weight * 2)


def test_nested_and_bare_layers_are_found():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)).eval()
    names = []

    def convert(name, old):
        names.append(name)
        return new_like(old, nn.Linear, old.weight.detach())

    new = replace_layers(model, convert)
    assert names == ["0.0", "1"]
    assert not new[0][0].training
    assert isinstance(replace_layers(nn.Linear(2, 2), convert), nn.Linear)


def test_what_cannot_be_replaced():
    with pytest.raises(ValueError, match="no linear or convolution layer"):
        plain(nn.ReLU())
    conv = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")
    with pytest.raises(ValueError, match="padding_mode='circular'"):
        new_like(conv, nn.Conv2d, conv.weight.detach())
    with pytest.raises(NotImplementedError):
        MadeWeight().made_weight()
