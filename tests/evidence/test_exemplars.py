from collections import Counter

import pytest
import torch
from scipy import stats
from torch import nn

from course_lib.evidence.exemplars import (
    exemplar_control,
    find_exemplars,
    forgotten,
    modal_label,
    predict_labels,
)


def draw(replicas=6, images=80, classes=3, seed=0):
    return torch.randint(classes, (replicas, images), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("replicas", [1, 2, 3, 6])
def test_modal_label_equals_scipys_mode_ties_included(replicas):
    table = draw(replicas)
    assert modal_label(table).tolist() == stats.mode(table.numpy(), axis=0).mode.tolist()


def tops(column):
    counts = Counter(column)
    return {label for label, n in counts.items() if n == max(counts.values())}


@pytest.mark.parametrize(("r", "s"), [(4, 4), (6, 3), (1, 5)])
def test_exemplars_equal_a_loop_over_sets(r, s):
    a, b = draw(r, seed=1), draw(s, seed=2)
    wanted = []
    for i in range(80):
        x, y = a[:, i].tolist(), b[:, i].tolist()
        if not tops(x) & tops(y):
            distance = sum(abs(x.count(k) / r - y.count(k) / s) for k in range(3)) / 2
            wanted.append((-round(distance, 9), i, min(tops(x)), min(tops(y))))
    wanted.sort()
    found = find_exemplars(a, b)
    assert len(found) == len(wanted) > 0
    assert found.index.tolist() == [i for _, i, _, _ in wanted]
    assert found.original.tolist() == [x for _, _, x, _ in wanted]
    assert found.compressed.tolist() == [y for _, _, _, y in wanted]
    assert found.distance.tolist() == pytest.approx([-d for d, _, _, _ in wanted], abs=1e-8)


def test_exemplars_are_symmetric_and_do_not_depend_on_the_order_of_replicas():
    a, b = draw(4, seed=1), draw(4, seed=2)
    one, other = find_exemplars(a, b), find_exemplars(b.flip(0), a.flip(0))
    assert one.index.tolist() == other.index.tolist()
    assert one.original.tolist() == other.compressed.tolist()
    assert len(find_exemplars(a, a)) == 0


def test_a_tie_that_holds_the_others_label_is_no_exemplar():
    a = torch.tensor([[3], [3], [8], [8]])
    assert len(find_exemplars(a, torch.tensor([[8], [8], [8], [3]]))) == 0
    assert len(find_exemplars(a, torch.tensor([[3], [3], [3], [8]]))) == 0
    assert len(find_exemplars(a, torch.tensor([[5], [5], [5], [8]]))) == 1


def test_control_is_what_it_says():
    """Seeds scatter on a few images, compression changes ten for good."""
    g = torch.Generator().manual_seed(0)
    original = torch.zeros(10, 100, dtype=torch.int64)
    original[:, :12] = torch.randint(2, (10, 12), generator=g)
    compressed = original.clone()
    compressed[:, :12] = torch.randint(2, (10, 12), generator=g)
    none = exemplar_control(original, compressed, draws=100)
    assert none.within.shape == none.between.shape == none.shuffled.shape == (100,)
    assert none.within.double().mean() > 0
    assert none.within.max() <= 12
    assert none.p_value > 0.05
    compressed[:, 50:60] = 1
    some = exemplar_control(original, compressed, draws=100)
    ones = original.double().mean(0), compressed.double().mean(0)
    assert some.distance == pytest.approx((ones[0] - ones[1]).abs().mean().item())
    assert some.shuffled.max() <= some.distance
    assert torch.equal(none.within, some.within)
    assert some.observed == len(find_exemplars(original, compressed)) >= 10
    assert (some.between >= 10).all()
    assert some.between.double().mean() > some.within.double().mean() + 5
    assert some.p_value < 0.05


def test_control_is_deterministic_and_leaves_the_global_generator_alone():
    a, b = draw(seed=1), draw(seed=2)
    state = torch.get_rng_state()
    one, other = exemplar_control(a, b, draws=20, seed=3), exemplar_control(a, b, draws=20, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.within, other.within)
    assert torch.equal(one.shuffled, other.shuffled)
    assert not torch.equal(one.within, exemplar_control(a, b, draws=20, seed=4).within)
    same = exemplar_control(a, a, draws=20)
    assert (same.observed, same.p_value) == (0, 1.0)


def test_forgotten_equals_a_loop():
    g = torch.Generator().manual_seed(0)
    labels = draw(1, seed=5)[0]
    a = torch.where(torch.rand(6, 80, generator=g) < 0.05, (labels + 1) % 3, labels)
    b = torch.where(torch.rand(4, 80, generator=g) < 0.4, draw(4, seed=6), labels)
    for least in (1.0, 0.8, 0.5):
        wanted = []
        for i in range(80):
            y = labels[i].item()
            wrong = [p for p in b[:, i].tolist() if p != y]
            missed = sum(p != y for p in a[:, i].tolist())
            if wrong and 6 - missed >= least * 6:
                wanted.append((-len(wrong), i, missed, min(tops(wrong))))
        wanted.sort()
        found = forgotten(a, b, labels, least_right=least)
        rows = zip(found.wrong, found.index, found.wrong_original, found.answer, strict=True)
        assert [(-int(w), int(i), int(m), int(t)) for w, i, m, t in rows] == wanted
    assert len(forgotten(a, labels.expand(3, -1), labels)) == 0


def test_predicted_labels_are_the_models_and_its_mode_stays():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    model.train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(11, 1, 2, 2)
    found = predict_labels([model, lambda x: -x.flatten(1)], images, batch_size=4)
    assert [m.training for m in model] == [True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    assert torch.equal(found[0], model(images).argmax(1))
    assert torch.equal(found[1], images.flatten(1).argmin(1))
    assert torch.equal(predict_labels(model, images), found[:1])
    assert torch.equal(predict_labels(nn.ModuleList([model, model]), images)[1], found[0])
    assert not found.requires_grad


def test_tied_logits_give_the_smallest_label():
    assert predict_labels(lambda x: torch.zeros(len(x), 7), torch.zeros(3, 1, 1, 1)).tolist() == [[0, 0, 0]]


A = draw(4, 5)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: modal_label(A.float()), TypeError, "predicted must be an int64 tensor"),
        (lambda: modal_label(A - 1), ValueError, "got -1 to"),
        (lambda: find_exemplars(A, A[:, :3]), ValueError, r"original \(4, 5\), compressed \(4, 3\)"),
        (lambda: find_exemplars(A[:, :0], A[:, :0]), ValueError, "at least one image"),
        (lambda: exemplar_control(A, A[:3]), ValueError, "got 4 originals and 3 compressed"),
        (lambda: exemplar_control(A[:1], A[:1]), ValueError, "at least two seeds"),
        (lambda: exemplar_control(A, A, draws=0), ValueError, "draws must be an integer of at least 1, got 0"),
        (lambda: exemplar_control(A, A, draws=True), ValueError, "draws"),
        (lambda: forgotten(A, A, A[0, :2]), ValueError, "same images"),
        (lambda: forgotten(A, A, A[0], least_right=0), ValueError, r"in \(0, 1\], got 0"),
        (lambda: forgotten(A, A, A[0], least_right=1.5), ValueError, "got 1.5"),
        (lambda: predict_labels([], torch.zeros(2, 1, 1, 1)), ValueError, "got 0 and 2"),
        (lambda: predict_labels(nn.Flatten(), torch.zeros(0, 1, 1, 1)), ValueError, "got 1 and 0"),
        (lambda: predict_labels(nn.Identity(), torch.zeros(2, 1, 1, 1)), ValueError, r"logits \[2, K\]"),
    ],
)
def test_bad_input_is_refused_in_words(call, error, text):
    with pytest.raises(error, match=text):
        call()
