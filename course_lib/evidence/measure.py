"""What "small" and "fast" mean, measured: parameters, zeros, bytes of a real file, multiply-accumulates, latency."""

import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from course_lib.evidence.statistics import Interval, mean_interval
from course_lib.gate import UnsupportedModel, computed, eval_mode, one_memory, whole_number

__all__ = ["Latency", "LatencyTable", "compare_latency", "count_macs", "count_parameters", "export_onnx"]
__all__ += ["onnx_session", "sparsity", "stored_bytes"]


def count_parameters(model: nn.Module, *, nonzero: bool = False) -> int:
    """Number of parameters, shared ones once; with ``nonzero`` only those that are not exactly 0. Buffers do not count.

    >>> count_parameters(nn.Linear(100, 10))
    1010
    """
    _refuse_unreadable(model, nonzero)
    return sum(int(p.count_nonzero()) if nonzero else p.numel() for p in model.parameters())


def _refuse_unreadable(model: nn.Module, values: bool = False) -> None:
    """Refuse weights that are no parameters, or parameters that are not what is computed with, if values count."""
    for name, module in model.named_modules():
        if (fault := computed(module)) and (values or hasattr(module, "_packed_params")):
            raise UnsupportedModel(f"{name or 'the model'} ({type(module).__name__}) cannot be measured: {fault}")
    if pair := one_memory(model):
        cure = "make them one parameter (b.weight = a.weight)"
        raise UnsupportedModel(f"{' and '.join(pair)} are two parameters in one memory; {cure}")


def sparsity(model: nn.Module) -> float:
    """Share of zeros, in [0, 1], among the weights that pruning is about: parameters of two or more dimensions.

    >>> layer = nn.Linear(4, 2)
    >>> _ = layer.weight.data[:, :3].zero_()
    >>> sparsity(layer)
    0.75
    """
    _refuse_unreadable(model, values=True)
    weights = [p for p in model.parameters() if p.dim() >= 2 and p.numel()]
    if not weights:
        raise ValueError(f"{type(model).__name__} has no weight of two or more dimensions: its sparsity is not defined")
    return 1 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


