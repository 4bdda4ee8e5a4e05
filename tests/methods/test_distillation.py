import copy
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.nn import functional as F
from torch.nn.utils import prune

from course_lib.gate import UnsupportedModel

from course_lib.methods.distillation import (  # isort: skip
    decoupled_kd_loss, frozen, kd_loss, kd_terms, soft_target_loss, teacher_table,
)  # fmt: skip


def make(n=16, k=10, seed=0, dtype=torch.float64, scale=4.0):
    g = torch.Generator().manual_seed(seed)
    student = (scale * torch.randn(n, k, generator=g, dtype=dtype)).requires_grad_()
    teacher = scale * torch.randn(n, k, generator=g, dtype=dtype)
    return student, teacher, torch.randint(k, (n,), generator=g)


def reference_soft(student, teacher, temperature):
    divergence = torch.nn.KLDivLoss(reduction="batchmean")
    return temperature**2 * divergence(F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1))


def reference_kd(student, teacher, labels, temperature, alpha):
    return (1 - alpha) * F.cross_entropy(student, labels) + alpha * reference_soft(student, teacher, temperature)


def reference_decoupled(student, teacher, labels, t, alpha, beta):
    total = 0.0
    for z_s, z_t, y in zip(student / t, teacher / t, labels, strict=True):
        rest = [j for j in range(len(z_s)) if j != y]
        p, q = F.softmax(z_t, dim=0), F.softmax(z_s, dim=0)
        b_p, b_q = torch.stack([p[y], p[rest].sum()]), torch.stack([q[y], q[rest].sum()])
        target = F.kl_div(b_q.log(), b_p, reduction="sum")
        nontarget = F.kl_div(F.log_softmax(z_s[rest], dim=0), F.softmax(z_t[rest], dim=0), reduction="sum")
        total = total + alpha * target + beta * nontarget
    return total * t**2 / len(labels)


def value_and_grad(loss, student):
    (grad,) = torch.autograd.grad(loss, student, retain_graph=True)
    return loss.detach(), grad


def assert_same(ours, theirs, student, **tolerance):
    pair = value_and_grad(ours, student), value_and_grad(theirs, student)
    torch.testing.assert_close(*pair, **tolerance or {"rtol": 1e-9, "atol": 1e-12})


# --- the formula


@pytest.mark.parametrize("temperature", [0.5, 1, 4.0, np.float32(20)])
@pytest.mark.parametrize("alpha", [0, 0.1, np.float64(0.5), 1.0])
def test_value_and_gradient_equal_torchs_kl_div(temperature, alpha):
    student, teacher, labels = make()
    ours = kd_loss(student, teacher, labels, temperature=temperature, alpha=alpha)
    assert ours.shape == ()
    assert_same(ours, reference_kd(student, teacher, labels, float(temperature), alpha), student)
    soft = soft_target_loss(student, teacher, temperature=temperature)
    assert_same(soft, reference_soft(student, teacher, float(temperature)), student)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_terms_are_unweighted_and_the_two_ends_of_alpha_exact_bit_for_bit(as_tensor):
    student, teacher, labels = make(dtype=torch.float32)
    hard, soft = F.cross_entropy(student, labels), soft_target_loss(student, teacher, temperature=4.0)
    for alpha, expected in {0.0: hard, 0.3: 0.7 * hard + 0.3 * soft, 1.0: soft}.items():
        given = torch.tensor(alpha) if as_tensor else alpha
        terms = kd_terms(student, teacher, labels, temperature=4.0, alpha=given)
        assert list(terms) == ["loss", "ce", "soft"]
        assert (terms["ce"], terms["soft"]) == (hard, soft)
        for ours in (terms["loss"], kd_loss(student, teacher, labels, temperature=4.0, alpha=given)):
            assert_same(ours, expected, student, rtol=0, atol=0 if alpha in (0, 1) else 1e-6)


def test_t_squared_keeps_the_gradient_and_the_limit_is_matching_logits():
    # Hinton et al. 2015, equation 4: for large T the gradient is (z_s - z_t) / (N K), logits centred in each row.
    student, teacher, _ = make(scale=1.0)
    _, grad = value_and_grad(soft_target_loss(student, teacher, temperature=1e3), student)
    difference = student.detach() - teacher
    centred = difference - difference.mean(dim=1, keepdim=True)
    torch.testing.assert_close(grad, centred / student.numel(), rtol=0.02, atol=1e-5)


