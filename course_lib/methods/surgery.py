"""Surgery: take neurons and channels out of a network, so that what is left is an ordinary, smaller network.

The work is in finding who reads a neuron: ``torch.fx`` traces the forward pass, :class:`_Reader` follows the neurons
from their layer to the layers that consume them, and every tensor on the way loses the rows or columns in question.
What the walk does not understand it refuses by name, because a wrong guess would give a network that runs and is wrong.
"""

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from course_lib.gate import UnsupportedModel, check_model, copy_model, eval_mode, own_forward, real_tensor

__all__ = ["CouplingError", "recalibrate_batchnorm", "remove_neurons"]


class CouplingError(UnsupportedModel):
    """The neurons cannot be removed on their own: the text names the layer and what it is coupled to."""

    def __init__(self, layer: str, coupling: str):
        self.layer, self.coupling = layer, coupling
        fits = "remove_neurons follows plain chains of layers; for arbitrary graphs use torch-pruning"
        super().__init__(
            f"cannot remove neurons of {layer!r}: {coupling}. {fits} (https://github.com/VainF/Torch-Pruning)"
        )


def remove_neurons(model: nn.Module, layer_name: str, keep: Tensor | Sequence[int] | Sequence[bool]) -> nn.Module:
    """Remove output neurons of a linear layer, or output channels of a convolution, and all that reads them.

    The new model computes what the old one computes when the removed neurons' *activations* are zero where they leave
    for the next layers, after BatchNorm, activation and pooling. ``model`` is unchanged; modes, dtypes, devices and
    ``requires_grad`` are kept. ``layer_name`` is that of an ``nn.Linear`` or ``nn.Conv1d/2d/3d``; ``keep`` a bool mask
    ``[out]`` of what stays, or distinct indices in [0, out) in any order.

    CouplingError: a residual sum, a concatenation, groups, a shared layer or weight, logits, a layer over all neurons
    (LayerNorm, attention), a hard-coded size, an unknown operation, what cannot be traced or copied. ValueError,
    TypeError: an unknown name, another kind of layer, a ``keep`` that does not fit.

    >>> small = remove_neurons(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), "0", [0, 2])
    >>> small[0].weight.shape, small[2].weight.shape
    (torch.Size([2, 4]), torch.Size([2, 2]))
    """
    layer = _find_layer(model, layer_name)
    keep = _indices(keep, layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels, layer_name)
    cuts: dict[str, tuple[int, Tensor]] = {}
    # A forward may take another path while training (an auxiliary head): what is read on either path is cut.
    for training in (True, False):
        cuts.update(_Reader(copy_model(model), layer_name, keep, training).cuts())
    if not cuts:
        raise CouplingError(layer_name, "forward never calls it by itself (it is unused, or part of a composite layer)")
    smaller = copy_model(model)
    for name, (dim, index) in cuts.items():
        _cut(smaller.get_submodule(name), dim, index)
    return smaller


