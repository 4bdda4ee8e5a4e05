"""The tasks of chapters 01 to 03: sizes and intervals, pruning, quantization.

Each has a right answer of a few lines, written apart from the library, whose keywords make the usual mistakes; and
cases that tell these from it. To add one: a ``Task`` here, its cells in ``notebooks/solutions/``, ``make practice``.
"""

import heapq
import math
from itertools import pairwise

import numpy as np
import torch
from scipy.special import stdtrit  # Student's quantile, without the seconds that scipy.stats takes
from torch import Tensor

from course_lib.classroom.answers import Task, with_gradient

__all__ = ["TASKS", "draw", "interval"]


def draw(rng: np.random.Generator, *shape: int) -> Tensor:
    """Normal numbers, float32."""
    return torch.tensor(rng.standard_normal(shape), dtype=torch.float32)


# --- 01: sizes and intervals ------------------------------------------------------------------------------------------


def _macs(widths, biases=0, times=1, layers=None, join=sum):
    return join([times * a * b + biases * b for a, b in pairwise(widths)][:layers])


def interval(a, b, paired=True, ddof=1, quantile=None, root=True, level=0.95, sign=1, ends=lambda m, h: (m - h, m + h)):
    """Student's interval of the mean of a − b."""
    a, b = sign * np.asarray(a, dtype=float), sign * np.asarray(b, dtype=float)
    spread = (a - b).std(ddof=ddof) if paired else math.hypot(a.std(ddof=1), b.std(ddof=1))
    half = (quantile or stdtrit(len(a) - 1, (1 + level) / 2)) * spread / (math.sqrt(len(a)) if root else 1)
    return ends((a - b).mean(), half)


def _scores(rng):
    for seeds in (3, 8, 24):
        luck = rng.normal(95, 2, seeds)  # what a seed does to both: pairing takes it out
        a, b = luck + rng.normal(1, 0.3, seeds), luck + rng.normal(0, 0.3, seeds)
        yield (a, b) if seeds > 3 else (a.tolist(), b.tolist())


def _seeds(spread, gain, quantile=None, level=0.95, whole=1, less=0):
    seeds = 2
    while (quantile or stdtrit(seeds - 1, (1 + level) / 2)) * whole * spread / math.sqrt(seeds) > gain:
        seeds += 1
    return seeds - less


def _break_even(rows, columns, equal=1, shared=None):
    return (rows * columns - equal) // (shared(rows, columns) if shared else rows + columns)


_CHAPTER_01 = [
    Task("count_macs_linear", _macs, "a whole number", "networks of one to four layers, biases not counted.",
         lambda rng: [([64, 300, 100, 10],), ([100, 10],), ([7, 1, 9],), (rng.integers(2, 99, 5).tolist(),)], {
        "That counts the biases too: they are added, nothing is multiplied by them.": dict(biases=1),
        "That counts multiplications and additions apart: one of each is one MAC.": dict(times=2),
        "That is the first layer alone.": dict(layers=1),
        "The last layer is missing.": dict(layers=-1),
        "The layers' products are added, not multiplied.": dict(join=math.prod),
    }),
    Task("paired_interval", interval, "a pair (low, high)", "3, 8 and 24 pairs, as lists and as arrays.", _scores, {
        "That is for two unrelated rows: take the differences first, seed by seed.": dict(paired=False),
        "1.96 is for many seeds: Student's t with R − 1 degrees of freedom is wider.": dict(quantile=1.96),
        "That is how far *one* difference scatters: the mean of R scatters √R times less.": dict(root=False),
        "The standard deviation of a sample divides by R − 1 (ddof=1), not by R.": dict(ddof=0),
        "That is b − a: the sign is swapped.": dict(sign=-1),
        "2.5 % have to lie on each side: you left 5 % on each.": dict(level=0.9),
        "Mean and half width: the two ends are asked for, mean − half, mean + half.": dict(ends=lambda m, h: (m, h)),
        "The ends are swapped: the low one comes first.": dict(ends=lambda m, h: (m + h, m - h)),
    }, slack=1e-3),
    Task("seeds_needed", _seeds, "a whole number", "from 2 seeds to several hundred.",
         lambda rng: [(1.0, 0.5), (1.0, 0.1), (1.0, 1.0), (1.0, 2.0), (0.1, 5.0), (float(rng.uniform(1, 2)), 0.45)], {
        "1.96 is too small for few seeds. Student's t depends on R: try R = 2, 3, 4, …": dict(quantile=1.96),
        "The quantile is missing: that asks for one standard error, not for 95 %.": dict(quantile=1),
        "2.5 % have to lie on each side: you left 5 % on each.": dict(level=0.9),
        "That makes the whole interval as short as the gain; half of it is asked for.": dict(whole=2),
        "One too few: that is the last R which is not enough.": dict(less=1),
    }),
    Task("break_even_rank", _break_even, "a whole number", "wide, tall, square and very thin layers.",
         lambda rng: [(300, 64), (4, 4), (6, 3), (1, 7), tuple(rng.integers(20, 400, 2).tolist())], {
        "At that rank the two factors hold just as many numbers: fewer are asked for.": dict(equal=0),
        "That is the largest rank there is; at it two factors hold more, not less.": dict(equal=0, shared=max),
        "That counts one factor alone: there are rows · r and r · columns numbers.": dict(shared=max),
    }),
]  # fmt: skip

