"""Practice: right answers pass, wrong ones are told what is wrong, blanks say that they are blank."""

import html
import re

import nbformat
import numpy as np
import pytest
import torch
from scipy import optimize, special, stats
from small_lessons import course
from torch import nn
from torch.nn import functional as F

from course_lib.classroom import practice
from course_lib.classroom.answers import Result, judge
from course_lib.classroom.lessons import notebooks_folder
from course_lib.classroom.practice import TASKS, check, generate, student_version
from course_lib.evidence import statistics
from course_lib.evidence.calibration import expected_calibration_error, fit_temperature
from course_lib.evidence.plots import pareto_front
from course_lib.methods import distillation, distillation_features, pruning, quantization
from course_lib.methods.codebook import share_weights
from course_lib.methods.coding import huffman_code

NOTEBOOKS = notebooks_folder()
SOURCES = sorted((NOTEBOOKS / "solutions").glob("[0-9][0-9]_*.ipynb"))
TRIED = [task for task in TASKS.values() if task.judged is None]
ANSWERS = {task.name: task.answer for task in TRIED}
by_task = pytest.mark.parametrize("task", TRIED, ids=lambda task: task.name)
by_source = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def run(notebook):
    """Execute the code cells as Run All does, and return what each check said."""
    space, said = {}, {}
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.metadata.get("nbgrader", {}).get("grade"):
            said[cell.metadata.nbgrader.grade_id.removesuffix("_check")] = eval(cell.source, space)
        elif cell.cell_type == "code":
            exec(cell.source, space)
    return said


# --- the tasks -------------------------------------------------------------------------------------------------------


@by_task
def test_the_answer_passes_and_every_named_mistake_gets_its_own_sentence(task):
    for seed in range(3):
        result = judge(task, task.answer, seed)
        assert (result.passed, result.text) == (True, task.says)
        for sentence, wrong in task.wrong_answers():
            result = judge(task, wrong, seed)
            assert not result.passed
            assert result.text.startswith(sentence), (sentence, result.text)


@by_task
def test_blanks_say_that_they_are_blank(task):
    def stub(*arguments):
        raise NotImplementedError()

    assert str(judge(task, stub)).startswith(f"{task.name}: not yet. {task.expects[0].upper()}")
    assert "not yet. It returned None every time (is a return missing?); " in judge(task, lambda *given: None).text
    assert judge(task, lambda *given: ...).text.startswith("not yet. It returned Ellipsis every time; ")


class Odd:
    def __eq__(self, other):
        raise RuntimeError("no")

    __hash__ = None


def leave(*given):
    raise SystemExit(3)


ODD = ["text", Odd(), [], {}, torch.tensor([]), np.array([["a"]]), float("nan"), (None, None), 10**400, 1j]


@by_task
def test_a_check_never_raises_and_says_one_line(task):
    for answer in (leave, lambda: 1, 3, Odd(), *(lambda *given, value=value: value for value in ODD)):
        result = judge(task, answer)
        assert not result.passed
        assert "\n" not in str(result)
        assert len(result.text) > 20


def affine(low, high, bits):
    found = quantization.qparams_from_range(low, high, bits, symmetric=False)
    return found.scale.item(), found.zero_point.item()


def interval(a, b):
    found = statistics.paired_difference(a, b)
    return found.low, found.high


def per_group(weight, bits, group):
    return quantization.fake_quantize(weight, quantization.choose_qparams(weight, bits, group=group))


def code_lengths(counts):
    code = huffman_code({i: c for i, c in enumerate(counts) if c})
    return tuple(len(code[i]) if isinstance(code.get(i), str) else code.get(i, 0) for i in range(len(counts)))


def by_linear_algebra(w, factor, j, step):
    error = w[:, j] - step * (w[:, j] / step).round()
    return w - torch.outer(error, factor[j] / factor[j, j] * (torch.arange(len(factor)) >= j))


def by_torch(q, k, v, past_k, past_v, length):
    keys, values = (torch.cat([past[:length], new])[None] for past, new in ((past_k, k), (past_v, v)))
    mask = torch.ones(len(q), length + len(k)).tril(length).bool()
    return F.scaled_dot_product_attention(q[None], keys, values, attn_mask=mask)[0]


def maps(normalized):
    def loss(student, teacher):
        mine, theirs = (normalized(f.square().mean(1).flatten(1)) for f in (student, teacher))
        return (mine - theirs.nan_to_num()).square().sum(1).mean()

    return loss


