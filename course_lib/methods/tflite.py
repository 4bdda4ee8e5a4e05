"""The same integers as a ``.tflite`` file, the format that LiteRT (TensorFlow Lite) runs on phones and small boards.

A file is one flatbuffer: a list of buffers (bytes), one of tensors (shape, type, scale, zero point), and one of
operators that name their tensors by number. LiteRT's 8-bit numbers are signed and its images have their channels last
(NHWC): zero points move by 128, weights turn their axes, and no value changes. Its sums are those of Jacob et al. 2018.
"""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from course_lib.files import write_file
from course_lib.gate import UnsupportedModel
from course_lib.methods.integer import IntegerLayer, IntegerNetwork, Pair, integer_max_pool2d, output_shape
from course_lib.methods.quantization import QuantParams

__all__ = ["write_tflite"]

MOVE = 128  # from 0 … 255 to −128 … 127
KNOWN = "linear, convolution, ReLU, max-pooling and flatten layers"
OPTIONS = {"CONV_2D": "Conv2DOptions", "FULLY_CONNECTED": "FullyConnectedOptions", "MAX_POOL_2D": "Pool2DOptions"}
VERSIONS = {"CONV_2D": 3, "FULLY_CONNECTED": 4, "MAX_POOL_2D": 2, "RELU": 2}  # the first with signed 8-bit numbers


def channels_last(weight: Tensor, flattened: list[int] | None) -> Tensor:
    """[O, C, kh, kw] to [O, kh, kw, C]; a linear layer's columns likewise, where a map [N, H, W, C] was flattened."""
    if weight.dim() == 2 and flattened:
        _, height, width, channels = flattened
        return weight.unflatten(1, (channels, height, width)).permute(0, 2, 3, 1).flatten(1)
    return weight.permute(0, 2, 3, 1) if weight.dim() == 4 else weight


