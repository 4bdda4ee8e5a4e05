"""Blends against their definition, and the loss against its two halves."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from course_lib.lab.blends import blended, follow_teacher, teacher_answers
from course_lib.lab.data import Split


@pytest.fixture
def split():
    return Split(torch.rand(6, 1, 2, 2), torch.arange(6))


def test_the_originals_come_first_and_unchanged(split):
    more = blended(split, 2, seed=3)
    assert len(more) == 18
    assert torch.equal(more.images[:6], split.images)
    assert more.labels.tolist() == [*range(6)] * 3


def test_each_blend_lies_between_its_image_and_another_and_nearer_to_its_own(split):
    more = blended(split, 1, seed=3)
    for i in range(6):
        blend, fits = more.images[6 + i], []
        for j in range(6):
            step = split.images[j] - split.images[i]
            share = float(((blend - split.images[i]) * step).sum() / step.pow(2).sum()) if i != j else 0.0
            if 0 <= share < 0.5 and torch.allclose(split.images[i] + share * step, blend, atol=1e-6):
                fits.append(share)
        assert fits


def test_the_seed_alone_decides(split):
    before = torch.random.get_rng_state()
    assert torch.equal(blended(split, 3, seed=1).images, blended(split, 3, seed=1).images)
    assert not torch.equal(blended(split, 3, seed=1).images, blended(split, 3, seed=2).images)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_no_copies_is_the_split_itself(split):
    assert torch.equal(blended(split, 0).images, split.images)


@pytest.mark.parametrize("copies", [-1, 1.5, True, "3"])
def test_bad_copies_are_refused(split, copies):
    with pytest.raises(ValueError, match="copies must be a whole number of at least 0"):
        blended(split, copies)


def test_the_loss_is_half_labels_and_half_soft_targets_at_two():
    torch.manual_seed(0)
    logits, answers, labels = torch.randn(4, 5), torch.randn(9, 5), torch.tensor([0, 4, 2, 2])
    index = torch.tensor([8, 0, 3, 3])
    p, log_q = F.softmax(answers[index] / 2, 1), F.log_softmax(logits / 2, 1)
    expected = 0.5 * F.cross_entropy(logits, labels) + 0.5 * 4 * F.kl_div(log_q, p, reduction="batchmean")
    assert torch.allclose(follow_teacher(logits, labels, index, answers), expected)


def test_answers_are_given_in_eval_mode_without_gradients(split):
    teacher = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 6))
    answers = teacher_answers(teacher, split)
    assert answers.shape == (6, 6)
    assert not answers.requires_grad
    assert torch.equal(answers, teacher_answers(teacher, split))
    assert teacher.training
