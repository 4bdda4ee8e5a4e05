"""Huffman's code against its theory: prefix-free, Kraft's equality, within one bit of the entropy, optimal."""

import math
from collections import Counter
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from course_lib.methods.huffman import (
    LONGEST,
    canonical_codes,
    code_lengths,
    entropy_bits,
    huffman_code,
    huffman_decode,
    huffman_encode,
    limited_lengths,
)

COUNTS = st.lists(st.integers(1, 10**6), min_size=2, max_size=40)


@settings(max_examples=100, deadline=None)
@given(COUNTS)
def test_prefix_free_kraft_and_entropy(counts):
    code = huffman_code(dict(enumerate(counts)))
    assert list(code) == list(range(len(counts)))
    assert sum(Fraction(1, 2 ** len(word)) for word in code.values()) == 1
    assert not any(a.startswith(b) or b.startswith(a) for a, b in combinations(code.values(), 2))
    mean = sum(n * len(code[s]) for s, n in enumerate(counts)) / sum(counts)
    assert entropy_bits(counts) <= mean + 1e-9
    assert mean < entropy_bits(counts) + 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=2, max_size=6))
def test_no_prefix_free_code_is_shorter(counts):
    def best(weights):  # every tree has two deepest siblings: try all pairs, not only the two rarest
        if len(weights) == 1:
            return 0
        return min(
            a + b + best([*(w for k, w in enumerate(weights) if k not in (i, j)), a + b])
            for (i, a), (j, b) in combinations(enumerate(weights), 2)
        )

    assert sum(n * length for n, length in zip(counts, code_lengths(counts), strict=True)) == best(counts)


def test_single_symbol_no_symbol_and_counts_of_zero():
    assert huffman_code({"x": 9}) == {"x": "0"}
    assert huffman_code({}) == {}
    assert huffman_code([]) == {}
    assert huffman_code({"a": 3, "b": 0, "c": 1}) == {"a": "0", "c": "1"}
    assert huffman_code([0, 4, 0]) == {1: "0"}
    assert entropy_bits([]) == 0
    assert entropy_bits([0, 7]) == 0


def test_counters_and_numpy_counts_are_welcome():
    code = huffman_code(Counter("abracadabra"))
    assert sum(len(code[letter]) for letter in "abracadabra") == 23
    assert set(huffman_code(np.array([3, 1, 2]))) == {0, 1, 2}


@pytest.mark.parametrize(
    ("counts", "error", "text"),
    [
        ({"a": -1}, ValueError, "count of 'a' must not be negative"),
        ({"a": 1.5}, TypeError, "count of 'a' must be an integer"),
        ({"a": math.nan}, TypeError, "must be an integer"),
        ("abc", TypeError, "counts must be a mapping"),
        (7, TypeError, "counts must be a mapping"),
    ],
)
def test_bad_counts(counts, error, text):
    with pytest.raises(error, match=text):
        huffman_code(counts)


def fibonacci(n):
    a, b, out = 1, 1, []
    for _ in range(n):
        out.append(a)
        a, b = b, a + b
    return out


def test_lengths_are_limited_for_files():
    counts = fibonacci(30)
    assert max(code_lengths(counts)) == 29
    limited = limited_lengths(counts)
    assert max(limited) <= LONGEST
    assert sum(Fraction(1, 2**n) for n in limited) == 1
    mean = sum(n * k for n, k in zip(limited, counts, strict=True)) / sum(counts)
    assert mean < entropy_bits(counts) + 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=300), st.booleans())
def test_encoding_is_the_words_in_a_row_and_comes_back(symbols, skewed):
    symbols = np.array([s // 3 if skewed else s for s in symbols])
    counts = np.bincount(symbols, minlength=21)
    lengths = [0] * 21
    for symbol, word in huffman_code(counts).items():
        lengths[symbol] = len(word)
    data = huffman_encode(symbols, lengths)
    code = huffman_code(counts)
    bits = "".join(code[s] for s in symbols.tolist())
    assert data == int(bits.ljust(8 * len(data), "0"), 2).to_bytes(len(data), "big")
    assert len(data) == -(-len(bits) // 8)
    np.testing.assert_array_equal(huffman_decode(data, lengths, len(symbols)), symbols)


def test_streams_that_break():
    data = huffman_encode(np.array([0, 1, 2, 2]), [1, 2, 2])
    assert huffman_decode(data, [1, 2, 2], 0).size == 0
    for broken, lengths, count, text in (
        (data, [1, 2, 2], 50, "ends or breaks"),
        (b"", [1, 2, 2], 1, "ends or breaks"),
        (b"\xff", [1, 3], 1, "ends or breaks"),
        (b"\x00", [3, 3, 3, 3, 3, 3, 3, 3], 3, "within the last"),
        (data, [1, 1, 1], 1, "no prefix-free code"),
        (data, [0, 0], 1, "1 to 15 bits"),
    ):
        with pytest.raises(ValueError, match=text):
            huffman_decode(broken, lengths, count)
    assert canonical_codes([]) == []
