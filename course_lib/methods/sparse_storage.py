"""What a sparse weight costs in a file: the same numbers as dense values, as a bitmap, or as compressed sparse rows.

Every layout is really written, and :func:`unpack_weight` gives the weight back bit for bit (a negative zero as zero).
"""

import math
import struct

import numpy as np
import torch
from torch import Tensor

__all__ = ["LAYOUTS", "pack_weight", "unpack_weight"]

LAYOUTS = ("dense", "bitmap", "csr")
"""``dense``: all values. ``bitmap``: a bit each, then the non-zero values. ``csr``: row starts, columns, values."""


def pack_weight(weight: Tensor, layout: str = "bitmap") -> bytes:
    """Write a float32 weight in one of :data:`LAYOUTS`.

    Sizes, beside a header of 2 + 4·dimensions bytes, for n weights in r rows of which k are not zero:
    dense 4n; bitmap n/8 + 4k; csr 4(r + 1) + 2k + 4k (columns take 2 bytes up to 65,536 columns, else 4).

    Args:
        weight: ``[rows, ...]`` float32; csr treats everything after the first dimension as columns.

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
    """Read what :func:`pack_weight` wrote: a float32 tensor of the same shape.

    Raises:
        ValueError: the bytes are cut off, too many, or no packed weight.
    """
    if len(data) < 6 or data[0] >= len(LAYOUTS) or len(data) < 2 + 4 * data[1]:
        raise ValueError(f"these {len(data)} bytes are no packed weight: the header does not fit")
    layout, shape, position = LAYOUTS[data[0]], struct.unpack_from(f"<{data[1]}I", data, 2), 2 + 4 * data[1]
    total = math.prod(shape) if shape else 0
    if total == 0:
        raise ValueError(f"a packed weight has at least one entry, this header says shape {shape}")
    columns = total // shape[0]

    def take(dtype: str, count: int) -> np.ndarray:
        nonlocal position
        start, position = position, position + np.dtype(dtype).itemsize * count
        if position > len(data):
            raise ValueError(f"a packed weight is cut off: {position} bytes needed, {len(data)} given")
        return np.frombuffer(data, dtype, count, start)

    if layout == "dense":
        where = np.arange(total)
    elif layout == "bitmap":
        where = np.unpackbits(take("u1", math.ceil(total / 8)), count=total).nonzero()[0]
    else:
        starts = take("<u4", shape[0] + 1).astype(np.int64)
        column = take(_column_type(columns), int(starts[-1])).astype(np.int64)
        if starts[0] != 0 or (np.diff(starts) < 0).any() or (column >= columns).any():
            raise ValueError(f"the packed row starts or columns do not fit shape {shape}")
        where = np.repeat(np.arange(shape[0]), np.diff(starts)) * columns + column
    kept = take("<f4", len(where))
    if position != len(data):
        raise ValueError(f"a packed weight has {len(data) - position} bytes too many")
    values = np.zeros(total, dtype=np.float32)
    values[where] = kept
    return torch.from_numpy(values.reshape(shape))


def _column_type(columns: int) -> str:
    return "<u2" if columns <= 2**16 else "<u4"
