"""Rows of a study on disk: a file a cell, named by its content; and claims on cells, so that none runs twice."""

import ast
import contextlib
import functools
import hashlib
import inspect
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import FileLock

__all__ = ["RowStore", "identity", "row_key"]


class RowStore:
    """The rows of one study in ``folder/name``.

    A cell is claimed by a file lock, which the system gives back when its holder dies, however it dies. A file that is
    torn, or holds another cell's row, counts as none.

    Raises:
        ValueError: ``name`` cannot be a folder's name.
    """

    def __init__(self, folder: str | Path, name: str):
        if not name or not all(c.isalnum() or c in "-_" for c in name):
            raise ValueError(f"name must be letters, digits, '-' and '_', got {name!r}")
        self.folder = Path(folder) / name

    def read(self, key: str) -> dict | None:
        """The row of a cell, or ``None`` where there is no sound one."""
        return self._parse(self.folder / f"{key}.json")

    def rows(self) -> Iterator[dict]:
        """All sound rows."""
        return (row for path in sorted(self.folder.glob("*.json")) if (row := self._parse(path)) is not None)

    def claim(self, key: str) -> "FileLock | None":
        """A lock that makes the cell ours until it is released, or ``None`` while somebody else has it."""
        from filelock import FileLock, Timeout

        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock

    def write(self, key: str, row: dict) -> dict:
        """Store the row of a cell whose claim is ours; gives it back as it will be read."""
        text = json.dumps({**row, "key": key, "recorded": time.time(), "attempt": uuid.uuid4().hex})
        # Only the holder of the claim writes here: what a killed run left is written over.
        partial = self.folder / f"{key}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.folder / f"{key}.json")
        return json.loads(text)

    def release(self, key: str, lock: "FileLock") -> None:
        """Give a claim back; the lock file goes once the cell is finished, for then nobody needs it."""
        row = self.read(key)
        if row is not None and row["error"] is None:
            with contextlib.suppress(OSError):
                os.unlink(self.folder / f"{key}.lock")
        lock.release()

    @staticmethod
    def _parse(path: Path) -> dict | None:
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        whole = isinstance(row, dict) and {"trial", "values", "error", "seconds", "recorded", "attempt"} <= set(row)
        return row if whole and row.get("key") == path.stem else None


def row_key(trial_key: str, salt: str) -> str:
    """The name under which a trial's row is kept, given all else that it depends on."""
    return hashlib.sha256(f"{trial_key} {salt}".encode()).hexdigest()


def identity(work: Callable, version: str, *, kept: bool) -> str:
    """What besides the trial determines a row, as one text: the function, its source, torch, and the caller's word.

    Args:
        kept: the rows will be read again, by which time a stale one must be told from a sound one.

    Raises:
        TypeError: ``work`` is no function, nor a ``functools.partial`` of one.
        ValueError: ``kept``, and the function's content cannot be named.
    """
    import torch

    function, bound = work, []
    if isinstance(work, functools.partial):
        function, bound = work.func, [list(work.args), dict(sorted(work.keywords.items()))]
    if not inspect.isfunction(function):
        raise TypeError(f"work must be a function of a trial, got {work!r}")
    if not kept:
        return uuid.uuid4().hex
    label = f"{function.__module__}.{function.__qualname__}"
    if function.__closure__:
        raise ValueError(f"work {label} holds on to variables around it, which no key can tell apart: use options")
    try:
        content = [label, bound, _source(function), torch.__version__, version]
        return json.dumps(content, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"arguments bound to work {label} must be plain numbers and words, got {bound}") from error
    except OSError as error:
        raise ValueError(f"the source of work {label} cannot be read, and rows kept need it: use a file") from error


def _source(function: Callable) -> str:
    path = getattr(sys.modules.get(function.__module__), "__file__", None)
    if path is None or not Path(path).is_file():
        return inspect.getsource(function)
    return hashlib.sha256("".join(_sources(function.__module__, Path(path))).encode()).hexdigest()


def _sources(name: str, path: Path) -> list[str]:
    # The module, and what it imports from its own package, also within functions, and so on.
    roots = getattr(sys.modules.get(name.partition(".")[0]), "__path__", None)
    found, waiting = {name: path}, [name]
    while waiting and roots:
        current = waiting.pop()
        for other in _imported(ast.parse(found[current].read_bytes()), current, found[current]):
            if other not in found and (file := _file(other, Path(next(iter(roots))))):
                found[other] = file
                waiting.append(other)
    return [f"{name} {hashlib.sha256(found[name].read_bytes()).hexdigest()}\n" for name in sorted(found)]


def _imported(tree: ast.AST, name: str, path: Path) -> Iterator[str]:
    here = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _file(module: str, root: Path) -> Path | None:
    package, *parts = module.split(".")
    if package != root.name:
        return None
    base = root.joinpath(*parts)
    beside = [base.with_name(f"{base.name}.py")] if parts else []
    return next((path for path in [*beside, base / "__init__.py"] if path.is_file()), None)
