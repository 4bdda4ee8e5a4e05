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
import re
import shutil
import socket
import sys
import tarfile
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
_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_TAR = "cifar-10-python.tar.gz"
_BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")


class DataError(RuntimeError):
    """A data set cannot be had: a file, a folder or the network stands in the way; the text says what to do."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the text. The way to it through this library helps nobody there."""
        return [f"{type(self).__name__}: {self}"]


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
    files: tuple[str, ...] = _IDX


_KUZUSHIJI = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_OBJECTS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

SOURCES: dict[str, Source] = {
    "mnist": Source("MNIST", tuple("0123456789"), "MNIST/raw", 65),
    "fashion_mnist": Source("FashionMNIST", _FASHION, "FashionMNIST/raw", 85),
    "kmnist": Source("KMNIST", _KUZUSHIJI, "KMNIST/raw", 75),
    "cifar10": Source("CIFAR10", _OBJECTS, "cifar-10-batches-py", 360, _BATCHES),
}


def obtain(name: str, folder: str | os.PathLike, *, download: bool = True) -> RawData:
    """The data set's content from the files under ``folder``, or from the network.

    ``folder`` is the root of torchvision's layout, the one that holds ``MNIST/raw``. Files may hold any number of
    images, be called ``train-images.idx3-ubyte`` as well, and end in ``.gz``; of CIFAR's pickles only arrays are read.
    With ``download``, what is missing is fetched (from ``$COURSE_MIRROR`` if set), checked, and moved in under a file
    lock; a file that is there and damaged is named and left alone. What goes wrong is a DataError.
    """
    source, root = SOURCES[name], Path(folder)
    where, again = root / source.folder, f"call load_dataset({name!r}, download=True)"
    elsewhere = "Another folder: root= or COURSE_DATA. No files needed: load_dataset('digits')."
    try:
        try:
            return _read(source, root, None)
        except FileNotFoundError as missing:
            if not download:
                lies = ", ".join(sorted(path.name for path in where.iterdir())[:12]) if where.is_dir() else ""
                text = f"{name} is not complete in {where}: {missing.args[0]}; there is {lies or 'nothing'}"
                raise DataError(f"{text}. To fetch what is missing, {again}. {elsewhere}") from None
        with _locked(root, name) as stage:
            return _read(source, root, stage)
    except _Damaged as error:
        raise DataError(f"{error}. Nothing was changed: delete the file that is wrong, then {again}.") from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
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


def _read(source: Source, root: Path, stage: Path | None) -> RawData:
    """The data set, each file checked by itself and against the others; without ``stage`` nothing is fetched."""
    folder, record = root / source.folder, root / source.folder / RECORD
    text = record.read_text("utf-8") if record.is_file() else ""
    if any(len(line.partition("  ")[0]) != 64 for line in text.splitlines()):
        raise _Damaged(f"{record} is not a list of SHA-256 hashes")
    recorded, held, new = dict(reversed(line.split("  ", 1)) for line in text.splitlines()), {}, {}
    for file in source.files:
        spellings = [f"{name}{end}" for end in ("", ".gz") for name in (file, file.replace("-idx", ".idx"))]
        for path in [folder / name for name in spellings if (folder / name).is_file()][:1]:
            data = _gunzip(path) if path.suffix == ".gz" else path.read_bytes()
            if recorded.get(file, _sha256(data)) != _sha256(data):
                # Named first: a teacher may have put other files here on purpose.
                why = f"it has changed since then (if on purpose, delete {record} instead)"
                raise _Damaged(f"{path} does not match the hash recorded when it was downloaded: {why}")
            held[file] = data, str(path)
    if missing := [file for file in source.files if file not in held]:
        if stage is None:
            raise FileNotFoundError(f"{', '.join(missing)} missing")
        new = _fetched(source, missing, root, stage)
    held |= new
    if source.files is _BATCHES:
        *train, test = [_batch(*held[file]) for file in _BATCHES]
        arrays = [*map(np.concatenate, zip(*train, strict=True)), *test]
    else:
        parts = [_idx(*held[file], 3 if "images" in file else 1) for file in _IDX]
        arrays = [a for i in (0, 2) for a in _half(*parts[i : i + 2], held[_IDX[i + 1]][1])]
    if new:
        folder.mkdir(parents=True, exist_ok=True)
        recorded |= {file: _sha256(data) for file, (data, _) in new.items()}
        # The record first: a run killed in between leaves files that are missing, not files that are unverified.
        write_file(record, "".join(f"{sha}  {file}\n" for file, sha in recorded.items()).encode())
        for file, (data, _) in new.items():
            write_file(folder / file, data)
    return RawData(*arrays, source.class_names)


