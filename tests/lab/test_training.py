import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from course_lib.lab.data import Split, Splits
from course_lib.lab.models import build_model

from course_lib.lab.training import (  # isort: skip
    BestEpoch, DivergedError, TrainConfig, accuracy, epoch_batches, evaluate, fit, logits_of, use_threads,
)  # fmt: skip


def mlp(seed=0):
    return build_model("mlp8", (1, 8, 8), 10, seed=seed)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_equals_a_plain_adamw_loop(few, schedule):
    rates = {
        "constant": [1, 1, 1, 1, 1, 1],
        "linear": [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6],
        "cosine": [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)],
    }[schedule]
    config, ours, again, plain = TrainConfig(epochs=2, batch_size=50, schedule=schedule), mlp(), mlp(), mlp()
    fit(ours, few, config, seed=3)
    fit(again, few, config, seed=3)
    assert torch.equal(weights(ours), weights(again))  # bit for bit
    optimizer, rates = torch.optim.AdamW(plain.parameters(), weight_decay=config.weight_decay), iter(rates)
    orders = [list(epoch_batches(len(few), 50, 3, epoch)) for epoch in range(2)]
    for index in itertools.chain(*orders):
        optimizer.param_groups[0]["lr"] = config.lr * next(rates)
        optimizer.zero_grad()
        F.cross_entropy(plain(few.images[index]), few.labels[index]).backward()
        optimizer.step()
    torch.testing.assert_close(weights(ours), weights(plain), rtol=1e-5, atol=1e-6)
    first, second = (torch.cat(order).tolist() for order in orders)
    assert sorted(first) == list(range(130))
    # Stored lessons depend on this order.
    assert second == torch.randperm(130, generator=torch.Generator().manual_seed(3 * 1_000_003 + 1)).tolist() != first


def test_only_the_model_and_what_is_trainable_changes(few):
    model, mask = mlp(), (torch.rand(10, 8) > 0.5).float()
    model.fc1.requires_grad_(False)
    frozen, generator = model.fc1.weight.clone(), torch.get_rng_state()

    def keep(parameters, step):
        parameters["logits.weight"].mul_(mask)

    fit(nn.Sequential(nn.Dropout(0.5), model), few, TrainConfig(epochs=1))
    fit(model, few, TrainConfig(epochs=2), after_step=keep)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(model.fc1.weight, frozen)
    assert torch.equal(model.logits.weight != 0, mask == 1)


def test_the_best_epoch_is_the_first_of_highest_accuracy_then_lowest_loss(few, digits):
    model = mlp()
    history = fit(model, few, TrainConfig(epochs=6, lr=0.05), val=digits.val)
    ranks = list(zip(history.val_accuracy, [-loss for loss in history.val_loss], strict=True))
    assert history.best_epoch == ranks.index(max(ranks))
    seen = evaluate(model, digits.val)
    assert seen.accuracy == history.val_accuracy[history.best_epoch]
    assert seen.loss == pytest.approx(history.val_loss[history.best_epoch], rel=1e-6)
    best = BestEpoch()
    for epoch, (share, loss) in enumerate([(0.5, 1.0), (0.5, 0.9), (0.5, 0.9), (0.4, 0.1)]):
        best.offer(epoch, share, loss, model)
    assert best.epoch == 1


def test_named_terms_and_positions_reach_the_history(few):
    seen = []

    def loss(logits, labels, index):
        seen.append(index)
        assert torch.equal(few.labels[index], labels)
        ce = F.cross_entropy(logits, labels)
        return {"loss": 2 * ce, "ce": ce}

    history = fit(mlp(), few, TrainConfig(epochs=2), loss_fn=loss)
    assert sorted(torch.cat(seen[:3]).tolist()) == list(range(130))
    assert history.terms["loss"] == pytest.approx([2 * v for v in history.terms["ce"]])


def test_modes_are_left_as_they_were(few):
    model = build_model("cnn_teacher", (1, 8, 8), 10, seed=0).eval()
    model.bn1.train()
    evaluate(model, few)
    assert model.bn1.training
    assert not model.bn2.training
    fit(model.eval(), few, TrainConfig(epochs=1))
    assert not model.training


def test_nan_stops_with_the_step(few):
    def loss(logits, labels, calls=[0]):  # noqa: B006
        calls[0] += 1
        return logits.sum() * (float("nan") if calls[0] == 3 else 1.0)

    with pytest.raises(DivergedError, match=r"nan at step 2 \(epoch 0\).*learning rate below"):
        fit(mlp(), few, TrainConfig(epochs=2), loss_fn=loss)


def test_a_last_image_that_is_left_over_joins_the_batch_before(few):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    history = fit(net, few.subset(range(129)), TrainConfig(epochs=1, batch_size=64))
    assert history.steps == TrainConfig(epochs=1, batch_size=64).steps(129) == 2
    assert [len(b) for b in epoch_batches(129, 64, 0, 0)] == [64, 65]
    assert [len(b) for b in epoch_batches(65, 64, 0, 0)] == [65]
    assert [len(b) for b in epoch_batches(3, 1, 0, 0)] == [1, 1, 1]
    with pytest.raises(ValueError, match=r"batch of 1: use a batch_size of at least 2"):
        fit(net, few, TrainConfig(epochs=1, batch_size=1))


