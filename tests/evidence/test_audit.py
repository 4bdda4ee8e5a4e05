"""What was lost: classes, answers, exemplars in both directions, robustness, explanations."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torchmetrics.functional.classification import multiclass_recall

from course_lib.evidence.audit import (  # isort: skip
    churn, class_recall, find_exemplars, map_agreement, noise_curve, occlusion_map,
)  # fmt: skip


def draw(replicas=6, images=80, classes=3, seed=0):
    return torch.randint(classes, (replicas, images), generator=torch.Generator().manual_seed(seed))


# Classes


def test_recall_is_torchmetrics_also_with_images_of_its_own_for_each_replica():
    answers, labels = draw(5, 60, seed=1), draw(5, 60, seed=2)
    labels[0][labels[0] == 2] = 1
    found = class_recall(answers, labels)
    for row, own, shares in zip(answers, labels, found, strict=True):
        wanted = 100 * multiclass_recall(row, own, num_classes=3, average=None)
        np.testing.assert_allclose(shares, wanted.where(own.bincount(minlength=3) > 0, torch.nan), rtol=1e-6)
    np.testing.assert_array_equal(class_recall(answers, labels[1])[1], found[1])  # one set for all


# Answers


def test_churn_equals_a_loop():
    before, after, labels = draw(4, seed=1), draw(4, seed=2), draw(4, seed=3)
    found = churn(before, after, labels)
    for r in range(4):
        kinds = Counter()
        for a, b, y in zip(before[r].tolist(), after[r].tolist(), labels[r].tolist(), strict=True):
            if a != b:
                kinds["broken" if a == y else "repaired" if b == y else "otherwise"] += 1
        for kind in ("broken", "repaired", "otherwise"):
            assert found[kind][r] == pytest.approx(100 * kinds[kind] / 80)
        assert found["changed"][r] == pytest.approx(100 * sum(kinds.values()) / 80)


def tops(column):
    counts = Counter(column)
    return {label for label, n in counts.items() if n == max(counts.values())}


@pytest.mark.parametrize("replicas", [1, 3, 4, 6])
def test_exemplars_equal_a_loop_over_sets(replicas):
    a, b, labels = draw(replicas, seed=1), draw(replicas, seed=2), draw(1, seed=3)[0]
    wanted = {"broken": [], "repaired": [], "otherwise": []}
    for i in range(80):
        x, y, truth = a[:, i].tolist(), b[:, i].tolist(), int(labels[i])
        if not tops(x) & tops(y):
            kind = "broken" if truth in tops(x) else "repaired" if truth in tops(y) else "otherwise"
            wanted[kind].append((-sum(abs(x.count(k) - y.count(k)) for k in range(3)), i))
    found = find_exemplars(a, b, labels)
    for kind, rows in wanted.items():
        assert getattr(found, kind).tolist() == [i for _, i in sorted(rows)]
    assert sum(map(len, wanted.values())) > 0


def test_a_tie_that_holds_the_others_answer_is_no_exemplar():
    a = torch.tensor([[3], [3], [8], [8]])
    for other, count in (([8, 8, 8, 3], 0), ([3, 3, 3, 8], 0), ([5, 5, 5, 8], 1)):
        found = find_exemplars(a, torch.tensor(other)[:, None], torch.tensor([3]))
        assert [len(kind) for kind in (found.broken, found.repaired, found.otherwise)] == [count, 0, 0]


ANSWERS = draw(4, 5)


@pytest.mark.parametrize("function", [churn, find_exemplars])
@pytest.mark.parametrize(
    ("before", "after", "labels", "text"),
    [
        (ANSWERS, ANSWERS[:3], ANSWERS[0], r"got \(4, 5\), \(3, 5\), \(5,\)"),
        (ANSWERS[0], ANSWERS[0], ANSWERS[0], r"answers must be \[R, N\]"),
        (ANSWERS, ANSWERS, ANSWERS[0, :3], r"labels \[N\] or \[R, N\]"),
        (ANSWERS[:, :0], ANSWERS[:, :0], ANSWERS[0, :0], "answers must be"),
        (ANSWERS.float(), ANSWERS, ANSWERS[0], "class numbers from 0, not shares or logits"),
        (ANSWERS, ANSWERS - 1, ANSWERS[0], "class numbers from 0"),
    ],
)
def test_bad_answers_are_refused_in_words(function, before, after, labels, text):
    with pytest.raises((TypeError, ValueError), match=text):
        function(before, after, labels)


def test_exemplars_need_the_same_images():
    with pytest.raises(ValueError, match="the same images for all replicas"):
        find_exemplars(ANSWERS, ANSWERS, draw(4, 5, seed=9))


# Robustness and explanations


def linear(weight):
    model = nn.Sequential(nn.Flatten(), nn.Linear(weight.shape[1], len(weight), bias=False))
    model[1].weight.data.copy_(weight)
    return model.train()


def test_noise_is_one_draw_amplified():
    images = torch.randn(200, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    models = [linear(torch.randn(3, 4, generator=torch.Generator().manual_seed(s))) for s in (2, 3)]
    splits = [SimpleNamespace(images=images, labels=m(images).argmax(1)) for m in models]
    curve = noise_curve(models, splits, [0, 0.5], seed=4)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(4))
    for model, split, row in zip(models, splits, curve, strict=True):
        share = (model(images + 0.5 * noise).argmax(1) == split.labels).double().mean().item()
        assert row.tolist() == pytest.approx([100, 100 * share])
    assert curve[:, 1].max() < 100
    assert noise_curve(models, splits[0], [0])[0, 0] == 100  # one split for all
    assert all(m.training for m in models)
    with pytest.raises(ValueError, match="zip"):
        noise_curve(models, splits[:1], [0])


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (2, 1), (3, 2), (2, 2)])
def test_occlusion_of_a_linear_model_by_a_loop(size, stride):
    g = torch.Generator().manual_seed(0)
    images, weight = torch.randn(3, 2, 4, 5, generator=g), torch.randn(4, 40, generator=g)
    model, target = linear(weight), torch.tensor([0, 3, 1])
    dark = images.amin(dim=(0, 2, 3))
    tops = sorted({*range(0, 4 - size, stride), 4 - size})
    lefts = sorted({*range(0, 5 - size, stride), 5 - size})
    wanted = torch.zeros(3, 4, 5)
    for n in range(3):
        drop = (images[n] - dark[:, None, None]) * weight[target[n]].view(2, 4, 5)
        for y in range(4):
            for x in range(5):
                over = [(t, s) for t in tops for s in lefts if t <= y < t + size and s <= x < s + size]
                wanted[n, y, x] = sum(drop[:, t : t + size, s : s + size].sum() for t, s in over) / len(over)
    torch.testing.assert_close(occlusion_map(model, images, target, size=size, stride=stride), wanted)
    torch.testing.assert_close(occlusion_map(lambda x: model(x), images, target, size=size, stride=stride), wanted)
    assert model.training
    for bad in ((0, 0), (5, 1), (2, 3), (2, 0)):
        with pytest.raises(ValueError, match="stride <= size"):
            occlusion_map(model, images, target, size=bad[0], stride=bad[1])


def test_agreement_is_spearmans():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randint(5, (6, 4, 4), generator=g).float(), torch.randint(5, (6, 4, 4), generator=g).float()
    wanted = [stats.spearmanr(x.flatten().numpy(), y.flatten().numpy()).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(map_agreement(a, b), wanted, atol=1e-12)
    assert np.isnan(map_agreement(torch.ones(1, 2, 2), a[:1, :2, :2])).all()
    with pytest.raises(ValueError, match=r"one shape \[N, H, W\]"):
        map_agreement(a, b[:, :2])
