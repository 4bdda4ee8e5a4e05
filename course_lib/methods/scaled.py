"""The shortest of all encodings, and the integers behind quantized float32 weights: w = level · scale, exactly."""

import numpy as np

from course_lib.methods.arrays import (
    PALETTE,
    RAW,
    SPARSE,
    Reader,
    decode_plain,
    decode_values,
    encode_plain,
    encode_values,
    varint,
)

__all__ = ["decode_array", "encode_array", "encoding_name", "find_grid"]

SCALED = 3
NAMES = {RAW: "raw", PALETTE: "codebook", SPARSE: "sparse", SCALED: "integers"}
PER_TENSOR, PER_ROW = range(2)
# The largest level that a symmetric quantizer of 2 to 8 bits reaches, with and without the odd level at the lower end.
LARGEST_LEVELS = sorted({2**b - 1 for b in range(1, 8)} | {2**b for b in range(1, 8)})


def find_grid(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Scales float32 [rows] and levels int64 [rows, columns] with ``float32(level) · scale == weight`` bit for bit.

    The scale is the largest absolute value over the largest level, give or take rounding: each row is tried with
    every width. ``None`` if some row lies on no such grid, or holds NaN, infinities or minus zero.

    >>> scales, levels = find_grid(np.float32([[0.3, -0.1, 0.2]]) )
    >>> levels.tolist()
    [[3, -1, 2]]
    """
    if not np.isfinite(weight).all() or (np.signbit(weight) & (weight == 0)).any():
        return None
    largest = np.abs(weight).max(axis=1)
    scales = np.ones(len(weight), dtype=np.float32)
    levels = np.zeros(weight.shape, dtype=np.int64)
    waiting = np.flatnonzero(largest)
    if len(waiting) and not fits_any(weight[waiting[:1]], largest[waiting[:1]]):
        return None
    for level in LARGEST_LEVELS:
        for k in range(5):
            scale = near(largest[waiting], level)[k]
            found, on_grid = fit(weight[waiting], scale)
            rows = waiting[found]
            scales[rows], levels[rows] = scale[found], on_grid[found]
            waiting = waiting[~found]
    return None if len(waiting) else (scales, levels)


def near(largest: np.ndarray, level: int) -> list[np.ndarray]:
    """The float32 numbers around largest / level."""
    middle = (largest / np.float32(level)).astype(np.float32)
    around = [middle]
    for target in (np.float32(np.inf), np.float32(0)):
        step = middle
        for _ in range(2):
            step = np.nextafter(step, target)
            around.append(step)
    return around


def fit(rows: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which rows are whole multiples of their scale, to the last bit, and the multiples."""
    with np.errstate(all="ignore"):
        levels = np.rint(rows / scale[:, None])
        exact = (levels * scale[:, None] == rows) & (np.abs(levels) <= 128)
    return exact.all(axis=1), np.nan_to_num(levels)


def fits_any(row: np.ndarray, largest: np.ndarray) -> bool:
    """Whether one row lies on any of the grids: most float weights are told apart by their first row."""
    return any(fit(row, scale)[0].all() for level in LARGEST_LEVELS for scale in near(largest, level))


def encode_scaled(values: np.ndarray, huffman: bool = True) -> bytes | None:
    """Float32 patterns [rows, columns] as integers and one scale in all, or one a row; ``None`` if they are not."""
    weight = values.view("<f4")
    for layout, rows in ((PER_TENSOR, weight.reshape(1, -1)), (PER_ROW, weight)):
        grid = find_grid(rows)
        if grid is not None:
            scales, levels = grid
            # 0, -1, 1, -2, 2 ... become 0, 1, 2, 3, 4 ...: small integers stay small, and zero is the background.
            folded = np.where(levels < 0, -2 * levels - 1, 2 * levels)
            if folded.max(initial=0) > 255:
                return None
            coded_scales = encode_values(scales.astype("<f4").view("<u4"), True, huffman)
            coded = encode_plain(folded.astype("<u1").reshape(values.shape), False, huffman)
            return bytes([SCALED, layout]) + varint(len(coded_scales)) + coded_scales + coded
    return None


def decode_scaled(reader: Reader, rows: int, columns: int) -> np.ndarray:
    """The inverse of :func:`encode_scaled`: float32 patterns [rows, columns]."""
    layout = reader.byte()
    if layout not in (PER_TENSOR, PER_ROW):
        raise ValueError(f"unknown layout {layout}")
    dtype = np.dtype("<u4")
    scales = decode_values(reader.block(), rows if layout == PER_ROW else 1, dtype).view("<f4")
    folded = decode_plain(reader.data[reader.position :], rows, columns, np.dtype("<u1")).astype(np.int64)
    levels = np.where(folded & 1, -(folded + 1) // 2, folded // 2)
    return (levels.astype("<f4") * scales.reshape(-1, 1)).astype("<f4").view(dtype)


def encode_array(values: np.ndarray, is_float: bool, huffman: bool = True) -> bytes:
    """Bit patterns [rows, columns] (little-endian unsigned) in the shortest of all forms.

    ``is_float`` says that 4-byte patterns are float32, for which integers times a scale are looked for as well;
    without ``huffman`` every index has a fixed width.
    """
    plain = encode_plain(values, is_float, huffman)
    scaled = encode_scaled(values, huffman) if is_float and values.itemsize == 4 and values.size > 1 else None
    return plain if scaled is None else min(plain, scaled, key=len)


def decode_array(data: bytes, rows: int, columns: int, dtype: np.dtype) -> np.ndarray:
    """The inverse of :func:`encode_array`: bit patterns [rows, columns]."""
    if data[:1] == bytes([SCALED]):
        if dtype != np.dtype("<u4"):
            raise ValueError(f"integers times a scale make float32, not {dtype.itemsize}-byte values")
        return decode_scaled(Reader(data, 1), rows, columns)
    return decode_plain(data, rows, columns, dtype)


def encoding_name(data: bytes) -> str:
    """What :func:`encode_array` chose, in a word or two."""
    if data[0] != SCALED:
        return NAMES[data[0]]
    # A byte for the layout and a block of scales, then the integers in an encoding of their own.
    reader = Reader(data, 2)
    reader.block()
    return f"integers, {NAMES[reader.byte()]}"
