"""One file, exact weights: any state, any damage; and each form of it pays."""

import copy
import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from course_lib.methods import coding
from course_lib.methods.codebook import kmeans_codebook

from course_lib.methods.coding import (  # isort: skip
    LONGEST, CompressedFileError, code_lengths, entropy_bits, huffman_code, huffman_decode, huffman_encode,
    limited_lengths, load_compressed, read_contents, save_compressed,
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


def tiny():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[0].weight.data *= net[0].weight > 0.2
    net[2].weight.data.sign_()
    return net


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_any_weights_come_back(path, dtype):
    special = [0.0, 1.0, -1.5, math.nan, math.inf, -math.inf, 1e-45, 3.4e38, 2.0**-126, 0.1]
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        shape = torch.randint(0, 7, (seed % 4,), generator=g).tolist()
        chosen = torch.randint(seed % 10 + 1, shape, generator=g)
        round_trip(holder(weight=torch.tensor(special)[chosen].to(dtype)), path)


@pytest.mark.parametrize("dtype", coding.DTYPES, ids=str)
def test_every_dtype_comes_back(dtype, path):
    for shape in ((), (0,), (1,), (3, 0, 2), (4, 3, 2, 2)):
        count = math.prod(shape) * dtype.itemsize
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=torch.Generator().manual_seed(0))
        round_trip(holder(x=raw.to(torch.uint8).view(dtype).reshape(shape)), path)


def test_batch_norm_views_compiled_and_empty_models(path):
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.PReLU())
    net(torch.randn(8, 6))
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


def sized(weight, path, **options):
    """Bytes of one weight."""
    round_trip(holder(weight=weight), path, **options)
    (entry,) = read_contents(path)
    return entry.stored_bytes


def test_a_weight_of_its_own_kind_costs_its_bytes_and_one_a_constant_nothing(path):
    weight = torch.randn(40, 30)
    assert sized(weight, path) == 4 * 1200 + 1
    assert sized(weight.half(), path) == 2 * 1200 + 1
    for constant in (0.3, 0.0):
        assert sized(torch.full((100, 100), constant), path) < 10


@pytest.mark.parametrize(("half", "table"), [(True, 2 * 8), (False, 4 * 8)])
def test_a_codebook_costs_its_bits_or_its_entropy(path, half, table):
    values = torch.randn(8).half().float() if half else torch.randn(8)
    index = torch.randint(8, (300, 100), generator=torch.Generator().manual_seed(1))
    assert sized(values[index], path, huffman=False) == 2 + table + 3 * 30_000 / 8
    skewed = (index * index.flip(0)) // 8
    bound = entropy(skewed.numpy()) * 30_000 / 8
    assert bound < sized(values[skewed], path) < 1.03 * bound + 60 < sized(values[skewed], path, huffman=False)


@pytest.mark.parametrize("density", [0.003, 0.08, 0.3])
def test_zeros_cost_about_the_entropy_of_the_mask(path, density):
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(400, 500, generator=g) < density
    gaps = entropy(mask.numpy()) * 200_000 / 8
    weight = torch.randn(400, 500, generator=g).masked_fill(~mask, 0.0)
    assert gaps < sized(weight, path) - 4 * int(mask.sum()) < 1.04 * gaps + 60


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("columns", "per", "scales"), [
    (96, {}, 1), (96, {"axis": 0}, 50), (96, {"group": 32}, 150), (300, {"group": 30}, 500), (25, {"group": 25}, 50),
    (62, {"group": 31}, 100),  # the groups of a row that 32 does not divide
])  # fmt: skip
def test_quantized_weights_are_their_integers_and_scales(path, bits, columns, per, scales):
    for size in (1e-30, 1.0, 1e30):
        weight = size * torch.randn(50, columns, generator=torch.Generator().manual_seed(bits))
        values = fake_quantize(weight, choose_qparams(weight, bits, **per))
        assert sized(values, path) < bits * weight.numel() / 8 + 4 * scales + 40


# --- what is shared


def tied(tie=True):
    net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    if tie:
        net[1].weight = net[0].weight
    return net


def test_what_is_tied_is_stored_once_clustered_once_and_stays_tied(path):
    by_memory = tied(tie=False)
    by_memory[1].weight = nn.Parameter(by_memory[0].weight.data)
    for net in (tied(), by_memory):
        round_trip(net, path)
        assert [entry.stored_bytes for entry in read_contents(path)] == [64 * 64 * 4 + 1, 2]
        save_compressed(net, path, codebook_bits=2)
        back = load_compressed(path, tied())
        assert back[0].weight is back[1].weight
        assert torch.equal(back[0].weight, kmeans_codebook(net[0].weight.detach(), 2).values())
        assert torch.equal(load_compressed(path, tied(tie=False))[1].weight, back[0].weight)


def test_codebook_bits_store_a_clustered_copy(path):
    net = nn.Sequential(nn.Linear(20, 300), nn.ReLU(), nn.Linear(300, 10))
    before = copy.deepcopy(net.state_dict())
    small = save_compressed(net, path, codebook_bits=3)
    loaded = load_compressed(path, emptied(net))
    assert torch.equal(loaded[0].weight, kmeans_codebook(net[0].weight.detach(), 3).values())
    assert torch.equal(loaded[0].bias, net[0].bias)
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    assert small < 0.2 * save_compressed(net, path)


# --- what is turned down


