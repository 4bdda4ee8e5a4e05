"""Bringing a data set's files under the root folder: found as they are, or fetched, verified and moved in whole.

Files are fetched into a temporary folder inside the root, under a file lock. What arrives is checked and hashed before
it is moved, so that the root never holds half a file, whoever pulls the plug and when.
"""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from course_lib.lab.formats import DamagedFile, DataError, read_file
from course_lib.lab.network import NO_SPACE, call_again, fetch_files
from course_lib.lab.sources import RawData, Source

__all__ = ["LOCK_TIMEOUT_S", "RECORD", "obtain"]

RECORD = "course-sha256.txt"
"""The file beside the extracted ones that holds their SHA-256, in the format of ``sha256sum``."""

LOCK_TIMEOUT_S = 1800.0
"""How long to wait for another process that fetches the same data set."""

_ELSEWHERE = (
    "A folder of your own: pass root=, or set COURSE_DATA (unset, it is your cache folder). "
    "No files needed: load_dataset('digits')."
)


@dataclass(frozen=True)
class _Part:
    value: Any
    digest: str
    shown: str


def obtain(source: Source, root: Path, *, download: bool) -> RawData:
    """The data set's content, from extracted files, else from archives beside them, else from the network.

    A complete data set is read without writing anything, so its folder may be read-only. With ``download`` the missing
    files are fetched; a file that is there and damaged is named in the error and never deleted or replaced.

    Raises:
        DataError: a file is missing or damaged, the folder cannot be read or written, or the network fails.
    """
    try:
        parts = _find(source, root)
    except OSError as error:
        raise DataError(f"{source.name} could not be read from {root}: {error}. {_ELSEWHERE}") from error
    missing = _missing(source, parts)
    if not missing:
        return _assemble(source, parts)
    if not download:
        raise DataError(
            f"{source.name} is not complete in {root / source.folder}: {', '.join(missing)} missing. "
            f"Call {call_again(source)} to fetch what is missing, or copy the files there. {_ELSEWHERE}"
        )
    try:
        return _fetch(source, root)
    except OSError as error:
        raise _cannot_write(source, root, error) from error


def _cannot_write(source: Source, root: Path, error: OSError) -> DataError:
    if error.errno in NO_SPACE:
        what = f"there is no space for it there (about {source.megabytes} MB): {error}. Free some space and call again."
    else:
        what = f"that folder cannot be written: {error}. Ask the person who keeps it to add {source.name}."
    return DataError(f"{source.name} is not in {root}, and {what} {_ELSEWHERE}")


@contextlib.contextmanager
def _advice(text: str) -> Iterator[None]:
    try:
        yield
    except DamagedFile as damaged:
        raise DataError(f"{damaged}. {text}") from None


def _missing(source: Source, parts: Mapping[str, _Part]) -> list[str]:
    return [name for name in source.required if name not in parts]


def _assemble(source: Source, parts: Mapping[str, _Part]) -> RawData:
    with _advice(f"Delete the file that is wrong and call {call_again(source)} again."):
        values = {name: part.value for name, part in parts.items()}
        return source.assemble(values, {name: part.shown for name, part in parts.items()})


def _parse(source: Source, name: str, data: bytes, shown: str) -> _Part:
    return _Part(source.parse(name, data, shown), hashlib.sha256(data).hexdigest(), shown)


def _find(source: Source, root: Path) -> dict[str, _Part]:
    """The parts of the data set that lie under the root, extracted or in archives."""
    folder = root / source.folder
    for above in (*reversed(folder.parents), folder):
        if above.exists() and not above.is_dir():
            what = f"{above} is not a folder, and {source.name} should be in {folder}"
            raise DataError(f"{what}. Delete or rename it, or pass another root=.")
    parts: dict[str, _Part] = {}
    with _advice(
        f"Delete it and call {call_again(source)} again: what is missing is fetched, nothing else is touched."
    ):
        recorded = _read_record(folder)
        for name in source.required + source.optional:
            path = folder / name
            if path.exists():
                parts[name] = _parse(source, name, read_file(path), str(path))
                if recorded.get(name, parts[name].digest) != parts[name].digest:
                    # Named first: a teacher may have put other files here on purpose.
                    record = f"it has changed since then (if on purpose, delete {folder / RECORD} instead)"
                    raise DamagedFile(str(path), f"does not match the hash recorded when it was downloaded: {record}")
        missing = _missing(source, parts)
        if missing:
            unpacked = source.unpack(root, missing)
            _merge(parts, {name: _parse(source, name, data, shown) for name, (data, shown) in unpacked.items()})
    return parts