class Tables:
    """What a ``.tflite`` file lists; ``tip`` is the number of the last tensor, ``shape`` its [N, H, W, C] or [N, I]."""

    def __init__(self, schema, shape: list[int], grid: QuantParams):
        self.schema, self.shape = schema, shape
        self.tensors, self.operators, self.kinds = [], [], []
        self.buffers = [schema.BufferT()]  # number 0 is the empty one of all tensors that are computed
        self.tip = self.values("images", grid)

    def tensor(self, name: str, kind: str, shape, scale: Tensor, zero_point: Tensor, buffer: int = 0) -> int:
        """Add a tensor and return its number; one scale, or one an output channel (dimension 0)."""
        scales, zeros = scale.reshape(-1).tolist(), zero_point.reshape(-1).tolist()
        grid = self.schema.QuantizationParametersT(scale=scales, zeroPoint=zeros)
        number = getattr(self.schema.TensorType, kind)
        made = self.schema.TensorT(name=name, type=number, shape=list(shape), quantization=grid, buffer=buffer)
        self.tensors.append(made)
        return len(self.tensors) - 1

    def constant(self, name: str, kind: str, data: Tensor, scale: Tensor) -> int:
        """A tensor with bytes of its own, zero point 0."""
        numbers = data.flatten().numpy()
        data_bytes = numbers.astype(numbers.dtype.newbyteorder("<")).view(np.uint8)
        self.buffers.append(self.schema.BufferT(data=data_bytes))
        return self.tensor(name, kind, data.shape, scale, torch.zeros_like(scale).long(), len(self.buffers) - 1)

    def values(self, name: str, q: QuantParams) -> int:
        """A tensor of computed 8-bit values on the grid ``q``."""
        return self.tensor(name, "INT8", self.shape, q.scale, q.zero_point - MOVE)

    def add(self, name: str, kind: str, q: QuantParams, constants: tuple[int, ...] = (), **options) -> None:
        """An operator on the tip; its output, on the grid ``q``, becomes the tip."""
        if kind not in self.kinds:
            self.kinds.append(kind)
        made = self.schema.OperatorT(opcodeIndex=self.kinds.index(kind), inputs=[self.tip, *constants])
        self.tip = self.values(name, q)
        made.outputs = [self.tip]
        if table := OPTIONS.get(kind):
            made.builtinOptionsType = getattr(self.schema.BuiltinOptions, table)
            made.builtinOptions = getattr(self.schema, f"{table}T")(**options)
        self.operators.append(made)

    def window(self, name: str, size: Pair, stride: Pair, padding: Pair = (0, 0)) -> dict[str, int]:
        """Padding and strides of a window that slides over the tip; ``shape`` becomes that of its output."""
        height, width = self.shape[1:3]
        same, after, border = True, [], []
        for n, k, s, p in zip((height, width), size, stride, padding, strict=True):
            after.append((n + 2 * p - k) // s + 1)
            # SAME has its own rule: n / stride outputs, rounded up, the border split in two, the odd pixel last.
            outputs = -(-n // s)
            border.append(max(0, (outputs - 1) * s + k - n))
            same &= border[-1] == 2 * p and after[-1] == outputs
        if any(padding) and not same:
            fits = f"LiteRT knows none, or 'same', which adds {border} in all, an odd pixel at the end"
            raise UnsupportedModel(f"{name!r}: a border of {padding} around {height}×{width} cannot be written: {fits}")
        self.shape = [self.shape[0], *after, self.shape[3]]
        kind = self.schema.Padding.SAME if any(padding) else self.schema.Padding.VALID
        return {"padding": kind, "strideH": stride[0], "strideW": stride[1]}

    def layer(self, name: str, step: IntegerLayer, flattened: list[int] | None) -> None:
        """A linear layer or a convolution; ``flattened`` is the shape that its input had before it was flattened."""
        weight = channels_last(step.weight, flattened)
        kind, options = "FULLY_CONNECTED", {}
        if weight.dim() == 4:
            kind = "CONV_2D"
            options = self.window(name, weight.shape[1:3], step.stride, step.padding)
        self.shape = [*self.shape[: weight.dim() - 1], len(weight)]
        w = self.constant(f"{name}/weight", "INT8", weight, step.w_q.scale)
        bias_scale = step.x_q.scale * step.w_q.scale
        b = self.constant(f"{name}/bias", "INT32", step.bias, bias_scale)
        act = self.schema.ActivationFunctionType
        options["fusedActivationFunction"] = act.RELU if step.relu else act.NONE
        self.add(name, kind, step.y_q, (w, b), **options)

    def packed(self) -> bytes:
        """The whole file."""
        import flatbuffers

        codes = []
        for kind in self.kinds:
            code = getattr(self.schema.BuiltinOperator, kind)
            versions = {"version": VERSIONS.get(kind, 1), "deprecatedBuiltinCode": code}
            codes.append(self.schema.OperatorCodeT(builtinCode=code, **versions))
        graph = self.schema.SubGraphT(self.tensors, [0], [self.tip], self.operators)
        model = self.schema.ModelT(version=3, operatorCodes=codes, subgraphs=[graph], buffers=self.buffers)
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())


def write_tflite(network: IntegerNetwork, path: str | os.PathLike, input_shape: tuple[int, int, int]) -> Path:
    """Write an :class:`~course_lib.methods.integer.IntegerNetwork` for images of shape (C, H, W).

    The file takes int8 images [1, H, W, C], which are our integers minus 128, and gives int8 scores [1, K], minus 128
    too; an interpreter resizes the 1. ImportError: ``ai-edge-litert`` is not installed. UnsupportedModel: a border that
    LiteRT has not. ValueError: images that do not fit. OSError: the file cannot be written; nothing is left behind.
    """
    try:
        from ai_edge_litert import schema_py_generated as schema
    except ImportError as error:
        need = "writing .tflite files needs the package ai-edge-litert: pip install ai-edge-litert"
        raise ImportError(need) from error
    channels, height, width = input_shape
    output_shape(network, input_shape)
    tables, grid, flattened = Tables(schema, [1, height, width, channels], network.x_q), network.x_q, None
    for name, step in network.steps:
        kind = getattr(step, "func", None)
        if isinstance(step, IntegerLayer):
            if step.weight.dtype != torch.int8 or {step.x_q.dtype, step.y_q.dtype} != {torch.uint8}:
                raise UnsupportedModel(f"{name!r}: uint8 inputs and outputs and int8 weights are needed")
            tables.layer(name, step, flattened)
            grid, flattened = step.y_q, None
        elif kind is torch.flatten:  # vanishes: a linear layer takes its numbers in a row anyway
            flattened = tables.shape if len(tables.shape) == 4 else flattened
        elif kind is integer_max_pool2d:
            size, options = step.keywords["size"], tables.window(name, **step.keywords)
            tables.add(name, "MAX_POOL_2D", grid, filterHeight=size[0], filterWidth=size[1], **options)
        elif kind is torch.clamp:
            tables.add(name, "RELU", grid)
        else:
            raise UnsupportedModel(f"{name!r} ({step}) cannot be written: {KNOWN} are")
    return write_file(path, tables.packed())
