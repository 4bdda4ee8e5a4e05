"""What a study measured, as points of a trade-off: accuracy of each seed against bytes, MACs, memory and latency."""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from course_lib.evidence import pareto_plot
from course_lib.evidence.latency import compare_latency
from course_lib.lab.families import FAMILIES, Family
from course_lib.methods.engine import write_float_onnx, write_int8_onnx
from course_lib.methods.integer_network import integer_network
from course_lib.methods.layers import plain
from course_lib.methods.qat import FakeQuantConv2d, FakeQuantLinear

if TYPE_CHECKING:
    import pandas

__all__ = ["Point", "best_within", "engine_microseconds", "pareto_families", "points_of"]

COSTS = ("bytes", "macs", "memory")


@dataclass(frozen=True, eq=False)
class Point:
    """One method at one level.

    Attributes:
        method, level: as in the trial; ``None`` where a method has no level.
        seeds: the R seeds, ascending.
        accuracy, val_accuracy: float [R], in percent, in the order of ``seeds``.
        bytes, macs, memory: means over the seeds.
    """

    method: str
    level: object
    seeds: tuple[int, ...]
    accuracy: np.ndarray
    val_accuracy: np.ndarray
    bytes: float
    macs: float
    memory: float

    @property
    def family(self) -> Family:
        """The entry of :data:`~course_lib.lab.families.FAMILIES`."""
        return FAMILIES[self.method]

    @property
    def name(self) -> str:
        """For a reader: the family's title, and the level if there is one."""
        return self.family.title if self.level is None else f"{self.family.title}, {self.level}"

    def first(self, count: int) -> np.ndarray:
        """Accuracies of the first ``count`` seeds, to compare with a point that has fewer."""
        return self.accuracy[:count]


def points_of(frame: "pandas.DataFrame") -> dict[tuple[str, object], Point]:
    """The rows of :func:`~course_lib.lab.study.run_study` by (method, level), in the frame's order.

    Raises:
        RuntimeError: a cell of the study failed; the text names the first and its error.
    """
    failed = frame[frame.error.notna()]
    if len(failed):
        row = failed.iloc[0]
        where = f"{row.method}, level {row.level}, seed {row.seed}"
        raise RuntimeError(f"{len(failed)} of {len(frame)} cells failed, the first at {where}: {row.error}")
    points = {}
    for (method, level), rows in frame.groupby(["method", "level"], sort=False, dropna=False):
        rows, level = rows.sort_values("seed"), None if level != level else level
        percent = [100 * rows[name].to_numpy(dtype=float) for name in ("accuracy", "val_accuracy")]
        costs = {name: float(rows[name].mean()) for name in COSTS}
        points[method, level] = Point(method, level, tuple(rows.seed.tolist()), *percent, **costs)
    return points


def best_within(points: Mapping[object, Point], budget: Mapping[str, float]) -> Point | None:
    """The point of the highest mean accuracy *on validation* whose costs keep within ``budget``; ``None`` if none does.

    Args:
        points: by any key.
        budget: upper limits for some of ``"bytes"``, ``"macs"``, ``"memory"``.
    """
    unknown = set(budget) - set(COSTS)
    if unknown:
        raise ValueError(f"a budget limits some of {', '.join(COSTS)}, got {sorted(unknown)}")
    fitting = [p for p in points.values() if all(getattr(p, name) <= limit for name, limit in budget.items())]
    return max(fitting, key=lambda p: (p.val_accuracy.mean(), -p.bytes), default=None)


def pareto_families(
    points: Mapping[tuple[str, object], Point], keys: Iterable[tuple[str, object]], cost: Callable, *, seeds: int
) -> list[pareto_plot.Family]:
    """The points of ``keys`` by method, as :func:`~course_lib.evidence.pareto_plot.pareto_figure` draws them.

    Args:
        points: as from :func:`points_of`.
        keys: which of them.
        cost: ``cost(key)`` -> the horizontal axis's number.
        seeds: how many of each point's seeds to draw.
    """
    rows: dict[str, list] = {}
    for key in keys:
        rows.setdefault(key[0], []).append(key)
    return [
        pareto_plot.Family(
            FAMILIES[method].title,
            [cost(key) for key in own],
            [points[key].first(seeds) for key in own],
            section=FAMILIES[method].section,
        )
        for method, own in rows.items()
    ]


def engine_microseconds(
    networks: Mapping[object, nn.Module], images: Tensor, *, rounds: int = 15
) -> dict[object, float]:
    """Median microseconds to answer all of ``images``, ONNX Runtime, one thread, variants in turn.

    Quantized networks run on int8 kernels (of 8 bits, also where the weights have fewer), all others in float32 with
    their zeros and shared values like any number. Networks of equal layers and kind are one graph with other numbers:
    one of them is timed for all.

    Args:
        networks: key → flat ``nn.Sequential`` as :func:`~course_lib.lab.families.network_of` makes them.
        images: ``[N, C, H, W]``; also what the int8 graphs' activations are calibrated on.
    """
    kinds = {key: _kind(network) for key, network in networks.items()}
    shape = tuple(images.shape[1:])
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for key, kind in kinds.items():
            if kind in files:
                continue
            files[kind] = Path(folder) / f"{len(files)}.onnx"
            network = plain(networks[key]).eval()
            if kind[0]:
                write_int8_onnx(integer_network(network, images), files[kind], shape)
            else:
                write_float_onnx(network, files[kind], shape)
        table = compare_latency({str(kind): path for kind, path in files.items()}, images, rounds=rounds)
    return {key: 1e6 * table[str(kind)].median for key, kind in kinds.items()}


def _kind(network: nn.Module) -> tuple[bool, str]:
    quantized = any(isinstance(m, (FakeQuantLinear, FakeQuantConv2d)) for m in network.modules())
    return quantized, str(plain(network))
