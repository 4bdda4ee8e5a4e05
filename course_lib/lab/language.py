"""A small language model: text that every Python brings along, n-grams to beat, a GPT, and the bits that each needs.

The model is a transformer decoder in plain PyTorch (Radford et al. 2019: norm before each part) over few symbols, such
as characters or the grey levels of pixels. Its weight matrices are trained by Muon (Jordan et al. 2024).
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.files import source_hash
from course_lib.gate import whole_number
from course_lib.lab.checkpoints import train_or_load
from course_lib.lab.training import check_finite, progress_bar

__all__ = [
    "Cache", "LanguageModel", "NGram", "Text", "bits_per_symbol", "generate", "load_text", "train_language_model",
    "trained_language_model",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Text:
    """Three disjoint texts as symbol numbers, int64 [n] each, over one ``alphabet``; and ``test`` topic by topic.

    >>> text = Text("abc", *(torch.tensor([0, 1]),) * 3)
    >>> text.decode(text.encode("cab"))
    'cab'
    """

    alphabet: str
    train: Tensor
    val: Tensor
    test: Tensor
    topics: tuple[Tensor, ...] = ()

    def encode(self, characters: str) -> Tensor:
        """Symbol numbers, int64 [n]; ValueError names the characters that the alphabet lacks."""
        number = {symbol: i for i, symbol in enumerate(self.alphabet)}
        if unknown := sorted(set(characters) - number.keys()):
            shown = ", ".join(map(repr, unknown[:8])) + (" and others" if len(unknown) > 8 else "")
            known = f"the model knows {len(number)} symbols: {self.alphabet!r}"
            raise ValueError(f"the text has symbols that the model does not know: {shown}; {known}")
        return torch.tensor([number[symbol] for symbol in characters], dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """The characters of symbol numbers [n]."""
        return "".join(self.alphabet[i] for i in tokens.tolist())


def load_text() -> Text:
    """Python's own help texts (``pydoc_data.topics``), split by topic; paragraphs that occurred before are left out.

    Of each ten topics in alphabetical order the sixth is for testing and the fifth for validation. (If paragraphs that
    stand in two topics stayed, some of the test text would be trained on.) The alphabet is that of the whole text. It
    differs a little between versions of Python.

    >>> text = load_text()
    >>> 0.8 < len(text.train) / (len(text.train) + len(text.val) + len(text.test)) < 0.9
    True
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for place, name in enumerate(sorted(topics)):
        fresh = [p for p in re.split(r"\n\s*\n", topics[name]) if p.strip() not in seen and not seen.add(p.strip())]
        if fresh:
            parts[{4: "val", 5: "test"}.get(place % 10, "train")].append("\n\n".join(fresh))
    whole = {kind: "\n\n".join(group) for kind, group in parts.items()}
    text = Text("".join(sorted(set("".join(whole.values())))), *(torch.empty(0, dtype=torch.int64),) * 3)
    tokens = {kind: text.encode(characters) for kind, characters in whole.items()}
    return replace(text, **tokens, topics=tuple(map(text.encode, parts["test"])))


