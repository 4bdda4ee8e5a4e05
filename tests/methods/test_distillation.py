import math

import pytest
import torch
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from course_lib.methods.distillation import (
    KnowledgeDistillation,
    decoupled_kd_loss,
    decoupled_kd_terms,
    kd_loss,
    kd_terms,
    mutual_learning_loss,
    soft_target_loss,
)


def make(n=16, k=10, seed=0, dtype=torch.float64, scale=4.0):
    g = torch.Generator().manual_seed(seed)
    student = (scale * torch.randn(n, k, generator=g, dtype=dtype)).requires_grad_()
    teacher = scale * torch.randn(n, k, generator=g, dtype=dtype)
    return student, teacher, torch.randint(k, (n,), generator=g)


def reference_soft(student, teacher, temperature):
    return temperature**2 * F.kl_div(
        F.log_softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1), reduction="batchmean"
    )


def reference_kd(student, teacher, labels, temperature, alpha):
    return (1 - alpha) * F.cross_entropy(student, labels) + alpha * reference_soft(student, teacher, temperature)


def value_and_grad(loss, student):
    (grad,) = torch.autograd.grad(loss, student)
    return loss.detach(), grad


def assert_same(ours, theirs, student):
    for a, b in zip(value_and_grad(ours, student), value_and_grad(theirs, student), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1, 2.0, 4.0, 20.0])
@pytest.mark.parametrize("alpha", [0, 0.1, 0.5, 0.9, 1.0])
def test_value_and_gradient_equal_kl_div(temperature, alpha):
    student, teacher, labels = make()
    ours = kd_loss(student, teacher, labels, temperature=temperature, alpha=alpha)
    assert ours.shape == ()
    assert_same(ours, reference_kd(student, teacher, labels, temperature, alpha), student)
    soft = soft_target_loss(student, teacher, temperature=temperature)
    assert_same(soft, reference_soft(student, teacher, temperature), student)


def test_the_formula_by_hand():
    # p = softmax(3/2, 0) and q = softmax(1/2, 0), in plain arithmetic
    p, q = 1 / (1 + math.exp(-1.5)), 1 / (1 + math.exp(-0.5))
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    expected = 0.25 * math.log(1 + math.exp(-1)) + 0.75 * 4 * kl
    z_s, z_t = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[3.0, 0.0]]).double()
    assert kd_loss(z_s, z_t, torch.tensor([0]), temperature=2, alpha=0.75).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_two_ends_of_alpha_are_exact_bit_for_bit(dtype, as_tensor):
    student, teacher, labels = make(dtype=dtype)
    ends = {0.0: F.cross_entropy(student, labels), 1.0: soft_target_loss(student, teacher, temperature=4.0)}
    for alpha, expected in ends.items():
        given = torch.tensor(alpha, dtype=dtype) if as_tensor else alpha
        ours = kd_loss(student, teacher, labels, temperature=4.0, alpha=given)
        for a, b in zip(value_and_grad(ours, student), value_and_grad(expected, student), strict=True):
            assert torch.equal(a, b)


# Mistakes that real projects made. If one of them gave the same number as our loss, our tests could not tell.
def swapped(student, teacher, labels, t, a):
    return (1 - a) * F.cross_entropy(student, labels) + a * reference_soft(teacher, student, t)


def teacher_twice(student, teacher, labels, t, a):
    return (1 - a) * F.cross_entropy(teacher, labels) + a * reference_soft(student, teacher, t)


def mean_over_all(student, teacher, labels, t, a):
    # What reduction="mean" gives: torch warns of it, and our tests turn warnings into errors.
    return (1 - a) * F.cross_entropy(student, labels) + a * reference_soft(student, teacher, t) / student.shape[1]


def teacher_against_itself(student, teacher, labels, t, a):
    # The soft term of a project that read the teacher twice: always 0, so that nothing is distilled.
    return (1 - a) * F.cross_entropy(student, labels) + a * reference_soft(teacher, teacher, t)


def without_t_squared(student, teacher, labels, t, a):
    return (1 - a) * F.cross_entropy(student, labels) + a * reference_soft(student, teacher, t) / t**2


def weights_exchanged(student, teacher, labels, t, a):
    return reference_kd(student, teacher, labels, t, 1 - a)


