import pytest
import torch
from torch import nn
from torch.func import vmap

from course_lib.methods.distillation_checks import check_features, check_logits, check_teacher, check_weight, true


def test_truth_is_read_where_it_can_be():
    assert true(torch.tensor(True))
    assert not true(torch.tensor(False))
    assert true(torch.zeros((), dtype=torch.bool, device="meta"))


def test_values_pass_under_vmap_and_shapes_do_not():
    bad_values = torch.full((2, 3, 4), torch.nan)
    vmap(lambda z: check_logits("logits", z) or z.sum())(bad_values)
    with pytest.raises(ValueError, match=r"logits must be \[N, K\]"):
        vmap(lambda z: check_logits("logits", z) or z.sum())(bad_values[0])


def test_a_weight_may_be_a_tensor_without_dimensions():
    check_weight("alpha", torch.tensor(0.5), most=1.0)
    check_weight("beta", 8)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 1.5"):
        check_weight("alpha", torch.tensor(1.5), most=1.0)


@pytest.mark.parametrize(
    ("student", "teacher", "error", "text"),
    [
        ([1.0], torch.ones(1, 1), TypeError, "student_features must be a floating-point tensor, got list"),
        (torch.ones(2, 3), torch.ones(2, 3).long(), TypeError, "teacher_features .* got dtype torch.int64"),
        (torch.ones(2), torch.ones(2, 3), ValueError, r"at least 2 dimensions, .* got shape \(2,\)"),
        (torch.ones(0, 3), torch.ones(0, 3), ValueError, r"student_features is empty, shape \(0, 3\)"),
        (torch.ones(2, 3), torch.ones(4, 3), ValueError, "got 2 and 4 rows"),
        (torch.ones(2, 3), torch.ones(2, 3, requires_grad=True), ValueError, "would train the teacher"),
    ],
)
def test_bad_features_are_refused(student, teacher, error, text):
    with pytest.raises(error, match=text):
        check_features(student, teacher, least_dims=2)


def test_a_good_teacher_passes():
    check_teacher(nn.Linear(2, 2).eval().requires_grad_(False))