def awq(control):
    def search(weight, inputs, alphas, order, quantize):
        def error(s):
            return float((inputs @ (quantize(weight * s) / s - weight).T).square().mean())

        size = inputs.abs().mean(0)
        best = min(alphas, key=lambda alpha: error(size**alpha))
        return best, error(size**best), control(error, size, best, order)

    return search


# From the library, torch and scipy; with lists and arrays, other lengths of floats, and other ways to zero a weight.
OTHERS = [
    ("count_macs_linear", lambda w: float(np.dot(w[:-1], w[1:]))),
    ("paired_interval", interval),
    ("paired_interval", lambda a, b: torch.tensor(stats.ttest_rel(a, b).confidence_interval(0.95))),
    ("paired_interval", lambda a, b: (d := torch.tensor(a) - torch.tensor(b)).mean() + d.std() / len(d) ** 0.5 * (
        torch.tensor([-1, 1]) * stats.t.ppf(0.975, len(d) - 1))),  # float32 where the two are lists
    ("threshold_mask", pruning.threshold_mask),
    ("threshold_mask", lambda w, a: np.abs(w.numpy()) > a * np.abs(w.numpy()).max()),
    ("rank_mask", lambda w, s: pruning.rank_mask(w.abs(), s)),
    ("rank_mask", lambda w, s: torch.zeros(w.numel(), dtype=torch.bool).index_fill_(
        0, w.abs().flatten().topk(w.numel() - round(s * w.numel())).indices, True).view(w.shape)),
    ("rank_mask", lambda w, s: (w.square().view(-1).argsort(descending=True).argsort()
                                < w.numel() - round(s * w.numel())).view(w.shape)),
    ("hold_zeros", pruning.keep_masks),
    ("hold_zeros", lambda masks: lambda p, step: [p[n].data.masked_fill_(~m, 0) for n, m in masks.items()]),
    ("cubic_sparsity", pruning.cubic_sparsity),
    ("cubic_sparsity", lambda t, n, f: torch.tensor(f - f * (1 - np.clip(t / n, 0, 1)) ** 3)),
    ("cut_neurons", lambda w, b, f, k: [t.numpy() for t in (w[k.nonzero()[:, 0]], b[k], f.T[k].T)]),
    ("csr_bytes", lambda w: torch.count_nonzero(w) * 6 + 4 * w.size(0) + 4),
    ("affine_qparams", affine),
    ("fake_quantize_ste", lambda x, s, z, low, high: torch.fake_quantize_per_tensor_affine(x.float(), s, z, low, high)),
    ("per_group", per_group),
    ("requantize", lambda t, m, z: np.clip(np.rint(t.numpy() * m) + z, -128, 127).astype(np.int8)),
    ("huffman_lengths", code_lengths),
    ("softmax_t", lambda z, T: special.softmax(z.numpy() / T, -1)),
    ("soft_target_loss", lambda s, t, T: distillation.soft_target_loss(s, t, temperature=T)),
    ("soft_target_loss", lambda s, t, T: T * T * F.kl_div(
        F.log_softmax(s / T, 1), F.softmax(t / T, 1), reduction="batchmean")),
    ("t_squared_gradient", lambda s, t, T: torch.func.grad(lambda z: T**2 * F.kl_div(
        F.log_softmax(z / T, 1), F.softmax(t / T, 1), reduction="batchmean"))(s)),
    ("fit_temperature", fit_temperature),
    ("fit_temperature", lambda z, y: optimize.minimize_scalar(
        lambda T: F.cross_entropy(z / T, y).item(), bounds=(0.05, 20)).x),
    ("ece", lambda p, y, bins: expected_calibration_error(p, y, bins=bins)),
    ("kd_loss", lambda s, t, y, T, a: distillation.kd_loss(s, t, y, temperature=T, alpha=a)),
    ("hint_loss", lambda s, t, adapter: distillation_features.hint_loss(s @ adapter.T, t)),
    ("attention_map_loss", distillation_features.attention_map_loss),
    ("attention_map_loss", maps(lambda q: q / (q.norm(dim=1, keepdim=True) + 1e-8))),
    ("awq_search", awq(lambda error, s, best, order: error((s**best)[order]))),
    ("pareto_front", pareto_front),
    ("cached_attention", by_torch),
    ("gptq_step", by_linear_algebra),
    ("best_students", lambda t, p: (F.kl_div(p.log(), t.expand_as(p), reduction="none").sum(1).argmin(),
                                    F.kl_div(t.log().expand_as(p), p, reduction="none").sum(1).argmin())),
]  # fmt: skip


