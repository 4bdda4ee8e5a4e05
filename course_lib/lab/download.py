"""Data sets that live in files: found as they lie, or fetched from where torchvision knows them, and checked.

A file must prove itself: torchvision looks at an archive's checksum, and hardly at what was extracted. A complete data
set is read without writing anything, so that a class may share a read-only folder.
"""

import contextlib
import errno
import gzip
import hashlib
import io
import math
import os
import pickle
import shutil
import socket
import sys
import tarfile
import threading
import traceback
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError

import numpy as np

from course_lib.files import write_file

__all__ = ["SOURCES", "DataError", "RawData", "Source", "obtain"]

RECORD = "course-sha256.txt"  # beside the files that we fetched: their SHA-256, as sha256sum writes it
LOCK_TIMEOUT_S = 1800.0
NETWORK_TIMEOUT_S = 10.0  # of one answer; torchvision would wait for ever
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_LOCAL = _FULL | {errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENOENT, errno.EIO}
_PROCESS = threading.Lock()  # the socket timeout and standard error belong to the whole process
Found = dict[str, tuple[bytes, str]]  # a file's content, and what an error should call it


class DataError(RuntimeError):
    """A data set cannot be had: a file, a folder or the network stands in the way; the text says what to do."""


class _Damaged(Exception):
    """A file that is not what its name promises."""


@dataclass(frozen=True, eq=False)
class RawData:
    """A data set as its files hold it: images uint8 [N, C, H, W] in 0..scale, labels int64 [N]."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    scale: int = 255


_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True)
class Source:
    """A data set of torchvision's: its class there, the folder and the files of its layout, disk space in MB."""

    name: str
    dataset: str
    class_names: tuple[str, ...]
    megabytes: int
    folder: str
    files: tuple[str, ...] = _IDX
    archive: str = ""  # one for all files, in the root; without it each file has its own beside it

    @property
    def again(self) -> str:
        """The call that an error tells its reader to repeat."""
        return f"call load_dataset({self.name!r}, download=True)"

    def missing(self, found: Found) -> list[str]:
        """The files that were not found."""
        return [name for name in self.files if name not in found]


_DIGITS, _KUZUSHIJI = tuple("0123456789"), ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_OBJECTS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")

SOURCES: dict[str, Source] = {
    "mnist": Source("mnist", "MNIST", _DIGITS, 65, "MNIST/raw"),
    "fashion_mnist": Source("fashion_mnist", "FashionMNIST", _FASHION, 85, "FashionMNIST/raw"),
    "kmnist": Source("kmnist", "KMNIST", _KUZUSHIJI, 75, "KMNIST/raw"),
    "cifar10": Source("cifar10", "CIFAR10", _OBJECTS, 360, "cifar-10-batches-py", _CIFAR, "cifar-10-python.tar.gz"),
}


def obtain(name: str, folder: str | os.PathLike, *, download: bool = True) -> RawData:
    """The data set's content from extracted files under ``folder``, else from archives there, else from the network.

    IDX files may hold any number of images, be called ``train-images.idx3-ubyte`` as well, and end in ``.gz``; CIFAR's
    must be the published ones, for a pickle may run any code. What is fetched (from ``$COURSE_MIRROR`` if set) is moved
    in when it has been checked, under a file lock; a file that is there and damaged is named and left alone.

    Args:
        name: one of :data:`SOURCES`.
        folder: the root of torchvision's layout, the one that holds ``MNIST/raw``.
        download: whether to fetch what is missing.

    Raises:
        DataError: a file is missing or damaged, the folder cannot be read or written, or the network fails.
    """
    source, root = SOURCES[name], Path(folder)
    where = root / source.folder
    elsewhere = "Another folder: root= or COURSE_DATA. No files needed: load_dataset('digits')."
    try:
        found = _find(source, root)
        missing = source.missing(found)
        if not missing:
            return _assemble(source, found)
        if download:
            return _fetch(source, root)
        lies = ", ".join(sorted(path.name for path in where.iterdir())[:12]) if where.is_dir() else ""
    except _Damaged as error:
        raise DataError(f"{error}. Nothing was changed: delete the file that is wrong, then {source.again}.") from None
    except OSError as error:
        full = error.errno in _FULL
        cure = f"There is no space: {source.megabytes} MB are needed" if full else "Ask who keeps it to add the data"
        raise DataError(f"{name} cannot be read or fetched in {root}: {error}. {cure}. {elsewhere}") from error
    lies = f"{', '.join(missing)} missing; there is {lies or 'nothing'}"
    raise DataError(f"{name} is not complete in {where}: {lies}. To fetch it, {source.again}. {elsewhere}")