@pytest.mark.parametrize(
    "mutant",
    [swapped, teacher_twice, teacher_against_itself, mean_over_all, without_t_squared, weights_exchanged],
    ids=lambda f: f.__name__,
)
def test_each_published_mistake_would_be_caught(mutant):
    student, teacher, labels = make()
    ours = kd_loss(student, teacher, labels, temperature=4.0, alpha=0.7)
    wrong = mutant(student, teacher, labels, 4.0, 0.7)
    value, grad = value_and_grad(ours, student)
    wrong_value, wrong_grad = value_and_grad(wrong, student)
    assert (value - wrong_value).abs() > 1e-2 * value
    assert (grad - wrong_grad).norm() > 0.05 * grad.norm()


def test_terms_are_unweighted_and_there_at_both_ends():
    student, teacher, labels = make()
    for alpha in (0.0, 0.3, 1.0):
        terms = kd_terms(student, teacher, labels, temperature=3.0, alpha=alpha)
        assert list(terms) == ["loss", "ce", "soft"]
        torch.testing.assert_close(terms["ce"], F.cross_entropy(student, labels))
        torch.testing.assert_close(terms["soft"], reference_soft(student, teacher, 3.0))


def test_a_student_that_agrees_has_no_soft_loss_and_no_gradient():
    _, teacher, _ = make()
    student = (teacher + 7.0).requires_grad_()  # softmax does not see a constant
    value, grad = value_and_grad(soft_target_loss(student, teacher, temperature=2.0), student)
    assert value.abs() < 1e-12
    assert grad.abs().max() < 1e-12


def test_t_squared_keeps_the_gradient_and_the_limit_is_matching_logits():
    # Hinton et al. 2015, equation 4: for large T the gradient is (z_s - z_t) / (N K), logits centred in each row.
    student, teacher, _ = make(scale=1.0)
    _, grad = value_and_grad(soft_target_loss(student, teacher, temperature=1e3), student)
    difference = student.detach() - teacher
    centred = difference - difference.mean(dim=1, keepdim=True)
    torch.testing.assert_close(grad, centred / student.numel(), rtol=0.02, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_logits_of_ten_thousand_stay_finite_in_float32(temperature):
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [1e4, -1e4, -1e4]])
    labels = torch.tensor([1, 0])
    losses = [
        kd_loss(student, teacher, labels, temperature=temperature, alpha=0.5),
        decoupled_kd_loss(student, teacher, labels, temperature=temperature, alpha=1.0, beta=8.0),
        mutual_learning_loss(student, teacher, labels, temperature=temperature),
    ]
    for loss in losses:
        value, grad = value_and_grad(loss, student)
        assert value.isfinite()
        assert grad.isfinite().all()
    exact = reference_kd(student.double(), teacher.double(), labels, temperature, 0.5)
    assert losses[0].item() == pytest.approx(exact.item(), rel=1e-6)


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


@pytest.mark.parametrize(("temperature", "alpha", "beta"), [(1.0, 1.0, 8.0), (4.0, 1.0, 8.0), (4.0, 0, 1), (2.0, 1, 0)])
def test_decoupled_equals_a_loop_over_images(temperature, alpha, beta):
    student, teacher, labels = make(scale=2.0)
    ours = decoupled_kd_loss(student, teacher, labels, temperature=temperature, alpha=alpha, beta=beta)
    assert_same(ours, reference_decoupled(student, teacher, labels, temperature, alpha, beta), student)


def test_the_two_parts_add_up_to_the_soft_term():
    student, teacher, labels = (x[:1] for x in make())
    terms = decoupled_kd_terms(student, teacher, labels, temperature=3.0, alpha=1.0, beta=1.0)
    p_right = F.softmax(teacher / 3.0, dim=1)[0, labels[0]]
    whole = terms["target"] + (1 - p_right) * terms["nontarget"]
    torch.testing.assert_close(whole, soft_target_loss(student, teacher, temperature=3.0))


def test_mutual_learning_trains_one_side_at_a_time():
    student, peer, labels = make()
    peer.requires_grad_()
    loss = mutual_learning_loss(student, peer, labels, temperature=2.0)
    expected = F.cross_entropy(student, labels) + reference_soft(student, peer.detach(), 2.0)
    assert_same(loss, expected, student)
    loss = mutual_learning_loss(student, peer, labels)
    loss.backward()
    assert peer.grad is None


