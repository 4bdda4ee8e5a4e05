import numpy as np
import pytest
import torch
from IPython.core.formatters import DisplayFormatter

import course_lib.evidence.claims as claims
from course_lib.evidence.claims import MIME, ClaimFailed, Ledger


@pytest.fixture
def shown(monkeypatch):
    bundles = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw=False: bundles.append(data))
    return bundles


def test_close_stores_every_claim(shown):
    ledger = Ledger("07")
    ledger.claim("07.a", "A < B & C.", holds=True, measured="1 ± 0.1")
    ledger.close()
    (record,) = shown[0][MIME]["claims"]
    assert record["status"] == "holds"
    assert (record["id"], record["chapter"], record["dataset"], record["profile"]) == ("07.a", "07", "digits", "quick")
    assert "A &lt; B &amp; C." in shown[0]["text/html"]
    assert "A < B & C." in shown[0]["text/plain"]


def test_a_false_claim_fails_after_the_table_is_shown(shown):
    ledger = Ledger("07")
    ledger.claim("07.a", "True.", holds=True, measured=1)
    ledger.claim("07.b", "Water is dry.", holds=False, measured="wet")
    with pytest.raises(ClaimFailed, match=r"(?s)1 of 2 claims.*07\.b: Water is dry\. \(measured: wet\)"):
        ledger.close()
    assert [c["status"] for c in shown[0][MIME]["claims"]] == ["holds", "fails"]


@pytest.mark.parametrize("where", [{"dataset": "mnist"}, {"profile": "full"}])
def test_elsewhere_it_is_a_lesson(where, shown):
    ledger = Ledger("07", **where)
    assert ledger.claim("07.b", "Water is dry.", holds=False, measured="wet").status == "not here"
    ledger.close()
    assert "does not hold here" in shown[0]["text/html"]


def test_hardware_that_is_not_there_does_not_fail(shown):
    ledger = Ledger("07")
    made = ledger.claim("07.v", "int8 is fast.", holds=False, measured="0.9×", hardware="VNNI", here=False)
    assert (made.status, made.note) == ("not here", "needs VNNI")
    ledger.close()
    assert Ledger("07").claim("07.v", "int8 is fast.", holds=False, measured=1, hardware="VNNI").status == "fails"


@pytest.mark.parametrize("truth", [True, np.bool_(True), torch.tensor(True)])
def test_truth_values(truth):
    assert Ledger("07").claim("07.a", "So.", holds=truth, measured=1).holds is True


def test_a_claim_shows_itself():
    made = Ledger("07").claim("07.a", "A < B.", holds=True, measured="x")
    data, _ = DisplayFormatter().format(made)
    assert "✓ holds" in data["text/html"]
    assert "A &lt; B." in data["text/html"]


def test_bad_input_is_named(shown):
    ledger = Ledger("07")
    ledger.claim("07.a", "Once.", holds=True, measured=1)
    with pytest.raises(ValueError, match="already in the ledger"):
        ledger.claim("07.a", "Twice.", holds=True, measured=1)
    with pytest.raises(TypeError, match="must be a bool, got float"):
        ledger.claim("07.b", "Half.", holds=0.5, measured=1)
    with pytest.raises(ValueError, match="an id and a sentence"):
        ledger.claim("07.c", " ", holds=True, measured=1)
    with pytest.raises(ValueError, match="empty"):
        Ledger("08").close()
    assert len(ledger.claims) == 1
    assert claims.MARKS.keys() == {"holds", "fails", "not here"}
