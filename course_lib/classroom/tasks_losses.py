"""The tasks of chapters 04 to 06: temperature, distillation, trade-offs; built like those of :mod:`tasks_sizes`."""

import copy
import json
import math
import tempfile
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from course_lib.classroom.answers import Task, with_gradient
from course_lib.classroom.tasks_sizes import TASKS as EARLIER
from course_lib.classroom.tasks_sizes import draw, interval
from course_lib.files import cache_folder, write_file

__all__ = ["TASKS", "dense_networks"]

# --- 04: temperature --------------------------------------------------------------------------------------------------


def _softmax(logits, temperature, dim=-1, steady=True, power=-1, after=False):
    z = logits if after else logits * temperature**power
    e = (z - z.amax(dim, keepdim=True)).exp() if steady else z.exp()
    return e / e.sum(dim, keepdim=True) * (temperature**power if after else 1)


class _ByHand(TorchFunctionMode):
    """While it lasts, torch's own softmax is refused."""

    def __torch_function__(self, function, types, given=(), named=None):
        if "softmax" in getattr(function, "__name__", ""):
            raise NotImplementedError("Write it yourself, without torch.softmax")
        return function(*given, **(named or {}))


def _by_hand(function, *given):
    with _ByHand():
        return function(*given)


def _soft(student_logits, teacher_logits, temperature, power=2, swap=False, reduction="batchmean", part=None,
          steady=True, own=True, twice=False, term=lambda p, log_p, log_q: p * (log_p - log_q)):  # fmt: skip
    student, teacher = (teacher_logits, student_logits) if swap else (student_logits, teacher_logits)
    student = teacher if twice else student
    log_q = _log_softmax(student / (temperature if own else 1), steady)
    log_p = _log_softmax(teacher / temperature, steady)
    each = term(log_p.exp(), log_p, log_q).sum(-1)
    mean = {"batchmean": each.mean(), "mean": each.mean() / student.shape[-1], "sum": each.sum()}
    loss = temperature**power * mean[reduction]
    return part(loss) if part else loss


def _log_softmax(z, steady):
    return F.log_softmax(z, -1) if steady else F.softmax(z, -1).log()


_SOFT_FAULTS = {  # of soft_target_loss, and of the same term in kd_loss
    "T² is missing.": dict(power=0),
    "T is missing where T² belongs.": dict(power=1),
    "Teacher and student are swapped: the teacher's probabilities weigh the sum.": dict(swap=True),
    "`mean` divides by the classes as well: sum over classes, mean over images (`batchmean`).": dict(reduction="mean"),
    "Only the teacher is softened by T: the student has to be as well.": dict(own=False),
    "softmax gives 0 for a class far behind, and log(0) is −∞: use log_softmax.": dict(steady=False),
    "That is cross-entropy: its gradient is right, its value lacks Σ p log p.": dict(term=lambda p, a, b: -p * b),
    "F.kl_div wants the student as logarithms: F.log_softmax.": dict(term=lambda p, a, log_q: p * (a - log_q.exp())),
    "F.kl_div wants the teacher as probabilities (or log_target=True).": dict(term=lambda p, a, b: a * (a.log() - b)),
}  # fmt: skip


def _logits(rng, large=True):
    cases = [(draw(rng, 4, 10), draw(rng, 4, 10), 4.0), (draw(rng, 1, 2), draw(rng, 1, 2), 2.0)]
    cases += [(2 * draw(rng, 6, 3).double(), 2 * draw(rng, 6, 3).double(), 0.5)]
    cases += [(draw(rng, 3, 5), draw(rng, 3, 5), 1.0)]
    return [*cases, (300 * draw(rng, 3, 4), 300 * draw(rng, 3, 4), 1.5)] if large else cases


def _slope(student_logits, teacher_logits, temperature, power=1, sign=1, images=True, soft=True):
    T = temperature if soft else 1.0
    gap = F.softmax(student_logits / T, -1) - F.softmax(teacher_logits / T, -1)
    return sign * temperature**power * gap / (len(gap) if images else 1)


def _fit(logits, labels, inverse=False, low=-4.0, high=4.0):
    z = logits.double() - logits.double().mean(1, keepdim=True)
    right = z.gather(1, labels[:, None]).squeeze(1)
    for _ in range(60):  # the slope of the likelihood by 1/T has one zero
        middle = (low + high) / 2
        if ((F.softmax(z * math.exp(-middle), 1) * z).sum(1) - right).mean() < 0:
            high = middle
        else:
            low = middle
    return math.exp(-middle if inverse else middle)