def count_macs(model: nn.Module, input_shape: tuple[int, ...] | Tensor) -> int:
    """Multiply-accumulate operations of one forward pass of one example.

    Counted by torch's ``FlopCounterMode`` (two operations a multiply-accumulate): matrix products, convolutions and
    attention, recurrent and bilinear layers; not element-wise work. A zero in a weight is multiplied like any number.

    ``input_shape`` is that of one example, without the batch dimension, such as ``(1, 28, 28)``; or a batch of
    examples, of which the first is taken (for a model of tokens). ValueError: the model does not take such an input.
    UnsupportedModel: an operator applies a weight in a way that is not known here; the text names both.

    >>> count_macs(nn.Linear(100, 10), (100,))
    1000
    """
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    parameter = next(model.parameters(), torch.empty(0))
    if isinstance(input_shape, Tensor):
        example = input_shape[:1].to(parameter.device)
    else:
        shape = [whole_number(n, "each size of input_shape") for n in input_shape]
        if not shape:
            raise ValueError("input_shape must be positive integers without the batch dimension, got ()")
        example = torch.zeros(1, *shape, device=parameter.device, dtype=parameter.dtype)
    # One multiply-accumulate a weight, as for a linear layer on the products of the two inputs.
    aten = torch.ops.aten
    extra = {
        aten._trilinear: lambda one, weight, two, *rest, **more: 2 * one[0] * np.prod(weight),
        aten.mv: lambda matrix, vector, **more: 2 * np.prod(matrix),
        aten.addmv: lambda start, matrix, vector, **more: 2 * np.prod(matrix),
        aten.dot: lambda one, two, **more: 2 * np.prod(one),
    }
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    counter = FlopCounterMode(display=False, custom_mapping=extra)
    try:
        # Fused kernels (a Transformer layer's, oneDNN's LSTM) would be read as nothing.
        torch.backends.mha.set_fastpath_enabled(False)
        torch.backends.mkldnn.enabled = False
        with eval_mode(model), torch.no_grad(), counter, _Watch(model, {*flop_registry, *extra}):
            model(example)
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(f"the model does not take an input of shape {tuple(example.shape)}: {error}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(before[0])
        torch.backends.mkldnn.enabled = before[1]
    return int(counter.get_total_flops()) // 2


_ELEMENT_WISE = ("norm", "prelu", "aten::cat", "aten::stack")  # without torch's own tag for it


class _Watch(TorchDispatchMode):
    """Refuses an operator that brings a weight and an activation together and that nobody counts."""

    def __init__(self, model: nn.Module, known: set):
        super().__init__()
        self.known = known
        self.weights = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters() if p.numel()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        harmless = torch.Tag.pointwise in func.tags or func.is_view or any(part in name for part in _ELEMENT_WISE)
        if func._overloadpacket not in self.known and not harmless:
            leaves = torch.utils._pytree.tree_leaves((args, kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            found = [self.weights.get(tensor.untyped_storage().data_ptr()) for tensor in tensors]
            packed = [leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject)]
            if packed or (any(found) and not all(found)):
                weight = next(filter(None, found), "packed weights")
                raise UnsupportedModel(f"cannot count the work of {name}, which applies {weight}: nobody knows how")
        return func(*args, **(kwargs or {}))


def stored_bytes(model: nn.Module) -> int:
    """Length in bytes of the model's plain safetensors file, written, read back and found equal bit for bit.

    Zeros take as much room as other numbers, and so do float32 numbers that lie on a coarse grid.

    >>> stored_bytes(nn.Linear(100, 10)) - 4 * 1010 < 300
    True
    """
    from safetensors.torch import load_file, save_model

    _refuse_unreadable(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_model(model, str(path))
        size, again = path.stat().st_size, load_file(path)
    for name, tensor in model.state_dict().items():
        # A tensor shared by two names is stored once. Bits are compared, for NaN is not equal to itself.
        one, two = (t.cpu().contiguous().reshape(-1) for t in (again.get(name, tensor), tensor))
        if one.dtype != two.dtype or not torch.equal(one.view(torch.uint8), two.view(torch.uint8)):
            raise RuntimeError(f"{name} was not read back as it was written")
    return size


@dataclass(frozen=True)
class Latency:
    """Seconds a call of one variant, ``samples``, one a round; as text their median and quartiles."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds a call."""
        return statistics.median(self.samples)

    def __str__(self) -> str:
        low, high = np.quantile(self.samples, [0.25, 0.75])
        return f"{1e6 * self.median:,.0f} µs ({1e6 * low:,.0f}–{1e6 * high:,.0f})"


class LatencyTable(dict[str, Latency]):
    """Name → :class:`Latency`, measured in turn, so that round ``i`` of one and of another belong together."""

    def ratio(self, slow: str, fast: str) -> Interval:
        """How many times as long ``slow`` takes as ``fast``: geometric mean of the rounds' ratios, with interval."""
        if missing := {slow, fast} - self.keys():
            raise KeyError(f"no variant {missing.pop()!r}; measured were {', '.join(self)}")
        logs = mean_interval(np.log(self[slow].samples) - np.log(self[fast].samples))
        mean, low, high = (float(np.exp(value)) for value in (logs.mean, logs.low, logs.high))
        return replace(logs, mean=mean, low=low, high=high, unit="×")


def compare_latency(
    variants: Mapping[str, nn.Module | str | Path | Callable], example: Tensor, *,
    rounds: int = 15, warmup: int = 3, threads: int = 1, sample_seconds: float = 0.005,
) -> LatencyTable:  # fmt: skip
    """Time variants against each other, in turn, so that a machine's moods hit all of them alike.

    Args:
        variants: name → a module (exported to ONNX and run by ONNX Runtime on the CPU), the path of an ``.onnx`` file
            (run likewise), or any other callable (called as ``f(example)``).
        example: the input [N, ...] float32.
        rounds: how often all variants are timed, one after another, after ``warmup`` rounds that do not count.
        threads: of ONNX Runtime, and of torch while this runs.
        sample_seconds: a variant is called as often in a row as fills about this long; a sample is the mean of those.
    """
    if not variants:
        raise ValueError("variants is empty: give {name: model}")
    rounds, warmup = whole_number(rounds, "rounds", 2), whole_number(warmup, "warmup", 0)
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(whole_number(threads, "threads"))
    try:
        calls = {name: _callable(name, variant, example, threads) for name, variant in variants.items()}
        repeats = {name: _repeats(call, sample_seconds) for name, call in calls.items()}
        names, samples = list(calls), {name: [] for name in calls}
        for turn in range(warmup + rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                seconds = _time(calls[name], repeats[name])
                if turn >= warmup:
                    samples[name].append(seconds)
    finally:
        torch.set_num_threads(torch_threads)
    return LatencyTable((name, Latency(tuple(values))) for name, values in samples.items())


def export_onnx(model: nn.Module, example: Tensor, path: str | Path) -> Path:
    """Write ``model`` in eval mode as an ONNX file for inputs like ``example`` [N, ...], whose batch size is free."""
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), eval_mode(model):
            # The exporter warns of its own plans for later versions, which is nothing a reader can act on.
            warnings.simplefilter("ignore")
            # A batch of one would be baked in as a constant.
            probe = example[:1].expand(2, *example.shape[1:]).contiguous()
            free = ({0: torch.export.Dim("batch")},)
            program = torch.onnx.export(model, (probe,), dynamo=True, verbose=False, dynamic_shapes=free)
        program.save(str(path), external_data=False)
    finally:
        noisy.setLevel(level)
    return Path(path)


def onnx_session(source: str | Path | bytes, *, threads: int = 1):
    """An ONNX Runtime session on the CPU with that many threads and no spinning ones."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    data = source if isinstance(source, bytes) else str(source)
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _callable(name: str, variant, example: Tensor, threads: int) -> Callable[[], object]:
    fits = "give a module, a callable or the path of an .onnx file"
    if not isinstance(variant, (nn.Module, str, Path)):
        if not callable(variant):
            raise TypeError(f"{name}: cannot time a {type(variant).__name__}; {fits}")
        return lambda: variant(example)
    if isinstance(variant, nn.Module):
        with tempfile.TemporaryDirectory() as folder:
            variant = export_onnx(variant, example, Path(folder) / "model.onnx").read_bytes()
    elif not Path(variant).is_file():
        raise ValueError(f"{name}: there is no file {variant}; {fits}")
    session = onnx_session(variant, threads=threads)
    feed = {session.get_inputs()[0].name: example.detach().cpu().numpy()}
    return lambda: session.run(None, feed)


def _repeats(call: Callable[[], object], sample_seconds: float) -> int:
    call()
    once = min(_time(call, 1) for _ in range(3))
    return max(1, min(10_000, round(sample_seconds / max(once, 1e-7))))


def _time(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