class NGram:
    """Counts of what follows the last ``order - 1`` symbols, smoothed as Witten and Bell (1991) do.

    Called with tokens [N, T] it gives logits [N, T, V] of the next symbol, as a :class:`LanguageModel` does. The
    estimate for a context mixes its counts with the estimate for the context shortened by its oldest symbol; that one
    weighs as much as there were different successors.

    >>> NGram(torch.tensor([0, 1, 0, 1, 0]), order=2, vocabulary=2)(torch.tensor([[0]])).exp()
    tensor([[[0.1667, 0.8333]]])
    """

    context = 128  # symbols that bits_per_symbol shows it at a time

    def __init__(self, tokens: Tensor, order: int, vocabulary: int):
        self.vocabulary, self.tables = vocabulary, []
        for length in range(whole_number(order, "order", 1, 9)):
            codes = self.codes(tokens[None], length)[0, :-1]
            start = max(length - 1, 0)  # earlier places have too few symbols before them
            contexts, row = codes[start:].unique(return_inverse=True)
            pairs = row * vocabulary + tokens[start + 1 :]
            counts = pairs.bincount(minlength=len(contexts) * vocabulary).view(-1, vocabulary)
            self.tables.append((contexts, counts.float()))

    def codes(self, tokens: Tensor, length: int) -> Tensor:
        """A number for the last ``length`` symbols at each place of [N, T]; -1 where there are fewer."""
        code = torch.zeros_like(tokens)
        for back in range(length):
            code[:, back:] += tokens[:, : tokens.shape[1] - back] * self.vocabulary**back
        code[:, : max(length - 1, 0)] = -1
        return code

    def __call__(self, tokens: Tensor) -> Tensor:
        p = torch.full((*tokens.shape, self.vocabulary), 1 / self.vocabulary)
        for length, (contexts, counts) in enumerate(self.tables):
            code = self.codes(tokens, length)
            row = torch.searchsorted(contexts, code).clamp(max=len(contexts) - 1)
            count = counts[row] * (contexts[row] == code)[..., None]
            kinds = (count > 0).sum(-1, keepdim=True)
            total = count.sum(-1, keepdim=True)
            p = torch.where(kinds > 0, (count + kinds * p) / (total + kinds).clamp(min=1), p)
        return p.log()


class Block(nn.Module):
    """Attention, then two layers with a ReLU between them, each added to what comes in."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, cache: "Cache | None" = None, number: int = 0) -> Tensor:
        """[N, T, width] → the same shape; with a cache it attends to what is kept there, too."""
        parts = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        past = cache.length if cache else 0
        q, k = rotated(q, past), rotated(k, past)  # [N, heads, T, width / heads]
        if cache:
            k, v = cache.extend(number, k, v)
        mixed = causal_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(F.relu(self.up(self.norm2(x))))


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Means of the values [N, heads, S, d], weighted by how well keys fit the queries of the last T ≤ S places."""
    new, seen = q.shape[2], k.shape[2]
    mask = None if new in (1, seen) else torch.ones(new, seen, dtype=torch.bool, device=q.device).tril(seen - new)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=1 < new == seen)


def rotated(x: Tensor, past: int) -> Tensor:
    """Turn pairs of numbers of x [..., T, d] by angles that grow with the place, the first being number ``past``.

    The product of two such vectors depends on how far apart they stand (Su et al. 2021, "RoPE").
    """
    half = x.shape[-1] // 2
    speed = 1000.0 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(past, past + x.shape[-2], device=x.device)[:, None] * speed
    (a, b), cos, sin = x.chunk(2, dim=-1), angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class LanguageModel(nn.Module):
    """A GPT: tokens [N, T ≤ context], int64 below ``vocabulary``, to logits [N, T, vocabulary] of each next symbol.

    A block has attention with ``heads`` and a hidden layer four times as wide. Where a symbol stands is told twice: by
    a learned vector for each place, and by rotation. ``seed`` decides the initial weights.

    >>> LanguageModel(5, width=8, layers=1, heads=2, context=16)(torch.tensor([[1, 4, 0]])).shape
    torch.Size([1, 3, 5])
    """

    def __init__(self, vocabulary: int, width: int = 96, layers: int = 3, heads: int = 4, context: int = 128,
                 *, seed: int = 0):  # fmt: skip
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"width must be a multiple of 2 · heads; got width={width}, heads={heads}")
        self.vocabulary, self.width, self.heads, self.context = vocabulary, width, heads, context
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed) % 2**63)
            self.symbols, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
            self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
            self.norm, self.logits = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
            for table in (self.symbols, self.places):
                nn.init.normal_(table.weight, std=0.02)
            for last in (self.logits, *(layer for block in self.blocks for layer in (block.out, block.down))):
                nn.init.zeros_(last.weight)  # so that the network starts as the identity, with equal probabilities

    def forward(self, tokens: Tensor, cache: "Cache | None" = None) -> Tensor:
        past, length = cache.length if cache else 0, tokens.shape[-1]
        if past + length > self.context:
            raise ValueError(f"{past + length} symbols do not fit into a context of {self.context}")
        x = self.symbols(tokens) + self.places.weight[past : past + length]
        for number, block in enumerate(self.blocks):
            x = block(x, cache, number)
        if cache is not None:
            cache.length += length
        return self.logits(self.norm(x))


