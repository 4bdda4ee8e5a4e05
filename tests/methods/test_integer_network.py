"""BatchNorm folding, whole networks in integers, and the same networks in ONNX Runtime."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from course_lib.methods.engine import write_float_onnx, write_int8_onnx
from course_lib.methods.integer_network import fold_batchnorm, integer_network


def conv_net(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8, affine=False), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(),
        nn.Linear(16, 10),
    )  # fmt: skip
    for module in net:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 2)
            if module.affine:
                module.weight.data.uniform_(-1.5, 1.5)
                module.bias.data.normal_()
    return net.train()


@pytest.fixture
def images():
    return torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def run(path, images):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def test_folding_keeps_the_function_and_the_model(images):
    net = conv_net()
    state = {name: t.clone() for name, t in net.state_dict().items()}
    folded = fold_batchnorm(net)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded)
    assert all(torch.equal(state[name], t) for name, t in net.state_dict().items())
    torch.testing.assert_close(folded(images), net.eval()(images), rtol=1e-4, atol=1e-5)


def test_folding_refuses_what_it_cannot_fold():
    with pytest.raises(ValueError, match=r"does not follow a linear or convolution layer"):
        fold_batchnorm(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)))
    with pytest.raises(ValueError, match="keeps no statistics"):
        fold_batchnorm(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)))
    with pytest.raises(ValueError, match=r"flat nn.Sequential"):
        fold_batchnorm(nn.Linear(3, 3))


@pytest.mark.parametrize("per_channel", [True, False])
def test_integers_follow_the_float_network(images, per_channel):
    net = conv_net()
    integers = integer_network(net, images, per_channel=per_channel)
    with torch.no_grad():
        logits = net.eval()(images)
    error = (integers(images) - logits).square().mean().sqrt() / logits.std()
    assert error < (0.02 if per_channel else 0.04)
    assert all(step.weight.dtype == torch.int8 for _, step in integers.steps if hasattr(step, "bias"))


@pytest.mark.parametrize("per_channel", [True, False])
def test_the_engine_computes_the_same_integers(images, per_channel, tmp_path):
    integers = integer_network(conv_net(), images, per_channel=per_channel)
    write_int8_onnx(integers, tmp_path / "int8.onnx", (1, 8, 8))
    steps = (run(tmp_path / "int8.onnx", images) - integers(images)) / integers.y_q.scale
    # The engine rescales in float32 and rounds half to even: a tie may fall the other way, and travel on from there.
    assert steps.abs().max() < 2.5
    assert (steps.abs() < 0.5).float().mean() > 0.98


def test_the_engine_computes_the_same_floats(images, tmp_path):
    net = conv_net()
    write_float_onnx(net, tmp_path / "float.onnx", (1, 8, 8))
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "float.onnx", images), net.eval()(images), rtol=1e-4, atol=1e-4)
    assert [p.name for p in tmp_path.iterdir()] == ["float.onnx"]


def test_the_engine_fuses_the_int8_file_into_integer_kernels(images, tmp_path):
    import onnx

    write_int8_onnx(integer_network(conv_net(), images), tmp_path / "int8.onnx", (1, 8, 8))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(tmp_path / "int8.onnx", options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
    assert kinds.count("QLinearConv") == 2
    assert kinds.count("QGemm") == 2
    assert "Conv" not in kinds
    assert "Gemm" not in kinds


def test_the_engines_own_quantizer_agrees(images, tmp_path):
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter([{"images": images.numpy()}])

        def get_next(self):
            return next(self.batches, None)

    net = conv_net()
    write_float_onnx(net, tmp_path / "float.onnx", (1, 8, 8))
    quantize_static(
        str(tmp_path / "float.onnx"), str(tmp_path / "theirs.onnx"), Reader(), quant_format=QuantFormat.QDQ,
        per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        extra_options={"WeightSymmetric": True},
    )  # fmt: skip
    ours = integer_network(net, images)
    theirs = run(tmp_path / "theirs.onnx", images)
    with torch.no_grad():
        logits = net.eval()(images)
    noise = (theirs - logits).square().mean().sqrt()
    assert (ours(images) - logits).square().mean().sqrt() < 1.3 * noise
    np.testing.assert_allclose(ours(images), theirs, atol=6 * ours.y_q.scale.item())


def test_refusals(images, tmp_path):
    for module, text in (
        (nn.Sigmoid(), "Sigmoid.* has no integer version"),
        (nn.MaxPool2d(2, ceil_mode=True), "ceil_mode=False"),
        (nn.Flatten(0), "has no integer version"),
    ):
        with pytest.raises(ValueError, match=text):
            integer_network(nn.Sequential(nn.Conv2d(1, 2, 3), module), images)
    with pytest.raises(ValueError, match="no linear or convolution layer"):
        integer_network(nn.Sequential(nn.Flatten()), images)
    with pytest.raises(ValueError, match="calibration is empty"):
        integer_network(conv_net(), images[:0])
    with pytest.raises(ValueError, match="NaN"):
        integer_network(conv_net(), images * float("inf"))
    for module, text in (
        (nn.Sigmoid(), "Sigmoid.* has no counterpart"),
        (nn.Conv2d(2, 2, 3, groups=2), "groups=1"),
    ):
        with pytest.raises(ValueError, match=text):
            write_float_onnx(nn.Sequential(nn.Conv2d(1, 2, 3), module), tmp_path / "x.onnx", (1, 8, 8))
    assert not list(tmp_path.iterdir())
