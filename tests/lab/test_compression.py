"""Deep Compression's stages, the fair control, every family side by side, and what a device needs."""

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from course_lib.evidence.measure import stored_bytes
from course_lib.gate import weight_layers

from course_lib.lab.compression import (  # isort: skip
    FAMILIES, Bench, Recipe, device_memory, layer_table, measure_families, prune_gradually, share_values, store,
    train_as_long, write_engine_files,
)  # fmt: skip
from course_lib.lab.data import load_replicas
from course_lib.lab.lesson import Lesson
from course_lib.lab.models import build_model
from course_lib.lab.replicas import train_many
from course_lib.lab.training import TrainConfig, accuracy
from course_lib.methods.quantized_layers import fake_quantized

SHORT = Recipe(
    prune=TrainConfig(epochs=2, schedule="constant"),
    settle=TrainConfig(epochs=2),
    share=TrainConfig(epochs=1, lr=1e-3),
)
SEEDS = np.arange(2)


@pytest.fixture(scope="module")
def data():
    return load_replicas("digits", 2)


@pytest.fixture(scope="module")
def dense(data):
    return train_many("lenet300", data, SEEDS, epochs=4)


@pytest.fixture(scope="module")
def stages(dense, data):
    pruned = prune_gradually(dense, data, SEEDS, SHORT, best_on=data.val)
    shared = share_values(pruned, data, SEEDS, SHORT, best_on=data.val)
    coded = {"P": store(pruned, huffman=False), "P+Q": store(shared, huffman=False), "P+Q+H": store(shared)}
    return {"dense": store(dense, safetensors=True), **coded}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# Stages


def test_pruned_to_the_recipe_and_not_a_weight_more_comes_back(stages):
    for network in stages["P"].networks:
        weights = [p for p in network.parameters() if p.dim() == 2]
        assert sum(int((w == 0).sum()) for w in weights) == round(0.92 * sum(w.numel() for w in weights))


def test_zeros_survive_the_codebook_and_every_layer_has_few_values(stages):
    for pruned, shared in zip(stages["P"].networks, stages["P+Q"].networks, strict=True):
        for name, layer in weight_layers(shared).items():
            assert torch.equal(pruned.get_submodule(name).weight == 0, layer.weight == 0)
            assert len(layer.weight.unique()) <= 16
            assert len(layer.bias.unique()) <= 16
            assert torch.equal(layer.weight, layer.weight.half().float())
            assert layer.weight.requires_grad


def test_each_stage_is_smaller_and_huffman_changes_the_file_alone(stages, data):
    fixed, coded = stages["P+Q"], stages["P+Q+H"]
    assert all(same(a, b) for a, b in zip(fixed.networks, coded.networks, strict=True))
    sizes = [stages[name].sizes for name in ("dense", "P", "P+Q", "P+Q+H")]
    assert all((a > b).all() for a, b in itertools.pairwise(sizes))
    assert (sizes[0] / sizes[-1] > 40).all()
    # Chance is 10 %; after two short epochs a stage it works, however much better it would get.
    assert (accuracy(coded.networks, data.test) > 80).all()


def test_the_table_adds_up_to_the_files(stages):
    table = layer_table(stages)
    layers, whole = table.drop("whole file"), table.loc["whole file"]
    assert list(layers.index) == ["fc1", "fc2", "logits"]
    assert whole.weights == layers.weights.sum() == 64 * 300 + 300 * 100 + 100 * 10
    assert whole.kept == pytest.approx(0.08, abs=1e-4)
    for name in ("P", "P+Q", "P+Q+H"):
        size = stages[name].sizes.mean()
        assert 0 < size - (4 * layers.weights / layers[f"× {name}"]).sum() < 2_500  # biases, names and head
        assert whole[f"bits {name}"] == pytest.approx(8 * size / (whole.kept * whole.weights))
        assert whole[f"× {name}"] == pytest.approx(stages["dense"].sizes.mean() / size)
    # Without a codebook every weight that stays takes its 32 bits, and its position a few more.
    assert layers["bits P"].between(32, 45).all()
    assert layers["bits P+Q"].between(4, 16).all()


def test_the_control_takes_as_many_steps_and_no_stage_changes_what_it_is_given(dense, data, monkeypatch):
    import course_lib.lab.compression as compression

    before = [copy.deepcopy(model) for model in dense]
    seen, trained = [], compression.train_many

    def note(models, data, seeds, *, config, **options):
        seen.append(config)
        return trained(models, data, seeds, config=replace(config, epochs=1), **options)

    monkeypatch.setattr(compression, "train_many", note)
    train_as_long(dense, data, SEEDS, SHORT)
    pruned = prune_gradually(dense, data, SEEDS, SHORT)
    share_values(pruned, data, SEEDS, SHORT)
    assert seen[:3] == seen[3:] == [SHORT.prune, SHORT.settle, SHORT.share]
    assert all(same(a, b) for a, b in zip(before, dense, strict=True))


def test_what_comes_back_comes_from_the_file(dense, data, monkeypatch):
    stage = store(dense)
    assert all(a is not b and same(a, b) for a, b in zip(stage.networks, dense, strict=True))
    assert {entry.name for entry in stage.contents[0]} == set(dense[0].state_dict())
    plain = store(dense, safetensors=True)
    assert plain.sizes.tolist() == [stored_bytes(m) for m in dense]
    assert all(same(a, b) for a, b in zip(plain.networks, dense, strict=True))
    monkeypatch.setattr("course_lib.lab.compression.load_compressed", lambda path, model: model)
    assert not any(p.any() for p in store(dense).networks[0].parameters())


# Families


