"""Networks that compute on a grid: post-training quantization as they stand, quantization-aware when trained on.

The float weights stay what the optimiser moves, the quantizer sits in the forward pass with a straight-through gradient
(Jacob et al. 2018; Krishnamoorthi 2018). The ranges of activations are recorded on calibration images.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from course_lib.gate import (  # isort: skip
    UnsupportedModel, chain_steps, check_model, copy_model, eval_mode, input_hooks, new_like, replace_layers,
    weight_layers, whole_number,
)  # fmt: skip
from course_lib.methods.quantization import (  # isort: skip
    QuantParams, check_real, choose_qparams, integer_range, naming, qparams_from_range, scale_and_zero, slices,
    spread, straight_through,
)  # fmt: skip

__all__ = [
    "METHODS", "FakeQuant", "FakeQuantConv2d", "FakeQuantLinear", "MadeWeight", "calibrate", "fake_quantized",
    "fold_batchnorm", "plain",
]  # fmt: skip

METHODS = ("minmax", "percentile", "mse")
MOST_SAMPLES = 1 << 15  # that the search looks at: an even sample gives the same range to a percent


class MadeWeight:
    """Mixin before ``nn.Linear`` or ``nn.Conv2d``: computes with a weight that ``made_weight()`` makes."""

    def made_input(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        compute = self._conv_forward if isinstance(self, nn.Conv2d) else F.linear
        return compute(self.made_input(x), self.made_weight(), self.bias)


class FakeQuant(MadeWeight):
    """Weight on a symmetric grid that follows its largest value; input on a fixed asymmetric grid, if one was given."""

    def __init__(
        self, *args, weight_bits: int, per_channel: bool, group: int | None, input_grid: QuantParams | None, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.weight_bits, self.axis, self.group = weight_bits, 0 if per_channel and group is None else None, group
        self.activation_bits = None if input_grid is None else input_grid.bits
        scale, zero = (1.0, 0) if input_grid is None else (input_grid.scale.item(), input_grid.zero_point.item())
        device = self.weight.device
        self.register_buffer("input_scale", torch.tensor(scale, device=device))
        self.register_buffer("input_zero_point", torch.tensor(zero, dtype=torch.int32, device=device))

    def made_weight(self) -> Tensor:
        # A row holds what is summed up for one output. No branch on values: replicas train at once under vmap.
        rows = self.weight.flatten(1)
        qmin, qmax = integer_range(self.weight_bits, symmetric=True)
        largest = slices(rows.detach(), self.axis, self.group).abs().amax(dim=-1)
        grid = scale_and_zero(-largest, largest, qmin, qmax)
        scale, zero_point = (spread(part, 2, self.axis, self.group) for part in grid)
        on_grid = straight_through(rows, scale, zero_point, qmin, qmax)
        return on_grid.view_as(self.weight)

    def made_input(self, x: Tensor) -> Tensor:
        if self.activation_bits is None:
            return x
        qmin, qmax = integer_range(self.activation_bits, symmetric=False)
        return straight_through(x, self.input_scale.float(), self.input_zero_point, qmin, qmax)


class FakeQuantLinear(FakeQuant, nn.Linear):
    """Made by :func:`fake_quantized`."""


class FakeQuantConv2d(FakeQuant, nn.Conv2d):
    """Made by :func:`fake_quantized`."""


def fake_quantized(
    model: nn.Module, *, weight_bits: int | dict[str, int] = 8, activation_bits: int | None = None,
    calibration: Tensor | None = None, method: str = "minmax", per_channel: bool = True, group: int | None = None,
    skip: Collection[str] = (),
) -> nn.Module:  # fmt: skip
    """A copy of ``model`` whose linear and convolution layers compute with numbers on a grid.

    As it stands that is post-training quantization; trained further it is quantization-aware training. Biases stay
    float, tied layers stay tied; :func:`plain` gives ordinary layers back.

    Args:
        weight_bits: 2 to 8, symmetric; or by layer name (mixed precision): others, and those in ``skip``, stay float.
        activation_bits: 2 to 8, asymmetric, or ``None``: the layers' inputs stay float. Their ranges are chosen on the
            images ``calibration`` [N, ...] by a ``method`` of :func:`calibrate`.
        per_channel: a weight scale for each output channel; or one for each ``group`` consecutive weights of an output.

    UnsupportedModel: see :func:`~course_lib.gate.replace_layers`; a layer that the calibration images do not reach;
    tied layers with different bits. ValueError: bits, names, group or calibration data that do not fit.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> fake_quantized(model, weight_bits={"0": 2, "2": 8})[0].made_weight().unique().numel() <= 3 * 3
    True
    """
    bits, skip = bits_by_layer(model, weight_bits, "weight_bits", 2, skip)
    inputs: dict[str, list[Tensor]] = {}
    if activation_bits is not None:
        integer_range(activation_bits, symmetric=False)
        if calibration is None:
            raise ValueError("activation_bits needs calibration images: calibration is None")
        inputs = recorded_inputs(model, calibration)
    same: dict[nn.Parameter, int] = {}

    def convert(name: str, layer: nn.Module) -> nn.Module:
        refuse_made(name, layer)
        if same.setdefault(layer.weight, bits[name]) != bits[name]:
            raise UnsupportedModel(f"{name!r} shares its weight with another layer: both need the same weight_bits")
        if activation_bits is not None and name not in inputs:
            raise UnsupportedModel(f"{name!r} is not reached by the calibration images; name it in skip")
        with naming(name):
            choose_qparams(layer.weight.flatten(1), bits[name], group=group)  # says what is wrong with weight or group
            grid = None if activation_bits is None else calibrate(inputs[name], activation_bits, method=method)
        kind = FakeQuantConv2d if isinstance(layer, nn.Conv2d) else FakeQuantLinear
        options = {"weight_bits": bits[name], "per_channel": per_channel, "group": group, "input_grid": grid}
        return new_like(layer, kind, layer.weight.detach(), **options)

    return replace_layers(model, convert, skip=skip, doing="quantize")


def bits_by_layer(
    model: nn.Module, bits: int | dict[str, int], what: str, least: int, skip: Collection[str] = ()
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Bits of every layer by name, and what is to be skipped: ``skip`` and, if ``bits`` is a dict, layers not in it."""
    layers = weight_layers(model)
    if not isinstance(bits, dict):
        return dict.fromkeys(layers, whole_number(bits, what, least, 8)), tuple(skip)
    if unknown := sorted(set(bits) - set(layers)):
        raise ValueError(f"{what} names no linear or convolution layer: {unknown} (there are: {sorted(layers)})")
    widths = {name: whole_number(width, f"{what}[{name!r}]", least, 8) for name, width in bits.items()}
    return widths, (*skip, *(name for name in layers if name not in bits))


