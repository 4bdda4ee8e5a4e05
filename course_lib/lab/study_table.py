"""The result of a study as a table, and the table as a file."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from course_lib.lab.study_grid import COLUMNS, Trial

if TYPE_CHECKING:
    import pandas

__all__ = ["check_save", "save_table", "table"]


def table(trials: list[Trial], rows: list[dict]) -> "pandas.DataFrame":
    """One row a trial, in that order: method, level, seed, options, measured values, error, seconds."""
    import pandas

    records = [
        {"method": t.method, "level": t.level, "seed": t.seed, **dict(t.options), **row["values"]}
        | {"error": row["error"], "seconds": row["seconds"]}
        for t, row in zip(trials, rows, strict=True)
    ]
    options = [name for t in trials for name, _ in t.options]
    measured = [name for row in rows for name in row["values"]]
    return pandas.DataFrame(records, columns=list(dict.fromkeys([*COLUMNS[:3], *options, *measured, *COLUMNS[3:]])))


def check_save(save: str | Path | None) -> None:
    """Refuse a file that could not be written later: another suffix, or Parquet without pyarrow."""
    if save is None:
        return
    suffix = Path(save).suffix
    if suffix not in (".csv", ".parquet"):
        raise ValueError(f"save must end in .csv or .parquet, got {str(save)!r}")
    if suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise ImportError("a .parquet file needs pyarrow: pip install pyarrow, or save a .csv file") from error


def save_table(frame: "pandas.DataFrame", path: Path) -> None:
    """Write a table to a .csv or .parquet file, in one piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        if path.suffix == ".csv":
            frame.to_csv(partial, index=False)
        else:
            # A Parquet column has one type: where a column mixes numbers and words, it is written as words.
            for name in [name for name in frame.columns if frame[name].dtype.kind == "O"]:
                frame = frame.assign(**{name: frame[name].map(str, na_action="ignore").astype("string")})
            frame.to_parquet(partial, index=False, engine="pyarrow")
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