@pytest.mark.parametrize(("name", "answer"), OTHERS, ids=[name for name, _ in OTHERS])
def test_right_answers_from_elsewhere_pass(name, answer):
    for seed in range(3):
        assert (result := judge(TASKS[name], answer, seed)), result


def overflow_at_half(weights, inputs, bias, bits):
    sums = bias + np.cumsum(np.multiply(weights, inputs))
    return next((i for i, total in enumerate(sums) if abs(total) > 2 ** (bits - 1)), None)


def rate(labels, answers, c):
    return (answers == labels)[labels == c].double().mean()


def by_class(fall):
    return lambda y, a, b: max(y.unique().tolist(), key=lambda c: float(fall(y, a, b, c)))


def reach(fits):
    def bits_needed(w, bias, top):
        plus, minus = (top * sum(x for x in w if sign * x > 0) for sign in (1, -1))
        return next((b for b in (8, 16, 32) if fits(w, bias, top, plus, minus, b - 1)), 64)

    return bits_needed


def lowest(tried, loss=F.cross_entropy):
    return lambda z, y: tried[torch.stack([loss(z / T, y) for T in tried]).argmin()]


def whole_cache(q, k, v, past_k, past_v, length):
    keys, values = torch.cat([past_k, k]), torch.cat([past_v, v])
    hidden = torch.arange(len(keys)) > length + torch.arange(len(q))[:, None]
    return (q @ keys.T / q.shape[1] ** 0.5).masked_fill(hidden, -torch.inf).softmax(1) @ values


def rounded_first(x, scale, zero_point, qmin, qmax):
    r = x / scale
    r = r + (r.round() - r).detach() + zero_point
    return scale * (r.clamp(qmin, qmax) - zero_point)


def ends(a, b):
    return np.array(interval(a, b))


def pack_by(top, offset):
    def pack(w):
        step = float(w.abs().max()) / top
        q = torch.round(w / step).long() + offset
        return (q[0::2] + 16 * q[1::2]).to(torch.uint8), step

    return pack


def heaped(counts):
    lengths, heap = [0] * len(counts), [(count, [i]) for i, count in enumerate(counts)]
    while len(heap) > 1:
        (a, first), (b, second), *heap = sorted(heap)
        lengths = [n + (i in first + second) for i, n in enumerate(lengths)]
        heap.append((a + b, first + second))
    return lengths


