"""The one gate: looks at a model before anything copies, converts or walks it, and says by name what does not fit.

What stands behind it is plain code without checks of its own. The rule: a copy or a converted network computes what it
should, or :class:`UnsupportedModel` names the module at fault and the way out.
"""

import copy
import dis
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = [
    "UnsupportedModel",
    "check_model",
    "chain_steps",
    "copy_model",
    "eval_mode",
    "new_like",
    "replace_layers",
    "weight_layers",
]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


class UnsupportedModel(ValueError):
    """A part of the model cannot be handled rightly: the text names the module and says what fits."""


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode inside the block; afterwards every submodule is back in the mode that it had.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout().eval()).train()
    >>> with eval_mode(model):
    ...     model[0].training
    False
    >>> model.training, model[1].training
    (True, False)
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield model
    finally:
        for module, mode in modes:
            module.training = mode


def check_model(model: nn.Module, doing: str = "copy", *, hooks: bool = True) -> None:
    """Refuse what torch wraps around a model and what a deep copy would share or lose; see :func:`copy_model`.

    Raises:
        TypeError: not a module.
        UnsupportedModel: names the module, and how to make it an ordinary one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    modules = dict(model.named_modules())
    for name, module in modules.items():
        here = f"cannot {doing} {_named(name, module)}"
        if type(module).__name__ == "OptimizedModule":
            raise UnsupportedModel(f"{here}: torch.compile wraps it; give model._orig_mod, and compile what comes out")
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModel(f"{here}: TorchScript has no Python layers; give the module that was scripted")
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise UnsupportedModel(f"{here}: it is spread over devices; give model.module, and wrap what comes out")
        # torch.nn.utils.prune and weight_norm leave a plain tensor where the parameter was, renewed by a hook.
        plain = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
        if nn.utils.parametrize.is_parametrized(module) or (plain and module._forward_pre_hooks):
            raise UnsupportedModel(
                f"{here}: its {plain[0] if plain else next(iter(module.parametrizations))} is no plain parameter but "
                "computed by a parametrization; make it permanent first (torch.nn.utils.prune.remove(layer, 'weight') "
                "or torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'))"
            )
        for key, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise UnsupportedModel(f"{here}: its {key} has no shape yet (a lazy layer); run the model once first")
            if hooks and (parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)):
                raise UnsupportedModel(f"{here}: a hook on its {key} would be lost; take it off (handle.remove())")
        if hooks and any(getattr(module, kind, None) for kind in _HOOKS):
            raise UnsupportedModel(
                f"{here}: it has a hook, which in a copy would still write into this model's objects; "
                "take it off first (handle.remove()) and hang it on what comes out"
            )
        for key, part, by_function in _held(module):
            if by_function:
                raise UnsupportedModel(
                    f"{here}: its attribute {key!r} is a function that holds a {type(part).__name__}, which a copy "
                    "would share with this model; make it a method, or a registered submodule"
                )


def copy_model(model: nn.Module, doing: str = "copy") -> nn.Module:
    """A deep copy in which what was shared is shared, and which shares nothing with ``model``.

    Args:
        doing: what the caller is about to do, for the error: "cannot <doing> '0' (Linear): ...".

    Raises:
        TypeError: not a module.
        UnsupportedModel: compiled, scripted or parallel wrappers; weights under ``torch.nn.utils.prune`` or another
            parametrization; lazy layers; hooks; attributes that are functions over the model's own layers.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> model[1].weight = model[0].weight
    >>> twin = copy_model(model)
    >>> twin[1].weight is twin[0].weight, twin[0].weight is model[0].weight
    (True, False)
    """
    check_model(model, doing)
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:  # a computed tensor or a lock kept as an attribute
        reason = str(error).splitlines()[0]
        raise UnsupportedModel(f"cannot {doing} this {type(model).__name__}: deepcopy says {reason!r}") from error


def weight_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Linear and 2-D convolution layers that compute as torch's own do (or the course's), by name, each object once.

    >>> list(weight_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))))
    ['0', '2']
    """
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    return {name: layer for name, layer in layers if not _own_forward(layer)}


