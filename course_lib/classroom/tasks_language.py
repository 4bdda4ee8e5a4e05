"""The tasks of chapter 08, language models; built like those of :mod:`tasks_sizes`."""

import numpy as np
import torch
from torch.nn import functional as F

from course_lib.classroom.answers import Task
from course_lib.classroom.tasks_deployment import TASKS as EARLIER
from course_lib.classroom.tasks_sizes import draw

__all__ = ["TASKS"]


def _pack(w, top=7, offset=8, swap=False, halves=False, whole=torch.round):
    step = float(w.abs().max()) / top
    nibbles = whole(w / step).long() + offset  # unmasked, as a wrong answer leaves them
    low, high = nibbles.view(2, -1) if halves else nibbles.view(-1, 2).T
    low, high = (high, low) if swap else (low, high)
    return (low + 16 * high).to(torch.uint8), step


def _unpacked(w):
    packed, step = _pack(w)
    return torch.stack([packed & 15, packed >> 4], 1).flatten(), step


def _step(w, factor, j, step, sign=-1, divide=True, first=1, grid=torch.round):
    w = w.clone()
    rounded = step * grid(w[:, j] / step)
    error = (w[:, j] - rounded) / (factor[j, j] if divide else 1)
    w[:, j] = rounded
    w[:, j + first :] += sign * error[:, None] * factor[j, j + first :]
    return w


def _layers(rng):
    for rows, columns, j in ((1, 3, 0), (4, 6, 2), (3, 5, 4)):
        x = draw(rng, 50, columns) @ draw(rng, columns, columns)
        factor = torch.linalg.cholesky(torch.linalg.inv((x.T @ x / 50 + 0.1 * torch.eye(columns)).double()), upper=True)
        yield 2 * draw(rng, rows, columns), factor.float(), j, 0.5


def round_in_rows(w):
    """3 bits, a step a row"""
    step = w.abs().amax(dim=1, keepdim=True) / 3
    return torch.round(w / step) * step


def _search(weight, inputs, alphas, order, quantize, size=lambda x: x.abs().mean(0), turned=False, back=True,
            judge=None, control=None):  # fmt: skip
    def error(scales):
        scales = 1 / scales if turned else scales
        changed = quantize(weight * scales) / (scales if back else 1) - weight
        return float((changed if judge == "weights" else inputs @ changed.T).square().mean())

    tried = {alpha: error(size(inputs) ** alpha) for alpha in alphas}
    best = min(tried, key=tried.get)
    given = torch.ones(len(order)) if control == "none" else size(inputs) ** best
    if control == "least":
        return best, tried[best], min(error(size(inputs)[order] ** alpha) for alpha in alphas)
    order = {"same": torch.arange(len(order)), "back": order.argsort()}.get(control, order)
    return best, tried[best], error(given[order])