@pytest.mark.parametrize(("temperature", "alpha", "beta"), [(1.0, 1.0, 8.0), (4.0, 1.0, 8.0), (4.0, 0, 1), (2.0, 1, 0)])
def test_decoupled_equals_a_loop_over_images(temperature, alpha, beta):
    student, teacher, labels = make(scale=2.0)
    ours = decoupled_kd_loss(student, teacher, labels, temperature=temperature, alpha=alpha, beta=beta)
    assert_same(ours, reference_decoupled(student, teacher, labels, temperature, alpha, beta), student)


# --- more than [N, K] in float32


def all_losses(student, teacher, labels, temperature=2.0):
    return {
        "soft": soft_target_loss(student, teacher, temperature=temperature),
        "kd": kd_loss(student, teacher, labels, temperature=temperature, alpha=0.5),
        "decoupled": decoupled_kd_loss(student, teacher, labels, temperature=temperature, alpha=1.0, beta=8.0),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [4.0, 20.0, 50.0, torch.tensor(300.0).half()])
def test_half_precision_is_computed_in_float32(dtype, temperature):
    student, _, labels = make(n=64, scale=3.0)
    teacher = student.detach() + 0.3 * make(n=64, seed=1, scale=1.0)[0].detach()
    student, teacher = student.detach().to(dtype).requires_grad_(), teacher.to(dtype)
    wide = student.detach().double().requires_grad_()
    exact = all_losses(wide, teacher.double(), labels, float(temperature))
    for name, loss in all_losses(student, teacher, labels, temperature).items():
        assert loss.dtype == torch.float32
        value, grad = value_and_grad(loss, student)
        right, right_grad = value_and_grad(exact[name], wide)
        assert value.item() == pytest.approx(right.item(), rel=0.05 if float(temperature) < 100 else 0.5), name
        assert (grad.double() - right_grad).norm() < 0.02 * right_grad.norm(), name


def test_leading_dimensions_are_images_too():
    student, teacher, labels = make(n=12)
    flat = all_losses(student, teacher, labels)
    deep = all_losses(student.view(3, 4, 10), teacher.view(3, 4, 10), labels.view(3, 4))
    one = all_losses(student[0], teacher[0], labels[0])
    for name, loss in all_losses(student[:1], teacher[:1], labels[:1]).items():
        torch.testing.assert_close(deep[name], flat[name])
        torch.testing.assert_close(one[name], loss)


@pytest.mark.parametrize("gone", [-math.inf, torch.finfo(torch.float64).min])
def test_a_class_that_both_rule_out_costs_nothing(gone):
    student, teacher, labels = make()
    labels = labels % 9
    masked = (F.pad(z[:, :9], (0, 1), value=gone) for z in (student, teacher))
    plain = all_losses(student[:, :9], teacher[:, :9], labels)
    for name, loss in all_losses(*masked, labels).items():
        assert_same(loss, plain[name], student)


def test_what_only_one_rules_out():
    z, masked = torch.zeros(1, 2), torch.tensor([[0.0, -math.inf]])
    assert soft_target_loss(z, masked, temperature=1.0).item() == pytest.approx(math.log(2))
    assert soft_target_loss(masked, z, temperature=1.0) == math.inf
    assert kd_loss(masked, z, torch.tensor([0]), temperature=1.0, alpha=0) == 0  # and not 0 · ∞
    sure = torch.tensor([[1.0, -math.inf, -math.inf]], requires_grad=True)
    value, grad = value_and_grad(all_losses(sure, sure.detach(), torch.tensor([0]))["decoupled"], sure)
    assert (value, grad.any()) == (0, False)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_logits_of_ten_thousand_stay_finite_in_float32(temperature):
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [1e4, -1e4, -1e4]])
    labels = torch.tensor([1, 0])
    wide = student.detach().double().requires_grad_()
    exact = all_losses(wide, teacher.double(), labels, temperature)
    for name, loss in all_losses(student, teacher, labels, temperature).items():
        value, grad = value_and_grad(loss, student)
        assert grad.isfinite().all()
        assert value.item() == pytest.approx(exact[name].item(), rel=1e-6)


