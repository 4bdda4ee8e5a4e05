"""The language model's parts against plain loops, and the text without its leaks."""

import math
from collections import Counter
from itertools import combinations

import pytest
import torch
from torch.nn import functional as F

from course_lib.lab import language
from course_lib.lab.language import (
    Cache,
    LanguageModel,
    NGram,
    Text,
    bits_per_symbol,
    generate,
    load_text,
    train_language_model,
    trained_language_model,
)
from course_lib.lab.training import DivergedError


@pytest.fixture
def model():
    """Small, and not as evenly undecided as a new one."""
    made = LanguageModel(7, width=16, layers=2, heads=2, context=12)
    torch.manual_seed(1)
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return made


def test_no_paragraph_of_the_test_topics_is_trained_on_and_the_text_comes_back():
    text = load_text()
    parts = [text.decode(tokens) for tokens in (text.train, text.val, text.test)]
    paragraphs = [{p.strip() for p in part.split("\n\n") if p.strip()} for part in parts]
    assert all(not a & b for a, b in combinations(paragraphs, 2))
    assert torch.equal(text.encode(parts[2]), text.test)
    assert "\n\n".join(map(text.decode, text.topics)) == parts[2]
    assert len(text.train) > 250_000


def test_symbols_that_the_model_does_not_know_are_named():
    with pytest.raises(ValueError, match=r"does not know: 'é', '字'; the model knows 3 symbols: 'abc'"):
        Text("abc", *(torch.tensor([0]),) * 3).encode("caé字")


def test_a_symbol_depends_on_none_after_it(model):
    tokens = torch.randint(7, (3, 12))
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 7
    different = (model(tokens) - model(changed)).abs().amax(dim=(0, 2)) > 1e-6
    assert different.tolist() == [False] * 6 + [True] * 6


def test_attention_and_rotation_are_the_formula(model):
    block, x = model.blocks[0], torch.randn(1, 5, 16)
    q, k, v = (F.rms_norm(x, (16,), block.norm1.weight) @ block.qkv.weight.T)[0].chunk(3, dim=-1)
    speed = torch.tensor([1000 ** (-i / 4) for i in range(4)])

    def turned(z, place):
        return torch.complex(z[:4], z[4:]) * torch.polar(torch.ones(4), place * speed)

    mixed = torch.zeros(5, 16)
    for head in (slice(0, 8), slice(8, 16)):
        for t in range(5):
            score = [(turned(q[t, head], t) * turned(k[u, head], u).conj()).real.sum() / 8**0.5 for u in range(t + 1)]
            mixed[t, head] = torch.stack(score).softmax(0) @ v[: t + 1, head]
    hidden = x + mixed @ block.out.weight.T
    deep = (F.rms_norm(hidden, (16,), block.norm2.weight) @ block.up.weight.T).relu() @ block.down.weight.T
    torch.testing.assert_close(block(x), hidden + deep)


def test_the_cache_changes_nothing(model):
    tokens, cache = torch.randint(7, (2, 12)), Cache(model, sequences=2)
    parts = [model(tokens[:, a:b], cache) for a, b in ((0, 4), (4, 5), (5, 9), (9, 12))]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens))
    assert (cache.length, cache.kept.nbytes) == (12, 2 * 2 * 2 * 12 * 16 * 4)
    for temperature in (0, 0.7):
        options = {"temperature": temperature, "seed": 3}
        with_cache = generate(model, tokens[:, :3], 9, **options)
        assert torch.equal(with_cache, generate(model, tokens[:, :3], 9, **options, cached=False))
    assert torch.equal(with_cache[:, :3], tokens[:, :3])
    assert generate(model, tokens[:, :1], 11, symbols=2)[:, 1:].max() < 2


def test_a_context_that_is_full_is_said(model):
    with pytest.raises(ValueError, match="13 symbols do not fit into a context of 12"):
        generate(model, torch.zeros(1, 3, dtype=torch.int64), 11)
    with pytest.raises(ValueError, match="width must be a multiple of 2 · heads; got width=12, heads=4"):
        LanguageModel(7, width=12, heads=4)