def _answers(rng):
    mixed = torch.tensor([0.4, 5.0]).repeat(200)[:, None]  # where no T is right, other scores than likelihood differ
    # The T's to be found lie between the points of grids that are too coarse (below).
    for classes, T, found in ((10, 2.5, 10 ** (40 / 99)), (3, 0.5, 10 ** (-80 / 99)), (5, mixed, 10 ** (52 / 99))):
        logits = 3 * draw(rng, 400, classes)
        drawn = [rng.choice(classes, p=row / row.sum()) for row in F.softmax(logits.double() / T, 1).numpy()]
        labels = torch.tensor(np.array(drawn))
        yield logits * found / _fit(logits, labels), labels


def _best_of(tried, loss=lambda z, T, labels: F.cross_entropy(z / T, labels)):
    return lambda logits, labels: min(tried.tolist(), key=lambda T: float(loss(logits, T, labels)))


def _ece(probabilities, labels, bins, equal=False, signed=False, of_label=False, last=1, power=1):
    confidence, said = probabilities.double().max(1)
    if of_label:
        confidence = probabilities.double().gather(1, labels[:, None]).squeeze(1)
    place = (confidence * bins).ceil().clamp(1, bins) * torch.where(confidence == 1, last, 1)
    right, gaps, shares = (said == labels).double(), [], []
    for b in range(1, bins + 1):
        if (here := place == b).any():
            gaps.append(float((right[here] - confidence[here]).mean()))
            shares.append(float(here.double().mean()))
    shares = [1 / len(gaps)] * len(gaps) if equal else shares
    return sum(share * (gap if signed else abs(gap) ** power) for gap, share in zip(gaps, shares, strict=True))


