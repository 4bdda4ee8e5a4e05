"""What a sparse weight costs in a file: the same numbers as dense values, as a bitmap, or as compressed sparse rows.

Every layout is really written, and read back bit for bit (a negative zero as zero).
"""

import math
import struct

import numpy as np
import torch
from torch import Tensor

__all__ = ["LAYOUTS", "pack_weight", "unpack_weight"]

LAYOUTS = ("dense", "bitmap", "csr")


def pack_weight(weight: Tensor, layout: str = "bitmap") -> bytes:
    """Write a float32 weight ``[rows, ...]`` in one of :data:`LAYOUTS`; of n entries in r rows, k are not zero.

    Beside a header of 2 + 4·dimensions bytes, dense takes 4n; bitmap (a bit each, then the non-zero values) n/8 + 4k;
    csr (row starts, columns, values) 4(r + 1) + 2k + 4k, with 4 bytes a column where there are more than 65,536.

    >>> weight = torch.tensor([[0.0, 1.5, 0.0, 0.0], [0.0, 0.0, 0.0, 2.5]])
    >>> {layout: len(pack_weight(weight, layout)) for layout in LAYOUTS}
    {'dense': 42, 'bitmap': 19, 'csr': 34}
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    if getattr(weight, "dtype", None) is not torch.float32:
        raise TypeError(f"weight must be a float32 tensor, got {getattr(weight, 'dtype', type(weight).__name__)}")
    if weight.dim() == 0 or weight.numel() == 0:
        raise ValueError(f"weight must have at least one row and one entry, got shape {tuple(weight.shape)}")
    values = weight.detach().cpu().numpy().astype("<f4").reshape(len(weight), -1)
    header = struct.pack(f"<BB{weight.dim()}I", LAYOUTS.index(layout), weight.dim(), *weight.shape)
    kept = values != 0
    if layout == "dense":
        return header + values.tobytes()
    if layout == "bitmap":
        return header + np.packbits(kept).tobytes() + values[kept].tobytes()
    starts = np.append(0, kept.sum(axis=1).cumsum()).astype("<u4")
    columns = kept.nonzero()[1].astype(_column_type(values.shape[1]))
    return header + starts.tobytes() + columns.tobytes() + values[kept].tobytes()


def unpack_weight(data: bytes) -> Tensor:
    """The weight that :func:`pack_weight` wrote; ValueError for bytes cut off, too many, or no packed weight."""
    try:
        layout, shape = LAYOUTS[data[0]], struct.unpack_from(f"<{data[1]}I", data, 2)
        total, columns, rest = math.prod(shape), math.prod(shape[1:]), memoryview(data)[2 + 4 * data[1] :]

        def take(dtype: str, count: int) -> np.ndarray:
            nonlocal rest
            values = np.frombuffer(rest, dtype, count) if count else np.empty(0, dtype)
            rest = rest[values.nbytes :]
            return values

        where = np.arange(total)
        if layout == "bitmap":
            where = np.unpackbits(take("u1", math.ceil(total / 8)), count=total).nonzero()[0]
        elif layout == "csr":
            starts = take("<u4", shape[0] + 1).astype(np.int64)
            column = take(_column_type(columns), int(starts[-1])).astype(np.int64)
            if starts[0] != 0 or (column >= columns).any():
                raise ValueError(f"its row starts or columns do not fit shape {shape}")
            where = np.repeat(np.arange(shape[0]), np.diff(starts)) * columns + column
        values = np.zeros(total, dtype=np.float32)
        values[where] = take("<f4", len(where))
        if len(rest) or not shape or not total:
            raise ValueError(f"{len(rest)} bytes too many for shape {shape}")
    except (IndexError, ValueError, struct.error) as error:
        raise ValueError(f"these {len(data)} bytes are no packed weight: {error}") from error
    return torch.from_numpy(values.reshape(shape))


def _column_type(columns: int) -> str:
    return "<u2" if columns <= 2**16 else "<u4"
