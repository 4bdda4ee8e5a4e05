import itertools
import math

import pytest
import torch
from scipy import stats

from course_lib.evidence.map_agreement import rank_correlation, top_k_chance, top_k_overlap


def maps(n=12, height=4, width=5, levels=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(levels, (n, height, width), generator=g).float()
    return torch.randn(n, height, width, generator=g)


@pytest.mark.parametrize("levels", [None, 2, 3, 8])
def test_rank_correlation_equals_scipys_ties_included(levels):
    a, b = maps(levels=levels, seed=1), maps(levels=levels, seed=2)
    theirs = [stats.spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a, b, strict=True)]
    assert rank_correlation(a, b).tolist() == pytest.approx(theirs, abs=1e-12)


def test_rank_correlation_sees_only_the_order():
    a = maps()
    assert rank_correlation(a, a.exp() * 3 + 1).tolist() == pytest.approx([1.0] * 12, abs=1e-12)
    assert rank_correlation(a, -a).tolist() == pytest.approx([-1.0] * 12, abs=1e-12)
    assert rank_correlation(a.flatten(1), a.flatten(1)).shape == (12,)
    many = rank_correlation(maps(500, 8, 8, seed=1), maps(500, 8, 8, seed=2))
    assert many.mean().abs() < 0.02


def test_a_constant_map_has_no_order():
    a = maps(2)
    a[0] = 7.0
    found = rank_correlation(a, maps(2, seed=3))
    assert math.isnan(found[0])
    assert not math.isnan(found[1])


@pytest.mark.parametrize("k", [1, 3, 10, 20])
def test_overlap_without_ties_equals_sets(k):
    a, b = maps(seed=1), maps(seed=2)
    wanted = []
    for x, y in zip(a.flatten(1).tolist(), b.flatten(1).tolist(), strict=True):
        first, second = (set(sorted(range(20), key=lambda i: -m[i])[:k]) for m in (x, y))
        wanted.append(len(first & second) / k)
    assert top_k_overlap(a, b, k=k).tolist() == pytest.approx(wanted)
    assert top_k_overlap(a, a, k=k).tolist() == [1.0] * 12


def choices(row, k):
    """Every set of the k highest, however ties fall."""
    last = sorted(row, reverse=True)[k - 1]
    above = {i for i, v in enumerate(row) if v > last}
    tied = [i for i, v in enumerate(row) if v == last]
    return [above | set(extra) for extra in itertools.combinations(tied, k - len(above))]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_overlap_with_ties_is_the_mean_over_all_ways_to_break_them(k):
    a, b = maps(6, 2, 3, levels=3, seed=1), maps(6, 2, 3, levels=3, seed=2)
    wanted = []
    for x, y in zip(a.flatten(1).tolist(), b.flatten(1).tolist(), strict=True):
        pairs = list(itertools.product(choices(x, k), choices(y, k)))
        wanted.append(sum(len(p & q) for p, q in pairs) / len(pairs) / k)
    assert top_k_overlap(a, b, k=k).tolist() == pytest.approx(wanted)


def test_unrelated_maps_overlap_by_chance():
    found = top_k_overlap(maps(2000, 8, 8, seed=1), maps(2000, 8, 8, seed=2), share=0.1)
    assert found.mean().item() == pytest.approx(top_k_chance(64, share=0.1), abs=0.01)
    flat = torch.zeros(1, 8, 8)
    assert top_k_overlap(flat, flat, k=16).item() == pytest.approx(0.25)
    assert top_k_chance(64, k=16) == 0.25


def test_a_share_is_the_nearest_count():
    a, b = maps(seed=1), maps(seed=2)
    assert torch.equal(top_k_overlap(a, b, share=0.26), top_k_overlap(a, b, k=5))
    assert torch.equal(top_k_overlap(a, b, share=0.001), top_k_overlap(a, b, k=1))
    assert top_k_overlap(a, b, share=1.0).tolist() == [1.0] * 12


A = maps()


@pytest.mark.parametrize("function", [rank_correlation, lambda a, b: top_k_overlap(a, b, k=1)])
@pytest.mark.parametrize(
    ("a", "b", "error", "text"),
    [
        ([1.0], A, TypeError, "a must be a tensor of maps .* got list"),
        (A, A.numpy(), TypeError, "b must be a tensor of maps .* got ndarray"),
        (A, A[:3], ValueError, r"\(12, 4, 5\) and \(3, 4, 5\)"),
        (A[0, 0], A[0, 0], ValueError, "maps of one shape"),
        (A[:, :1, :1], A[:, :1, :1], ValueError, "two pixels or more"),
        (A, A / 0, ValueError, "b must be finite, got 240 NaN"),
    ],
)
def test_bad_maps_are_refused_in_words(function, a, b, error, text):
    with pytest.raises(error, match=text):
        function(a, b)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "give either k or share, got k=None"),
        ({"k": 1, "share": 0.5}, "either k or share"),
        ({"k": 0}, "from 1 to the number of pixels, 20; got 0"),
        ({"k": 21}, "got 21"),
        ({"k": 2.0}, "got 2.0"),
        ({"k": True}, "got True"),
        ({"share": 0}, r"share must be in \(0, 1\], got 0"),
        ({"share": 1.1}, "got 1.1"),
    ],
)
def test_k_or_share_must_fit(options, text):
    with pytest.raises(ValueError, match=text):
        top_k_overlap(A, A, **options)