def _sure_and_unsure(rng):
    for images, classes, bins in ((200, 10, 15), (60, 2, 5), (1, 4, 10)):
        rows = F.softmax(3 * draw(rng, images, classes), 1)
        rows[: images // 10] = torch.eye(classes)[0]  # a confidence of exactly 1
        # Right as often where it is sure as where it is not: gaps of both signs, which depend on the bins.
        right = torch.tensor(rng.random(images) < 0.7)
        yield rows, torch.where(right, rows.argmax(1), torch.tensor(rng.integers(0, classes, images))), bins


_CHAPTER_04 = [
    Task("softmax_t", _softmax, "a tensor of the logits' shape", "1 to 3 dimensions, T 0.5 to 4, logits of ±10,000.",
         lambda rng: [(torch.tensor([2.0, 1.0, 0.0]), 2.0), (draw(rng, 4, 10), 4.0), (draw(rng, 2, 3, 5), 0.5),
         (1e4 * draw(rng, 6, 5), 1.0), (draw(rng, 1, 7).double(), 3.0)], {
        "T divides the logits, it does not multiply them: a high T makes the answer softer.": dict(power=1),
        "T has no effect.": dict(power=0),
        "T divides the logits, *before* the exponential; these rows do not add up to 1.": dict(after=True),
        "exp() of a logit of 10,000 is infinite: take the largest of the row away first.": dict(steady=False),
        "The sums run over the images; the classes are the last dimension.": dict(dim=0),
    }, observe=_by_hand),
    Task("soft_target_loss", _soft, "a tensor with a gradient",
         "2 to 10 classes, T from 0.5 to 4, logits of some hundreds; value and gradient.", _logits, _SOFT_FAULTS | {
        "That is the sum over the images; their mean is asked for.": dict(reduction="sum"),
        "The value is right, but no gradient reaches the student.": dict(part=lambda loss: loss.item()),
    }, observe=with_gradient),
    Task("t_squared_gradient", _slope, "a tensor of the logits' shape", "2 to 10 classes, 1 to 6 images, T 0.5 to 4.",
         lambda rng: _logits(rng, large=False), {
        "That is the gradient of KL alone: T² is missing.": dict(power=-1),
        "T² times 1/T is T: z / T has a slope of its own.": dict(power=2),
        "T cancels only if the gap itself is taken at T = 1; there is a factor T left.": dict(power=0),
        "The sign is wrong: a student that says too much has to say less.": dict(sign=-1),
        "The loss is a mean over images: divide by how many there are.": dict(images=False),
        "Both distributions are softened by T.": dict(soft=False),
    }),
    Task("fit_temperature", _fit, "a number above 0", "networks too sure, not sure enough, and both.", _answers, {
        "That is 1 / T.": dict(inverse=True),
        "That is T = 1, whatever the labels say.": lambda logits, labels: 1.0,
        "T below 1 is never tried: an underconfident network needs it.": dict(low=0.0),
        "The search ends too early: a network may need more than 2.": dict(high=math.log(2)),
        "These steps are too coarse: two per cent are asked for, also where T is small.": [
            _best_of(torch.logspace(-1, 1, 100)), *(_best_of(torch.linspace(0.1, 10, n)) for n in (100, 1000))],
        "`F.cross_entropy` takes logits, softmax is in it: you take it twice.": _best_of(
            torch.logspace(-1, 1, 300), lambda z, T, labels: F.cross_entropy(F.softmax(z / T, 1), labels)),
        "Accuracy is the same at every T, so that is the first one tried: take the likelihood.": lambda z, labels: 0.1,
    }, tolerance=0.02),
    Task("ece", _ece, "a number", "1 to 200 images, 5 to 15 bins, empty ones, a confidence of 1.", _sure_and_unsure, {
        "Every bin weighs the same here: weigh it by how many images it holds.": dict(equal=True),
        "Gaps of opposite sign cancel: take each bin's magnitude before you add.": dict(signed=True),
        "Confidence is the largest probability, not the one of the right class.": dict(of_label=True),
        "A confidence of exactly 1 falls out of the last bin.": dict(last=0),
        "That adds squares of the gaps.": dict(power=2),
        "An empty bin has no mean: 0 / 0 is NaN. Leave it out.": lambda probabilities, labels, bins: math.nan,
    }),
]  # fmt: skip

# --- 05: distillation -------------------------------------------------------------------------------------------------


def _kd(student_logits, teacher_logits, labels, temperature, alpha, hard=1.0, **fault):
    ce = F.cross_entropy(student_logits / (temperature if hard is None else hard), labels)
    return (1 - alpha) * ce + alpha * _soft(student_logits, teacher_logits, temperature, **fault)


def _lessons(rng):
    alphas = (0.7, 0.5, 0.0, 1.0, 0.9)
    for (student, teacher, T), alpha in zip(_logits(rng), alphas, strict=True):
        yield student, teacher, torch.tensor(rng.integers(0, student.shape[1], len(student))), T, alpha


def _bug(name, **fault):
    def loss(student, teacher, temperature):
        return _soft(student, teacher, temperature, **fault)

    loss.__doc__ = f"the one with {name!r}" if fault else "the sound one"
    return name, loss


_BUGS = dict([_bug("none"), _bug("no T²", power=0), _bug("swapped", swap=True), _bug("teacher twice", twice=True),
              _bug("mean over classes", reduction="mean")])  # fmt: skip


def _diagnose(loss, always=None, T=2.0):
    student, teacher = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[3.0, 0.5, 0.0]])
    found = {name: float(known(student, teacher, T)) for name, known in _BUGS.items()}
    return always or min(found, key=lambda name: abs(found[name] - float(loss(student, teacher, T))))


def _hint(student, teacher, adapter, join=torch.mean, power=2, adapt=lambda a: a):
    return join((student @ adapt(adapter).T - teacher).abs() ** power)


def _maps(student, teacher, energy=torch.square, length=2, dim=1, each=torch.sum, normalize=F.normalize):
    maps = [energy(f).mean(1).flatten(1) for f in (student, teacher)]
    student, teacher = (normalize(m, p=length, dim=dim) if length else m for m in maps)
    return each((student - teacher) ** 2, dim=1).mean()


def _features(rng):
    for images, channels, more, height, width in ((2, 3, 5, 4, 4), (1, 4, 4, 2, 3), (5, 2, 8, 3, 3)):
        teacher = 2 * draw(rng, images, more, height, width)
        student = draw(rng, images, channels, height, width)
        teacher[1:2] *= images != 5  # an image on which the teacher is dead, and one on which the student is
        student[3:4] *= images != 5
        yield student, teacher


def _budget(taught, alone, margin, paired=True, by="low", order=sorted):
    for labels in order(alone):
        low, high = interval(alone[labels], taught, paired=paired)
        shown = {"low": low > -margin, "mean": low + high > -2 * margin, "zero": low < 0 < high, "above": low > 0}
        if shown[by]:
            return labels
    return None


