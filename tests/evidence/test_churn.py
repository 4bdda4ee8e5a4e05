import pytest
import torch

from course_lib.evidence.churn import agreement, churn, flips, pairwise_churn


def draw(replicas=5, images=60, classes=4, seed=0):
    return torch.randint(classes, (replicas, images), generator=torch.Generator().manual_seed(seed))


def test_churn_equals_a_loop_and_agreement_is_the_rest():
    a, b = draw(seed=1), draw(seed=2)
    wanted = [sum(int(x != y) for x, y in zip(p, q, strict=True)) / 60 for p, q in zip(a, b, strict=True)]
    assert churn(a, b).tolist() == pytest.approx(wanted)
    assert (churn(a, b) + agreement(a, b)).tolist() == [1.0] * 5
    assert churn(a, a).tolist() == [0.0] * 5
    assert churn(a[0], b[0]).shape == (1,)


def test_pairs_are_all_of_them_in_order():
    a = draw()
    wanted = [churn(a[i], a[j]).item() for i in range(5) for j in range(i + 1, 5)]
    assert pairwise_churn(a).tolist() == wanted


def test_flips_add_up_to_churn_and_to_the_change_of_accuracy():
    a, b, labels = draw(seed=1), draw(seed=2), draw(1, seed=3)[0]
    found = flips(a, b, labels)
    torch.testing.assert_close(found.broken + found.repaired + found.moved, churn(a, b))
    lost = (a == labels).double().mean(1) - (b == labels).double().mean(1)
    torch.testing.assert_close(found.broken - found.repaired, lost)
    count = sum(int(x != y and x != t and y != t) for x, y, t in zip(a[0], b[0], labels, strict=True))
    assert found.moved[0].item() == pytest.approx(count / 60)


def test_bad_input_is_refused_in_words():
    a = draw()
    with pytest.raises(ValueError, match=r"one shape, got \(5, 60\) and \(4, 60\)"):
        churn(a, a[:4])
    with pytest.raises(ValueError, match="same images"):
        churn(a, a[:, :9])
    with pytest.raises(ValueError, match="same images"):
        churn(a, a[0])
    with pytest.raises(TypeError, match="b must be an int64 tensor"):
        churn(a, a.float())
    with pytest.raises(ValueError, match="same images"):
        flips(a, a, a[0, :9])
    with pytest.raises(ValueError, match="at least two replicas"):
        pairwise_churn(a[:1])