def _find(source: Source, root: Path) -> Found:
    """What lies under the root, extracted or in archives, and as we recorded it."""
    found: Found = {}
    for name in source.files:
        spelled = [name] if source.archive else [name, name.replace("-idx", ".idx")]
        paths = [root / source.folder / f"{s}{end}" for end in ("", ".gz") for s in spelled]
        for path in [path for path in paths if path.is_file()][:1]:
            found[name] = (_gunzip(path) if path.suffix == ".gz" else path.read_bytes(), str(path))
    record = root / source.folder / RECORD
    recorded = _recorded(record)
    for name, (data, shown) in found.items():
        if recorded.get(name, _sha256(data)) != _sha256(data):
            # Named first: a teacher may have put other files here on purpose.
            changed = f"it has changed since then (if on purpose, delete {record} instead)"
            raise _Damaged(f"{shown} does not match the hash recorded when it was downloaded: {changed}")
    if source.archive and source.missing(found) and (root / source.archive).is_file():
        found = _untar(root / source.archive, source) | found
    return found


def _recorded(record: Path) -> dict[str, str]:
    lines = [line.split("  ") for line in record.read_text("utf-8").splitlines()] if record.is_file() else []
    if not all(len(line) == 2 and len(line[0]) == 64 for line in lines):
        raise _Damaged(f"{record} is not a list of SHA-256 hashes")
    return {name: digest for digest, name in lines}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _fetch(source: Source, root: Path) -> RawData:
    from filelock import FileLock, Timeout

    root.mkdir(parents=True, exist_ok=True)
    folder, stage = root / source.folder, root / f".{source.name}.partial"
    try:
        with FileLock(root / f".{source.name}.lock", timeout=LOCK_TIMEOUT_S):
            found = _find(source, root)  # again: another process may have fetched them while this one waited
            new = {}
            try:
                if missing := source.missing(found):
                    new = _download(source, stage, missing)
            finally:
                shutil.rmtree(stage, ignore_errors=True)
            raw = _assemble(source, found | new)
            if new:
                folder.mkdir(parents=True, exist_ok=True)
                record = _recorded(folder / RECORD) | {name: _sha256(data) for name, (data, _) in new.items()}
                # First: a run killed in between leaves files that are missing, not files that are unverified.
                write_file(folder / RECORD, "".join(f"{sha}  {name}\n" for name, sha in record.items()).encode())
            for name, (data, _) in new.items():
                write_file(folder / name, data)
            return raw
    except Timeout:
        waited = f"another process has been fetching {source.name} into {root} for {LOCK_TIMEOUT_S / 60:.0f} minutes"
        raise DataError(f"{waited}. Wait for it or end it, then {source.again}.") from None


def _download(source: Source, stage: Path, missing: list[str]) -> Found:
    """The missing files from torchvision's addresses, or the mirror, by torchvision's checksums."""
    import torchvision.datasets

    dataset, mirror = getattr(torchvision.datasets, source.dataset), os.environ.get("COURSE_MIRROR", "").rstrip("/")
    if source.archive:
        address = f"{mirror}/{source.archive}" if mirror else dataset.url
        _get([address], stage / source.archive, dataset.tgz_md5, source)
        files = _untar(stage / source.archive, source)
        return {name: (files[name][0], f"{name} from {address}") for name in missing}
    bases = [f"{mirror}/{source.dataset}"] if mirror else [address.rstrip("/") for address in dataset.mirrors]
    found: Found = {}
    for file, md5 in dataset.resources:
        if (name := file.removesuffix(".gz")) in missing:
            address = _get([f"{base}/{file}" for base in bases], stage / file, md5, source)
            found[name] = (_gunzip(stage / file), f"{name} from {address}")
    return found


def _get(addresses: list[str], path: Path, md5: str, source: Source) -> str:
    """Fetch one file from the first address that serves it whole, and say which."""
    from torchvision.datasets.utils import download_url

    problems = []
    for address in addresses:
        try:
            with _PROCESS, _fenced():
                download_url(address, path.parent, path.name, md5)
            return address
        except Exception as error:  # torchvision lets pass whatever urllib, http and sockets raise
            if isinstance(error, OSError) and not isinstance(error, URLError) and error.errno in _LOCAL:
                raise
            text = f"no answer for {NETWORK_TIMEOUT_S:g} s" if isinstance(error, TimeoutError) else str(error)
            text = text.replace("File not found or corrupted.", "arrived damaged or incomplete (by its MD5)")
            problems.append(f"{address}: {text}")
            _close(error)
    by_hand = source.archive or f"{source.folder}/{path.name}"
    mirror = "unset COURSE_MIRROR" if os.environ.get("COURSE_MIRROR") else "set COURSE_MIRROR to one that you reach"
    tried = "\n  ".join([f"{source.name} could not be downloaded; nothing was changed.", *(problems or ["no address"])])
    copy = f"copy {by_hand} into {path.parent.parent}; or {mirror}"
    end = "Without a network: load_dataset('digits')."
    raise DataError(f"{tried}\nCheck the network and {source.again} again; or {copy}. {end}")


