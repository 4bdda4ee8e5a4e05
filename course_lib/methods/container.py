"""One file for a compressed network: self-describing, checked, written atomically, exact when read back.

Layout: 4 bytes magic, 1 byte format version, the body's length (varint), the body, 8 bytes BLAKE2b of everything
before them. The body lists the tensors of ``state_dict()``: name, dtype, shape, then the bytes of
:mod:`course_lib.methods.scaled`.
"""

import contextlib
import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from course_lib.methods.arrays import Reader, varint
from course_lib.methods.codebook import kmeans_codebook
from course_lib.methods.scaled import decode_array, encode_array, encoding_name

__all__ = ["CompressedFileError", "StoredTensor", "load_compressed", "read_contents", "save_compressed"]

MAGIC = b"\x93CNW"
VERSION = 1
DIGEST_BYTES = 8
# The position is the code in the file: only ever append.
DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16,
    torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
AS_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class CompressedFileError(ValueError):
    """A file that is no compressed network, is damaged, or belongs to another network; the text says which."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: what it is, how it was ``encoded``, and the ``stored_bytes`` of its data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    encoding: str
    stored_bytes: int


def save_compressed(
    model: nn.Module, path: str | os.PathLike, *, codebook_bits: int | None = None, huffman: bool = True
) -> int:
    """Write all parameters and buffers of ``model`` to one file, losslessly, each in the shortest form that fits it.

    Few distinct values become a codebook with packed or Huffman-coded indices, many zeros a sparse index, quantized
    weights (per tensor or per channel) their integers and scales; anything else stays raw. Nothing needs to be said
    about how the weights came to be. Bit for bit, NaN included, with one exception: in a tensor that is mostly zeros
    the sign of a zero is dropped, because a mask multiplied onto negative weights leaves minus zeros (they are equal
    to zero).

    Args:
        model: any module; it is not modified.
        path: the file to write. It appears whole or not at all: a crash leaves what was there before.
        huffman: ``False`` leaves out Huffman's code: every index has a fixed width, as after Deep Compression's second
            stage. The file is longer and reads back to the same weights.
        codebook_bits: 1 to 8: first cluster every parameter of two or more dimensions into 2^bits shared values by
            k-means, zeros kept (lossy; the file then holds the clustered weights). ``None``: the weights as they are.

    Returns:
        Length of the file in bytes, all metadata included.

    Raises:
        TypeError: a state that is no dense tensor of a supported dtype.
        OSError: the file cannot be written; the text names it.
    """
    state = read_state(model)
    if codebook_bits is not None:
        trained = {name for name, p in model.named_parameters() if p.dim() >= 2 and p.numel()}
        state = {
            name: kmeans_codebook(t, codebook_bits).values() if name in trained else t for name, t in state.items()
        }
    body = bytearray(varint(len(state)))
    for name, tensor in state.items():
        label, data = name.encode(), encode_tensor(tensor, huffman)
        body += varint(len(label)) + label + bytes([DTYPES.index(tensor.dtype)])
        body += varint(tensor.dim()) + b"".join(varint(n) for n in tensor.shape) + varint(len(data)) + data
    whole = MAGIC + bytes([VERSION]) + varint(len(body)) + body
    whole += digest(whole)
    write_atomically(Path(path), whole)
    return len(whole)


def load_compressed(path: str | os.PathLike, model: nn.Module) -> nn.Module:
    """Read a file of :func:`save_compressed` into ``model``, exactly, and return it.

    Args:
        path: the file.
        model: a module with the same tensor names, shapes and dtypes; filled in place only once the whole file is
            read and checked, so after an error it is as it was.

    Raises:
        FileNotFoundError: there is no such file.
        CompressedFileError: (a ValueError) foreign, truncated, damaged, of a later format version, or of another
            network.
    """
    path = Path(path)
    entries = read_entries(path)
    expected = read_state(model)
    check_same_network(path, entries, expected)
    tensors = {}
    for stored, data in entries:
        try:
            tensors[stored.name] = decode_tensor(data, stored.shape, stored.dtype)
        except (ValueError, IndexError, MemoryError, OverflowError) as error:
            raise CompressedFileError(f"{path}: {stored.name} cannot be decoded: {error}") from error
    model.load_state_dict(tensors)
    return model


def read_contents(path: str | os.PathLike) -> list[StoredTensor]:
    """What a file holds, tensor by tensor, without a model; the same errors as :func:`load_compressed`."""
    return [stored for stored, _ in read_entries(Path(path))]


def read_state(model: nn.Module) -> dict[str, Tensor]:
    """``model.state_dict()`` if every entry can be stored; TypeError otherwise."""
    state = model.state_dict()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}, not a tensor: it cannot be stored")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} is {tensor.dtype}, {tensor.layout}, on {tensor.device}: only dense tensors are stored"
            )
    return state


def as_rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor's shape as (rows, columns): the first dimension counts the output channels."""
    total = int(np.prod(shape, dtype=np.int64))
    rows = shape[0] if len(shape) > 1 and total else 1
    return rows, total // rows


