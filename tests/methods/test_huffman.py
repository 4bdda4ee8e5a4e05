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


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=40))
def test_prefix_free_kraft_and_entropy(counts):
    code = huffman_code(dict(enumerate(counts)))
    assert list(code) == list(range(len(counts)))
    assert sum(Fraction(1, 2 ** len(word)) for word in code.values()) == 1
    assert not any(a.startswith(b) or b.startswith(a) for a, b in combinations(code.values(), 2))
    mean = sum(n * len(code[s]) for s, n in enumerate(counts)) / sum(counts)
    assert entropy_bits(counts) <= mean + 1e-9 < entropy_bits(counts) + 1


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


@pytest.mark.parametrize(
    ("counts", "code"),
    [
        ({"x": 9}, {"x": "0"}),
        ({}, {}),
        ([], {}),
        ({"a": 3, "b": 0, "c": 1}, {"a": "0", "c": "1"}),
        ([0, 4, 0], {1: "0"}),
        (np.array([3, 1, 2]), {0: "0", 1: "10", 2: "11"}),
        ({"r": 1, "often": 9, "s": 1}, {"r": "10", "often": "0", "s": "11"}),  # the canonical order: shorter first
    ],
)
def test_codes_by_hand(counts, code):
    assert huffman_code(counts) == code


def test_the_length_of_a_text_and_its_entropy():
    code = huffman_code(Counter("abracadabra"))
    assert sum(len(code[letter]) for letter in "abracadabra") == 23
    assert entropy_bits([]) == entropy_bits([0, 7]) == 0
    assert entropy_bits([3, 1]) == pytest.approx(2 - 0.75 * math.log2(3))


@pytest.mark.parametrize(
    ("counts", "error", "text"),
    [
        ({"a": -1}, ValueError, "count of 'a' must not be negative, got -1"),
        ({"a": 1.5}, TypeError, "count of 'a' must be an integer, got 1.5"),
        ("abc", TypeError, "counts must be a mapping .* got str"),
        (7, TypeError, "counts must be a mapping .* got int"),
    ],
)
def test_bad_counts(counts, error, text):
    with pytest.raises(error, match=text):
        huffman_code(counts)


def test_lengths_are_limited_for_files():
    counts = [1, 1]
    while len(counts) < 30:
        counts.append(counts[-1] + counts[-2])
    assert max(code_lengths(counts)) == 29  # Fibonacci's numbers make the longest words
    assert limited_lengths(counts[:16]) == code_lengths(counts[:16])  # 15 bits still fit
    assert max(code_lengths(counts[:17])) == LONGEST + 1 > max(limited_lengths(counts[:17]))
    assert max(limited_lengths([2**k for k in range(40)])) == LONGEST
    limited = limited_lengths(counts)
    assert max(limited) <= LONGEST
    assert sum(Fraction(1, 2**n) for n in limited) == 1
    assert sum(n * k for n, k in zip(limited, counts, strict=True)) / sum(counts) < entropy_bits(counts) + 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=300), st.booleans())
def test_encoding_is_the_words_in_a_row_and_comes_back(symbols, skewed):
    symbols = np.array([s // 3 if skewed else s for s in symbols])
    code = huffman_code(np.bincount(symbols, minlength=21))
    lengths = [len(code.get(symbol, "")) for symbol in range(21)]
    data = huffman_encode(symbols, lengths)
    bits = "".join(code[s] for s in symbols.tolist())
    assert data == int(bits.ljust(8 * len(data), "0"), 2).to_bytes(len(data), "big")
    assert len(data) == -(-len(bits) // 8)
    np.testing.assert_array_equal(huffman_decode(data, lengths, len(symbols)), symbols)


def test_streams_that_break():
    data = huffman_encode(np.array([0, 1, 2, 2]), [1, 2, 2])
    assert huffman_decode(data, [1, 2, 2], 0).size == huffman_decode(b"", [], 0).size == 0
    for broken, lengths, count, text in (
        (data, [1, 2, 2], 50, "ends or breaks after"),
        (b"", [1, 2, 2], 1, "after 0 of 1"),
        (b"\xff", [1, 3], 1, "after 0 of 1"),
        (b"\x00", [3] * 8, 3, "after 2 of 3"),
        (data, [1, 1, 1], 1, "no prefix-free code"),
        (data, [0, 0], 1, "1 to 15 bits"),
        (data, [16, 1], 1, "1 to 15 bits"),
    ):
        with pytest.raises(ValueError, match=text):
            huffman_decode(broken, lengths, count)
    assert canonical_codes([]) == []