_GAPS = (  # (alone − taught, scatter) for each number of labels, and the margin
    (((-8, 0.4), (-3, 6), (-0.6, 0.5), (-0.2, 0.4)), 1.0),
    (((-5, 1), (-3, 9), (-1.9, 2)), 2.0),
    (((-5, 1), (15, 1), (16, 1)), 0.5),
    (((-0.2, 0.1), (15, 1)), 9.0),
)


def _score_rows(rng):
    for gaps, margin in _GAPS:
        taught, alone = rng.normal(94, 3, 8), {}
        for labels, (gap, scatter) in zip((50, 100, 200, 400), gaps, strict=False):
            noise = rng.normal(size=8)
            alone[labels] = taught + gap + scatter * (noise - noise.mean()) / noise.std(ddof=1)
        yield taught, dict(reversed(alone.items())), margin


_CHAPTER_05 = [
    Task("kd_loss", _kd, "a tensor with a gradient",
         "2 to 10 classes, T from 0.5 to 4, α from 0 to 1; value and gradient.", _lessons, _SOFT_FAULTS | {
        "α and 1 − α are swapped: here α weighs the soft term.": lambda s, t, y, T, a: _kd(s, t, y, T, 1 - a),
        "The labels' term is at T as well; cross-entropy is always at T = 1.": dict(hard=None),
        "The labels' term is not weighed.": lambda s, t, y, T, a: F.cross_entropy(s, y) + a * _soft(s, t, T),
        "The value is right, but no gradient reaches the student.": lambda *given: _kd(*given).item(),
    }, observe=with_gradient),
    Task("find_the_bug", _diagnose, "one of the five names", "one sound loss and four with a bug each, told apart.",
         lambda rng: [(list(_BUGS.values())[i],) for i in (0, *(1 + rng.permutation(4)).tolist())], {
        "You call every one sound.": dict(always="none"),
        "At T = 1 a missing T² cannot be seen: try another temperature.": dict(T=1.0),
    }),
    Task("hint_loss", _hint, "a tensor with a gradient", "adapters of three shapes; value and both gradients.",
         lambda rng: [(draw(rng, n, s), draw(rng, n, t), draw(rng, t, s)) for n, s, t in ((5, 3, 4), (3, 4, 4))], {
        "That is the sum; the mean over images and features is asked for.": dict(join=torch.sum),
        "The paper halves it; here the mean is asked for, without a half.": dict(join=lambda e: e.mean() / 2),
        "That is the mean over features of the *sum* over images.": dict(join=lambda e: e.mean(1).sum()),
        "The adapter is turned round: it is [teacher's, student's], as in nn.Linear.": dict(adapt=lambda a: a.T),
        "These are magnitudes; squares are asked for.": dict(power=1),
        "The value is right, but no gradient reaches the adapter.": dict(adapt=lambda a: a.detach()),
    }, observe=partial(with_gradient, at=(0, 2))),
    Task("attention_map_loss", _maps, "a tensor with a gradient",
         "other numbers of channels, one image, a dead teacher, a dead student; value and gradient.", _features,
         {
        "The maps are not scaled to length 1: a louder network is not a better one.": dict(length=0),
        "The maps are scaled to sum 1; length 1 is asked for, the root of the sum of squares.": dict(length=1),
        "The scaling runs over the images; each image's own map has length 1.": dict(dim=0),
        "Channels are averaged with their signs and cancel: square them first.": dict(energy=torch.clone),
        "These are magnitudes; squares are asked for.": dict(energy=torch.abs),
        "That is the mean over the positions; their sum is asked for.": dict(each=torch.mean),
        "Where the student is dead the value is 0, its gradient NaN (0 / 0, or the root of 0): divide by a safe "
        "number, do not repair afterwards.": dict(
            normalize=lambda m, p, dim: (m / m.norm(dim=dim, keepdim=True)).nan_to_num()),
    }, observe=with_gradient),
    Task("label_budget", _budget, "a number of labels, or None", "budgets that suffice, and that do not.", _score_rows,
         {
        "That compares means; the *whole* interval has to lie above −margin.": dict(by="mean"),
        "\"No difference seen\" is not \"no difference\": a wide interval contains 0 easily.": dict(by="zero"),
        "That takes the two rows as unrelated; they come in pairs, replica by replica.": dict(paired=False),
        "That asks for more than the teacher gives; `margin` points less are allowed.": dict(by="above"),
        "That takes the dictionary as it was filled; the *smallest* number is asked for.": dict(order=list),
    }),
]  # fmt: skip

