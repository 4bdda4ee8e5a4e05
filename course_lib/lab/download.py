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
import shutil
import socket
import sys
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
_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


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


@dataclass(frozen=True)
class Source:
    """A data set of torchvision's: its class there, the folder of its files under the root, disk space in MB."""

    dataset: str
    class_names: tuple[str, ...]
    folder: str
    megabytes: int


_KUZUSHIJI = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_OBJECTS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

SOURCES: dict[str, Source] = {
    "mnist": Source("MNIST", tuple("0123456789"), "MNIST/raw", 65),
    "fashion_mnist": Source("FashionMNIST", _FASHION, "FashionMNIST/raw", 85),
    "kmnist": Source("KMNIST", _KUZUSHIJI, "KMNIST/raw", 75),
    "cifar10": Source("CIFAR10", _OBJECTS, "cifar-10-batches-py", 360),
}


def obtain(name: str, folder: str | os.PathLike, *, download: bool = True) -> RawData:
    """The data set's content from the files under ``folder``, or from the network.

    IDX files may hold any number of images, be called ``train-images.idx3-ubyte`` as well, and end in ``.gz``; CIFAR's
    must be the published ones, for a pickle may run any code. What is missing is fetched (from ``$COURSE_MIRROR`` if
    set), checked, and moved in under a file lock; an IDX file that is there and damaged is named and left alone.

    Args:
        name: one of :data:`SOURCES`.
        folder: the root of torchvision's layout, the one that holds ``MNIST/raw``.
        download: whether to fetch what is missing.

    Raises:
        DataError: a file is missing or damaged, the folder cannot be read or written, or the network fails.
    """
    source, root = SOURCES[name], Path(folder)
    where, again = root / source.folder, f"call load_dataset({name!r}, download=True)"
    elsewhere = "Another folder: root= or COURSE_DATA. No files needed: load_dataset('digits')."
    read = _cifar if source.dataset == "CIFAR10" else _idx_files
    try:
        try:
            return read(source, root, None)
        except FileNotFoundError as missing:
            if not download:
                lies = ", ".join(sorted(path.name for path in where.iterdir())[:12]) if where.is_dir() else ""
                text = f"{name} is not complete in {where}: {missing.args[0]}; there is {lies or 'nothing'}"
                raise DataError(f"{text}. To fetch what is missing, {again}. {elsewhere}") from None
        with _locked(root, name) as stage:
            return read(source, root, stage)
    except _Damaged as error:
        raise DataError(f"{error}. Nothing was changed: delete the file that is wrong, then {again}.") from None
    except OSError as error:
        full = error.errno in _FULL
        cure = f"There is no space: {source.megabytes} MB are needed" if full else "Ask who keeps it to add the data"
        raise DataError(f"{name} cannot be read or fetched in {root}: {error}. {cure}. {elsewhere}") from error


@contextlib.contextmanager
def _locked(root: Path, name: str) -> Iterator[Path]:
    """A folder to fetch into, held by one process at a time; what a killed run left is swept."""
    from filelock import FileLock

    root.mkdir(parents=True, exist_ok=True)
    stage = root / f".{name}.partial"
    with FileLock(root / f".{name}.lock", timeout=LOCK_TIMEOUT_S):
        shutil.rmtree(stage, ignore_errors=True)
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _idx_files(source: Source, root: Path, stage: Path | None) -> RawData:
    """MNIST and its like: four files, each checked by itself and against the others."""
    folder, record = root / source.folder, root / source.folder / RECORD
    recorded = dict(reversed(line.split("  ", 1)) for line in _text(record).splitlines())
    found, new = {}, {}
    for file in _FILES:
        spelled = (file, file.replace("-idx", ".idx"))
        for path in [p for p in (folder / f"{s}{end}" for end in ("", ".gz") for s in spelled) if p.is_file()][:1]:
            data = _gunzip(path) if path.suffix == ".gz" else path.read_bytes()
            if recorded.get(file, _sha256(data)) != _sha256(data):
                # Named first: a teacher may have put other files here on purpose.
                why = f"it has changed since then (if on purpose, delete {record} instead)"
                raise _Damaged(f"{path} does not match the hash recorded when it was downloaded: {why}")
            found[file] = data, str(path)
    missing = [file for file in _FILES if file not in found]
    if missing and stage is None:
        raise FileNotFoundError(f"{', '.join(missing)} missing")
    for file in missing:
        address = _fetch(source, f"{file}.gz", stage)
        new[file] = _gunzip(stage / f"{file}.gz"), f"{file} from {address}"
    arrays = [_idx(*(found | new)[file], 3 if "images" in file else 1) for file in _FILES]
    for images, labels, file in zip(arrays[::2], arrays[1::2], _FILES[1::2], strict=True):
        shown = (found | new)[file][1]
        if len(images) != len(labels):
            raise _Damaged(f"{shown} holds {len(labels)} labels for {len(images)} images: they are of two sets")
        if labels.max() > 9:
            raise _Damaged(f"{shown} has the label {labels.max()} at {labels.argmax()}: labels go to 9")
    if new:
        folder.mkdir(parents=True, exist_ok=True)
        recorded |= {file: _sha256(data) for file, (data, _) in new.items()}
        # The record first: a run killed in between leaves files that are missing, not files that are unverified.
        write_file(record, "".join(f"{sha}  {file}\n" for file, sha in recorded.items()).encode())
        for file, (data, _) in new.items():
            write_file(folder / file, data)
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


