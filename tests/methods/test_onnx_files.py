"""ONNX files: what ONNX Runtime computes from them, their structure, and what is refused."""

from collections import OrderedDict

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from course_lib.gate import UnsupportedModel
from course_lib.methods.integer import integer_network
from course_lib.methods.onnx_files import write_float_onnx, write_int4_onnx, write_int8_onnx
from course_lib.methods.quantized_layers import fake_quantized, fold_batchnorm, plain


def conv_net(seed=0):
    torch.manual_seed(seed)
    relu = nn.ReLU()
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=(1, 0), bias=False), nn.BatchNorm2d(6), relu,
        nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.MaxPool2d(2, padding=1), relu, nn.Flatten(), nn.Dropout(0.5),
        nn.Linear(48, 16), nn.BatchNorm1d(16), relu, nn.Linear(16, 10, bias=False),
    ).eval()  # fmt: skip


@pytest.fixture
def images():
    return torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def run(path, images, save_as=None):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if save_as:
        options.optimized_model_filepath, options.log_severity_level = str(save_as), 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def kinds(model):
    return [node.op_type for node in model.graph.node]


def test_the_engine_computes_the_same_floats(images, tmp_path):
    net = conv_net()
    model = write_float_onnx(net, tmp_path / "float.onnx", np.array([1, 8, 8]))
    assert kinds(model) == ["Conv", "Relu", "Conv", "MaxPool", "Relu", "Flatten", "Gemm", "Relu", "Gemm"]
    assert onnx.load(tmp_path / "float.onnx") == model
    assert (model.ir_version, [o.version for o in model.opset_import]) == (8, [17, 1])  # for older engines too
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "float.onnx", images), net(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("net", "shape"), [
    (nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten()), (2, 5, 6)), (nn.Sequential(nn.Conv2d(2, 3, 3)), (2, 5, 6)),
    (nn.Sequential(nn.Conv2d(2, 4, (3, 1), groups=2, dilation=(1, 2), stride=(2, 1)), nn.ReLU()), (2, 5, 6)),
    (nn.Sequential(nn.Linear(4, 3), nn.Flatten()), (4,)),
])  # fmt: skip
def test_the_file_says_as_many_outputs_as_there_are(net, shape, tmp_path):
    model, x = write_float_onnx(net, tmp_path / "float.onnx", shape), torch.randn(5, *shape)
    with torch.no_grad():
        answer = net(x)
    dims = model.graph.output[0].type.tensor_type.shape.dim
    assert (dims[0].dim_param, *(d.dim_value for d in dims[1:])) == ("N", *answer.shape[1:])
    torch.testing.assert_close(run(tmp_path / "float.onnx", x), answer, rtol=1e-5, atol=1e-5)


def test_a_layer_called_as_the_input_or_output(tmp_path):
    layers = {"images": nn.Flatten(), "fc": nn.Linear(4, 3), "relu": nn.ReLU(), "logits": nn.Linear(3, 2)}
    net, x = nn.Sequential(OrderedDict(layers)), torch.randn(16, 1, 2, 2)
    write_float_onnx(net, tmp_path / "float.onnx", (1, 2, 2))
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "float.onnx", x), net(x))
    model = write_int8_onnx(integer_network(net, x), tmp_path / "int8.onnx", (1, 2, 2))
    assert [end.name for end in (*model.graph.input, *model.graph.output)] == ["images", "logits"]
    types = {t.name: t.data_type for t in model.graph.initializer}
    kind = onnx.TensorProto
    named = [types[f"fc/{part}"] for part in ("weight/quantized", "bias/quantized", "out/zero")]
    assert named == [kind.INT8, kind.INT32, kind.UINT8]


def test_layers_whose_names_run_together_stay_apart(tmp_path):
    inner = nn.Sequential(OrderedDict({"0": nn.Linear(4, 4), "relu": nn.ReLU()}))
    layers = {"fc": inner, "fc_0": nn.Linear(4, 4), "fc_0_relu": nn.Linear(4, 4), "logits": nn.Linear(4, 2)}
    net, x = nn.Sequential(OrderedDict(layers)).eval(), torch.randn(64, 4)
    write_float_onnx(net, tmp_path / "float.onnx", (4,))
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "float.onnx", x), net(x))
        integers = integer_network(net, x)
        assert (integers(x) - net(x)).abs().max() < 0.05
    write_int8_onnx(integers, tmp_path / "int8.onnx", (4,))
    assert len(run(tmp_path / "int8.onnx", x)) == 64


