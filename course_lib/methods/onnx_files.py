"""Chains of layers as ONNX files that ONNX Runtime executes: in float32, in int8 on our own grids, with int4 weights.

In the int8 file every layer stands between DequantizeLinear and QuantizeLinear nodes (QDQ); the engine fuses each such
group into one integer kernel. In the int4 file a linear layer is a MatMulNBits node, which reads two weights a byte.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from course_lib.files import write_file
from course_lib.gate import whole_number
from course_lib.methods import integer
from course_lib.methods.integer import IntegerLayer, IntegerNetwork, Pair
from course_lib.methods.quantization import QuantParams, choose_qparams, naming, quantize

if TYPE_CHECKING:
    import onnx

__all__ = ["write_float_onnx", "write_int4_onnx", "write_int8_onnx"]

Path = str | os.PathLike

# Old enough for every ONNX Runtime of the last years, new enough for per-channel DequantizeLinear.
OPSET, IR_VERSION = 17, 8


class Graph:
    """Nodes and constants of an ONNX graph that is a chain; ``tip`` is the name of the last value."""

    def __init__(self):
        self.nodes: list = []
        self.constants: dict[str, np.ndarray] = {}
        self.tip = "images"

    def constant(self, name: str, value: Tensor) -> str:
        self.constants[name] = np.ascontiguousarray(value.detach().cpu())
        return name

    def add(self, kind: str, name: str, *inputs: str, **attributes) -> None:
        """A node of type ``kind`` on the tip and ``inputs``; its output becomes the tip."""
        from onnx import helper

        # A layer may be called as the graph's own input or output is.
        self.nodes.append(helper.make_node(kind, [self.tip, *inputs], [f"{name}/out"], name=name, **attributes))
        self.tip = f"{name}/out"

    def through_grid(self, name: str, q: QuantParams) -> None:
        """QuantizeLinear and DequantizeLinear: from here on the values lie on the grid ``q``."""
        grid = (self.constant(f"{name}/scale", q.scale), self.constant(f"{name}/zero", q.zero_point.to(q.dtype)))
        self.add("QuantizeLinear", f"{name}/quantize", *grid)
        self.add("DequantizeLinear", f"{name}/dequantize", *grid)

    def integers(self, name: str, values: Tensor, scale: Tensor) -> str:
        """An integer constant with a DequantizeLinear after it: the engine keeps the integers."""
        from onnx import helper

        parts = {"quantized": values, "scale": scale.float(), "zero": torch.zeros(scale.shape, dtype=values.dtype)}
        names = [self.constant(f"{name}/{part}", value) for part, value in parts.items()]
        axis = {"axis": 0} if scale.dim() else {}
        self.nodes.append(helper.make_node("DequantizeLinear", names, [name], name=f"{name}/dequantize", **axis))
        return name

    def layer(self, name: str, weight: str, bias: str | None, module: nn.Linear | nn.Conv2d | IntegerLayer) -> None:
        """A linear layer or a convolution with the sizes of ``module``."""
        inputs = [weight] if bias is None else [weight, bias]
        if module.weight.dim() == 2:
            self.add("Gemm", name, *inputs, transB=1)
        else:
            spread = {"group": module.groups, "dilations": module.dilation} if isinstance(module, nn.Conv2d) else {}
            self.add("Conv", name, *inputs, **window(module.weight.shape[2:], module.stride, module.padding), **spread)

    def save(self, path: Path, input_shape: tuple[int, ...], network: Callable) -> "onnx.ModelProto":
        """Check and write it: ``images`` [N, ...] → ``logits``, of the shape that ``network`` makes of such images."""
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        shape = tuple(whole_number(n, "input_shape", 1) for n in input_shape)
        ends = [("images", shape), ("logits", integer.output_shape(network, shape))]
        given, made = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *sizes]) for name, sizes in ends)
        constants = [numpy_helper.from_array(value, name) for name, value in self.constants.items()]
        self.nodes[-1].output[0] = "logits"
        graph = helper.make_graph(self.nodes, "network", [given], [made], constants)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        try:
            onnx.checker.check_model(model, full_check=True)
        except onnx.shape_inference.InferenceError as error:  # say, a linear layer over three dimensions
            raise ValueError(f"no ONNX graph for images of shape {shape} here: {error}") from error
        write_file(path, model.SerializeToString())
        return model


def window(size: Pair, stride: Pair, padding: Pair) -> dict[str, list[int]]:
    """What Conv and MaxPool call kernel, stride and padding."""
    return {"kernel_shape": list(size), "strides": list(stride), "pads": [*padding, *padding]}


# What a step without weights is called: of a float network, and of one in integers.
STEPS = {nn.ReLU: "Relu", nn.MaxPool2d: "MaxPool", nn.Flatten: "Flatten"}
STEPS |= {torch.clamp: "Relu", integer.integer_max_pool2d: "MaxPool", torch.flatten: "Flatten"}


def add_step(graph: Graph, name: str, kind: str, sizes: dict) -> None:
    """A step without weights; ``sizes`` are those of max-pooling."""
    graph.add(kind, name, **(window(**sizes) if kind == "MaxPool" else {"axis": 1} if kind == "Flatten" else {}))


def write_float_onnx(model: nn.Sequential, path: Path, input_shape: tuple[int, ...]) -> "onnx.ModelProto":
    """Write a chain of layers in float32, BatchNorm folded, for images [N, \\*input_shape].

    UnsupportedModel: a layer with no counterpart here (it is named). ValueError: an input shape that does not fit the
    network. OSError: the file cannot be written; it is named.
    """
    return write_chain(model, path, input_shape, {})


def write_int4_onnx(
    model: nn.Sequential, path: Path, input_shape: tuple[int, ...], *, group: int = 32, accuracy_level: int = 4
) -> "onnx.ModelProto":
    """As :func:`write_float_onnx`, but the weights of linear layers are stored in 4 bits, with a scale a group.

    ``group``, 16, 32, 64, 128 or 256, has to divide the layers' inputs: so many share a float32 scale; the integers are
    those of ``choose_qparams(weight, 4, group=group)``. ``accuracy_level`` is what the engine computes in: 0 as it
    likes, 1 float32, 4 int8 (inputs rounded while running).
    """
    if group not in (16, 32, 64, 128, 256) or accuracy_level not in range(5):
        given = f"got group={group!r}, accuracy_level={accuracy_level!r}"
        raise ValueError(f"group must be 16, 32, 64, 128 or 256, accuracy_level 0 to 4; {given}")
    attributes = {"bits": 4, "block_size": int(group), "accuracy_level": int(accuracy_level)}
    return write_chain(model, path, input_shape, attributes)


def write_chain(model: nn.Sequential, path: Path, input_shape: tuple[int, ...], four_bits: dict) -> "onnx.ModelProto":
    """A float32 graph; given attributes ``four_bits``, linear layers are MatMulNBits nodes with those."""
    graph, steps = Graph(), integer.float_steps(model)
    for name, module in steps:
        if type(module) in STEPS:
            kind = STEPS[type(module)]
            add_step(graph, name, kind, integer.pool_sizes(name, module) if kind == "MaxPool" else {})
        elif four_bits and isinstance(module, nn.Linear):
            with naming(name):
                add_int4_layer(graph, name, module, four_bits)
        else:
            bias = None if module.bias is None else graph.constant(f"{name}/bias", module.bias)
            graph.layer(name, graph.constant(f"{name}/weight", module.weight), bias, module)
    return graph.save(path, input_shape, nn.Sequential(*(module for _, module in steps)))


def add_int4_layer(graph: Graph, name: str, layer: nn.Linear, attributes: dict) -> None:
    """A MatMulNBits node: two integers a byte, the first in the lower half, 8 added so that none is negative."""
    group = attributes["block_size"]
    q = choose_qparams(layer.weight, 4, group=group)
    marks = (quantize(layer.weight, q) + 8).to(torch.uint8).unflatten(-1, (-1, group))
    packed = marks[..., ::2] | marks[..., 1::2] << 4  # [O, groups, group / 2]
    constants = (graph.constant(f"{name}/packed", packed), graph.constant(f"{name}/scale", q.scale))
    sizes = {"K": layer.in_features, "N": layer.out_features}
    graph.add("MatMulNBits", name, *constants, domain="com.microsoft", **sizes, **attributes)
    if layer.bias is not None:
        graph.add("Add", f"{name}/add", graph.constant(f"{name}/bias", layer.bias))


def write_int8_onnx(network: IntegerNetwork, path: Path, input_shape: tuple[int, ...]) -> "onnx.ModelProto":
    """Write an :class:`~course_lib.methods.integer.IntegerNetwork` in QDQ form; errors as :func:`write_float_onnx`."""
    graph, grid = Graph(), network.x_q
    graph.through_grid("images_grid", grid)
    for name, step in network.steps:
        if isinstance(step, IntegerLayer):
            weight = graph.integers(f"{name}/weight", step.weight, step.w_q.scale)
            # A bias has one step an output channel if the weights have; with one scale in all it is a scalar.
            bias = graph.integers(f"{name}/bias", step.bias, step.x_q.scale.double() * step.w_q.scale.double())
            graph.layer(name, weight, bias, step)
            if step.relu:
                graph.add("Relu", f"{name}/relu")
            grid = step.y_q
        else:
            # The grid stays as it is; without saying so, the engine would leave the next layer in float32.
            add_step(graph, name, STEPS[step.func], step.keywords)
        graph.through_grid(f"{name}/out", grid)
    return graph.save(path, input_shape, network)
