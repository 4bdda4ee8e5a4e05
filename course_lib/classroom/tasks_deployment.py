"""The tasks of chapter 07: a network in C, and on a small board."""

import math

import numpy as np

from course_lib.classroom.answers import Task, judge
from course_lib.classroom.tasks_losses import TASKS as EARLIER

__all__ = ["TASKS"]


def _folded(weights, bias, zero, sign=-1, along=1, size=np.asarray):
    return (np.asarray(bias) + sign * zero * size(weights).sum(axis=along)).tolist()


def _layers(rng):
    yield [[50, -30]], [1500], 50
    for outputs, inputs in ((2, 3), (3, 3), (4, 2)):
        yield rng.integers(-9, 10, (outputs, inputs)).tolist(), rng.integers(-99, 100, outputs).tolist(), 7 * outputs


def _grey(levels, mean, std, scale, zero, steps=1, shift=1, spread=1, point=1, clip=True, rounding=round):
    real = [(i / (levels - steps) - shift * mean) / (std if spread else 1) for i in range(levels)]
    marks = [rounding(x / scale) + point * zero for x in real]
    return [min(max(q, 0), 255) for q in marks] if clip else marks


def _shift(total, multiplier, shift, zero, half=1, cut=False, point=1, first=False, wrap=False, real=None, places=0):
    product = total * multiplier + half * (1 << shift >> 1)
    q = int(math.copysign(abs(product) >> shift, product)) if cut else product >> (shift + places)
    q = real(total * multiplier / 2**shift) if real else q
    q = (min(max(q, 0), 255) if first else q) + point * zero
    return q & 255 if wrap else q if first else min(max(q, 0), 255)


def _totals(rng):
    yield 1000, 1717986918, 35, 100
    yield -500, 1717986918, 35, 100
    yield 90_000, 1717986918, 35, 0
    yield -90_000, 1717986918, 35, 12
    yield 10, 2**30, 32, 3  # a tie: 2.5 becomes 3
    yield -10, 2**30, 32, 30
    yield 2**30 - 2, 3 * 2**29 + 3, 60, 0  # 1.5 less 6 / 2^60: below the half, by less than a float can tell
    for _ in range(4):
        yield int(rng.integers(-3000, 3000)), int(rng.integers(2**30, 2**31)), 36, int(rng.integers(20, 200))


def _halves(total, multiplier, shift, add=(1, 1), kept=0):
    def rounded(x, places, half=1):
        return (x + half * (1 << places >> 1)) >> places

    upper = rounded(total * multiplier, 31, add[0]) + kept * (1 << shift >> 1)
    return rounded(total * multiplier, shift), rounded(upper, shift - 31, add[1])


def _apart(rng):
    """Halves of 3, 7, -5 and 4, to be divided by 4; then any."""
    yield from ((total, 2**30, 33) for total in (3, 7, -5, 4))
    for shift in (33, 34, 37):
        yield int(rng.integers(-30_000, 30_000)), int(rng.integers(2**30, 2**31)), shift


def _overflow(weights, inputs, bias, bits, low=True, most=lambda bits: 2 ** (bits - 1) - 1, count=0, last=0, start=1):
    total, top = start * bias, most(bits)
    for i, (w, x) in enumerate(zip(weights, inputs, strict=True)):
        total += w * x
        if i >= last * (len(weights) - 1) and (total > top or (low and total < -top - 1)):
            return i + count
    return None


def _products(rng):
    yield [100, 100, 100], [200, 120, 50], 0, 16  # 20,000, 32,000, 37,000
    yield [127, 127, -127], [255, 200, 255], 0, 16  # leaves and comes back
    yield [-127, -127], [255, 255], 0, 16
    yield [1, 1], [5, 6], 32_760, 16
    yield [5, 6], [1, 2], 0, 16
    yield [1, 1], [27, 100], 100, 8
    yield [-64, -1], [2, 0], 0, 8  # -128 is still inside
    yield [64, 1], [2, 1], 0, 8  # 128 is not
    weights = rng.integers(60, 128, 6).tolist()
    yield weights, rng.integers(120, 256, 6).tolist(), 0, 16


