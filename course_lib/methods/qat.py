"""Networks that compute on a grid: post-training quantization as they stand, quantization-aware training when trained
on.

The article quantizes the weights once and then trains them, which takes them off the grid. Here the float weights
stay what the optimiser moves, and the quantizer sits inside the forward pass (Jacob et al. 2018; Krishnamoorthi
2018), with the straight-through gradient of :func:`~course_lib.methods.quantization.fake_quantize`.
"""

import torch
from torch import Tensor, nn

from course_lib.methods.layers import MadeWeight, new_like, plain, replace_layers
from course_lib.methods.quantization import check_bits, check_real, integer_range, straight_through
from course_lib.methods.ranges import calibrate, record_inputs

__all__ = ["FakeQuantConv2d", "FakeQuantLinear", "fake_quantized", "plain"]


class FakeQuant(MadeWeight):
    """Weight on a symmetric grid that follows its largest value; input on a fixed asymmetric grid, if one was given."""

    def __init__(self, *args, weight_bits: int = 8, activation_bits: int | None = None, per_channel=True, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight_bits, self.activation_bits, self.per_channel = weight_bits, activation_bits, per_channel
        device = self.weight.device
        self.register_buffer("input_scale", torch.ones((), device=device))
        self.register_buffer("input_zero_point", torch.zeros((), dtype=torch.int32, device=device))

    def made_weight(self) -> Tensor:
        qmin, qmax = integer_range(self.weight_bits, symmetric=True)
        weight = self.weight.detach()
        largest = weight.flatten(1).abs().amax(dim=1) if self.per_channel else weight.abs().amax().expand(1)
        # No branch on values: this runs under vmap, where many replicas train at once.
        scale = torch.where(largest > 0, largest / qmax, torch.ones_like(largest))
        scale = scale.reshape(-1, *[1] * (weight.dim() - 1))
        return straight_through(self.weight, scale, torch.zeros_like(scale), qmin, qmax)

    def made_input(self, x: Tensor) -> Tensor:
        if self.activation_bits is None:
            return x
        qmin, qmax = integer_range(self.activation_bits, symmetric=False)
        return straight_through(x, self.input_scale, self.input_zero_point, qmin, qmax)

    def extra_repr(self) -> str:
        bits = f"weight_bits={self.weight_bits}, activation_bits={self.activation_bits}"
        return f"{super().extra_repr()}, {bits}, per_channel={self.per_channel}"


class FakeQuantLinear(FakeQuant, nn.Linear):
    """``nn.Linear`` that computes with quantized weights and inputs; made by :func:`fake_quantized`."""


class FakeQuantConv2d(FakeQuant, nn.Conv2d):
    """``nn.Conv2d`` that computes with quantized weights and inputs; made by :func:`fake_quantized`."""


def fake_quantized(
    model: nn.Module,
    *,
    weight_bits: int = 8,
    activation_bits: int | None = None,
    calibration: Tensor | None = None,
    method: str = "minmax",
    per_channel: bool = True,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """A copy of ``model`` whose linear and convolution layers compute with numbers on a grid.

    As it stands that is post-training quantization; trained further it is quantization-aware training. Biases stay
    float, as the int32 accumulators hold them with more than enough bits. Fold BatchNorm first if the network is to
    run on integers (:func:`~course_lib.methods.integer.fold_batchnorm`). :func:`plain` gives ordinary layers with the
    quantized weights.

    Args:
        model: a trained network; it is not modified.
        weight_bits: 2 to 8, symmetric, largest value of the tensor or channel at the end of the grid.
        activation_bits: 2 to 8, asymmetric, or ``None`` to leave the inputs of the layers in float.
        calibration: images ``[N, ...]`` on which the inputs' ranges are recorded; needed with ``activation_bits``.
        method: how the ranges are chosen, see :func:`~course_lib.methods.ranges.calibrate`.
        per_channel: one weight scale for each output channel instead of one for the tensor.
        skip: names of layers to leave in float.

    Raises:
        ValueError: bits outside 2 to 8, empty or missing calibration data, a name in ``skip`` that is no layer.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> quantized = fake_quantized(model, weight_bits=2)
    >>> quantized[0].made_weight().unique().numel() <= 3 * 3
    True
    """
    weight_bits = check_bits(weight_bits)
    layers = {name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    unknown = set(skip) - layers
    if unknown:
        raise ValueError(f"skip names no linear or convolution layer: {sorted(unknown)} (there are: {sorted(layers)})")
    inputs = {}
    if activation_bits is not None:
        activation_bits = check_bits(activation_bits)
        if calibration is None:
            raise ValueError("activation_bits needs calibration images: calibration is None")
        inputs = record_inputs(model, calibration)

    def convert(name: str, layer: nn.Module) -> nn.Module:
        if isinstance(layer, MadeWeight):
            raise ValueError(f"{name} is {type(layer).__name__} already; take plain(model) first")
        if name in skip:
            return layer
        check_real(layer.weight, f"{name}.weight")
        kind = FakeQuantConv2d if isinstance(layer, nn.Conv2d) else FakeQuantLinear
        bits = activation_bits if name in inputs else None
        options = {"weight_bits": weight_bits, "activation_bits": bits, "per_channel": per_channel}
        new = new_like(layer, kind, layer.weight.detach(), **options)
        if bits is not None:
            q = calibrate(inputs[name], bits, method=method)
            new.input_scale.copy_(q.scale)
            new.input_zero_point.copy_(q.zero_point)
        return new

    return replace_layers(model, convert)