# --- 02: pruning ------------------------------------------------------------------------------------------------------


def _threshold(weight, alpha, size=torch.abs, largest=lambda w: w.abs().max(), beyond=torch.gt):
    return beyond(size(weight), alpha * largest(weight))


def _rank(weight, sparsity, size=torch.abs, count=round, keep=True, rows=False, ties=False):
    if rows:
        return torch.stack([_rank(row, sparsity) for row in weight]) if weight.dim() > 1 else _rank(weight, sparsity)
    score = size(weight).flatten()
    gone = count(sparsity * len(score))
    mask = score.argsort(stable=True).argsort() >= gone  # places in the order; of equals, the first goes first
    if ties and gone:
        mask = score > score.kthvalue(gone).values
    return mask.view(weight.shape) == keep


_SIX = torch.tensor([0.9, -0.8, 0.1, -0.3, 0.5, -0.05])
_EQUAL = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 2.0]])


def _weights(rng):
    """Weights of all kinds, with a share that suits each."""
    uneven = draw(rng, 4, 5) * torch.tensor([[0.1], [1.0], [3.0], [0.5]])
    negative = -draw(rng, 2, 3, 2, 2).abs() - 0.1
    some = [(_SIX, 0.5), (uneven, 0.3), (negative, 0.6), (draw(rng, 3, 7).T, 0.25), (draw(rng, 9).double(), 0.3)]
    return [*some, (torch.tensor([-4.0, -3.0, -2.0, -1.0]), 0.5), (torch.tensor([0.0, 2.0, -1.0, 0.0]), 0.0)]


def _same_magnitudes(got, expected, weight, sparsity):
    """Of equal magnitudes any may go."""
    got = torch.as_tensor(got)
    fits = got.dtype is torch.bool and got.shape == weight.shape
    return fits and torch.equal(*(weight[mask].abs().sort().values for mask in (got, expected)))


def _hold(masks, keep=True, steps=99, layers=None, change=lambda parameters, name, mask: parameters[name].mul_(mask)):
    def after_step(parameters, step):
        for name, mask in list(masks.items())[:layers]:
            if step < steps:
                change(parameters, name, mask == keep)

    return after_step


def _train(hold, masks, start):
    """Eight steps of an optimiser with momentum; ``hold(masks)`` is called after each."""
    weights = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    after_step, velocity, seen = hold(masks), 0.0, {name: [] for name in start}
    for step in range(8):
        velocity = 0.9 * velocity + 1.0 + step  # by hand: importing an optimiser takes seconds
        for weight in weights.values():
            weight.grad = torch.full_like(weight, 1.0 + step)
            weight.data -= 0.1 * velocity
        with torch.no_grad():
            after_step(dict(weights), step)
        for name, weight in weights.items():
            seen[name].append(weight.detach().clone())
    return {name: torch.stack(each) for name, each in seen.items()}


def _networks(rng):
    for layers in (["fc0"], ["fc0", "fc1"]):
        start = {}
        for layer in [*layers, "last"]:
            start |= {f"{layer}.weight": draw(rng, 4, 3), f"{layer}.bias": draw(rng, 4)}
        yield {f"{layer}.weight": draw(rng, 4, 3) > 0.2 for layer in layers}, start