def refuse_made(name: str, layer: nn.Module) -> None:
    """A layer that makes its weight is no starting point: its quantized weights are."""
    if isinstance(layer, MadeWeight):
        raise UnsupportedModel(f"{name!r} is {type(layer).__name__} already; take plain(model) first")


def plain(model: nn.Module) -> nn.Module:
    """A copy with ordinary ``nn.Linear`` and ``nn.Conv2d`` layers that hold the weights computed with until now.

    >>> plain(fake_quantized(nn.Linear(4, 3), weight_bits=4))
    Linear(in_features=4, out_features=3, bias=True)
    """

    def convert(name: str, layer: nn.Module) -> nn.Module:
        return new_like(layer, nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear, layer.made_weight().detach())

    modules = dict(model.named_modules(remove_duplicate=False)) if isinstance(model, nn.Module) else {}
    others = [n for n, module in modules.items() if not any(isinstance(m, MadeWeight) for m in module.modules())]
    if len(others) == len(modules):
        return copy_model(model)
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return replace_layers(model, convert, skip=(*others, *parameters), doing="make plain")


def recorded_inputs(model: nn.Module, images: Tensor, batch_size: int = 512) -> dict[str, list[Tensor]]:
    """What reaches each linear and convolution layer, in eval mode: ``{layer name: [inputs of a call, ...]}``."""
    check_model(model, "record the inputs of")
    if not isinstance(images, Tensor) or images.is_floating_point() or not len(images):
        check_real(images, "images")  # whole numbers are welcome: the tokens of a language model
    recorded: dict[str, list[Tensor]] = {}

    def listen(name: str, x: Tensor) -> None:
        recorded.setdefault(name, []).append(x.clone())

    with eval_mode(model), torch.no_grad(), input_hooks(weight_layers(model), listen):
        for batch in images.split(batch_size):
            model(batch.clone())
    return recorded


