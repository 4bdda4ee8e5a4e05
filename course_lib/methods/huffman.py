"""Huffman's code: short words for frequent symbols, and the bits of a whole array at once.

Huffman 1952, "A Method for the Construction of Minimum-Redundancy Codes". Only the lengths of the code words are kept
in a file; the words follow from them in the canonical order (shorter first, then smaller symbol first).
"""

import heapq
import math
import operator
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

__all__ = ["canonical_codes", "code_lengths", "entropy_bits", "huffman_code", "huffman_decode", "huffman_encode"]

# Code words in a file are no longer than this, so that one table look-up decodes a symbol.
LONGEST = 15


def huffman_code(counts: Mapping[Hashable, int] | Sequence[int]) -> dict[Hashable, str]:
    """The Huffman code of symbols that occur ``counts[symbol]`` times: ``{symbol: bit string}``.

    Prefix-free, of the least possible total length, within one bit of the entropy a symbol. One symbol alone gets the
    word ``"0"``; symbols that never occur get none. ``counts`` is a mapping, or a sequence whose positions are symbols.

    Raises:
        TypeError: ``counts`` is neither mapping nor sequence, or a count is no integer.
        ValueError: a negative count.

    >>> huffman_code({"a": 5, "b": 2, "c": 1})
    {'a': '0', 'b': '10', 'c': '11'}
    """
    if isinstance(counts, (str, bytes)) or not hasattr(counts, "__len__"):
        raise TypeError(f"counts must be a mapping symbol -> count or a sequence, got {type(counts).__name__}")
    items = dict(counts if isinstance(counts, Mapping) else enumerate(counts))
    for symbol, count in items.items():
        if not hasattr(count, "__index__"):
            raise TypeError(f"the count of {symbol!r} must be an integer, got {count!r}")
        if count < 0:
            raise ValueError(f"the count of {symbol!r} must not be negative, got {count}")
    occurring = {symbol: operator.index(count) for symbol, count in items.items() if count}
    lengths = code_lengths(list(occurring.values()))
    words = zip(canonical_codes(lengths), lengths, strict=True)
    return {symbol: f"{word:0{n}b}" for symbol, (word, n) in zip(occurring, words, strict=True)}


def code_lengths(counts: Sequence[int]) -> list[int]:
    """Length of each symbol's Huffman word; all counts are above 0. One symbol alone gets length 1.

    >>> code_lengths([5, 2, 1])
    [1, 2, 2]
    """
    if len(counts) < 2:
        return [1] * len(counts)
    heap = [(count, leaf) for leaf, count in enumerate(counts)]
    heapq.heapify(heap)
    parent = [0] * (2 * len(counts) - 1)
    for node in range(len(counts), len(parent)):
        (first, a), (second, b) = heapq.heappop(heap), heapq.heappop(heap)
        parent[a] = parent[b] = node
        heapq.heappush(heap, (first + second, node))
    depth = [0] * len(parent)
    for node in range(len(parent) - 2, -1, -1):
        depth[node] = depth[parent[node]] + 1
    return depth[: len(counts)]


def limited_lengths(counts: Sequence[int]) -> list[int]:
    """Huffman lengths of at most :data:`LONGEST` bits; flattening the counts costs next to nothing and always ends."""
    while max(lengths := code_lengths(counts), default=0) > LONGEST:
        counts = [(count + 1) // 2 for count in counts]
    return lengths


def canonical_codes(lengths: Sequence[int]) -> list[int]:
    """Code words (as integers) that follow from their lengths alone; length 0 means that the symbol has no word.

    Raises:
        ValueError: no prefix-free code has these lengths (Kraft's sum is above 1).

    >>> [format(word, "b").zfill(n) for word, n in zip(canonical_codes([2, 1, 2]), [2, 1, 2])]
    ['10', '0', '11']
    """
    words, word, last = [0] * len(lengths), 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in enumerate(lengths) if length):
        word <<= length - last
        if word >> length:
            raise ValueError(f"no prefix-free code has the lengths {list(lengths)}")
        words[symbol], word, last = word, word + 1, length
    return words


def entropy_bits(counts: Sequence[int]) -> float:
    """Shannon's entropy in bits a symbol: what no code can go below.

    >>> entropy_bits([1, 1, 2])
    1.5
    """
    total = sum(counts)
    return -sum(n / total * math.log2(n / total) for n in counts if n) if total else 0.0


def huffman_encode(symbols: np.ndarray, lengths: Sequence[int]) -> bytes:
    """The words of ``symbols`` (integers [N]) one after another, filled up with zeros to whole bytes."""
    sizes = np.asarray(lengths, dtype=np.int64)[symbols]
    words = np.asarray(canonical_codes(lengths), dtype=np.int64)[symbols]
    ends = np.cumsum(sizes)
    bits = np.zeros(int(sizes.sum()), dtype=np.uint8)
    for back in range(int(sizes.max(initial=0))):
        long_enough = sizes > back
        bits[ends[long_enough] - 1 - back] = (words[long_enough] >> back) & 1
    return np.packbits(bits).tobytes()


def huffman_decode(data: bytes, lengths: Sequence[int], count: int) -> np.ndarray:
    """The first ``count`` symbols in ``data``, as integers [count].

    Raises:
        ValueError: the data ends too early, or holds bits that are no word.
    """
    longest = max(lengths, default=0)
    if count and not 1 <= longest <= LONGEST:
        raise ValueError(f"code words must have 1 to {LONGEST} bits, got {longest}")
    # What a symbol's word is followed by does not matter: all entries of the table that begin with it are the symbol's.
    table = np.zeros((2, 1 << longest), dtype=np.int64)
    for symbol, (word, length) in enumerate(zip(canonical_codes(lengths), lengths, strict=True)):
        if length:
            table[:, word << (longest - length) : (word + 1) << (longest - length)] = [[symbol], [length]]
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
    padded = np.concatenate([bits, np.zeros(longest, dtype=np.uint8)]).astype(np.int64)
    # What the next `longest` bits are, for every position at once; then only the hops from word to word are sequential.
    window = sum(
        (padded[k : k + len(bits)] << (longest - 1 - k) for k in range(longest)), np.zeros(len(bits), np.int64)
    )
    hops, starts, position = table[1, window].tolist(), [], 0
    for _ in range(count):
        if position >= len(hops) or not 0 < hops[position] <= len(hops) - position:
            raise ValueError(f"the bit stream ends or breaks after {len(starts)} of {count} symbols")
        starts.append(position)
        position += hops[position]
    return table[0, window[starts]] if starts else np.zeros(0, dtype=np.int64)
