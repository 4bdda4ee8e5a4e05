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
SAME = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


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


def test_everything_reaches_its_replica(few, digits):
    """Splits, settings, positions, a mask and the best epoch of one's own; started from trained models, which stay."""
    tables, scales = torch.randn(2, 100, 10), torch.tensor([0.0, 2.0])
    splits = [digits.train.subset(range(0, 100)), digits.train.subset(range(100, 200))]
    mask = (torch.rand(2, 8, 64) > 0.5).float()
    trained, generator = make("mlp8")(4).eval(), torch.get_rng_state()
    before = trained.fc1.weight.clone()

    def loss(logits, labels, index, table, scale):
        return F.cross_entropy(logits, labels) + scale * F.mse_loss(logits, table[index])

    def keep(parameters, step):
        parameters["fc1.weight"].mul_(mask)

    options = {"loss_fn": loss, "settings": {"table": tables, "scale": scales}, "after_step": keep, "val": digits.val}
    config = TrainConfig(epochs=4, batch_size=50, lr=0.05)
    together = fit_replicas(lambda seed: copy.deepcopy(trained), [4, 4], splits, config, **options)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(trained.fc1.weight, before)
    for r, model in enumerate(together):

        def own_loss(logits, labels, index, r=r):
            return loss(logits, labels, index, tables[r], scales[r])

        def own_mask(parameters, step, r=r):
            parameters["fc1.weight"].mul_(mask[r])

        alone = copy.deepcopy(trained)
        history = fit(alone, splits[r], config, loss_fn=own_loss, after_step=own_mask, val=digits.val, seed=4)
        assert not model.training
        assert (model.fc1.weight[mask[r] == 0] == 0).all()
        assert evaluate(model, digits.val).accuracy == pytest.approx(max(history.val_accuracy), abs=0.008)
        torch.testing.assert_close(model.fc1.weight, alone.fc1.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("made", "seeds", "options", "says"),
    [
        (make("mlp8"), [], {}, "seeds is empty"),
        (lambda s: make("mlp8" if s == 0 else "mlp32")(s), [0, 1], {}, r"replica 1 .*another network.*fc1.weight"),
        (lambda s: SAME, [0, 1], {}, "same object twice"),
        (make("mlp8"), [0, 1], {"settings": {"T": torch.ones(3)}}, r"settings\['T'\].*2 seeds.*\(3,\)"),
        (lambda s: make("mlp8")(s).requires_grad_(False), [0], {}, "nothing to train"),
        (lambda s: nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), [0], {}, "num_classes=10"),
    ],
)
def test_bad_input_is_named(few, made, seeds, options, says):
    with pytest.raises(ValueError, match=says):
        fit_replicas(made, seeds, few, **options)


def test_splits_that_do_not_fit_are_named(few):
    with pytest.raises(ValueError, match="1 splits for 2 seeds"):
        fit_replicas(make("mlp8"), [0, 1], [few])
    with pytest.raises(ValueError, match="same shape"):
        fit_replicas(make("mlp8"), [0, 1], [few, few.subset(range(9))])


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
    with pytest.raises(TypeError, match="one Split, such as data"):
        train("mlp8", splits)


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


def changed(change):
    def make_changed(seed):
        model = make("mlp8")(seed)
        change(model, seed)
        return model

    return make_changed


def another_activation(model, seed):
    model.relu1 = nn.Tanh() if seed else nn.ReLU()


def a_shared_layer(model, seed):
    model.logits = SHARED


def a_hook_on_a_weight(model, seed):
    model.fc1.weight.register_hook(lambda gradient: 0 * gradient)


def a_forward_that_is_a_closure(model, seed):
    model.forward = lambda x: model.logits(model.relu1(model.fc1(x.flatten(1))))


def one_memory(model, seed):
    model.logits = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 10))
    model.logits[1].weight.data = model.logits[0].weight.data.t()


class Drifting(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.in_place, self.layer = in_place, nn.Linear(64, 10)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, images):
        mean = 0.9 * self.mean + 0.1 * images.mean()
        if self.training and self.in_place:
            self.mean.copy_(mean.detach())
        elif self.training:
            self.mean = mean
        return self.layer(images.flatten(1))


SHARED = nn.Linear(8, 10)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (another_activation, "Tanh.* where replica 0 has .*ReLU"),
        (a_shared_layer, "replicas 0 and 1 share logits.weight"),
        (a_hook_on_a_weight, "a copy would lose the hook on its weight"),
        (a_forward_that_is_a_closure, "'forward' is a function that holds"),
        (one_memory, "logits.0.weight and logits.1.weight share memory"),
    ],
)
def test_what_a_stacked_copy_would_get_wrong_is_refused(few, change, told):
    with pytest.raises(ValueError, match=told):
        fit_replicas(changed(change), [0, 1], few, CONFIG)


def test_a_buffer_is_written_or_refused(few):
    with pytest.raises(ValueError, match="a new tensor in the place of the buffer 'mean'"):
        fit_replicas(lambda seed: Drifting(False), [0, 1], few, CONFIG)
    alone, together = Drifting(True), fit_replicas(lambda seed: Drifting(True), [0, 1], few, CONFIG)[0]
    fit(alone, few, CONFIG, seed=0)
    torch.testing.assert_close(together.mean, alone.mean)


class Rows(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.rows, self.last = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 10)

    def forward(self, images):
        return self.last(self.rows(images[:, 0])[0][:, -1])


def test_a_recurrent_network_is_trained_one_after_another(few):
    alone, together = Rows(1), fit_replicas(Rows, [0, 1], few, CONFIG)[1]
    fit(alone, few, CONFIG, seed=1)
    torch.testing.assert_close(together.rows.weight_hh_l0, alone.rows.weight_hh_l0, rtol=1e-3, atol=1e-4)