def test_every_loss_runs_under_vmap_with_a_setting_a_replica():
    students = torch.stack([make(seed=s)[0].detach() for s in range(3)]).requires_grad_()
    _, teacher, labels = make()
    known = torch.arange(48).view(3, 16) % 5 > 1
    temperatures, alphas = torch.tensor([1.0, 4.0, 20.0]).double(), torch.tensor([0.0, 0.5, 1.0]).double()

    def losses(z, t, a, known):
        soft = kd_loss(z, teacher, labels, temperature=t, alpha=a, labelled=known)
        return torch.stack([soft, decoupled_kd_loss(z, teacher, labels, temperature=t, alpha=a, beta=a)])

    mapped = vmap(losses)(students, temperatures, alphas, known)
    each = torch.stack([losses(*row) for row in zip(students, temperatures, alphas, known, strict=True)])
    torch.testing.assert_close(mapped, each)
    torch.testing.assert_close(*[torch.autograd.grad(x.sum(), students)[0] for x in (mapped, each)])


@pytest.mark.parametrize("alpha", [0, 0.3, 1.0])
def test_with_some_labels_unknown_the_hard_term_is_the_mean_over_the_known(alpha):
    student, teacher, labels = make()
    labelled = torch.arange(16) % 3 == 0
    expected = (1 - alpha) * F.cross_entropy(student[labelled], labels[labelled])
    expected = expected + alpha * reference_soft(student, teacher, 4.0)
    for elsewhere in (labels, torch.where(labelled, labels, -1), torch.where(labelled, labels, 3)):
        ours = kd_loss(student, teacher, elsewhere, temperature=4.0, alpha=alpha, labelled=labelled)
        assert_same(ours, expected, student)
    nothing = torch.zeros(16, dtype=torch.bool)
    value, grad = value_and_grad(kd_loss(student, teacher, labels, temperature=2, alpha=0, labelled=nothing), student)
    assert (value, grad.any()) == (0, False)


# --- what is turned down


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"temperature": 0}, ValueError, "temperature must be a finite number above 0, got 0"),
        ({"alpha": -0.1}, ValueError, "alpha must be a finite number .*, got -0.1"),
        ({"alpha": True}, TypeError, "alpha must be a number, got bool"),
        ({"teacher": torch.zeros(16, 9)}, ValueError, r"same shape \[\.\.\., K\].*got \(16, 10\) and \(16, 9\)"),
        ({"teacher": torch.zeros(16, 10, requires_grad=True)}, ValueError, r"frozen\(teacher\)"),
        ({"student": torch.zeros(16, 10).long()}, TypeError, "student_logits must be a floating-point"),
        ({"student": torch.zeros(0, 10), "teacher": torch.zeros(0, 10)}, ValueError, "empty batch"),
        ({"labels": torch.full((16,), 10)}, ValueError, "0 to 9 for 10 classes, got 10 to 10"),
        ({"labels": torch.full((16,), -100)}, ValueError, "got -100 to -100"),  # torch would ignore these
        ({"labels": torch.zeros(16)}, TypeError, "int64 tensor.* got dtype torch.float32"),
        ({"labels": torch.zeros(15).long()}, ValueError, r"shape \(16,\) to fit logits \(16, 10\), got \(15,\)"),
    ],
)
def test_bad_input_is_refused_in_words(change, error, text):
    student, teacher, labels = make()
    given = {"student": student, "teacher": teacher, "labels": labels, "temperature": 4.0, "alpha": 0.5, **change}
    order = [given.pop(name) for name in ("student", "teacher", "labels")]
    with pytest.raises(error, match=text):
        kd_loss(*order, **given)
    with pytest.raises(error, match=text):
        decoupled_kd_loss(*order, beta=1.0, **given)


def test_weights_and_masks_that_do_not_fit():
    student, teacher, labels = make()
    with pytest.raises(ValueError, match=r"alpha must be a finite number in \[0, 1\], got 1.1"):
        kd_loss(student, teacher, labels, temperature=4.0, alpha=1.1)
    with pytest.raises(ValueError, match="beta must be a finite number of at least 0, got -1"):
        decoupled_kd_loss(student, teacher, labels, temperature=1.0, alpha=1.0, beta=-1)
    assert not any(all_losses(student[:, :1], teacher[:, :1], labels * 0).values())  # one class: nothing to learn
    for mask, error in ((torch.ones(16), TypeError), ([True] * 16, TypeError), (torch.ones(15) > 0, ValueError)):
        with pytest.raises(error, match="labelled must"):
            kd_loss(student, teacher, labels, temperature=4.0, alpha=0.5, labelled=mask)