def test_every_loss_runs_under_vmap_with_a_setting_a_replica():
    students = torch.stack([make(seed=s)[0].detach() for s in range(3)]).requires_grad_()
    _, teacher, labels = make()
    temperatures, alphas = torch.tensor([1.0, 4.0, 20.0]).double(), torch.tensor([0.0, 0.5, 1.0]).double()

    def losses(z, t, a):
        return torch.stack(
            [
                kd_loss(z, teacher, labels, temperature=t, alpha=a),
                decoupled_kd_loss(z, teacher, labels, temperature=t, alpha=a, beta=a),
                mutual_learning_loss(z, teacher, labels, temperature=t),
            ]
        )

    mapped = vmap(losses)(students, temperatures, alphas)
    each = torch.stack([losses(z, t, a) for z, t, a in zip(students, temperatures, alphas, strict=True)])
    torch.testing.assert_close(mapped, each)
    grads = [torch.autograd.grad(x.sum(), students)[0] for x in (mapped, each)]
    torch.testing.assert_close(*grads)


def test_replicas_train_under_vmap_through_kd_loss():
    models = [torch.nn.Linear(4, 3) for _ in range(2)]
    params, buffers = stack_module_state(models)
    x, teacher, labels = torch.randn(6, 4), torch.randn(6, 3), torch.arange(6) % 3

    def loss(p, b):
        logits = functional_call(models[0], (p, b), (x,))
        return kd_terms(logits, teacher, labels, temperature=4.0, alpha=0.9)

    vmap(loss)(params, buffers)["loss"].sum().backward()
    for r, model in enumerate(models):
        kd_loss(model(x), teacher, labels, temperature=4.0, alpha=0.9).backward()
        torch.testing.assert_close(params["weight"].grad[r], model.weight.grad)


def test_the_table_looks_up_its_rows():
    student, teacher, labels = make(n=6)
    index = torch.tensor([5, 0, 3])
    loss_fn = KnowledgeDistillation(teacher, temperature=2.0, alpha=0.25)
    terms = loss_fn(student[index], labels[index], index)
    expected = reference_kd(student[index], teacher[index], labels[index], 2.0, 0.25)
    torch.testing.assert_close(terms["loss"], expected)
    for bad in ({"temperature": 0}, {"alpha": 2}, {"teacher_logits": student}):
        with pytest.raises(ValueError):
            KnowledgeDistillation(**{"teacher_logits": teacher, **bad})


GOOD = {"temperature": 4.0, "alpha": 0.5}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"temperature": 0}, ValueError, "temperature must be a finite number above 0, got 0"),
        ({"temperature": -2.0}, ValueError, "got -2.0"),
        ({"temperature": math.nan}, ValueError, "got nan"),
        ({"alpha": -0.1}, ValueError, r"alpha must be in \[0, 1\], got -0.1"),
        ({"alpha": 1.1}, ValueError, r"alpha must be in \[0, 1\], got 1.1"),
        ({"alpha": math.nan}, ValueError, "got nan"),
        ({"alpha": torch.tensor(2.0)}, ValueError, "got 2.0"),
        ({"alpha": torch.ones(2)}, ValueError, r"got shape \(2,\)"),
        ({"alpha": "0.5"}, TypeError, "alpha must be a number, got str"),
        ({"alpha": True}, TypeError, "alpha must be a number, got bool"),
        ({"teacher": torch.zeros(16, 9)}, ValueError, r"same shape \[N, K\], got \(16, 10\) and \(16, 9\)"),
        ({"teacher": torch.zeros(10)}, ValueError, r"teacher_logits must be \[N, K\]"),
        ({"teacher": torch.zeros(16, 10, requires_grad=True)}, ValueError, r"frozen\(teacher\)"),
        ({"teacher": torch.full((16, 10), math.nan)}, ValueError, "teacher_logits must be finite, got 160 NaN"),
        ({"student": torch.full((16, 10), math.inf)}, ValueError, "student_logits must be finite"),
        ({"student": torch.zeros(16, 10).long()}, TypeError, "student_logits must be a floating-point"),
        ({"student": [[1.0]]}, TypeError, "got list"),
        ({"student": torch.zeros(0, 10), "teacher": torch.zeros(0, 10)}, ValueError, "empty batch"),
        ({"student": torch.zeros(4, 1), "teacher": torch.zeros(4, 1)}, ValueError, "K >= 2"),
        ({"labels": torch.full((16,), 10)}, ValueError, "0 to 9 for 10 classes, got 10 to 10"),
        ({"labels": torch.full((16,), -1)}, ValueError, "got -1 to -1"),
        ({"labels": torch.zeros(16)}, TypeError, "int64 tensor .* got dtype torch.float32"),
        ({"labels": [0] * 16}, TypeError, "got list"),
        ({"labels": torch.zeros(15).long()}, ValueError, r"shape \(16,\) to fit logits \(16, 10\), got \(15,\)"),
    ],
)
def test_bad_input_is_refused_in_words(change, error, text):
    student, teacher, labels = make()
    given = {"student": student, "teacher": teacher, "labels": labels, **GOOD, **change}
    order = [given.pop(name) for name in ("student", "teacher", "labels")]
    with pytest.raises(error, match=text):
        kd_loss(*order, **given)
    if "alpha" not in change:
        with pytest.raises(error, match=text):
            decoupled_kd_loss(*order, beta=1.0, **given)


