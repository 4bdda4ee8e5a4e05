"""Arrays as few bytes: raw, palette with packed or Huffman-coded indices, or sparse by gaps.

Everything here works on bit patterns (unsigned integers), so NaN and the like come back as they were. Each encoder's
first byte says what follows; :func:`encode_plain` tries all that apply and keeps the shortest. The sparse form is Deep
Compression's relative index (Han et al. 2016): the number of zeros before each non-zero, with a filler for long gaps.
"""

from dataclasses import dataclass

import numpy as np

from course_lib.methods.huffman import huffman_decode, huffman_encode, limited_lengths

__all__ = ["Reader", "decode_plain", "encode_plain", "pack_bits", "unpack_bits", "varint"]

RAW, PALETTE, SPARSE = range(3)
# How a palette lists its values: each in full; its upper half only; as float16; or first value and number of
# consecutive ones.
FULL, UPPER_HALF, HALF_FLOAT, CONSECUTIVE = range(4)
PACKED, HUFFMAN = range(2)
LARGEST_PALETTE = 4096


def varint(number: int) -> bytes:
    """A non-negative integer in 7-bit groups, least significant first (LEB128).

    >>> varint(5), varint(300)
    (b'\\x05', b'\\xac\\x02')
    """
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


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

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        number, shift = 0, 0
        while True:
            byte = self.byte()
            number |= (byte & 127) << shift
            if byte < 128:
                return number
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    def block(self) -> bytes:
        return self.take(self.varint())


def pack_bits(numbers: np.ndarray, bits: int) -> bytes:
    """Integers below 2^bits, ``bits`` bits each, one after another.

    >>> pack_bits(np.array([1, 2, 3, 0]), 2)
    b'l'
    """
    return huffman_encode(np.asarray(numbers), [bits] * (1 << bits)) if bits else b""


def unpack_bits(data: bytes, bits: int, count: int) -> np.ndarray:
    """The inverse of :func:`pack_bits`: ``count`` integers."""
    if bits == 0:
        return np.zeros(count, dtype=np.int64)
    stream = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
    if len(stream) < bits * count:
        raise ValueError(f"{bits * count} bits wanted, {len(stream)} left")
    return stream[: bits * count].reshape(count, bits) @ (1 << np.arange(bits - 1, -1, -1))


def encode_values(values: np.ndarray, is_float: bool, huffman: bool = True) -> bytes:
    """Bit patterns [N] as raw bytes or with a palette, whichever is shorter; ``huffman`` as in :func:`palette`."""
    raw = bytes([RAW]) + values.tobytes()
    if len(values) < 2:
        return raw
    distinct, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    if len(distinct) > min(LARGEST_PALETTE, len(values)):
        return raw
    candidates = [raw, palette(*encode_table(distinct, is_float), index, counts, huffman)]
    span = int(distinct[-1]) - int(distinct[0]) + 1
    if span <= 2 * len(distinct) + 16:
        where = (distinct - distinct[0]).astype(np.int64)
        spread = np.zeros(span, dtype=np.int64)
        spread[where] = counts
        first = distinct[:1].tobytes() + varint(span)
        candidates.append(palette(CONSECUTIVE, first, where[index], spread, huffman))
    return min(candidates, key=len)


def encode_table(distinct: np.ndarray, is_float: bool) -> tuple[int, bytes]:
    """A palette's values in the narrowest form that gives them back to the last bit."""
    size, count = distinct.itemsize, varint(len(distinct))
    half = 4 * size
    if size > 1 and not (distinct & ((1 << half) - 1)).any():
        return UPPER_HALF, count + (distinct >> half).astype(f"<u{size // 2}").tobytes()
    if is_float and size == 4:
        with np.errstate(over="ignore", invalid="ignore"):
            narrow = distinct.view("<f4").astype("<f2")
            if (narrow.astype("<f4").view("<u4") == distinct).all():
                return HALF_FLOAT, count + narrow.tobytes()
    return FULL, count + distinct.tobytes()


def palette(form: int, table: bytes, index: np.ndarray, counts: np.ndarray, huffman: bool = True) -> bytes:
    """Table, then the indices at fixed width or (``huffman``) Huffman-coded if shorter; nothing for a single symbol."""
    bits = (len(counts) - 1).bit_length()
    packed = bytes([PALETTE, form]) + table + bytes([PACKED]) + pack_bits(index, bits)
    occurring = np.flatnonzero(counts)
    if len(occurring) < 2 or not huffman:
        return packed
    lengths = np.zeros(len(counts), dtype=np.int64)
    lengths[occurring] = limited_lengths(counts[occurring].tolist())
    coded = pack_bits(lengths, 4) + huffman_encode(index, lengths.tolist())
    return min(packed, bytes([PALETTE, form]) + table + bytes([HUFFMAN]) + coded, key=len)


