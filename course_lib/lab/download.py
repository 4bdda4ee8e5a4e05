"""Data sets that live in files: found as they lie, or fetched by torchvision, and checked.

A file must prove itself: torchvision looks at an archive's checksum, and hardly at what was extracted. A complete data
set is read without writing anything, so that a class may share a read-only folder.
"""

import contextlib
import gzip
import hashlib
import io
import math
import os
import pickle
import re
import shutil
import socket
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

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
    """A data set of torchvision's: its class there, the folder of its files under the root, and their names."""

    dataset: str
    class_names: tuple[str, ...]
    folder: str
    files: tuple[str, ...] = _IDX


_KUZUSHIJI = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_OBJECTS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

SOURCES: dict[str, Source] = {
    "mnist": Source("MNIST", tuple("0123456789"), "MNIST/raw"),
    "fashion_mnist": Source("FashionMNIST", _FASHION, "FashionMNIST/raw"),
    "kmnist": Source("KMNIST", _KUZUSHIJI, "KMNIST/raw"),
    "cifar10": Source("CIFAR10", _OBJECTS, "cifar-10-batches-py", _BATCHES),
}


def obtain(name: str, folder: str | os.PathLike, *, download: bool = True) -> RawData:
    """The data set's content from the files under ``folder``, or from the network.

    ``folder`` is the root of torchvision's layout, the one that holds ``MNIST/raw``. Files may hold any number of
    images, be called ``train-images.idx3-ubyte`` as well, and be gzipped; of CIFAR's pickles only arrays are read.
    With ``download``, what is missing is fetched (from ``$COURSE_MIRROR`` if set), checked, and moved in under a file
    lock; a file that is there and damaged is named and left alone. What goes wrong is a DataError.
    """
    from filelock import FileLock

    source, root = SOURCES[name], Path(folder)
    where, again = root / source.folder, f"call load_dataset({name!r}, download=True)"
    elsewhere = "Another folder: root= or COURSE_DATA. No files needed: load_dataset('digits')."
    try:
        held, missing = _lying(source, where)
        if not missing:
            return _parsed(source, held)
        if not download:
            lies = ", ".join(sorted(path.name for path in where.iterdir())[:12]) if where.is_dir() else ""
            text = f"{name} is not complete in {where}: {', '.join(missing)} missing; there is {lies or 'nothing'}"
            raise DataError(f"{text}. To fetch what is missing, {again}. {elsewhere}")
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock", timeout=LOCK_TIMEOUT_S):
            for left in root.glob(f".{source.dataset}-*"):  # by a run that was killed
                shutil.rmtree(left, ignore_errors=True)
            held, missing = _lying(source, where)  # somebody else may have fetched it
            new = _fetched(source, root, missing) if missing else {}
            raw = _parsed(source, held | new)
            _keep(where, new)
        return raw
    except _Damaged as error:
        raise DataError(f"{error}. Nothing was changed: delete the file that is wrong, then {again}.") from None
    except OSError as error:
        cure = "Free some space if there is none, or ask who keeps it to add the data"
        raise DataError(f"{name} cannot be read or fetched in {root}: {error}. {cure}. {elsewhere}") from error


Content = dict[str, tuple[bytes, str]]  # file -> its bytes, unpacked, and what an error should call it


def _lying(source: Source, folder: Path) -> tuple[Content, list[str]]:
    """What lies in the folder, held against the record of what we fetched, and the names of what is missing."""
    record, held = folder / RECORD, {}
    lines = record.read_text("utf-8", errors="replace").splitlines() if record.is_file() else []
    if not all(re.fullmatch(r"[0-9a-f]{64}  \S+", line) for line in lines):
        raise _Damaged(f"{record} is not a list of SHA-256 hashes")  # else nothing would be held against it
    recorded = {file: sha for sha, _, file in (line.partition("  ") for line in lines)}
    for file in source.files:
        spellings = [f"{name}{end}" for end in ("", ".gz") for name in (file, file.replace("-idx", ".idx"))]
        path = next((folder / name for name in spellings if (folder / name).is_file()), None)
        if path is None:
            continue
        data = _unpacked(path)
        if recorded.get(file, _sha256(data)) != _sha256(data):
            # Named first: a teacher may have put other files here on purpose.
            why = f"it has changed since then (if on purpose, delete {record} instead)"
            raise _Damaged(f"{path} does not match the hash recorded when it was downloaded: {why}")
        held[file] = data, str(path)
    return held, [file for file in source.files if file not in held]


def _unpacked(path: Path) -> bytes:
    data = path.read_bytes()
    if data[:2] != b"\x1f\x8b":  # browsers unpack some files and leave their names, or the other way round
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _Damaged(f"{path} is not a whole gzip archive ({error})") from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _keep(folder: Path, new: Content) -> None:
    """Store what was fetched, and its hashes."""
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / RECORD
    known = record.read_bytes() if record.is_file() else b""
    added = "".join(f"{_sha256(data)}  {file}\n" for file, (data, _) in new.items())
    # The record first: a run killed in between leaves files that are missing, not files that are unverified.
    write_file(record, known + added.encode())
    for file, (data, _) in new.items():
        write_file(folder / file, data)


