"""Reading the files of the image data sets, IDX and CIFAR batches, and refusing them when they are not whole.

A file must prove itself: torchvision checks only that an extracted file exists. Every reader here takes the bytes and
the name by which an error should call them, because the bytes may come from inside an archive.
"""

import gzip
import io
import math
import pickle
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

__all__ = [
    "DamagedFile",
    "DataError",
    "gunzip",
    "parse_cifar_batch",
    "parse_cifar_meta",
    "parse_idx_images",
    "parse_idx_labels",
    "read_file",
    "untar",
]

_IDX_UINT8 = 0x08
_GZIP_MAGIC = b"\x1f\x8b"


class DataError(RuntimeError):
    """A data set cannot be had: a file, a folder or the network stands in the way; the text says what to do."""


class DamagedFile(DataError):
    """A file that is not what its name promises; ``shown`` is that file's name and ``problem`` what is wrong."""

    def __init__(self, shown: str, problem: str):
        super().__init__(f"{shown} {problem}")
        self.shown, self.problem = shown, problem


def read_file(path: Path) -> bytes:
    """All bytes of a regular file; a folder, or a device that would never end, is refused."""
    if path.is_dir():
        raise DamagedFile(str(path), "is a folder, and a file should be there")
    if not path.is_file():
        raise DamagedFile(str(path), "is not a regular file")
    return path.read_bytes()


def gunzip(path: Path) -> bytes:
    """The content of a gzip file, whose checksum and length are verified on the way.

    Raises:
        DamagedFile: the archive is truncated, altered, or no gzip file at all.
    """
    packed = read_file(path)
    if not packed:
        raise DamagedFile(str(path), "is empty")
    try:
        return gzip.decompress(packed)
    except (EOFError, OSError, zlib.error) as error:
        raise DamagedFile(str(path), f"is not a whole gzip archive ({error})") from None


def untar(path: Path, folder: str, names: Iterable[str]) -> dict[str, bytes]:
    """The files ``folder/name`` of a ``.tar.gz``, as far as it holds them, without writing any path it names.

    Raises:
        DamagedFile: the archive is truncated, altered, or no tar archive.
    """
    wanted = {f"{folder}/{name}": name for name in names}
    # Unpacked as a whole first: tarfile stops reading before gzip's checksum at the very end.
    plain = gunzip(path)
    found = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(plain), mode="r:") as tar:
            for member in tar:
                name = wanted.get(member.name.removeprefix("./"))
                if name is not None and member.isreg():
                    found[name] = tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise DamagedFile(str(path), f"is not a whole tar archive ({error})") from None
    return found


def parse_idx(data: bytes, shown: str, dimensions: int) -> np.ndarray:
    """An IDX array of unsigned bytes with that many dimensions (LeCun's format of the MNIST files).

    The header is two zero bytes, the type (0x08), the number of dimensions, then each size as a big-endian uint32.

    >>> parse_idx(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]), "labels", 1)
    array([7, 8, 9], dtype=uint8)

    Raises:
        DamagedFile: wrong magic number, type or number of dimensions, no items, or a length unlike the header's.
    """
    if not data:
        raise DamagedFile(shown, "is empty")
    if data[:2] == _GZIP_MAGIC:
        raise DamagedFile(shown, "is still compressed: its name should end in .gz")
    head = 4 + 4 * dimensions
    magic = bytes([0, 0, _IDX_UINT8, dimensions])
    if data[:4] != magic:
        raise DamagedFile(shown, f"does not start with {magic.hex(' ')} (IDX, bytes) but with {data[:4].hex(' ')}")
    if len(data) < head:
        raise DamagedFile(shown, f"is truncated within its header: {len(data)} bytes instead of {head}")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", count=dimensions, offset=4))
    promised = head + math.prod(shape)
    sizes = "x".join(map(str, shape))
    if len(data) < promised:
        raise DamagedFile(shown, f"is truncated: {len(data)} bytes, while its header ({sizes}) promises {promised}")
    if len(data) > promised:
        raise DamagedFile(shown, f"is too long: {len(data)} bytes, while its header ({sizes}) promises {promised}")
    if promised == head:
        raise DamagedFile(shown, f"holds nothing: its header says {sizes}")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


def parse_idx_images(data: bytes, shown: str, size: tuple[int, int] = (28, 28)) -> np.ndarray:
    """Grey images, uint8 [N, 1, H, W], from an IDX file whose images must have that size."""
    images = parse_idx(data, shown, 3)
    if images.shape[1:] != size:
        given, fits = "x".join(map(str, images.shape[1:])), "x".join(map(str, size))
        raise DamagedFile(shown, f"holds images of {given} pixels, and this data set has {fits}")
    return images[:, None]


