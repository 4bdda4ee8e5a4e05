"""One file, exact weights: any state, any damage; and each form of it pays."""

import contextlib
import copy
import errno
import math
import os
from collections import Counter
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from course_lib.methods import coding
from course_lib.methods.codebook import kmeans_codebook

from course_lib.methods.coding import (  # isort: skip
    LONGEST, CompressedFileError, Reader, canonical_codes, code_lengths, entropy_bits, huffman_code, huffman_decode,
    huffman_encode, limited_lengths, load_compressed, read_contents, save_compressed,
)  # fmt: skip
from course_lib.methods.quantization import choose_qparams, fake_quantize


def holder(**tensors):
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


def emptied(model):
    blank = copy.deepcopy(model)
    for tensor in blank.state_dict().values():
        tensor.zero_()
    return blank


def bits_of(tensor):
    return tensor.contiguous().flatten().view(torch.uint8) if tensor.numel() else torch.empty(0)


def round_trip(model, path, **options):
    size = save_compressed(model, path, **options)
    assert size == path.stat().st_size
    loaded = emptied(model)
    assert load_compressed(path, loaded) is loaded
    for (name, tensor), back in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(bits_of(tensor), bits_of(back)), name
    return size


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.cnw"


def lenet(inputs=784):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def test_any_weights_come_back(tmp_path_factory):
    special = [0.0, 1.0, -1.5, math.nan, math.inf, -math.inf, 1e-45, 3.4e38, 2.0**-126, 0.1]
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        shape = torch.randint(0, 7, (seed % 4,), generator=g).tolist()
        chosen = torch.randint(seed % 10 + 1, shape, generator=g)
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            round_trip(holder(weight=torch.tensor(special)[chosen].to(dtype)), tmp_path_factory.getbasetemp() / "any")


@pytest.mark.parametrize("dtype", coding.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (4, 3, 2, 2)], ids=str)
def test_every_dtype_comes_back(dtype, shape, path):
    count = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=torch.Generator().manual_seed(0))
    round_trip(holder(x=raw.to(torch.uint8).view(dtype).reshape(shape)), path)


def test_batch_norm_views_compiled_and_empty_models(path):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.PReLU())
    net(torch.randn(8, 1, 6, 6))
    round_trip(net, path)
    compiled = torch.compile(net, backend="eager")
    save_compressed(compiled, path)
    assert torch.equal(load_compressed(path, emptied(net))[0].weight, net[0].weight)  # the wrapper leaves no trace
    assert load_compressed(path, compiled) is compiled
    round_trip(nn.Sequential(), path)
    round_trip(holder(x=torch.randn(5, 3).T, y=torch.randn(10)[::2], z=torch.ones(3, 1).expand(3, 4).clone()), path)


def test_minus_zero_is_kept_except_among_many_zeros(path):
    some, most = torch.tensor([-0.0, 0.0, 1.0, -1.0]), torch.tensor([-0.0, 0.0, -0.0, -1.0])
    save_compressed(holder(some=some, most=most), path)
    loaded = load_compressed(path, holder(some=torch.ones(4), most=torch.ones(4)))
    assert torch.equal(bits_of(loaded.some), bits_of(some))
    assert torch.equal(bits_of(loaded.most), bits_of(most + 0.0))


# --- each form, and its size


def entropy(values):
    share = np.unique(values, return_counts=True)[1] / values.size
    return float(-(share * np.log2(share)).sum())


def sized(weight, path, name, **options):
    """Bytes of one weight in the form ``name``."""
    round_trip(holder(weight=weight), path, **options)
    (entry,) = read_contents(path)
    assert entry.encoding == name
    return entry.stored_bytes


def test_a_weight_of_its_own_kind_costs_its_bytes_and_one(path):
    weight = torch.randn(40, 30)
    assert sized(weight, path, "raw") == 4 * 1200 + 1
    assert sized(weight.half(), path, "raw") == 2 * 1200 + 1


@pytest.mark.parametrize(("half", "table"), [(True, 2 * 8), (False, 4 * 8)])
def test_a_codebook_costs_its_bits_or_its_entropy(path, half, table):
    values = torch.randn(8).half().float() if half else torch.randn(8)
    index = torch.randint(8, (300, 100), generator=torch.Generator().manual_seed(1))
    assert sized(values[index], path, "codebook", huffman=False) == 2 + table + 3 * 30_000 / 8
    skewed = (index * index.flip(0)) // 8
    bound = entropy(skewed.numpy()) * 30_000 / 8
    coded = sized(values[skewed], path, "codebook")
    assert bound < coded < 1.03 * bound + 60 < sized(values[skewed], path, "codebook", huffman=False)


def test_a_constant_costs_next_to_nothing(path):
    assert sized(torch.full((100, 100), 0.3), path, "codebook") < 10
    assert sized(torch.zeros(100, 100), path, "codebook") < 10


