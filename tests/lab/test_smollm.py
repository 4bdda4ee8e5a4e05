"""The real language model: a small GGUF file of the same kind is read, computed and refused as it should be."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from course_lib.lab.smollm import GGUFError, Tokenizer, find_smollm, load_smollm, pieces, rotate, window_losses

gguf = pytest.importorskip("gguf", reason="reading GGUF files is an extra")

WIDTH, HIDDEN, HEADS, SHARED, HEAD, BASE, EPS = 32, 64, 4, 2, 8, 100.0, 1e-5
LETTERS = Tokenizer([], []).letters
MERGES = ["h e", "l l", "he ll", "Ġ w", "a b", "b c"]
TOKENS = [*LETTERS.values(), *(merge.replace(" ", "") for merge in MERGES)]
BLOCK = {
    "attn_q": (WIDTH, WIDTH), "attn_k": (SHARED * HEAD, WIDTH), "attn_v": (SHARED * HEAD, WIDTH),
    "attn_output": (WIDTH, WIDTH), "ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH), "ffn_down": (WIDTH, HIDDEN),
}  # fmt: skip


def write(path, architecture="llama", tokenizer="gpt2", leave_out=""):
    """A file of two blocks, its matrices in 8 bits; returns the numbers that are in it."""
    rng, writer, weights = np.random.default_rng(0), gguf.GGUFWriter(path, architecture), {}
    writer.add_block_count(2)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(SHARED)
    writer.add_rope_freq_base(BASE)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_tokenizer_model(tokenizer)
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    shapes = {f"blk.{b}.{name}.weight": shape for b in range(2) for name, shape in BLOCK.items()}
    shapes |= {f"blk.{b}.{name}_norm.weight": (WIDTH,) for b in range(2) for name in ("attn", "ffn")}
    shapes |= {"token_embd.weight": (len(TOKENS), WIDTH), "output_norm.weight": (WIDTH,)}
    for name, shape in shapes.items():
        w = rng.normal(0, 0.4, shape).astype(np.float32)
        if len(shape) > 1:
            w = gguf.quantize(w, gguf.GGMLQuantizationType.Q8_0)
        if name != leave_out:
            writer.add_tensor(name, w, raw_dtype=gguf.GGMLQuantizationType.Q8_0 if len(shape) > 1 else None)
        weights[name] = gguf.dequantize(w, gguf.GGMLQuantizationType.Q8_0) if len(shape) > 1 else w
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: w.astype(np.float64) for name, w in weights.items()}


def slowly(weights, tokens):
    """The same network in numpy: one head and one position after the other, rotations as complex numbers."""

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weights[name]

    def turned(vector, position):
        pairs = vector[0::2] + 1j * vector[1::2]
        pairs = pairs * np.exp(1j * position * BASE ** (-np.arange(0, HEAD, 2) / HEAD))
        return np.stack([pairs.real, pairs.imag], 1).ravel()

    x = weights["token_embd.weight"][tokens]
    for block in ("blk.0.", "blk.1."):
        part = {name: weights[f"{block}{name}.weight"] for name in BLOCK}
        h = norm(x, f"{block}attn_norm.weight")
        q, k, v = (h @ part[name].T for name in ("attn_q", "attn_k", "attn_v"))
        mixed = np.zeros_like(x)
        for head in range(HEADS):
            own = slice(head * HEAD, (head + 1) * HEAD)
            common = slice(head // 2 * HEAD, (head // 2 + 1) * HEAD)  # two heads share a key and a value
            for t in range(len(x)):
                scores = [turned(q[t, own], t) @ turned(k[u, common], u) / np.sqrt(HEAD) for u in range(t + 1)]
                share = np.exp(scores) / np.exp(scores).sum()
                mixed[t, own] = share @ v[: t + 1, common]
        x = x + mixed @ part["attn_output"].T
        h = norm(x, f"{block}ffn_norm.weight")
        gate = h @ part["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ part["ffn_up"].T)) @ part["ffn_down"].T
    return norm(x, "output_norm.weight") @ weights["token_embd.weight"].T


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return path, write(path)


def test_the_network_is_that_of_a_slow_reference(small):
    path, weights = small
    model, tokenizer = load_smollm(path)
    tokens = torch.tensor([tokenizer.encode("hello, world"), tokenizer.encode("abcabc hell.")][:1])
    np.testing.assert_allclose(model(tokens)[0].double(), slowly(weights, tokens[0]), rtol=2e-4, atol=2e-4)
    both = tokens.repeat(2, 1)
    both[1] = both[1].flip(0)
    torch.testing.assert_close(model(both)[0], model(tokens)[0])
    assert not any(p.requires_grad for p in model.parameters())


def test_losses_of_windows_leave_out_each_first_token(small):
    model, tokenizer = load_smollm(small[0])
    windows = torch.tensor(tokenizer.encode("x" * 12)).view(2, 6)
    expected = F.cross_entropy(model(windows[:1])[0, :-1], windows[0, 1:])
    torch.testing.assert_close(window_losses(model, windows), expected.repeat(2))


def test_rotation_depends_on_distance_alone():
    q, k = torch.randn(2, 8)
    turned_q, turned_k = rotate(q.expand(9, 8), 50.0), rotate(k.expand(9, 8), 50.0)
    torch.testing.assert_close(turned_q[2] @ turned_k[0], turned_q[8] @ turned_k[6])
    assert (turned_q[2] @ turned_k[0] - turned_q[3] @ turned_k[0]).abs() > 1e-4


def test_pairs_are_merged_in_the_order_of_their_ranks():
    tokenizer = Tokenizer(TOKENS, MERGES)
    names = [TOKENS[i] for i in tokenizer.encode("hello world abc")]
    assert names == ["hell", "o", "Ġw", "o", "r", "l", "d", "Ġ", "ab", "c"]
    text = "tab\t, Zürich ½ 日本 x_1  \n\n 'tis I'll 😀"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "�"
    with pytest.raises(ValueError, match="no token stands for 'b'"):
        Tokenizer(["a"], []).encode("ab")


def test_pieces_are_those_of_gpt_2_with_digits_one_by_one():
    """Written down from the tokenizers package (Digits, then ByteLevel with its regex)."""
    expected = ["I", "'ll", " pay", "  ", "1", "0", " €,", " x", "_", "1", "½", "\n", "\t", "no"]
    assert list(pieces("I'll pay  10 €, x_1½\n\tno")) == expected
    assert "".join(pieces(text := "a  b\r\n c\u00a0d_ __init__ 3.14")) == text


def test_files_that_do_not_fit_are_refused_by_name(tmp_path, small):
    whole = small[0].read_bytes()
    for length in (0, 3, 30, 300, 4000, len(whole) // 2, len(whole) - 40):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(GGUFError, match=r"cut\.gguf: cannot be read as a whole GGUF file"):
            load_smollm(tmp_path / "cut.gguf")
    with pytest.raises(GGUFError, match=r"none\.gguf"):
        load_smollm(tmp_path / "none.gguf")
    for told, options in {
        "general.architecture is 'gemma'; only 'llama'": {"architecture": "gemma"},
        "tokenizer.ggml.model is 'llama'; only 'gpt2'": {"tokenizer": "llama"},
        "blk.1.ffn_up.weight": {"leave_out": "blk.1.ffn_up.weight"},
    }.items():
        write(tmp_path / "other.gguf", **options)
        with pytest.raises(GGUFError, match=told):
            load_smollm(tmp_path / "other.gguf")


def test_where_the_weights_lie_may_be_told(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_SMOLLM", str(tmp_path / "x.gguf"))
    assert find_smollm() == tmp_path / "x.gguf"


@pytest.mark.skipif(find_smollm() is None, reason="the real model is an extra")
def test_the_real_model_reads_as_another_implementation_does():
    """Numbers of transformers 5.24 on the same weights."""
    model, tokenizer = load_smollm(find_smollm())
    tokens = tokenizer.encode("The capital of France is Paris, and the capital of Japan is")
    assert tokens == [504, 3575, 282, 4649, 314, 7042, 28, 284, 260, 3575, 282, 3085, 314]
    assert tokenizer.decode([int(model(torch.tensor([tokens]))[0, -1].argmax())]) == " Tokyo"
    assert float(window_losses(model, torch.tensor([tokens]))) == pytest.approx(2.3033, abs=1e-3)