def _merge(parts: dict[str, _Part], more: Mapping[str, _Part]) -> None:
    """Add the parts that were missing; two different files of one name cannot be of one data set."""
    for name, part in more.items():
        mine = parts.setdefault(name, part)
        if mine.digest != part.digest:
            raise DamagedFile(mine.shown, f"is not the same file as {name} in {part.shown}")


def _read_record(folder: Path) -> dict[str, str]:
    path = folder / RECORD
    if not path.exists():
        return {}
    text = read_file(path).decode("ascii", "replace")
    lines = [re.fullmatch(r"([0-9a-f]{64})  (\S+)", line) for line in text.splitlines()]
    if not all(lines):
        raise DamagedFile(str(path), "is not a list of SHA-256 hashes")
    return {line[2]: line[1] for line in lines}


def _fetch(source: Source, root: Path) -> RawData:
    with _exclusive(source, root) as stage:
        parts = _find(source, root)  # again: another process may have fetched them while this one waited
        missing = _missing(source, parts)
        if not missing:
            return _assemble(source, parts)
        address = fetch_files(source, stage, missing)
        arrived = {name: stage / source.folder / name for name in source.required + source.optional}
        arrived = {name: path for name, path in arrived.items() if path.is_file()}
        with _advice(
            f"Nothing was kept. Delete what differs, or try another mirror, then call {call_again(source)} again."
        ):
            shown = {name: f"{name} from {address}" for name in arrived}
            more = {name: _parse(source, name, path.read_bytes(), shown[name]) for name, path in arrived.items()}
            new = [name for name in more if name not in parts]
            _merge(parts, more)
            absent = _missing(source, parts)
            if absent:
                raise DamagedFile(address, f"did not send {', '.join(absent)}")
        raw = _assemble(source, parts)
        folder = root / source.folder
        digests = _read_record(folder) | {name: parts[name].digest for name in new}
        record = stage / RECORD
        record.write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()), encoding="ascii")
        # The record first: a run killed in between leaves files that are missing, not files that are unverified.
        _install([record, *(arrived[name] for name in new)], folder)
        return raw


@contextlib.contextmanager
def _exclusive(source: Source, root: Path) -> Iterator[Path]:
    """A temporary folder inside the root, held by one process at a time; what killed runs left is swept."""
    from filelock import FileLock, Timeout

    root.mkdir(parents=True, exist_ok=True)
    path = root / f".{source.name}.lock"
    lock = FileLock(path, timeout=LOCK_TIMEOUT_S)
    try:
        lock.acquire()
    except Timeout:
        waited = f"another process has been fetching {source.name} into {root} for {LOCK_TIMEOUT_S / 60:.0f} minutes"
        raise DataError(f"{waited}. Wait for it or end it, then call {call_again(source)} again.") from None
    try:
        for left in root.glob(f".{source.name}-partial-*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{source.name}-partial-", dir=root, ignore_cleanup_errors=True
        ) as stage:
            yield Path(stage)
    finally:
        # Removed while still held: whoever waits on it notices that its file has no name any more, and starts over.
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()


def _install(files: list[Path], folder: Path) -> None:
    """Move finished files into the folder, all of them or none."""
    made = [above for above in (folder, *folder.parents) if not above.exists()]
    moved = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in files:
            target = folder / path.name
            fresh = not target.exists()
            os.replace(path, target)
            if fresh:
                moved.append(target)
    except BaseException:
        with contextlib.suppress(OSError):
            for target in moved:
                target.unlink()
            for above in made:
                above.rmdir()
        raise
