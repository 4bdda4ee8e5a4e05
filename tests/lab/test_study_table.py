import sys

import pandas
import pytest

from course_lib.lab.study_grid import make_grid
from course_lib.lab.study_table import check_save, save_table, table

GRID = make_grid({"dense": [None], "bits": [8], "words": ['high, "very"\nhigh']}, [0])


def rows():
    good = {"values": {"acc": 0.1 + 0.2, "ok": True}, "error": None, "seconds": 1.5}
    bad = {"values": {}, "error": "ValueError: a, b\nand c", "seconds": None}
    other = {"values": {"bytes": 12, "acc": 1}, "error": None, "seconds": 2.0}
    return [good, bad, other]


def test_columns_come_in_order_and_gaps_are_missing():
    frame = table(make_grid({"a": [1]}, [0], width=3) + GRID[1:], rows())
    assert list(frame) == ["method", "level", "seed", "width", "acc", "ok", "bytes", "error", "seconds"]
    assert frame.acc.isna().tolist() == [False, True, False]
    assert frame.width.isna().tolist() == [False, True, True]
    assert frame.error.isna().tolist() == [True, False, True]
    assert table(GRID[1:2], rows()[2:]).bytes.tolist() == [12]


def test_csv_and_parquet_give_the_table_back(tmp_path):
    pytest.importorskip("pyarrow")
    frame = table(GRID, rows())
    save_table(frame, tmp_path / "new" / "a.csv")
    save_table(frame, tmp_path / "new" / "a.parquet")
    csv, parquet = pandas.read_csv(tmp_path / "new" / "a.csv"), pandas.read_parquet(tmp_path / "new" / "a.parquet")
    for again in (csv, parquet):
        assert list(again) == list(frame)
        assert again.acc.tolist()[::2] == frame.acc.tolist()[::2] == [0.1 + 0.2, 1.0]
        assert again.error[1] == "ValueError: a, b\nand c"
        assert again.error.isna().tolist() == [True, False, True]
        assert again.level.isna().tolist() == [True, False, False]
        assert again.level[1:].tolist() == ["8", 'high, "very"\nhigh']
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["a.csv", "a.parquet"]
    assert list(frame.level[1:]) == [8, 'high, "very"\nhigh'], "the table itself stays as it was"


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    path.write_text("old")

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(pandas.DataFrame, "to_csv", full)
    with pytest.raises(OSError, match="no space"):
        save_table(table(GRID, rows()), path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def test_what_could_not_be_saved_is_refused_before(monkeypatch):
    check_save(None)
    check_save("a.csv")
    with pytest.raises(ValueError, match=r"must end in \.csv or \.parquet, got 'a\.xlsx'"):
        check_save("a.xlsx")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        check_save("a.parquet")
