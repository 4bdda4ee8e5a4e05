"""ONNX files: structure and names (their results are compared in test_integer_network.py)."""

import onnx
import pytest
import torch
from torch import nn

from course_lib.methods.engine import write_float_onnx, write_int8_onnx
from course_lib.methods.integer_network import integer_network


def net():
    torch.manual_seed(0)
    layers = {"flatten": nn.Flatten(), "fc": nn.Linear(4, 3), "relu": nn.ReLU(), "logits": nn.Linear(3, 2, bias=False)}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


def test_names_shapes_and_a_layer_called_as_the_output(tmp_path):
    model = write_float_onnx(net(), tmp_path / "float.onnx", (1, 2, 2))
    assert [i.name for i in model.graph.input] == ["images"]
    assert [o.name for o in model.graph.output] == ["logits"]
    assert [n.op_type for n in model.graph.node] == ["Flatten", "Gemm", "Relu", "Gemm"]
    assert onnx.load(tmp_path / "float.onnx") == model


def test_int8_files_hold_integers(tmp_path):
    integers = integer_network(net(), torch.randn(16, 1, 2, 2))
    model = write_int8_onnx(integers, tmp_path / "int8.onnx", (1, 2, 2))
    types = {t.name: t.data_type for t in model.graph.initializer}
    assert types["fc_weight_quantized"] == onnx.TensorProto.INT8
    assert types["fc_bias_quantized"] == onnx.TensorProto.INT32
    assert [n.op_type for n in model.graph.node].count("QuantizeLinear") == 4


def test_an_input_shape_that_does_not_fit_leaves_no_file(tmp_path):
    integers = integer_network(net(), torch.randn(16, 1, 2, 2))
    for shape in ((1, 3, 3), ()):
        with pytest.raises(ValueError, match=r"does not take images of shape \("):
            write_float_onnx(net(), tmp_path / "float.onnx", shape)
        with pytest.raises(ValueError, match=r"does not take images of shape \("):
            write_int8_onnx(integers, tmp_path / "int8.onnx", shape)
    assert not list(tmp_path.iterdir())