class Cache:
    """The keys and values of ``length`` symbols that a model has read, so that it need not read them again.

    ``kept`` is float32 [layers, 2, sequences, heads, context, width / heads], room for the whole context.

    >>> model = LanguageModel(5, width=8, layers=1, heads=2, context=16)
    >>> cache = Cache(model, sequences=1)
    >>> _ = model(torch.tensor([[1, 4]]), cache), model(torch.tensor([[0]]), cache)
    >>> cache.length, cache.kept.nbytes
    (3, 1024)
    """

    def __init__(self, model: LanguageModel, sequences: int):
        sizes = (sequences, model.heads, model.context, model.width // model.heads)
        self.kept, self.length = model.symbols.weight.new_zeros(len(model.blocks), 2, *sizes), 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values [N, heads, new, …] of one layer, and give all of that layer."""
        end = self.length + k.shape[2]
        self.kept[layer, :, :, :, self.length : end] = torch.stack([k, v])
        return tuple(self.kept[layer, :, :, :, :end])


def train_language_model(
    model: LanguageModel,
    tokens: Tensor | Callable[[torch.Generator], Tensor],
    *,
    steps: int,
    batch_size: int = 8,
    lr: float = 0.02,
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    seed: int = 0,
) -> LanguageModel:
    """Train in place for a fixed number of steps, the rate falling to 0 over the last two thirds; returns the model.

    Args:
        tokens: one text [n], of which random windows are read; or sequences [N, ≤ context + 1], of which random ones
            are; or a function that draws a batch of sequences with the generator that it gets.
        batch_size: windows or sequences a step.
        lr: of Muon, which trains the matrices of the blocks; embeddings, norms and the last layer get AdamW at a
            quarter of it.
        loss_fn: ``loss_fn(logits, sequences)``, with logits [B, T, V] of sequences [B, T + 1] without their last
            symbol; by default the cross-entropy of the next symbol.
        seed: decides the draws. The same seed gives the same weights on the same machine with as many threads.

    Raises:
        DivergedError: the loss is no longer finite. ValueError: tokens of another shape.
    """
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [torch.optim.Muon(matrices, lr=lr, weight_decay=0.01), torch.optim.AdamW(others, lr / 4, (0.9, 0.95))]
    draw = tokens if callable(tokens) else batches(tokens, model.context + 1, batch_size)
    generator = torch.Generator().manual_seed(int(seed) % 2**63)
    with progress_bar(whole_number(steps, "steps"), True) as advance:
        for step in range(steps):
            sequences = draw(generator)
            loss = (loss_fn or next_symbol_loss)(model(sequences[:, :-1]), sequences)
            check_finite(loss, step, 0, lr)
            loss.backward()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    full = group.setdefault("initial_lr", group["lr"])
                    group["lr"] = full * min(1, (step + 1) / 20, 1.5 * (1 - step / steps))
                optimizer.step()
                optimizer.zero_grad()
            advance()
    return model


def next_symbol_loss(logits: Tensor, sequences: Tensor) -> Tensor:
    """Mean cross-entropy, nats a symbol, of logits [B, T, V] for what follows in sequences [B, T + 1]."""
    return F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())


def batches(tokens: Tensor, length: int, count: int) -> Callable[[torch.Generator], Tensor]:
    """A function that draws ``count`` random windows of a text [n], or rows of sequences [N, T]."""
    rows = tokens.unfold(0, length, 1) if tokens.dim() == 1 and len(tokens) >= length else tokens
    if rows.dim() != 2 or not 2 <= rows.shape[1] <= length:
        fits = f"a text of at least {length} symbols, or sequences of 2 to {length}"
        raise ValueError(f"tokens of shape {tuple(tokens.shape)} do not fit the model: give {fits}")
    return lambda generator: rows[torch.randint(len(rows), (count,), generator=generator)]


def trained_language_model(
    tokens: Tensor, vocabulary: int, seed: int = 0, *, steps: int, batch_size: int = 8, lr: float = 0.02, **sizes: int
) -> LanguageModel:
    """A model trained on ``tokens`` as by :func:`train_language_model`, or the same from the cache if it is there.

    ``sizes`` are those of :class:`LanguageModel`: ``width``, ``layers``, ``heads``, ``context``.
    """
    recipe = {"steps": steps, "batch_size": batch_size, "lr": lr, "seed": int(seed)}
    return train_or_load(
        "language",
        lambda: LanguageModel(vocabulary, **sizes, seed=seed),
        lambda model: train_language_model(model, tokens, **recipe),
        key=recipe | {"tokens": tokens, "vocabulary": vocabulary, "sizes": sizes, "code": source_hash(__file__)},
    )


@torch.no_grad()
def bits_per_symbol(model: Callable[[Tensor], Tensor], tokens: Tensor, *, batch_size: int = 64) -> float:
    """Mean -log₂ of the probability that the model gives to each symbol, knowing those before it.

    Args:
        model: logits [N, T, V] from tokens [N, T]; has ``context``, the largest T.
        tokens: a text [n], read in windows that overlap by half, so that beyond the first each symbol has at least half
            a context before it; or sequences [N, T], each read on its own. First symbols are given, not predicted.

    >>> round(bits_per_symbol(LanguageModel(8, width=8, layers=1, heads=2, context=4), torch.arange(8)), 3)
    3.0
    """
    tokens = torch.as_tensor(tokens)
    if tokens.dim() not in (1, 2) or tokens.shape[-1] < 2 or len(tokens) == 0:
        given = f"got shape {tuple(tokens.shape)}"
        raise ValueError(f"tokens must be a text [n] or sequences [N, T], of two symbols or more; {given}")
    length = tokens.shape[-1] - 1
    if tokens.dim() == 1:
        window = min(model.context, length)
        starts = torch.tensor([*range(0, length - window, max(window // 2, 1)), length - window])
        places = starts[:, None] + torch.arange(window + 1)
        counted = places[:, 1:] > torch.cat([torch.zeros(1, dtype=torch.int64), starts[:-1] + window])[:, None]
        tokens = tokens[places]
    else:
        counted = torch.ones(len(tokens), length, dtype=torch.bool)
    nats = 0.0
    for sequences, part in zip(tokens.split(batch_size), counted.split(batch_size), strict=True):
        lost = F.cross_entropy(model(sequences[:, :-1]).transpose(1, 2), sequences[:, 1:], reduction="none")
        nats += lost[part].double().sum().item()
    return nats / counted.sum().item() / math.log(2)


@torch.no_grad()
def generate(
    model: LanguageModel, prompt: Tensor, length: int, *, temperature: float = 1.0, seed: int = 0, cached: bool = True,
    symbols: int | None = None,
) -> Tensor:  # fmt: skip
    """Continue each row of ``prompt`` [N, T ≥ 1] by ``length`` symbols: [N, T + length].

    Args:
        temperature: divides the logits; 0 takes the most probable symbol each time.
        cached: keep keys and values, or read everything again for each symbol; the text is the same.
        symbols: draw among the first so many only, such as grey levels without class tokens.
    """
    tokens, generator = prompt, torch.Generator().manual_seed(int(seed) % 2**63)
    cache = Cache(model, len(prompt)) if cached else None
    for _ in range(whole_number(length, "length", 0)):
        unread = tokens[:, cache.length :] if cached else tokens
        logits = model(unread, cache)[:, -1, :symbols]
        if temperature == 0:
            chosen = logits.argmax(dim=-1, keepdim=True)
        else:
            chosen = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
        tokens = torch.cat([tokens, chosen], dim=1)
    return tokens
