"""Deep Compression's stages: zeros that stay, values that are shared, files that are read back, the paper's factors."""

import copy

import pytest
import torch
from torch import nn

from course_lib.lab.blends import follow_teacher, teacher_answers
from course_lib.lab.data import load_dataset
from course_lib.lab.deep_compression import (
    Lesson,
    Recipe,
    deep_compress,
    layer_figures,
    prune_gradually,
    share_values,
    store,
    train_copies,
)
from course_lib.lab.models import build_model
from course_lib.lab.training import TrainConfig, evaluate, fit

SHORT = {
    "prune": TrainConfig(epochs=2, schedule="constant"),
    "settle": TrainConfig(epochs=2),
    "share": TrainConfig(epochs=1, lr=1e-3),
}
SEEDS = [0, 1]


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", seed=0)


@pytest.fixture(scope="module")
def lesson(data):
    return Lesson(data.train, data.val)


@pytest.fixture(scope="module")
def dense(data):
    models = [build_model("lenet300", data.input_shape, data.num_classes, seed=seed) for seed in SEEDS]
    for seed, model in zip(SEEDS, models, strict=True):
        fit(model, data.train, TrainConfig(epochs=6), val=data.val, seed=seed)
    return models


@pytest.fixture(scope="module")
def stages(dense, lesson, tmp_path_factory):
    return deep_compress(dense, SEEDS, lesson, Recipe(**SHORT), tmp_path_factory.mktemp("files"))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


@torch.no_grad()
def apart(a, b):
    """Mean distance of the weights: where a gradient is nearly zero, Adam turns rounding into a step."""
    return float((a.fc1.weight - b.fc1.weight).abs().mean())


def test_the_networks_given_are_left_alone(dense, lesson):
    before = [state(m) for m in dense]
    prune_gradually(dense, SEEDS, lesson, Recipe(**SHORT))
    share_values(dense, SEEDS, lesson, Recipe(**SHORT))
    assert all(same(old, state(m)) for old, m in zip(before, dense, strict=True))


def test_pruned_to_the_recipe_and_not_a_weight_more_comes_back(stages):
    for network in stages["P"].networks:
        weights = [p for p in network.parameters() if p.dim() == 2]
        total = sum(w.numel() for w in weights)
        assert sum(int((w == 0).sum()) for w in weights) == round(0.92 * total)


def test_zeros_survive_the_codebook_and_every_layer_has_few_values(stages):
    for pruned, shared in zip(stages["P"].networks, stages["P+Q"].networks, strict=True):
        for name in ("fc1", "fc2", "logits"):
            before, after = pruned.get_submodule(name), shared.get_submodule(name)
            assert torch.equal(before.weight == 0, after.weight == 0)
            assert len(after.weight.unique()) <= 16
            assert len(after.bias.unique()) <= 16
            assert torch.equal(after.weight, after.weight.half().float())


def test_huffman_changes_the_file_alone(stages):
    fixed, coded = stages["P+Q"], stages["P+Q+H"]
    assert all(same(state(a), state(b)) for a, b in zip(fixed.networks, coded.networks, strict=True))
    assert all(a > b for a, b in zip(fixed.sizes, coded.sizes, strict=True))


def test_each_stage_is_smaller_and_the_whole_is_forty_times(stages, data):
    sizes = [stages[name].mean_size for name in ("dense", "P", "P+Q", "P+Q+H")]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] / sizes[-1] > 40
    # Chance is 10 %; after two short epochs a stage it works, however much better it would get.
    assert all(evaluate(m, data.test).accuracy > 0.85 for m in stages["P+Q+H"].networks)


def test_the_table_adds_up_to_the_files(stages):
    *layers, whole = layer_figures(stages)
    assert [row["layer"] for row in layers] == ["fc1", "fc2", "logits"]
    assert whole["weights"] == sum(row["weights"] for row in layers) == 64 * 300 + 300 * 100 + 100 * 10
    assert whole["kept"] == pytest.approx(0.08, abs=1e-4)
    for name in ("P", "P+Q", "P+Q+H"):
        parts = sum(4 * row["weights"] / row[f"x {name}"] for row in layers)
        assert 0 < stages[name].mean_size - parts < 2_500  # biases, names and head
        kept = whole["kept"] * whole["weights"]
        assert whole[f"bits {name}"] == pytest.approx(8 * stages[name].mean_size / kept)
    # Without a codebook every weight that stays takes its 32 bits, and its position a few more.
    assert all(32 < row["bits P"] < 45 for row in layers)
    assert all(4 < row["bits P+Q"] < 16 for row in layers)


