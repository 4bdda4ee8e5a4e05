"""Surgery: take neurons and channels out of a network, so that what is left is an ordinary, smaller network.

The work is in finding who reads a neuron: ``torch.fx`` traces the forward pass, :class:`_Reader` follows the neurons
from their layer to the layers that consume them, and every tensor on the way loses the rows or columns in question.
What the walk does not understand it refuses by name, because a wrong guess would give a network that runs and is wrong.
"""

import copy
import difflib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from course_lib.methods.surgery_ops import (
    BINARY,
    CHANNEL,
    ELEMENTWISE,
    ELEMENTWISE_MODULES,
    FLAT_CHANNEL,
    FLAT_LAST,
    LAST,
    POOLING,
    POOLING_MODULES,
    cut_inputs,
    cut_outputs,
    cut_vectors,
    grouped,
    is_batch_size,
    is_flatten,
    is_global_mean,
    op_name,
    read_keep,
)

__all__ = ["CouplingError", "remove_neurons"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Cut = Callable[[Tensor], None]


class CouplingError(ValueError):
    """The neurons cannot be removed on their own: the text names the layer and what it is coupled to."""

    def __init__(self, layer: str, coupling: str):
        self.layer, self.coupling = layer, coupling
        super().__init__(
            f"cannot remove neurons of {layer!r}: {coupling}. remove_neurons follows plain chains of layers; "
            "for arbitrary graphs use torch-pruning (https://github.com/VainF/Torch-Pruning)"
        )


def remove_neurons(model: nn.Module, layer_name: str, keep: Tensor | Sequence[int] | Sequence[bool]) -> nn.Module:
    """Remove output neurons of a linear layer, or output channels of a convolution, and all that reads them.

    The new model computes what the old one computes when the removed neurons' *activations* are set to zero where they
    leave for the next layers, that is after BatchNorm, activation and pooling. Zeroing the layer's weights is the same
    only if zero stays zero on the way: a BatchNorm's shift or a sigmoid turns a zeroed row into a constant.

    Args:
        model: any module that ``torch.fx`` can trace.
        layer_name: name of an ``nn.Linear`` or ``nn.Conv1d/2d/3d`` in ``model.named_modules()``.
        keep: what stays: a bool mask ``[out]``, or distinct indices in [0, out). The order of indices does not matter.

    Returns:
        A new model of the same class. ``model`` is unchanged; mode, dtypes, devices and ``requires_grad`` are kept, and
        no random number is drawn. Gradients are not carried over.

    Raises:
        CouplingError: a residual sum, a concatenation, a grouped or depthwise convolution, a shared layer or weight,
            outputs of the whole model, a layer over all neurons (LayerNorm, attention), a forward that cannot be
            traced.
        ValueError: an unknown name, a layer of another kind, a ``keep`` that is empty, of the wrong length, out of
            range or with repeats.
        TypeError: ``keep`` is neither bool nor integer.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> remove_neurons(model, "0", [0, 2])
    Sequential(
      (0): Linear(in_features=4, out_features=2, bias=True)
      (1): ReLU()
      (2): Linear(in_features=2, out_features=2, bias=True)
    )
    """
    layer = _find_layer(model, layer_name)
    index = read_keep(keep, layer.weight.shape[0], layer_name)
    smaller = _copy(model, layer_name)
    cuts: dict[nn.Module, Cut] = {}
    # A forward may take another path while training (an auxiliary head): what is read on either path is cut.
    for training in (True, False):
        cuts.update(_Reader(smaller, layer_name, layer.weight.shape[0], training).cuts())
    if not cuts:
        raise CouplingError(layer_name, "forward never calls it by itself (it is unused, or part of a composite layer)")
    with torch.no_grad():
        for cut in cuts.values():
            cut(index)
    return smaller


def _copy(model: nn.Module, layer_name: str) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:  # torch cannot copy a tensor that was computed, such as a weight under torch's prune
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, *_CONVS)):
                _check_plain(module, name, layer_name)
        raise CouplingError(layer_name, f"the model cannot be copied ({str(error).splitlines()[0]})") from error


