"""Trained weights kept on disk: never a stale one, never a damaged one, and trained once however many ask.

A checkpoint is a safetensors file with its sha256 beside it (safetensors loads a flipped byte without a word), named by
a key made of everything that determines the weights.
"""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from course_lib.files import cache_folder, source_hash, write_file
from course_lib.lab.data import Split, Splits

__all__ = ["CheckpointError", "checkpoint_key", "load_checkpoint", "save_checkpoint", "train_or_load"]

Models = nn.Module | Sequence[nn.Module]


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or not the one that was asked for; the text names the file and the fault."""


def checkpoint_key(**parts: object) -> str:
    """A sha256 over named parts, torch's version and the training code's source (so that a changed loop trains anew).

    Parts: numbers, texts, lists, dicts, dataclasses, arrays, splits, modules (their weights); TypeError for others.

    >>> checkpoint_key(model="mlp32", seed=0) == checkpoint_key(seed=0, model="mlp32")
    True
    """
    code = source_hash(*(Path(__file__).with_name(f"{name}.py") for name in ("models", "replicas", "training")))
    parts = {"parts": stable_content(parts, "key"), "torch": torch.__version__, "code": code}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def save_checkpoint(path: str | Path, models: Models) -> Path:
    """Write the weights and buffers of one model or of several replicas; an ``OSError`` names the file."""
    from safetensors.torch import save

    state = _group(models).state_dict()
    data = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()})
    path = write_file(path, data)
    write_file(f"{path}.sha256", f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode())
    return path


def load_checkpoint(path: str | Path, models: Models) -> None:
    """Load a checkpoint into ``models``; CheckpointError, and they are as they were, if anything is wrong with it."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data, recorded = Path(path).read_bytes(), Path(f"{path}.sha256").read_text(encoding="utf-8").split()[:1]
        if [hashlib.sha256(data).hexdigest()] != recorded:
            raise CheckpointError(f"{path}: its sha256 is not the recorded one: the file is truncated or was changed")
        tensors = load(data)
    except (OSError, UnicodeDecodeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read with its digest: {error}") from error
    group = _group(models)
    wanted, given = ({n: t.shape for n, t in state.items()} for state in (group.state_dict(), tensors))
    if differ := sorted(name for name in {*wanted, *given} if wanted.get(name) != given.get(name)):
        raise CheckpointError(f"{path}: does not fit the model, differing at {', '.join(differ[:5])}")
    group.load_state_dict(tensors)


def train_or_load(
    name: str, make: Callable[[], Models], train: Callable[[Models], Models | None], *,
    key: Mapping[str, object], folder: str | Path | None = None,
) -> Models:  # fmt: skip
    """The trained model, from the cache if a sound checkpoint with this key is there, else trained and stored.

    Of several processes that ask at once, one trains and the others wait and load. Loading writes nothing and needs no
    lock: a class may share a folder that it can only read. What cannot be kept is trained all the same, with a warning.

    ``name`` is a word for the file name; ``make`` builds the untrained model, or a list of replicas, which ``train``
    trains in place (or returns others to keep); ``key`` holds everything that determines the weights, as for
    :func:`checkpoint_key`: data, config, seeds. ``folder`` is ``cache_folder("checkpoints")`` by default.
    """
    from filelock import FileLock

    folder = cache_folder("checkpoints") if folder is None else Path(folder)
    path, models = folder / f"{file_word(name)}-{checkpoint_key(**key)}.safetensors", make()
    if path.exists():
        with contextlib.suppress(CheckpointError):  # told below, unless another process is mending it right now
            load_checkpoint(path, models)
            return models
    with contextlib.ExitStack() as held:
        problem = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(f"{path}.lock", mode=0o666))  # by any user, also after its maker was killed
        except OSError as error:
            problem = f"{path} cannot be kept, training without it: {error}"
        if not problem and path.exists():
            try:
                load_checkpoint(path, models)
                return models
            except CheckpointError as error:
                warnings.warn(f"checkpoint refused, training anew: {error}", stacklevel=2)
        given = train(models)
        # Only a return value of models counts: fit, for one, returns its history.
        several = isinstance(given, (list, tuple)) and given and isinstance(given[0], nn.Module)
        if several or isinstance(given, nn.Module):
            models = given
        try:
            problem or save_checkpoint(path, models)
        except OSError as error:
            problem = f"the trained weights could not be kept: {error}"
        if problem:
            warnings.warn(problem, stacklevel=2)
    return models


def file_word(name: str) -> str:
    """``name``, if it is fit to be part of a file's name."""
    if not name or not all(c.isalnum() or c in "-_" for c in name):
        raise ValueError(f"name must be letters, digits, '-' and '_', got {name!r}")
    return name


def stable_content(value: object, where: str) -> object:
    """The content of a value as JSON can hold it, equal for equal values in every process; 8 and 8.0 are equal."""
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or isinstance(value, (bool, int, float, str)):
        return int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(value, (Tensor, np.ndarray)):
        array = torch.as_tensor(value).detach().cpu().contiguous()
        raw = array.reshape(-1).view(torch.uint8).numpy().tobytes() if array.numel() else b""
        return ["array", str(array.dtype), list(array.shape), hashlib.sha256(raw).hexdigest()]
    if isinstance(value, nn.Module):
        return ["module", str(value), stable_content(dict(value.state_dict()), where)]
    if isinstance(value, (Split, Splits)) or (is_dataclass(value) and not isinstance(value, type)):
        names = ("pool", "index") if isinstance(value, Splits) else [field.name for field in fields(value)]
        return [type(value).__name__, {name: stable_content(getattr(value, name), where) for name in names}]
    if isinstance(value, Mapping):
        return {str(name): stable_content(part, f"{where}.{name}") for name, part in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [stable_content(part, f"{where}[{i}]") for i, part in enumerate(value)]
    given = f"a {type(value).__name__} has no stable content to make a key of"
    raise TypeError(f"{where}: {given}; give its name or numbers")


def _group(models: Models) -> nn.ModuleList:
    return nn.ModuleList([models] if isinstance(models, nn.Module) else models)