def test_what_comes_back_comes_from_the_file(dense, tmp_path):
    stage = store(dense[:1], tmp_path, "net")
    (path,) = tmp_path.iterdir()
    assert stage.sizes == [path.stat().st_size]
    assert stage.networks[0] is not dense[0]
    assert same(state(stage.networks[0]), state(dense[0]))
    assert {entry.name for entry in stage.contents[0]} == set(dense[0].state_dict())


def test_the_dense_form_is_safetensors(dense, tmp_path):
    from safetensors.torch import load_file

    stage = store(dense[:1], tmp_path, "net", form="dense")
    assert same(load_file(tmp_path / "net-0"), dict(sorted(state(dense[0]).items())))
    assert same(state(stage.networks[0]), state(dense[0]))


def test_one_network_trains_as_it_would_among_others(dense, lesson):
    config = TrainConfig(epochs=1)
    (alone,) = train_copies(dense[:1], SEEDS[:1], lesson, config)
    among = train_copies(dense, SEEDS, lesson, config)[0]
    assert apart(alone, among) < 1e-5 < 1e-3 < apart(alone, dense[0])


def test_a_teachers_answers_reach_one_network_and_several(data, dense):
    answers = torch.stack([teacher_answers(m, data.train) for m in dense])
    lesson = Lesson(data.train, data.val, follow_teacher, {"teacher": answers})
    config = TrainConfig(epochs=1)
    both = train_copies(dense, SEEDS, lesson, config)
    one = Lesson(data.train, data.val, follow_teacher, {"teacher": answers[1:]})
    (alone,) = train_copies(dense[1:], SEEDS[1:], one, config)
    (labels,) = train_copies(dense[1:], SEEDS[1:], Lesson(data.train, data.val), config)
    assert apart(alone, both[1]) < 1e-5 < 1e-4 < apart(alone, labels)


def test_convolutions_work_as_well(data, lesson):
    model = build_model("cnn_student", data.input_shape, data.num_classes, seed=0)
    pruned = prune_gradually([model], [0], lesson, Recipe(sparsity=0.5, **SHORT))
    (shared,) = share_values(pruned, [0], lesson, Recipe(bits=3, **SHORT))
    assert isinstance(shared.conv1, nn.Conv2d)
    assert len(shared.conv2.weight.unique()) <= 8
    assert torch.equal(shared.conv2.weight == 0, pruned[0].conv2.weight == 0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sparsity": 1.0}, "sparsity must be in"),
        ({"bits": 0}, "bits must be a whole number from 1 to 8"),
        ({"bits": 4.0}, "bits must be a whole number"),
        ({"bias_bits": 9}, "bias_bits must be a whole number"),
    ],
)
def test_impossible_recipes_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        Recipe(**options)


def test_an_unknown_scope_is_refused_before_training(dense, lesson):
    with pytest.raises(ValueError, match="scope must be one of"):
        prune_gradually(dense, SEEDS, lesson, Recipe(scope="world", **SHORT))


def test_networks_without_seeds_are_refused(dense, lesson):
    with pytest.raises(ValueError, match="2 models for 1 seeds"):
        train_copies(dense, [0], lesson, TrainConfig(epochs=1))
    with pytest.raises(ValueError, match="at least one"):
        train_copies([], [], lesson, TrainConfig(epochs=1))


def test_an_unknown_form_is_refused_and_nothing_is_written(dense, tmp_path):
    with pytest.raises(ValueError, match="form must be one of 'dense', 'fixed', 'huffman', got 'zip'"):
        store(copy.deepcopy(dense), tmp_path, "net", form="zip")
    assert not list(tmp_path.iterdir())
