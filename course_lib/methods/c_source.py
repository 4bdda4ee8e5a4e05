"""An integer network as one C99 file: no float, no malloc, nothing to link, one function.

What :class:`~course_lib.methods.integer.IntegerNetwork` computes, with everything done beforehand that no image is
needed for: normalisation and the input's grid are a table of one byte a grey level, the zero point of a layer's input
is part of its bias, a ReLU is the lower bound of the clipping, and flattening is nothing, since memory is flat.
"""

import math
import re
from functools import partial
from string import Template

import torch
from torch import Tensor, nn

from course_lib.gate import UnsupportedModel, whole_number
from course_lib.methods.integer import INT32_MAX, IntegerLayer, IntegerNetwork, fixed_point, integer_max_pool2d
from course_lib.methods.quantization import QuantParams, quantize

__all__ = ["c_source", "float_c_source", "pixel_table", "raw_pixels"]

HEADER = Template("""\
// Written by course_lib. A logit is $logit.
#include <stdint.h>

#define PIXELS $pixels  // of an image, channel by channel, row by row; each below LEVELS
#define LEVELS $levels
#define SCORES $scores
""")

REQUANTIZE = """\
// sum * multiplier / 2^shift, rounded half up (>> of a negative number must keep its sign).
static uint8_t requantize(int32_t sum, int32_t multiplier, int shift, int zero, int low, int high)
{
    int64_t half = (int64_t)1 << shift >> 1;
    int64_t q = (((int64_t)sum * multiplier + half) >> shift) + zero;
    return (uint8_t)(q < low ? low : q > high ? high : q);
}
"""

TABLE = Template("""\
    for (int i = 0; i < PIXELS; i++)
        $y[i] = pixel[${row}image[i]];
""")

LINEAR = Template("""\
    for (int o = 0; o < $outputs; o++) {
        int32_t sum = bias$n[o];
        for (int i = 0; i < $inputs; i++)
            sum += weight$n[o * $inputs + i] * $x[i];
        $y[o] = requantize(sum, multiplier$n[o], shift$n[o], $zero, $low, $high);
    }
""")

CONV = Template("""\
    for (int o = 0; o < $outputs; o++)
        for (int r = 0; r < $rows; r++)
            for (int c = 0; c < $columns; c++) {
                const int8_t *w = weight$n + o * $inputs;
                int32_t sum = bias$n[o];
                for (int k = 0; k < $channels; k++)
                    for (int i = $first_i; i < $first_i + $high_window; i++)
                        for (int j = $first_j; j < $first_j + $wide_window; j++) {
                            int inside = i >= 0 && i < $height && j >= 0 && j < $width;
                            sum += *w++ * (inside ? $x[(k * $height + i) * $width + j] : $border);
                        }
                $y[(o * $rows + r) * $columns + c] =
                    requantize(sum, multiplier$n[o], shift$n[o], $zero, $low, $high);
            }
""")

POOL = Template("""\
    for (int k = 0; k < $channels; k++)
        for (int r = 0; r < $rows; r++)
            for (int c = 0; c < $columns; c++) {
                uint8_t most = 0;
                for (int i = $first_i; i < $first_i + $high_window; i++)
                    for (int j = $first_j; j < $first_j + $wide_window; j++) {
                        int inside = i >= 0 && i < $height && j >= 0 && j < $width;
                        uint8_t here = inside ? $x[(k * $height + i) * $width + j] : 0;
                        most = here > most ? here : most;
                    }
                $y[(k * $rows + r) * $columns + c] = most;
            }
""")

FLOAT_LINEAR = Template("""\
    for (int o = 0; o < $outputs; o++) {
        float sum = bias$n[o];
        for (int i = 0; i < $inputs; i++)
            sum += weight$n[o * $inputs + i] * $x[i];
        $y[o] = $result;
    }
""")

CLIP = Template("""\
    for (int i = 0; i < $count; i++)
        $y[i] = $x[i] < $low ? $low : $x[i];
""")


def pixel_table(x_q: QuantParams, mean, std, levels: int) -> Tensor:
    """What each grey level 0 … ``levels`` - 1 is on the grid of the network's input: uint8 [C, levels].

    ``mean`` and ``std``, one a channel, normalised the pixels over ``levels`` - 1 in training.

    >>> q = QuantParams(scale=0.02, zero_point=50, qmin=0, qmax=255)
    >>> pixel_table(q, mean=[0.5], std=[0.5], levels=3).tolist()
    [[0, 50, 100]]
    """
    mean, std = (torch.as_tensor(v).float().view(-1, 1) for v in (mean, std))
    level = torch.arange(whole_number(levels, "levels", 2, 256), dtype=torch.float32)
    return quantize((level / (levels - 1) - mean) / std, x_q)


