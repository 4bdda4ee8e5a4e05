"""What a lesson shows besides pictures: a table of scores with intervals, and the source of a function."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from course_lib.evidence.statistics import difference, mean

if TYPE_CHECKING:
    import pandas

__all__ = ["compare", "show_source"]


def compare(
    scores: Mapping[str, np.ndarray], against: str | None = None, *, value: str = "test accuracy (%)",
    unit: str = "points", decimals: int = 1, covers: str = "",
) -> "pandas.DataFrame":  # fmt: skip
    """A DataFrame of texts, one row a name: each mean with its 95 % interval, and the paired difference to one.

    Args:
        scores: name -> array [R], one number a replica, in the same order for all.
        against: the row that the others are compared with, replica for replica; ``None`` for no comparison.
        value: heading of the means; ``unit`` that of the differences.
        decimals: digits after the point.
        covers: what ± covers, for the corner of the table; by default what the current lesson's replicas differ in.

    >>> compare({"a": [97.0, 98.0], "b": [96.0, 96.5]}, against="b").loc["a"].tolist()
    ['97.5 ± 6.4', '+1.2 ± 3.2']
    """
    import pandas as pd

    if against is not None and against not in scores:
        raise ValueError(f"no scores are called {against!r}; there are: {', '.join(scores)}")
    rows = {}
    for name, values in scores.items():
        rows[name] = {value: f"{mean(values, ''):.{decimals}f}"}
        if against is not None:
            gain = "" if name == against else f"{difference(values, scores[against], ''):+.{decimals}f}"
            rows[name][f"against {against} ({unit})"] = gain
    table = pd.DataFrame.from_dict(rows, orient="index")
    counts = sorted({len(values) for values in scores.values()})
    replicas = f"{'/'.join(map(str, counts))} replicas, 95 %"
    covers = covers or (COVERS[-1] if COVERS else "")
    table.columns.name = replicas + (f", ± covers {covers}" if covers else "")
    return table


COVERS: list[str] = []
"""What the replicas of the current lesson differ in; set by the lesson, read by :func:`compare`."""


@dataclass(frozen=True)
class Source:
    """Python source that shows itself as a highlighted block in a notebook."""

    text: str

    def __str__(self) -> str:
        return self.text

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        return {"text/markdown": f"```python\n{self.text}\n```", "text/plain": self.text}


def show_source(function: Callable) -> Source:
    """The source of a library function without its docstring, to be read in a lesson.

    >>> print(show_source(mean))
    def mean(values: Sequence[float], unit: str = "%") -> Interval:
        return replace(mean_interval(values), unit=unit)
    """
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    lines = source.splitlines()
    drop: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            first = node.body[0]
            drop.update(range(first.lineno, first.end_lineno + 1))
            if len(node.body) > 1 and not lines[first.end_lineno].strip():
                drop.add(first.end_lineno + 1)
    return Source("\n".join(line for number, line in enumerate(lines, 1) if number not in drop))