def refused(path, model, text):
    """Loading is refused with this text and the file's name, and the model is as it was."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CompressedFileError, match=text) as error:
        load_compressed(path, model)
    assert str(path) in str(error.value)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_every_truncation_and_every_flipped_byte_is_refused(path):
    save_compressed(tiny(), path)
    whole, model = path.read_bytes(), emptied(tiny())
    broken = [whole[:k] for k in range(len(whole))] + [whole + b"\0"]
    broken += [whole[:k] + bytes([whole[k] ^ flip]) + whole[k + 1 :] for k in range(len(whole)) for flip in (1, 128)]
    for data in broken:
        path.write_bytes(data)
        refused(path, model, "not written by save_compressed|format version|truncated or damaged")


def sealed(body):
    return coding.MAGIC + bytes([coding.VERSION]) + coding.digest(body) + body


@pytest.mark.parametrize(("content", "text"), [
    (b"PK\x03\x04 a zip archive", "not written by save_compressed: it starts with b'PK"),
    (coding.MAGIC + b"\x01" + bytes(20), "format version 1, this library reads 2"),
    (sealed(b"\x01\x01x\x63\x00\x01\x00"), "cannot be read"),  # a dtype of a later library
    (sealed(b"\x01\x01x\x00\x01\x03\x01\x00"), "x cannot be decoded: 12 more bytes wanted"),
])  # fmt: skip
def test_foreign_files(path, content, text):
    path.write_bytes(content)
    refused(path, holder(x=torch.ones(3)), text)


def test_another_network(path):
    save_compressed(tiny(), path)
    parts = (nn.Linear(6, 4), nn.BatchNorm1d(4))
    for other, text in (
        (nn.Sequential(*parts, nn.Linear(4, 3)), r"2.weight: torch.float32 \[2, 4\] in the file, .*\[3, 4\] in"),
        (nn.Sequential(nn.Linear(6, 4)), "in the file, nothing in the model; and 3 more"),
        (nn.Sequential(*parts, nn.Linear(4, 2), nn.Linear(2, 2)), "nothing in the file"),
        (tiny().half(), "torch.float16"),
    ):  # fmt: skip
        refused(path, other, text)
    save_compressed(tied(tie=False), path)
    refused(path, tied(), r"0\.weight and 1\.weight are one in the model")


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_states_that_cannot_be_stored(path):
    sparse, meta = holder(x=torch.ones(3).to_sparse()), nn.Linear(2, 2, device="meta")
    for model in (Extra(2, 2), sparse, meta, nn.LazyLinear(2)):
        with pytest.raises(TypeError, match=r"not a tensor|only dense tensors"):
            save_compressed(model, path)
    assert not path.exists()


def test_errors_of_the_file_system_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_compressed(tmp_path / "nothing", tiny())
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        load_compressed(tmp_path, tiny())
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


@pytest.mark.parametrize(("counts", "code"), [
    ({"x": 9}, {"x": "0"}), ([], {}), ({"a": 3, "b": 0, "c": 1}, {"a": "0", "c": "1"}), ([0, 4, 0], {1: "0"}),
    (np.array([3, 1, 2]), {0: "0", 1: "10", 2: "11"}),
    ({"r": 1, "often": 9, "s": 1}, {"r": "10", "often": "0", "s": "11"}),  # the canonical order: shorter first
])  # fmt: skip
def test_codes_by_hand(counts, code):
    assert huffman_code(counts) == code


def test_entropy_by_hand():
    assert entropy_bits([]) == entropy_bits([0, 7]) == 0
    assert entropy_bits([3, 1]) == pytest.approx(2 - 0.75 * math.log2(3))


@pytest.mark.parametrize(("counts", "error", "text"), [
    ({"a": -1}, ValueError, "count of 'a' must be an integer of at least 0, got -1"),
    ({"a": 1.5}, TypeError, "count of 'a' must be an integer of at least 0, got 1.5"),
    ("abc", TypeError, "counts must be a mapping .* got str"), (7, TypeError, "counts must be a mapping .* got int"),
])  # fmt: skip
def test_bad_counts(counts, error, text):
    with pytest.raises(error, match=text):
        huffman_code(counts)


def test_lengths_are_limited_for_files():
    counts = [1, 1]
    while len(counts) < 30:
        counts.append(counts[-1] + counts[-2])
    assert max(code_lengths(counts)) == 29  # Fibonacci's numbers make the longest words
    assert limited_lengths(counts[:16]) == code_lengths(counts[:16])  # 15 bits still fit
    limited = limited_lengths(counts)
    assert max(limited) <= LONGEST
    assert sum(Fraction(1, 2**n) for n in limited) == 1
    assert sum(n * k for n, k in zip(limited, counts, strict=True)) / sum(counts) < entropy_bits(counts) + 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 20), max_size=300), st.booleans())
def test_encoding_is_the_words_in_a_row_and_comes_back(symbols, skewed):
    symbols = np.array([s // 3 if skewed else s for s in symbols], dtype=np.int64)
    code = huffman_code(np.bincount(symbols, minlength=21))
    lengths = [len(code.get(symbol, "")) for symbol in range(21)]
    data = huffman_encode(symbols, lengths)
    bits = "".join(code[s] for s in symbols.tolist())
    assert len(data) == -(-len(bits) // 8)
    assert data == int(bits.ljust(8 * len(data), "0") or "0", 2).to_bytes(len(data), "big")
    np.testing.assert_array_equal(huffman_decode(data, lengths, len(symbols)), symbols)