def parse_idx_labels(data: bytes, shown: str, classes: int = 10) -> np.ndarray:
    """Labels, int64 [N] in 0..classes-1, from an IDX file."""
    return _check_labels(parse_idx(data, shown, 1), shown, classes)


def _check_labels(labels, shown: str, classes: int) -> np.ndarray:
    try:
        array = np.asarray(labels)
    except ValueError as error:  # a ragged list
        raise DamagedFile(shown, f"has labels that are no list of integers ({error})") from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DamagedFile(shown, f"has labels that are no list of integers ({array.dtype}, shape {array.shape})")
    outside = np.flatnonzero((array < 0) | (array >= classes))
    if len(outside):
        where = int(outside[0])
        raise DamagedFile(shown, f"has the label {int(array[where])} at position {where}: labels go to {classes - 1}")
    return array.astype(np.int64)


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the encoding {encoding} is not allowed")
    return text.encode(encoding)


def _dtype(*args) -> np.dtype:
    made = np.dtype(*args)
    if made.hasobject:
        raise pickle.UnpicklingError("it asks for an array of objects, which no data set needs")
    return made


def _from_buffer(buffer, dtype, shape, order) -> np.ndarray:
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)


# numpy tells its own rebuilding functions, wherever this version keeps them.
_REBUILD, _SCALAR = np.empty(0).__reduce__()[0], np.int64(0).__reduce__()[0]
_REBUILDERS = {
    # The class itself can be called on any memory, so a pickle only ever holds its name.
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
    **{
        (f"numpy.{core}.multiarray", "_reconstruct"): lambda _, *args: _REBUILD(np.ndarray, *args)
        for core in ("core", "_core")
    },
    **{(f"numpy.{core}.multiarray", "scalar"): _SCALAR for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds arrays of numbers and nothing else: a plain pickle may run any code that its writer chose."""

    def find_class(self, module, name):
        try:
            return _REBUILDERS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no data set needs") from None


def _unpickle_dict(data: bytes, shown: str) -> dict:
    if not data:
        raise DamagedFile(shown, "is empty")
    stream = io.BytesIO(data)
    try:
        # latin1, because the published batches are Python 2 pickles whose byte strings hold the pixels.
        content = _ArrayUnpickler(stream, encoding="latin1").load()
    except Exception as error:  # a damaged pickle fails in any way that its opcodes can
        raise DamagedFile(shown, f"is not a readable CIFAR file ({type(error).__name__}: {error})") from None
    if stream.read(1):
        raise DamagedFile(shown, f"is too long: its content ends at byte {stream.tell() - 1} of {len(data)}")
    if not isinstance(content, dict):
        raise DamagedFile(shown, f"holds a {type(content).__name__} instead of a dict")
    return {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}


def parse_cifar_batch(data: bytes, shown: str, classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """A pickled CIFAR batch of any size: images uint8 [N, 3, 32, 32] and labels int64 [N] in 0..classes-1.

    Raises:
        DamagedFile: truncated, too long, asking for anything but arrays, or with wrong keys, types, shapes or labels.
    """
    content = _unpickle_dict(data, shown)
    absent = [key for key in ("data", "labels") if key not in content]
    if absent:
        raise DamagedFile(shown, f"lacks the key {' and '.join(map(repr, absent))}; it has {sorted(map(str, content))}")
    pixels = content["data"]
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3072,):
        kind = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise DamagedFile(shown, f"has data of {kind} instead of uint8 (N, 3072)")
    if len(pixels) == 0:
        raise DamagedFile(shown, "holds no images")
    labels = _check_labels(content["labels"], shown, classes)
    if len(labels) != len(pixels):
        raise DamagedFile(shown, f"has {len(pixels)} images and {len(labels)} labels")
    return pixels.reshape(-1, 3, 32, 32), labels


def parse_cifar_meta(data: bytes, shown: str) -> tuple[str, ...]:
    """The class names of a CIFAR ``batches.meta``."""
    names = _unpickle_dict(data, shown).get("label_names")
    if not isinstance(names, list | tuple) or not names:
        raise DamagedFile(shown, "holds no list 'label_names'")
    names = tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in names)
    if not all(isinstance(name, str) and name for name in names):
        raise DamagedFile(shown, "has a class name that is no text")
    return names
