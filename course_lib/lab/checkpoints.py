"""Trained weights kept on disk: never a stale one, never a damaged one, and trained once however many ask.

A checkpoint is a safetensors file with its sha256 beside it (safetensors loads a flipped byte without a word). Its name
and its metadata carry a key made of everything that determines the weights.
"""

import hashlib
import json
import os
import struct
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from course_lib.lab.data import Split

__all__ = ["CheckpointError", "cache_folder", "checkpoint_key", "load_checkpoint", "save_checkpoint", "train_or_load"]


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or not the one that was asked for; the text names the file and the fault."""


def cache_folder() -> Path:
    """Where checkpoints live: ``$COURSE_CACHE``, or the user's cache folder."""
    if os.environ.get("COURSE_CACHE"):
        return Path(os.environ["COURSE_CACHE"]).expanduser() / "checkpoints"
    from platformdirs import user_cache_path

    return user_cache_path("compression-course") / "checkpoints"


def checkpoint_key(**parts: object) -> str:
    """A sha256 over named parts: numbers, texts, lists, dicts, dataclasses, tensors, splits and modules' weights.

    Torch's version and the source of the training code are always part of it, so that a changed loop trains anew.

    Raises:
        TypeError: a part that has no stable content, such as a function.

    >>> checkpoint_key(model="mlp32", seed=0) == checkpoint_key(seed=0, model="mlp32")
    True
    >>> checkpoint_key(model="mlp32", seed=0) == checkpoint_key(model="mlp32", seed=1)
    False
    """
    code = {name: _source(name) for name in ("loop", "models", "replicas", "training")}
    content = {"parts": _stable(parts, "key"), "torch": torch.__version__, "code": code}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def save_checkpoint(path: str | Path, models: nn.Module | Sequence[nn.Module], *, key: str) -> Path:
    """Write the weights and buffers of one model or of several replicas; a reader never sees half a file."""
    from safetensors.torch import save

    path = Path(path)
    tensors = {
        f"{r}/{name}": tensor.detach().cpu().contiguous().clone()
        for r, model in enumerate(_listed(models))
        for name, tensor in model.state_dict().items()
    }
    data = save(tensors, metadata={"key": key, "replicas": str(len(_listed(models)))})
    _replace(path, data)
    _replace(_digest_path(path), f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode())
    return path


def load_checkpoint(path: str | Path, models: nn.Module | Sequence[nn.Module], *, key: str) -> None:
    """Load a checkpoint into ``models``, which stay as they were if anything is wrong with it.

    Raises:
        CheckpointError: no such file, no digest or another one, not a safetensors file, another key, other tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(path)
    try:
        data, recorded = path.read_bytes(), _digest_path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read with its digest {_digest_path(path).name}: {error}") from error
    if not recorded or hashlib.sha256(data).hexdigest() != recorded[0]:
        raise CheckpointError(f"{path}: its sha256 is not the recorded one: the file is truncated or was changed")
    try:
        metadata = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]).get("__metadata__") or {}
        tensors = load(data)
    except (SafetensorError, ValueError, struct.error, AttributeError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from error
    if metadata.get("key") != key:
        raise CheckpointError(f"{path}: made with another key ({metadata.get('key', 'none')}), asked for was {key}")
    wanted = {
        f"{r}/{name}": tensor for r, model in enumerate(_listed(models)) for name, tensor in model.state_dict().items()
    }
    differ = [
        n
        for n in sorted({*wanted, *tensors})
        if n not in wanted or n not in tensors or wanted[n].shape != tensors[n].shape
    ]
    if differ:
        raise CheckpointError(f"{path}: does not fit the model, differing at {', '.join(differ[:5])}")
    for r, model in enumerate(_listed(models)):
        model.load_state_dict({name: tensors[f"{r}/{name}"] for name in model.state_dict()})


def train_or_load(
    name: str,
    make: Callable[[], nn.Module | list[nn.Module]],
    train: Callable[[nn.Module | list[nn.Module]], nn.Module | list[nn.Module] | None],
    *,
    key: Mapping[str, object],
    folder: str | Path | None = None,
) -> nn.Module | list[nn.Module]:
    """The trained model, from the cache if a sound checkpoint with this key is there, else trained and stored.

    Of several processes that ask at once, one trains and the others wait and load (a file lock).

    Args:
        name: a word for the file name, such as ``"teacher"``.
        make: builds the untrained model, or a list of replicas.
        train: trains what ``make`` gave, in place, or returns other models to keep instead.
        key: everything that determines the weights, as for :func:`checkpoint_key`: data (a ``Split``), config, seeds.
        folder: where to keep it; ``None`` means :func:`cache_folder`.
    """
    from filelock import FileLock

    if not name or not all(c.isalnum() or c in "-_" for c in name):
        raise ValueError(f"name must be letters, digits, '-' and '_', got {name!r}")
    digest = checkpoint_key(name=name, **dict(key))
    folder = Path(folder) if folder is not None else cache_folder()
    path = folder / f"{name}-{digest[:16]}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    models = make()
    with FileLock(str(path) + ".lock"):
        if path.exists():
            try:
                load_checkpoint(path, models, key=digest)
                return models
            except CheckpointError as error:
                warnings.warn(f"checkpoint refused, training anew: {error}", stacklevel=2)
        trained = train(models)
        # Only a return value of models counts: fit, for one, returns its history.
        if isinstance(trained, nn.Module) or (
            isinstance(trained, list) and trained and isinstance(trained[0], nn.Module)
        ):
            models = trained
        save_checkpoint(path, models, key=digest)
    return models


def _listed(models: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    return [models] if isinstance(models, nn.Module) else list(models)


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _source(name: str) -> str:
    return hashlib.sha256(Path(__file__).with_name(f"{name}.py").read_bytes()).hexdigest()


def _stable(value: object, where: str) -> object:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        raw = data.reshape(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b""
        return ["tensor", str(data.dtype), list(data.shape), hashlib.sha256(raw).hexdigest()]
    if isinstance(value, Split):
        return ["split", _stable(value.images, where), _stable(value.labels, where)]
    if isinstance(value, nn.Module):
        return ["module", str(value), _stable(dict(value.state_dict()), where)]
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, _stable(asdict(value), where)]
    if isinstance(value, Mapping):
        return {str(name): _stable(part, f"{where}.{name}") for name, part in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_stable(part, f"{where}[{i}]") for i, part in enumerate(value)]
    raise TypeError(
        f"{where}: a {type(value).__name__} has no stable content to make a key of; give its name or numbers"
    )