def _half(images: np.ndarray, labels: np.ndarray, shown: str) -> tuple[np.ndarray, np.ndarray]:
    if not len(labels) or len(images) != len(labels):
        raise _Damaged(f"{shown} holds {len(labels)} labels for {len(images)} images: they are of two sets")
    if labels.min() < 0 or labels.max() > 9:
        where = int(((labels < 0) | (labels > 9)).argmax())
        raise _Damaged(f"{shown} has the label {labels[where]} at {where}: labels go to 9")
    return images, labels.astype(np.int64)


def _idx(data: bytes, shown: str, dimensions: int) -> np.ndarray:
    """An IDX array: two zero bytes, the type 8, the number of dimensions, each size as a big-endian uint32, bytes."""
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
    array = np.frombuffer(data, np.uint8, offset=head).reshape(shape)
    return array[:, None] if dimensions == 3 else array


class _Arrays(pickle.Unpickler):
    """Rebuilds arrays of numbers and nothing else: a plain pickle may run any code that its writer chose."""

    def find_class(self, module, name):
        shown = (np.empty(0), 2), (np.empty(0), 5), (np.int64(0), 2)
        rebuild, buffer, scalar = (value.__reduce_ex__(protocol)[0] for value, protocol in shown)  # numpy's own
        allowed = {
            "numpy.ndarray": "only named: the class itself could be called on any memory",
            "numpy.dtype": lambda kind, *_: np.dtype(re.fullmatch(r"[biu]\d", kind)[0], False, True),
            "_codecs.encode": lambda text, _: text.encode("latin1"),
            "multiarray._reconstruct": lambda _, *how: rebuild(np.ndarray, *how),
            "multiarray.scalar": scalar,
            "numeric._frombuffer": buffer,
        }
        key = re.sub(r"^numpy\._?core\.", "", f"{module}.{name}")
        if key not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no data set needs")
        return allowed[key]


def _batch(data: bytes, shown: str) -> tuple[np.ndarray, np.ndarray]:
    """A CIFAR batch of any size: images uint8 [N, 3, 32, 32] and labels int64 [N]."""
    try:
        content = _Arrays(io.BytesIO(data), encoding="latin1").load()
        pixels, labels = (np.asarray(content.get(k, content.get(k.encode()))) for k in ("data", "labels"))
    except Exception as error:  # a damaged pickle fails in any way that its opcodes can
        raise _Damaged(f"{shown} is no batch of CIFAR's ({type(error).__name__}: {error})") from None
    if (pixels.dtype, pixels.shape[1:], labels.dtype.kind in "iu", labels.ndim) != (np.uint8, (3072,), True, 1):
        kinds = f"{pixels.dtype} {pixels.shape} and labels {labels.dtype} {labels.shape}"
        raise _Damaged(f"{shown} holds data {kinds}; a batch has data uint8 (N, 3072) and labels of integers (N,)")
    return _half(pixels.reshape(-1, 3, 32, 32), labels, shown)


def _fetched(source: Source, missing: list[str], root: Path, stage: Path) -> dict[str, tuple[bytes, str]]:
    """The missing files' content, and what an error should call each."""
    if source.files is _IDX:
        came = {file: _fetch(source, f"{file}.gz", stage) for file in missing}
        return {file: (_gunzip(stage / f"{file}.gz"), f"{file} from {address}") for file, address in came.items()}
    archive, name = root / _TAR, f"{source.folder}/%s"
    if not archive.is_file():
        _fetch(source, _TAR, stage)
        archive = stage / _TAR
    try:
        # Unpacked as a whole: reading it as a tar would stop before gzip's checksum at the very end.
        with tarfile.open(fileobj=io.BytesIO(_gunzip(archive))) as tar:
            return {file: (tar.extractfile(name % file).read(), f"{file} of {archive}") for file in missing}
    except (KeyError, AttributeError, tarfile.TarError) as error:
        raise _Damaged(f"{archive} does not hold all of {', '.join(missing)} ({error})") from None


def _fetch(source: Source, file: str, stage: Path) -> str:
    """Fetch one archive from the first address that serves it whole, by torchvision's checksum, and say which."""
    import torchvision.datasets
    from torchvision.datasets.utils import download_url

    dataset, mirror = getattr(torchvision.datasets, source.dataset), os.environ.get("COURSE_MIRROR", "").rstrip("/")
    if source.files is _BATCHES:
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
    by_hand = f"copy {file} into {stage.parent / ('' if source.files is _BATCHES else source.folder)}"
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
