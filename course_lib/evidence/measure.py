"""What "small" means, counted: parameters, zeros, bytes of a real file, multiply-accumulates. Latency is next door."""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from course_lib.evidence.latency import Latency, LatencyTable, compare_latency, export_onnx

__all__ = [
    "Latency",
    "LatencyTable",
    "compare_latency",
    "count_macs",
    "count_parameters",
    "export_onnx",
    "sparsity",
    "stored_bytes",
]


def count_parameters(model: nn.Module, *, nonzero: bool = False) -> int:
    """Number of parameters, shared ones once; with ``nonzero`` only those that are not exactly 0. Buffers do not count.

    >>> count_parameters(nn.Linear(100, 10))
    1010
    """
    return sum(int(p.count_nonzero()) if nonzero else p.numel() for p in model.parameters())


def sparsity(model: nn.Module) -> float:
    """Share of zeros, in [0, 1], among the weights that pruning is about: parameters of two or more dimensions.

    Raises:
        ValueError: the model has no such weight.

    >>> layer = nn.Linear(4, 2)
    >>> _ = layer.weight.data[:, :3].zero_()
    >>> sparsity(layer)
    0.75
    """
    weights = [p for p in model.parameters() if p.dim() >= 2 and p.numel()]
    if not weights:
        raise ValueError(f"{type(model).__name__} has no weight of two or more dimensions: its sparsity is not defined")
    total = sum(w.numel() for w in weights)
    return 1 - sum(int(w.count_nonzero()) for w in weights) / total


def count_macs(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Multiply-accumulate operations of one forward pass of one example.

    Counted by running the model under ``torch.utils.flop_counter.FlopCounterMode`` (which counts two operations for a
    multiply-accumulate): matrix products, convolutions and attention; not element-wise work. Zeros in a weight are
    multiplied like any other number, so masking does not change the count.

    Args:
        model: a module that takes one float tensor ``[1, *input_shape]``; its mode and weights stay as they are.
        input_shape: of one example, without the batch dimension, such as ``(1, 28, 28)``.

    Raises:
        ValueError: ``input_shape`` is not made of positive integers, or the model does not take such an input.

    >>> count_macs(nn.Linear(100, 10), (100,))
    1000
    """
    from torch.utils.flop_counter import FlopCounterMode

    shape = tuple(input_shape)
    if not shape or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"input_shape must be positive integers without the batch dimension, got {input_shape!r}")
    parameter = next(model.parameters(), torch.empty(0))
    example = torch.zeros(1, *shape, device=parameter.device, dtype=parameter.dtype)
    with _eval_mode(model), torch.no_grad(), _without_fast_path(), FlopCounterMode(display=False) as counter:
        try:
            model(example)
        except RuntimeError as error:
            raise ValueError(f"the model does not take an input of shape {tuple(example.shape)}: {error}") from error
    return counter.get_total_flops() // 2


def stored_bytes(model: nn.Module) -> int:
    """Length in bytes of the model's safetensors file, written, read back and found equal bit for bit.

    This is the plain dense file, in the data type of each tensor: zeros take as much room as other numbers, and so do
    float32 numbers that lie on a coarse grid.

    Raises:
        RuntimeError: what was read back is not what was written.

    >>> stored_bytes(nn.Linear(100, 10)) - 4 * 1010 < 300
    True
    """
    from safetensors.torch import load_file, save_model

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_model(model, str(path))
        size, again = path.stat().st_size, load_file(path)
    for name, tensor in model.state_dict().items():
        # A tensor shared by two names is stored once.
        if name in again and not _same_bits(again[name], tensor.cpu()):
            raise RuntimeError(f"{name} was not read back as it was written")
    return size


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.numel() == 0 or torch.equal(a.reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _without_fast_path() -> Iterator[None]:
    # On the fast path a Transformer layer is one fused operator that the counter reads as zero.
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def human_bytes(size: float) -> str:
    """Bytes for a reader, in kB of 1,000.

    >>> human_bytes(1_070_000)
    '1,070.0 kB'
    """
    if not math.isfinite(size) or size < 0:
        raise ValueError(f"size must be a number of bytes, got {size!r}")
    return f"{size / 1000:,.1f} kB"