def _cubic(step, steps, final, power=3, most=1, slow=False, left=False):
    done = min(step / steps, most)
    sparsity = final * (done**power if slow else 1 - (1 - done) ** power)
    return 1 - sparsity if left else sparsity


def _rewound(initial, trained, sparsity, ranked=lambda i, t: t, values=lambda i, t: i, **fault):
    return values(initial, trained) * _rank(ranked(initial, trained), sparsity, **fault)


def _trainings(rng):
    yield torch.tensor([0.3, -0.1, 0.2, -0.4]), torch.tensor([0.9, -0.2, 0.1, -0.8]), 0.5
    yield from ((draw(rng, *trained.shape), trained, sparsity) for trained, sparsity in _weights(rng))


def _cut(weight, bias, following, keep):
    return weight[keep], bias[keep], following[:, keep]


def _neurons(rng):
    for hidden, inputs, outputs, kept in ((5, 3, 2, 3), (4, 4, 4, 2), (6, 2, 5, 1), (3, 4, 2, 3)):
        keep = torch.zeros(hidden, dtype=torch.bool)
        keep[torch.tensor(rng.permutation(hidden)[:kept])] = True
        yield draw(rng, hidden, inputs), draw(rng, hidden), draw(rng, outputs, hidden), keep


def _csr(weight, column=2, starts=1, kept=torch.Tensor.bool):
    return (4 + column) * int(kept(weight).sum()) + (4 * (len(weight) + starts) if starts is not None else 0)


def _sparse(rng):
    some_rows = draw(rng, 6, 4) * torch.tensor([[1.0], [0.0], [1.0], [0.0], [0.0], [1.0]])
    few = draw(rng, 7, 20) * (draw(rng, 7, 20) > 0.8)
    return [(torch.tensor([[0.0, 1.5, 0, 1e-9], [0, 0, 0, -2.5]]),), (some_rows,), (torch.zeros(3, 5),), (few,)]


def _suspect(told, change=False, **fault):
    def prune(weight, sparsity):
        mask = _rank(weight, sparsity, **fault)
        if change:
            weight *= mask
        return mask

    prune.__doc__ = told
    return prune


_SUSPECTS = (
    _suspect("one that is sound"),
    _suspect("the one that keeps large positive weights and no negative ones", size=torch.clone),
    _suspect("the one that prunes all equals of its threshold", ties=True),
    _suspect("the one that ranks each row by itself", rows=True),
    _suspect("the one that rounds down how many go", count=math.floor),
    _suspect("the one that keeps the smallest", size=lambda w: -w.abs()),
    _suspect("the one whose mask is right, and that prunes your weights on the way", change=True),
)
_UNEVEN = torch.tensor([[0.1, -0.2, 0.3, 0.4, 0.5], [-10.0, 20.0, 30.0, 40.0, 50.0]])


def _is_sound(prune, tries=((_EQUAL, 0.5), (_UNEVEN, 0.5), (_UNEVEN, 0.28)), always=None):
    for weight, sparsity in tries:
        given = weight.clone()
        mask = prune(given, sparsity)
        kept, gone = weight[mask].abs(), weight[~mask].abs()
        if always is None and not (len(gone) == round(sparsity * weight.numel()) and gone.max() <= kept.min()):
            return False
        if always is None and not torch.equal(given, weight):
            return False
    return always is not False


