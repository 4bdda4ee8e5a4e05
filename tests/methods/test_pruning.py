"""Pruning against torch.nn.utils.prune, brute-force loops and plain optimisers."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune

from course_lib.methods import pruning as P

NAN = float("nan")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 10),
        nn.ReLU(),
        nn.Linear(10, 3),
    )


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def same(before: dict[str, torch.Tensor], model: nn.Module) -> bool:
    after = model.state_dict()
    return all(torch.equal(before[k].nan_to_num(7.0), after[k].nan_to_num(7.0)) for k in before)


# --- masks of one tensor ---------------------------------------------------------------------------------------------


def test_threshold_mask_is_the_formula():
    weight = torch.tensor([[0.9, -0.8], [0.1, -0.3], [0.45, 0.0]])
    expected = [[abs(w) > 0.5 * 0.9 for w in row] for row in weight.tolist()]
    assert P.threshold_mask(weight, 0.5).tolist() == expected
    assert P.threshold_mask(weight, 0.0).tolist() == (weight != 0).tolist()
    assert P.threshold_mask(weight, 0.5).dtype is torch.bool


def test_rank_mask_takes_infinite_scores_in_memory_order():
    score = torch.tensor([-math.inf, 1.0, -math.inf, math.inf, -math.inf])
    assert P.rank_mask(score, 0.4).tolist() == [False, True, False, True, True]
    assert P.rank_mask(score, 0.8).tolist() == [False, False, False, True, False]
    assert P.rank_mask(torch.full((4,), math.inf), 0.5).tolist() == [False, False, True, True]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.floats(0, 1, exclude_max=True, allow_subnormal=False))
def test_rank_mask_is_exact_with_ties(values, sparsity):
    score = torch.tensor(values, dtype=torch.float32)
    mask = P.rank_mask(score, sparsity)
    pruned = round(sparsity * len(values))
    assert (~mask).sum() == pruned
    order = sorted(range(len(values)), key=lambda i: (values[i], i))[:pruned]
    assert (~mask).nonzero().flatten().tolist() == sorted(order)


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.25, 0.5, 0.77, 0.999])
def test_rank_mask_equals_torch(sparsity):
    layer = nn.Linear(33, 17, bias=False)
    expected = torch_prune.L1Unstructured(sparsity).compute_mask(layer.weight, torch.ones_like(layer.weight))
    assert torch.equal(P.rank_mask(P.magnitude_score(layer.weight), sparsity), expected.bool())


def test_rank_mask_rounds_half_to_even_as_torch_does():
    for size in (1, 3, 5, 7, 9):
        weight = torch.rand(size)
        expected = torch_prune.L1Unstructured(0.5).compute_mask(weight, torch.ones(size))
        assert torch.equal(P.rank_mask(weight, 0.5), expected.bool())


@pytest.mark.parametrize("shape", [(8,), (3, 8), (3, 8, 2), (3, 8, 2, 2)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 4), (1, 2), (3, 8)])
def test_nm_mask_is_a_loop_over_groups_of_inputs(shape, n, m):
    score = torch.randint(0, 4, shape).float()
    mask = P.nm_mask(score, n, m)
    dim = 0 if len(shape) == 1 else 1
    rows, masks = score.movedim(dim, -1).reshape(-1, 8), mask.movedim(dim, -1).reshape(-1, 8)
    for row, kept in zip(rows.tolist(), masks.tolist(), strict=True):
        for start in range(0, 8, m):
            lowest = sorted(range(start, start + m), key=lambda i: (row[i], i))[: m - n]
            assert [i for i in range(start, start + m) if not kept[i]] == sorted(lowest)


def test_taylor_score_predicts_the_change_of_the_loss():
    torch.manual_seed(1)
    x, y = torch.randn(20, 6), torch.randn(20, 1)
    layer = nn.Linear(6, 1)

    def loss_with(weight):
        return ((x @ weight.T + layer.bias - y) ** 2).mean()

    loss = loss_with(layer.weight)
    loss.backward()
    score = P.taylor_score(layer.weight, layer.weight.grad)
    step = 1e-3  # a step of a thousandth towards zero changes the loss by a thousandth of the score, up to its sign
    for i in range(6):
        moved = layer.weight.detach().clone()
        moved[0, i] *= 1 - step
        assert math.isclose(
            (loss_with(moved) - loss).abs().item() / step, score[0, i].item(), rel_tol=0.05, abs_tol=2e-3
        )


def test_random_score_is_seeded_and_leaves_the_generator_alone():
    weight, before = torch.randn(50), torch.get_rng_state()
    assert torch.equal(P.random_score(weight, seed=3), P.random_score(weight, seed=3))
    assert not torch.equal(P.random_score(weight, seed=3), P.random_score(weight, seed=4))
    assert torch.equal(before, torch.get_rng_state())


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.8, 0.95])
def test_global_pruning_equals_torch(sparsity):
    model = network()
    reference = copy.deepcopy(model)
    layers = [(reference[i], "weight") for i in (0, 4, 6)]
    torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=sparsity)
    masks = P.prune_(model, sparsity)
    assert list(masks) == ["0.weight", "4.weight", "6.weight"]
    for i in (0, 4, 6):
        assert torch.equal(masks[f"{i}.weight"], reference[i].weight_mask.bool())
        assert torch.equal(model[i].weight, reference[i].weight)
        assert torch.equal(model[i].bias, reference[i].bias)


def test_layerwise_pruning_equals_torch():
    model = network()
    reference = copy.deepcopy(model)
    masks = P.prune_(model, 0.6, scope="layer")
    for i in (0, 4, 6):
        torch_prune.l1_unstructured(reference[i], "weight", 0.6)
        assert torch.equal(masks[f"{i}.weight"], reference[i].weight_mask.bool())


def test_scores_by_function_and_by_dict():
    model = network()
    weights = P.prunable_weights(model)
    scores = {name: torch.rand_like(w) for name, w in weights.items()}
    by_dict = P.make_masks(weights, 0.7, score=scores)
    by_function = P.make_masks(weights, 0.7, score=lambda name, w: scores[name])
    flat = torch.cat([scores[n].flatten() for n in weights])
    expected = P.rank_mask(flat, 0.7)
    assert torch.equal(torch.cat([by_dict[n].flatten() for n in weights]), expected)
    assert all(torch.equal(by_dict[n], by_function[n]) for n in weights)
    integers = P.make_masks(weights, 0.7, score={n: (s * 1e6).long() for n, s in scores.items()})
    assert sum((~m).sum() for m in integers.values()) == round(0.7 * flat.numel())


@pytest.mark.parametrize("scope", P.SCOPES)
def test_pruning_again_keeps_what_is_gone(scope):
    model, total = network(), sum(w.numel() for w in P.prunable_weights(network()).values())
    before = P.prune_(model, 0.5, scope=scope, score=lambda n, w: P.random_score(w, seed=1))
    after = P.prune_(model, 0.8, scope=scope, score=lambda n, w: P.random_score(w, seed=2))
    assert not any((after[n] & ~before[n]).any() for n in after)
    assert abs(sum((~m).sum() for m in after.values()) - 0.8 * total) <= 2
    unchanged = state(model)
    less = P.prune_(model, 0.2, scope=scope)
    assert same(unchanged, model)
    assert all(torch.equal(less[n], after[n]) for n in less)


def test_iterated_pruning_equals_one_shot_without_training():
    one, many = network(), network()
    expected = P.prune_(one, 0.9)
    for share in (0.3, 0.6, 0.9):
        masks = P.prune_(many, share)
    assert all(torch.equal(masks[n], expected[n]) for n in masks)


def test_a_shared_weight_is_ranked_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(6, 4)
            self.read = nn.Linear(4, 6)
            self.read.weight = self.table.weight
            self.twin = nn.Linear(6, 6)
            self.same = self.twin

    masks = P.prune_(Tied(), 0.5)
    assert set(masks) == {"table.weight", "twin.weight"}
    assert sum((~m).sum() for m in masks.values()) == round(0.5 * (24 + 36))


def test_a_bare_layer_half_precision_and_frozen_weights():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        layer = nn.Linear(16, 16).to(dtype).requires_grad_(False)
        masks = P.prune_(layer, 0.25)
        assert (~masks["weight"]).sum() == 64
        assert layer.weight.dtype is dtype
        assert not layer.weight.requires_grad


# --- masks through training ------------------------------------------------------------------------------------------


def optimisers():
    yield lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1)
    yield lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1)
    yield lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("make", list(optimisers()))
def test_masks_survive_the_optimiser_and_would_not_without_the_callback(make):
    revived = {}
    for masked in (True, False):
        model = network()
        optimiser, callback = make(model.parameters()), None
        torch.manual_seed(2)
        x, y = torch.randn(32, 1, 4, 4), torch.randint(0, 3, (32,))
        for step in range(8):
            if step == 3:  # momentum has been gathered by now
                masks = P.prune_(model, 0.8)
                callback = P.keep_masks(masks) if masked else None
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimiser.step()
            if callback is not None:
                callback(dict(model.named_parameters()), step)
        weights = dict(model.named_parameters())
        revived[masked] = sum((weights[n][~m] != 0).sum().item() for n, m in masks.items())
        assert all((weights[n][m] != 0).all() for n, m in masks.items())
    assert revived[True] == 0
    assert revived[False] > 0


def test_gradients_of_a_masked_network_are_those_of_the_torch_mask():
    model, reference = network().eval(), network().eval()
    masks = P.prune_(model, 0.5, scope="layer")
    for i in (0, 4, 6):
        torch_prune.l1_unstructured(reference[i], "weight", 0.5)
    x = torch.randn(5, 1, 4, 4)
    model(x).square().sum().backward()
    reference(x).square().sum().backward()
    for i in (0, 4, 6):
        kept = model[i].weight.grad * masks[f"{i}.weight"]
        torch.testing.assert_close(kept, reference[i].weight_orig.grad)


def test_stacked_masks_serve_replicas():
    models = [network() for _ in range(3)]
    masks = [P.prune_(m, 0.5, score=lambda n, w, i=i: P.random_score(w, seed=i)) for i, m in enumerate(models)]
    stacked = {n: torch.ones(3, *m.shape) for n, m in masks[0].items()}
    P.keep_masks(P.stack_masks(masks))(stacked, 0)
    assert all(torch.equal(stacked[n][i].bool(), masks[i][n]) for n in stacked for i in range(3))


def test_cubic_schedule_by_hand():
    assert P.cubic_sparsity(0, 10, 0.9) == 0
    assert math.isclose(P.cubic_sparsity(5, 10, 0.9), 0.9 * (1 - 0.5**3))
    assert P.cubic_sparsity(10, 10, 0.9) == P.cubic_sparsity(99, 10, 0.9) == 0.9
    shares = [P.cubic_sparsity(t, 50, 0.95) for t in range(51)]
    steps = [b - a for a, b in itertools.pairwise(shares)]
    assert all(a > b > 0 for a, b in itertools.pairwise(steps))


def test_gradual_pruning_follows_the_schedule_and_never_revives():
    model = network()
    weights, total = P.prunable_weights(model), sum(w.numel() for w in P.prunable_weights(model).values())
    callback = P.GradualPruning(model, 0.9, 10, every=3)
    seen = []
    for step in range(14):
        with torch.no_grad():
            for w in weights.values():
                w.add_(0.01 * torch.randn_like(w))
            callback(dict(model.named_parameters()), step)
        seen.append(sum((w == 0).sum().item() for w in weights.values()))
    due = {2: 3, 5: 6, 8: 9, 9: 10}
    now = 0
    for step, zeros in enumerate(seen):
        now = round(P.cubic_sparsity(due[step], 10, 0.9) * total) if step in due else now
        assert zeros == now


def test_gradual_pruning_of_replicas_ranks_each_on_its_own():
    models = [network() for _ in range(2)]
    with torch.no_grad():
        models[1][4].weight.mul_(0.01)
    stacked = {n: torch.stack([dict(m.named_parameters())[n] for m in models]) for n, _ in models[0].named_parameters()}
    P.GradualPruning(models[0], 0.5, 1, replicas=True)(stacked, 0)
    for i, model in enumerate(models):
        for name, mask in P.prune_(model, 0.5).items():
            assert torch.equal(stacked[name][i].detach() != 0, mask)


# --- bad input: its own error, and nothing changed -------------------------------------------------------------------


@pytest.mark.parametrize("share", [-0.1, 1, 1.0, 1.5, NAN, math.inf])
@pytest.mark.parametrize(
    "call",
    [
        lambda s: P.rank_mask(torch.rand(4), s),
        lambda s: P.threshold_mask(torch.rand(4), s),
        lambda s: P.prune_(network(), s),
        lambda s: P.cubic_sparsity(0, 1, s),
        lambda s: P.GradualPruning(network(), s, 10),
    ],
)
def test_a_share_outside_the_range(call, share):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), got"):
        call(share)


@pytest.mark.parametrize("share", [True, "0.5", None, torch.tensor(0.5)])
def test_a_share_that_is_no_number(share):
    for call in (P.rank_mask, P.threshold_mask):
        with pytest.raises(TypeError, match="must be a number"):
            call(torch.rand(4), share)
    with pytest.raises(TypeError, match="sparsity must be a number"):
        P.prune_(network(), share)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: P.rank_mask(torch.tensor([1.0, NAN]), 0.5), ValueError, "score has 1 NaN"),
        (lambda: P.rank_mask([1.0], 0.5), TypeError, "must be a tensor, got list"),
        (lambda: P.rank_mask(torch.ones(2, dtype=torch.bool), 0.5), TypeError, "real numbers"),
        (lambda: P.rank_mask(torch.ones(0), 0.5), ValueError, "empty"),
        (lambda: P.threshold_mask(torch.tensor([1.0, math.inf]), 0.5), ValueError, "infinite"),
        (lambda: P.magnitude_score(torch.tensor([NAN])), ValueError, "NaN"),
        (lambda: P.taylor_score(torch.ones(2), None), ValueError, "backward"),
        (lambda: P.taylor_score(torch.ones(2), torch.ones(3)), ValueError, r"shape \(2,\), got \(3,\)"),
        (lambda: P.nm_mask(torch.ones(2, 6), 2, 4), ValueError, "multiple of 4, got 6"),
        (lambda: P.nm_mask(torch.ones(2, 8), 5, 4), ValueError, "got 5:4"),
        (lambda: P.nm_mask(torch.ones(2, 8), 0, 4), ValueError, "got 0:4"),
        (lambda: P.nm_mask(torch.ones(2, 8), 2.0, 4), TypeError, "n must be an integer"),
        (lambda: P.nm_mask(torch.tensor(1.0), 1, 1), ValueError, "single number"),
        (lambda: P.cubic_sparsity(-1, 10, 0.5), ValueError, "step must be at least 0"),
        (lambda: P.cubic_sparsity(0, 0, 0.5), ValueError, "steps must be at least 1"),
        (lambda: P.GradualPruning(network(), 0.5, 10, every=0), ValueError, "every must be"),
        (lambda: P.stack_masks([]), ValueError, "empty"),
        (lambda: P.stack_masks([{"a": torch.ones(1)}, {"b": torch.ones(1)}]), ValueError, "different names"),
        (lambda: P.make_masks({}, 0.5), ValueError, "no weight to prune"),
        (lambda: P.prune_(nn.Sequential(), 0.5), ValueError, "no weight to prune"),
        (lambda: P.prune_(nn.BatchNorm1d(3), 0.5), ValueError, "no weight to prune"),
        (lambda: P.prune_([1], 0.5), TypeError, "torch.nn.Module, got list"),
        (lambda: P.prune_(nn.Sequential(nn.LazyLinear(3)), 0.5), ValueError, "no shape yet"),
        (lambda: P.apply_masks_(3, {}), TypeError, "module or a dict"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_clear_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


def spoil(model):
    with torch.no_grad():
        model[6].weight[0, 0] = NAN


@pytest.mark.parametrize(
    ("options", "prepare", "error", "text"),
    [
        ({}, spoil, ValueError, "6.weight has 1 NaN"),
        ({"scope": "neuron"}, None, ValueError, "'global', 'layer', got 'neuron'"),
        ({"score": {"0.weight": torch.rand(4, 1, 3, 3)}}, None, ValueError, "no entry for '4.weight'"),
        ({"score": lambda n, w: w[0]}, None, ValueError, "score of 0.weight must have shape"),
        ({"score": lambda n, w: w * NAN}, None, ValueError, "score of 0.weight has 36 NaN"),
        ({"score": 3}, None, TypeError, "function"),
        ({"score": lambda n, w: w.fill_(5.0)[:0]}, None, ValueError, "empty"),
    ],
)
def test_prune_refuses_and_changes_nothing(options, prepare, error, text):
    model = network()
    if prepare:
        prepare(model)
    before = state(model)
    with pytest.raises(error, match=text):
        P.prune_(model, 0.5, **options)
    assert same(before, model)


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        ({"5.weight": torch.ones(3, 10, dtype=torch.bool)}, ValueError, "no parameter is called '5.weight'.*6.weight"),
        ({"6.weight": torch.ones(10, 3, dtype=torch.bool)}, ValueError, r"shape \(3, 10\), got \(10, 3\)"),
        ({"6.weight": torch.ones(3, 10)}, TypeError, "bool tensor, got dtype torch.float32"),
        ({"6.weight": [True]}, TypeError, "bool tensor, got list"),
    ],
)
def test_apply_masks_refuses_and_changes_nothing(bad, error, text):
    model = network()
    before = state(model)
    good = {"0.weight": torch.zeros(4, 1, 3, 3, dtype=torch.bool)}
    with pytest.raises(error, match=text):
        P.apply_masks_(model, good | bad)
    assert same(before, model)


def test_a_weight_under_torch_prune_is_refused():
    model = network()
    torch_prune.l1_unstructured(model[4], "weight", 0.5)
    with pytest.raises(ValueError, match=r"weight of '4' is no plain parameter"):
        P.prune_(model, 0.5)


@pytest.mark.parametrize(
    ("spoiled", "call", "text"),
    [
        (False, lambda m: P.prune_(m, 1.0), r"sparsity must be in \[0, 1\), got 1.0"),
        (False, lambda m: P.prune_(m, -0.2, scope="layer"), r"sparsity must be in \[0, 1\), got -0.2"),
        (False, lambda m: P.apply_masks_(m, {"4.weight": torch.ones(2, dtype=torch.bool)}), r"shape \(10, 64\), got"),
        (True, lambda m: P.prune_(m, 0.5), "6.weight has 1 NaN or infinite entries of 30"),
        (False, lambda m: P.apply_masks_(m, {"fc.weight": torch.ones(1, dtype=torch.bool)}), "no parameter is called"),
        (False, lambda m: P.remove_neurons(m, "fc", [0]), "no layer is called 'fc'"),
        (False, lambda m: P.remove_neurons(m, "0", [False] * 4), "all 4 neurons of '0' would be removed"),
        (False, lambda m: P.remove_neurons(m, "4", torch.tensor([], dtype=torch.long)), "all 10 neurons of '4'"),
    ],
)
def test_every_bad_input_has_an_error_of_its_own_and_leaves_the_model(spoiled, call, text):
    model = network()
    if spoiled:
        spoil(model)
    before, modes = state(model), [m.training for m in model.modules()]
    with pytest.raises(ValueError, match=text):
        call(model)
    assert same(before, model)
    assert modes == [m.training for m in model.modules()]


def test_an_empty_model_is_refused_by_pruning_and_by_surgery():
    with pytest.raises(ValueError, match="no weight to prune: no Linear or Conv layer is in it"):
        P.prune_(nn.Sequential(), 0.5)
    with pytest.raises(ValueError, match=r"no layer is called '0'.*none, the model has no Linear or Conv layer"):
        P.remove_neurons(nn.Sequential(), "0", [0])