def _cifar(source: Source, root: Path, stage: Path | None) -> RawData:
    """CIFAR-10 as torchvision reads it, which opens no pickle but the published ones."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity, extract_archive

    folder = root / source.folder
    published = {**dict(CIFAR10.train_list + CIFAR10.test_list), CIFAR10.meta["filename"]: CIFAR10.meta["md5"]}
    wrong = [file for file, md5 in published.items() if not check_integrity(folder / file, md5)]
    for file in [file for file in wrong if (folder / file).exists()][:1]:
        raise _Damaged(f"{folder / file} is not the published file (by its MD5), and a pickle is not opened on trust")
    if wrong and stage is None:
        raise FileNotFoundError(f"{', '.join(wrong)} missing")
    if wrong:
        if not (archive := root / CIFAR10.filename).is_file():
            _fetch(source, CIFAR10.filename, stage)
            archive = stage / CIFAR10.filename
        _gunzip(archive)  # as a whole: reading it as a tar would stop before gzip's checksum at the very end
        extract_archive(str(archive), str(stage))
        for file in wrong:
            if not check_integrity(stage / source.folder / file, published[file]):
                raise _Damaged(f"{archive} does not hold the published {source.folder}/{file}")
        folder.mkdir(parents=True, exist_ok=True)
        for file in wrong:
            os.replace(stage / source.folder / file, folder / file)
    halves = [CIFAR10(root, train=train) for train in (True, False)]
    arrays = [a for h in halves for a in (h.data.transpose(0, 3, 1, 2), np.array(h.targets, dtype=np.int64))]
    return RawData(*arrays, source.class_names)


def _fetch(source: Source, file: str, stage: Path) -> str:
    """Fetch one archive from the first address that serves it whole, by torchvision's checksum, and say which."""
    import torchvision.datasets
    from torchvision.datasets.utils import download_url

    dataset, mirror = getattr(torchvision.datasets, source.dataset), os.environ.get("COURSE_MIRROR", "").rstrip("/")
    if source.dataset == "CIFAR10":
        addresses, md5 = [f"{mirror}/{file}" if mirror else dataset.url], dataset.tgz_md5
    else:
        bases = [f"{mirror}/{source.dataset}"] if mirror else dataset.mirrors
        addresses, md5 = [f"{base.rstrip('/')}/{file}" for base in bases], dict(dataset.resources)[file]
    problems = []
    for address in addresses:
        try:
            with _fenced():
                download_url(address, stage, file, md5)
            return address
        except Exception as error:  # torchvision lets pass whatever urllib, http and sockets raise
            if isinstance(error, OSError) and not isinstance(error, URLError | TimeoutError) and error.errno:
                raise  # of this machine's: no space, no permission
            text = f"no answer for {NETWORK_TIMEOUT_S:g} s" if isinstance(error, TimeoutError) else str(error)
            text = text.replace("File not found or corrupted.", "arrived damaged or incomplete (by its MD5)")
            problems.append(f"{address}: {text}")
            while error is not None:  # what keeps a connection open would be reported much later
                traceback.clear_frames(error.__traceback__)
                if isinstance(error, HTTPError):
                    error.close()
                error = error.__context__
    tried = "\n  ".join(["It could not be downloaded; nothing was changed.", *(problems or ["no address"])])
    mend = "unset COURSE_MIRROR" if mirror else "set COURSE_MIRROR to one that you reach"
    by_hand = f"copy {file} into {stage.parent / ('' if source.dataset == 'CIFAR10' else source.folder)}"
    end = "Without a network: load_dataset('digits')."
    raise DataError(f"{source.dataset}: {tried}\nCheck the network and try again; or {by_hand}; or {mend}. {end}")


@contextlib.contextmanager
def _fenced() -> Iterator[None]:
    """An end to waiting, and torchvision's bars only for a person who watches a terminal or a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    watched = sys.stderr.isatty() or (hasattr(shell, "kernel") and not os.environ.get("COURSE_UNATTENDED"))
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT_S)
    try:
        with contextlib.nullcontext() if watched else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)


def _gunzip(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes() or b"empty")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _Damaged(f"{path} is not a whole gzip archive ({error})") from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _text(record: Path) -> str:
    text = record.read_text("utf-8") if record.is_file() else ""
    if any(len(line.partition("  ")[0]) != 64 for line in text.splitlines()):
        raise _Damaged(f"{record} is not a list of SHA-256 hashes")
    return text