_CHAPTER_02 = [
    Task("threshold_mask", _threshold, "a bool tensor", "weights of both signs, ties, zeros, a convolution.",
         lambda rng: [*_weights(rng), (torch.zeros(2, 3), 0.3)], {
        "This mask keeps every positive weight and no negative one: sign is not size.": dict(size=torch.sign),
        "This mask keeps large *positive* weights: a large negative one is worth as much.": dict(size=torch.clone),
        "The threshold comes from the largest weight: take the largest magnitude.": dict(largest=torch.max),
        "A weight exactly at the threshold goes: the formula says >, not ≥.": dict(beyond=torch.ge),
        "The threshold is α itself; it should be α times the largest magnitude.": dict(largest=lambda w: 1.0),
        "Each row has its own threshold; one for the whole tensor is asked for.": dict(
            largest=lambda w: w.abs().amax(-1, keepdim=True)),
        "Upside down: True is for the weights that stay.": dict(beyond=torch.le),
        "This prunes the share α by rank: a threshold does not know how many go.": _rank,
    }),
    Task("rank_mask", _rank, "a bool tensor", "both signs, ties, zeros, a convolution, shares from 0 to 95 %.",
         lambda rng: [*_weights(rng), (draw(rng, 10, 10), 0.29), (_EQUAL, 0.5), (draw(rng, 6), 0.95)], {
        "This mask keeps large *positive* weights: large negative ones go first.": dict(size=torch.clone),
        "Upside down: it keeps the smallest.": dict(size=lambda w: -w.abs()),
        "True and False are swapped: True is for what stays.": dict(keep=False),
        "`sparsity` is the share that goes, not what stays.": lambda weight, sparsity: _rank(weight, 1 - sparsity),
        "Each row is ranked by itself; all weights are to be ranked together.": dict(rows=True),
        "The number that goes is rounded down; round it.": dict(count=math.floor),
        "Of weights equal to the threshold all go: sort, or count how many may.": dict(ties=True),
        "That is a share of the largest weight: how many go is then a matter of luck.": _threshold,
    }, same=_same_magnitudes),
    Task("hold_zeros", _hold, "a function after_step(parameters, step)",
         "8 steps of an optimiser with momentum; what was masked is zero, everything else moved.", _networks, {
        "Nothing was held at zero: the weights in the dictionary have to change, in place; a new tensor or a masked "
        "gradient does not do it (momentum).": dict(change=lambda p, name, mask: None),
        "Not every weight has a mask: go through `masks`.": lambda masks: lambda p, _: [p[n].mul_(masks[n]) for n in p],
        "Upside down: the weights that should stay are zero. True is for what stays.": dict(keep=False),
        "The zeros hold for one step only: after_step is called after every one.": dict(steps=1),
        "Only the first mask is used: there are several layers.": dict(layers=1),
    }, observe=_train),
    Task("cubic_sparsity", _cubic, "a number", "the start, the way, the end, and beyond.",
         lambda rng: [(2, 4, 0.8), (0, 10, 0.9), (10, 10, 0.9), (15, 10, 0.95), (int(rng.integers(1, 9)), 10, 0.5)], {
        "That is a straight line: the cube prunes fast at first and slowly at the end.": dict(power=1),
        "The cube is at the wrong end: this starts slowly and ends fast.": dict(slow=True),
        "Beyond the last step it goes on: from there it should stay at `final`.": dict(most=99),
        "A square where a cube is asked for.": dict(power=2),
        "It ends at 1, whatever `final` is.": lambda step, steps, final: _cubic(step, steps, 1.0),
        "That is the share that is *left*.": dict(left=True),
    }),
    Task("rewound", _rewound, "a tensor of the weight's shape", "both signs, a convolution, shares from 0 to 60 %.",
         _trainings, {
        "These are the trained values: a ticket has those that the weights began with.": dict(values=lambda i, t: t),
        "The mask comes from the end of training: rank the trained weights.": dict(ranked=lambda i, t: i),
        "Upside down: the weights that should stay are zero.": dict(keep=False),
        "Magnitudes are ranked: a large negative weight is worth as much.": dict(size=torch.clone),
        "Each row is ranked by itself; all weights are to be ranked together.": dict(rows=True),
        "`sparsity` is the share that goes, not what stays.": lambda i, t, sparsity: _rewound(i, t, 1 - sparsity),
        "Nothing is zero: the values are the initial ones, the mask is missing.": lambda i, t, sparsity: i,
    }),
    Task("cut_neurons", _cut, "a triple (weight, bias, following)",
         "layers of four shapes, with one neuron left up to all.", _neurons, {
        "The next layer still reads every neuron: its columns have to go too.": lambda w, b, f, k: (w[k], b[k], f),
        "The next layer lost rows, its own neurons: columns read the cut ones.": lambda w, b, f, k: (w[k], b[k], f[k]),
        "The biases of the cut neurons are still there.": lambda w, b, f, k: (w[k], b, f[:, k]),
        "Upside down: `keep` says which neurons stay.": lambda w, b, f, k: (w[~k], b[~k], f[:, ~k]),
        "They are zero, but still there: take them out.": lambda w, b, f, k: (w * k[:, None], b * k, f * k),
        "The first layer lost columns, its inputs; its neurons are rows.": lambda w, b, f, k: (w[:, k], b[k], f[:, k]),
    }),
    Task("csr_bytes", _csr, "a whole number", "empty rows, negative numbers, tiny ones, nothing but zeros.", _sparse, {
        "Where the values lie has to be stored too: a column of 2 bytes for each.": dict(column=0),
        "There is one row start more than rows: the last says where everything ends.": dict(starts=0),
        "The row starts are missing.": dict(starts=None),
        "A column takes 2 bytes here, not 4.": dict(column=4),
        "That is the dense tensor: zeros are not stored.": lambda weight: 4 * weight.numel(),
        "Negative weights are not zero: count what differs from 0.": dict(kept=lambda w: w > 0),
        "That stores the zeros: count the others.": dict(kept=lambda w: w == 0),
        "Tiny is not zero: everything that differs from 0 is stored.": dict(kept=lambda w: w.abs() > 1e-6),
    }),
    Task("spot_the_fault", _is_sound, "True or False", "one sound function and six broken ones, told apart.",
         lambda rng: [(_SUSPECTS[i],) for i in (0, *(1 + rng.permutation(6)).tolist())], {
        "You call every one sound: try both signs, equal weights, rows of different size.": dict(always=True),
        "You call every one broken: one of the seven does what it should.": dict(always=False),
        "You tried positive weights only, all different: what do these functions do with others?": dict(
            tries=[(torch.tensor([0.3, 0.1, 0.7, 0.5]), 0.5)]),
    }),
]  # fmt: skip

