"""How many threads the arithmetic uses: said once, where a chapter starts, and less where chapters share the cores."""

import os

import torch

__all__ = ["use_threads"]


def use_threads(wanted: int = 2) -> int:
    """Set torch's threads to ``wanted``, but to no more than this process has cores, nor than ``$OMP_NUM_THREADS``.

    Two processes with two threads each on two cores are slower than one with two: whatever starts several chapters at
    once sets ``OMP_NUM_THREADS`` for them, and a number written into a chapter must not override it.

    Returns:
        The number of threads now in use.

    Raises:
        ValueError: ``wanted`` is no whole number of at least 1.
    """
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise ValueError(f"wanted must be a whole number of at least 1, got {wanted!r}")
    threads = min(wanted, _cores(), _limit() or wanted)
    torch.set_num_threads(threads)
    return threads


def _limit() -> int | None:
    # OpenMP allows a list, one number a nesting level, and passes over what it cannot read.
    outermost = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(outermost) if outermost.isdecimal() and int(outermost) >= 1 else None


def _cores() -> int:
    # Only where it exists does this tell the cores that a container or taskset leaves to the process.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