def error_too_late(w, factor, j, step):
    w = w.clone()
    w[:, j] = step * torch.round(w[:, j] / step)
    error = (w[:, j] - step * torch.round(w[:, j] / step)) / factor[j, j]
    w[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
    return w


def ece_with_nan(probabilities, labels, bins):
    confidence, said = probabilities.max(dim=1)
    place = (confidence * bins).ceil() - 1
    right = (said == labels).float()
    here = [place == b for b in range(bins)]
    return sum((right[h].mean() - confidence[h].mean()).abs() * h.float().mean() for h in here)


# As people write them: first what is in no list, then what is.
WRONG = [
    ("rank_mask", lambda w, s: torch.tensor([True, True, False, False, True, False]), "right at"),  # hard-coded
    ("rank_mask", lambda w, s: ANSWERS["rank_mask"](w, s).float(), "float32 tensor"),
    ("rank_mask", lambda w, s: ANSWERS["rank_mask"](w, s).flatten(), "shape"),
    ("rank_mask", lambda w, s: ANSWERS["rank_mask"](w.abs_(), s), "weight was changed"),
    ("threshold_mask", lambda w, a: w.abs() > a * w.abs().mean(), "keeps"),
    ("softmax_t", lambda z, T: (z / T).log_softmax(-1), "expected"),
    ("kd_loss", lambda s, t, y, T, a: T**2 * ANSWERS["kd_loss"](s, t, y, T, a), "expected"),
    ("kd_loss", lambda s, t, y, T, a: ANSWERS["kd_loss"](s, t, y, T, a).detach(), "no gradient"),
    ("kd_loss", lambda s, t, y, T, a: ANSWERS["kd_loss"](s, t, y, T, a) + 0 * s.sub_(1).sum(), "_logits was changed"),
    ("hint_loss", lambda s, t, a: F.mse_loss(s.detach() @ a.T, t), "gradient"),
    ("cut_neurons", lambda w, b, f, k: (w[k], b[k]), "tuple of 2"),
    ("kmeans_codebook", lambda v, s, r: ANSWERS["kmeans_codebook"](v, s, r)[::-1], "in centres"),
    ("huffman_lengths", lambda c: [max(c)] * len(c), "expected"),
    ("ece", lambda p, y, b: 100 * ANSWERS["ece"](p, y, b), "100 times too large"),
    ("fit_temperature", lambda z, y: -ANSWERS["fit_temperature"](z, y), "sign"),
    ("hold_zeros", lambda masks: masks, "raised TypeError"),
    ("cubic_sparsity", lambda step, steps, final: print("debug"), "hides what it prints"),
    ("paired_interval", lambda a, b: stats.norm.interval(0.95, np.subtract(a, b).mean(), stats.sem(np.subtract(a, b))),
     "1.96 is for many seeds"),
    ("soft_target_loss", lambda s, t, T: distillation.soft_target_loss(s, t, temperature=T) / T**2, "T² is missing."),
    ("soft_target_loss", lambda s, t, T: T**2 * F.kl_div((s / T).log_softmax(1), (t / T).softmax(1), reduction="mean"),
     "divides by the classes as well"),
    ("t_squared_gradient", lambda s, t, T: T**2 * ((s / T).softmax(1) - (t / T).softmax(1)) / len(s), "T² times 1/T"),
    ("t_squared_gradient", lambda s, t, T: T * ((s / T).softmax(1) - (t / T).softmax(1)), "by how many there are"),
    ("hold_zeros", lambda masks: lambda p, step: step or [p[n].mul_(m) for n, m in masks.items()], "one step only"),
    ("kd_loss", lambda s, t, y, T, a: distillation.kd_loss(s, t, y, temperature=T, alpha=1 - a), "1 − α are swapped"),
    ("overflow_at", overflow_at_half, "2^(bits − 1) itself does not fit"),
    ("cubic_sparsity", lambda t, n, f: f * t / n, "Probably: That is a straight line"),
    ("requantize", lambda t, m, z: ANSWERS["requantize"](t, m, z).int(), "expected an int8 tensor"),
    ("cached_attention", lambda *given: (ANSWERS["cached_attention"](*given), given[3].zero_(), given[4].zero_())[0],
     "past_k and past_v were changed on the way. Copy them"),
    ("worst_hit_class", by_class(lambda y, a, b, c: (a != b)[y == c].double().mean()), "churn"),
    ("worst_hit_class", by_class(lambda y, a, b, c: abs(rate(y, a, c) - rate(y, b, c))), "a gain is no hit"),
    ("worst_hit_class", by_class(lambda y, a, b, c: rate(a, y, c) - rate(b, y, c)), "precision"),
    ("worst_hit_class", by_class(lambda y, a, b, c: 1 - rate(y, b, c) / rate(y, a, c)), "a share of what"),
    ("worst_hit_class", lambda y, a, b: max(range(int(y.max()) + 1), key=lambda c: rate(y, a, c) - rate(y, b, c)),
     "0 / 0, NaN"),
    ("worst_hit_class", lambda y, a, b: torch.stack([rate(y, a, c) - rate(y, b, c) for c in range(int(y.max()) + 1)])
     .argmax(), "0 / 0, NaN"),
    ("attention_map_loss", maps(lambda q: torch.where(q > 0, q / q.norm(dim=1, keepdim=True), 0.0)), "divide by"),
    ("attention_map_loss", maps(lambda q: q / (q.square().sum(1, keepdim=True).sqrt() + 1e-8)), "safe number"),
    ("bits_needed", reach(lambda w, bias, top, plus, minus, k: -(2**k) <= minus + bias and plus + bias <= 2**k),
     "itself does not fit"),
    ("bits_needed", reach(lambda w, bias, top, plus, minus, k: -(2**k) <= minus and plus < 2**k), "bias is part"),
    ("bits_needed", reach(lambda w, bias, top, plus, minus, k: bias + plus - minus < 2**k), "Magnitudes are added"),
    ("bits_needed", lambda w, bias, top: min(32, ANSWERS["bits_needed"](w, bias, top)), "32 bits are not always"),
    ("hold_zeros", lambda masks: lambda p, step: [p[n].mul_(masks[n]) for n in p if "weight" in n], "Not every"),
    ("hold_zeros", lambda masks: lambda p, step: [p[n].grad.mul_(m) for n, m in masks.items()], "masked gradient"),
    ("hold_zeros", lambda masks: lambda p, step: p.update({n: p[n] * m for n, m in masks.items()}), "a new tensor"),
    ("softmax_t", lambda z, T: torch.softmax(z / T, -1), "Write it yourself, without torch.softmax"),
    ("softmax_t", lambda z, T: nn.Softmax(-1)(z / T), "Write it yourself"),
    ("softmax_t", lambda z, T: F.log_softmax(z / T, -1).exp(), "Write it yourself"),
    ("awq_search", awq(lambda error, s, best, order: min(error(s[order] ** (a / 4)) for a in (1, 2, 3))), "its own"),
    ("awq_search", awq(lambda error, s, best, order: error((s**best)[order.argsort()])), "the other way round"),
    ("fit_temperature", lowest(torch.logspace(-1, 1, 100)), "too coarse"),
    ("fit_temperature", lowest(torch.linspace(0.1, 10, 100)), "too coarse"),
    ("fit_temperature", lowest(torch.linspace(0.1, 10, 1000)), "also where T is small"),
    ("fit_temperature", lowest(torch.logspace(-1, 1, 2000), lambda z, y: F.cross_entropy(z.softmax(1), y)), "twice"),
    ("fit_temperature", lowest(torch.logspace(-1, 1, 300), lambda z, y: -(z.argmax(1) == y).float().mean()), "same at"),
    ("csr_bytes", lambda w: 6 * int((w.abs() > 1e-3).sum()) + 4 * len(w) + 4, "Tiny is not zero"),
    ("cached_attention", lambda *given: 1 / given[5] and ANSWERS["cached_attention"](*given), "length = 0 it raised"),
    ("cached_attention", lambda q, k, v, pk, pv, n: by_torch(q, k, v, pk, pv, len(pk)), "The whole cache is read"),
    ("cached_attention", whole_cache, "The whole cache is read"),
    ("widest_cnn", lambda ram, stack: TASKS["widest_cnn"].answer(ram, stack, spare=1), "needs exactly"),
    ("fake_quantize_ste", rounded_first, "outermost integers"),
    ("fake_quantize_ste", lambda x, *grid: ANSWERS["fake_quantize_ste"](x.detach(), *grid) + 2 * (x - x.detach()),
     "(of the sum of all entries, weighed 1, 2, 3, …)"),
    ("paired_interval", lambda a, b: (ends(a, b).mean(), np.ptp(ends(a, b)) / 2), "Mean and half width"),
    ("paired_interval", lambda a, b: ends(a, b)[::-1], "low one comes first"),
    ("pack_group", pack_by(8, 8), "max|w| / 8"),
    ("pack_group", pack_by(7, 0), "8 is not added"),
    ("huffman_lengths", heaped, "needs no code"),
    ("hint_loss", lambda s, t, adapter: F.mse_loss(s @ adapter, t), "turned round"),
    ("shift_and_round", lambda t, m, n, z: min(max((t * m + z + (1 << (n - 1))) >> n, 0), 255), "where it vanishes"),
    ("gptq_step", error_too_late, "factor's column"),
    ("overflow_at", lambda *given: None, "(is a return missing?)"),
    ("soft_target_loss", lambda s, t, T: T**2 * F.cross_entropy(s / T, (t / T).softmax(1)), "Σ p log p"),
    ("soft_target_loss", lambda s, t, T: T**2 * F.kl_div(
        (s / T).softmax(1), (t / T).softmax(1), reduction="batchmean"), "student as logarithms"),
    ("kd_loss", lambda s, t, y, T, a: (1 - a) * F.cross_entropy(s, y) + a * T**2 * F.kl_div(
        (s / T).log_softmax(1), (t / T).log_softmax(1), reduction="batchmean"), "teacher as probabilities"),
    ("kd_loss", lambda s, t, y, T, a: (1 - a) * F.cross_entropy(s, y) + a * T**2 * F.kl_div(
        (s / T).softmax(1).log(), (t / T).softmax(1), reduction="batchmean"), "use log_softmax"),
    ("ece", ece_with_nan, "An empty bin has no mean"),
    ("pareto_front", lambda c, g: [not any(a <= x and b >= y for a, b in zip(c, g, strict=True))
                                   for x, y in zip(c, g, strict=True)], "compared with itself"),
    ("rewound", lambda i, t, s: t * ANSWERS["rank_mask"](t, s), "trained values"),
    ("rewound", lambda i, t, s: i * ANSWERS["rank_mask"](i, s), "rank the trained"),
    ("round_twice", lambda t, m, n: (once := (t * m + (1 << (n - 1))) >> n, once), "Both are rounded once"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "answer", "told"), WRONG, ids=[told for _, _, told in WRONG])
def test_wrong_answers_do_not_pass_and_are_told_why(name, answer, told):
    for seed in range(3):
        result = judge(TASKS[name], answer, seed)
        assert not result.passed
        assert told in result.text, result


def test_gptq_is_the_learners_step_column_by_column():
    from course_lib.methods.gptq import correction, gptq
    from course_lib.methods.quantization import QuantParams

    weight, x = torch.randn(3, 5), torch.randn(40, 5) @ torch.randn(5, 5)
    w, factor = weight.double(), correction(weight, x.T @ x, 0.01)
    for j in range(5):
        w = TASKS["gptq_step"].answer(w, factor, j, 0.25)
    torch.testing.assert_close(gptq(weight, x.T @ x, QuantParams(0.25, 0, -100, 100)), w.float())


# --- what a check shows ----------------------------------------------------------------------------------------------


def test_a_result_is_one_line_in_a_terminal_and_in_a_notebook():
    result = check("cubic_sparsity", lambda step, steps, final: "<b>")
    assert str(result).endswith("you return a str, expected 0.7.")
    result = Result("a", False, "1 < 2")
    assert html.escape("1 < 2") in result._repr_html_()
    assert not bool(result)
    assert str(Result("a", True, "b.")) == "✓ a: b."
    assert re.sub("<[^>]*>", "", Result("a", True, "b.")._repr_html_()) == "✓ a: b."


def test_names_are_helped_and_values_are_not_mistaken_for_functions():
    assert "did you mean 'rank_mask'?" in check("rank_masks", None).text
    assert "no task has this name" in check("zzz", None).text
    assert "without calling it" in check("rank_mask", torch.ones(3)).text


def test_a_check_leaves_no_trace(capsys):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert not check("softmax_t", lambda z, T: print("seen") or torch.rand_like(z))
    assert torch.equal(before, torch.get_rng_state())
    assert capsys.readouterr() == ("", "")


def test_nbgrader_is_told_by_an_error_and_nobody_else(monkeypatch):
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    assert check("csr_bytes", TASKS["csr_bytes"].answer)
    with pytest.raises(AssertionError, match="not yet"):
        check("csr_bytes", lambda weight: None)


def test_compress_to_measures_the_file_and_keeps_the_attempts():
    def shared(model, train, val, bits=4):
        pruning.prune_(model, 0.6)
        return share_weights(model, bits)

    class Hides(nn.Module):
        def forward(self, x):
            return x

    assert "The best of your 1 attempts" in check("compress_to", shared).text
    assert "The best of your 2 attempts" in check("compress_to", shared).text
    assert "a tenth is asked for" in check("compress_to", lambda model, train, val: model).text
    assert "above −2 points" in check("compress_to", lambda m, train, val: shared(m, train, val, bits=1)).text
    assert "UnsupportedModel" in check("compress_to", lambda model, train, val: Hides()).text
    assert "not yet. It returned None; a network is expected." in check("compress_to", lambda m, train, val: None).text


def test_widest_cnn_is_measured_on_an_emulated_core_or_in_its_file(monkeypatch):
    from course_lib.lab import microcontroller

    monkeypatch.setattr(microcontroller, "missing_packages", lambda: ["unicorn"])
    answer = TASKS["widest_cnn"].answer
    assert "arrays of 368 and 1,472 bytes (no emulator here)" in check("widest_cnn", answer).text
    assert "The stack is forgotten." in check("widest_cnn", lambda ram, stack: answer(ram, 0)).text
    assert check("widest_cnn", lambda ram, stack: None).text.startswith("not yet. It returned None every time")
    monkeypatch.undo()
    if microcontroller.missing_packages():
        pytest.skip("pip install ziglang unicorn to test the rest")
    told = re.search(r"On an emulated Cortex-M4 that network takes ([\d,]+), stack", check("widest_cnn", answer).text)
    assert 368 + 1472 < int(told[1].replace(",", "")) <= 2048


# --- notebooks -------------------------------------------------------------------------------------------------------


def test_every_task_has_its_cells_and_every_chapter_four_to_eight():
    found = []
    for source in SOURCES:
        marks = [cell.metadata.nbgrader for cell in read(source).cells if "nbgrader" in cell.metadata]
        names = [mark.grade_id for mark in marks if mark.solution]
        assert [mark.grade_id for mark in marks if mark.grade] == [f"{name}_check" for name in names]
        assert 4 <= len(names) <= 8
        found += names
    assert found == list(TASKS)


@by_source
def test_every_solution_passes_every_check_and_says_so_in_the_stored_output(source):
    notebook = read(source)
    said = run(notebook)
    assert all(said.values()), said
    outputs = [o for cell in notebook.cells if "nbgrader" in cell.metadata for o in cell.get("outputs", [])]
    assert [output.data["text/plain"].split(":")[0] for output in outputs] == [f"✓ {name}" for name in said]


@by_source
def test_every_untouched_student_notebook_runs_through_and_passes_nothing(source):
    said = run(read(NOTEBOOKS / source.stem / "practice.ipynb"))
    assert said.keys() == {name for name in TASKS if name in said}
    assert all(not result and result.text.startswith("not yet. ") for result in said.values()), said


@by_source
def test_every_task_says_how_long_how_hard_and_where_it_was_taught(source):
    for cell in read(source).cells:
        if cell.id.endswith("-text"):
            name, line = re.match(r"## (\w+)\n\n(.*)\n", cell.source).groups()
            assert re.match(r"(●○○|●●○|●●●) · \d+ minutes · lesson \[\d\d\.\d .*\]\(\.\./.*\.ipynb\)$", line), name
            assert "<details><summary>Hint</summary>\n\n" in cell.source
        if cell.cell_type == "code":
            assert max(map(len, cell.source.splitlines())) <= 88


def test_the_student_notebooks_are_those_of_the_solutions_without_these():
    assert generate(check=True) == [], "make practice brings them up to date"
    for source in SOURCES:
        text = (NOTEBOOKS / source.stem / "practice.ipynb").read_text(encoding="utf-8")
        assert "SOLUTION" not in text
        assert '"execution_count": null' in text
        assert text.count("raise NotImplementedError()") == text.count("# YOUR CODE HERE") >= 4


def test_generate_writes_what_differs_and_nothing_else(tmp_path):
    command = ("practice", "generate", "--notebooks", tmp_path)
    assert "no solutions in" in course(*command)[2]
    (tmp_path / "solutions").mkdir()
    (tmp_path / "solutions" / SOURCES[0].name).write_bytes(SOURCES[0].read_bytes())
    path = tmp_path / SOURCES[0].stem / "practice.ipynb"
    assert course(*command, "--check")[:2] == (1, f"{path}\n")
    assert not path.exists()
    assert course(*command)[0] == 0
    assert path.read_bytes() == (NOTEBOOKS / SOURCES[0].stem / "practice.ipynb").read_bytes()
    assert course(*command, "--check")[:2] == (0, "all practice notebooks are up to date\n")


@by_source
@pytest.mark.filterwarnings("ignore")  # nbgrader's own imports
def test_the_student_notebook_is_what_nbgrader_would_write(source):
    preprocessors = pytest.importorskip("nbgrader.preprocessors", reason="nbgrader is an extra for teachers")
    theirs, ours = read(source), student_version(read(source))
    steps = "IncludeHeaderFooter LockCells ClearSolutions ClearOutput CheckCellMetadata ComputeChecksums"
    for step in (steps + " ClearHiddenTests ClearMarkScheme ComputeChecksums CheckCellMetadata").split():
        theirs, _ = getattr(preprocessors, step)().preprocess(theirs, {})
    assert theirs == ours


def test_checksums_are_nbgraders():
    """Written down once from nbgrader 0.9.6, for machines that do not have it."""
    cell = nbformat.v4.new_code_cell('check("f", f)')
    cell.metadata["nbgrader"] = nbformat.from_dict(
        {"grade": True, "grade_id": "f_check", "locked": True, "points": 2, "solution": False}
    )
    assert practice._checksum(cell) == "07156766c18ece65883d4b236fe4ed3e"
