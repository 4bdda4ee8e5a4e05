import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from course_lib.lab.data import Splits
from course_lib.lab.models import build_model
from course_lib.lab.replicas import fit_replicas, train, train_many
from course_lib.lab.training import DivergedError, TrainConfig, evaluate, fit

CONFIG = TrainConfig(epochs=2, batch_size=50)


def make(name):
    return lambda seed: build_model(name, (1, 8, 8), 10, seed=seed)


@pytest.mark.parametrize("name", ["mlp32", "cnn_student", "cnn_teacher"])
def test_in_float64_nothing_but_rounding_differs(name, few):
    # AdamW's first steps have the size of the learning rate whatever the gradient's, so that a gradient of almost zero
    # (a convolution in front of a BatchNorm) turns float32 rounding into a visible step: only float64 tells this apart.
    double = in_float64(few)
    together = fit_replicas(lambda s: make(name)(s).double(), [0, 1], double, CONFIG)
    for seed, model in enumerate(together):
        alone = make(name)(seed).double()
        fit(alone, double, CONFIG, seed=seed)
        for key, tensor in alone.state_dict().items():
            torch.testing.assert_close(
                model.state_dict()[key], tensor, rtol=1e-6, atol=1e-8, msg=f"{name} {seed} {key}"
            )


def in_float64(split):
    double = copy.copy(split)
    object.__setattr__(double, "images", split.images.double())
    return double


def test_best_epoch_is_each_replicas_own(few, digits):
    config = TrainConfig(epochs=5, lr=0.05)
    together = fit_replicas(make("mlp8"), [0, 1, 2], few, config, val=digits.val)
    for seed, model in enumerate(together):
        alone = make("mlp8")(seed)
        history = fit(alone, few, config, val=digits.val, seed=seed)
        assert evaluate(model, digits.val).accuracy == pytest.approx(max(history.val_accuracy), abs=0.008)


def test_settings_and_positions_reach_each_replica(few):
    tables = torch.randn(2, len(few), 10)

    def loss(logits, labels, index, table, weight):
        return F.cross_entropy(logits, labels) + weight * F.mse_loss(logits, table[index])

    weights = torch.tensor([0.0, 2.0])
    together = fit_replicas(
        make("mlp8"), [4, 4], few, CONFIG, loss_fn=loss, settings={"table": tables, "weight": weights}
    )
    for r, model in enumerate(together):
        alone = make("mlp8")(4)

        def own(logits, labels, index, r=r):
            return loss(logits, labels, index, tables[r], weights[r])

        fit(alone, few, CONFIG, loss_fn=own, seed=4)
        torch.testing.assert_close(model.fc1.weight, alone.fc1.weight, rtol=1e-4, atol=1e-5)


def test_a_split_for_each_replica(digits):
    splits = [digits.train.subset(range(0, 100)), digits.train.subset(range(100, 200))]
    together = fit_replicas(make("mlp8"), [0, 1], splits, CONFIG)
    alone = make("mlp8")(1)
    fit(alone, splits[1], CONFIG, seed=1)
    torch.testing.assert_close(together[1].fc1.weight, alone.fc1.weight, rtol=1e-4, atol=1e-5)


def test_masks_hold_with_a_leading_dimension(few):
    mask = (torch.rand(2, 8, 64) > 0.5).float()

    def keep(parameters, step):
        parameters["fc1.weight"].mul_(mask)

    for r, model in enumerate(fit_replicas(make("mlp8"), [0, 1], few, CONFIG, after_step=keep)):
        assert (model.fc1.weight[mask[r] == 0] == 0).all()


def test_starts_from_trained_models_and_leaves_them(few):
    trained = make("mlp8")(0)
    before = copy.deepcopy(trained.state_dict())
    (more,) = fit_replicas(lambda seed: copy.deepcopy(trained).eval(), [0], few, CONFIG)
    assert torch.equal(trained.fc1.weight, before["fc1.weight"])
    assert not torch.equal(more.fc1.weight, before["fc1.weight"])
    assert not more.training


def test_global_generator_is_left_alone(few):
    before = torch.get_rng_state()
    fit_replicas(make("mlp8"), [0, 1], few, CONFIG)
    assert torch.equal(before, torch.get_rng_state())


def test_bad_input_is_named(few, digits):
    with pytest.raises(ValueError, match="seeds is empty"):
        fit_replicas(make("mlp8"), [], few)
    with pytest.raises(ValueError, match=r"replica 1 .*another network.*fc1.weight"):
        fit_replicas(lambda s: make("mlp8" if s == 0 else "mlp32")(s), [0, 1], few)
    one = make("mlp8")(0)
    with pytest.raises(ValueError, match="same object twice"):
        fit_replicas(lambda s: one, [0, 1], few)
    with pytest.raises(ValueError, match=r"settings\['T'\].*2 seeds.*\(3,\)"):
        fit_replicas(make("mlp8"), [0, 1], few, settings={"T": torch.ones(3)})
    with pytest.raises(ValueError, match="1 splits for 2 seeds"):
        fit_replicas(make("mlp8"), [0, 1], [few])
    with pytest.raises(ValueError, match="same shape"):
        fit_replicas(make("mlp8"), [0, 1], [few, digits.train.subset(range(9))])
    with pytest.raises(ValueError, match="nothing to train"):
        fit_replicas(lambda s: make("mlp8")(s).requires_grad_(False), [0], few)
    with pytest.raises(ValueError, match="num_classes=10"):
        fit_replicas(lambda s: nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), [0], few)