def _parsed(source: Source, held: Content) -> RawData:
    """The arrays in the files, each checked by itself and against the others."""
    if source.files is _BATCHES:
        *train, test = [_batch(*held[file]) for file in _BATCHES]
        images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
        return RawData(images, labels, *test, source.class_names)
    arrays = []
    for images, labels in (_IDX[:2], _IDX[2:]):
        arrays += _half(_idx(*held[images], 3)[:, None], _idx(*held[labels], 1), held[labels][1])
    return RawData(*arrays, source.class_names)


def _half(images: np.ndarray, labels: np.ndarray, shown: str) -> tuple[np.ndarray, np.ndarray]:
    if not len(labels) or len(images) != len(labels):
        raise _Damaged(f"{shown} holds {len(labels)} labels for {len(images)} images: they are of two sets")
    wrong = labels[(labels < 0) | (labels > 9)]
    if wrong.size:
        raise _Damaged(f"{shown} has the label {wrong[0]}: labels go to 9")
    return images, labels.astype(np.int64)


def _idx(data: bytes, shown: str, dimensions: int) -> np.ndarray:
    """An IDX array: two zero bytes, the type 8, the number of dimensions, each size as a big-endian uint32, bytes."""
    head, magic = 4 + 4 * dimensions, bytes([0, 0, 8, dimensions])
    if data[:4] != magic or len(data) < head:
        raise _Damaged(f"{shown} does not start with {magic.hex(' ')} (IDX) but with {data[:4].hex(' ')}")
    shape = np.frombuffer(data, ">u4", count=dimensions, offset=4).tolist()
    sizes, promised = "x".join(map(str, shape)), head + math.prod(shape)
    if len(data) != promised:
        wrong = "truncated" if len(data) < promised else "too long"
        raise _Damaged(f"{shown} is {wrong}: {len(data)} bytes, while its header ({sizes}) promises {promised}")
    if shape[1:] not in ([], [28, 28]):
        raise _Damaged(f"{shown} holds {sizes}, and this data set has images of 28x28")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


class _Arrays(pickle.Unpickler):
    """Rebuilds arrays of numbers and nothing else: a plain pickle may run any code that its writer chose."""

    def find_class(self, module, name):
        full = f"{module}.{name}".replace("numpy.core.", "numpy._core.")  # as numpy 1 wrote it
        own = {
            "numpy.ndarray": "only named: the class itself could be called on any memory",
            "numpy.dtype": lambda kind, *_: np.dtype(re.fullmatch(r"[biu]\d", kind)[0], False, True),
            "_codecs.encode": lambda text, _: text.encode("latin1"),
            "numpy._core.multiarray._reconstruct": lambda _, *how: np.empty(0).__reduce__()[0](np.ndarray, *how),
        }
        if full in own:
            return own[full]
        if full in ("numpy._core.multiarray.scalar", "numpy._core.numeric._frombuffer"):
            return super().find_class(*full.rsplit(".", 1))
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no data set needs")


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


def _fetched(source: Source, root: Path, missing: list[str]) -> Content:
    """The missing files as torchvision fetches them, checks their archive's MD5, and unpacks them."""
    import torchvision.datasets

    dataset, mirror = getattr(torchvision.datasets, source.dataset), os.environ.get("COURSE_MIRROR", "").rstrip("/")
    if mirror:
        addresses = {"mirrors": [f"{mirror}/{source.dataset}/"], "url": f"{mirror}/{_TAR}"}
        dataset = type(source.dataset, (dataset,), addresses)
    unattended = os.environ.get("CI") or os.environ.get("COURSE_UNATTENDED")
    bars = contextlib.redirect_stderr(io.StringIO()) if unattended else contextlib.nullcontext()
    waiting = socket.getdefaulttimeout()
    with tempfile.TemporaryDirectory(prefix=f".{source.dataset}-", dir=root) as stage, bars:
        if source.files is _BATCHES and (root / _TAR).is_file():
            shutil.copy(root / _TAR, stage)  # taken without a network, if it is whole
        socket.setdefaulttimeout(NETWORK_TIMEOUT_S)
        try:
            dataset(stage, download=True)
        except Exception as error:  # torchvision lets pass whatever urllib, http and sockets raise
            archives, place = (_TAR, root) if source.files is _BATCHES else ("the .gz files", root / source.folder)
            tried = ", ".join([dataset.url] if source.files is _BATCHES else dataset.mirrors)
            text = f"{source.dataset} could not be downloaded from {tried}; nothing was changed.\n  {error}"
            mend = "unset COURSE_MIRROR" if mirror else "set COURSE_MIRROR to one that you reach"
            by_hand = f"copy {archives}, as published, into {place}"
            end = "Without a network: load_dataset('digits')."
            check = "Check the network, and the space that is left, and try again"
            raise DataError(f"{text}\n{check}; or {by_hand}; or {mend}. {end}") from None
        finally:
            socket.setdefaulttimeout(waiting)
        folder = Path(stage, source.folder)
        return {file: ((folder / file).read_bytes(), f"{file} as it was fetched") for file in missing}
