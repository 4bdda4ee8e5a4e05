"""From few distinct weights to few bytes, in one checked file: the third stage of Deep Compression (Han et al. 2016).

A file is 4 bytes of magic, a version byte, 8 bytes of BLAKE2b over the rest, and the tensors of ``state_dict()``: name,
dtype, shape, data. A tensor's first byte says how its bit patterns are written, whatever is shortest: as they are; as a
palette with indices of a fixed width or in Huffman's code; by the gaps between non-zeros (the paper's relative index,
with a filler for long gaps); as integers times scales; or as the same tensor under another name.

Of a Huffman code (1952, "A Method for the Construction of Minimum-Redundancy Codes") only the lengths of the words are
kept; the words follow from them in the canonical order (shorter first, then smaller symbol first).
"""

import hashlib
import heapq
import math
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from course_lib.files import write_file
from course_lib.gate import whole_number
from course_lib.methods.codebook import kmeans_codebook

__all__ = ["CompressedFileError", "StoredTensor", "canonical_codes", "code_lengths", "entropy_bits", "huffman_code"]
__all__ += ["huffman_decode", "huffman_encode", "load_compressed", "read_contents", "save_compressed"]

# Code words in a file are no longer than this, so that one table look-up decodes a symbol.
LONGEST = 15
MAGIC, VERSION, DIGEST_BYTES = b"\x93CNW", 2, 8
RAW, FIXED, HUFFMAN, SPARSE, INTEGERS, TIED = range(6)
NAMES = ("raw", "codebook", "codebook", "sparse", "integers", "tied")
LARGEST_PALETTE = 4096
# The position is the code in the file: only ever append.
DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16,
    torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
# The largest level of a symmetric quantizer of 2 to 8 bits, with and without the odd level at the lower end.
LARGEST_LEVELS = sorted({2**b - 1 for b in range(1, 8)} | {2**b for b in range(1, 8)})
SCALE_GROUP = 32


