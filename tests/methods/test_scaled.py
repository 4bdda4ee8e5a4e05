"""Quantized weights are recognised, exactly or not at all."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from course_lib.methods.quantization import choose_qparams, fake_quantize
from course_lib.methods.scaled import decode_array, encode_array, encoding_name, find_grid


def patterns(weight):
    return weight.numpy().astype("<f4").view("<u4")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 8), st.sampled_from([None, 0]), st.floats(-30, 30))
def test_any_symmetric_grid_is_found(seed, bits, axis, magnitude):
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(seed)) * 10.0**magnitude
    q = choose_qparams(weight, bits, axis=axis)
    values = patterns(fake_quantize(weight, q))
    found = find_grid(values.view("<f4") if axis == 0 else values.view("<f4").reshape(1, -1))
    assert found is not None
    data = encode_array(values, True)
    np.testing.assert_array_equal(decode_array(data, *values.shape, values.dtype), values)
    assert len(data) <= bits * values.size / 8 + 4 * 5 + 60


def test_encodings_have_names():
    torch.manual_seed(0)
    weight = torch.randn(300, 500)
    eight, two = (patterns(fake_quantize(weight, choose_qparams(weight, b, axis=0))) for b in (8, 2))
    assert encoding_name(encode_array(eight, True)) in ("integers, raw", "integers, codebook")
    assert encoding_name(encode_array(two, True)) in ("integers, codebook", "integers, sparse")
    assert encoding_name(encode_array(patterns(weight), True)) == "raw"
    assert encoding_name(encode_array(patterns(weight.masked_fill(weight < 1, 0)), True)) == "sparse"
    assert encoding_name(encode_array(patterns(weight.sign()), True)) in ("codebook", "integers, codebook")


def test_a_pruned_and_quantized_row_of_zeros_is_no_obstacle():
    weight = torch.randn(4, 6)
    weight[2] = 0
    values = patterns(fake_quantize(weight, choose_qparams(weight, 4, axis=0)))
    scales, levels = find_grid(values.view("<f4"))
    assert scales[2] == 1
    assert not levels[2].any()


@pytest.mark.parametrize("odd", [np.nan, np.inf, -0.0, 0.123])
def test_one_value_off_the_grid_is_enough_to_refuse_it(odd):
    weight = np.float32([[1.0, -2.0, 3.0], [7.0, -7.0, 1.0]])
    assert find_grid(weight) is not None
    weight[1, 2] = odd
    assert find_grid(weight) is None


def test_damaged_data():
    with pytest.raises(ValueError, match="make float32, not 2-byte values"):
        decode_array(b"\x03\x00", 1, 1, np.dtype("<u2"))
    with pytest.raises(ValueError, match="unknown layout 7"):
        decode_array(b"\x03\x07", 1, 1, np.dtype("<u4"))
