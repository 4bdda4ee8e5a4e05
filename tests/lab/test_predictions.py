import json
import re
from pathlib import Path

import pytest

from course_lib.lab import predictions
from course_lib.lab.predictions import ANSWERS, keep, kept, own_calibration

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def test_every_box_stands_under_its_question_and_knows_the_folded_answer():
    asked = {}
    for path in [NOTEBOOKS / "00_start_here.ipynb", *NOTEBOOKS.glob("0*/[1-9]_*.ipynb")]:
        cells = ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]
        for i, cell in enumerate(cells):
            if box := re.match(r'lesson\.predict\("([\d.]+-\d)", "([a-e]+)"\)', cell):
                question = cells[i - 1][cells[i - 1].index("**Predict first.**") :]
                assert list(box[2]) == list(dict.fromkeys(re.findall(r"\(([a-e])\)", question))), box[1]
                answer = re.search(r"<summary>Answer</summary>\s*\(([a-e])\)", "\n".join(cells[i:]))
                asked[box[1]] = answer[1]
    assert asked == ANSWERS
    assert set(ANSWERS.values()) == set("abcd")


def test_answers_are_kept_in_the_readers_own_cache_and_the_last_one_counts(monkeypatch, tmp_path):
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *args, **options: tmp_path / "not there yet")
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "of a whole room"))
    assert kept() == {}
    first, second = list(ANSWERS)[:2]
    keep(first, "a", 0.6)
    keep(second, "b", 0.9)
    keep(first, ANSWERS[first], 0.75)
    assert kept() == {first: (ANSWERS[first], 0.75), second: ("b", 0.9)}
    assert not (tmp_path / "of a whole room").exists()
    (tmp_path / "not there yet/predictions/mine.json").write_text("[broken")
    assert kept() == {}


def test_the_diagram_waits_for_enough_answers(monkeypatch, capsys):
    bundles = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw=False: bundles.append(data))
    own_calibration()
    assert capsys.readouterr().out == f"0 of {len(ANSWERS)} predictions kept so far; the diagram needs 5.\n"
    for question in list(ANSWERS)[:4]:
        keep(question, ANSWERS[question], 0.7)
    keep(list(ANSWERS)[4], "x", 0.7)
    own_calibration()
    # (4 · 0.3² + 0.7²) / 5
    assert capsys.readouterr().out == "5 predictions, 80% right at 70% sure; Brier score 0.17\n"
    assert "Your own reliability diagram" in bundles[0]["text/html"]


def test_a_box_is_shown_to_a_person_only(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    monkeypatch.setenv("COURSE_UNATTENDED", "1")
    predictions.ask("02.1-1", "abcd")
    assert shown == []
    monkeypatch.delenv("COURSE_UNATTENDED")
    monkeypatch.delenv("CI", raising=False)
    predictions.ask("02.1-1", "abcd")
    option, sure, button, said = shown[0].children
    option.value, sure.value = "d", 80
    button.click()
    assert kept() == {"02.1-1": ("d", 0.8)}
    assert said.value == "kept: d, 80 % sure"
    monkeypatch.setattr(predictions, "write_file", lambda *given: (_ for _ in ()).throw(OSError(30, "Read-only")))
    button.click()
    assert said.value == "not kept: [Errno 30] Read-only"
    with pytest.raises(KeyError):
        predictions.ask("99.9-1")