@pytest.mark.parametrize("density", [0.003, 0.08, 0.3])
def test_zeros_cost_about_the_entropy_of_the_mask(path, density):
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(400, 500, generator=g) < density
    gaps = entropy(mask.numpy()) * 200_000 / 8
    weight = torch.randn(400, 500, generator=g).masked_fill(~mask, 0.0)
    size = sized(weight, path, "sparse")
    assert gaps < size - 4 * int(mask.sum()) < 1.04 * gaps + 60


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("per", [{}, {"axis": 0}, {"group": 32}], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_quantized_weights_are_their_integers_and_scales(path, bits, per, size):
    weight = size * torch.randn(50, 96, generator=torch.Generator().manual_seed(bits))
    values = fake_quantize(weight, choose_qparams(weight, bits, **per))
    scales = 4 * {"axis": 50, "group": 150}.get(next(iter(per), None), 1)
    name = "integers" if per or bits > 2 else "sparse"  # three values need no scale
    assert sized(values, path, name) < bits * 4800 / 8 + scales + 25


@pytest.mark.parametrize(("columns", "group"), [(300, 30), (25, 25), (62, 31)])
def test_groups_that_divide_a_row_are_found_where_32_does_not(path, columns, group):
    weight = torch.randn(64, columns, generator=torch.Generator().manual_seed(0))
    values = fake_quantize(weight, choose_qparams(weight, 4, group=group))
    assert sized(values, path, "integers") < weight.numel() / 2 + 4 * weight.numel() / group + 40


@pytest.mark.parametrize("odd", [math.nan, math.inf, -0.0, 0.123])
def test_one_value_off_the_grid_is_enough_to_refuse_it(odd):
    weight = np.float32([[1.0, -2.0, 3.0], [7.0, -7.0, 1.0], [0.0, 0.0, 0.0], [-128.0, 127.0, 5.0]])
    scales, levels = coding.find_grid(weight)
    np.testing.assert_array_equal(levels * scales[:, None], weight)
    assert scales[2] == 1
    assert not levels[2].any()
    weight[1, 2] = odd
    assert coding.find_grid(weight) is None


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["<u1", "<u2", "<u4", "<u8"]).flatmap(
        lambda kind: hnp.arrays(
            kind,
            hnp.array_shapes(min_dims=2, max_dims=2, max_side=24),
            elements=st.one_of(st.just(0), st.sampled_from([1, 2, 7]), hnp.from_dtype(np.dtype(kind))),
        )
    ),
    st.booleans(),
)
def test_any_array_comes_back_and_is_never_longer_than_raw(values, huffman):
    data = coding.encode_array(values, values.itemsize == 4, huffman)
    np.testing.assert_array_equal(coding.decode_array(Reader(data), *values.shape, values.dtype), values)
    assert len(data) <= values.nbytes + 1


@given(st.integers(0, 2**64))
def test_varints(number):
    assert Reader(coding.varint(number)).varint() == number


# --- what is shared


class Tied(nn.Module):
    def __init__(self, tie=True):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        if tie:
            self.b.weight = self.a.weight


@pytest.mark.parametrize("by", ["parameter", "memory"])
def test_what_is_tied_is_stored_once_clustered_once_and_stays_tied(path, by):
    net = Tied()
    if by == "memory":
        net.b.weight = nn.Parameter(net.a.weight.data)
    assert round_trip(net, path) < 64 * 64 * 4 + 60
    assert [(e.name, e.encoding, e.stored_bytes) for e in read_contents(path)][1] == ("b.weight", "tied", 2)
    save_compressed(net, path, codebook_bits=2)
    back = load_compressed(path, Tied())
    assert back.a.weight is back.b.weight
    assert torch.equal(back.a.weight, kmeans_codebook(net.a.weight.detach(), 2).values())
    assert torch.equal(load_compressed(path, Tied(tie=False)).b.weight, back.a.weight)


def test_two_weights_do_not_fit_into_one(path):
    save_compressed(Tied(tie=False), path)
    model = Tied()
    unchanged_after(model, lambda: load_compressed(path, model), text=r"a\.weight and b\.weight are one in the model")


def test_codebook_bits_store_a_clustered_copy(path):
    net = lenet(20)
    before = copy.deepcopy(net.state_dict())
    small = save_compressed(net, path, codebook_bits=3)
    loaded = load_compressed(path, emptied(net))
    assert torch.equal(loaded[0].weight, kmeans_codebook(net[0].weight.detach(), 3).values())
    assert torch.equal(loaded[0].bias, net[0].bias)
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    assert small < 0.2 * save_compressed(net, path)


# --- what is turned down


def tiny():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[0].weight.data *= net[0].weight > 0.2
    net[2].weight.data.sign_()
    return net


def unchanged_after(model, call, text=None):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CompressedFileError, match=text) as error:
        call()
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    return error


