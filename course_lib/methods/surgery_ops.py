"""What :mod:`course_lib.methods.surgery` knows about operations: which leave each neuron to itself, and how to cut."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

# How a tensor carries n neurons. A conv's feature map [N, n, ...] holds them in dimension 1; a linear layer's output
# [..., n] in its last. Flattened, a channel is a run of consecutive columns, and a feature comes back every n columns.
CHANNEL, LAST, FLAT_CHANNEL, FLAT_LAST = "channel", "last", "flat channel", "flat last"

ELEMENTWISE_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Softplus, nn.Softsign),
    *(nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Threshold, nn.Identity),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
)
# Names are matched whether they are called as functions or as methods.
ELEMENTWISE = frozenset(
    (
        *("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "celu", "selu", "gelu", "silu", "mish"),
        *("sigmoid", "sigmoid_", "logsigmoid", "tanh", "tanh_", "hardtanh", "hardsigmoid", "hardswish", "softplus"),
        *("softsign", "clamp", "clamp_", "clip", "abs", "neg", "square", "sqrt", "exp", "erf"),
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"),
        *("contiguous", "clone", "detach", "float", "half", "double"),
    )
)
POOLING_MODULES = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
POOLING = frozenset(f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for d in (1, 2, 3))
BINARY = frozenset(
    (
        *("add", "iadd", "add_", "sub", "isub", "sub_", "mul", "imul", "mul_"),
        *("truediv", "itruediv", "div", "div_", "pow", "maximum", "minimum"),
    )
)


def op_name(node: fx.Node) -> str:
    """The bare name of what a node calls, such as ``"relu"`` for ``torch.relu``, ``F.relu`` and ``x.relu()`` alike."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def is_batch_size(node: fx.Node) -> bool:
    """Is this ``x.size(0)``, ``x.shape[0]``, or the ``x.shape`` of which only entry 0 is read?"""
    if node.op == "call_method" and node.target == "size":
        return node.args[1:] == (0,) or (len(node.args) == 1 and _only_first(node))
    if op_name(node) == "getattr":
        return node.args[1] == "shape" and _only_first(node)
    return op_name(node) == "getitem" and node.args[1] == 0 and is_batch_size(node.args[0])


def _only_first(node: fx.Node) -> bool:
    return all(op_name(user) == "getitem" and user.args[1] == 0 for user in node.users)


def is_flatten(node: fx.Node, module: nn.Module | None) -> bool:
    """Does this node flatten all but the batch dimension, whatever the number of channels?"""
    if module is not None:
        return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
    if op_name(node) == "flatten":
        start, end = _argument(node, 1, "start_dim", 0), _argument(node, 2, "end_dim", -1)
        return (start, end) == (1, -1)
    if op_name(node) in ("view", "reshape"):
        sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
        return len(sizes) == 2 and isinstance(sizes[0], fx.Node) and is_batch_size(sizes[0]) and sizes[1] == -1
    return False


def is_global_mean(node: fx.Node) -> bool:
    """Is this ``x.mean((2, 3))`` or ``x.mean((-2, -1))`` of a feature map, without ``keepdim``?"""
    if op_name(node) != "mean":
        return False
    dims = _argument(node, 1, "dim", None)
    dims = tuple(dims) if isinstance(dims, (tuple, list)) else (dims,)
    return sorted(map(str, dims)) in (["2", "3"], ["-1", "-2"]) and not _argument(node, 2, "keepdim", False)


def _argument(node: fx.Node, position: int, name: str, default: object) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def grouped(conv: nn.Module) -> str:
    kind = "depthwise" if conv.groups == conv.in_channels else "grouped"
    return f"{kind} convolution (groups={conv.groups}), whose inputs and outputs are tied"


def select(tensor: Tensor | None, dim: int, index: Tensor) -> Tensor | None:
    if tensor is None:
        return None
    part = tensor.detach().index_select(dim, index.to(tensor.device))
    return nn.Parameter(part, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part


def cut_outputs(layer: nn.Module, index: Tensor) -> None:
    layer.weight, layer.bias = select(layer.weight, 0, index), select(layer.bias, 0, index)
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", len(index))


def cut_inputs(layer: nn.Module, index: Tensor, attribute: str) -> None:
    layer.weight = select(layer.weight, 1, index)
    setattr(layer, attribute, len(index))


def cut_vectors(module: nn.Module, index: Tensor) -> None:
    """Cut the per-neuron vectors of a BatchNorm (weight, bias, running mean and variance) or of a PReLU."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        if getattr(module, name, None) is not None:
            setattr(module, name, select(getattr(module, name), 0, index))
    setattr(module, "num_features" if isinstance(module, _BatchNorm) else "num_parameters", len(index))


def read_keep(keep: Tensor | Sequence[int] | Sequence[bool], size: int, layer_name: str) -> Tensor:
    """``keep`` as sorted distinct indices."""
    given = torch.as_tensor(keep if hasattr(keep, "__array__") else list(keep)).detach().cpu()
    if given.dim() != 1:
        raise ValueError(f"keep must have one dimension, got shape {tuple(given.shape)}")
    if given.numel() == 0 or (given.dtype is torch.bool and len(given) == size and not given.any()):
        raise ValueError(
            f"keep leaves nothing: all {size} neurons of {layer_name!r} would be removed; keep at least one"
        )
    if given.dtype is torch.bool:
        if len(given) != size:
            raise ValueError(f"the mask keep must have one entry for each of the {size} neurons, got {len(given)}")
        return given.nonzero().flatten()
    if given.is_floating_point() or given.is_complex():
        raise TypeError(f"keep must be a bool mask or integer indices, got dtype {given.dtype}")
    given = given.long()
    if given.min() < 0 or given.max() >= size:
        wrong = given[(given < 0) | (given >= size)].tolist()
        raise ValueError(f"keep has indices outside [0, {size}): {wrong[:5]}")
    unique = given.unique()
    if len(unique) != len(given):
        raise ValueError(
            f"keep repeats indices: {len(given)} given, {len(unique)} distinct (a mask must be of dtype bool)"
        )
    return unique
