import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from course_lib.evidence import measure
from course_lib.evidence.measure import count_macs, count_parameters, human_bytes, sparsity, stored_bytes
from course_lib.lab.models import build_model


def test_parameters_shared_once_and_nonzero():
    layer = nn.Linear(4, 4)
    twice = nn.Sequential(layer, layer)
    assert count_parameters(twice) == 20
    layer.weight.data[0] = 0
    assert count_parameters(layer, nonzero=True) == 20 - 4 - int((layer.bias == 0).sum())


def test_sparsity_is_of_weights_not_of_biases():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    nn.init.zeros_(model[0].bias)
    assert sparsity(model) == 0
    model[0].weight.data.zero_()
    assert sparsity(model) == pytest.approx(20 / 30)
    with pytest.raises(ValueError, match="no weight"):
        sparsity(nn.ReLU())


def brute_force_macs(model, shape):
    macs, handles = [], []

    def hook(layer, inputs, output):
        if isinstance(layer, nn.Conv2d):
            each = layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
            macs.append(output[0].numel() * each)
        elif isinstance(layer, nn.Linear):
            macs.append(output[0].numel() * layer.in_features)

    for layer in model.modules():
        handles.append(layer.register_forward_hook(hook))
    model.eval()(torch.zeros(1, *shape))
    for handle in handles:
        handle.remove()
    return sum(macs)


@pytest.mark.parametrize("name", ["lenet300", "lenet5", "cnn_teacher", "cnn_student"])
def test_macs_of_the_models_by_brute_force(name):
    model = build_model(name, (1, 12, 10), 10, seed=0)
    assert count_macs(model, (1, 12, 10)) == brute_force_macs(model, (1, 12, 10))


def test_macs_of_groups_strides_and_dilation():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, groups=2), nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8))
    assert count_macs(model, (4, 16, 16)) == brute_force_macs(model, (4, 16, 16))


def test_macs_of_a_transformer_are_not_lost_on_the_fast_path():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    before = torch.backends.mha.get_fastpath_enabled()
    projections = 5 * (4 * 16 * 16 + 2 * 16 * 32)
    attention = 2 * 5 * 5 * 16
    assert count_macs(layer, (5, 16)) == projections + attention
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_counting_changes_nothing():
    model = build_model("cnn_teacher", (1, 8, 8), 10, seed=0)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    count_macs(model, (1, 8, 8))
    assert model.training
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("shape", [(), (0, 8, 8), (1, 8.0, 8)])
def test_bad_shapes_are_named(shape):
    with pytest.raises(ValueError, match="positive integers"):
        count_macs(nn.Linear(4, 2), shape)


def test_a_shape_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"does not take an input of shape \(1, 5\)"):
        count_macs(nn.Linear(4, 2), (5,))


def test_bytes_are_those_of_a_file(tmp_path):
    from safetensors.torch import save_model

    model = build_model("cnn_teacher", (1, 8, 8), 10, seed=0)
    save_model(model, str(tmp_path / "m"))
    assert stored_bytes(model) == (tmp_path / "m").stat().st_size
    assert set(load_file(tmp_path / "m")) == set(model.state_dict())


def test_bytes_of_zeros_halves_shared_and_empty():
    model = nn.Linear(100, 100)
    full = stored_bytes(model)
    nn.init.zeros_(model.weight)
    assert stored_bytes(model) == full
    assert stored_bytes(model.half()) < 0.55 * full
    shared = nn.Sequential(model.float(), nn.ReLU(), model)
    assert stored_bytes(shared) < 1.05 * full
    model.weight.data.fill_(float("nan"))
    assert stored_bytes(model) == full
    assert stored_bytes(nn.ReLU()) > 0


def test_a_file_that_reads_back_differently_is_an_error(monkeypatch):
    import safetensors.torch

    real = safetensors.torch.load_file
    monkeypatch.setattr(safetensors.torch, "load_file", lambda p: {n: t + 1 for n, t in real(p).items()})
    with pytest.raises(RuntimeError, match="was not read back"):
        stored_bytes(nn.Linear(2, 2))


def test_human_bytes():
    assert human_bytes(27_000) == "27.0 kB"
    with pytest.raises(ValueError, match="number of bytes"):
        human_bytes(-1)
    assert set(measure.__all__) >= {"compare_latency", "export_onnx"}