LEVELS = {
    "dense": [None],
    "dense, as long": [None],
    "pruned": [0.8],
    "neurons removed": [0.25],
    "low rank": [8],
    "int8": [None],
    "bits in groups": [4],
    "low-bit training": [2],
    "mixed precision": [(8, 4, 8)],
    "codebook": [2],
    "student": ["mlp32"],
    "distilled": ["mlp32"],
    "pruned + codebook": [(0.8, 3)],
    "neurons removed + int8": [0.25],
    "student + low bits": [("mlp32", 4)],
    "distilled + low bits": [("mlp32", 4)],
}


@pytest.fixture(scope="module")
def bench(data, tmp_path_factory):
    few = type(data)(data.train.subset(range(300)), data.val, data.test, *list(vars(data).values())[3:])
    return Bench(few, SEEDS, teacher="mlp128", recipe=SHORT, folder=tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def table(bench):
    return measure_families(bench, LEVELS).set_index("family")


def test_every_family_is_measured_on_what_came_back(table):
    assert set(table.index) == set(FAMILIES) - {"teacher"}
    assert all(score.shape == (2,) for score in (*table.score, *table.val))
    assert table.score.map(np.mean).drop("low-bit training").min() > 60
    assert table.label[["dense", "pruned", "pruned + codebook"]].tolist() == ["", "0.8", "0.8/3"]
    weights = 64 * 300 + 300 * 100 + 100 * 10
    size, macs = table.bytes, table.macs
    assert macs["dense"] == macs["pruned"] == macs["codebook"] == weights
    assert macs["neurons removed"] == 64 * 75 + 75 * 25 + 250
    assert macs["low rank"] == 8 * (64 + 300 + 300 + 100 + 100 + 10)
    assert size["dense"] == size["dense, as long"] > 4 * weights
    assert weights < size["int8"] < 1.1 * weights
    assert size["codebook"] < 0.3 * weights + 1500
    assert size["low-bit training"] < 0.3 * weights + 1500
    assert size["pruned + codebook"] < size["codebook"] < size["mixed precision"] < size["int8"]
    assert size["distilled + low bits"] < size["distilled"] == size["student"]


def test_networks_are_trained_once(bench, monkeypatch):
    first = bench.networks("pruned + codebook", (0.8, 3))
    kept = len(list(bench.folder.glob("*.safetensors")))
    replace(bench, net="mlp8").networks("dense")
    replace(bench, seeds=SEEDS + 5).networks("dense")
    assert len(list(bench.folder.glob("*.safetensors"))) == kept + 2  # another start, another training
    monkeypatch.setattr("course_lib.lab.compression.train_many", None)
    again = bench.networks("pruned + codebook", (0.8, 3))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    quantized = bench.networks("low-bit training", 2)
    for network in quantized:
        assert network.fc1.weight_bits == 2
        assert torch.equal(network.fc1.weight, network.fc1.made_weight())
        assert network.fc1.input_scale != 1.0
        assert network(bench.data.val.images[:4]).isfinite().all()
    with pytest.raises(ValueError, match="unknown family 'zip'"):
        bench.networks("zip")


def test_a_lesson_s_bench_has_its_data_and_seeds_and_short_trainings():
    lesson = Lesson("06.1", replicas=2, quiet=True)
    shared = Bench.of(lesson)
    assert (shared.data, shared.seeds, shared.teacher) == (lesson.data, lesson.seeds, "cnn_teacher")
    assert [getattr(shared.recipe, stage).epochs for stage in ("prune", "settle", "share")] == [8, 8, 4]


# Devices


def test_memory_of_a_device_by_hand():
    images = torch.randn(32, 1, 8, 8)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10))
    weights, biases, activations = 36 + 640, 14, 64 + 4 * 64
    assert device_memory(model, (1, 8, 8)) == (4 * (weights + biases), 4 * activations)
    eight = fake_quantized(model, weight_bits=8, activation_bits=8, calibration=images)
    assert device_memory(eight, (1, 8, 8)) == (weights + 4 * biases + 4 * biases, activations)
    for bits in (4, 2):  # there is no kernel for less than 4 bits
        few = fake_quantized(model, weight_bits=bits, activation_bits=8, calibration=images)
        assert device_memory(few, (1, 8, 8)) == (weights // 2 + 8 * biases, activations)
    groups = fake_quantized(model, weight_bits={"4": 4}, group=32)
    assert device_memory(groups, (1, 8, 8)) == (4 * 36 + 640 // 2 + 4 * 20 + 4 * biases, 4 * activations)


def test_one_file_a_graph(bench, tmp_path):
    from course_lib.evidence.measure import onnx_session

    families = {"dense": None, "codebook": 2, "int8": None, "low-bit training": 2, "low rank": 8}
    networks = {name: bench.networks(name, level)[0] for name, level in families.items()}
    files = write_engine_files(networks, bench.data.val.images, tmp_path)
    assert files["dense"] == files["codebook"] != files["int8"] == files["low-bit training"]
    assert len({*files.values()}) == len(list(tmp_path.iterdir())) == 3
    session = onnx_session(files["low rank"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: bench.data.val.images[:5].numpy()})
    np.testing.assert_allclose(logits, networks["low rank"](bench.data.val.images[:5]).detach(), atol=1e-4)


def test_convolutions_work_as_well(data):
    models = [build_model("cnn_student", data.input_shape, data.num_classes, seed=s) for s in SEEDS]
    some, recipe = data.train.subset(range(200)), replace(SHORT, sparsity=0.5, bits=3)
    pruned = prune_gradually(models, some, SEEDS, recipe)
    shared = share_values(pruned, some, SEEDS, recipe)
    assert all(len(m.conv2.weight.unique()) <= 8 for m in shared)
    assert torch.equal(shared[1].conv2.weight == 0, pruned[1].conv2.weight == 0)