@pytest.mark.parametrize("length", [2, 9, 13, 14, 19, 40])
def test_bits_are_a_mean_over_every_symbol_but_the_first(model, length):
    tokens = torch.randint(7, (length,))
    lost, counted = 0.0, []
    starts = [*range(0, max(length - 13, 0), 6), max(length - 13, 0)]
    for start in starts:
        logits = model(tokens[None, start : start + 12])[0].log_softmax(-1)
        for place in range(len(tokens[start : start + 13]) - 1):
            if start + place + 1 not in counted:
                counted.append(start + place + 1)
                lost -= logits[place, tokens[start + place + 1]].item() / math.log(2)
    assert counted == list(range(1, length))
    assert bits_per_symbol(model, tokens) == pytest.approx(lost / (length - 1), rel=1e-4)
    rows = tokens[: length // 2 * 2].view(-1, 2)
    each = [bits_per_symbol(model, row) for row in rows]
    assert bits_per_symbol(model, rows, batch_size=2) == pytest.approx(sum(each) / len(each), rel=1e-4)


@pytest.mark.parametrize("tokens", [torch.zeros(1), torch.zeros(0, 4), torch.zeros(1, 2, 3)])
def test_bits_of_nothing_are_refused(model, tokens):
    with pytest.raises(ValueError, match="two symbols or more; got shape"):
        bits_per_symbol(model, tokens.long())


def witten_bell(text, context, symbol, vocabulary):
    """The recursion as the paper has it."""
    lower = 1 / vocabulary if context == "" else witten_bell(text, context[1:], symbol, vocabulary)
    n = len(context)
    counts = Counter(text[i] for i in range(max(n, 1), len(text)) if text[i - n : i] == context)
    total, kinds = sum(counts.values()), len(counts)
    return (counts[symbol] + kinds * lower) / (total + kinds) if total else lower


def test_the_ngram_is_witten_and_bells_recursion():
    text, alphabet = "abracadabra abraca", "abcdr "
    tokens = torch.tensor([alphabet.index(c) for c in text])
    probabilities = NGram(tokens, order=3, vocabulary=6)(tokens[None]).exp()[0]
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(len(text)))
    for place in range(2, len(text)):
        expected = [witten_bell(text, text[place - 1 : place + 1], symbol, 6) for symbol in alphabet]
        torch.testing.assert_close(probabilities[place], torch.tensor(expected))


def test_training_learns_and_is_the_same_again():
    tokens = torch.tensor([0, 1, 2, 3, 2, 1] * 60)
    sizes = {"width": 16, "layers": 1, "heads": 2, "context": 8}
    runs = [train_language_model(LanguageModel(4, **sizes), tokens, steps=60, seed=seed) for seed in (0, 0, 1)]
    weights = [run.blocks[0].up.weight for run in runs]
    assert [torch.equal(weights[0], other) for other in weights[1:]] == [True, False]
    assert bits_per_symbol(LanguageModel(4, **sizes), tokens) == pytest.approx(2)
    assert bits_per_symbol(runs[0], tokens) < 0.5


def test_it_trains_on_sequences_on_a_loss_of_ones_own_and_on_what_is_drawn():
    rows, seen = torch.randint(3, (20, 5)), []

    def loss_fn(logits, sequences):
        seen.append((tuple(logits.shape), sequences))
        return logits.square().mean()

    for tokens in (rows, lambda generator: rows[torch.randint(20, (4,), generator=generator)]):
        model = LanguageModel(3, width=8, layers=1, heads=2, context=8)
        train_language_model(model, tokens, steps=2, batch_size=4, loss_fn=loss_fn)
    assert [shape for shape, _ in seen] == [(4, 4, 3)] * 4
    assert all((sequences[:, None] == rows).all(-1).any(-1).all() for _, sequences in seen)
    assert torch.equal(seen[0][1], seen[2][1])
    with pytest.raises(ValueError, match=r"shape \(8,\) do not fit the model: give a text of at least 9 symbols"):
        train_language_model(model, torch.arange(8), steps=1)
    with pytest.raises(DivergedError):
        train_language_model(model, rows, steps=1, loss_fn=lambda logits, sequences: logits.sum() * math.nan)


def test_a_model_is_trained_once(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))
    tokens, sizes = torch.randint(3, (50,)), {"width": 8, "layers": 1, "heads": 2, "context": 8}
    first = trained_language_model(tokens, 3, steps=2, **sizes)
    monkeypatch.setattr(language, "train_language_model", None)
    again = trained_language_model(tokens, 3, steps=2, **sizes)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    with pytest.raises(TypeError):
        trained_language_model(tokens, 3, 1, steps=2, **sizes)