def _bits(weights, bias, top, widths=(8, 16, 32, 64), signed=1, parts=(max, min), base=1, most=0):
    ends = [base * bias + top * sum(part(w, 0) for w in weights) for part in parts]
    fits = (b for b in widths if all(-(2 ** (b - signed)) <= end < 2 ** (b - signed) + most for end in ends))
    return next(fits, widths[-1])


def _rows(rng):
    yield [50, -30], 500, 255
    yield [1, -1], 0, 100
    yield [127, 127, -127, -127], 0, 255  # the products cancel in the end, not on the way
    yield [100, 28], 0, 255
    yield [-100, -30], 0, 255
    yield [1], 32_700, 100
    yield [3], 1, 42  # 127
    yield [-1], 0, 128
    yield [1], 0, 128
    yield [100, -100], 0, 255
    yield [1], 2**31 - 1, 1
    yield [90], 0, 2
    yield rng.integers(1, 128, 600).tolist(), 0, 255


# --- the widest CNN ---------------------------------------------------------------------------------------------------


def _widest(ram, stack, turns=2, bytes_each=1, use_stack=True, extra=0, image=64, spare=0):
    def need(c):
        first, second = (image, 16 * c, 8 * c), (64 * c, 32 * c)  # what lies in the one array and in the other
        arrays = {1: max(first + second), 2: max(first) + max(second), 5: sum(first + second)}[turns]
        return bytes_each * arrays + (stack if use_stack else 0)

    c = 1
    while need(c + 1) <= ram - spare:
        c += 1
    return c + extra


_WIDEST = Task("widest_cnn", _widest, "a whole number", "",
    lambda rng: [(2048, 160), (4096, 300), (1024, 150), (410, 160), (560, 160), (int(rng.integers(5000, 9000)), 160)], {
    "That is room for the larger array alone: a step reads one and writes the other.": dict(turns=1),
    "That adds all five arrays; two take turns, each as large as the largest that it has to hold.": dict(turns=5),
    "The stack is forgotten.": dict(use_stack=False),
    "That counts 4 bytes a number; here each has one.": dict(bytes_each=4),
    "One too many: that is the first width that does not fit.": dict(extra=1),
    "One more fits.": dict(extra=-1),
    "What needs exactly `ram` bytes fits.": dict(spare=1),
    "The image is forgotten: its 64 bytes lie in the first array.": dict(image=0),
})  # fmt: skip


def _judge_widest(widest_cnn):
    """The learner's number, and then the network itself: its C file on an emulated core, or that file's own arrays."""
    if not (result := judge(_WIDEST, widest_cnn)):
        return False, result.text
    channels = int(widest_cnn(2048, 160))
    return True, f"{channels} channels fit into 2,048 bytes of RAM. {_proof(channels)}"


def _proof(channels: int) -> str:
    import re

    import torch
    from torch import nn

    from course_lib.lab import microcontroller
    from course_lib.lab.compile import CompilerError
    from course_lib.methods.c_source import c_source, pixel_table
    from course_lib.methods.integer import integer_network

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(8 * channels, 10),
    )  # fmt: skip
    network = integer_network(model, torch.rand(20, 1, 8, 8))
    source = c_source(network, (1, 8, 8), pixel_table(network.x_q, [0.0], [1.0], 17))
    try:
        cost = microcontroller.cross_compile(source, "Cortex-M4").measure(np.zeros((1, 64), np.uint8), count=False)
        return f"On an emulated Cortex-M4 that network takes {cost.ram:,}, stack included."
    except (CompilerError, OSError):
        arrays = [int(size) for size in re.findall(r"static uint8_t [ab]\[(\d+)\]", source)]
        return f"Its C file has arrays of {arrays[0]:,} and {arrays[1]:,} bytes (no emulator here)."


