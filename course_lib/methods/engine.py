"""Networks as ONNX files that ONNX Runtime executes: in float32, and in int8 with our own grids (QDQ form).

The graphs are written node by node with ``onnx.helper``. In the int8 file every layer stands between DequantizeLinear
and QuantizeLinear nodes; the engine fuses each such group into one integer kernel, which is how int8 becomes fast.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from course_lib.methods.integer import IntegerLayer
from course_lib.methods.integer_network import IntegerNetwork, Pool, fold_batchnorm, pool_of
from course_lib.methods.quantization import QuantParams

if TYPE_CHECKING:
    import onnx

__all__ = ["write_float_onnx", "write_int8_onnx"]

# Old enough for every ONNX Runtime of the last years, new enough for per-channel DequantizeLinear.
OPSET, IR_VERSION = 17, 8


class Graph:
    """Nodes and constants of an ONNX graph that is a chain; ``tip`` is the name of the last value."""

    def __init__(self, tip: str):
        self.nodes: list = []
        self.constants: dict[str, np.ndarray] = {}
        self.tip = tip

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = value
        return name

    def add(self, kind: str, name: str, *inputs: str, **attributes) -> None:
        """A node of type ``kind`` on the tip and ``inputs``; its output becomes the tip."""
        from onnx import helper

        # A layer may be called as the graph's own input or output is.
        self.nodes.append(helper.make_node(kind, [self.tip, *inputs], [f"{name}/out"], name=name, **attributes))
        self.tip = f"{name}/out"

    def grid(self, name: str, q: QuantParams) -> tuple[str, str]:
        """Scale and zero point as constants, in the types of the integers that they belong to."""
        dtype = np.uint8 if q.qmin >= 0 else np.int8
        scale = self.constant(f"{name}_scale", q.scale.cpu().numpy().astype(np.float32))
        return scale, self.constant(f"{name}_zero", q.zero_point.cpu().numpy().astype(dtype))

    def constant_on_grid(self, name: str, values: np.ndarray, scale: np.ndarray, per_channel: bool) -> str:
        """An integer constant with a DequantizeLinear after it: the engine keeps the integers."""
        from onnx import helper

        names = [
            self.constant(f"{name}_quantized", values),
            self.constant(f"{name}_scale", scale.astype(np.float32)),
            self.constant(f"{name}_zero", np.zeros(scale.shape, dtype=values.dtype)),
        ]
        axis = {"axis": 0} if per_channel else {}
        self.nodes.append(helper.make_node("DequantizeLinear", names, [name], name=f"{name}_dequantize", **axis))
        return name

    def save(self, path: str | os.PathLike, input_shape: tuple[int, ...], outputs: int) -> "onnx.ModelProto":
        """Check the graph and write it: images [N, ...] named ``images`` → logits [N, K] named ``logits``."""
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        self.nodes[-1].output[0] = "logits"
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", *input_shape])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", outputs])],
            [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in self.constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        try:
            onnx.checker.check_model(model, full_check=True)
        except onnx.shape_inference.InferenceError as error:
            raise ValueError(f"the network does not take images of shape {input_shape}: {error}") from error
        path = Path(path)
        beside = path.with_name(f".{path.name}.part")
        beside.write_bytes(model.SerializeToString())
        os.replace(beside, path)
        return model


def conv_sizes(kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> dict:
    return {"kernel_shape": list(kernel), "strides": list(stride), "pads": [*padding, *padding]}


def write_float_onnx(model: nn.Sequential, path: str | os.PathLike, input_shape: tuple[int, ...]) -> "onnx.ModelProto":
    """Write a flat ``nn.Sequential`` in float32, BatchNorm folded, for images [N, \\*input_shape].

    Raises:
        ValueError: a layer with no counterpart here (it is named), or an input shape that does not fit the network.
    """
    model, graph, outputs = fold_batchnorm(model), Graph("images"), 0
    for name, module in model.named_children():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            arrays = [module.weight.detach().cpu().numpy()]
            if module.bias is not None:
                arrays.append(module.bias.detach().cpu().numpy())
            names = [graph.constant(f"{name}_{kind}", a) for kind, a in zip(("weight", "bias"), arrays, strict=False)]
            outputs = len(arrays[0])
            if isinstance(module, nn.Linear):
                graph.add("Gemm", name, *names, transB=1)
            elif module.groups == 1 and set(module.dilation) == {1} and not isinstance(module.padding, str):
                graph.add("Conv", name, *names, **conv_sizes(module.kernel_size, module.stride, module.padding))
            else:
                raise ValueError(f"{name} ({module}) is not supported: groups=1 and dilation=1 are needed")
        elif isinstance(module, nn.ReLU):
            graph.add("Relu", name)
        elif isinstance(module, nn.MaxPool2d):
            pool = pool_of(name, module)
            graph.add("MaxPool", name, **conv_sizes(pool.size, pool.stride, pool.padding))
        elif isinstance(module, nn.Flatten):
            graph.add("Flatten", name, axis=1)
        elif not isinstance(module, (nn.Dropout, nn.Identity)):
            raise ValueError(f"{name} ({module}) has no counterpart here")
    return graph.save(path, tuple(input_shape), outputs)


def write_int8_onnx(
    network: IntegerNetwork, path: str | os.PathLike, input_shape: tuple[int, ...]
) -> "onnx.ModelProto":
    """Write an :class:`~course_lib.methods.integer_network.IntegerNetwork` in QDQ form: static, weights per channel.

    Raises:
        ValueError: an input shape that does not fit the network.
    """
    graph = Graph("images")

    def through_grid(name: str, q: QuantParams) -> None:
        scale, zero = graph.grid(name, q)
        graph.add("QuantizeLinear", f"{name}_quantize", scale, zero)
        graph.add("DequantizeLinear", f"{name}_dequantize", scale, zero)

    through_grid("images_grid", network.x_q)
    outputs = 0
    for name, step in network.steps:
        if isinstance(step, IntegerLayer):
            per_channel, scale = step.w_q.axis is not None, step.w_q.scale.cpu().numpy()
            weight = graph.constant_on_grid(f"{name}_weight", step.weight.cpu().numpy(), scale, per_channel)
            # A bias has one step an output channel if the weights have; with one scale in all it is a scalar.
            steps = (step.x_q.scale.double() * step.w_q.scale.double()).cpu().numpy()
            bias = graph.constant_on_grid(f"{name}_bias", step.bias.cpu().numpy(), steps, per_channel)
            outputs = len(step.weight)
            if step.weight.dim() == 2:
                graph.add("Gemm", name, weight, bias, transB=1)
            else:
                graph.add("Conv", name, weight, bias, **conv_sizes(step.weight.shape[2:], step.stride, step.padding))
            if step.relu:
                graph.add("Relu", f"{name}_relu")
            through_grid(f"{name}_out", step.y_q)
        else:
            if isinstance(step, Pool):
                graph.add("MaxPool", name, **conv_sizes(step.size, step.stride, step.padding))
            else:
                graph.add("Flatten", name, axis=1)
            # The grid stays as it is; without saying so, the engine would leave the next layer in float32.
            through_grid(f"{name}_out", grid_before(network, name))
    return graph.save(path, tuple(input_shape), outputs)


def grid_before(network: IntegerNetwork, name: str) -> QuantParams:
    """The grid that the step called ``name`` gets its input on."""
    grid = network.x_q
    for other, step in network.steps:
        if other == name:
            break
        grid = step.y_q if isinstance(step, IntegerLayer) else grid
    return grid