def test_every_truncation_and_every_flipped_byte_is_refused_and_names_the_file(path):
    save_compressed(tiny(), path)
    whole, model = path.read_bytes(), emptied(tiny())
    broken = [whole[:k] for k in range(len(whole))] + [whole + b"\0"]
    broken += [whole[:k] + bytes([whole[k] ^ flip]) + whole[k + 1 :] for k in range(len(whole)) for flip in (1, 128)]
    for data in broken:
        path.write_bytes(data)
        assert str(path) in str(unchanged_after(model, lambda: load_compressed(path, model)).value)


def sealed(body):
    return coding.MAGIC + bytes([coding.VERSION]) + coding.digest(body) + body


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "not written by save_compressed"),
        (b"PK\x03\x04 a zip archive", "starts with b'PK"),
        (coding.MAGIC + b"\x01" + bytes(20), "format version 1, this library reads 2"),
        (sealed(b""), "cannot be read: 1 more bytes wanted, 0 left"),
        (sealed(b"\x00\x00"), "bytes too many"),
        (sealed(b"\x01\x01x\x63\x00\x01\x00"), "cannot be read"),
        (sealed(b"\x01\x01x\x00\x01\x03\x01\x00"), "x cannot be decoded: 12 more bytes wanted"),
        (sealed(b"\x01\x01x\x00\x01\x03\x02\x05\x00"), "x cannot be decoded"),
        (sealed(b"\x02" + 2 * b"\x01x\x00\x01\x03\x01\x00"), "a name appears twice"),
        (sealed(b"\x01\x01x\x04\x01\x03\x04\x00\x00\x01\x02"), "another network: x: torch.bool"),
    ],
)
def test_foreign_files_and_well_sealed_nonsense(path, content, text):
    path.write_bytes(content)
    model = holder(x=torch.ones(3))
    unchanged_after(model, lambda: load_compressed(path, model), text=text)


def test_a_truth_value_must_be_zero_or_one(path):
    path.write_bytes(sealed(b"\x01\x01x\x04\x01\x03\x04\x00\x00\x01\x02"))
    model = holder(x=torch.ones(3, dtype=torch.bool))
    unchanged_after(model, lambda: load_compressed(path, model), text="neither 0 nor 1")


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_damage_behind_the_checksum_ends_in_an_error_or_an_array(density):
    rng = np.random.default_rng(0)
    values = (rng.integers(1, 5, (20, 20)) * (rng.random((20, 20)) < density)).astype("<u4")
    data = coding.encode_array(values, False, True)
    for k in range(len(data)):
        for broken in (data[:k], data[:k] + bytes([data[k] ^ 0xFF]) + data[k + 1 :]):
            with contextlib.suppress(ValueError, IndexError):
                assert coding.decode_array(Reader(broken), 20, 20, values.dtype).shape == (20, 20)


def test_another_network(path):
    save_compressed(tiny(), path)
    parts = (nn.Linear(6, 4), nn.BatchNorm1d(4))
    for other, text in (
        (
            nn.Sequential(*parts, nn.Linear(4, 3)),
            r"2.weight: torch.float32 \[2, 4\] in the file, .*\[3, 4\] in the mod",
        ),
        (nn.Sequential(nn.Linear(6, 4)), "in the file, nothing in the model; and 3 more"),
        (nn.Sequential(*parts, nn.Linear(4, 2), nn.Linear(2, 2)), "nothing in the file"),
        (tiny().half(), "torch.float16"),
    ):
        unchanged_after(other, lambda other=other: load_compressed(path, other), text=text)


def test_states_that_cannot_be_stored(path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    lazy = nn.LazyLinear(2)
    for model in (Extra(2, 2), holder(x=torch.ones(3).to_sparse()), nn.Linear(2, 2, device="meta"), lazy):
        with pytest.raises(TypeError, match=r"not a tensor|only dense tensors"):
            save_compressed(model, path)
    assert not path.exists()


def test_a_file_is_whole_or_not_there_and_errors_name_it(path, tmp_path, monkeypatch):
    save_compressed(tiny(), path)
    old = path.read_bytes()
    save_compressed(tiny(), str(tmp_path / "again.cnw"))
    assert (tmp_path / "again.cnw").read_bytes() == old

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match=r"No space left.*net\.cnw"):
            save_compressed(lenet(20), path)
    assert path.read_bytes() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.cnw", "net.cnw"]
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_compressed(tmp_path / "nothing", tiny())
    unchanged_after(tiny(), lambda: load_compressed(tmp_path, tiny()), text="is a folder")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        save_compressed(tiny(), tmp_path / "nowhere" / "net.cnw")


# --- Huffman's code against its theory: prefix-free, Kraft's equality, within one bit of the entropy, optimal


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
        ({"a": -1}, ValueError, "count of 'a' must be an integer of at least 0, got -1"),
        ({"a": 1.5}, TypeError, "count of 'a' must be an integer of at least 0, got 1.5"),
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