class CompressedFileError(ValueError):
    """A file that is no compressed network, is damaged, or belongs to another network; the text says which."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: what it is, its ``encoding`` in a word, and the ``stored_bytes`` of its data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    encoding: str
    stored_bytes: int


def save_compressed(
    model: nn.Module, path: str | os.PathLike, *, codebook_bits: int | None = None, huffman: bool = True
) -> int:
    """Write all parameters and buffers of ``model`` to one file, losslessly, each in the shortest form that fits it.

    Few distinct values become a codebook, many zeros a sparse index, quantized weights (one scale a tensor, a row, or a
    group of 32) integers and scales. Bit for bit, NaN included, with one exception: in a tensor that is mostly zeros
    the sign of a zero is dropped, because a mask multiplied onto negative weights leaves minus zeros. Tensors that
    share memory are stored once. The file appears whole or not at all; returned is its length in bytes.

    Args:
        codebook_bits: 1 to 8: first cluster every parameter of two or more dimensions into 2^bits shared values by
            k-means, zeros kept (lossy; the file then holds the clustered weights). ``None``: the weights as they are.
        huffman: ``False`` leaves out Huffman's code: every index has a fixed width, as after Deep Compression's second
            stage. The file is longer and reads back to the same weights.

    Raises:
        TypeError: a state that is no dense tensor of a supported dtype.
        OSError: the file cannot be written; the text names it.
    """
    body, first = bytearray(), {}
    state = read_state(model)
    for number, (name, tensor) in enumerate(state.items()):
        data = bytes([TIED]) + varint(first.setdefault(place(tensor, number), number))
        if first[place(tensor, number)] == number:
            if codebook_bits is not None and isinstance(tensor, nn.Parameter) and tensor.dim() >= 2 and tensor.numel():
                tensor = kmeans_codebook(tensor.detach(), codebook_bits).values()
            data = encode_tensor(tensor.detach(), huffman)
        body += block(name.encode()) + bytes([DTYPES.index(tensor.dtype)])
        body += varint(tensor.dim()) + b"".join(map(varint, tensor.shape)) + block(data)
    body = varint(len(state)) + body
    whole = MAGIC + bytes([VERSION]) + digest(body) + body
    write_file(path, whole)
    return len(whole)


def load_compressed(path: str | os.PathLike, model: nn.Module) -> nn.Module:
    """Read a file of :func:`save_compressed` into ``model``, exactly, and return it.

    ``model``, with the same tensor names, shapes and dtypes, is filled in place once the whole file is read and
    checked: after an error it is as it was. OSError: the file cannot be read. CompressedFileError (a ValueError):
    foreign, truncated, damaged, of another format version, or of another network.
    """
    entries, expected = read_entries(Path(path)), read_state(model)
    check_same_network(path, [stored for stored, _ in entries], expected)
    tensors: dict[str, Tensor] = {}
    first: dict[tuple, str] = {}
    for number, (stored, data) in enumerate(entries):
        try:
            tensors[stored.name] = decode_tensor(data, stored, list(tensors.values()))
        except Exception as error:  # whatever a file says that was not written by save_compressed
            raise CompressedFileError(f"{path}: {stored.name} cannot be decoded: {error}") from error
        twin = first.setdefault(place(expected[stored.name], number), stored.name)
        if bits_of(tensors[twin]).tobytes() != bits_of(tensors[stored.name]).tobytes():
            raise CompressedFileError(f"{path} holds another network: {twin} and {stored.name} are one in the model")
    unwrapped(model).load_state_dict(tensors)
    return model


def read_contents(path: str | os.PathLike) -> list[StoredTensor]:
    """What a file holds, tensor by tensor, without a model; the same errors as :func:`load_compressed`."""
    return [stored for stored, _ in read_entries(Path(path))]


def unwrapped(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)  # torch.compile's wrapper puts a prefix before every name


def read_state(model: nn.Module) -> dict[str, Tensor]:
    """``state_dict()`` with the parameters themselves, if every entry can be stored; TypeError otherwise."""
    state = unwrapped(model).state_dict(keep_vars=True)
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or isinstance(tensor, UninitializedTensorMixin):
            raise TypeError(f"{name} is {type(tensor).__name__}, not a tensor with values: it cannot be stored")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.dtype not in DTYPES:
            found = f"{name} is {tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise TypeError(f"{found}: only dense tensors are stored")
    return state


def place(tensor: Tensor, number: int) -> tuple:
    """What is equal for two tensors if they are one in memory."""
    return (tensor.data_ptr() or -number, tensor.dtype, tensor.shape, tensor.stride())


def digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def read_entries(path: Path) -> list[tuple[StoredTensor, bytes]]:
    """Everything in the file, checked but not decoded."""
    if path.is_dir():
        raise CompressedFileError(f"{path} is a folder, not a compressed network")
    whole, start = path.read_bytes(), len(MAGIC) + 1 + DIGEST_BYTES
    if whole[: len(MAGIC)] != MAGIC:
        raise CompressedFileError(f"{path} was not written by save_compressed: it starts with {whole[:4]!r}")
    if len(whole) >= start and whole[len(MAGIC)] != VERSION:
        raise CompressedFileError(f"{path} has format version {whole[len(MAGIC)]}, this library reads {VERSION}")
    if digest(whole[start:]) != whole[len(MAGIC) + 1 : start]:
        raise CompressedFileError(f"{path} is truncated or damaged: its checksum does not fit its {len(whole)} bytes")
    try:
        reader, entries = Reader(whole[start:]), []
        for _ in range(reader.varint()):
            name, dtype = reader.block().decode(), DTYPES[reader.byte()]
            shape = tuple(reader.varint() for _ in range(reader.varint()))
            data = reader.block()
            entries.append((StoredTensor(name, dtype, shape, NAMES[data[0]], len(data)), data))
        if reader.rest():
            raise ValueError("bytes too many at its end")
    except (ValueError, IndexError) as error:
        raise CompressedFileError(f"{path} cannot be read: {error}") from error
    return entries


def check_same_network(path: str | os.PathLike, entries: list[StoredTensor], expected: dict[str, Tensor]) -> None:
    """Refuse a file whose tensors are not exactly the model's, naming the first differences."""
    stored = {entry.name: f"{entry.dtype} {list(entry.shape)}" for entry in entries}
    wanted = {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in expected.items()}
    differ = [name for name in {**wanted, **stored} if stored.get(name) != wanted.get(name)]
    if differ or len(stored) != len(entries):
        pairs = [(n, stored.get(n, "nothing"), wanted.get(n, "nothing")) for n in differ[:4]]
        texts = [f"{n}: {ours} in the file, {theirs} in the model" for n, ours, theirs in pairs]
        texts += [f"and {len(differ) - 4} more"] if len(differ) > 4 else []
        raise CompressedFileError(f"{path} holds another network: {'; '.join(texts) or 'a name appears twice'}")