def replace_layers(
    model: nn.Module,
    convert: Callable[[str, nn.Module], nn.Module],
    *,
    skip: Collection[str] = (),
    doing: str = "convert",
) -> nn.Module:
    """A copy of ``model`` in which each linear and 2-D convolution layer is ``convert(name, layer)``.

    Layers used twice stay one layer, and parameters that layers share stay shared. ``model`` is unchanged.

    Args:
        convert: gets a layer of the copy and its first name; returning the layer itself leaves it as it is.
        skip: names of modules (with all inside) and of parameters that are to stay as they are.

    Raises:
        UnsupportedModel: whatever :func:`copy_model` refuses; a weight that would be left out in silence (a layer with
            a forward of its own, another kind of layer with a weight, a matrix in no layer) or a layer that its parent
            never calls (attention), unless it is in ``skip``.
        ValueError: a name in ``skip`` that does not exist.
    """
    if isinstance(skip, str):
        raise TypeError(f"skip must be a collection of names such as ({skip!r},), got a string")
    model = copy_model(model, doing)
    layers = {name: layer for name, layer in weight_layers(model).items() if not _within(name, skip)}
    _refuse_left_out(model, layers, skip, doing)
    if not layers:
        raise UnsupportedModel(f"{type(model).__name__} has no linear or convolution layer to {doing}")
    new = {layer: convert(name, layer).train(layer.training) for name, layer in layers.items()}
    _tie(model, new, doing)
    for module in list(model.modules()):
        for name, child in module._modules.items():  # named_children() lists a shared layer once only
            module._modules[name] = new.get(child, child)
    return new.get(model, model)


def new_like(layer: nn.Module, kind: type, weight: torch.Tensor, **options) -> nn.Module:
    """A ``kind`` with the sizes and bias of a Linear or Conv2d ``layer``, and ``weight`` if it has such a parameter."""
    options = {"bias": layer.bias is not None, "device": weight.device, "dtype": weight.dtype, **options}
    if isinstance(layer, nn.Conv2d):
        sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
        new = kind(*sizes, layer.dilation, layer.groups, padding_mode=layer.padding_mode, **options)
    else:
        new = kind(layer.in_features, layer.out_features, **options)
    with torch.no_grad():
        for name, value in (("weight", weight), ("bias", layer.bias)):
            if new._parameters.get(name) is not None:  # a layer that makes its weight may have no such parameter
                new._parameters[name].copy_(value).requires_grad_(layer._parameters[name].requires_grad)
    return new