def branching(logits, labels):
    loss = F.cross_entropy(logits, labels)
    return loss if loss.item() > 0 else -loss


def averaging(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, momentum=None), nn.Linear(64, 10))


@pytest.mark.parametrize(("made", "loss"), [(make("mlp8"), branching), (averaging, None)])
def test_what_vmap_cannot_map_is_trained_one_after_another(few, made, loss):
    together = fit_replicas(made, [0, 1], few, CONFIG, loss_fn=loss)
    for seed, model in enumerate(together):
        alone = made(seed)
        fit(alone, few, CONFIG, loss_fn=loss, seed=seed)
        for key, tensor in alone.state_dict().items():
            torch.testing.assert_close(model.state_dict()[key], tensor, rtol=1e-4, atol=1e-5)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False), nn.Linear(64, 10)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(self.b(self.a(x.flatten(1)).relu()).relu())


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_that_share_a_weight_stay_tied(few, frozen):
    torch.manual_seed(0)
    start = Tied()
    start.a.weight.requires_grad_(not frozen)
    together = fit_replicas(lambda s: copy.deepcopy(start), [0, 1], few, CONFIG)
    for seed, model in enumerate(together):
        alone = copy.deepcopy(start)
        fit(alone, few, CONFIG, seed=seed)
        assert model.a.weight is model.b.weight
        torch.testing.assert_close(model.a.weight, alone.a.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.c.weight, alone.c.weight, rtol=1e-4, atol=1e-5)


def test_large_convolutions_are_not_batched(monkeypatch, few):
    from course_lib.lab import replicas

    image = few.images[:1]
    macs = {n: replicas.convolution_macs(make(n)(0), image) for n in ("mlp32", "cnn_student", "cnn_teacher")}
    # Weights of each kernel, times the positions of its output.
    assert macs == {
        "mlp32": 0,
        "cnn_student": 72 * 64 + 8 * 9 * 16 * 16,
        "cnn_teacher": 64 * (288 + 18432) + 16 * 36864,
    }
    assert macs["cnn_student"] < replicas.LARGEST_BATCHED_CONV < macs["cnn_teacher"]
    monkeypatch.setattr(replicas, "vmap", lambda *a, **k: pytest.fail("batched"))
    fit_replicas(make("cnn_teacher"), [0, 1], few, TrainConfig(epochs=1))


def test_train_many_pairs_seeds_splits_and_starts(few):
    splits = Splits(few, torch.stack([torch.randperm(130)[:60] for _ in range(3)]))
    ours = train_many("mlp8", splits, [5, 6], start=[8, 9], epochs=2, lr=0.01)
    for r, (seed, start) in enumerate([(5, 8), (6, 9)]):
        alone = make("mlp8")(start)
        fit(alone, splits[r], TrainConfig(epochs=2, lr=0.01), seed=seed)
        torch.testing.assert_close(ours[r].fc1.weight, alone.fc1.weight, rtol=1e-4, atol=1e-5)
    more = train_many(ours, splits, [5, 6], config=CONFIG)
    assert more[0] is not ours[0]
    assert not torch.equal(more[0].fc1.weight, ours[0].fc1.weight)
    one = train("mlp8", few, 5, epochs=1)
    (many,) = train_many("mlp8", few, [5], epochs=1)
    torch.testing.assert_close(one.fc1.weight, many.fc1.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda s: train_many("mlp8", s, [0, 1, 2, 3]), ValueError, "4 seeds, but the data has splits for 2"),
        (lambda s: train_many("mlp8", s, [0, 1], start=[0]), ValueError, "1 start seeds for 2 seeds"),
        (lambda s: train_many([make("mlp8")(0)], s, [0, 1]), ValueError, "1 networks for 2 seeds"),
        (lambda s: train_many("mlp8", s, [0, 1], epoch=1), TypeError, "no epoch; it has epochs, batch_size"),
        (lambda s: train_many("mlp8", s, [0, 1], config=CONFIG, lr=1), TypeError, "not both"),
    ],
)
def test_train_many_names_what_does_not_fit(few, call, error, text):
    with pytest.raises(error, match=text):
        call(Splits(few, torch.tensor([[0, 1, 2], [3, 4, 5]])))


def test_nan_stops_with_the_step(few):
    with pytest.raises(DivergedError, match=r"at step 0 \(epoch 0\)"):
        fit_replicas(make("mlp8"), [0, 1], few, CONFIG, loss_fn=lambda z, y: z.sum() * float("nan"))
