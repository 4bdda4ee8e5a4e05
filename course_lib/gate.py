"""The one gate: looks at a model before anything copies, converts or walks it, and says by name what does not fit.

What stands behind it is plain code without checks of its own. The rule: a copy or a converted network computes what it
should, or :class:`UnsupportedModel` names the module at fault and the way out.
"""

import copy
import dis
import inspect
import numbers
import operator
import types
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, fx, nn

__all__ = [
    "UnsupportedModel", "chain_steps", "check_model", "computed", "copy_model", "eval_mode", "input_hooks", "new_like",
    "one_memory", "own_forward", "real_tensor", "replace_layers", "share_of", "weight_layers", "whole_number",
]  # fmt: skip


def share_of(value: float, name: str) -> float:
    """``value`` as a float, if it is a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number in [0, 1), got {value!r} ({type(value).__name__})")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")
    return float(value)


def whole_number(value: int, name: str, least: int = 1, most: int | None = None) -> int:
    """``value`` as an int within [least, most]; integers of NumPy are welcome, bools are not."""
    fits = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be {fits}, got {value!r}")
    if not least <= operator.index(value) <= (value if most is None else most):
        raise ValueError(f"{name} must be {fits}, got {value}")
    return operator.index(value)


def real_tensor(value: Tensor, name: str, *, finite: bool = True) -> Tensor:
    """``value`` without its history, half precision as float32, integers as float64; not empty, without NaN."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype is torch.bool or value.is_complex():
        raise TypeError(f"{name} must hold real numbers, got dtype {value.dtype}, shape {tuple(value.shape)}")
    if value.numel() == 0:
        raise ValueError(f"{name} is empty, shape {tuple(value.shape)}")
    if value.dtype not in (torch.float32, torch.float64):
        value = value.to(torch.float32 if value.is_floating_point() else torch.float64)
    value = value.detach()
    if bad := int((~value.isfinite() if finite else value.isnan()).sum()):
        kind = "NaN or infinite" if finite else "NaN"
        raise ValueError(f"{name} has {bad} {kind} entries of {value.numel()}, shape {tuple(value.shape)}")
    return value


Convert = Callable[[str, nn.Module], nn.Module]