def _find_layer(model: nn.Module, layer_name: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    modules = dict(model.named_modules())
    fits = [name for name, module in modules.items() if isinstance(module, (nn.Linear, *_CONVS))]
    if layer_name not in modules:
        close = difflib.get_close_matches(str(layer_name), fits, n=3, cutoff=0.3)
        hint = ", ".join(close or fits) or "none, the model has no Linear or Conv layer"
        raise ValueError(f"no layer is called {layer_name!r}; the closest: {hint}")
    layer = modules[layer_name]
    if not isinstance(layer, (nn.Linear, *_CONVS)):
        raise ValueError(
            f"{layer_name!r} is a {type(layer).__name__}: neurons can be removed from Linear and Conv layers "
            f"({', '.join(fits) or 'there is none here'})"
        )
    _check_plain(layer, layer_name, layer_name)
    return layer


def _check_plain(module: nn.Module, name: str, layer_name: str) -> None:
    if module._parameters.get("weight") is None:
        raise CouplingError(layer_name, f"the weight of {name!r} is computed by a parametrization, remove that first")
    if isinstance(module.weight, nn.parameter.UninitializedParameter):
        raise CouplingError(layer_name, f"{name!r} is a lazy layer without a shape yet, run the model once first")


class _Reader:
    """Follows a layer's ``size`` neurons through the traced graph and collects one cut for each module on the way.

    ``where[node]`` says how a node's output carries the neurons: see the constants in ``surgery_ops``.
    """

    def __init__(self, model: nn.Module, layer_name: str, size: int, training: bool):
        self.model, self.layer_name, self.size = model, layer_name, size
        self.layer = model.get_submodule(layer_name)
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.owners: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.owners.setdefault(id(parameter), []).append(name)
        self.nodes = self._trace(training)
        self.where: dict[fx.Node, str] = {}
        self.found: dict[nn.Module, Cut] = {}

    def refuse(self, coupling: str) -> CouplingError:
        return CouplingError(self.layer_name, coupling)

    def _trace(self, training: bool) -> list[fx.Node]:
        modes = [m.training for m in self.model.modules()]
        self.model.train(training)
        try:
            with torch.random.fork_rng(devices=[]):
                return list(fx.Tracer().trace(self.model).nodes)
        except Exception as error:  # a forward may raise anything when it meets a proxy instead of a tensor
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise self.refuse(f"the forward of {type(self.model).__name__} cannot be traced ({reason})") from error
        finally:
            for module, mode in zip(self.model.modules(), modes, strict=True):
                module.training = mode

    def cuts(self) -> dict[nn.Module, Cut]:
        """The cuts for the layer and for all modules that see its neurons."""
        for node in self.nodes:
            if node.op == "call_module" and self.modules[node.target] is self.layer:
                self._start(node)
            elif any(source in self.where for source in node.all_input_nodes):
                self._step(node)
        return self.found

    def _start(self, node: fx.Node) -> None:
        if any(source in self.where for source in node.all_input_nodes):
            raise self.refuse(f"{node.target!r} reads its own outputs: it is called more than once")
        self._claim(node, self.layer)
        if getattr(self.layer, "groups", 1) > 1:
            raise self.refuse(f"it is a {grouped(self.layer)}")
        self.found[self.layer] = lambda keep: cut_outputs(self.layer, keep)
        self.where[node] = LAST if isinstance(self.layer, nn.Linear) else CHANNEL

    def _claim(self, node: fx.Node, module: nn.Module) -> None:
        """Make sure that ``module`` can be cut: called once, with a weight of its own."""
        name = node.target
        if sum(n.op == "call_module" and self.modules[n.target] is module for n in self.nodes) > 1:
            raise self.refuse(f"{name!r} is a shared layer, called more than once in forward")
        if isinstance(module, (nn.Linear, *_CONVS)):
            _check_plain(module, name, self.layer_name)
        for parameter in module.parameters(recurse=False):
            others = [owner for owner in self.owners[id(parameter)] if self._owner(owner) is not module]
            if others:
                raise self.refuse(f"a weight of {name!r} is shared with {others[0]!r}")
        for n in self.nodes:
            if n.op == "get_attr" and "." in n.target and self._owner(n.target) is module:
                raise self.refuse(f"{n.target!r} is shared: forward reads it beside calling {name!r}")

    def _owner(self, parameter_name: str) -> nn.Module:
        return self.modules[parameter_name.rpartition(".")[0]]

    def _step(self, node: fx.Node) -> None:
        if node.op == "output":
            raise self.refuse("its neurons are outputs of the whole model (logits)")
        if is_batch_size(node):
            return
        module = self.modules[node.target] if node.op == "call_module" else None
        name = op_name(node)
        state = next(self.where[source] for source in node.all_input_nodes if source in self.where)
        label = repr(node.target) if module is not None else f"{name} (node {node.name!r})"

        if isinstance(module, nn.Linear):
            if state == CHANNEL:
                raise self.refuse(f"{label} is a Linear that reads the last axis of a feature map, not its channels")
            self._consume(node, module, state, module.in_features, "in_features")
        elif isinstance(module, _CONVS):
            if state != CHANNEL:
                raise self.refuse(f"{label} is a convolution over what is no feature map with channels")
            if module.groups > 1:
                raise self.refuse(f"{label} is a {grouped(module)}")
            self._consume(node, module, state, module.in_channels, "in_channels")
        elif isinstance(module, _BatchNorm) or (isinstance(module, nn.PReLU) and module.num_parameters > 1):
            size = module.num_features if isinstance(module, _BatchNorm) else module.num_parameters
            self._claim(node, module)
            columns = self._columns(state, size, label)
            self.found[module] = lambda keep: cut_vectors(module, columns(keep))
            self.where[node] = state
        elif is_flatten(node, module):
            self.where[node] = {CHANNEL: FLAT_CHANNEL, LAST: FLAT_LAST}.get(state, state)
        elif is_global_mean(node) and state == CHANNEL:
            self.where[node] = LAST
        elif isinstance(module, ELEMENTWISE_MODULES) or (module is None and name in ELEMENTWISE):
            self.where[node] = state
        elif isinstance(module, POOLING_MODULES) or (module is None and name in POOLING):
            if state != CHANNEL:
                raise self.refuse(f"{label} pools over the neurons themselves")
            self.where[node] = state
        elif module is None and name in BINARY:
            self._binary(node, state, label)
        elif name in ("cat", "concat", "concatenate", "stack"):
            raise self.refuse(f"its outputs are concatenated with those of {self._others(node)} by {label}")
        else:
            kind = f"{label} is a {type(module).__name__}" if module is not None else f"forward calls {label}"
            raise self.refuse(f"{kind}, which couples neurons in a way it does not know")

    def _binary(self, node: fx.Node, state: str, label: str) -> None:
        others = [s for s in node.all_input_nodes if s not in self.where]
        if others:
            raise self.refuse(
                f"its outputs meet those of {self._others(node)} in {label}, a residual connection or gate"
            )
        if any(self.where[source] != state for source in node.all_input_nodes):
            raise self.refuse(f"{label} combines its outputs before and after flattening")
        self.where[node] = state

    def _others(self, node: fx.Node) -> str:
        others = [s for s in node.all_input_nodes if s not in self.where]
        names = [s.target if s.op in ("call_module", "get_attr", "placeholder") else s.name for s in others]
        return ", ".join(map(repr, names)) or "itself"

    def _consume(self, node: fx.Node, module: nn.Module, state: str, size: int, attribute: str) -> None:
        self._claim(node, module)
        columns = self._columns(state, size, repr(node.target))
        self.found[module] = lambda keep: cut_inputs(module, columns(keep), attribute)

    def _columns(self, state: str, size: int, label: str) -> Callable[[Tensor], Tensor]:
        """How kept neurons become kept columns of a layer with ``size`` inputs."""
        times, rest = divmod(size, self.size)
        if rest or times == 0 or (times > 1 and state in (CHANNEL, LAST)):
            raise self.refuse(f"{label} has {size} inputs, which do not come from {self.size} neurons alone")
        if state == FLAT_LAST:  # positions × features: the neuron's number runs fastest
            return lambda keep: (torch.arange(times)[:, None] * self.size + keep).flatten()
        return lambda keep: (keep[:, None] * times + torch.arange(times)).flatten()