def decode_values(data: bytes, count: int, dtype: np.dtype) -> np.ndarray:
    """The inverse of :func:`encode_values`: bit patterns [count]."""
    reader = Reader(data)
    kind = reader.byte()
    if kind == RAW:
        return np.frombuffer(reader.take(count * dtype.itemsize), dtype=dtype)
    if kind != PALETTE:
        raise ValueError(f"unknown encoding {kind}")
    table = decode_table(reader, dtype)
    coding, entries = reader.byte(), len(table)
    if coding == HUFFMAN:
        lengths = unpack_bits(reader.take((entries + 1) // 2), 4, entries).tolist()
        index = huffman_decode(reader.data[reader.position :], lengths, count)
    elif coding == PACKED:
        index = unpack_bits(reader.data[reader.position :], (entries - 1).bit_length(), count)
    else:
        raise ValueError(f"unknown coding {coding}")
    return table[index]


def decode_table(reader: Reader, dtype: np.dtype) -> np.ndarray:
    """The inverse of :func:`encode_table`, consecutive tables included."""
    form, size = reader.byte(), dtype.itemsize
    if form == CONSECUTIVE:
        first, entries = np.frombuffer(reader.take(size), dtype=dtype)[0], checked_entries(reader)
        return first + np.arange(entries).astype(dtype)
    entries = checked_entries(reader)
    if form == FULL:
        return np.frombuffer(reader.take(entries * size), dtype=dtype)
    if form == UPPER_HALF and size > 1:
        upper = np.frombuffer(reader.take(entries * size // 2), dtype=f"<u{size // 2}")
        return upper.astype(dtype) << np.array(4 * size, dtype=dtype)
    if form == HALF_FLOAT and size == 4:
        return np.frombuffer(reader.take(entries * 2), dtype="<f2").astype("<f4").view("<u4")
    raise ValueError(f"unknown table form {form} for {size}-byte values")


def checked_entries(reader: Reader) -> int:
    entries = reader.varint()
    if not 1 <= entries <= 4 * LARGEST_PALETTE:
        raise ValueError(f"a palette of {entries} values")
    return entries


def encode_sparse(values: np.ndarray, is_float: bool, huffman: bool = True) -> bytes | None:
    """Bit patterns [rows, columns] by the gaps between non-zeros, in the order and with the filler that do best."""
    candidates = []
    for transposed, flat in enumerate((values.reshape(-1), values.T.reshape(-1))):
        positions = np.flatnonzero(flat)
        if 2 * len(positions) > len(flat):
            return None
        if transposed and 1 in values.shape:
            continue
        gaps = np.diff(positions, prepend=-1) - 1
        kept = encode_values(flat[positions], is_float, huffman)
        for bits in range(2, 9):
            cap = (1 << bits) - 1
            # A symbol of value cap skips that many zeros and says nothing else; what is left of the gap follows.
            steps = np.full(int((gaps // cap + 1).sum()), cap, dtype=np.uint8)
            steps[np.cumsum(gaps // cap + 1) - 1] = gaps % cap
            coded = encode_values(steps, False, huffman)
            head = bytes([SPARSE, transposed << 4 | bits]) + varint(len(positions)) + varint(len(steps))
            candidates.append(head + varint(len(coded)) + coded + kept)
    return min(candidates, key=len)


def decode_sparse(reader: Reader, rows: int, columns: int, dtype: np.dtype) -> np.ndarray:
    """The inverse of :func:`encode_sparse`: bit patterns [rows, columns]."""
    head, count, steps = reader.byte(), reader.varint(), reader.varint()
    transposed, cap = head >> 4, (1 << (head & 15)) - 1
    total = rows * columns
    if count > total or steps > total + count:
        raise ValueError(f"{count} non-zeros and {steps} steps for {total} values")
    gaps = decode_values(reader.block(), steps, np.dtype("<u1")).astype(np.int64)
    ends = np.flatnonzero(gaps != cap)
    # Walking past the zeros, each non-zero itself takes one position more.
    positions = np.cumsum(gaps)[ends] + np.arange(len(ends))
    if len(ends) != count or (count and positions[-1] >= total):
        raise ValueError("the gaps do not fit the shape")
    flat = np.zeros(total, dtype=dtype)
    flat[positions] = decode_values(reader.data[reader.position :], count, dtype)
    return flat.reshape(columns, rows).T if transposed else flat.reshape(rows, columns)


def encode_plain(values: np.ndarray, is_float: bool, huffman: bool = True) -> bytes:
    """Bit patterns [rows, columns], little-endian unsigned, as values or sparse, whichever is shorter."""
    dense = encode_values(values.reshape(-1), is_float, huffman)
    candidates = [dense, encode_sparse(values, is_float, huffman) if values.size else None]
    return min((c for c in candidates if c is not None), key=len)


def decode_plain(data: bytes, rows: int, columns: int, dtype: np.dtype) -> np.ndarray:
    """The inverse of :func:`encode_plain`: bit patterns [rows, columns]."""
    if data[:1] == bytes([SPARSE]):
        return decode_sparse(Reader(data, 1), rows, columns, dtype)
    return decode_values(data, rows * columns, dtype).reshape(rows, columns)
