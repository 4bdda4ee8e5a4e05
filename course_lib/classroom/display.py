"""Display: tables and the progress of a run, rich in a terminal, plain lines anywhere else (pipes, CI)."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["LiveProgress", "PlainProgress", "failure_text", "progress_display", "show_table", "shown_path", "watched"]

_SOURCE_LINES = 12
_TRACE_LINES = 12


def watched() -> bool:
    """Whether standard output is a terminal that a person looks at and that can redraw a line."""
    return sys.stdout.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"


def shown_path(path: Path) -> str:
    """A path as the user would type it: relative where it lies under the current folder."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def show_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, styles: Sequence[str] = ()) -> None:
    """Print a table: in a terminal with rich, folding long texts; otherwise in aligned columns, nothing cut.

    Args:
        headers: one a column. rows: texts, as many a row as there are headers.
        styles: one rich style a row, for terminals; may be left out. The first column is never folded.
    """
    if not watched():
        print(plain_table(headers, rows))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*[_column(index, header) for index, header in enumerate(headers)], box=None, pad_edge=False)
    for index, row in enumerate(rows):
        table.add_row(*[Text(cell) for cell in row], style=styles[index] if index < len(styles) else None)
    Console(file=sys.stdout).print(table)


def plain_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table as text.

    >>> print(plain_table(["chapter", "title"], [["01", "Concepts"]]))
    chapter  title
    01       Concepts
    """
    lines = [list(headers), *[[" ".join(cell.split()) for cell in row] for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    return "\n".join("  ".join(f"{c:{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def failure_text(name: str, cells: int, failure: dict[str, Any], partial: Path | None) -> str:
    """What a reader needs about a chapter that failed: cell, source, error, the end of its traceback, where to look."""
    place = "before its first cell"
    if failure.get("position"):
        count = f", In [{failure['count']}]" if failure.get("count") else ""
        place = f"in cell {failure['position']} of {cells}{count}"
    lines = [f"FAILED {name} {place}"]
    source = failure.get("source", "").strip("\n").splitlines()
    lines += [f"    {line}" for line in source[:_SOURCE_LINES]]
    if len(source) > _SOURCE_LINES:
        lines.append(f"    ... {len(source) - _SOURCE_LINES} more lines")
    error = f"{failure['ename']}: {failure['evalue']}".strip().rstrip(":")
    trace = failure.get("traceback", "").strip().removesuffix(error).rstrip().splitlines()
    lines += [f"  | {line}" for line in trace[-_TRACE_LINES:]]
    lines += [f"  {line}" for line in error.splitlines()]
    lines.append(f"  partial notebook: {shown_path(partial)}" if partial else "  no partial notebook was written")
    return "\n".join(lines)


def progress_display(total: int) -> "PlainProgress | LiveProgress":
    """The display that fits where the output goes; ``total`` is how many chapters will be executed."""
    if watched():
        from rich.console import Console

        return LiveProgress(total, Console(file=sys.stdout))
    return PlainProgress(total)


class PlainProgress:
    """One line when a chapter starts, one when it ends."""

    def __init__(self, total: int):
        self.total = total
        self.begun: dict[str, float] = {}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def write(self, text: str) -> None:
        """A line for the user at any time."""
        print(text, flush=True)

    def start(self, name: str, cells: int) -> None:
        """A chapter starts."""
        self.begun[name] = time.monotonic()
        self.write(f"[{len(self.begun)}/{self.total}] {name}: started, {cells} cells")

    def cell(self, name: str, position: int) -> None:
        """A chapter's cell starts; ``position`` counts from 1."""

    def end(self, name: str, outcome: str) -> None:
        """A chapter has ended, one way or the other."""
        self.write(f"{name}: {outcome} after {time.monotonic() - self.begun[name]:.1f} s")


class LiveProgress(PlainProgress):
    """A bar for each running chapter: which cell of how many, time elapsed."""

    def __init__(self, total: int, console):
        super().__init__(total)
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("cell {task.completed:.0f} of {task.total:.0f}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            refresh_per_second=4,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.tasks: dict[str, Any] = {}

    def __enter__(self):
        self.bars.start()
        return self

    def __exit__(self, *exception):
        self.bars.stop()

    def write(self, text: str) -> None:
        from rich.text import Text

        self.bars.console.print(Text(text), soft_wrap=True)

    def start(self, name: str, cells: int) -> None:
        self.begun[name] = time.monotonic()
        self.tasks[name] = self.bars.add_task(f"[{len(self.begun)}/{self.total}] {name}", total=cells)

    def cell(self, name: str, position: int) -> None:
        self.bars.update(self.tasks[name], completed=position)

    def end(self, name: str, outcome: str) -> None:
        self.bars.remove_task(self.tasks.pop(name))
        super().end(name, outcome)


def _column(index: int, header: str):
    from rich.table import Column

    return Column(header, no_wrap=index == 0, overflow="fold")