def raw_pixels(images: Tensor, mean, std, levels: int) -> Tensor:
    """Normalised images [N, C, H, W] as the grey levels 0 … ``levels`` - 1 that they were: uint8."""
    mean, std = (torch.as_tensor(value).view(-1, 1, 1) for value in (mean, std))
    return ((images * std + mean) * (levels - 1)).round().clamp(0, levels - 1).to(torch.uint8)


def folded_bias(layer: IntegerLayer, name: str) -> Tensor:
    """The bias with the input's zero point in it, int64 [O]: Σ (x - z) w + b = Σ x w + (b - z Σ w).

    ValueError: with these very weights, a sum could leave int32, or could do so on its way.
    """
    weight = layer.weight.flatten(1).long()
    bias = layer.bias.long() - layer.x_q.zero_point * weight.sum(dim=1)
    up = bias + layer.x_q.qmax * weight.clamp(min=0).sum(dim=1)
    down = bias + layer.x_q.qmax * weight.clamp(max=0).sum(dim=1)
    if (worst := max(int(up.max()), -int(down.min()))) > INT32_MAX:
        raise ValueError(f"{name!r}: a sum can reach {worst}, beyond int32 ({INT32_MAX})")
    return bias


def c_array(kind: str, name: str, values: Tensor) -> str:
    """``static const int8_t weight1[6] = {…};``, twenty numbers a line."""
    words = [f"{value}f" if kind == "float" else str(value) for value in values.flatten().tolist()]
    lines = (", ".join(words[i : i + 20]) for i in range(0, len(words), 20))
    return f"static const {kind} {name}[{len(words)}] = {{\n    " + ",\n    ".join(lines) + "};\n"


def layer_tables(layer: IntegerLayer, n: int, name: str) -> str:
    """The four tables of a layer."""
    factor = fixed_point(layer.x_q.scale.double() * layer.w_q.scale.double() / layer.y_q.scale.double())
    outputs = len(layer.weight)
    return (
        c_array("int8_t", f"weight{n}", layer.weight)
        + c_array("int32_t", f"bias{n}", folded_bias(layer, name))
        + c_array("int32_t", f"multiplier{n}", factor.multiplier.expand(outputs))
        + c_array("uint8_t", f"shift{n}", factor.shift.expand(outputs))
    )


def window_numbers(shape: tuple, size: tuple, stride: tuple, padding: tuple) -> dict:
    """What the templates want to know of a window that slides over [C, H, W]."""
    known = dict(zip(("channels", "height", "width", "high_window", "wide_window"), (*shape, *size), strict=True))
    ends = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(shape[1:], size, stride, padding, strict=True)]
    starts = [f"{v} * {s} - {p}" for v, s, p in zip("rc", stride, padding, strict=True)]
    return known | dict(rows=ends[0], columns=ends[1], first_i=starts[0], first_j=starts[1])


def step_source(step, name: str, shape: tuple[int, ...]) -> tuple[Template | None, dict, tuple[int, ...]]:
    """A step's template, what it needs to know, and the shape of its output; UnsupportedModel: none of ours."""
    kind = step.func if isinstance(step, partial) else None
    if isinstance(step, IntegerLayer):
        grids = [step.x_q, step.y_q]
        if step.weight.dtype != torch.int8 or any(q.dtype != torch.uint8 for q in grids) or step.w_q.zero_point.any():
            raise UnsupportedModel(f"{name!r}: uint8 inputs and outputs and int8 weights with zero point 0 are needed")
        zero = int(step.y_q.zero_point)
        known = dict(zero=zero, low=zero if step.relu else step.y_q.qmin, high=step.y_q.qmax)
        known |= dict(outputs=len(step.weight), inputs=step.weight[0].numel(), border=int(step.x_q.zero_point))
        fits = {2: (known["inputs"],), 4: (step.weight.shape[1], *shape[1:])}[step.weight.dim()]
        if shape != fits or (len(shape) == 1) != (step.weight.dim() == 2):
            raise ValueError(f"{name!r} gets a shape {shape}; its weights {tuple(step.weight.shape)} do not fit")
        if step.weight.dim() == 2:
            return LINEAR, known, (known["outputs"],)
        known |= window_numbers(shape, tuple(step.weight.shape[2:]), step.stride, step.padding)
        return CONV, known, (known["outputs"], known["rows"], known["columns"])
    if kind is integer_max_pool2d:
        known = window_numbers(shape, **({"padding": (0, 0)} | step.keywords))
        return POOL, known, (shape[0], known["rows"], known["columns"])
    if kind is torch.clamp and set(step.keywords) == {"min"}:
        return CLIP, {"count": math.prod(shape), "low": step.keywords["min"]}, shape
    if kind is torch.flatten:
        return None, {}, (math.prod(shape),)
    can = "linear, convolution, ReLU, max-pooling and flatten are written"
    raise UnsupportedModel(f"{name!r} ({step}) cannot be written as C: {can}")


