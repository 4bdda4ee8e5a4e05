"""Formats against ml_dtypes bit for bit, against loops, and at their true bits."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from course_lib.methods.formats import (  # isort: skip
    LEVELS, fp8_encode, int4_encode, mxfp4_encode, nf4_encode, nf4_levels,
)  # fmt: skip
from course_lib.methods.quantization import choose_qparams

FORMATS = {"int4": int4_encode, "nf4": nf4_encode, "fp8": fp8_encode, "mxfp4": mxfp4_encode}

# As bitsandbytes and the paper's appendix print them.
NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""


@pytest.fixture
def weight():
    w = torch.randn(12, 96, generator=torch.Generator().manual_seed(0))
    w[1] *= 1e-3
    w[2] *= 1e4
    w[3, :32] = 0
    w[4, 0], w[5, 0], w[6, 0] = -9, 8.0, 1.0
    return w


def bits_of(x):
    return np.asarray(x, dtype=np.float32).view(np.uint32)


def test_levels():
    assert torch.equal(nf4_levels(), torch.tensor([float(x) for x in NF4.split()]))
    four = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(bits_of(LEVELS["mxfp4"]), bits_of(four))
    eight = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(LEVELS["fp8"], eight)
    np.testing.assert_array_equal(LEVELS["int4"], [*range(8), *range(-8, 0)])


def test_mxfp4_equals_ml_dtypes_bit_for_bit(weight):
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 4.0, 6.0, 7.9, -0.25, -5.0, -0.0, 0.0, 1e-9, -1e-9])
    weight[7, :32] = ties.repeat(2)
    ours = mxfp4_encode(weight)
    blocks = weight.numpy().reshape(12, 3, 32)
    largest = np.abs(blocks).max(-1)
    exponent = np.floor(np.log2(np.where(largest > 0, largest, 4))) - 2
    scale = np.exp2(exponent).astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    codes = (blocks / scale[..., None]).astype(ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(ours.scale, scale)
    np.testing.assert_array_equal(ours.codes, codes.view(np.uint8).reshape(12, 96))
    decoded = (codes.astype(np.float32) * scale[..., None]).reshape(12, 96)
    np.testing.assert_array_equal(bits_of(ours.values()), bits_of(decoded))
    assert ours.bits == 4.25


@pytest.mark.parametrize("group", [None, 32])
def test_fp8_equals_ml_dtypes_bit_for_bit(weight, group):
    weight[7, :32] = torch.exp2(-torch.arange(32.0)) * 1.0625  # ties, and numbers below the least of the format
    ours = fp8_encode(weight, group)
    blocks = weight.numpy().reshape(1, -1) if group is None else weight.numpy().reshape(-1, 32)
    largest = np.abs(blocks).max(-1, keepdims=True).astype(np.float64)
    scale = np.where(largest > 0, largest / 448, 1).astype(np.float32)
    codes = np.clip(blocks / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(ours.codes, codes.view(np.uint8).reshape(12, 96))
    np.testing.assert_array_equal(ours.values(), (codes.astype(np.float32) * scale).reshape(12, 96))
    assert ours.bits == (8 + 32 / weight.numel() if group is None else 9)


@pytest.mark.parametrize("group", [16, 32, 96])
def test_int4_is_the_grid_of_choose_qparams_with_rounded_scales(weight, group):
    ours, q = int4_encode(weight, group), choose_qparams(weight, 4, group=group)
    assert torch.equal(ours.scale, q.scale.bfloat16().float())
    np.testing.assert_array_equal(ours.scale, q.scale.numpy().astype(ml_dtypes.bfloat16).astype(np.float32))
    integers = torch.round(weight / ours.scale.repeat_interleave(group, -1)).clamp(-7, 7)
    packed = integers.numpy().astype(ml_dtypes.int4).view(np.uint8) & 0xF  # two's complement, in half a byte
    np.testing.assert_array_equal(ours.codes, packed)
    torch.testing.assert_close(ours.values(), integers * ours.scale.repeat_interleave(group, -1), rtol=0, atol=0)
    assert ((ours.values() - weight).abs() <= 0.54 * ours.scale.repeat_interleave(group, -1)).all()
    assert ours.bits == 4 + 16 / group


def test_nf4_takes_the_nearest_level(weight):
    ours, levels = nf4_encode(weight), nf4_levels()
    for row, block in ((0, 0), (1, 2), (3, 0), (4, 0)):
        part = weight[row, 32 * block : 32 * block + 32]
        scale = part.abs().max().bfloat16().float() if part.any() else torch.tensor(1.0)
        assert ours.scale[row, block] == scale
        nearest = (part / scale - levels[:, None]).abs().argmin(dim=0)
        assert torch.equal(ours.codes[row, 32 * block : 32 * block + 32].long(), nearest)
    assert (ours.values()[3, :32] == 0).all()
    assert ours.bits == 4.5
    assert nf4_encode(weight, 96).bits == 4 + 16 / 96


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("factor", [0.0, 1e-45, 1e-38, 1.0, 1e37])
def test_dead_and_extreme_groups_and_half_precision(name, factor):
    w = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    w[0] *= factor
    values = FORMATS[name](w).values()
    assert torch.isfinite(values).all()
    largest = w.abs().max() if name == "fp8" else w.abs().amax(dim=1, keepdim=True)
    assert ((values - w).abs() <= 0.25 * largest + 1.2e-38).all()
    half = w.clamp(-6e4, 6e4).half()
    assert torch.equal(FORMATS[name](half).codes, FORMATS[name](half.float()).codes)


@pytest.mark.parametrize("name", FORMATS)
def test_what_cannot_be_encoded(name):
    with pytest.raises(ValueError, match="has 64 NaN"):
        FORMATS[name](torch.ones(2, 32) * math.nan)
    with pytest.raises(ValueError, match="group=32 does not divide the last dimension"):
        FORMATS[name](torch.ones(2, 40), 32)
