"""Arrays to bytes and back: any bit pattern, and never longer than raw."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from course_lib.methods.arrays import (
    Reader,
    decode_plain,
    encode_plain,
    pack_bits,
    unpack_bits,
    varint,
)

PATTERNS = st.sampled_from(["<u1", "<u2", "<u4", "<u8"]).flatmap(
    lambda kind: hnp.arrays(
        kind,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24),
        elements=st.one_of(st.just(0), st.sampled_from([1, 2, 3, 7]), hnp.from_dtype(np.dtype(kind))),
    )
)


@settings(max_examples=150, deadline=None)
@given(PATTERNS, st.booleans())
def test_any_array_comes_back_and_is_never_longer_than_raw(values, is_float):
    data = encode_plain(values, is_float)
    back = decode_plain(data, *values.shape, values.dtype)
    assert back.dtype == values.dtype
    np.testing.assert_array_equal(back, values)
    assert len(data) <= values.nbytes + 1


@pytest.mark.parametrize("density", [0.0, 0.003, 0.05, 0.3, 0.49])
@pytest.mark.parametrize("transposed", [False, True])
def test_sparse_arrays_come_back(density, transposed):
    rng = np.random.default_rng(0)
    values = rng.integers(1, 2**32, (60, 90), dtype=np.uint32) * (rng.random((60, 90)) < density)
    values[:, ::2] = 0
    values = np.ascontiguousarray(values.T if transposed else values).astype("<u4")
    data = encode_plain(values, True)
    np.testing.assert_array_equal(decode_plain(data, *values.shape, values.dtype), values)
    assert len(data) < values.nbytes


def test_sparse_indices_come_close_to_the_entropy_of_the_mask():
    rng = np.random.default_rng(1)
    density, size = 0.08, 200_000
    mask = (rng.random(size) < density).astype("<u4").reshape(400, 500)
    entropy = -(density * np.log2(density) + (1 - density) * np.log2(1 - density)) * size / 8
    assert len(encode_plain(mask, False)) < 1.03 * entropy + 40


def test_dead_columns_cost_little_in_either_direction():
    values = np.zeros((200, 100), dtype="<u4")
    values[:, 5] = np.arange(1, 201)
    assert abs(len(encode_plain(values, False)) - len(encode_plain(np.ascontiguousarray(values.T), False))) < 10


def test_a_constant_costs_nothing_an_element():
    assert len(encode_plain(np.full((100, 100), 77, dtype="<u4"), False)) < 12


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 12), st.data())
def test_packing(bits, data):
    numbers = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=50)), dtype=np.int64)
    packed = pack_bits(numbers, bits)
    assert len(packed) == -(-bits * len(numbers) // 8)
    np.testing.assert_array_equal(unpack_bits(packed, bits, len(numbers)), numbers)


@given(st.integers(0, 2**63 - 1))
def test_varints(number):
    assert Reader(varint(number)).varint() == number


def test_bytes_that_end_too_early_or_make_no_sense():
    for call, text in (
        (lambda: Reader(b"\x80").varint(), "1 more bytes wanted, 0 left"),
        (lambda: Reader(b"\xff" * 12).varint(), "more than 64 bits"),
        (lambda: unpack_bits(b"\x00", 4, 3), "12 bits wanted, 8 left"),
        (lambda: decode_plain(b"\x09", 1, 2, np.dtype("<u4")), "unknown encoding 9"),
        (lambda: decode_plain(b"\x00\x00", 1, 2, np.dtype("<u4")), "more bytes wanted"),
        (lambda: decode_plain(b"\x01\x09\x01\x00", 1, 2, np.dtype("<u4")), "unknown table form 9"),
        (lambda: decode_plain(b"\x01\x00\x01\x00\x09", 1, 2, np.dtype("<u1")), "unknown coding 9"),
        (lambda: decode_plain(b"\x01\x00\x00", 1, 2, np.dtype("<u1")), "a palette of 0 values"),
        (lambda: decode_plain(b"\x02\x02\x09\x00", 1, 2, np.dtype("<u1")), "9 non-zeros"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_every_truncation_and_every_changed_byte_of_a_sparse_array_ends_in_a_value_error_or_an_array():
    rng = np.random.default_rng(0)
    values = (rng.integers(1, 5, (20, 20)) * (rng.random((20, 20)) < 0.1)).astype("<u4")
    data = encode_plain(values, False)
    for k in range(len(data)):
        for broken in (data[:k], data[:k] + bytes([data[k] ^ 0xFF]) + data[k + 1 :]):
            with contextlib.suppress(ValueError, IndexError):
                assert decode_plain(broken, 20, 20, values.dtype).shape == (20, 20)