def _loud_inputs(fresh):
    for rows, columns, loud in ((16, 12, 20.0), (8, 24, 50.0), (24, 16, 8.0)):
        rng = np.random.default_rng(4) if rows == 16 else fresh  # a layer on which luck hides no control
        inputs = draw(rng, 64, columns) * (1 + draw(rng, columns).abs())
        inputs[:, :2] *= loud
        inputs[0, -1] = 40 * loud  # a single giant makes a channel's peak, not its mean
        order = torch.tensor((np.arange(columns) + columns // 3) % columns)
        yield draw(rng, rows, columns), inputs, [0.25, 0.5, 0.75], order, round_in_rows


def _cache(layers, heads, kv_heads, head_size, tokens, bits, both=2, shared=True, byte=8, deep=True, wide=True):
    numbers = both * (layers if deep else 1) * (kv_heads if shared else heads) * (head_size if wide else 1) * tokens
    return numbers * bits // byte


def _attend(q, k, v, past_k, past_v, length, own=True, extra=0, causal=True, corner=False, root=True, rows=0):
    new = len(q)
    keys, values = (torch.cat([past[: rows or length + extra], part]) for past, part in ((past_k, k), (past_v, v)))
    places = torch.arange(len(keys))
    last = torch.arange(new)[:, None] + (0 if corner else length + extra) - (0 if own else 1)
    scores = q @ keys.T / (q.shape[1] ** 0.5 if root else 1)
    scores = scores.masked_fill(places > last, -torch.inf) if causal else scores
    return F.softmax(scores, dim=1) @ values


def _conversations(rng):
    for new, length in ((1, 3), (3, 4), (2, 6), (4, 1), (2, 0)):  # what lies behind is left from an earlier text
        yield (*(draw(rng, new, 4) for _ in range(3)), *(draw(rng, 10, 4) for _ in range(2)), length)


def _fits(teacher, students, swap=False, twice=False, entropy=True, weighed=True, steady=True):
    def kl(p, q):
        log_q = q.log()
        each = p * ((p.log() if entropy else 0) - log_q) if weighed else p.log() - log_q
        return (each if not steady else torch.where(p > 0, each, 0.0)).sum(-1)

    found = [kl(teacher, students), kl(students, teacher)]
    found = [found[0]] * 2 if twice else found[::-1] if swap else found
    return tuple(int(f.argmin()) for f in found)


def _two_modes(rng):
    """One student over both modes, one on each, an even one, and two with zeros."""
    teacher = torch.tensor([0.002, 0.55, 0.004, 0.004, 0.438, 0.002])
    students = torch.tensor([
        [0.3, 0.0, 0.0, 0.3, 0.4, 0.0], [0.12, 0.26, 0.12, 0.12, 0.26, 0.12], [0.01, 0.93, 0.02, 0.02, 0.01, 0.01],
        [0.0, 0.99, 0.01, 0.0, 0.0, 0.0], [1 / 6] * 6, [0.01, 0.02, 0.02, 0.05, 0.85, 0.05],
    ])  # fmt: skip
    yield teacher, students
    for _ in range(2):
        places, rows = torch.tensor(rng.permutation(6)), torch.tensor(rng.permutation(6))
        yield teacher[places], students[rows][:, places]


_CHAPTER_08 = [
    Task("cache_bytes", _cache, "a whole number", "one layer to 80, heads that share keys, 4 to 32 bits.",
         lambda rng: [(2, 4, 2, 8, 10, 16), (32, 32, 8, 128, 4096, 16), (80, 64, 8, 128, 1, 8), (30, 9, 3, 64, 77, 4)],
         {
        "Keys *and* values are kept: twice as much.": dict(both=1),
        "Heads that share keys keep them once: count `kv_heads`.": dict(shared=False),
        "These are bits; 8 make a byte.": dict(byte=1),
        "Each layer keeps its own.": dict(deep=False),
        "A key has `head_size` numbers.": dict(wide=False),
    }),
    Task("cached_attention", _attend, "a tensor of q's shape", "1 to 4 new tokens behind none to 6 kept ones.",
         _conversations, {
        "A new token does not see itself: the mask is off by one.": dict(own=False),
        "One row too many is read from the past: row `length` is left from an earlier text.": dict(extra=1),
        "The whole cache is read: rows from `length` on are left from an earlier text.": [
            dict(rows=99), lambda *given: _attend(*given[:5], len(given[3]))],
        "A new token sees the ones after it: mask them.": dict(causal=False),
        "The mask forgets the past: new token i stands at place length + i, not i.": dict(corner=True),
        "The scores are not divided by √d.": dict(root=False),
    }),
    Task("pack_group", _pack, "a pair (packed, step)", "groups of 2 to 32; a byte holds two neighbours.",
         lambda rng: [(torch.tensor([0.7, -0.7, 0.15, 0.4]),), (draw(rng, 32),), (5 * draw(rng, 2),), (draw(rng, 8),)],
         {
        "The two of a byte are swapped: the first goes into the low half, `first + 16 * second`.": dict(swap=True),
        "8 is not added: negative integers wrap round to 9…15.": dict(offset=0),
        "7 is added, where 8 is asked for: 0 is stored as 8.": dict(offset=7),
        "The step is max|w| / 8; integers from −7 to 7 take max|w| / 7.": dict(top=8),
        "A byte holds two *neighbours*; yours holds one of each half.": dict(halves=True),
        "That cuts off; it should round.": dict(whole=torch.trunc),
        "That is a byte for each weight: two integers fit into one.": _unpacked,
    }),
    Task("gptq_step", _step, "a tensor of w's shape", "1 to 4 rows, the first, a middle and the last column.", _layers,
         {
        "Column j is rounded, and no other makes up for it. Either the error was taken after column j was overwritten "
        "(it is 0 then), or factor's column was used, not its row.": dict(sign=0),
        "The sign is wrong: the others now make the error larger.": dict(sign=1),
        "The error has to be divided by `factor[j, j]`.": dict(divide=False),
        "Column j itself moves as well, once too often: the correction starts at j + 1.": dict(first=0),
        "That cuts off; it should round.": dict(grid=torch.trunc),
    }),
    Task("awq_search", _search, "a triple (alpha, error, control)", "3 layers with two loud channels each.",
         _loud_inputs, {
        "AWQ takes the *mean* magnitude; a single giant decides yours.": dict(size=lambda x: x.abs().amax(0)),
        "Signs cancel in the mean of x: take magnitudes first.": dict(size=lambda x: x.mean(0).abs() + 1e-6),
        "Scales multiply the weight before it is rounded; yours divide it.": dict(turned=True),
        "After rounding the scales have to be divided out again.": dict(back=False),
        "That judges by the weights; what counts is the layer's output on `inputs`.": dict(judge="weights"),
        "The control has the best scales on *other* channels; yours has them in place.": dict(control="same"),
        "The control has no scales at all; it is to have the best ones on other channels.": dict(control="none"),
        "The control looks for a strength of its own; it has the scales of the best one.": dict(control="least"),
        "The control is `s[order]`; yours goes through `order` the other way round.": dict(control="back"),
    }),
    Task("best_students", _fits, "a pair (forward, reverse)", "two modes in three orders, a student with zeros.",
         _two_modes, {
        "The two are swapped: forward is KL(teacher ‖ student), and comes first.": dict(swap=True),
        "Both are forward: in reverse, the *student's* probabilities weigh the sum.": dict(twice=True),
        "That is cross-entropy: without the student's own entropy, certainty alone wins.": dict(entropy=False),
        "0 · log 0 counts as 0; a NaN wins every argmin.": dict(steady=False),
        "The differences of logarithms are not weighed by the first distribution.": dict(weighed=False),
    }),
]  # fmt: skip

TASKS = EARLIER | {task.name: task for task in _CHAPTER_08}
"""Every task of the course by its name, in order."""
