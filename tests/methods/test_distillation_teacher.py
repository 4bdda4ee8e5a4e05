import copy
import pickle

import pytest
import torch
from torch import nn

from course_lib.methods.distillation import frozen, precompute_logits


def make_teacher():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


class Holder(nn.Module):
    def __init__(self, teacher):
        super().__init__()
        self.teacher, self.own = teacher, nn.Linear(4, 3)


@pytest.mark.parametrize("start", [True, False])
def test_it_stays_in_eval_mode_whatever_train_does(start):
    expert = frozen(make_teacher().train(start))
    Holder(expert).train()
    assert expert.train() is expert
    assert expert.train(True).eval() is expert
    assert not any(module.training for module in expert.modules())


def test_a_part_put_into_train_mode_is_put_back_before_it_answers():
    teacher = make_teacher().eval()
    x = torch.randn(16, 4)
    expected = teacher(x).detach()
    expert = frozen(teacher)
    for module in expert.modules():
        module.train()
    assert torch.equal(expert(x), expected)
    assert torch.equal(expert[1].running_mean, teacher[1].running_mean)


def test_no_gradient_reaches_it_or_passes_it():
    expert = frozen(make_teacher())
    assert not any(p.requires_grad for p in expert.parameters())
    x = torch.randn(5, 4, requires_grad=True)
    assert not expert(x).requires_grad
    assert not expert.requires_grad_(True)(x).requires_grad


def test_the_original_stays_as_it_was_and_shares_nothing():
    teacher = make_teacher()
    before = copy.deepcopy(teacher.state_dict())
    expert = frozen(teacher)
    assert teacher.training
    assert all(p.requires_grad for p in teacher.parameters())
    assert type(teacher) is nn.Sequential
    assert list(expert.state_dict()) == list(before)
    teacher(torch.randn(8, 4)).sum().backward()
    with torch.no_grad():
        teacher[0].weight.zero_()
    for name, value in expert.state_dict().items():
        assert torch.equal(value, before[name])


def test_it_keeps_its_class_and_survives_copies_and_pickles():
    expert = frozen(make_teacher())
    x = torch.randn(3, 4)
    twice, copied, pickled = frozen(expert), copy.deepcopy(expert), pickle.loads(pickle.dumps(expert))
    for one in (expert, twice, copied, pickled):
        assert isinstance(one, nn.Sequential)
        assert one.train().training is False
        assert torch.equal(one(x), expert(x))
    assert type(twice) is type(expert)
    assert copied[0].weight.data_ptr() != expert[0].weight.data_ptr()


def test_only_modules_can_be_frozen():
    with pytest.raises(TypeError, match=r"torch.nn.Module, got function"):
        frozen(lambda x: x)


def test_precomputed_logits_are_the_teachers_whatever_the_batch_size():
    teacher = make_teacher().eval()
    images = torch.randn(11, 4)
    expected = teacher(images).detach()
    for batch_size in (1, 4, 1024):
        table = precompute_logits(frozen(teacher), images, batch_size=batch_size)
        torch.testing.assert_close(table, expected)
        assert not table.requires_grad


def test_a_teacher_in_train_mode_or_with_gradients_is_refused():
    images = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"train mode \(Sequential, 0, 1\).*frozen\(teacher\)"):
        precompute_logits(make_teacher(), images)
    with pytest.raises(ValueError, match=r"require gradients \(0.weight, 0.bias, 1.weight\)"):
        precompute_logits(make_teacher().eval(), images)
    with pytest.raises(TypeError, match="got NoneType"):
        precompute_logits(None, images)
    for bad in ({"images": images[:0]}, {"images": images, "batch_size": 0}):
        with pytest.raises(ValueError, match="at least one image"):
            precompute_logits(frozen(make_teacher()), **bad)