class UnsupportedModel(ValueError):
    """A part of the model cannot be handled rightly: the text names the module and says what fits."""


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode inside the block; afterwards every submodule is back in the mode that it had.

    >>> with eval_mode(nn.Dropout()) as model: print(model.training)
    False
    >>> model.training
    True
    """
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield model
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def input_hooks(layers: Mapping[str, nn.Module], hook: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Within it ``hook(name, x)`` sees every input of the layers; what it returns, if anything, goes in instead.

    >>> with input_hooks({"a": (relu := nn.ReLU())}, lambda name, x: print(name, x.shape)): y = relu(torch.ones(2))
    a torch.Size([2])
    """

    def before(name: str, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        x = hook(name, args[0] if args else kwargs["input"])
        return None if x is None else ((x,), {})

    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(partial(before, name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def check_model(model: nn.Module, doing: str = "copy", *, plain: bool = True) -> None:
    """Refuse what torch wraps around a model and what a deep copy would share or lose; see :func:`copy_model`.

    With ``plain=False`` wrappers, parametrizations and hooks of a forward pass may stay: they work in a copy, too.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if fault := (plain and (computed(module) or _wrapped(module) or _hooked(module))) or _lost(module):
            raise UnsupportedModel(f"cannot {doing} {_named(name, module)}: {fault}")
    if pair := one_memory(model):
        cure = "tie them as one parameter (b.weight = a.weight; F.linear(x, a.weight.t()) for a transposed one)"
        raise UnsupportedModel(f"cannot {doing} this {type(model).__name__}: {' and '.join(pair)} share memory; {cure}")


def one_memory(model: nn.Module) -> tuple[str, ...]:
    """The names of two parameters that are different objects in the same memory, or nothing."""
    spans = []
    for name, p in model.named_parameters():
        if not isinstance(p, nn.parameter.UninitializedParameter) and p.numel() and p.layout is torch.strided:
            last = sum((size - 1) * step for size, step in zip(p.shape, p.stride(), strict=True))
            if p.device.type != "meta":
                spans.append((str(p.device), p.data_ptr(), p.data_ptr() + (1 + last) * p.element_size(), name))
    pairs = pairwise(sorted(spans))
    return next((tuple(sorted((a[3], b[3]))) for a, b in pairs if a[0] == b[0] and b[1] < a[2]), ())


def computed(module: nn.Module) -> str:
    """Why a weight of this module is no plain parameter, or an empty text."""
    # torch.nn.utils.prune and weight_norm leave a plain tensor where the parameter was, and renew it by a hook.
    plain = [key for key, value in vars(module).items() if isinstance(value, Tensor)]
    if nn.utils.parametrize.is_parametrized(module) or (plain and module._forward_pre_hooks):
        name = plain[0] if plain else next(iter(module.parametrizations))
        cure = "prune.remove(layer, 'weight') or parametrize.remove_parametrizations(layer, 'weight') of torch.nn.utils"
        return f"its {name} is no plain parameter but computed by a parametrization; make it permanent first ({cure})"
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters(recurse=False)):
        return "its weight has no shape yet (a lazy layer); run the model once first"
    packed = hasattr(module, "_packed_params")
    return "its weights are integers packed by torch.ao; give the model in floats" if packed else ""


def _wrapped(module: nn.Module) -> str:
    if type(module).__name__ == "OptimizedModule":
        return "torch.compile wraps it; give model._orig_mod, and compile what comes out"
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript has no Python layers; give the module that was scripted"
    parallel = isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    return "it is spread over devices; give model.module, and wrap what comes out" if parallel else ""


def _hooked(module: nn.Module) -> str:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, kind, None) for kind in kinds):
        return "its hook would still write into this model's objects from a copy; take it off first (handle.remove())"
    return ""


def _lost(module: nn.Module) -> str:
    for key, p in module.named_parameters(recurse=False):
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            return f"a copy would lose the hook on its {key}; take it off first (handle.remove())"
    for key, part, by_function in _kept_beside(module):
        if by_function:
            what = f"its attribute {key!r} is a function that holds a {type(part).__name__}"
            return f"{what}, which a copy would share with this model; make it a method or a registered submodule"
    return ""


def copy_model(model: nn.Module, doing: str = "copy", *, plain: bool = True) -> nn.Module:
    """A deep copy in which what was shared is shared, and which shares nothing with ``model``.

    UnsupportedModel, "cannot <doing> '0' (Linear): ...": compiled, scripted or parallel wrappers; weights under
    ``torch.nn.utils.prune`` or another parametrization; lazy layers; hooks; functions over the model's layers; two
    parameters in one memory. ``plain`` as in :func:`check_model`.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> model[1].weight = model[0].weight
    >>> twin = copy_model(model)
    >>> twin[1].weight is twin[0].weight, twin[0].weight is model[0].weight
    (True, False)
    """
    check_model(model, doing, plain=plain)
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:  # a computed tensor, or a lock, kept as an attribute
        reason = str(error).splitlines()[0]
        raise UnsupportedModel(f"cannot {doing} this {type(model).__name__}: deepcopy says {reason!r}") from error


def weight_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Linear and 2-D convolution layers that compute as torch's own do (or the course's), by name, each object once.

    >>> list(weight_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))))
    ['0', '2']
    """
    modules = model.named_modules()
    return {name: m for name, m in modules if isinstance(m, (nn.Linear, nn.Conv2d)) and not own_forward(m)}


def replace_layers(
    model: nn.Module, convert: Convert, *, skip: Collection[str] = (), doing: str = "convert"
) -> nn.Module:
    """A copy of ``model`` in which each linear and 2-D convolution layer is ``convert(name, layer)``.

    ``convert`` gets a layer of the copy and its first name. Layers used twice stay one, shared parameters stay shared.
    ``skip`` names modules (with all inside) and parameters that are to stay as they are. UnsupportedModel: what
    :func:`copy_model` refuses; a weight that would be left out in silence (a layer with a forward of its own, another
    kind of layer, a matrix in no layer), a layer that its parent never calls (attention), unless in ``skip``.
    """
    model = copy_model(model, doing)
    layers = {name: layer for name, layer in weight_layers(model).items() if not _within(name, skip)}
    _refuse_left_out(model, layers, skip, doing)
    if not layers:
        raise UnsupportedModel(f"{type(model).__name__} has no linear or convolution layer to {doing}")
    new = {layer: convert(name, layer).train(layer.training) for name, layer in layers.items()}
    _tie(model, new, doing)
    for module in list(model.modules()):
        # named_children() would list a shared layer once only.
        module._modules.update({name: new.get(child, child) for name, child in module._modules.items()})
    return new.get(model, model)


def new_like(layer: nn.Module, kind: type, weight: Tensor, **options) -> nn.Module:
    """A ``kind`` with the sizes and bias of a Linear or Conv2d ``layer``, and ``weight`` if it has such a parameter."""
    options = {"bias": layer.bias is not None, "device": weight.device, "dtype": weight.dtype, **options}
    if isinstance(layer, nn.Conv2d):
        sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
        new = kind(*sizes, layer.dilation, layer.groups, padding_mode=layer.padding_mode, **options)
    else:
        new = kind(layer.in_features, layer.out_features, **options)
    for name, value in (("weight", weight), ("bias", layer.bias)):
        if new._parameters.get(name) is not None:  # a layer that makes its weight may have no such parameter
            new._parameters[name].data.copy_(value.detach())
    own = layer._parameters
    for name, value in new._parameters.items():
        # What stands in the weight's place, such as centroids, is as free to move as that was.
        old = own[name] if name in own else next((p for key, p in own.items() if key != "bias"), None)
        if value is not None and old is not None:
            value.requires_grad_(old.requires_grad)
    return new


def chain_steps(model: nn.Module, doing: str = "convert") -> list[tuple[str, nn.Module]]:
    """The steps of a chain in order, nested ``nn.Sequential`` opened, a module used twice listed twice.

    UnsupportedModel: what :func:`check_model` refuses; a module with children that is no ``nn.Sequential``, or with a
    forward of its own.

    >>> relu = nn.ReLU()
    >>> [name for name, _ in chain_steps(nn.Sequential(nn.Linear(2, 2), relu, nn.Sequential(relu)))]
    ['0', '1', '2.0']
    """
    check_model(model, doing)

    def steps(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        chain = isinstance(module, nn.Sequential)
        if own_forward(module) or (not chain and (module._modules or module is model)):
            need = "a chain of torch.nn layers (nn.Sequential) is needed, without a forward of its own"
            raise UnsupportedModel(f"cannot {doing} {_named(name, module)}: {need}")
        if not chain:
            yield name, module
        for key, child in module._modules.items():
            yield from steps(f"{name}.{key}" if name else key, child)

    return list(steps("", model))


def _named(name: str, module: nn.Module) -> str:
    return f"{name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"


def own_forward(module: nn.Module) -> bool:
    """Does the module compute otherwise than torch.nn's (or the course's) class of its kind?"""
    owner = next(c for c in type(module).__mro__ if {"forward", "_conv_forward"} & vars(c).keys())
    return "forward" in vars(module) or not owner.__module__.startswith(("torch.nn.", "course_lib."))


def _within(name: str, skip: Collection[str]) -> bool:
    return any(f"{name}.".startswith(f"{s}.") for s in skip)


def _refuse_left_out(model: nn.Module, layers: dict[str, nn.Module], skip: Collection[str], doing: str) -> None:
    """Refuse every weight that a conversion of ``layers`` would leave out, or convert without effect."""
    known, wanted = dict(model.named_modules(remove_duplicate=False)), set(layers.values())
    names = known.keys() | dict(model.named_parameters(remove_duplicate=False)).keys()
    if isinstance(skip, str) or not names >= set(skip):
        raise ValueError(f"skip must be a collection of names in the model, got {skip!r} (layers: {', '.join(layers)})")
    for name, module in known.items():
        if module in wanted or _within(name, skip):
            continue
        fault, inside = "", wanted.intersection(module.modules())
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            fault = "it has a forward of its own, which would be thrown away"
        elif inside and _reads_weight(module.forward, type(module), set()):
            fault = "its forward reads the weights of its layers instead of calling them"
        elif beside := [key for key, part, _ in _kept_beside(module) if part in wanted]:
            fault = f"its plain attribute {beside[0]!r} keeps a layer that would not be converted"
        elif not isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)):
            for key, p in module.named_parameters(name, recurse=False):
                known_kind = type(module).__module__.startswith("torch.nn.")
                if p.dim() > 1 and (known_kind or p.numel() > max(p.shape)) and key not in skip:
                    fault = f"{key!r} would stay as it is, this kind of layer is not known"
                    name = name if name and not module._modules else key
        if fault:
            advice = f"; to leave it on purpose: skip=({name!r},)" if name else ""
            raise UnsupportedModel(f"cannot {doing} {_named(name, module)}: {fault}{advice}")


def _tie(model: nn.Module, new: dict[nn.Module, nn.Module], doing: str) -> None:
    """Share between new layers what the old ones shared."""
    first: dict[nn.Parameter, nn.Module] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            old = module if parameter is None else first.setdefault(parameter, module)
            a, b = new.get(old, old), new.get(module, module)
            if a is b or (a is old and b is module):
                continue
            # In place of the shared parameter stands one of the same name, or what the layer did not have before.
            keys = {key} if key in b._parameters else b._parameters.keys() - module._parameters.keys()
            if not keys or not all(_equal(a._parameters.get(k), b._parameters[k]) for k in keys):
                cure = "treat both alike, or untie them first (layer.weight = nn.Parameter(layer.weight.clone()))"
                raise UnsupportedModel(f"cannot {doing} {_named(name, module)}: its {key} is shared, {cure}")
            b._parameters.update({k: a._parameters[k] for k in keys})
            made = [k for k in b._buffers.keys() - module._buffers.keys() if _equal(a._buffers.get(k), b._buffers[k])]
            b._buffers.update({k: a._buffers[k] for k in made if b._buffers[k].numel() > 1})  # not an input's scale


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


def _reads_weight(function: object, owner: type, seen: set) -> bool:
    """Does a forward (or what it calls) use ``layer.weight`` for more than its shape, type or device?"""
    code = function if isinstance(function, types.CodeType) else getattr(function, "__code__", None)
    if code is None or code in seen:
        return False
    seen.add(code)
    steps = ["", *(step.argval for step in dis.get_instructions(code)), ""]
    uses = ((steps[i - 1], steps[i + 1]) for i, step in enumerate(steps) if step == "weight")
    if any(before != "self" and after not in ("device", "dtype", "shape", "size") for before, after in uses):
        return True
    near = getattr(function, "__globals__", {})
    called = [getattr(owner, name, None) for name in code.co_names] + [near.get(name) for name in code.co_names]
    mine = [f for f in called if not str(getattr(f, "__module__", "")).startswith("torch.")]
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return any(_reads_weight(part, owner, seen) for part in mine + inner)


def _kept_beside(module: nn.Module) -> Iterator[tuple[str, object, bool]]:
    """(attribute, module or parameter, does a function hold it) of all that plain attributes keep, however deep."""
    internal = vars(nn.Module()).keys() | {"_compiled_call_impl"}  # of module.compile(); a copy does without
    if isinstance(module, (nn.RNNBase, fx.GraphModule)):  # which renew what they keep when they are copied
        return
    todo, seen = [(key, value, False) for key, value in vars(module).items() if key not in internal], set()
    while todo:
        key, value, by_function = todo.pop()
        if isinstance(value, (nn.Module, nn.Parameter)):
            yield key, value, by_function
        if isinstance(value, (nn.Module, Tensor, type, types.ModuleType, str)) or (id(value), by_function) in seen:
            continue
        seen.add((id(value), by_function))
        parts = list(getattr(value, "__dict__", {}).values())
        if isinstance(value, types.FunctionType):  # copy.deepcopy leaves functions and weak references as they are
            names = inspect.getclosurevars(value)
            parts += [v for v in names.globals.values() if not isinstance(v, types.FunctionType)]
            parts += [*names.nonlocals.values(), *(value.__defaults__ or ())]
        elif isinstance(value, weakref.ref):
            parts = [value()]
        elif isinstance(value, types.MethodType):
            parts = [value.__self__, value.__func__]
        elif isinstance(value, partial):
            parts += [value.func, value.args, value.keywords]
        elif isinstance(value, (dict, list, tuple, set)):
            parts += value.values() if isinstance(value, dict) else value
        by_function = by_function or isinstance(value, (types.FunctionType, weakref.ref))
        todo += [(key, part, by_function) for part in parts]