def c_source(network: IntegerNetwork, input_shape: tuple[int, int, int], table: Tensor) -> str:
    """One C99 file, ``void predict(const uint8_t *image, uint8_t *scores)``: the network's own integers, bit by bit.

    ``image`` holds the grey levels of one image, ``input_shape`` (C, H, W) in all, each an index into ``table``
    (uint8 [C, levels], see :func:`pixel_table`); ``scores`` are the integers of the logits on ``network.y_q``. Two
    static buffers hold what goes from step to step, so a call must have ended before the next begins.
    UnsupportedModel: names a step that is not written. ValueError: shapes that do not fit, sums beyond int32.

    >>> from course_lib.methods.integer import integer_network
    >>> images = torch.rand(20, 1, 2, 2)
    >>> network = integer_network(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), images)
    >>> table = pixel_table(network.x_q, mean=[0.0], std=[1.0], levels=17)
    >>> "void predict(const uint8_t *image, uint8_t *scores)" in c_source(network, (1, 2, 2), table)
    True
    """
    shape = tuple(whole_number(n, "input_shape") for n in input_shape)
    if table.dtype != torch.uint8 or len(table) != shape[0]:
        raise ValueError(f"table must be uint8 [{shape[0]}, levels], got {table.dtype} {tuple(table.shape)}")
    pixels, tables, parts = math.prod(shape), [c_array("uint8_t", "pixel", table)], []
    row = f"i / {pixels // shape[0]} * LEVELS + " if shape[0] > 1 else ""
    parts.append((TABLE, {"row": row}, "grey levels to the grid of the input", pixels))
    for step_name, step in network.steps:
        before, (template, known, shape) = shape, step_source(step, step_name, shape)
        if min(shape) < 1:
            raise ValueError(f"{step_name!r}: its window does not fit into {before}")
        if isinstance(step, IntegerLayer):
            known["n"] = len(tables)
            tables.append(layer_tables(step, len(tables), step_name))
        if template is not None:
            clean = re.sub(r"[^A-Za-z0-9_.]", "_", step_name)
            title = f"{clean}: {' x '.join(map(str, before))} to {' x '.join(map(str, shape))}"
            parts.append((template, known, title, math.prod(shape)))
    logit = f"(score - {int(network.y_q.zero_point)}) * {network.y_q.scale.item()}"
    head = HEADER.substitute(pixels=pixels, levels=table.shape[1], scores=math.prod(shape), logit=logit)
    return "\n".join([head, REQUANTIZE, *tables, function_source(parts, "uint8_t")])


def function_source(parts: list, kind: str) -> str:
    """The function ``predict``: each step reads one buffer and writes the other, the last one writes the scores."""
    counts = [count for *_, count in parts[:-1]]
    sizes = {buffer: max(counts[start::2], default=0) for start, buffer in enumerate("ab")}
    lines = [f"void predict(const uint8_t *image, {kind} *scores)\n{{"]
    lines += [f"    static {kind} {buffer}[{size}];" for buffer, size in sizes.items() if size]
    for place, (template, known, title, _) in enumerate(parts):
        y = "scores" if place == len(parts) - 1 else "ab"[place % 2]
        lines.append(f"\n    // {title}\n" + template.substitute(known, x="ba"[place % 2], y=y).rstrip())
    return "\n".join([*lines, "}\n"])


def float_c_source(model: nn.Sequential, mean: float, std: float, levels: int) -> str:
    """The same file for a float MLP on images of one channel, to compare with: ``float *scores`` are the logits.

    ``model`` flattens, then has linear layers and ReLUs; UnsupportedModel: anything else.
    """
    chain = [m for m in model if not isinstance(m, nn.Flatten)]
    grey = (torch.arange(levels, dtype=torch.float32) / (levels - 1) - mean) / std
    tables, parts = [c_array("float", "pixel", grey)], []
    parts.append((TABLE, {"row": ""}, "normalisation", chain[0].in_features))
    for layer, after in zip(chain, [*chain[1:], None], strict=True):
        if type(layer) not in (nn.Linear, nn.ReLU):
            raise UnsupportedModel(f"{layer} cannot be written: linear layers and ReLUs are needed")
        if isinstance(layer, nn.Linear):
            outputs, inputs = layer.weight.shape
            result = "sum < 0 ? 0 : sum" if isinstance(after, nn.ReLU) else "sum"
            known = dict(n=len(tables), outputs=outputs, inputs=inputs, result=result)
            values = zip(("weight", "bias"), (layer.weight.detach(), layer.bias.detach()), strict=True)
            tables.append("".join(c_array("float", f"{kind}{len(tables)}", value) for kind, value in values))
            parts.append((FLOAT_LINEAR, known, f"linear: {inputs} to {outputs}", outputs))
    head = HEADER.substitute(pixels=chain[0].in_features, levels=levels, scores=outputs, logit="a score")
    return "\n".join([head, *tables, function_source(parts, "float")])