# --- 03: quantization -------------------------------------------------------------------------------------------------


def _qparams(low, high, bits, points=-1, widen=True, rounding=round, sign=-1):
    low, high = (min(low, 0.0), max(high, 0.0)) if widen else (low, high)
    scale = (high - low) / (2**bits + points) or 1.0
    return scale, rounding(sign * low / scale)


def _ranges(rng):
    scale, zero = float(rng.uniform(0.01, 0.2)), int(rng.integers(20, 200))
    ends = (-scale * (zero + 0.2), scale * (254.8 - zero))  # no zero point here is near a half
    return [(-1.0, 3.0, 2), (0.5, 2.0, 8), (-3.0, -1.0, 4), (0.0, 0.0, 8), (*ends, 8), (-0.9, 0.13, 4)]


def _ste(x, scale, zero_point, qmin, qmax, rounding=torch.round, everywhere=0, through=True, zero=1, back=1, ends=0):
    marks = rounding(x.detach() / scale) + zero * zero_point
    on_grid = (marks.clamp(qmin, qmax) - back * zero * zero_point) * scale
    inside = everywhere | (marks >= qmin + ends) & (marks <= qmax - ends)
    return on_grid + inside.to(x.dtype) * (x - x.detach()) * through


def _on_the_grid(rng):
    for shape, zero, qmin, qmax in (((12,), 0, -7, 7), ((3, 5), 6, 0, 15), ((4, 4), 1, -1, 2), ((6, 2), 0, -127, 127)):
        marks = torch.tensor(rng.integers(qmin - 6, qmax + 7, shape).astype(np.float64))
        marks.view(-1)[:4] = torch.tensor([qmin - 3.0, qmax + 2.0, qmin, qmax])
        # Not near a half, where roundings differ; nor just outside the grid, where conventions do.
        off = torch.tensor(rng.uniform(0.1, 0.3, shape) * rng.choice([-1.0, 1.0], shape))
        off = torch.where(marks == qmax, -off.abs(), torch.where(marks == qmin, off.abs(), off))
        x = 0.5 * (marks - zero + off)
        yield (x if zero == 1 else x.float()), 0.5, zero, qmin, qmax


def _groups(weight, bits, group, spare=1, shape=None, flip=False, nothing=0.0):
    if flip:
        return _groups(weight.T.contiguous(), bits, group).T
    parts = weight.reshape(shape or (len(weight), -1, group))
    top = 2 ** (bits - 1) - spare
    scale = parts.abs().amax(-1, keepdim=True) / top
    marks = (parts / torch.where(scale > 0, scale, 1.0)).round().clamp(-top, top)
    return torch.where(scale > 0, marks * scale, nothing).reshape(weight.shape)