# --- 06: trade-offs ---------------------------------------------------------------------------------------------------


def _front(costs, gains, better=lambda c, g: c <= 0 and g >= 0 and (c < 0 or g > 0), sign=1):
    points = [(sign * float(c), float(g)) for c, g in zip(costs, gains, strict=True)]
    others = [(i, [points[j] for j in range(len(points)) if j != i]) for i in range(len(points))]
    return [not any(better(c - points[i][0], g - points[i][1]) for c, g in rest) for i, rest in others]


def _points(rng):
    yield [1, 2, 3, 3, 2], [90.0, 95.0, 95.0, 99.0, 95.0]
    yield [5, 5, 7], [80.0, 85.0, 85.0]
    for count in (1, 12):
        yield rng.integers(1, 9, count).tolist(), rng.integers(80, 99, count).astype(float).tolist()


def _best(models, budget, key=lambda m: m["val"], fits=lambda size, most: size <= most):
    return max((m for m in models if fits(m["bytes"], budget)), key=key, default={"name": None})["name"]


def _candidates(rng):
    names = ("dense", "pruned", "int8", "4 bits", "distilled")
    val, test = (96.0, 95.5, 95.9, 93.0, 94.0), (95.0, 96.4, 95.2, 94.0, 94.5)
    columns = zip(names, (200, 60, 50, 28, 9), val, test, strict=True)
    rows = [dict(zip(("name", "bytes", "val", "test"), row, strict=True)) for row in columns]
    for budget in (60, 50, 20, 5, 500, int(rng.integers(30, 49))):
        yield [rows[i] for i in rng.permutation(5)], budget


def _lost(labels, before, after, hit=lambda was, now, images: was - now, truth=0, among=(0, 0), gaps=False, worst=None):
    given = labels, before, after
    right = [(answers == given[truth]).double() for answers in (before, after)]
    classes = range(int(labels.max()) + 1) if gaps else labels.unique().tolist()
    shares = [[r[given[a] == c].mean() for r, a in zip(right, among, strict=True)] for c in classes]
    falls = [float(hit(*pair, (labels == c).sum())) for c, pair in zip(classes, shares, strict=True)]
    return classes[worst(falls) if worst else falls.index(max(falls))]


def _said(rng):
    """Class 1 loses most, 0 the most images, 4 most of what it had; 2 is bad and restless, 5 gains, 3 has no image."""
    few, rows = ("447799999", "497799977", "947449474"), ("00011222444555", "00111200440500", "05114240400550")
    few, rows = (torch.tensor([[int(c) for c in answers] for answers in each]) for each in (few, rows))
    yield tuple(few)
    images = torch.tensor([82, 13, 5, 6, 4, 1, 16, 3, 3, 9, 18, 4, 5, 1])
    yield tuple((rows.repeat_interleave(images, 1) + int(rng.integers(3)))[:, torch.tensor(rng.permutation(170))])


@cache
def dense_networks():
    """Four trained LeNet-300-100 and the data, each network with its own split: what ``compress_to`` is tried on."""
    from course_lib.lab.data import load_replicas
    from course_lib.lab.models import build_model

    data = load_replicas("digits", 4)
    models = [build_model("lenet300", data.input_shape, data.num_classes, seed=r) for r in range(4)]
    for seed, (model, split) in enumerate(zip(models, data.train, strict=True)):
        order, weights = torch.Generator().manual_seed(seed), list(model.parameters())
        for rows in torch.cat([torch.randperm(len(split), generator=order) for _ in range(6)]).split(32):
            loss = F.cross_entropy(model(split.images[rows]), split.labels[rows])
            for weight, slope in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.data.mul_(0.9999).sub_(0.3 * slope)  # by hand: importing an optimiser takes seconds
    return models, data