def chain_steps(model: nn.Module, doing: str = "convert") -> list[tuple[str, nn.Module]]:
    """The steps of a chain in order, nested ``nn.Sequential`` opened, a module used twice listed twice.

    Raises:
        UnsupportedModel: what :func:`check_model` refuses, a module that is no ``nn.Sequential`` but has children, or
            one with a forward of its own.

    >>> relu = nn.ReLU()
    >>> [name for name, _ in chain_steps(nn.Sequential(nn.Linear(2, 2), relu, nn.Sequential(nn.Linear(2, 2), relu)))]
    ['0', '1', '2.0', '2.1']
    """
    check_model(model, doing)
    if not isinstance(model, nn.Sequential):
        raise UnsupportedModel(f"cannot {doing} a {type(model).__name__}: a chain of layers (nn.Sequential) is needed")

    def steps(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if _own_forward(module):
            raise UnsupportedModel(f"cannot {doing} {_named(name, module)}: its forward is its own, not torch.nn's")
        if isinstance(module, nn.Sequential):
            for key, child in module._modules.items():
                yield from steps(f"{name}.{key}".lstrip("."), child)
        elif module._modules:
            raise UnsupportedModel(
                f"cannot {doing} {_named(name, module)}: a plain layer or an nn.Sequential is needed"
            )
        else:
            yield name, module

    return list(steps("", model))


def _named(name: str, module: nn.Module) -> str:
    return f"{name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"


def _own_forward(module: nn.Module) -> bool:
    """Does the module compute otherwise than torch.nn's (or the course's) class of its kind?"""
    owner = next((c for c in type(module).__mro__ if {"forward", "_conv_forward"} & vars(c).keys()), nn.Module)
    return "forward" in vars(module) or not owner.__module__.startswith(("torch.nn.", "course_lib."))


def _within(name: str, skip: Collection[str]) -> bool:
    return any(name == s or name.startswith(f"{s}.") for s in skip)


def _refuse_left_out(model: nn.Module, layers: dict, skip: Collection[str], doing: str) -> None:
    """Refuse every weight that a conversion of ``layers`` would leave out, or convert without effect."""
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if unknown := set(skip) - modules.keys() - parameters.keys():
        raise ValueError(f"skip has names that are not in the model: {sorted(unknown)} (layers: {sorted(layers)})")
    for name, module in modules.items():
        here, advice = f"cannot {doing} {_named(name, module)}", f"; name it in skip to leave it as it is ({name!r})"
        inside = [layer for layer in module.modules() if layer in layers.values()]
        if _within(name, skip) or module in layers.values():
            continue
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            raise UnsupportedModel(f"{here}: its forward is its own, which a converted layer would not run{advice}")
        if inside and _reads_weight(type(module).forward, type(module), set()):
            raise UnsupportedModel(f"{here}: it reads the weights of its layers instead of calling them{advice}")
        for key, part, _ in _held(module):
            if part in inside or part in layers.values():
                raise UnsupportedModel(f"{here}: its plain attribute {key!r} keeps a layer beside the registered ones")
        for key, parameter in () if isinstance(module, _NORMS) else module._parameters.items():
            full = f"{name}.{key}".lstrip(".")
            if parameter is not None and parameter.dim() > 1 and parameter.numel() > max(parameter.shape):
                if full not in skip:
                    raise UnsupportedModel(f"{here}: its {key} would stay as it is; name {full!r} in skip if it may")


def _tie(model: nn.Module, new: dict[nn.Module, nn.Module], doing: str) -> None:
    """Share between new layers what the old ones shared."""
    first: dict[nn.Parameter, tuple[nn.Module, str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None or first.setdefault(parameter, (module, key)) == (module, key):
                continue
            old, old_key = first[parameter]
            a, b = new.get(old, old), new.get(module, module)
            if a is old and b is module:
                continue
            # What a layer holds in place of the shared parameter: the same name, or names that it did not have before.
            pairs = [(old_key, key)] if old_key in a._parameters and key in b._parameters else []
            pairs = pairs or [(k, k) for k in b._parameters if k in a._parameters and k not in module._parameters]
            if not pairs or any(not _equal(a._parameters[i], b._parameters[j]) for i, j in pairs):
                raise UnsupportedModel(
                    f"cannot {doing} {_named(name, module)}: it shares its {key} with another layer and could not any "
                    "more; treat both alike, or untie them first (layer.weight = nn.Parameter(layer.weight.clone()))"
                )
            for i, j in pairs:
                b._parameters[j] = a._parameters[i]
            for k in b._buffers.keys() & a._buffers.keys() - module._buffers.keys():
                if b._buffers[k] is not None and b._buffers[k].numel() > 1 and _equal(a._buffers[k], b._buffers[k]):
                    b._buffers[k] = a._buffers[k]


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


def _reads_weight(function: object, owner: type, seen: set) -> bool:
    """Does a forward (or a method that it calls) use ``layer.weight`` other than for its shape or device?"""
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    if code is None or code in seen:
        return False
    seen.add(code)
    steps = list(dis.get_instructions(code))
    for before, step, after in zip([None, *steps], steps, [*steps[1:], None], strict=False):
        if step.argval == "weight" and step.opname == "LOAD_ATTR":
            harmless = after is not None and after.argval in ("device", "dtype", "shape", "size")
            if not harmless and (before is None or before.argval != "self"):
                return True
    return any(_reads_weight(getattr(owner, name, None), owner, seen) for name in code.co_names if name != "__init__")


def _held(module: nn.Module) -> Iterator[tuple[str, object, bool]]:
    """(attribute, module or parameter, is it held by a function) of what plain attributes keep, however deep."""
    seen: set[int] = set()

    def within(value: object, by_function: bool) -> Iterator[tuple[object, bool]]:
        if isinstance(value, (nn.Module, nn.Parameter)):
            yield value, by_function
        if isinstance(value, (nn.Module, torch.Tensor, type, types.ModuleType, str, bytes)) or id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, types.FunctionType):  # copy.deepcopy leaves functions and weak references as they are
            names = inspect.getclosurevars(value)
            direct = [v for v in names.globals.values() if not callable(v) or isinstance(v, nn.Module)]
            parts, by_function = [*names.nonlocals.values(), *direct, *(value.__defaults__ or ())], True
        elif isinstance(value, weakref.ref):
            parts, by_function = [value()], True
        elif isinstance(value, types.MethodType):
            parts = [value.__self__, value.__func__]
        elif isinstance(value, functools.partial):
            parts = [value.func, value.args, value.keywords]
        elif isinstance(value, dict):
            parts = list(value.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            parts = list(value)
        else:
            parts = list(getattr(value, "__dict__", {}).values())
        for part in parts:
            yield from within(part, by_function)

    for key, value in vars(module).items():
        if not key.startswith("_") or key not in _INTERNAL:
            for part, by_function in within(value, False):
                yield key, part, by_function


_INTERNAL = frozenset(vars(nn.Module()))