@pytest.mark.parametrize("per_channel", [True, False])
def test_the_engine_computes_the_same_integers_in_integer_kernels(images, per_channel, tmp_path):
    integers = integer_network(conv_net(), images, per_channel=per_channel)
    write_int8_onnx(integers, tmp_path / "int8.onnx", (1, 8, 8))
    steps = (run(tmp_path / "int8.onnx", images, tmp_path / "fused.onnx") - integers(images)) / integers.y_q.scale
    # The engine rescales in float32 and rounds half to even: a tie may fall the other way, and travel on from there.
    assert steps.abs().max() < 2.5
    assert (steps.abs() < 0.5).float().mean() > 0.98
    fused = kinds(onnx.load(tmp_path / "fused.onnx"))
    assert [fused.count(kind) for kind in ("QLinearConv", "QGemm", "Conv", "Gemm")] == [2, 2, 0, 0]


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
    ours, theirs = integer_network(net, images), run(tmp_path / "theirs.onnx", images)
    with torch.no_grad():
        logits = net(images)
    noise = (theirs - logits).square().mean().sqrt()
    assert (ours(images) - logits).square().mean().sqrt() < 1.3 * noise
    np.testing.assert_allclose(ours(images), theirs, atol=6 * ours.y_q.scale.item())


@pytest.mark.parametrize("accuracy_level", [0, 1, 4])
def test_int4_weights_are_our_grid(images, accuracy_level, tmp_path):
    net = conv_net()
    net[8] = nn.Linear(48, 16, bias=False)
    model = write_int4_onnx(net, tmp_path / "int4.onnx", (1, 8, 8), group=16, accuracy_level=accuracy_level)
    assert kinds(model).count("MatMulNBits") == 2
    with torch.no_grad():
        answer = plain(fake_quantized(fold_batchnorm(net), weight_bits={"8": 4, "11": 4}, group=16))(images)
    off = (run(tmp_path / "int4.onnx", images) - answer).abs().max()
    assert off < (1e-5 if accuracy_level < 4 else 0.02 * answer.abs().max())


def test_int4_weights_take_half_a_byte(tmp_path):
    net, size = nn.Sequential(nn.Linear(256, 128)), {}
    for name, write in {"float": write_float_onnx, "int4": write_int4_onnx}.items():
        write(net, tmp_path / name, (256,))
        size[name] = (tmp_path / name).stat().st_size
    assert size["float"] == pytest.approx(4 * 256 * 128, rel=0.02)
    assert size["int4"] == pytest.approx((0.5 + 4 / 32) * 256 * 128 + 4 * 128, rel=0.02)
    for group in (64, 128, 256):
        write_int4_onnx(net, tmp_path / "other", (256,), group=group)
        assert torch.isfinite(run(tmp_path / "other", torch.randn(2, 256))).all()


def test_what_cannot_be_written(images, tmp_path):
    net, integers = conv_net(), integer_network(conv_net(), images)
    float_file = tmp_path / "float.onnx"
    for shape in ((1, 3, 30), ()):
        for write, given in ((write_float_onnx, net), (write_int8_onnx, integers)):
            with pytest.raises(ValueError, match=r"does not take images of shape \("):
                write(given, float_file, shape)
    with pytest.raises(ValueError, match=r"no ONNX graph for images of shape \(7, 4\)"):
        write_float_onnx(nn.Sequential(nn.Linear(4, 2)), float_file, (7, 4))
    for module, text in (
        (nn.Sigmoid(), r"'1' \(Sigmoid\(\)\) has no counterpart"),
        (nn.Conv2d(2, 2, 3, padding="same"), "'1' .*zero padding in numbers"),
        (nn.Conv2d(2, 2, 3, padding_mode="reflect"), "'1' .*zero padding in numbers"),
    ):
        with pytest.raises(UnsupportedModel, match=text):
            write_float_onnx(nn.Sequential(nn.Conv2d(1, 2, 3), module), float_file, (1, 8, 8))
    for options, text in (
        ({"group": 24}, "group must be 16, 32, 64, 128 or 256"), ({"accuracy_level": 5}, "accuracy_level"),
        ({"group": 32}, r"layer '8': group=32 does not divide the last dimension of shape \(16, 48\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            write_int4_onnx(net, float_file, (1, 8, 8), **options)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="nowhere"):
        write_float_onnx(net, tmp_path / "nowhere" / "x.onnx", (1, 8, 8))
