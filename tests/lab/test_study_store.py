import functools
import importlib
import json
import os
import sys
import threading

import pytest
import study_cells

from course_lib.lab.study_store import RowStore, identity, row_key

ROW = {
    "trial": {"method": "m", "level": 1, "seed": 0, "options": []},
    "values": {"x": 0.1},
    "error": None,
    "seconds": 1.0,
}
KEY = row_key("a", "salt")


@pytest.fixture
def store(tmp_path):
    return RowStore(tmp_path, "study")


def test_a_row_comes_back_as_it_was_written(store):
    lock = store.claim(KEY)
    written = store.write(KEY, ROW)
    store.release(KEY, lock)
    assert store.read(KEY) == written
    assert {name: written[name] for name in ROW} == ROW
    assert list(store.rows()) == [written]
    assert [path.name for path in store.folder.iterdir()] == [f"{KEY}.json"]
    assert store.read(row_key("a", "other salt")) is None


def torn(text):
    return text[: len(text) // 2]


def foreign(text):
    return text.replace(KEY, row_key("b", "salt"))


DAMAGE = [torn, foreign, lambda text: "", lambda text: "[]", lambda text: "{}", lambda text: "\x00" * len(text)]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_row_counts_as_none(store, damage):
    store.claim(KEY)
    store.write(KEY, ROW)
    path = store.folder / f"{KEY}.json"
    path.write_text(damage(path.read_text()))
    assert store.read(KEY) is None
    assert list(store.rows()) == []
    path.write_bytes(b"\xff\xfe\x00")
    assert store.read(KEY) is None


def test_half_a_row_is_never_seen(store, monkeypatch):
    lock = store.claim(KEY)
    first = store.write(KEY, ROW)

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            store.write(KEY, {**ROW, "seconds": 9.0})
    assert store.read(KEY) == first
    store.write(KEY, {**ROW, "seconds": 3.0})
    store.release(KEY, lock)
    assert store.read(KEY)["seconds"] == 3.0
    assert [path.name for path in store.folder.iterdir()] == [f"{KEY}.json"]


def test_a_claim_keeps_others_out_until_it_is_given_back(store):
    lock = store.claim(KEY)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(RowStore(store.folder.parent, "study").claim(KEY)))
    thread.start()
    thread.join()
    assert seen == [None]
    assert store.claim(row_key("b", "salt")) is not None
    store.release(KEY, lock)
    again = store.claim(KEY)
    assert again is not None
    store.write(KEY, {**ROW, "error": "ValueError: no"})
    store.release(KEY, again)
    assert (store.folder / f"{KEY}.lock").exists(), "an error is tried again: its lock file stays"


def test_names_are_names(tmp_path):
    for name in ("", "a/b", "..", "a b"):
        with pytest.raises(ValueError, match="name must be"):
            RowStore(tmp_path, name)


def test_the_identity_of_work():
    salt = identity(study_cells.quick, "digits", kept=True)
    assert salt == identity(study_cells.quick, "digits", kept=True)
    assert salt != identity(study_cells.quick, "mnist", kept=True)
    assert salt != identity(study_cells.logged, "digits", kept=True)
    bound = identity(functools.partial(study_cells.quick, width=3), "digits", kept=True)
    assert bound not in (salt, identity(functools.partial(study_cells.quick, width=4), "digits", kept=True))


def test_work_whose_content_has_no_name_is_refused_where_rows_are_kept():
    number = 3
    cases = {
        "holds on to variables": lambda trial: {"x": number},
        "must be plain numbers and words": functools.partial(study_cells.quick, width={1, 2}),
    }
    for message, work in cases.items():
        assert identity(work, "", kept=False)
        with pytest.raises(ValueError, match=message):
            identity(work, "", kept=True)
    unseen = {"__name__": "nowhere"}
    exec("def work(trial): return {}", unseen)
    with pytest.raises(ValueError, match=r"source of work nowhere\.work cannot be read"):
        identity(unseen["work"], "", kept=True)
    for nothing in (None, 3, print, RowStore):
        with pytest.raises(TypeError, match="work must be a function of a trial"):
            identity(nothing, "", kept=False)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose work imports helpers in every way there is."""
    folder = tmp_path / "sourcery"
    (folder / "deep").mkdir(parents=True)
    files = {
        "__init__.py": "",
        "work.py": "from sourcery import a\nimport sourcery.b\ndef f(trial):\n    from .c import helper\n",
        "a.py": "from sourcery.deep import inner\n",
        "b.py": "import sourcery.a\nimport json\n",
        "c.py": "from . import d\nhelper = 1\n",
        "d.py": "",
        "deep/__init__.py": "from ..e import *\n",
        "deep/inner.py": "def g():\n    import sourcery.missing\n",
        "e.py": "x = 1\n",
        "unrelated.py": "",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.startswith("sourcery")]:
        del sys.modules[name]


def test_a_change_anywhere_in_what_work_imports_makes_other_rows(package):
    work = importlib.import_module("sourcery.work").f
    before = identity(work, "", kept=True)
    for name in ("work", "a", "b", "c", "d", "deep/__init__", "deep/inner", "e", "__init__"):
        path = package / f"{name}.py"
        text = path.read_text()
        path.write_text(f"{text}# changed\n")
        assert identity(work, "", kept=True) != before, name
        path.write_text(text)
    (package / "unrelated.py").write_text("# changed\n")
    assert identity(work, "", kept=True) == before
    assert json.loads(before)[0] == "sourcery.work.f"
