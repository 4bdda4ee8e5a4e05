"""Files that are whole or absent, folders for what may be made again, and a fingerprint of source code."""

import hashlib
import os
import uuid
from pathlib import Path
from types import ModuleType

__all__ = ["cache_folder", "source_hash", "write_file"]


def write_file(path: str | os.PathLike, data: bytes) -> Path:
    """Write ``data`` to ``path`` in one piece and with the umask's mode: a reader sees the old file or the new one.

    An OSError names the file, and nothing is left behind.
    """
    path = Path(path)
    partial = path.parent / f".{uuid.uuid4().hex}.partial"
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    return path


def source_hash(*sources: ModuleType | str | os.PathLike) -> str:
    """A sha256 over the source of modules and packages, given themselves or as paths, in any order.

    >>> import json, csv
    >>> source_hash(json, csv) == source_hash(csv, json), source_hash(json) == source_hash(csv)
    (True, False)
    """
    files = set()
    for source in sources:
        path = Path(source.__file__ if isinstance(source, ModuleType) else source).resolve()
        folder = path.parent if path.name == "__init__.py" else path
        files |= set(folder.rglob("*.py")) if folder.is_dir() else {path}
    parts = sorted((file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def cache_folder(kind: str, *, own: bool = False) -> Path:
    """The folder ``kind`` in ``$COURSE_CACHE`` or the user's cache, such as ``"checkpoints"``; it may not exist yet.

    ``own``: in the user's cache in any case, for what a room with one ``$COURSE_CACHE`` does not share.
    """
    if os.environ.get("COURSE_CACHE") and not own:
        return Path(os.environ["COURSE_CACHE"]).expanduser().absolute() / kind
    from platformdirs import user_cache_path

    return user_cache_path("compression-course", appauthor=False) / kind
