"""The bench's shared networks and every family's cell: trained once, architecture as promised, bytes from a file."""

import pytest
import torch

from course_lib.evidence.measure import count_macs, sparsity, stored_bytes
from course_lib.lab import families
from course_lib.lab.families import FAMILIES, measure_trial, network_of, working_memory
from course_lib.lab.models import build_model
from course_lib.lab.study_grid import Trial
from course_lib.lab.workbench import Workbench, narrow_lenet

OPTIONS = {"dataset": "digits", "split_seed": 0, "width": 0.2}
LEVELS = {
    "dense": None,
    "dense, longer": None,
    "magnitude": 0.8,
    "neurons": 0.5,
    "int8": None,
    "qat": 2,
    "codebook": 2,
    "student": "mlp8",
    "distilled": "mlp8",
    "prune+codebook": "0.8/3",
    "codebook+prune": "0.8/3",
    "prune+distil+codebook": "0.8/3",
    "distil+prune+codebook": "0.8/3",
    "neurons+int8": 0.5,
    "distil+int8": "mlp8",
    "distil+qat": "mlp8/4",
}


@pytest.fixture(autouse=True, scope="module")
def quick_bench(tmp_path_factory):
    """Everything here is about form, not accuracy: a training of one or two epochs does, and nobody's cache is used."""
    patch = pytest.MonkeyPatch()
    patch.setenv("COURSE_CACHE", str(tmp_path_factory.mktemp("cache")))
    whole = Workbench.config
    patch.setattr(
        Workbench, "config", lambda self, epochs, **options: whole(self, max(1, epochs // 8), **options)
    )  # fmt: skip
    yield
    patch.undo()


def trial(method, level="default", seed=0, **more):
    return Trial(method, LEVELS[method] if level == "default" else level, seed, OPTIONS | more)


@pytest.fixture(scope="module")
def rows(quick_bench):
    return {method: measure_trial(trial(method)) for method in FAMILIES}


def test_every_family_is_tried_here():
    assert set(LEVELS) == set(FAMILIES)


@pytest.mark.parametrize("method", LEVELS)
def test_rows_are_complete_and_sound(rows, method):
    row = rows[method]
    assert set(row) == {"accuracy", "val_accuracy", "bytes", "macs", "memory", "parameters", "nonzero"}
    assert 0.1 < row["accuracy"] <= 1
    assert 0.1 < row["val_accuracy"] <= 1
    assert all(isinstance(row[name], int) and row[name] > 0 for name in ("bytes", "macs", "memory", "parameters"))
    assert row["nonzero"] <= row["parameters"]


def test_a_cell_is_trained_once(monkeypatch):
    first = network_of(trial("qat"))
    monkeypatch.setattr(families, "train_copies", None)
    again = network_of(trial("qat"))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


def test_another_seed_level_or_option_is_another_network():
    weight = network_of(trial("dense")).fc1.weight
    assert not torch.equal(weight, network_of(trial("dense", seed=1)).fc1.weight)
    assert not torch.equal(weight, network_of(trial("dense", split_seed=1)).fc1.weight)
    assert network_of(trial("dense", width=0.1)).fc1.out_features == 30


def test_combinations_start_from_the_same_networks_as_their_parts():
    pruned, both = network_of(trial("magnitude", 0.8)), network_of(trial("prune+codebook", "0.8/3"))
    assert torch.equal(pruned.fc1.weight == 0, both.fc1.weight == 0)
    narrow, small = network_of(trial("neurons")), network_of(trial("neurons+int8"))
    step = narrow.fc1.weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((narrow.fc1.weight - small.fc1.weight).abs() <= step / 2 * 1.001).all()


def test_pruned_weights_are_zero_and_cost_what_the_dense_ones_cost(rows):
    assert sparsity(network_of(trial("magnitude"))) == pytest.approx(0.8, abs=1e-3)
    assert rows["magnitude"]["macs"] == rows["dense"]["macs"]
    assert rows["magnitude"]["memory"] == rows["dense"]["memory"]
    assert rows["magnitude"]["bytes"] < rows["dense"]["bytes"] / 3


def test_removed_neurons_take_their_work_with_them(rows):
    network = network_of(trial("neurons"))
    assert (network.fc1.out_features, network.fc2.out_features) == (30, 10)
    assert rows["neurons"]["macs"] == 64 * 30 + 30 * 10 + 10 * 10 == count_macs(network, (1, 8, 8))


def test_the_dense_file_is_the_one_that_everybody_would_write(rows):
    assert rows["dense"]["bytes"] == stored_bytes(network_of(trial("dense")))


@pytest.mark.parametrize(("method", "bits"), [("int8", 8), ("qat", 2), ("distil+int8", 8), ("distil+qat", 4)])
def test_quantized_weights_lie_on_their_grid(method, bits):
    for layer in (m for m in network_of(trial(method)).modules() if hasattr(m, "made_weight")):
        assert layer.activation_bits == 8
        assert torch.equal(layer.made_weight(), layer.weight)
        assert all(len(row.unique()) <= 2**bits - 1 for row in layer.weight.detach())


def test_fewer_bits_fewer_bytes(rows):
    assert rows["qat"]["bytes"] < rows["int8"]["bytes"] < rows["dense"]["bytes"]
    assert rows["prune+codebook"]["bytes"] < min(rows["magnitude"]["bytes"], rows["codebook"]["bytes"])


def test_the_teacher_has_a_say_in_the_student():
    taught, alone = network_of(trial("distilled")), network_of(trial("student"))
    assert not torch.equal(taught.fc1.weight, alone.fc1.weight)


def test_working_memory_by_hand():
    float_net = narrow_lenet((1, 8, 8), 10, (30, 10))
    numbers = 64 * 30 + 30 * 10 + 10 * 10
    assert working_memory(float_net, (1, 8, 8)) == 4 * (numbers + 30 + 10 + 10) + 4 * (64 + 30)
    small = network_of(trial("neurons+int8"))
    assert working_memory(small, (1, 8, 8)) == numbers + 4 * (30 + 10 + 10) + (64 + 30)


def test_a_pooling_layer_may_be_the_largest():
    cnn = build_model("cnn_student", (1, 8, 8), 10)
    most = max(64 + 8 * 64, 8 * 64 + 8 * 16, 8 * 16 + 16 * 16, 16 * 16 + 16 * 4, 64 + 10)
    assert working_memory(cnn, (1, 8, 8)) == 4 * (sum(p.numel() for p in cnn.parameters()) + most)


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match=r"unknown method 'magic' \(there are: dense, "):
        measure_trial(Trial("magic", None, 0, OPTIONS))