def encode_tensor(tensor: Tensor, huffman: bool) -> bytes:
    """The bit patterns of a tensor in the shortest of all forms."""
    zeros = tensor == 0
    if tensor.is_floating_point() and tensor.element_size() > 1 and 2 * int(zeros.sum()) > tensor.numel():
        tensor = tensor.masked_fill(zeros, 0.0)
    patterns, is_float32 = bits_of(tensor), tensor.dtype == torch.float32
    plain = encode_array(patterns, is_float32, huffman)
    grid = encode_integers(patterns, huffman) if is_float32 and patterns.size > 1 else plain
    return min(plain, grid, key=len)


def bits_of(tensor: Tensor) -> np.ndarray:
    """Bit patterns [rows, columns] as little-endian unsigned integers; a row for each output channel."""
    size = tensor.element_size()
    rows = len(tensor) if tensor.dim() > 1 and tensor.numel() else 1
    integers = tensor.cpu().contiguous().reshape(rows, -1).view(getattr(torch, f"uint{8 * size}"))
    return integers.numpy().astype(f"<u{size}")


def decode_tensor(data: bytes, stored: StoredTensor, before: list[Tensor]) -> Tensor:
    """The inverse of :func:`encode_tensor`; a tied tensor is one of those ``before`` it."""
    reader, size = Reader(data), stored.dtype.itemsize
    if data[0] == TIED:
        twin = before[Reader(data, 1).varint()]
        if (twin.dtype, twin.shape) != (stored.dtype, stored.shape):
            raise ValueError("tied to a tensor of another kind")
        return twin
    total = math.prod(stored.shape)
    rows = stored.shape[0] if len(stored.shape) > 1 and total else 1
    decode = decode_integers if data[0] == INTEGERS else decode_array
    patterns = decode(reader, rows, total // rows, np.dtype(f"<u{size}"))
    native = np.ascontiguousarray(patterns).astype(f"=u{size}")
    if stored.dtype == torch.bool and native.max(initial=0) > 1:
        raise ValueError("a truth value that is neither 0 nor 1")
    return torch.from_numpy(native).view(stored.dtype).reshape(stored.shape)


def encode_array(values: np.ndarray, is_float: bool, huffman: bool) -> bytes:
    """Bit patterns [rows, columns], row by row or, if most are zeros, by gaps, whichever is shorter."""
    dense = encode_values(values.ravel(), is_float, huffman)
    sparse = values.size > 1 and 2 * np.count_nonzero(values) <= values.size
    return min(dense, encode_sparse(values.ravel(), is_float, huffman), key=len) if sparse else dense


def encode_sparse(flat: np.ndarray, is_float: bool, huffman: bool) -> bytes:
    """The gaps before non-zeros, in the width that does best, then their values."""
    positions = np.flatnonzero(flat)
    gaps = np.diff(positions, prepend=-1) - 1
    kept, candidates = encode_values(flat[positions], is_float, huffman), []
    for bits in range(2, 9):
        cap = (1 << bits) - 1
        # A symbol of value cap skips that many zeros and says nothing else; what is left of the gap follows.
        ends = np.cumsum(gaps // cap + 1)
        steps = np.full(ends[-1] if len(ends) else 0, cap, dtype=np.uint8)
        steps[ends - 1] = gaps % cap
        head = bytes([SPARSE, bits]) + varint(len(positions)) + varint(len(steps))
        candidates.append(head + block(encode_values(steps, False, huffman)) + kept)
    return min(candidates, key=len)


def decode_array(reader: "Reader", rows: int, columns: int, dtype: np.dtype) -> np.ndarray:
    """The inverse of :func:`encode_array`: bit patterns [rows, columns]."""
    if reader.data[reader.position] != SPARSE:
        return decode_values(reader, rows * columns, dtype).reshape(rows, columns)
    bits, count, steps = reader.take(2)[1], reader.varint(), reader.varint()
    if count > rows * columns or steps > rows * columns + count:
        raise ValueError(f"{count} non-zeros and {steps} steps for {rows * columns} values")
    gaps = decode_values(Reader(reader.block()), steps, np.dtype("u1")).astype(np.int64)
    ends = np.flatnonzero(gaps != (1 << bits) - 1)
    # Walking past the zeros, each non-zero itself takes one position more.
    positions = np.cumsum(gaps)[ends] + np.arange(len(ends))
    flat = np.zeros(rows * columns, dtype=dtype)
    flat[positions] = decode_values(reader, count, dtype)
    return flat.reshape(rows, columns)


def encode_values(values: np.ndarray, is_float: bool, huffman: bool) -> bytes:
    """Bit patterns [N] as they are, or as a palette and indices, whichever is shorter."""
    raw = bytes([RAW]) + values.tobytes()
    distinct, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    if len(values) < 2 or len(distinct) > min(LARGEST_PALETTE, len(values) - 1):
        return raw
    if values.itemsize == 1:  # bytes are small numbers: a palette of all from the first to the last
        index, table = values - distinct[0], bytes([distinct[0], distinct[-1]])
        counts = np.bincount(index)
    else:
        half = as_half(distinct) if is_float else None
        table = varint(2 * len(distinct) + (half is not None)) + (distinct.tobytes() if half is None else half)
    fixed = bytes([FIXED]) + table + pack_bits(index, (len(counts) - 1).bit_length())
    if not huffman or np.count_nonzero(counts) < 2:
        return min(raw, fixed, key=len)
    lengths = np.zeros(len(counts), dtype=np.int64)
    lengths[counts > 0] = limited_lengths(counts[counts > 0].tolist())
    coded = bytes([HUFFMAN]) + table + pack_bits(lengths, 4) + huffman_encode(index, lengths)
    return min(raw, fixed, coded, key=len)


def as_half(patterns: np.ndarray) -> bytes | None:
    """Float32 patterns as float16, if that gives them back to the last bit."""
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = patterns.view("<f4").astype("<f2")
        return narrow.tobytes() if (narrow.astype("<f4").view("<u4") == patterns).all() else None


def decode_values(reader: "Reader", count: int, dtype: np.dtype) -> np.ndarray:
    """The inverse of :func:`encode_values`, to the end of the data: bit patterns [count]."""
    kind = reader.byte()
    if kind == RAW:
        return np.frombuffer(reader.take(count * dtype.itemsize), dtype=dtype)
    if kind not in (FIXED, HUFFMAN):
        raise ValueError(f"unknown encoding {kind}")
    if dtype.itemsize == 1:
        table = np.arange(reader.byte(), reader.byte() + 1).astype(dtype)
    else:
        entries, half = divmod(reader.varint(), 2)
        stored = np.dtype("<f2") if half else dtype
        table = np.frombuffer(reader.take(entries * stored.itemsize), dtype=stored)
        table = table.astype("<f4").view(dtype) if half else table
    bits = (len(table) - 1).bit_length()
    lengths = [bits] * (1 << bits)
    if kind == HUFFMAN:
        lengths = huffman_decode(reader.take((len(table) + 1) // 2), [4] * 16, len(table)).tolist()
    return table[huffman_decode(reader.rest(), lengths, count) if bits else np.zeros(count, dtype=np.int64)]


def pack_bits(numbers: np.ndarray, bits: int) -> bytes:
    """Integers below 2^bits, ``bits`` bits each, one after another."""
    return huffman_encode(numbers, [bits] * (1 << bits)) if bits else b""


def encode_integers(values: np.ndarray, huffman: bool) -> bytes:
    """Float32 patterns as integers times scales, one for so many weights in a row; as they are if they are no such."""
    raw = bytes([RAW]) + values.tobytes()
    divisor = max(g for g in range(1, SCALE_GROUP + 1) if values.shape[1] % g == 0)  # rows of 300 have groups of 30
    for group in dict.fromkeys((values.size, values.shape[1], SCALE_GROUP, divisor)):
        grid = find_grid(values.view("<f4").reshape(-1, group)) if values.size % group == 0 else None
        if grid is not None:
            scales, levels = grid
            # 0, -1, 1, -2, 2 ... become 0, 1, 2, 3, 4 ...: small integers stay small, and zero is the background.
            folded = np.where(levels < 0, -2 * levels - 1, 2 * levels).astype("u1").reshape(values.shape)
            coded = block(encode_values(scales.view("<u4"), True, huffman)) + encode_array(folded, False, huffman)
            return bytes([INTEGERS]) + varint(group) + coded
    return raw


def decode_integers(reader: "Reader", rows: int, columns: int, dtype: np.dtype) -> np.ndarray:
    """The inverse of :func:`encode_integers`: float32 patterns [rows, columns]."""
    reader.byte()
    group = reader.varint()
    scales = decode_values(Reader(reader.block()), rows * columns // group, np.dtype("<u4")).view("<f4")
    folded = decode_array(reader, rows, columns, np.dtype("u1")).astype(np.int64)
    levels = np.where(folded & 1, -(folded + 1) // 2, folded // 2).astype("<f4")
    return (levels.reshape(len(scales), -1) * scales[:, None]).view(dtype).reshape(rows, columns)


def find_grid(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Scales float32 [rows] and levels [rows, columns] with ``float32(level) · scale == weight`` bit for bit.

    The scale is the largest absolute value over the largest level, give or take rounding: each row is tried with
    every width. ``None`` if some row lies on no such grid, or holds NaN, infinities or minus zero.
    """
    if not np.isfinite(weight).all() or (np.signbit(weight) & (weight == 0)).any():
        return None
    largest = np.abs(weight).max(axis=1)
    scales, levels = np.ones(len(weight), dtype="<f4"), np.zeros(weight.shape)
    waiting = np.flatnonzero(largest)
    if len(waiting) > 1 and find_grid(weight[waiting[:1]]) is None:  # most float weights are told by their first row
        return None
    for level in LARGEST_LEVELS:
        for ulps in range(-2, 3):
            scale = ((largest[waiting] / np.float32(level)).view("<i4") + np.int32(ulps)).view("<f4")
            with np.errstate(all="ignore"):
                tried = np.rint(weight[waiting] / scale[:, None])
                exact = (tried * scale[:, None] == weight[waiting]) & (tried >= -128) & (tried <= 127)
            found = exact.all(axis=1)
            scales[waiting[found]], levels[waiting[found]] = scale[found], tried[found]
            waiting = waiting[~found]
    return None if len(waiting) else (scales, levels)


def varint(number: int) -> bytes:
    """A non-negative integer in 7-bit groups, least significant first (LEB128)."""
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def block(data: bytes) -> bytes:
    return varint(len(data)) + data


@dataclass
class Reader:
    """Bytes read front to back; ValueError where they end too early."""

    data: bytes
    position: int = 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.position:
            raise ValueError(f"{count} more bytes wanted, {len(self.data) - self.position} left")
        self.position += count
        return self.data[self.position - count : self.position]

    def rest(self) -> bytes:
        return self.take(len(self.data) - self.position)

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        byte = self.byte()
        return byte if byte < 128 else byte - 128 + 128 * self.varint()

    def block(self) -> bytes:
        return self.take(self.varint())


# --- Huffman's code


def huffman_code(counts: Mapping[Hashable, int] | Sequence[int]) -> dict[Hashable, str]:
    """The Huffman code of symbols that occur ``counts[symbol]`` times: ``{symbol: bit string}``.

    Prefix-free, of the least possible total length, within one bit of the entropy a symbol. One symbol alone gets the
    word ``"0"``; symbols that never occur get none. ``counts`` is a mapping, or a sequence whose positions are symbols;
    TypeError for anything else, or a count that is no integer; ValueError for a negative one.

    >>> huffman_code({"a": 5, "b": 2, "c": 1})
    {'a': '0', 'b': '10', 'c': '11'}
    """
    if isinstance(counts, (str, bytes)) or not hasattr(counts, "__len__"):
        raise TypeError(f"counts must be a mapping symbol -> count or a sequence, got {type(counts).__name__}")
    items = dict(counts if isinstance(counts, Mapping) else enumerate(counts))
    items = {symbol: whole_number(count, f"the count of {symbol!r}", 0) for symbol, count in items.items()}
    occurring = {symbol: count for symbol, count in items.items() if count}
    lengths = code_lengths(list(occurring.values()))
    words = zip(canonical_codes(lengths), lengths, strict=True)
    return {symbol: f"{word:0{n}b}" for symbol, (word, n) in zip(occurring, words, strict=True)}


def code_lengths(counts: Sequence[int]) -> list[int]:
    """Length of each symbol's Huffman word; all counts are above 0. One symbol alone gets length 1."""
    if len(counts) < 2:
        return [1] * len(counts)
    heap = [(count, leaf) for leaf, count in enumerate(counts)]
    heapq.heapify(heap)
    parent = [0] * (2 * len(counts) - 1)
    for node in range(len(counts), len(parent)):
        (first, a), (second, b) = heapq.heappop(heap), heapq.heappop(heap)
        parent[a] = parent[b] = node
        heapq.heappush(heap, (first + second, node))
    depth = [0] * len(parent)
    for node in range(len(parent) - 2, -1, -1):
        depth[node] = depth[parent[node]] + 1
    return depth[: len(counts)]


def limited_lengths(counts: Sequence[int]) -> list[int]:
    """Huffman lengths of at most :data:`LONGEST` bits; flattening the counts costs next to nothing and always ends."""
    while max(lengths := code_lengths(counts), default=0) > LONGEST:
        counts = [(count + 1) // 2 for count in counts]
    return lengths


def canonical_codes(lengths: Sequence[int]) -> list[int]:
    """Code words (as integers) that follow from their lengths alone; length 0 means that the symbol has no word.

    ValueError: no prefix-free code has these lengths (Kraft's sum is above 1).
    """
    words, word, last = [0] * len(lengths), 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in enumerate(lengths) if length):
        word <<= length - last
        if word >> length:
            raise ValueError(f"no prefix-free code has the lengths {list(lengths)}")
        words[symbol], word, last = word, word + 1, length
    return words


def entropy_bits(counts: Sequence[int]) -> float:
    """Shannon's entropy in bits a symbol: what no code can go below.

    >>> entropy_bits([1, 1, 2])
    1.5
    """
    total = sum(counts)
    return -sum(n / total * math.log2(n / total) for n in counts if n) if total else 0.0


def huffman_encode(symbols: np.ndarray, lengths: Sequence[int]) -> bytes:
    """The words of ``symbols`` (integers [N]) one after another, filled up with zeros to whole bytes."""
    sizes = np.asarray(lengths, dtype=np.int64)[symbols]
    words = np.asarray(canonical_codes(lengths), dtype=np.int64)[symbols]
    ends = np.cumsum(sizes)
    bits = np.zeros(int(sizes.sum()), dtype=np.uint8)
    for back in range(int(sizes.max(initial=0))):
        long_enough = sizes > back
        bits[ends[long_enough] - 1 - back] = (words[long_enough] >> back) & 1
    return np.packbits(bits).tobytes()


def huffman_decode(data: bytes, lengths: Sequence[int], count: int) -> np.ndarray:
    """The first ``count`` symbols in ``data``, as integers [count]; ValueError if it ends early or breaks."""
    longest = max(lengths, default=0)
    if count and not 1 <= longest <= LONGEST:
        raise ValueError(f"code words must have 1 to {LONGEST} bits, got {longest}")
    # What a symbol's word is followed by does not matter: all entries of the table that begin with it are the symbol's.
    table = np.zeros((2, 1 << longest), dtype=np.int64)
    for symbol, (word, length) in enumerate(zip(canonical_codes(lengths), lengths, strict=True)):
        if length:
            table[:, word << (longest - length) : (word + 1) << (longest - length)] = [[symbol], [length]]
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
    padded = np.concatenate([bits, np.zeros(longest, dtype=np.uint8)]).astype(np.int64)
    # What the next `longest` bits are, for every position at once; then only the hops from word to word are sequential.
    window = np.zeros(len(bits), np.int64)
    for k in range(longest):
        window = window << 1 | padded[k : k + len(bits)]
    hops, starts, position = table[1, window].tolist(), [], 0
    for _ in range(count):
        if position >= len(hops) or not 0 < hops[position] <= len(hops) - position:
            raise ValueError(f"the bit stream ends or breaks after {len(starts)} of {count} symbols")
        starts.append(position)
        position += hops[position]
    return table[0, window[starts]] if starts else np.zeros(0, dtype=np.int64)
