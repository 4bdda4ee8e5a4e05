"""Layers whose weight is made from something else at every forward pass, and the way back to ordinary layers."""

import copy
from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MadeWeight", "plain", "replace_layers", "weight_layers"]


class MadeWeight:
    """Mixin before ``nn.Linear`` or ``nn.Conv2d``: computes with :meth:`made_weight` on :meth:`made_input`."""

    def made_weight(self) -> Tensor:
        """The weight that the layer computes with, differentiable, in the shape of the original."""
        raise NotImplementedError

    def made_input(self, x: Tensor) -> Tensor:
        """What the layer does to its input first; nothing by default."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.made_input(x), self.made_weight()
        if isinstance(self, nn.Conv2d):
            return self._conv_forward(x, weight, self.bias)
        return F.linear(x, weight, self.bias)


def weight_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Names and modules of all linear and 2-D convolution layers, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            yield name, module


def replace_layers(model: nn.Module, convert: Callable[[str, nn.Module], nn.Module]) -> nn.Module:
    """A deep copy of ``model`` in which each linear and convolution layer is ``convert(name, layer)``.

    A layer that the model uses in two places is converted once and stays shared.
    """
    model = copy.deepcopy(model)
    if isinstance(model, (nn.Linear, nn.Conv2d)):
        return convert("", model).train(model.training)
    layers = list(weight_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear or convolution layer")
    new = {layer: convert(name, layer).train(layer.training) for name, layer in layers}
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):  # named_children() lists a shared layer once only
            if child in new:
                setattr(module, name, new[child])
    return model


def plain(model: nn.Module) -> nn.Module:
    """A copy with ordinary ``nn.Linear`` and ``nn.Conv2d`` layers that hold the weights computed with until now."""

    def convert(name: str, layer: nn.Module) -> nn.Module:
        if not isinstance(layer, MadeWeight):
            return layer
        return new_like(layer, nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear, layer.made_weight().detach())

    return replace_layers(model, convert)


def new_like(layer: nn.Module, kind: type, weight: Tensor, **options) -> nn.Module:
    """A ``kind`` with the shape, placement and bias of ``layer`` and with ``weight`` as its weight."""
    shared = {"bias": layer.bias is not None, "device": weight.device, "dtype": weight.dtype, **options}
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros":
            raise ValueError(f"only zero padding is supported, got padding_mode={layer.padding_mode!r}")
        sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
        new = kind(*sizes, layer.dilation, layer.groups, **shared)
    else:
        new = kind(layer.in_features, layer.out_features, **shared)
    if "weight" in new._parameters:  # a layer that makes its weight from other parameters has none of its own
        new.weight.data.copy_(weight)
    if layer.bias is not None:
        new.bias.data.copy_(layer.bias.detach())
    return new