@contextlib.contextmanager
def _fenced() -> Iterator[None]:
    """An end to waiting, and torchvision's bars only for a person who watches a terminal or a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    watched = sys.stderr.isatty() or (hasattr(shell, "kernel") and not os.environ.get("COURSE_UNATTENDED"))
    quiet = contextlib.nullcontext() if watched else contextlib.redirect_stderr(io.StringIO())
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT_S)
    try:
        with quiet:
            yield
    finally:
        socket.setdefaulttimeout(before)


def _close(error: BaseException | None) -> None:
    """Close the connections that an error keeps open: a leak would be reported much later."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, HTTPError):
            error.close()
        error = error.__context__


def _gunzip(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes() or b"empty")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _Damaged(f"{path} is not a whole gzip archive ({error})") from None


def _untar(path: Path, source: Source) -> Found:
    """The data set's files in an archive, without writing any path that it names."""
    found: Found = {}
    plain = _gunzip(path)  # as a whole: tarfile stops reading before gzip's checksum at the very end
    try:
        with tarfile.open(fileobj=io.BytesIO(plain), mode="r:") as tar:
            for name in source.files:
                found[name] = (tar.extractfile(f"{source.folder}/{name}").read(), f"{path}: {name}")
    except (tarfile.TarError, KeyError, AttributeError) as error:
        raise _Damaged(f"{path} does not hold the files of {source.folder} ({error})") from None
    return found


def _assemble(source: Source, found: Found) -> RawData:
    """The arrays of all files, each checked by itself and against the others."""
    if source.archive:
        batches = [_cifar(name, *found[name]) for name in source.files]
        train = [np.concatenate(arrays) for arrays in zip(*batches[:-1], strict=True)]
        return RawData(*train, *batches[-1], source.class_names)
    arrays = [_idx(*found[name], 3 if "images" in name else 1) for name in source.files]
    for (pictures, labels), name in zip((arrays[:2], arrays[2:]), source.files[1::2], strict=True):
        shown, most = found[name][1], len(source.class_names) - 1
        if len(pictures) != len(labels):
            raise _Damaged(f"{shown} holds {len(labels)} labels for {len(pictures)} images: they are of two sets")
        if labels.max() > most:
            raise _Damaged(f"{shown} has the label {labels.max()} at {labels.argmax()}: labels go to {most}")
    made = [array[:, None] if array.ndim == 3 else array.astype(np.int64) for array in arrays]
    return RawData(*made, source.class_names)


def _idx(data: bytes, shown: str, dimensions: int) -> np.ndarray:
    """An IDX array of bytes: two zero bytes, the type 8, the number of dimensions, each size as a big-endian uint32."""
    head, magic = 4 + 4 * dimensions, bytes([0, 0, 8, dimensions])
    if data[:4] != magic or len(data) < head:
        packed = ": it is still compressed, and its name should end in .gz" if data[:2] == b"\x1f\x8b" else ""
        raise _Damaged(f"{shown} does not start with {magic.hex(' ')} (IDX) but with {data[:4].hex(' ')}{packed}")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", count=dimensions, offset=4))
    sizes, promised = "x".join(map(str, shape)), head + math.prod(shape)
    if len(data) != promised:
        wrong = "truncated" if len(data) < promised else "too long"
        raise _Damaged(f"{shown} is {wrong}: {len(data)} bytes, while its header ({sizes}) promises {promised}")
    if not shape[0] or shape[1:] not in ((), (28, 28)):
        raise _Damaged(f"{shown} holds {sizes}, and this data set has images of 28x28 and at least one")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


def _cifar(name: str, data: bytes, shown: str) -> tuple[np.ndarray, np.ndarray]:
    """A published CIFAR-10 batch: only a file with torchvision's checksum is unpickled."""
    from torchvision.datasets import CIFAR10

    published = dict(CIFAR10.train_list + CIFAR10.test_list)[name]
    if hashlib.md5(data, usedforsecurity=False).hexdigest() != published:
        raise _Damaged(f"{shown} is not the published file (its MD5 is another), and a pickle is not opened on trust")
    batch = pickle.loads(data, encoding="latin1")
    return batch["data"].reshape(-1, 3, 32, 32), np.array(batch["labels"], dtype=np.int64)