def _grouped(rng):
    for rows, columns, group, bits in ((4, 8, 4, 4), (3, 6, 3, 8), (8, 8, 2, 4), (2, 4, 4, 2), (5, 4, 1, 4)):
        top = 2 ** (bits - 1) - 1
        marks = rng.integers(-top + 1, top, (rows, columns // group, group)) + rng.uniform(-0.3, 0.3, (1, 1, group))
        marks[..., int(rng.integers(group))] = top * rng.choice([-1, 1], marks.shape[:2])
        marks *= np.exp(rng.uniform(-3, 3, (*marks.shape[:2], 1)))
        marks[0, 0] *= bits == 8  # a group of zeros
        weight = torch.tensor(marks.reshape(rows, columns), dtype=torch.float32)
        yield (weight if bits == 8 else weight.T.contiguous().T), bits, group


def _requantized(total, multiplier, zero_point, rounding=torch.round, low=-128, first=0, wrap=False, zero=1):
    marks = rounding((total.double() + first * zero_point) * multiplier)
    marks = (marks.clamp(low, 127) if wrap == "late" else marks) + zero_point * zero * (1 - first)
    return (marks if wrap else marks.clamp(low, 127)).long().to(torch.int8)


def _sums(rng):
    for shape, multiplier, zero in (((8,), 0.0123, 0), ((3, 5), 0.00417, -20), ((2, 2, 3), 0.31, 7), ((1,), 0.04, 3)):
        total = torch.tensor(rng.integers(-40_000, 40_000, shape), dtype=torch.int32)
        small = total.numel() // 2
        total.view(-1)[:small] = torch.tensor(rng.integers(-99, 100, small) / multiplier).int()
        near_half = ((total.double() * multiplier) % 1 - 0.5).abs() < 0.02
        yield total.masked_fill(near_half, 0), multiplier, zero


def _kmeans(values, start, rounds, move=torch.mean, empty=None, fresh=True, most=99):
    centres = start.clone()
    for _ in range(min(rounds, most)):
        index = (values[:, None] - centres).abs().argmin(dim=1)
        for k in range(len(centres)):
            mine = values[index == k]
            centres[k] = move(mine) if len(mine) else centres[k] if empty is None else empty
    return centres, (values[:, None] - centres).abs().argmin(dim=1) if fresh else index


def _clouds(rng):
    clouds = [(v := draw(rng, 60), torch.linspace(v.min(), v.max(), 4), rounds) for rounds in (1, 2, 12)]
    far = (draw(rng, 30), torch.tensor([-1.0, 0.0, 40.0, 1.0]), 5)
    return [(torch.tensor([0.1, 0.2, 0.9, 1.1, 1.6]), torch.tensor([0.0, 1.0]), 1), *clouds, far]


def _huffman(counts, zeros=False, second=heapq.heappop, each=None):
    known = sum(c > 0 for c in counts)
    if each or (known == 1 and not zeros):
        return [max(1, math.ceil(each(c, known, sum(counts)) if each else 1)) if c else 0 for c in counts]
    lengths, heap = [0] * len(counts), [(c, (i,)) for i, c in enumerate(counts) if c or zeros]
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, one), (b, other) = heapq.heappop(heap), second(heap)
        for i in one + other:
            lengths[i] += 1
        heapq.heappush(heap, (a + b, one + other))
    return lengths


def _same_total(got, expected, counts):
    """Other codes may be as short: what counts is the sum of all bits, and that it is a prefix code (Kraft)."""
    got = [int(length) for length in got]
    fits = len(got) == len(counts) and all((n > 0) == (c > 0) for n, c in zip(got, counts, strict=True))
    mine, best = (sum(c * n for c, n in zip(counts, lengths, strict=False)) for lengths in (got, expected))
    return fits and mine == best and sum(2.0**-n for n in got if n) <= 1


_CHAPTER_03 = [
    Task("affine_qparams", _qparams, "a pair (scale, zero_point)",
         "ranges around 0, above it, below it, and empty; 2, 4 and 8 bits.", _ranges, {
        "Zero is not on this grid: widen the range to contain 0 first.": dict(widen=False),
        "2^bits points have 2^bits − 1 steps between them.": dict(points=0),
        "The zero point has the wrong sign: it is −low / scale.": dict(sign=1),
        "The zero point is an integer of the grid: round it.": dict(rounding=float),
        "The zero point is rounded down; round it to the nearest.": dict(rounding=math.floor),
        "That is a symmetric grid; here the integers run from 0 to 2^bits − 1.": lambda low, high, bits: (
            max(-low, high) / (2 ** (bits - 1) - 1) or 1.0, 0),
    }),
    Task("fake_quantize_ste", _ste, "a tensor with a gradient",
         "values and gradients, inside the grid and outside, with and without a zero point.", _on_the_grid, {
        "The values are right, but no gradient comes through: round() is flat.": dict(through=False),
        "The values are right, but clipped entries have gradient 1: they do not move, so 0.": dict(everywhere=1),
        "Values on the outermost integers get no gradient: clamp x first, then round (clamp's gradient is 0 at its "
        "very ends).": dict(ends=1),
        "The zero point is not used.": dict(zero=0),
        "The zero point is added and not taken off again.": dict(back=0),
        "That rounds down; round to the nearest.": dict(rounding=torch.floor),
        "Nothing is clipped: there are no integers outside qmin to qmax.": lambda x, s, z, low, high: (
            _ste(x, s, z, -999, 999)),
    }, observe=with_gradient),
    Task("per_group", _groups, "a tensor of the weight's shape", "groups of 1 to 4 at 2, 4 and 8 bits, some all zeros.",
         _grouped, {
        "That is one scale for the whole tensor.": dict(shape=(1, 1, -1)),
        "That is one scale a row.": lambda weight, bits, group: _groups(weight, bits, weight.shape[1]),
        "The groups run down the columns; what lies side by side in a row shares a scale.": dict(flip=True),
        "The largest integer is 2^(bits − 1) − 1, so that −x and x are equally well off.": dict(spare=0),
        "A group of zeros has become NaN: its scale is 0, and 0 / 0 is no number.": dict(nothing=math.nan),
    }),
    Task("requantize", _requantized, "an int8 tensor", "sums of both signs, beyond both ends, zero points.", _sums,
         {
        "That cuts the fraction off, towards 0; round to the nearest.": dict(rounding=torch.trunc),
        "That rounds down; round to the nearest.": dict(rounding=torch.floor),
        "int8 wraps around where the sum is too large: clamp to −128 … 127 first.": dict(wrap=True),
        "The zero point belongs to the output's grid: scale first, then add it.": dict(first=1),
        "You clamp before the zero point is added; clamp last.": dict(wrap="late"),
        "The zero point is not used.": dict(zero=0),
        "int8 reaches down to −128.": dict(low=-127),
        "Negative sums have become 0: int8 has negative numbers.": dict(low=0),
    }),
    Task("kmeans_codebook", _kmeans, "a pair (centres, index)",
         "1 to 12 rounds, 2 and 4 centres, one of them without a single value.", _clouds, {
        "The index is from before the last move: look once more which centre is nearest.": dict(fresh=False),
        "A centre without values has become NaN: leave it where it is.": dict(empty=math.nan),
        "A centre without values was set to 0: leave it where it is.": dict(empty=0.0),
        "That is the median; k-means moves a centre to the mean.": dict(move=torch.median),
        "One round only, whatever `rounds` is.": dict(most=1),
        "The centres never move.": dict(most=0),
    }),
    Task("huffman_lengths", _huffman, "a list of whole numbers",
         "even and uneven counts, a symbol that never occurs, one symbol alone.",
         lambda rng: [([5, 1, 1, 1],), ([1, 1, 2, 3, 5, 8, 13],), ([15, 7, 6, 6, 5],), ([3, 0, 5, 1],), ([0, 7],),
         (rng.integers(1, 99, 12).tolist(),)], {
        "All codes are equally long: frequent symbols get short ones.": dict(each=lambda c, k, n: math.log2(k)),
        "That is ⌈−log₂ p⌉ for each by itself (Shannon): merging the two rarest does better.": dict(
            each=lambda c, k, n: math.log2(n / c)),
        "The rarest merges with another than the second rarest: take the two rarest.": dict(second=list.pop),
        "A symbol that never occurs needs no code: length 0.": dict(zeros=True),
    }, same=_same_total),
]  # fmt: skip

TASKS = {task.name: task for task in _CHAPTER_01 + _CHAPTER_02 + _CHAPTER_03}
"""By name; :mod:`tasks_losses` has those of all chapters."""
