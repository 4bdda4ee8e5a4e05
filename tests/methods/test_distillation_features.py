import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from course_lib.methods.distillation import frozen
from course_lib.methods.distillation_features import (
    attention_map,
    attention_transfer_loss,
    hint_loss,
    precompute_features,
    relational_angle_loss,
    relational_distance_loss,
    relational_kd_loss,
    tap_features,
)


def make_net(width=6):
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(width * 16, 3))


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_tap_reads_a_layer_and_changes_no_answer():
    net, seen, x = make_net(), {}, torch.randn(2, 1, 4, 4)
    expected = net(x)
    handle = tap_features(net, "1", seen)
    assert torch.equal(net(x), expected)
    assert torch.equal(seen["1"], net[1](net[0](x)))
    handle.remove()
    seen.clear()
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


@pytest.mark.parametrize("name", ["conv9", ""])
def test_an_unknown_layer_is_named_with_those_there_are(name):
    with pytest.raises(ValueError, match=r"no layer .* it has: 0, 1, 2, 3"):
        tap_features(make_net(), name, {})


def test_precomputed_features_come_from_hooks_that_are_gone_afterwards():
    teacher, x = frozen(make_net()), torch.randn(5, 1, 4, 4)
    table = precompute_features(teacher, x, ["0", "1"], batch_size=2)
    torch.testing.assert_close(table["1"], torch.relu(table["0"]))
    torch.testing.assert_close(table["0"], teacher[0](x))
    assert not any(module._forward_hooks for module in teacher.modules())
    with pytest.raises(ValueError, match="no layer 'nine'"):
        precompute_features(teacher, x, ["0", "nine"])
    assert not any(module._forward_hooks for module in teacher.modules())
    with pytest.raises(ValueError, match="at least one image"):
        precompute_features(teacher, x[:0], ["0"])
    with pytest.raises(ValueError, match="train mode"):
        precompute_features(make_net(), x, ["0"])


def test_hints_are_a_mean_squared_difference():
    student, teacher = features(4, 3).requires_grad_(), features(4, 3, seed=1)
    loss = hint_loss(student, teacher)
    assert loss.item() == pytest.approx(((student - teacher) ** 2).sum().item() / 12)
    loss.backward()
    torch.testing.assert_close(student.grad, 2 * (student.detach() - teacher) / 12)
    with pytest.raises(ValueError, match=r"\(4, 3\) and teacher_features \(4, 2\).*adapter"):
        hint_loss(student, teacher[:, :2])


def test_attention_equals_a_loop_and_needs_no_equal_channels():
    student, teacher = features(4, 3, 2, 5).requires_grad_(), features(4, 7, 2, 5, seed=1)
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        q_s, q_t = (f.pow(2).sum(dim=0).flatten() for f in (s, t))
        expected = expected + ((q_s / q_s.norm() - q_t / q_t.norm()) ** 2).sum() / 4
    ours = attention_transfer_loss(student, teacher)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*[torch.autograd.grad(x, student)[0] for x in (ours, expected)])
    assert 0 <= ours <= 2
    assert attention_transfer_loss(3 * teacher, teacher) == pytest.approx(0, abs=1e-12)


def test_attention_refuses_what_is_no_map():
    with pytest.raises(ValueError, match=r"\[N, C, H, W\], got shape \(2, 3\)"):
        attention_map(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"same height and width, got \(4, 4\) and \(2, 2\)"):
        attention_transfer_loss(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 2, 2))
    assert torch.equal(attention_map(torch.zeros(1, 2, 2, 2)), torch.zeros(1, 4))


def test_distances_equal_a_loop_over_pairs():
    student, teacher = features(5, 3).requires_grad_(), features(5, 2, 4, seed=1)

    def pairs(rows):
        d = torch.stack([(rows[i] - rows[j]).norm() for i in range(5) for j in range(5) if i != j])
        return d / d.mean()

    expected = F.smooth_l1_loss(pairs(student), pairs(teacher.flatten(1)), reduction="sum") / 25
    ours = relational_distance_loss(student, teacher)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*[torch.autograd.grad(x, student)[0] for x in (ours, expected)])


def test_angles_equal_a_loop_over_triples():
    student, teacher = features(4, 3).requires_grad_(), features(4, 6, seed=1)

    def cosines(rows):
        out = []
        for j in range(4):
            for i in range(4):
                for k in range(4):
                    if j in (i, k):
                        out.append(rows.new_zeros(()))
                    else:
                        out.append(F.cosine_similarity(rows[i] - rows[j], rows[k] - rows[j], dim=0))
        return torch.stack(out)

    expected = F.smooth_l1_loss(cosines(student), cosines(teacher))
    ours = relational_angle_loss(student, teacher)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*[torch.autograd.grad(x, student)[0] for x in (ours, expected)])
    both = relational_kd_loss(student, teacher, distance=2.0, angle=3.0)
    torch.testing.assert_close(both, 2 * relational_distance_loss(student, teacher) + 3 * ours)


def test_relations_do_not_see_scale_shift_or_rotation():
    rows = features(6, 3)
    turn = torch.linalg.qr(features(3, 3, seed=2)).Q
    moved = (4 * rows @ turn + 1.5).requires_grad_()
    loss = relational_kd_loss(moved, rows)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert moved.grad.isfinite().all()


def test_twins_in_a_batch_leave_the_gradient_finite():
    rows = features(3, 4).repeat(2, 1).requires_grad_()
    relational_kd_loss(rows, features(6, 4, seed=1)).backward()
    assert rows.grad.isfinite().all()
    flat = torch.ones(4, 3, requires_grad=True)
    relational_kd_loss(flat, torch.ones(4, 3)).backward()
    assert flat.grad.isfinite().all()


def test_relations_refuse_small_batches_and_negative_weights():
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        relational_distance_loss(torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="at least 3 images, got 2"):
        relational_angle_loss(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="angle must be at least 0"):
        relational_kd_loss(torch.ones(3, 3), torch.ones(3, 3), angle=-1)


def test_feature_losses_run_under_vmap():
    students, teacher = features(3, 4, 2, 2, 2), features(4, 5, 2, 2, seed=1)

    def losses(s):
        return torch.stack([attention_transfer_loss(s, teacher), relational_kd_loss(s, teacher)])

    torch.testing.assert_close(vmap(losses)(students), torch.stack([losses(s) for s in students]))
