"""Latency: variants in one engine, at one thread count, in turn, so that a machine's moods hit all of them alike."""

import logging
import statistics as st
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from course_lib.evidence.statistics import Interval, mean_interval

__all__ = ["Latency", "LatencyTable", "compare_latency", "export_onnx"]


@dataclass(frozen=True)
class Latency:
    """Seconds a call of one variant: ``samples``, one a round, with their median and quartiles."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds a call."""
        return st.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile, seconds a call."""
        low, high = np.quantile(self.samples, [0.25, 0.75])
        return float(low), float(high)

    def __str__(self) -> str:
        low, high = self.quartiles
        return f"{1e6 * self.median:,.0f} µs ({1e6 * low:,.0f}–{1e6 * high:,.0f})"


class LatencyTable(dict[str, Latency]):
    """Name → :class:`Latency`, measured in turn, so that round ``i`` of one and of another belong together."""

    def ratio(self, slow: str, fast: str, *, level: float = 0.95) -> Interval:
        """How many times as long ``slow`` takes as ``fast``: geometric mean of the rounds' ratios, with interval."""
        for name in (slow, fast):
            if name not in self:
                raise KeyError(f"no variant {name!r}; measured were {', '.join(self)}")
        logs = np.log(self[slow].samples) - np.log(self[fast].samples)
        found = mean_interval(logs, level=level)
        return Interval(*(float(np.exp(v)) for v in (found.mean, found.low, found.high)), level, found.n)


def compare_latency(
    variants: Mapping[str, nn.Module | str | Path | Callable],
    example: Tensor,
    *,
    rounds: int = 15,
    warmup: int = 3,
    threads: int = 1,
    sample_seconds: float = 0.005,
) -> LatencyTable:
    """Time variants against each other.

    Args:
        variants: name → a module (exported to ONNX and run by ONNX Runtime on the CPU), the path of an ``.onnx`` file
            (run likewise), or any other callable (called as ``f(example)``).
        example: the input ``[N, ...]`` float32.
        rounds: how often all variants are timed, one after another, each round in another order.
        warmup: rounds that do not count.
        threads: of ONNX Runtime, and of torch while this runs.
        sample_seconds: a variant is called as often in a row as fills about this long; a sample is the mean of those.

    Returns:
        A :class:`LatencyTable` in the order of ``variants``.

    Raises:
        ValueError: no variants, fewer than two rounds, no threads; a file that is not there.
        TypeError: a variant that is none of the above.
    """
    if not variants:
        raise ValueError("variants is empty: give {name: model}")
    if rounds < 2 or threads < 1 or warmup < 0:
        raise ValueError(f"rounds must be >= 2, warmup >= 0 and threads >= 1, got {rounds}, {warmup} and {threads}")
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        calls = {name: _callable(name, variant, example, threads) for name, variant in variants.items()}
        repeats = {name: _repeats(call, sample_seconds) for name, call in calls.items()}
        samples: dict[str, list[float]] = {name: [] for name in calls}
        names = list(calls)
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
    """Write ``model`` in eval mode as an ONNX file whose batch size is free; returns ``path``.

    Args:
        example: an input ``[N, ...]``; only its shape after the first dimension and its data type matter.
    """
    path = Path(path)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # The exporter warns of its own plans for later versions, which is nothing a reader can act on.
            warnings.simplefilter("ignore")
            # A batch of one would be baked in as a constant.
            probe = example[:1].expand(2, *example.shape[1:]).contiguous()
            program = torch.onnx.export(
                model, (probe,), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("batch")},)
            )
        program.save(str(path), external_data=False)
    finally:
        noisy.setLevel(level)
        for module, mode in modes.items():
            module.training = mode
    return path


def onnx_session(source: str | Path | bytes, *, threads: int = 1):
    """An ONNX Runtime session on the CPU with that many threads and no spinning ones."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    data = source if isinstance(source, bytes) else str(source)
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _callable(name: str, variant, example: Tensor, threads: int) -> Callable[[], object]:
    if isinstance(variant, nn.Module):
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            source = export_onnx(variant, example, Path(folder) / "model.onnx").read_bytes()
        return _session_call(source, example, threads)
    if isinstance(variant, (str, Path)):
        if not Path(variant).is_file():
            raise ValueError(
                f"{name}: there is no file {variant}; give a module, a callable, or the path of an .onnx file"
            )
        return _session_call(variant, example, threads)
    if callable(variant):
        return lambda: variant(example)
    raise TypeError(
        f"{name}: cannot time a {type(variant).__name__}; give a module, a callable or the path of an .onnx file"
    )


def _session_call(source: str | Path | bytes, example: Tensor, threads: int) -> Callable[[], object]:
    session = onnx_session(source, threads=threads)
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
