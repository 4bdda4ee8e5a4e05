"""The C file answers with the integers of the network in Python; what cannot be written is refused by name."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from torch import nn

from course_lib.gate import UnsupportedModel
from course_lib.lab.compile import CompilerError, compile_c, compiler_command
from course_lib.methods import c_source as c
from course_lib.methods.integer import INT32_MAX, IntegerNetwork, integer_network
from course_lib.methods.quantization import QuantParams, quantize


@pytest.fixture
def run(tmp_path):
    """A C file and images to scores."""
    try:
        compiler_command()
    except CompilerError as error:
        pytest.skip(str(error))
    return lambda source, grey: compile_c(source, tmp_path)(grey.numpy())


def network_of(model, shape, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    grey = torch.randint(0, 17, (60, *shape), generator=generator, dtype=torch.uint8)
    mean, std = torch.linspace(0.2, 0.5, shape[0]), torch.linspace(0.3, 0.6, shape[0])
    images = (grey / 16 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    network = integer_network(model, images[:30], **options)
    return network, images, grey, c.pixel_table(network.x_q, mean, std, 17)


NETWORKS = {
    "without a bias": (nn.Sequential(nn.Flatten(), nn.Linear(30, 7, bias=False), nn.ReLU()), (1, 5, 6)),
    "three layers": (
        nn.Sequential(nn.Flatten(), nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 4), nn.Linear(4, 3)), (2, 2, 2),
    ),
    "padding and stride": (nn.Sequential(nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(2, 1)), nn.ReLU()), (3, 6, 5)),
    "max-pooling with a border": (
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.MaxPool2d(3, 2, padding=1), nn.Flatten(), nn.Linear(27, 5)),
        (2, 6, 6),
    ),
    "pooling and ReLU at other places": (
        nn.Sequential(
            nn.MaxPool2d((1, 2)), nn.ReLU(), nn.Conv2d(1, 2, 2), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(),
            nn.Linear(8, 3),
        ),
        (1, 5, 10),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("per_channel", [True, False])
def test_every_score_is_that_of_the_integers_in_python(kind, per_channel, run):
    network, images, grey, table = network_of(*NETWORKS[kind], per_channel=per_channel)
    expected = network.scores(images).flatten(1)
    assert len(expected.unique()) > 20, "the case says nothing: its scores are all alike"
    np.testing.assert_array_equal(run(c.c_source(network, NETWORKS[kind][1], table), grey), expected)


def test_sums_near_the_end_of_int32_are_exact(run):
    """Scales apart by 2^30, so that multipliers, shifts and sums reach the ends of their ranges."""
    network, images, grey, table = network_of(nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), (1, 4, 4))
    (flatten, (name, layer)) = network.steps
    bias = torch.tensor([INT32_MAX - 600_000, -INT32_MAX + 600_000, 5, -(2**30)], dtype=torch.int32)
    for scale in (2.0**-40, 2.0**-2, 2.0**20, 2.0**29):
        y_q = QuantParams(scale=layer.x_q.scale * layer.w_q.scale.max() / scale, zero_point=77, qmin=0, qmax=255)
        hard = dataclasses.replace(layer, bias=bias, y_q=y_q)
        changed = IntegerNetwork((flatten, (name, hard)), network.x_q, y_q)
        np.testing.assert_array_equal(run(c.c_source(changed, (1, 4, 4), table), grey), changed.scores(images))


def test_the_file_has_no_float_no_library_and_one_function():
    network, _, _, table = network_of(*NETWORKS["max-pooling with a border"])
    source = c.c_source(network, (2, 6, 6), table)
    code = re.sub(r"//.*", "", source)
    assert not re.search(r"\b(float|double|malloc|\d+\.\d+)\b", code)
    assert re.findall(r"#include.*", code) == ["#include <stdint.h>"]
    assert re.findall(r"^(?!static)\w+ \w+\(", code, re.M) == ["void predict("]
    assert max(map(len, source.splitlines())) <= 120


def test_the_tables_are_what_the_grid_says():
    q = QuantParams(scale=0.02, zero_point=50, qmin=0, qmax=255)
    table = c.pixel_table(q, [0.3, 0.5], [0.25, 0.5], 256)
    levels = torch.arange(256) / 255
    assert torch.equal(table, torch.stack([quantize((levels - 0.3) / 0.25, q), quantize((levels - 0.5) / 0.5, q)]))
    grey = torch.randint(0, 256, (4, 2, 3, 3), dtype=torch.uint8)
    normalised = (grey / 255 - torch.tensor([0.3, 0.5]).view(-1, 1, 1)) / torch.tensor([0.25, 0.5]).view(-1, 1, 1)
    assert torch.equal(c.raw_pixels(normalised, (0.3, 0.5), (0.25, 0.5), 256), grey)


def test_the_float_file_gives_the_logits(run):
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    _, images, grey, _ = network_of(model, (1, 2, 3))
    with torch.no_grad():
        expected = model(images).numpy()
    got = run(c.float_c_source(model, mean=0.2, std=0.3, levels=17), grey)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UnsupportedModel, match="Conv2d"):
        c.float_c_source(nn.Sequential(nn.Linear(2, 2), nn.Conv2d(1, 1, 1)), 0.2, 0.3, 17)


def test_what_cannot_be_written_is_refused_by_name():
    network, _, _, table = network_of(nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), (1, 4, 4))
    (flatten, (_, layer)) = network.steps

    def written(layer, *more):
        steps = (flatten, ("fc", layer), *more)
        return c.c_source(IntegerNetwork(steps, network.x_q, network.y_q), (1, 4, 4), table)

    with pytest.raises(UnsupportedModel, match=r"'head'.*cannot be written"):
        written(layer, ("head", torch.softmax))
    odd = QuantParams(layer.w_q.scale, torch.ones(4, dtype=torch.int32), -127, 127, axis=0)
    with pytest.raises(UnsupportedModel, match=r"'fc'.*zero point 0"):
        written(dataclasses.replace(layer, w_q=odd))
    # In order, the sum could pass int32 although the end would fit: the folded bias alone fills it.
    for most in (INT32_MAX - 100, 100 - INT32_MAX):
        with pytest.raises(ValueError, match="'fc': a sum can reach"):
            written(dataclasses.replace(layer, bias=torch.full((4,), most, dtype=torch.int32)))
    with pytest.raises(ValueError, match=r"'1' gets a shape \(25,\)"):
        c.c_source(network, (1, 5, 5), table)
    with pytest.raises(ValueError, match=r"uint8 \[3, levels\]"):
        c.c_source(network, (3, 4, 4), table)
    pool, *_ = network_of(nn.Sequential(nn.Conv2d(1, 2, 2), nn.MaxPool2d(2)), (1, 4, 4))
    with pytest.raises(ValueError, match=r"'1': its window does not fit into \(2, 1, 1\)"):
        c.c_source(pool, (1, 2, 2), table)
