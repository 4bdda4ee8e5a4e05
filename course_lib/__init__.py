"""Neural-network compression and distillation, measured: the library behind the chapters in ``notebooks/``.

Four rooms: :mod:`course_lib.methods` (what the course teaches), :mod:`course_lib.evidence` (how we know),
:mod:`course_lib.lab` (data, models, training) and :mod:`course_lib.classroom` (running and presenting chapters).
"""

import os
from importlib import import_module

__version__ = "0.1.0"

# Threads shall wait for each other only briefly before they sleep: where anything else runs, OpenMP's long busy waiting
# makes a training several times slower. Read when torch is loaded, so it holds for `python -m course_lib` and for the
# kernels that it starts, on Linux.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

_ROOMS = ("methods", "evidence", "lab", "classroom")


def __getattr__(name: str):
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its rooms are {', '.join(_ROOMS)}")


def __dir__():
    return sorted([*globals(), *_ROOMS])
