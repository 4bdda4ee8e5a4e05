import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from course_lib.gate import UnsupportedModel

from course_lib.methods.distillation_features import (  # isort: skip
    attention_map, attention_map_loss, hint_loss, relational_distance_loss, tap_features,
)  # fmt: skip

LOSSES = [hint_loss, attention_map_loss, relational_distance_loss]


def make_net(width=6):
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(width * 16, 3))


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(ours, expected, student):
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*[torch.autograd.grad(x, student)[0] for x in (ours, expected)])


def test_a_tap_reads_a_layer_and_changes_no_answer():
    net, seen, x = make_net(), {}, torch.randn(2, 1, 4, 4)
    expected = net(x)
    with tap_features(net, "1", seen):
        assert torch.equal(net(x), expected)
    assert torch.equal(seen.pop("1"), net[1](net[0](x)))
    net(x)
    assert seen == {}


def test_an_adapter_is_a_parameter_of_the_model_and_learns():
    net, seen = make_net(), {}
    tap_features(net, "1", seen, adapter=nn.Conv2d(6, 9, 1))
    assert "1.adapter.weight" in dict(net.named_parameters())
    net(torch.randn(2, 1, 4, 4))
    hint_loss(seen["1"], torch.ones(2, 9, 4, 4)).backward()
    assert net[1].adapter.weight.grad.abs().sum() > 0
    assert net[0].weight.grad.abs().sum() > 0
    assert net[3].weight.grad is None
    with pytest.raises(ValueError, match="layer '1' has an adapter already"):
        tap_features(net, "1", seen, adapter=nn.Identity())


def test_a_deep_copy_uses_its_own_adapter_also_under_vmap():
    seen, x, hint = {}, torch.randn(2, 1, 4, 4), torch.ones(2, 9, 4, 4)
    nets = [make_net() for _ in range(2)]
    for net in nets:
        tap_features(net, "1", seen, adapter=nn.Conv2d(6, 9, 1))
    skeleton = copy.deepcopy(nets[0]).to("meta")
    params, buffers = stack_module_state(nets)

    def loss(p, b):
        functional_call(skeleton, (p, b), (x,))
        return hint_loss(seen["1"], hint)

    mapped = vmap(loss)(params, buffers)
    mapped.sum().backward()
    for r, net in enumerate(nets):
        net(x)
        one = hint_loss(seen["1"], hint)
        one.backward()
        torch.testing.assert_close(mapped[r], one)
        torch.testing.assert_close(params["1.adapter.weight"].grad[r], net[1].adapter.weight.grad)


def test_what_cannot_be_tapped_is_named():
    for name in ("conv9", ""):
        with pytest.raises(ValueError, match=r"no layer .* it has: 0, 1, 2, 3"):
            tap_features(make_net(), name, {})
    relu = nn.ReLU()
    for name in ("1", "3"):  # the second use would overwrite the first
        with pytest.raises(UnsupportedModel, match="1, 3 are one ReLU"):
            tap_features(nn.Sequential(nn.Linear(2, 2), relu, nn.Linear(2, 2), relu), name, {})
    recurrent = nn.Sequential(nn.LSTM(2, 2))
    tap_features(recurrent, "0", {})
    with pytest.raises(TypeError, match="layer '0' gives a tuple"):
        recurrent(torch.ones(1, 2))


def test_hints_are_a_mean_squared_difference():
    student, teacher = features(4, 3).requires_grad_(), features(4, 3, seed=1)
    assert_same(hint_loss(student, teacher), F.mse_loss(student, teacher), student)


def test_attention_equals_a_loop_and_needs_no_equal_channels():
    student, teacher = features(4, 3, 2, 5).requires_grad_(), features(4, 7, 2, 5, seed=1)
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        q_s, q_t = (f.pow(2).sum(dim=0).flatten() for f in (s, t))
        expected = expected + ((q_s / q_s.norm() - q_t / q_t.norm()) ** 2).sum() / 4
    assert_same(attention_map_loss(student, teacher), expected, student)
    assert attention_map_loss(3 * teacher, teacher).item() == pytest.approx(0, abs=1e-12)
    assert torch.equal(attention_map(torch.zeros(1, 2, 2, 2)), torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"\[N, C, H, W\], got shape \(2, 3\)"):
        attention_map(torch.ones(2, 3))


def test_distances_equal_a_loop_over_pairs():
    student, teacher = features(5, 3).requires_grad_(), features(5, 2, 4, seed=1)

    def pairs(rows):
        d = torch.stack([(rows[i] - rows[j]).norm() for i in range(5) for j in range(5) if i != j])
        return d / d.mean()

    expected = F.smooth_l1_loss(pairs(student), pairs(teacher.flatten(1)), reduction="sum") / 25
    assert_same(relational_distance_loss(student, teacher), expected, student)


def test_relations_do_not_see_scale_shift_or_rotation_and_twins_have_a_gradient():
    rows = features(6, 3)
    turn = torch.linalg.qr(features(3, 3, seed=2)).Q
    assert relational_distance_loss(4 * rows @ turn + 1.5, rows).item() == pytest.approx(0, abs=1e-12)
    for twins in (features(3, 4).repeat(2, 1), torch.ones(6, 4)):
        twins = twins.requires_grad_()
        relational_distance_loss(twins, features(6, 4, seed=1)).backward()
        assert twins.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 300), (torch.bfloat16, 1), (torch.float32, 1e-25)])
def test_half_precision_and_extreme_sizes(loss, dtype, size):
    # 300² overflows in float16, and (1e-25)² vanishes in float32
    student, teacher = (size * features(4, 3, 2, 2, seed=s).to(dtype) for s in (0, 1))
    exact = loss(student.double(), teacher.double())
    assert loss(student, teacher).dtype == torch.float32
    if size >= 1 or loss is not hint_loss:
        assert loss(student, teacher).item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_features_that_do_not_fit_are_refused(loss):
    good = torch.ones(4, 3, 2, 2)
    for student, teacher, error, text in (
        (good, good[:3], ValueError, r"\(4, 3, 2, 2\) and teacher_features \(3, 3, 2, 2\) must come from the same"),
        (good, good.clone().requires_grad_(), ValueError, r"frozen\(teacher\)"),
        (good.long(), good, TypeError, "student_features must be a floating-point tensor"),
        (good, None, TypeError, "teacher_features must .* got NoneType"),
    ):
        with pytest.raises(error, match=text):
            loss(student, teacher)
    if loss is not relational_distance_loss:
        with pytest.raises(ValueError, match="adapter, or choose layers of equal size"):
            loss(good, torch.ones(4, 3, 2, 1))
    else:
        with pytest.raises(ValueError, match="at least 2"):
            loss(good[:1], good[:1])


@pytest.mark.parametrize("loss", LOSSES)
def test_feature_losses_run_under_vmap(loss):
    students, teacher = features(3, 4, 2, 2, 2), features(4, 2, 2, 2, seed=1)
    torch.testing.assert_close(
        vmap(lambda s: loss(s, teacher))(students), torch.stack([loss(s, teacher) for s in students])
    )


def test_what_is_written_is_the_layers_own_output():
    net, x, seen = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), torch.randn(3, 4), {}
    with tap_features(net, "0", seen):
        net(x)
    torch.testing.assert_close(seen["0"], net[0](x))
