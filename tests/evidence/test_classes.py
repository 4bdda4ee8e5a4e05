import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torchmetrics.functional.classification import multiclass_accuracy

from course_lib.evidence.classes import adjust_p_values, class_accuracy, class_change
from course_lib.evidence.statistics import proportion_interval


def population(replicas=8, images=120, classes=4, error=0.2, seed=0, shared=0.0):
    """Labels, and predictions that are wrong independently, but for a share of images that all get wrong."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % classes
    wrong = torch.rand(replicas, images, generator=g) < error
    wrong |= (torch.rand(images, generator=g) < shared)[None]
    return torch.where(wrong, (labels + 1) % max(classes, 2), labels.expand(replicas, -1)), labels


def test_one_model_has_wilsons_interval_and_torchmetrics_shares():
    predicted, labels = population(replicas=1)
    theirs = multiclass_accuracy(predicted[0], labels, num_classes=4, average=None)
    for index, found in enumerate(class_accuracy(predicted[0], labels)):
        right = int((predicted[0][labels == index] == index).sum())
        wanted = proportion_interval(right, 30)
        assert (found.mean, found.low, found.high) == pytest.approx((wanted.mean, wanted.low, wanted.high), abs=1e-12)
        assert found.mean == pytest.approx(theirs[index].item(), abs=1e-6)
        assert found.n == 30


def test_pooled_and_taken_for_independent_is_wilsons_over_all_answers():
    predicted, labels = population()
    for index, found in enumerate(class_accuracy(predicted, labels, clustered=False, level=0.9)):
        right = int((predicted[:, labels == index] == index).sum())
        wanted = proportion_interval(right, 8 * 30, level=0.9)
        assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_replicas_that_always_agree_are_one_model():
    predicted, labels = population(replicas=1)
    for one, many in zip(
        class_accuracy(predicted, labels), class_accuracy(predicted.expand(9, -1), labels), strict=True
    ):
        assert (one.low, one.high) == pytest.approx((many.low, many.high), abs=1e-12)


def test_a_class_with_fewer_errors_has_no_wider_interval():
    """The correlation comes from all classes: one without an error borrows it from the others."""
    predicted, labels = population(replicas=8, shared=0.1, error=0.05)
    for errors in (0, 1):
        predicted[:, labels == 2] = 2
        predicted[:errors, 2] = 3
        found = class_accuracy(predicted, labels)
        widths = [interval.half_width for interval in sorted(found, key=lambda i: -i.mean)]
        assert widths == sorted(widths)
    naive = class_accuracy(predicted, labels, clustered=False)
    assert all(a.half_width > 1.3 * b.half_width for a, b in zip(found, naive, strict=True))


def test_the_correlation_is_that_of_an_analysis_of_variance():
    predicted, labels = population(replicas=5, shared=0.2, error=0.1, classes=1)
    right = (predicted == labels).numpy().astype(float)
    means = right.mean(axis=0)
    f = stats.f_oneway(*right.T).statistic  # images as groups, replicas within
    rho = (f - 1) / (f - 1 + 5)
    (found,) = class_accuracy(predicted, labels)
    share, n, z = means.mean(), 5 * 120 / (1 + 4 * rho), stats.norm.ppf(0.975)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    assert found.half_width == pytest.approx(half, rel=1e-9)


def test_the_clustered_interval_covers_and_the_naive_one_does_not():
    """2,000 images as the truth; samples of 40 of them. Three quarters of the errors are shared by all replicas."""
    g, zeros = torch.Generator().manual_seed(5), torch.zeros(40, dtype=torch.int64)
    shared, own = torch.rand(2000, generator=g) < 0.15, torch.rand(6, 2000, generator=g) < 0.05
    predicted = (shared | own).long()
    truth = float((predicted == 0).double().mean())
    hits = {True: 0, False: 0}
    for _ in range(200):
        sample = torch.randperm(2000, generator=g)[:40]
        for clustered in hits:
            (found,) = class_accuracy(predicted[:, sample], zeros, clustered=clustered)
            hits[clustered] += found.low <= truth <= found.high
    assert hits[True] >= 180
    assert hits[False] < 150


def test_change_equals_scipys_paired_test_and_a_loop():
    before, labels = population(seed=1, error=0.1)
    after, _ = population(seed=2, error=0.25)
    for index, row in enumerate(class_change(before, after, labels, correction="none")):
        mine = labels == index
        a = (before == labels).double()
        b = (after == labels).double()
        x = (b[:, mine].mean(1) - b.mean(1)).numpy()
        y = (a[:, mine].mean(1) - a.mean(1)).numpy()
        theirs = stats.ttest_rel(x, y)
        interval = theirs.confidence_interval(0.95)
        assert row.p_value == pytest.approx(theirs.pvalue, rel=1e-9)
        assert row.adjusted_p == row.p_value
        assert (row.relative.low, row.relative.high) == pytest.approx((interval.low, interval.high), abs=1e-12)
        raw = stats.ttest_rel(b[:, mine].mean(1).numpy(), a[:, mine].mean(1).numpy()).confidence_interval(0.95)
        assert (row.change.low, row.change.high) == pytest.approx((raw.low, raw.high), abs=1e-12)
        assert row.compressed - row.original == pytest.approx(row.change.mean, abs=1e-12)
        assert row.images == 30


def test_relative_changes_weighted_by_images_add_up_to_nothing():
    labels = torch.tensor([0] * 50 + [1] * 7 + [2] * 23)
    before = labels.expand(5, -1).clone()
    after = torch.randint(3, (5, 80), generator=torch.Generator().manual_seed(0))
    rows = class_change(before, after, labels)
    assert sum(row.images * row.relative.mean for row in rows) == pytest.approx(0, abs=1e-9)


def test_a_class_that_alone_forgets_is_found_and_an_even_loss_is_not():
    before, labels = population(replicas=10, error=0.02, seed=7)
    spared, _ = population(replicas=10, error=0.02, seed=8)
    hit = torch.rand(10, 120, generator=torch.Generator().manual_seed(9)) < 0.5
    after = torch.where(hit & (labels == 2), 0, spared)
    rows = class_change(before, after, labels)
    assert rows[2].adjusted_p < 0.001
    assert rows[2].relative.high < 0
    even = torch.where(hit, (labels + 1) % 4, spared)
    assert min(row.adjusted_p for row in class_change(before, even, labels)) > 0.05
    assert all(row.change.high < 0 for row in class_change(before, even, labels))


def test_bonferroni_widens_intervals_and_agrees_with_its_p_values():
    before, labels = population(seed=1, error=0.1)
    after, _ = population(seed=2, error=0.25)
    plain = class_change(before, after, labels, correction="none")
    wide = class_change(before, after, labels, correction="bonferroni")
    for a, b in zip(plain, wide, strict=True):
        assert b.relative.half_width > a.relative.half_width
        assert b.relative.level == pytest.approx(1 - 0.05 / 4)
        assert b.adjusted_p == pytest.approx(min(1, 4 * a.p_value))
        assert b.relative.excludes(0) == (b.adjusted_p < 0.05)


def test_equal_changes_have_a_sign_tests_p_and_no_width():
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    before = labels.expand(4, -1)
    after = before.clone()
    after[:, 0] = 1
    row, other = class_change(before, after, labels, correction="none")
    assert row.p_value == other.p_value == 2 / 2**4
    assert row.relative.low == row.relative.high == pytest.approx(-1 / 6)
    assert [r.p_value for r in class_change(before, before, labels)] == [1.0, 1.0]


@pytest.mark.parametrize("seed", range(4))
def test_holm_rejects_what_the_step_down_procedure_rejects(seed):
    p = np.random.default_rng(seed).uniform(0, 0.2, size=7).round(2)
    adjusted = adjust_p_values(p)
    for alpha in np.arange(0.0051, 0.6, 0.01):
        rejected = set()
        for step, place in enumerate(np.argsort(p, kind="stable")):
            if p[place] > alpha / (7 - step):
                break
            rejected.add(int(place))
        assert {i for i, value in enumerate(adjusted) if value <= alpha} == rejected


def test_holm_is_never_above_bonferroni_and_keeps_the_order():
    p = [0.01, 0.04, 0.03, 0.5, 0.9]
    holm, bonferroni = adjust_p_values(p), adjust_p_values(p, method="bonferroni")
    assert all(a <= b <= 1 for a, b in zip(holm, bonferroni, strict=True))
    for (a, x), (b, y) in itertools.permutations(zip(p, holm, strict=True), 2):
        assert a > b or x <= y
    assert adjust_p_values(p, method="none") == p
    assert adjust_p_values([1.0, 1.0]) == [1.0, 1.0]


@pytest.mark.parametrize("bad", [[], [-0.1], [1.1], [math.nan], [[0.1]]])
def test_p_values_must_be_some(bad):
    with pytest.raises(ValueError, match=r"p_values must be at least one number in \[0, 1\]"):
        adjust_p_values(bad)


def test_options_must_be_known():
    before, labels = population()
    with pytest.raises(ValueError, match=r"method must be 'holm'.* got 'fdr'"):
        adjust_p_values([0.1], method="fdr")
    with pytest.raises(ValueError, match=r"correction must be 'holm'.* got 'fdr'"):
        class_change(before, before, labels, correction="fdr")
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match="level must be between 0 and 1"):
            class_accuracy(before, labels, level=level)
        with pytest.raises(ValueError, match="level must be between 0 and 1"):
            class_change(before, before, labels, level=level)


P, Y = torch.tensor([[0, 1, 1], [0, 0, 1]]), torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    ("predicted", "labels", "classes", "error", "text"),
    [
        ([[0, 1, 1]], Y, None, TypeError, "predicted must be an int64 tensor .* got list"),
        (P.float(), Y, None, TypeError, "got dtype torch.float32"),
        (P, Y.int(), None, TypeError, "labels must be an int64 tensor .* got dtype torch.int32"),
        (P[None], Y, None, ValueError, r"\[R, N\], one row a replica, got \(1, 2, 3\)"),
        (P, P, None, ValueError, r"labels must have shape \[N\], got \(2, 3\)"),
        (P[:, :2], Y, None, ValueError, r"same images .* predicted \(2, 2\), labels \(3,\)"),
        (P[:, :0], Y[:0], None, ValueError, "at least one image"),
        (P, Y - 1, None, ValueError, "got -1 to"),
        (P - 1, Y, None, ValueError, "got -1 to"),
        (P, Y, 1, ValueError, "got 0 to 1, num_classes=1"),
        (P, Y, 3, ValueError, "got none of class 2 among 3"),
        (P, Y * 2, None, ValueError, "got none of class 1"),
        (P, Y, 2.0, ValueError, "num_classes=2.0"),
    ],
)
def test_bad_predictions_are_refused_in_words(predicted, labels, classes, error, text):
    with pytest.raises(error, match=text):
        class_accuracy(predicted, labels, num_classes=classes)


def test_a_difference_needs_two_replicas_and_the_same_shape():
    with pytest.raises(ValueError, match="at least two replicas"):
        class_change(P[:1], P[:1], Y)
    with pytest.raises(ValueError, match="at least two replicas"):
        class_change(P[0], P[0], Y)
    with pytest.raises(ValueError, match="same seeds in one order, got 2 and 1 rows"):
        class_change(P, P[:1], Y)