def recalibrate_batchnorm(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy whose BatchNorms hold the mean and variance of what they see on these images, all in one batch.

    After surgery the statistics are those of the larger network; they are taken from first to last, dropout off.
    ``images`` are ``[N, ...]``, N ≥ 2. UnsupportedModel: no BatchNorm that keeps statistics, or one that sees nothing.

    >>> net = nn.Sequential(nn.BatchNorm1d(1, affine=False))
    >>> recalibrate_batchnorm(net, torch.tensor([[1.0], [5.0]]))[0].running_mean
    tensor([3.])
    """
    real_tensor(images, "images")
    model = copy_model(model)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    before = {norm: (norm.momentum, norm.num_batches_tracked.clone()) for norm in norms.values()}
    with eval_mode(model), torch.no_grad():
        for norm in norms.values():
            norm.train().reset_running_stats()
            norm.momentum = None  # the plain mean over all calls of the layer, here one
        model(images)
    still = [name for name, norm in norms.items() if not norm.num_batches_tracked]
    if still or not norms:
        seen = f"{', '.join(still)} saw nothing or stays in eval mode"
        what = seen if still else "it has no BatchNorm with statistics"
        raise UnsupportedModel(f"cannot recalibrate this {type(model).__name__}: {what}")
    for norm, (momentum, tracked) in before.items():
        norm.momentum = momentum
        norm.num_batches_tracked.copy_(tracked)
    return model


# How a tensor carries n neurons. A conv's feature map [N, n, ...] holds them in dimension 1; a linear layer's output
# [..., n] in its last. Flattened, a channel is a run of consecutive columns, and a feature comes back every n columns.
_CHANNEL, _LAST, _FLAT_CHANNEL, _FLAT_LAST = "channel", "last", "flat channel", "flat last"
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Modules, functions and methods that treat each neuron alone; names in lower case and without underscores.
_POOLS = {f"{kind}pool{d}d" for kind in ("max", "avg", "adaptiveavg", "adaptivemax") for d in (1, 2, 3)}
_ALONE = _POOLS | {
    "relu", "relu6", "leakyrelu", "prelu", "elu", "celu", "selu", "gelu", "silu", "mish", "sigmoid", "logsigmoid",
    "tanh", "hardtanh", "hardsigmoid", "hardswish", "softplus", "softsign", "tanhshrink", "softshrink", "hardshrink",
    "threshold", "clamp", "clip", "abs", "neg", "square", "sqrt", "exp", "erf", "dropout", "dropout1d", "dropout2d",
    "dropout3d", "alphadropout", "featurealphadropout", "identity", "contiguous", "clone", "detach", "float", "half",
    "double", "add", "iadd", "sub", "isub", "mul", "imul", "truediv", "itruediv", "div", "pow", "maximum", "minimum",
}  # fmt: skip


class _Reader:
    """Follows the kept neurons of a layer through the traced graph and notes what is cut on the way.

    ``where[node]`` says how a node's output carries the neurons, ``rank[node]`` how many dimensions it has, if known,
    ``found[name]`` what is cut: (dimension, kept entries along it).
    """

    def __init__(self, model: nn.Module, layer_name: str, keep: Tensor, training: bool):
        self.model, self.layer_name, self.keep = model, layer_name, keep
        self.layer = model.get_submodule(layer_name)
        self.size = len(self.layer.weight)
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.where, self.rank, self.found = {}, {}, {}
        try:
            with torch.random.fork_rng(devices=[]):
                self.nodes = list(fx.Tracer().trace(model.train(training)).nodes)
        except Exception as error:  # a forward may raise anything when it meets a proxy instead of a tensor
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise self.refuse(f"the forward of {type(model).__name__} cannot be traced ({reason})") from error

    def refuse(self, coupling: str) -> CouplingError:
        return CouplingError(self.layer_name, coupling)

    def cuts(self) -> dict[str, tuple[int, Tensor]]:
        """What is to be cut of the layer and of all modules that see its neurons."""
        for node in self.nodes:
            module = self.modules[node.target] if node.op == "call_module" else None
            self.rank[node] = self._rank(node, module)
            carriers = [source for source in node.all_input_nodes if source in self.where]
            if module is self.layer:
                self._claim(node, module, 0, self.keep)
                self.where[node] = _LAST if isinstance(module, nn.Linear) else _CHANNEL
            elif carriers and not _is_batch_size(node):
                self._step(node, module, carriers)
        return self.found

    def _rank(self, node: fx.Node, module: nn.Module | None) -> int | None:
        if isinstance(module, _CONVS):
            return 2 + len(module.kernel_size)
        if _is_flatten(node, module) or _op_name(node) == "mean":
            return 2  # a mean that is not over all pixels is refused anyway
        if isinstance(module, (nn.Linear, _BatchNorm)) or _kind(node, module) in _ALONE:
            return next((self.rank[source] for source in node.all_input_nodes), None)
        return None

    def _step(self, node: fx.Node, module: nn.Module | None, carriers: list[fx.Node]) -> None:
        """One operation on the neurons: cut it, pass it, or refuse it."""
        name, kind, state, rank = _op_name(node), _kind(node, module), self.where[carriers[0]], self.rank[carriers[0]]
        label = repr(node.target) if module is not None else f"{name} (node {node.name!r})"
        others = [s.target if s.op != "call_function" else s.name for s in node.all_input_nodes if s not in carriers]
        flatten = _is_flatten(node, module)
        if node.op == "output":
            raise self.refuse("its neurons are outputs of the whole model (logits)")
        met = ", ".join(map(repr, others))
        if module is None and name in ("cat", "concat", "concatenate", "stack"):
            raise self.refuse(f"its outputs are concatenated with those of {met or 'itself'} by {label}")
        if others and not flatten:
            kinds = "a residual connection, gate or tensor of numbers for each neuron"
            raise self.refuse(f"its outputs meet those of {met} in {label}, {kinds}")
        if any(self.where[source] != state for source in carriers):
            raise self.refuse(f"{label} combines its outputs before and after flattening")

        if isinstance(module, (nn.Linear, *_CONVS)):
            linear = isinstance(module, nn.Linear)
            if linear and state == _CHANNEL:
                raise self.refuse(f"{label} is a Linear that reads the last axis of a feature map, not its channels")
            if not linear and state != _CHANNEL:
                raise self.refuse(f"{label} is a convolution over what is no feature map with channels")
            size = module.in_features if linear else module.in_channels
            self._claim(node, module, 1, self._entries(state, size, label))
        elif isinstance(module, _BatchNorm) or (isinstance(module, nn.PReLU) and module.num_parameters > 1):
            # Its numbers belong to dimension 1, which a linear layer's neurons are in only where there are two.
            if state == _LAST and rank != 2 and not (rank is None and type(self.model) is nn.Sequential):
                cure = "if there are no more than two dimensions, say so with x.flatten(1) before the layer"
                raise self.refuse(f"{label} works on dimension 1, which may not be the neurons' ({cure})")
            size = module.num_features if isinstance(module, _BatchNorm) else module.num_parameters
            self._claim(node, module, 0, self._entries(state, size, label))
            self.where[node] = state
        elif flatten:
            self.where[node] = {_CHANNEL: _FLAT_CHANNEL, _LAST: _FLAT_LAST}.get(state, state)
        elif state == _CHANNEL and _is_global_mean(node, rank):
            self.where[node] = _LAST
        elif kind in _ALONE:
            if kind in _POOLS and (state != _CHANNEL or rank != int(kind[-2]) + 2):
                raise self.refuse(f"{label} pools over the neurons themselves")
            self._plain(module, label)
            self.where[node] = state
        elif isinstance(module, (nn.Flatten, nn.Unflatten)) or name in ("view", "reshape", "flatten", "unflatten"):
            raise self.refuse(f"forward calls {label} with sizes of its own; write x.flatten(1), which fits any number")
        else:
            what = f"{label} is a {type(module).__name__}" if module is not None else f"forward calls {label}"
            raise self.refuse(f"{what}, which couples neurons in a way it does not know")

    def _plain(self, module: nn.Module | None, label: str) -> None:
        if module is not None and own_forward(module):
            raise self.refuse(f"{label} has a forward of its own")

    def _claim(self, node: fx.Node, module: nn.Module, dim: int, index: Tensor) -> None:
        """Note a cut of ``module``, which must be called once, with a weight of its own, in no groups."""
        name = node.target
        self._plain(module, repr(name))
        if sum(n.op == "call_module" and self.modules[n.target] is module for n in self.nodes) > 1:
            raise self.refuse(f"{name!r} is a shared layer, called more than once in forward")
        if getattr(module, "groups", 1) > 1:
            kind = "depthwise" if module.groups == module.in_channels else "grouped"
            what = "it" if module is self.layer else repr(name)
            raise self.refuse(f"{what} is a {kind} convolution (groups={module.groups}): inputs and outputs are tied")
        own = list(module.parameters(recurse=False))
        for other, parameter in self.model.named_parameters(remove_duplicate=False):
            owner = self.modules[other.rpartition(".")[0]]
            if owner is not module and any(parameter is p for p in own):
                raise self.refuse(f"a weight of {name!r} is shared with {other!r}")
        for n in self.nodes:
            if n.op == "get_attr" and self.modules.get(n.target.rpartition(".")[0]) is module is not self.model:
                raise self.refuse(f"{n.target!r} is shared: forward reads it beside calling {name!r}")
        self.found[name] = dim, index

    def _entries(self, state: str, size: int, label: str) -> Tensor:
        """How kept neurons become kept entries of a layer with ``size`` inputs."""
        times, rest = divmod(size, self.size)
        if rest or times == 0 or (times > 1 and state in (_CHANNEL, _LAST)):
            raise self.refuse(f"{label} has {size} inputs, which do not come from {self.size} neurons alone")
        if state == _FLAT_LAST:  # positions × features: the neuron's number runs fastest
            return (torch.arange(times)[:, None] * self.size + self.keep).flatten()
        return (self.keep[:, None] * times + torch.arange(times)).flatten()


def _op_name(node: fx.Node) -> str:
    """The bare name of what a node calls: ``"relu"`` for ``torch.relu``, ``F.relu``, ``x.relu()`` and ``x.relu_()``."""
    if node.op == "call_method":
        return node.target.rstrip("_")
    if node.op != "call_function":
        return ""
    name, home = node.target.__name__, node.target.__module__ or "torch"
    known = home.split(".")[0] in ("torch", "_operator", "builtins")
    return name.rstrip("_") if known else f"{home}.{name}"  # somebody's own relu may be anything


def _kind(node: fx.Node, module: nn.Module | None) -> str:
    """What a node does, whether by a module (which fx keeps only if it is torch.nn's), a function or a method."""
    return (_op_name(node) if module is None else type(module).__name__).replace("_", "").lower()


def _argument(node: fx.Node, position: int, name: str, default: object) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _is_batch_size(node: fx.Node) -> bool:
    """Is this ``x.size(0)``, ``x.shape[0]``, or the ``x.shape`` of which only entry 0 is read?"""
    first = all(_op_name(user) == "getitem" and user.args[1] == 0 for user in node.users)
    if _op_name(node) == "size":
        return _argument(node, 1, "dim", None) == 0 or (len(node.args) == 1 and not node.kwargs and first)
    if _op_name(node) == "getattr":
        return node.args[1] == "shape" and first
    return _op_name(node) == "getitem" and node.args[1] == 0 and _is_batch_size(node.args[0])


def _is_flatten(node: fx.Node, module: nn.Module | None) -> bool:
    """Does this node flatten all but the batch dimension, whatever the number of channels?"""
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1) and not own_forward(module)
    if _op_name(node) == "flatten":
        return (_argument(node, 1, "start_dim", 0), _argument(node, 2, "end_dim", -1)) == (1, -1)
    if _op_name(node) in ("view", "reshape"):
        sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
        return len(sizes) == 2 and isinstance(sizes[0], fx.Node) and _is_batch_size(sizes[0]) and sizes[1] == -1
    return False


def _is_global_mean(node: fx.Node, rank: int) -> bool:
    """Is this a mean over all dimensions of a feature map behind the channels, without ``keepdim``?"""
    dims = _argument(node, 1, "dim", ())
    dims = dims if isinstance(dims, (tuple, list)) else (dims,)
    whole = sorted(d % rank for d in dims if isinstance(d, int)) == list(range(2, rank))
    return _op_name(node) == "mean" and whole and not _argument(node, 2, "keepdim", False)


def _find_layer(model: nn.Module, layer_name: str) -> nn.Module:
    try:
        check_model(model, "remove neurons from")
    except UnsupportedModel as error:
        raise CouplingError(layer_name, str(error).removeprefix("cannot remove neurons from ")) from error
    modules = dict(model.named_modules())
    fits = [name for name, module in modules.items() if isinstance(module, (nn.Linear, *_CONVS))]
    if layer_name in fits:
        return modules[layer_name]
    close = difflib.get_close_matches(str(layer_name), fits, n=3, cutoff=0.3)
    hint = ", ".join(close or fits) or "none, the model has no Linear or Conv layer"
    if layer_name not in modules:
        raise ValueError(f"no layer is called {layer_name!r}; the closest: {hint}")
    kind = type(modules[layer_name]).__name__
    raise ValueError(f"{layer_name!r} is a {kind}: neurons can be removed from Linear and Conv layers ({hint})")


def _indices(keep: Tensor | Sequence[int] | Sequence[bool], size: int, layer_name: str) -> Tensor:
    """``keep`` as sorted distinct indices."""
    given = torch.as_tensor(keep if hasattr(keep, "__array__") else list(keep)).detach().cpu()
    mask = given.dtype is torch.bool
    if given.dim() != 1 or (mask and len(given) != size):
        fits = f"one dimension, and as a mask one entry for each of the {size} neurons"
        raise ValueError(f"keep must have {fits}, got shape {tuple(given.shape)}")
    kept = given.nonzero().flatten() if mask else given
    if len(kept) == 0:
        raise ValueError(f"keep leaves nothing: all {size} neurons of {layer_name!r} would be removed")
    if kept.is_floating_point() or kept.is_complex():
        raise TypeError(f"keep must be a bool mask or integer indices, got dtype {kept.dtype}")
    if outside := [i for i in kept.tolist() if not 0 <= i < size]:
        raise ValueError(f"keep has indices outside [0, {size}): {outside[:5]}")
    unique = kept.long().unique()
    if len(unique) != len(kept):
        repeated = f"{len(kept)} given, {len(unique)} distinct"
        raise ValueError(f"keep repeats indices: {repeated} (a mask must be of dtype bool)")
    return unique


def _cut(module: nn.Module, dim: int, index: Tensor) -> None:
    """Keep the entries ``index`` of a module's outputs and per-neuron vectors (``dim`` 0) or of its inputs (1)."""
    for name in ("weight", "bias", "running_mean", "running_var") if dim == 0 else ("weight",):
        tensor = getattr(module, name, None)
        if tensor is not None:
            part = tensor.detach().index_select(dim, index.to(tensor.device))
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(module, name, nn.Parameter(part, tensor.requires_grad) if is_parameter else part)
    outputs = ("out_features", "out_channels", "num_features", "num_parameters")
    sizes = outputs if dim == 0 else ("in_features", "in_channels")
    setattr(module, next(size for size in sizes if hasattr(module, size)), len(index))