_CHAPTER_07 = [
    Task("fold_zero_point", _folded, "a list of whole numbers", "layers of one to four outputs, both signs.", _layers, {
        "The sign is wrong: Σ (q − z) w is Σ q w *minus* z Σ w.": dict(sign=1),
        "That sums over the outputs; each output has its own bias, from its own row of weights.":
            lambda weights, bias, zero: (np.asarray(bias) - zero * np.resize(np.sum(weights, axis=0), len(bias))
                                         ).tolist(),
        "That sums all weights of the layer; each output needs its own row.": dict(along=None),
        "The weights keep their signs in the sum.": dict(size=np.abs),
        "The zero point is not used.": dict(sign=0),
    }),
    Task("grey_table", _grey, "a list of whole numbers", "17 and 256 levels, values beyond both ends of the grid.",
         lambda rng: [(3, 0.5, 0.5, 0.0123, 81), (17, 0.305, 0.376, 0.0105, 77), (256, 0.1307, 0.3081, 0.0127, 33),
                      (17, 0.3, 0.25, 0.011, 90), (5, float(rng.uniform(0.2, 0.4)), 0.31, 0.0137, 60)], {
        "The brightest of `levels` levels is levels − 1: divide by that.": dict(steps=0),
        "The mean is not taken off: the network was trained on normalised pixels.": dict(shift=0),
        "The deviation is not used: the network was trained on normalised pixels.": dict(spread=0),
        "The zero point is missing: it is the integer that stands for 0.0.": dict(point=0),
        "Nothing is clipped: a byte holds 0 to 255.": dict(clip=False),
        "That rounds down; round to the nearest.": dict(rounding=math.floor),
    }),
    Task("shift_and_round", _shift, "a whole number", "both signs, ties, both ends, and products of 61 bits.",
         _totals, {
        "That rounds down: add half of 2^shift before you shift.": dict(half=0),
        "That cuts towards zero, as C's `/` does; `>>` goes down, also below zero.": dict(cut=True),
        "The zero point is not added, or added before the shift, where it vanishes.": dict(point=0),
        "You clip before the zero point is added; clip last.": dict(first=True),
        "A number that does not fit wraps round: clip to 0 … 255.": dict(wrap=True),
        "A float has 53 bits, and the product can have 62: stay with whole numbers.": dict(
            real=lambda x: math.floor(x + 0.5)),
        "round() takes a tie to the even neighbour, and goes through a float: add half, then shift.": dict(real=round),
        "One place too far to the right.": dict(places=1),
    }),
    Task("overflow_at", _overflow, "a whole number, or None", "sums that stay, leave above, leave below, come back.",
         _products, {
        "Only the end is looked at: a sum that left the range on its way is wrong from there on.": dict(last=1),
        "That looks for too large a sum alone; it can be too small as well.": dict(low=False),
        "The bias is where the sum starts.": dict(start=0),
        "Positions count from 0.": dict(count=1),
        "One of the bits is the sign: the largest number is 2^(bits − 1) − 1.": dict(most=lambda b: 2**b - 1),
        "2^(bits − 1) itself does not fit any more: the largest number is one less.": dict(most=lambda b: 2 ** (b - 1)),
    }),
    Task("bits_needed", _bits, "8, 16, 32 or 64", "rows that cancel, that do not, and that fit exactly.", _rows, {
        "Products may cancel, but not on the way: add the positive ones alone.": dict(parts=(lambda w, zero: w,)),
        "Magnitudes are added: take each side by itself.": dict(parts=(lambda w, z: abs(w), lambda w, z: -abs(w))),
        "The negative products alone can be too much as well.": dict(parts=(max,)),
        "The positive products alone can be too much as well.": dict(parts=(min,)),
        "The bias is part of every sum.": dict(base=0),
        "One of the bits is the sign.": dict(signed=0),
        "2^(bits − 1) itself does not fit any more: the largest number is one less.": dict(most=1),
        "32 bits are not always enough.": dict(widths=(8, 16, 32)),
        "C has integers of 8, 16, 32 and 64 bits.": dict(widths=range(1, 65)),
    }),
    Task("widest_cnn", _widest, "a whole number", "", judged=_judge_widest),
    Task("round_twice", _halves, "a pair (once, twice)", "both signs, a tie, sums on which the two agree and do not.",
         _apart, {
        "Both are rounded once. (To cut off in the first half comes to the same: add 2^30.)": dict(add=(0, 1)),
        "The second of the two halves has to round too: add half of what it divides by.": dict(add=(1, 0)),
        "Neither half rounds: each adds half of what it divides by.": dict(add=(0, 0)),
        "The second half divides by 2^(shift − 31): add half of that, not of 2^shift.": dict(add=(1, 0), kept=1),
        "The two are swapped: rounding once comes first.": lambda t, m, n: _halves(t, m, n)[::-1],
    }),
]  # fmt: skip

TASKS = EARLIER | {task.name: task for task in _CHAPTER_07}
"""Those of the earlier chapters and of this one by name, in order."""
