import hashlib
import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from course_lib.files import cache_folder

from course_lib.lab.checkpoints import (  # isort: skip
    CheckpointError, checkpoint_key, load_checkpoint, save_checkpoint, train_or_load,
)  # fmt: skip
from course_lib.lab.data import Splits
from course_lib.lab.models import build_model
from course_lib.lab.training import TrainConfig


def mlp(seed=0):
    return build_model("mlp8", (1, 8, 8), 10, seed=seed)


def test_round_trip_with_buffers_and_replicas(tmp_path):
    models = [build_model("cnn_teacher", (1, 8, 8), 10, seed=s) for s in (0, 1)]
    models[1].bn1.running_mean.fill_(3.0)
    path = save_checkpoint(tmp_path / "a.safetensors", models)
    others = [build_model("cnn_teacher", (1, 8, 8), 10, seed=s) for s in (5, 6)]
    load_checkpoint(path, others)
    for model, other in zip(models, others, strict=True):
        for name, tensor in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "a.safetensors.sha256"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (tmp_path / "a.safetensors.sha256").read_text() == f"{digest}  a.safetensors\n"


def damaged(path, kind):
    data, digest = path.read_bytes(), path.with_name(f"{path.name}.sha256")
    if kind == "truncated":
        path.write_bytes(data[:-7])
    elif kind == "flipped":
        path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    elif kind == "foreign":
        path.write_bytes(b"PK\x03\x04 this is another kind of file")
        digest.write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    else:
        digest.unlink()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("truncated", "sha256"),
        ("flipped", "sha256"),
        ("foreign", "cannot be read"),
        ("without digest", "cannot be read"),
    ],
)
def test_damage_is_named_leaves_the_model_alone_and_is_mended(kind, says, tmp_path):
    train_or_load("small", lambda: mlp(0), lambda m: None, key={}, folder=tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    damaged(path, kind)
    other = mlp(1)
    before = other.fc1.weight.clone()
    with pytest.raises(CheckpointError, match=f"{path.name}.*{says}"):
        load_checkpoint(path, other)
    assert torch.equal(other.fc1.weight, before)
    with pytest.warns(UserWarning, match=rf"training anew: .*{path.name}"):
        train_or_load("small", lambda: mlp(0), lambda m: None, key={}, folder=tmp_path)
    train_or_load("small", mlp, lambda m: pytest.fail("the new one is sound"), key={}, folder=tmp_path)


def test_another_model_is_refused(tmp_path):
    path = save_checkpoint(tmp_path / "a.safetensors", mlp(0))
    for other in (build_model("mlp32", (1, 8, 8), 10), [mlp(0), mlp(1)]):
        with pytest.raises(CheckpointError, match=r"does not fit the model.*[01]\.fc1"):
            load_checkpoint(path, other)


def test_tied_weights_come_back_tied(tmp_path):
    def tied(value):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[1].weight = model[0].weight
        nn.init.constant_(model[0].weight, value)
        return model

    path, other = save_checkpoint(tmp_path / "a.safetensors", tied(3.0)), tied(1.0)
    load_checkpoint(path, other)
    assert other[1].weight is other[0].weight
    assert (other[0].weight == 3).all()


def test_trains_once_then_loads_what_was_trained_or_returned():
    calls = []

    def train(model):
        calls.append(1)
        nn.init.constant_(model.fc1.weight, 2.0)
        return "a history, which is not a model"

    for _ in range(2):
        model = train_or_load("small", mlp, train, key={"seed": 0})
        assert (model.fc1.weight == 2).all()
    assert len(calls) == 1
    train_or_load("small", mlp, train, key={"seed": 1})
    assert len(calls) == 2
    assert len(list(cache_folder("checkpoints").glob("small-*.safetensors"))) == 2
    first = train_or_load("list", lambda: [mlp(0)], lambda models: [mlp(9)], key={})
    again = train_or_load("list", lambda: [mlp(0)], lambda models: pytest.fail("trained twice"), key={})
    assert torch.equal(first[0].fc1.weight, again[0].fc1.weight)
    assert torch.equal(again[0].fc1.weight, mlp(9).fc1.weight)


def test_a_full_disk_costs_the_file_and_not_the_training(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"No space.*a\.safetensors"):
        save_checkpoint(tmp_path / "a.safetensors", mlp())
    assert list(tmp_path.iterdir()) == []
    with pytest.warns(UserWarning, match=r"could not be kept.*No space.*small-\w+\.safetensors"):
        model = train_or_load("small", mlp, lambda m: nn.init.constant_(m.fc1.weight, 2.0), key={}, folder=tmp_path)
    assert (model.fc1.weight == 2).all()


def test_a_read_only_folder_needs_no_lock(tmp_path, monkeypatch):
    train_or_load("small", mlp, lambda m: nn.init.constant_(m.fc1.weight, 2.0), key={"seed": 0}, folder=tmp_path)
    for path in tmp_path.iterdir():
        if path.suffix == ".lock":
            path.unlink()
    before, real_open = sorted(tmp_path.iterdir()), os.open

    def read_only(path, flags, *args, **kwargs):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    model = train_or_load("small", mlp, lambda m: pytest.fail("trained"), key={"seed": 0}, folder=tmp_path)
    assert (model.fc1.weight == 2).all()
    with pytest.warns(UserWarning, match="cannot be kept, training without it"):
        train_or_load("small", mlp, lambda m: None, key={"seed": 1}, folder=tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def _race(folder, log):
    def train(model):
        time.sleep(0.3)
        with Path(log).open("a") as file:
            file.write("trained\n")

    train_or_load("shared", mlp, train, key={"seed": 0}, folder=folder)


def test_two_processes_train_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_race, args=(str(tmp_path / "c"), str(tmp_path / "log"))) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0, 0]
    assert (tmp_path / "log").read_text() == "trained\n"


@dataclass(frozen=True)
class Other:
    epochs: int = 20


def test_the_key_holds_everything(few):
    base = {"data": few, "config": TrainConfig(), "seeds": range(3), "init": mlp(0), "note": None}
    changes = [
        {"data": few.subset(range(129))},
        {"config": TrainConfig(epochs=3)},
        {"config": Other()},
        {"seeds": range(4)},
        {"init": mlp(1)},
        {"note": 1.5},
        {"seeds": np.arange(3)},
        {"data": Splits(few, torch.arange(8).view(2, 4))},
        {"data": Splits(few, torch.arange(8).view(2, 4).flip(0))},
    ]
    assert len({checkpoint_key(**base | change) for change in ({}, {}, *changes)}) == 10
    assert checkpoint_key(seed=np.int64(3)) == checkpoint_key(seed=3)


def test_parts_without_stable_content_are_refused():
    with pytest.raises(TypeError, match=r"key\.loss: a function"):
        checkpoint_key(loss=len.__class__ and (lambda: 0))
    with pytest.raises(ValueError, match="name must be"):
        train_or_load("../x", mlp, lambda m: None, key={})


def test_a_tuple_of_trained_models_is_kept(tmp_path):
    def trained(models):
        return tuple(nn.Linear(2, 2).requires_grad_(True) for _ in models)

    def start():
        return [nn.Linear(2, 2), nn.Linear(2, 2)]

    first = train_or_load("pair", start, trained, key={}, folder=tmp_path)
    again = train_or_load("pair", start, lambda models: pytest.fail("trained twice"), key={}, folder=tmp_path)
    assert torch.equal(first[1].weight, again[1].weight)
