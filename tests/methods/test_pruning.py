"""Pruning against torch.nn.utils.prune, brute-force loops and plain optimisers."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune

from course_lib.methods import pruning as P

NAN, INF = math.nan, math.inf


def network() -> nn.Module:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
    return nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 3))


def lot(weight, seed=0):
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))


def state(model):
    return copy.deepcopy(model.state_dict())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- scores and masks of one tensor ----------------------------------------------------------------------------------


def test_threshold_mask_is_the_formula():
    weight = torch.tensor([[0.9, -0.8], [0.1, -0.3], [0.45, 0.0]])
    assert P.threshold_mask(weight, 0.5).tolist() == [[abs(w) > 0.5 * 0.9 for w in row] for row in weight.tolist()]
    assert P.threshold_mask(weight, np.float64(0)).tolist() == (weight != 0).tolist()
    assert P.threshold_mask(torch.tensor([1.0, 0.3008]).half(), 0.3).tolist() == [True, True]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.floats(0, 1, exclude_max=True, allow_subnormal=False))
def test_rank_mask_is_exact_with_ties(values, sparsity):
    mask = P.rank_mask(torch.tensor(values, dtype=torch.float32), sparsity)
    order = sorted(range(len(values)), key=lambda i: (values[i], i))[: round(sparsity * len(values))]
    assert (~mask).nonzero().flatten().tolist() == sorted(order)


def test_rank_mask_takes_infinite_and_whole_scores():
    score = torch.tensor([-INF, 1.0, -INF, INF, -INF])
    assert P.rank_mask(score, 0.4).tolist() == [False, True, False, True, True]
    assert P.rank_mask(score, 0.8).tolist() == [False, False, False, True, False]
    assert P.rank_mask(torch.tensor([2**24 + 1, 2**24]), 0.5).tolist() == [True, False]


@pytest.mark.parametrize("shape", [(8,), (3, 8), (3, 8, 2, 2)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 4), (np.int64(3), np.int32(8))])
def test_nm_mask_is_a_loop_over_groups_of_inputs(shape, n, m):
    score = torch.randint(0, 4, shape).float()
    dim, mask = min(1, len(shape) - 1), P.nm_mask(score, n, m)
    assert mask.shape == score.shape
    rows, masks = score.movedim(dim, -1).reshape(-1, 8), mask.movedim(dim, -1).reshape(-1, 8)
    for row, kept in zip(rows.tolist(), masks.tolist(), strict=True):
        for start in range(0, 8, m):
            lowest = sorted(range(start, start + m), key=lambda i: (row[i], i))[: m - n]
            assert [i for i in range(start, start + m) if not kept[i]] == sorted(lowest)


def test_taylor_score_predicts_the_change_of_the_loss():
    x, y, layer = torch.randn(20, 6).double(), torch.randn(20, 1).double(), nn.Linear(6, 1).double()

    def loss_with(weight):
        return ((x @ weight.T + layer.bias - y) ** 2).mean()

    loss_with(layer.weight).backward()
    score, step = P.taylor_score(layer.weight, layer.weight.grad), 1e-6
    for i in range(6):  # a small step towards zero changes the loss by as small a part of the score, up to its sign
        moved = layer.weight.detach().clone()
        moved[0, i] *= 1 - step
        change = (loss_with(moved) - loss_with(layer.weight)).abs().item() / step
        assert math.isclose(change, score[0, i].item(), rel_tol=1e-3, abs_tol=1e-6)
    tiny = torch.full((2,), 2.0**-14).half()  # the product of two halves would be lost in half precision
    assert P.taylor_score(tiny, -tiny).tolist() == [2.0**-28] * 2


def test_wanda_score_is_size_times_the_norm_of_the_input():
    weight, x = torch.randn(3, 4), torch.randn(5, 6, 4)
    score, rows = P.wanda_score(weight, x), x.reshape(30, 4).tolist()
    for j in range(4):
        norm = math.sqrt(sum(row[j] ** 2 for row in rows))
        for i in range(3):
            assert math.isclose(score[i, j].item(), abs(weight[i, j].item()) * norm, rel_tol=1e-5)


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.95])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_pruning_equals_torch(sparsity, scope):
    model, reference = network(), network()
    layers = [(reference[i], "weight") for i in (0, 4, 6)]
    if scope == "global":
        torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=sparsity)
    else:
        for layer, name in layers:
            torch_prune.l1_unstructured(layer, name, sparsity)
    masks = P.prune_(model, sparsity, scope=scope)
    assert list(masks) == ["0.weight", "4.weight", "6.weight"]
    for i in (0, 4, 6):
        assert torch.equal(masks[f"{i}.weight"], reference[i].weight_mask.bool())
        assert torch.equal(model[i].weight, reference[i].weight)
        assert torch.equal(model[i].bias, reference[i].bias)


def test_rows_are_ranked_alone():
    model = network()
    masks = P.prune_(model, 0.5, scope="row")
    for i in (0, 4, 6):
        for row, mask in zip(network()[i].weight, masks[f"{i}.weight"], strict=True):
            assert torch.equal(mask, P.rank_mask(row.abs(), 0.5))


def test_scores_by_function_and_by_dict():
    weights = P.prunable_weights(network())
    scores = {name: torch.rand_like(w) for name, w in weights.items()}
    expected = P.rank_mask(torch.cat([s.flatten() for s in scores.values()]), 0.7)
    for score in (scores, lambda name, w: scores[name], {name: (s * 1e6).long() for name, s in scores.items()}):
        masks = P.make_masks(weights, 0.7, score=score)
        assert torch.equal(torch.cat([m.flatten() for m in masks.values()]), expected)


@pytest.mark.parametrize("scope", P.SCOPES)
def test_pruning_again_keeps_what_is_gone(scope):
    model = network()
    before = P.prune_(model, 0.5, scope=scope, score=lambda n, w: lot(w, seed=1))
    after = P.prune_(model, 0.8, scope=scope, score=lambda n, w: lot(w, seed=2))
    assert not any((after[n] & ~before[n]).any() for n in after)
    unchanged = state(model)
    assert same(P.prune_(model, 0.2, scope=scope), after)
    assert same(unchanged, state(model))


def test_what_is_a_weight():
    tied = nn.ModuleDict({"table": nn.Embedding(6, 4), "read": nn.Linear(4, 6), "twin": nn.Linear(6, 6)})
    tied["read"].weight, tied["same"] = tied["table"].weight, tied["twin"]
    masks = P.prune_(tied, 0.5)  # a shared weight is ranked once
    assert set(masks) == {"table.weight", "twin.weight"}
    assert sum((~m).sum() for m in masks.values()) == round(0.5 * (24 + 36))
    kinds = {
        nn.LSTM(2, 2): ["weight_ih_l0", "weight_hh_l0"],
        nn.MultiheadAttention(2, 1): ["in_proj_weight", "out_proj.weight"], nn.Bilinear(2, 2, 2): ["weight"],
        nn.Sequential(nn.Embedding(2, 2), nn.LayerNorm([2, 2]), nn.PReLU(3), nn.Conv3d(1, 1, 1)): ["3.weight"],
    }  # fmt: skip
    for model, names in kinds.items():
        assert list(P.prunable_weights(model)) == names


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions_and_frozen_weights(dtype):
    layer = nn.Linear(16, 16).to(dtype).requires_grad_(False)
    assert (~P.prune_(layer, 0.25)["weight"]).sum() == 64 == (layer.weight == 0).sum()
    assert layer.weight.dtype is dtype
    assert not layer.weight.requires_grad


# --- masks through training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [True, False])
def test_masks_survive_the_optimiser_and_would_not_without_the_callback(held):
    model, x, y = network(), torch.randn(32, 1, 4, 4), torch.randint(0, 3, (32,))
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1)
    weights, masks = dict(model.named_parameters()), {}
    for step in range(8):
        if step == 3:  # momentum has been gathered by now
            masks = P.prune_(model, 0.8)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
        if held:
            P.keep_masks(masks)(weights, step)
    assert all((weights[n][m] != 0).all() for n, m in masks.items())
    assert any((weights[n][~m] != 0).any() for n, m in masks.items()) is not held


def test_masks_of_replicas_each_its_own_or_one_for_all():
    masks = [P.prune_(network(), 0.5, score=lambda n, w, i=i: lot(w, seed=i)) for i in range(3)]
    for one in (masks, masks[0]):
        stacked = {n: torch.ones(3, *m.shape) for n, m in masks[0].items()}
        P.keep_masks(one)(stacked, 0)
        for i in range(3):
            expected = masks[i] if one is masks else masks[0]
            assert same({n: s[i].bool() for n, s in stacked.items()}, expected)


def test_cubic_schedule_by_hand():
    assert P.cubic_sparsity(0, 10, 0.9) == 0
    assert math.isclose(P.cubic_sparsity(np.int64(2), np.int64(10), 0.5), 0.5 * (1 - 0.8**3))
    assert P.cubic_sparsity(10, 10, 0.9) == P.cubic_sparsity(99, 10, 0.9) == P.cubic_sparsity(1, 1, 0.9) == 0.9


def test_gradual_pruning_follows_the_schedule_and_never_revives():
    model = network()
    weights = P.prunable_weights(model)
    callback, gone = P.GradualPruning(model, 0.9, 10, every=3), {n: w < -9 for n, w in weights.items()}
    due, zeros = {2: 3, 5: 6, 8: 9, 9: 10}, 0
    for step in range(14):
        with torch.no_grad():
            for w in weights.values():
                w.add_(torch.randn_like(w))  # larger than what is left: a weight that moved is worth more than others
        callback(dict(model.named_parameters()), step)
        zeros = round(P.cubic_sparsity(due[step], 10, 0.9) * 706) if step in due else zeros
        assert sum((w == 0).sum().item() for w in weights.values()) == zeros
        assert all((w[gone[n]] == 0).all() for n, w in weights.items())
        gone = {n: w == 0 for n, w in weights.items()}
    assert all(torch.equal(callback.masks[n], w != 0) for n, w in weights.items())


@pytest.mark.parametrize("options", [{}, {"scope": "layer"}, {"score": lambda n, w: lot(w)}])
def test_gradual_pruning_of_replicas_ranks_each_on_its_own(options):
    models = [network() for _ in range(2)]
    models[1][4].weight.data.mul_(0.01)
    stacked = {n: torch.stack([dict(m.named_parameters())[n] for m in models]) for n, _ in models[0].named_parameters()}
    P.GradualPruning(models[0], 0.5, 1, **options)(stacked, 0)
    for i, model in enumerate(models):
        for name, mask in P.prune_(model, 0.5, **options).items():
            assert torch.equal(stacked[name][i].detach() != 0, mask)


# --- bad input: its own error, and nothing changed -------------------------------------------------------------------

ONES = torch.ones


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(("call", "text"), [
    (lambda m: P.rank_mask(ONES(4), 1), r"sparsity must be in \[0, 1\), got 1"),
    (lambda m: P.rank_mask(ONES(2) * NAN, 0.5), "score has 2 NaN"),
    (lambda m: P.threshold_mask(ONES(4), -0.1), r"alpha must be in \[0, 1\)"),
    (lambda m: P.threshold_mask(torch.tensor([1.0, INF]), 0.5), "weight has 1 NaN or infinite"),
    (lambda m: P.taylor_score(ONES(2), None), "backward"),
    (lambda m: P.taylor_score(ONES(2), ONES(3)), r"shape \(2,\), got \(3,\)"),
    (lambda m: P.wanda_score(ONES(2, 3), ONES(5, 2)), r"got weight \(2, 3\) and inputs \(5, 2\)"),
    (lambda m: P.nm_mask(ONES(2, 6), 2, 4), r"multiple of 4, got score of shape \(2, 6\)"),
    (lambda m: P.nm_mask(ONES(2, 8), 5, 4), "n of 5:4 must be an integer from 1 to 4"),
    (lambda m: P.cubic_sparsity(0, 10, 1.0), r"final must be in \[0, 1\)"),
    (lambda m: P.cubic_sparsity(-1, 10, 0.5), "step must be at least 0"),
    (lambda m: P.cubic_sparsity(0, 0, 0.5), "steps must be at least 1"),
    (lambda m: P.GradualPruning(m, 1.0, 10), r"sparsity must be in \[0, 1\)"),
    (lambda m: P.GradualPruning(m, 0.5, 0), "steps must be"),
    (lambda m: P.GradualPruning(m, 0.5, 10, every=0), "every must be"),
    (lambda m: P.stack_masks([]), "at least one replica"),
    (lambda m: P.keep_masks([{"a": ONES(1)}, {"b": ONES(1)}]), r"same names.*\['a'\], \['b'\]"),
    (lambda m: P.make_masks({"w": ONES(2) * NAN}, 0.5), "w has 2 NaN or infinite entries of 2"),
    (lambda m: P.make_masks({}, 0.5), "no weight to prune"),
    (lambda m: P.prune_(nn.Sequential(), 0.5), "no weight to prune: no Linear or Conv layer is in it"),
    (lambda m: P.prune_(nn.Sequential(nn.LazyLinear(3)), 0.5), "'0' .LazyLinear.*no shape yet"),
    (lambda m: P.prune_(m, 0.5, scope="neuron"), "'global', 'layer', 'row'.*got 'neuron'"),
    (lambda m: P.prune_(m, 0.5, score={"0.weight": ONES(4, 1, 3, 3)}), "no entry for '4.weight'"),
    (lambda m: P.prune_(m, 0.5, score=lambda n, w: w[0]), "score of 0.weight must have shape"),
    (lambda m: P.prune_(m, 0.5, score=lambda n, w: w * NAN), "score of 0.weight has 36 NaN"),
    (lambda m: P.apply_masks_(m, {"0.weight": ONES(4, 1, 3, 3) > 1, "5.weight": ONES(1) > 1}), "'5.weight'.*6.weight"),
    (lambda m: P.apply_masks_(m, {"6.weight": ONES(10, 3).bool()}), r"shape \(3, 10\), got \(10, 3\)"),
    (lambda m: P.apply_masks_(dict(m.named_parameters()), {"6.weight": ONES(10).bool()}), r"got \(10,\)"),
    (lambda m: P.apply_masks_(m, {"6.weight": ONES(3, 10)}), "bool tensor, got torch.float32"),
])  # fmt: skip
def test_what_is_refused_changes_nothing(call, text):
    model = network()
    before = state(model)
    with pytest.raises((TypeError, ValueError), match=text):
        call(model)
    assert same(before, state(model))


def test_a_row_that_is_an_input_and_a_frozen_weight_are_refused():
    with pytest.raises(ValueError, match="belongs to an input"):
        P.prune_(nn.Sequential(nn.ConvTranspose2d(4, 6, 3)), 0.5, scope="row")
    with pytest.raises(ValueError, match=r"0\.weight: a frozen weight has no step"):
        P.GradualPruning(nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 2)), 0.5, 4)