def calibrate(
    samples: Tensor | Iterable[Tensor], bits: int = 8, *, method: str = "minmax", symmetric: bool = False,
    percentile: float = 99.9, candidates: int = 64,
) -> QuantParams:  # fmt: skip
    """One grid for an activation, from recorded finite values of any shape, as one tensor or several.

    ``"minmax"`` keeps every value and lets one outlier set the step; ``"percentile"`` keeps the central ``percentile``
    per cent, in (0, 100]; ``"mse"`` weighs rounding against clipping: of ``candidates`` (≥ 2) ranges, shrunk evenly
    from min-max towards 0, the one with the least squared error (compared by Nagel et al. 2021).

    >>> x = torch.cat([torch.linspace(0, 1, 999), torch.tensor([8.0])])
    >>> [round(calibrate(x, bits=4, method=m).scale.item(), 3) for m in METHODS]
    [0.533, 0.067, 0.425]
    """
    if method not in METHODS or not 0 < percentile <= 100:
        fits = f"one of {', '.join(METHODS)}, percentile above 0 and at most 100"
        raise ValueError(f"method must be {fits}, got {method!r} and {percentile!r}")
    candidates = whole_number(candidates, "candidates", 2)
    tensors = [samples] if isinstance(samples, Tensor) else list(samples)
    values = [check_real(t, "samples", empty=True).flatten().float() for t in tensors]
    if not sum(map(len, values)):
        raise ValueError("calibration is empty: it needs at least one recorded value")
    x = torch.cat(values).sort().values
    low, high = x[0], x[-1]
    if method == "percentile":
        dropped = min(math.ceil(len(x) * (100 - percentile) / 200 - 1e-6), (len(x) - 1) // 2)  # at each end
        low, high = x[dropped], x[len(x) - 1 - dropped]
    elif method == "mse":
        low, high = least_error_range(x, bits, symmetric, candidates)
    return qparams_from_range(low, high, bits, symmetric=symmetric)


def least_error_range(x: Tensor, bits: int, symmetric: bool, candidates: int) -> tuple[Tensor, Tensor]:
    """Of evenly shrunk ranges of ascending values, the one whose grid has the least mean squared error."""
    # The largest values decide where clipping starts to hurt, so an even sample is taken from the top.
    sample = x.flip(0)[:: -(-len(x) // MOST_SAMPLES)]
    shares = torch.linspace(1, 1 / candidates, candidates, device=x.device).unsqueeze(1)
    qmin, qmax = integer_range(bits, symmetric=symmetric)
    grids = scale_and_zero(x[0] * shares, x[-1] * shares, qmin, qmax)
    error = (straight_through(sample, *grids, qmin, qmax) - sample).square().mean(dim=1)
    best = shares[error.argmin(), 0]
    return x[0] * best, x[-1] * best


def fold_batchnorm(model: nn.Sequential) -> nn.Sequential:
    """A copy of a chain in which each BatchNorm is part of the linear or convolution layer before it.

    In eval mode BatchNorm is y = γ (x - μ) / √(σ² + ε) + β, a scale and a shift a channel (Jacob et al. 2018, equation
    14). The copy is one flat ``nn.Sequential`` in eval mode: with BatchNorm gone there is no other.
    UnsupportedModel: no chain of plain layers, or a BatchNorm that does not follow such a layer.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU())
    >>> [type(m).__name__ for m in fold_batchnorm(net)]
    ['Conv2d', 'ReLU']
    """
    folded: list[tuple[str, nn.Module]] = []
    for name, module in chain_steps(copy_model(model, "fold"), "fold"):
        refuse_made(name, module)
        if not isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            folded.append((name, module))
            continue
        before, layer = folded[-1] if folded else ("", module)
        outputs = layer.weight.shape[0] if isinstance(layer, (nn.Linear, nn.Conv2d)) else None
        if outputs != module.num_features or module.running_var is None:
            need = f"a linear or convolution layer with {module.num_features} outputs"
            raise UnsupportedModel(f"{name!r} ({module}) does not follow {need}, or keeps no statistics")
        # Copies in float64: nothing is lost on the way, and elsewhere in the chain the same layer may come alone.
        fuse = fuse_conv_bn_eval if isinstance(layer, nn.Conv2d) else fuse_linear_bn_eval
        norm = copy.deepcopy(module).double().eval()
        if not norm.affine:
            norm.weight = nn.Parameter(torch.ones_like(norm.running_var))
            norm.bias = nn.Parameter(torch.zeros_like(norm.running_var))
        exact = fuse(copy.deepcopy(layer).double().eval(), norm)
        free = [p.requires_grad for p in (layer.bias, module.bias, layer.weight) if p is not None]
        exact.bias.requires_grad_(free[0])
        folded[-1] = (before, exact.to(layer.weight.dtype))
    flat: OrderedDict[str, nn.Module] = OrderedDict()
    for name, module in folded:
        name = name.replace(".", "_")
        while name in flat:  # "a.0" beside "a_0"
            name += "_"
        flat[name] = module
    return nn.Sequential(flat).eval()