def encode_tensor(tensor: Tensor, huffman: bool = True) -> bytes:
    """The bit patterns of a tensor, encoded."""
    values = tensor.detach().cpu().contiguous()
    if values.is_floating_point() and values.dtype.itemsize > 1:
        zeros = values == 0
        if 2 * int(zeros.sum()) > values.numel():
            values = values.masked_fill(zeros, 0.0)
    size = values.dtype.itemsize
    patterns = (
        values.reshape(as_rows(tuple(tensor.shape))).view(AS_INTEGER[size]).numpy().astype(f"<i{size}", copy=False)
    )
    return encode_array(patterns.view(f"<u{size}"), tensor.dtype == torch.float32, huffman)


def decode_tensor(data: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`encode_tensor`."""
    size = dtype.itemsize
    patterns = decode_array(data, *as_rows(shape), np.dtype(f"<u{size}"))
    native = np.ascontiguousarray(patterns).view(f"<i{size}").astype(f"=i{size}")
    if dtype == torch.bool and native.size and not set(np.unique(native)) <= {0, 1}:
        raise ValueError("a truth value that is neither 0 nor 1")
    integers = native.astype(np.uint8) if size == 1 else native
    return torch.from_numpy(integers.copy()).view(dtype).reshape(shape)


def digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside the target, flush to disk, then rename: the target is the old file or the new one, never half."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the name of a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist: create it first")
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(beside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def read_entries(path: Path) -> list[tuple[StoredTensor, bytes]]:
    """Everything in the file, checked but not decoded."""
    if path.is_dir():
        raise CompressedFileError(f"{path} is a folder, not a compressed network")
    whole = path.read_bytes()
    start = len(MAGIC) + 1
    if whole[: len(MAGIC)] != MAGIC:
        what = "is empty" if not whole else f"starts with {whole[:4]!r}, not with {MAGIC!r}"
        if whole and MAGIC.startswith(whole):
            what = f"is truncated to {len(whole)} bytes"
        raise CompressedFileError(f"{path} {what}: it was not written by save_compressed, or only begun")
    if len(whole) < start:
        raise CompressedFileError(f"{path} is truncated to {len(whole)} bytes")
    if whole[len(MAGIC)] != VERSION:
        raise CompressedFileError(
            f"{path} has format version {whole[len(MAGIC)]}, this library reads version {VERSION}: update the library, "
            "or the byte is damaged"
        )
    reader = Reader(whole, start)
    try:
        length = reader.varint()
    except ValueError:
        raise CompressedFileError(f"{path} is truncated or damaged: its length cannot be read") from None
    wanted = reader.position + length + DIGEST_BYTES
    if len(whole) != wanted:
        what = "truncated" if len(whole) < wanted else "longer than it says, or damaged"
        raise CompressedFileError(f"{path} is {what}: {len(whole)} bytes where {wanted} were written")
    if digest(whole[:-DIGEST_BYTES]) != whole[-DIGEST_BYTES:]:
        raise CompressedFileError(f"{path} is damaged: its checksum does not fit its content")
    try:
        return parse_body(Reader(whole[:-DIGEST_BYTES], reader.position))
    except (ValueError, IndexError) as error:
        raise CompressedFileError(f"{path} cannot be read: {error}") from error


def parse_body(reader: Reader) -> list[tuple[StoredTensor, bytes]]:
    entries = []
    for _ in range(reader.varint()):
        name = reader.block().decode()
        dtype = DTYPES[reader.byte()]
        shape = tuple(reader.varint() for _ in range(reader.varint()))
        data = reader.block()
        entries.append((StoredTensor(name, dtype, shape, encoding_name(data), len(data)), data))
    if reader.position != len(reader.data):
        raise ValueError(f"{len(reader.data) - reader.position} bytes too many")
    return entries


def check_same_network(path: Path, entries: list[tuple[StoredTensor, bytes]], expected: dict[str, Tensor]) -> None:
    """Refuse a file whose tensors are not exactly the model's, naming the first differences."""
    stored = {entry.name: (entry.dtype, entry.shape) for entry, _ in entries}
    wanted = {name: (t.dtype, tuple(t.shape)) for name, t in expected.items()}
    if len(stored) == len(entries) and stored == wanted:
        return

    def show(where: dict, name: str) -> str:
        return f"{where[name][0]} {list(where[name][1])}" if name in where else "nothing"

    differ = [name for name in {**wanted, **stored} if stored.get(name) != wanted.get(name)]
    listed = "; ".join(
        f"{name}: {show(stored, name)} in the file, {show(wanted, name)} in the model" for name in differ[:4]
    )
    more = f"; and {len(differ) - 4} more" if len(differ) > 4 else ""
    raise CompressedFileError(f"{path} holds another network: {listed or 'a name appears twice'}{more}")