def _judge_compressed(compress_to):
    """Each network is compressed, written, read back, and scored on its own test images."""
    from course_lib.evidence.measure import stored_bytes
    from course_lib.evidence.statistics import difference
    from course_lib.gate import chain_steps
    from course_lib.lab.training import accuracy
    from course_lib.methods.coding import load_compressed, save_compressed

    (dense, data), decoded, sizes = dense_networks(), [], []
    with tempfile.TemporaryDirectory() as folder:
        for model, train in zip(dense, data.train, strict=True):
            small = compress_to(copy.deepcopy(model), train, data.val)
            if not isinstance(small, nn.Module):
                raise NotImplementedError(f"It returned {small!r:.40}")
            chain_steps(small)  # everything that the network knows has to be in its file
            sizes.append(save_compressed(small, Path(folder) / "network"))
            decoded.append(load_compressed(Path(folder) / "network", copy.deepcopy(small)))
    size, whole = max(sizes), stored_bytes(dense[0])
    cost = difference(accuracy(decoded, data.test), accuracy(dense, data.test))
    told = f"{size:,} bytes, {whole / size:.1f} times smaller, {cost} over {len(dense)} networks"
    if not cost > -2:
        return False, f"{told}: the whole interval has to lie above −2 points."
    if size > whole / 10:
        return False, f"{told}: a tenth is asked for, {whole // 10:,} bytes or fewer."
    return True, f"{told}. {_leaderboard(size, str(cost))}"


def _leaderboard(size: int, cost: str) -> str:
    """Keeps one's own attempts in a file of the course's cache, and tells the best."""
    attempts, path = [], cache_folder("practice", own=True) / "compress_to.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        attempts = [{"bytes": int(a["bytes"]), "cost": str(a["cost"])} for a in json.loads(path.read_text("utf-8"))]
    attempts = sorted([*attempts, {"bytes": size, "cost": cost}], key=lambda a: a["bytes"])
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(attempts, ensure_ascii=False, indent=1).encode())
    return f"The best of your {len(attempts)} attempts has {attempts[0]['bytes']:,} bytes ({path.name} keeps them)."


_CHAPTER_06 = [
    Task("pareto_front", _front, "True or False for each point", "equal points, equal costs, one point alone.", _points,
         {
        "Worse in one and equal in the other is beaten, too.": dict(better=lambda c, g: c < 0 and g > 0),
        "Two equal points do not beat each other: both stay.": dict(better=lambda c, g: c <= 0 and g >= 0),
        "That is the front for costs of which more is better.": dict(sign=-1),
        "Only the best gain is left: a cheaper point with less gain counts, too.": dict(better=lambda c, g: g > 0),
        "No point is left: each is compared with itself, too, and beats itself.": lambda c, g: [False] * len(c),
    }),
    Task("best_under_budget", _best, "a name, or None", "budgets for all, for none, and met exactly.", _candidates, {
        "That chooses on test images; a choice is made on validation.": dict(key=lambda m: m["test"]),
        "A model of exactly `budget` bytes fits.": dict(fits=lambda size, most: size < most),
        "The budget is not used.": dict(fits=lambda size, most: True),
        "That is the smallest model; the best one that fits is asked for.": dict(key=lambda m: -m["bytes"]),
        "That is the largest model that fits, not the best.": dict(key=lambda m: m["bytes"]),
    }),
    Task("worst_hit_class", _lost, "a class, a whole number", "classes of all sizes, one that gains.", _said, {
        "It lost most *images*: take shares, classes differ in size.": dict(hit=lambda w, n, k: (w - n) * k),
        "That is the class with the worst accuracy afterwards; it was as bad before.": dict(hit=lambda w, n, k: -n),
        "That is the class that gained most.": dict(hit=lambda w, n, k: n - w),
        "That is the largest change in either direction: a gain is no hit.": dict(hit=lambda w, n, k: abs(w - n)),
        "That is a share of what the class had: take points, before − after.": dict(hit=lambda w, n, k: 1 - n / w),
        "Most *changed* answers, that is churn: from wrong to otherwise wrong nothing is lost.": dict(truth=1),
        "You take the images that were *answered* c (precision); take those *labelled* c.": [
            dict(among=(1, 2)), dict(among=(1, 1))],
        "A number without images is no class: its accuracy is 0 / 0, NaN. Go through labels.unique().": [
            dict(gaps=True), dict(gaps=True, worst=np.argmax)],
    }),
    Task("compress_to", lambda model, train, val: model, "a network", "", judged=_judge_compressed),
]  # fmt: skip

TASKS = EARLIER | {task.name: task for task in _CHAPTER_04 + _CHAPTER_05 + _CHAPTER_06}
"""Every task of the course by its name, in order."""