def test_decoupled_weights_may_exceed_one_but_not_fall_below_zero():
    student, teacher, labels = make()
    decoupled_kd_loss(student, teacher, labels, temperature=1.0, alpha=1.0, beta=8.0)
    with pytest.raises(ValueError, match="beta must be at least 0 and finite, got -1"):
        decoupled_kd_loss(student, teacher, labels, temperature=1.0, alpha=1.0, beta=-1)


@pytest.mark.parametrize("alpha", [0, 0.3, 1.0])
def test_with_some_labels_unknown_the_hard_term_is_the_mean_over_the_known(alpha):
    student, teacher, labels = make()
    labelled = torch.arange(16) % 3 == 0
    for elsewhere in (labels, torch.where(labelled, labels, -1), torch.where(labelled, labels, 3)):
        expected = (1 - alpha) * F.cross_entropy(student[labelled], labels[labelled])
        expected = expected + alpha * reference_soft(student, teacher, 4.0)
        ours = kd_loss(student, teacher, elsewhere, temperature=4.0, alpha=alpha, labelled=labelled)
        assert_same(ours, expected, student)


def test_marking_all_is_marking_none_and_a_batch_without_labels_has_no_hard_term():
    student, teacher, labels = make()
    everything, nothing = torch.ones(16, dtype=torch.bool), torch.zeros(16, dtype=torch.bool)
    ours = kd_loss(student, teacher, labels, temperature=2.0, alpha=0.4, labelled=everything)
    assert_same(ours, kd_loss(student, teacher, labels, temperature=2.0, alpha=0.4), student)
    unlabelled = kd_loss(student, teacher, labels, temperature=2.0, alpha=0, labelled=nothing)
    value, grad = value_and_grad(unlabelled, student)
    assert value == 0
    assert not grad.any()


def test_a_mask_a_replica_runs_under_vmap_and_through_the_table():
    student, teacher, labels = make(n=6)
    masks = torch.tensor([[True] * 6, [False, True] * 3])
    mapped = vmap(lambda m: kd_loss(student, teacher, labels, temperature=2.0, alpha=0.5, labelled=m))(masks)
    for mask, ours in zip(masks, mapped, strict=True):
        torch.testing.assert_close(ours, kd_loss(student, teacher, labels, temperature=2.0, alpha=0.5, labelled=mask))
    index = torch.tensor([5, 0, 3])
    terms = KnowledgeDistillation(teacher, 2.0, 0.5, masks[1])(student[index], labels[index], index)
    torch.testing.assert_close(terms["ce"], F.cross_entropy(student[[5, 3]], labels[[5, 3]]))


@pytest.mark.parametrize(
    ("labelled", "error", "text"),
    [
        (torch.ones(16), TypeError, "labelled must be a bool tensor .* got dtype torch.float32"),
        ([True] * 16, TypeError, "got list"),
        (torch.ones(15, dtype=torch.bool), ValueError, r"labelled must have shape \(16,\), .* got \(15,\)"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(labelled, error, text):
    student, teacher, labels = make()
    with pytest.raises(error, match=text):
        kd_loss(student, teacher, labels, **GOOD, labelled=labelled)
    with pytest.raises(error, match=text):
        KnowledgeDistillation(teacher, labelled=labelled)
    with pytest.raises(ValueError, match="0 to 9 for 10 classes, got 0 to 10"):
        kd_loss(student, teacher, labels * 0 + 10, **GOOD, labelled=torch.arange(16) > 7)
