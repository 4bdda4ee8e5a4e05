import copy

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


def test_same_seed_same_weights_bit_for_bit(few):
    models = [mlp() for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        fit(model, few, TrainConfig(epochs=2), seed=seed)
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert not torch.equal(weights(models[0]), weights(models[2]))


def test_equals_a_plain_adamw_loop(few):
    config, ours, plain = TrainConfig(epochs=2, batch_size=50, schedule="linear"), mlp(), mlp()
    fit(ours, few, config, seed=3)
    optimizer, step, total = torch.optim.AdamW(plain.parameters(), weight_decay=config.weight_decay), 0, 2 * 3
    for epoch in range(2):
        for index in epoch_batches(len(few), 50, 3, epoch):
            optimizer.param_groups[0]["lr"] = config.lr * (1 - step / total)
            optimizer.zero_grad()
            F.cross_entropy(plain(few.images[index]), few.labels[index]).backward()
            optimizer.step()
            step += 1
    torch.testing.assert_close(weights(ours), weights(plain), rtol=1e-5, atol=1e-6)


def test_every_image_once_an_epoch_in_another_order():
    first, second = (torch.cat(list(epoch_batches(10, 3, 0, epoch))) for epoch in (0, 1))
    assert sorted(first.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()


def test_global_generator_is_left_alone(few):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    fit(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10)), few, TrainConfig(epochs=1))
    after = torch.get_rng_state()
    torch.manual_seed(0)
    nn.Linear(64, 10)
    assert torch.equal(after, torch.get_rng_state())
    assert not torch.equal(after, before)


def test_schedules_count_steps():
    assert [TrainConfig(lr=1.0, schedule="cosine").lr_at(s, 4) for s in (0, 2)] == pytest.approx([1.0, 0.5])
    assert TrainConfig(lr=1.0, schedule="constant").lr_at(3, 4) == 1.0


def test_best_epoch_is_chosen_on_validation_only(few, digits):
    model = mlp()
    history = fit(model, few, TrainConfig(epochs=6, lr=0.05), val=digits.val)
    best = history.best_epoch
    assert history.val_accuracy[best] == max(history.val_accuracy)
    seen = evaluate(model, digits.val)
    assert seen.accuracy == history.val_accuracy[best]
    assert seen.loss == pytest.approx(history.val_loss[best], rel=1e-6)


def test_ties_go_to_the_lower_loss_then_to_the_earlier_epoch():
    best, model = BestEpoch(), mlp()
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


def test_after_step_keeps_a_mask(few):
    model, mask = mlp(), (torch.rand(8, 64) > 0.5).float()

    def keep(parameters, step):
        parameters["fc1.weight"].mul_(mask)

    fit(model, few, TrainConfig(epochs=2), after_step=keep)
    assert (model.fc1.weight[mask == 0] == 0).all()
    assert (model.fc1.weight[mask == 1] != 0).all()


def test_frozen_parameters_do_not_move(few):
    model = mlp()
    model.fc1.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    fit(model, few, TrainConfig(epochs=1))
    assert torch.equal(model.fc1.weight, before["fc1.weight"])
    assert not torch.equal(model.logits.weight, before["logits.weight"])


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
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"schedule": "sine"}, "constant, linear, cosine"),
    ],
)
def test_bad_config(change, text):
    with pytest.raises(ValueError, match=text):
        TrainConfig(**change)


def test_bad_input_is_named(few):
    small = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    with pytest.raises(ValueError, match="num_classes=10"):
        fit(small, few)
    with pytest.raises(ValueError, match="num_classes=10"):
        evaluate(small, few)
    with pytest.raises(ValueError, match="empty"):
        fit(mlp(), Split(few.images[:0], few.labels[:0]))
    with pytest.raises(ValueError, match=r"scalar tensor, got shape \(64,\)"):
        fit(mlp(), few, loss_fn=lambda z, y: F.cross_entropy(z, y, reduction="none"))
    with pytest.raises(ValueError, match="the key 'loss'"):
        fit(mlp(), few, loss_fn=lambda z, y: {"ce": F.cross_entropy(z, y)})
    with pytest.raises(TypeError, match="callable"):
        fit(mlp(), few, loss_fn=3)
    with pytest.raises(ValueError, match="nothing to train"):
        fit(mlp().requires_grad_(False), few)
    with pytest.raises(ValueError, match="a lazy layer"):
        fit(nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), few)
    with pytest.raises(ValueError, match=r"logits \[N, K\]"):
        fit(nn.Conv2d(1, 1, 1), few)