def test_each_model_meets_its_own_split(few):
    models, splits = [mlp(0), mlp(1)], Splits(few, torch.tensor([[0, 1, 2], [3, 4, 5]]))
    expected = [100 * evaluate(m, few.subset(range(3 * r, 3 * r + 3))).accuracy for r, m in enumerate(models)]
    assert accuracy(models, splits).tolist() == accuracy(iter(models), splits).tolist() == expected
    assert accuracy(models, few).tolist() == [100 * evaluate(m, few).accuracy for m in models]
    assert accuracy(models[0], few).shape == (1,)
    assert torch.equal(logits_of(models, splits)[1], evaluate(models[1], splits[1]).logits)
    with pytest.raises(ValueError, match=r"1 models and 2 splits.*split\[:1\]"):
        accuracy(models[:1], splits)
    with pytest.raises(ValueError, match="models is empty"):
        accuracy([], few)
    with pytest.raises(TypeError, match="one Split, such as data"):
        evaluate(models[0], splits)


def test_threads_are_wanted_and_no_more(monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(8), raising=False)
        for given, wanted, found in (("", 3, 3), ("2,4", 3, 2), ("x", 2, 2), ("0", 2, 2), ("16", 9, 8)):
            monkeypatch.setenv("OMP_NUM_THREADS", given)
            assert use_threads(wanted) == torch.get_num_threads() == found
        with pytest.raises(ValueError, match="wanted must be an integer of at least 1, got 0"):
            use_threads(0)
    finally:
        torch.set_num_threads(before)


def test_a_bar_only_for_a_person(few, monkeypatch, capsys):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("COURSE_UNATTENDED", raising=False)
    fit(mlp(), few, TrainConfig(epochs=1), progress=True)
    assert capsys.readouterr().err == ""  # over before a bar would help
    monkeypatch.setattr("course_lib.lab.training.BAR_DELAY", 0)
    fit(mlp(), few, TrainConfig(epochs=1), progress=True)
    assert "epochs" in capsys.readouterr().err
    monkeypatch.setenv("COURSE_UNATTENDED", "1")
    fit(mlp(), few, TrainConfig(epochs=1), progress=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"epochs": 0}, "epochs"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": 0.0}, "lr"),
        ({"schedule": "sine"}, "constant, linear, cosine"),
    ],
)
def test_bad_config(change, text):
    with pytest.raises(ValueError, match=text):
        TrainConfig(**change)


@pytest.mark.parametrize(
    ("model", "loss_fn", "error", "says"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), None, ValueError, "num_classes=10"),
        (nn.Conv2d(1, 1, 1), None, ValueError, r"logits \[N, K\]"),
        (mlp().requires_grad_(False), None, ValueError, "nothing to train"),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), None, ValueError, "a lazy layer"),
        (len, None, TypeError, r"must be a torch\.nn\.Module"),
        (mlp(), 3, TypeError, "callable"),
        (mlp(), lambda z, y: {"ce": F.cross_entropy(z, y)}, ValueError, "the key 'loss'"),
        (mlp(), lambda z, y: F.cross_entropy(z, y, reduction="none"), ValueError, r"scalar tensor, got shape \(64,\)"),
    ],
)
def test_bad_input_is_named(few, model, loss_fn, error, says):
    with pytest.raises(error, match=says):
        fit(model, few, loss_fn=loss_fn)
    with pytest.raises(ValueError, match="empty"):
        fit(mlp(), Split(few.images[:0], few.labels[:0]))


def test_a_look_leaves_a_model_that_can_be_trained(few):
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    accuracy(lazy, few)
    before = weights(lazy)
    fit(lazy, few, TrainConfig(epochs=1))
    assert (weights(lazy) != before).any()


class Index(nn.Module):
    def forward(self, logits, labels, index):
        self.seen = index
        return F.cross_entropy(logits, labels)


def test_a_loss_that_is_a_module_gets_the_positions(few):
    loss = Index()
    fit(mlp(), few, TrainConfig(epochs=1, batch_size=len(few)), loss_fn=loss, seed=np.int64(0))
    assert sorted(loss.seen.tolist()) == list(range(len(few)))


def with_nan():
    model = mlp()
    model.logits.bias.data[3] = math.nan
    return model


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = nn.LSTM(8, 6, batch_first=True)

    def forward(self, images):
        return self.rows(images[:, 0])


@pytest.mark.parametrize("look", [evaluate, accuracy, fit])
@pytest.mark.parametrize(
    ("make", "told"),
    [
        (with_nan, "rows of logits hold NaN|the loss is nan"),
        (Two, r"must return logits \[N, K\], got a tuple"),
        (lambda: mlp().double(), "the model is torch.float64 and the images are torch.float32"),
    ],
)
def test_answers_that_are_none_are_named(few, look, make, told):
    with pytest.raises((ValueError, DivergedError), match=told):
        look(make(), few)
