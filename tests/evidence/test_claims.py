import numpy as np
import pytest
import torch
from IPython.core.formatters import DisplayFormatter

from course_lib.evidence.claims import MIME, ClaimFailed, Ledger
from course_lib.evidence.statistics import exactly, mean

GAIN = mean([1.0, 2.0, 3.0], "points")


def test_a_claim_stores_its_numbers_and_shows_itself():
    made = Ledger("07.1", seed=3).claim("07.a", "A < B & C.", (GAIN > -1) & (exactly(4, "×") > 3))
    data, _ = DisplayFormatter().format(made)
    (record,) = data[MIME]["claims"]
    assert (record["id"], record["lesson"], record["dataset"], record["profile"], record["seed"]) == (
        *("07.a", "07.1", "digits", "quick", 3),
    )
    assert (record["status"], record["verdict"], record["measured"]) == ("holds", "held", "2.0 ± 2.5 points, 4×")
    first, second = record["parts"]
    assert first == dict(value=2.0, low=GAIN.low, high=GAIN.high, n=3, relation=">", bound=-1.0, unit="points")
    assert (second["value"], second["n"], second["bound"]) == (4.0, 1, 3.0)
    assert "<b>✓</b> A &lt; B &amp; C." in data["text/html"]
    assert data["text/plain"] == "✓ A < B & C. [2.0 ± 2.5 points, 4×]"


def test_what_is_not_finite_is_no_part():
    least = -float("inf")
    made = Ledger("07").claim("07.a", "Endless.", (exactly(-least) > 3) & (GAIN > -1) & (least < GAIN))
    assert (made.holds, [part["bound"] for part in made.parts]) == (True, [-1.0])


def test_an_undecided_claim_does_not_hold():
    made = Ledger("07").claim("07.a", "It gains.", GAIN > 0, expected="a gain (somebody 2015)")
    assert (made.holds, made.verdict, made.status) == (False, "undecided", "fails")
    assert "Expected, not seen: a gain (somebody 2015)." in made._repr_mimebundle_()["text/html"]
    assert Ledger("07").claim("07.a", "It gains much.", GAIN > 9).verdict == "not"


def test_a_claim_again_replaces_itself():
    ledger = Ledger("07")
    ledger.claim("07.a", "So.", GAIN > 9)
    ledger.claim("07.b", "Other.", GAIN > -9)
    ledger.claim("07.a", "So.", GAIN > -9)
    assert [(c.id, c.status) for c in ledger.claims] == [("07.a", "holds"), ("07.b", "holds")]
    with pytest.raises(ValueError, match="stands for another sentence already: 'So"):
        ledger.claim("07.a", "Not so.", GAIN > 0)


def test_a_false_claim_fails_the_ledger():
    ledger = Ledger("07")
    with pytest.raises(ValueError, match="lesson 07 is empty"):
        ledger.close()
    ledger.claim("07.a", "True.", True, measured=1)
    ledger.close()
    ledger.claim("07.b", "Water is dry.", False, measured="wet")
    with pytest.raises(ClaimFailed, match=r"(?s)1 of 2 claims.*07\.b: Water is dry\. \(measured: wet\)"):
        ledger.close()


@pytest.mark.parametrize("where", [{"dataset": "mnist"}, {"profile": "full"}])
def test_elsewhere_it_is_a_lesson(where):
    ledger = Ledger("07", **where)
    made = ledger.claim("07.b", "Water is dry.", holds=False, measured="wet")
    assert made.status == "not here"
    assert "does not hold here" in made._repr_mimebundle_()["text/html"]
    ledger.close()


def test_hardware_that_is_not_there_does_not_fail():
    ledger, what = Ledger("07"), ("07.v", "int8 is fast.")
    made = ledger.claim(*what, False, measured="0.9×", hardware="VNNI", here=False)
    assert made.status == "not here"
    assert "0.9×; needs VNNI" in made._repr_mimebundle_()["text/html"]
    assert ledger.claim(*what, False, measured=1, hardware="VNNI").status == "fails"
    made = ledger.claim("07.x", "Fewer.", exactly(float("nan")) < 1, hardware="a compiler", here=False)
    assert (made.status, made.parts) == ("not here", ())
    assert made._repr_mimebundle_()["text/plain"] == "– Fewer. (not measured here) [not measured; needs a compiler]"


@pytest.mark.parametrize("truth", [True, np.bool_(True), torch.tensor(True)])
def test_truth_values(truth):
    assert Ledger("07").claim("07.a", "So.", truth, measured=1).holds is True


def test_bad_input_is_named():
    ledger = Ledger("07")
    with pytest.raises(TypeError, match="or a bool; got float"):
        ledger.claim("07.b", "Half.", 0.5, measured=1)
    with pytest.raises(TypeError, match="give measured="):
        ledger.claim("07.b", "True.", True)
    with pytest.raises(ValueError, match="an id and a sentence"):
        ledger.claim("07.c", " ", True, measured=1)
    assert ledger.claims == []