# --- the teacher's side


def make_teacher():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: torch.compile(m, backend="eager")], ids=["plain", "compiled"])
def test_a_frozen_teacher_stays_in_eval_mode_and_gives_no_gradient(wrap):
    teacher = make_teacher()
    x = torch.randn(16, 4, requires_grad=True)
    expected = copy.deepcopy(teacher).eval()(x).detach()
    expert = frozen(wrap(teacher))
    nn.Sequential(expert).train()
    assert expert.train() is expert
    assert not any(module.training for module in expert.modules())
    before = copy.deepcopy(expert.state_dict())
    for module in [*expert.modules()][::-1]:  # each part by itself, and by its flag
        module.train()
        module.training = True
    nn.Sequential(expert).requires_grad_(True)
    expert.requires_grad_(True)
    answer = expert(x)
    assert not answer.requires_grad
    assert torch.equal(answer, expected)
    assert all(torch.equal(value, before[name]) for name, value in expert.state_dict().items())


def test_the_original_stays_as_it_was_and_shares_nothing():
    teacher = make_teacher()
    before = copy.deepcopy(teacher.state_dict())
    expert = frozen(teacher)
    assert teacher.training
    assert type(teacher) is nn.Sequential
    assert all(p.requires_grad for p in teacher.parameters())
    assert not any(p.requires_grad for p in expert.requires_grad_(True).parameters())
    with torch.no_grad():
        teacher(torch.randn(8, 4))  # moves BatchNorm's statistics
        teacher[0].weight.zero_()
    assert all(torch.equal(value, before[name]) for name, value in expert.state_dict().items())


def test_it_keeps_its_class_and_survives_copies_and_pickles():
    expert, x = frozen(make_teacher()), torch.randn(3, 4)
    for one in (frozen(expert), copy.deepcopy(expert), pickle.loads(pickle.dumps(expert))):
        assert type(one) is type(expert)
        assert isinstance(one, nn.Sequential)
        assert one.train().training is False
        assert torch.equal(one(x), expert(x))
        assert one[0].weight.data_ptr() != expert[0].weight.data_ptr()


def test_what_cannot_be_frozen_says_so():
    with pytest.raises(TypeError, match=r"torch.nn.Module, got function"):
        frozen(lambda x: x)
    pruned = make_teacher()
    prune.l1_unstructured(pruned[0], "weight", amount=0.5)
    with pytest.raises(UnsupportedModel, match=r"cannot freeze '0' .*prune\.remove"):
        frozen(pruned)
    with pytest.raises(UnsupportedModel, match="TorchScript"), pytest.warns(FutureWarning):
        frozen(torch.jit.script(nn.Linear(2, 2)))


def test_a_table_holds_the_answers_of_eval_mode_to_all_images():
    teachers, images = [make_teacher(), make_teacher().eval()], [torch.randn(1100, 4), torch.randn(1100, 4)]
    teachers[0](images[0])
    expected = torch.stack([frozen(t)(x) for t, x in zip(teachers, images, strict=True)])
    splits = [SimpleNamespace(images=x) for x in images]
    for given in (images, splits):
        table = teacher_table(teachers, given)
        torch.testing.assert_close(table, expected)
        assert not table.requires_grad
    assert [t.training for t in teachers] == [True, False]
    torch.testing.assert_close(teacher_table(teachers, splits[0])[0], expected[0])
    torch.testing.assert_close(teacher_table(teachers[0], images[0]), expected[0])
    hidden = teacher_table(teachers[0], images[0], layer="2")
    torch.testing.assert_close(hidden, frozen(teachers[0])[:3](images[0]))
    assert not any(module._forward_hooks for module in teachers[0].modules())


def test_a_table_needs_images_for_each_teacher():
    teacher, images = make_teacher(), torch.randn(3, 4)
    for given in ((teacher, images[:0]), ([teacher], [images] * 2), ([], images), ([teacher], [])):
        with pytest.raises(ValueError, match="need images for each of"):
            teacher_table(*given)
