"""Judging an answer: the learner's function is run on fresh cases, and one sentence says what came out.

A :class:`Task` holds the right answer, the cases, and the usual wrong answers as code. :func:`judge` knows nothing of
any one task: it runs the learner's function beside the right one, and where they differ it looks for a wrong answer
that gives what the learner's gives: on *every* case, or else on the first that fails and on half of those that do.
"""

import contextlib
import copy
import html
import inspect
import io
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Result", "Task", "judge", "with_gradient"]


@dataclass(frozen=True)
class Task:
    """One blank of a practice notebook."""

    name: str  # of the function to be written; also nbgrader's grade_id
    answer: Callable  # a right answer; its parameters' names appear in the sentences
    expects: str  # what a right answer returns, in words: "a bool tensor", "a pair (low, high)"
    says: str  # what was tried, for the line of a right answer
    # cases(rng) gives the argument tuples to try, new ones at every call, the plainest first
    cases: Callable[[np.random.Generator], Iterable[tuple]] = lambda rng: ()
    # sentence -> an answer that is wrong on at least one case: a function, keywords that make `answer` wrong, or a list
    wrong: Mapping[str, Callable | Mapping[str, Any] | list] = field(default_factory=dict)
    tolerance: float = 1e-4  # of real numbers, as a share of the largest of them
    slack: float = 1e-6  # and beside that
    same: Callable[..., bool] | None = None  # same(got, expected, *arguments): are two that differ equally right?
    observe: Callable | None = None  # observe(function, *arguments) -> what is compared instead of what it returns
    judged: Callable[[Callable], tuple[bool, str]] | None = None  # instead: judged(function) -> (passed, sentence)

    def wrong_answers(self) -> list[tuple[str, Callable]]:
        """Pairs (sentence, wrong answer as a function)."""
        lists = ((told, wrong if isinstance(wrong, list) else [wrong]) for told, wrong in self.wrong.items())
        return [(told, f if callable(f) else partial(self.answer, **f)) for told, faults in lists for f in faults]


@dataclass(frozen=True)
class Result:
    """What a check says: one line, in a notebook and in a terminal."""

    name: str
    passed: bool
    text: str

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        return f"{'✓ ' if self.passed else ''}{self.name}: {self.text}"

    def _repr_html_(self) -> str:
        color, sign = ("#009E73", "✓ ") if self.passed else ("#E69F00", "")
        style = f"border-left: 4px solid {color}; padding-left: 0.5em"
        return f'<div style="{style}">{sign}<b>{html.escape(self.name)}</b>: {html.escape(self.text)}</div>'


@dataclass(frozen=True)
class _Outcome:
    """What one call gave: a value, or the error; the arguments that it changed; None or Ellipsis as text."""

    value: Any
    error: BaseException | None
    changed: tuple[str, ...]
    blank: str


def judge(task: Task, function: Callable, seed: int | None = None) -> Result:
    """Run ``function`` on the task's cases (of a ``seed``, by default new ones) and say how it did; never raises."""
    printed = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(printed), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            passed, text = task.judged(function) if task.judged else _judge(task, function, np.random.default_rng(seed))
        except NotImplementedError as blank:
            passed, text = False, f"not yet. {f'{blank}; ' if str(blank) else ''}{task.expects} is expected."
            text = text[:9] + text[9].upper() + text[10:]
        except Exception as error:
            passed, text = False, f"it raised {_error(error)}."
    if printed.getvalue() and not passed:
        text += " (A check hides what it prints: call it yourself to see that.)"
    return Result(task.name, passed, " ".join(text.split()))


def _judge(task: Task, function: Callable, rng: np.random.Generator) -> tuple[bool, str]:
    if not callable(function):
        return False, f"give the function itself, without calling it: check({task.name!r}, {task.name})."
    cases = list(task.cases(rng))
    right, given = ([_call(task, one, case) for case in cases] for one in (task.answer, function))
    if all(outcome.blank for outcome in given):
        missing = " (is a return missing?)" if given[0].blank == "None" else ""
        raise NotImplementedError(f"It returned {given[0].blank} every time{missing}")
    gaps = [_gap(task, *pair) for pair in zip(given, right, cases, strict=True)]
    first = next((i for i, gap in enumerate(gaps) if gap), None)
    if first is None:
        if changed := next((outcome.changed for outcome in given if outcome.changed), ()):
            were = "was changed on the way. Copy it" if len(changed) == 1 else "were changed on the way. Copy them"
            return False, f"the results are right, but {' and '.join(changed)} {were} first."
        return True, task.says
    where, gap, likely = _where(task, cases[first]), gaps[first], []
    for sentence, wrong in task.wrong_answers():
        if not _alike(task, given[first], _call(task, wrong, cases[first])):
            continue
        alike = [_alike(task, one, _call(task, wrong, case)) for one, case in zip(given, cases, strict=True)]
        if all(alike):
            return False, f"{sentence} (At {where} {gap}.)" if given[first].error is None else sentence
        likely.append((sum(same for same, gap in zip(alike, gaps, strict=True) if gap), sentence))
    # Else the likeliest; but two errors of a kind, or two answers of few that there are, may be alike by chance.
    count, sentence = max(likely, key=lambda each: each[0], default=(0, ""))
    doubtful = given[first].error is not None or isinstance(given[first].value, (bool, str))
    if 2 * count >= sum(map(bool, gaps)) and not doubtful:
        return False, f"Probably: {sentence} (At {where} {gap}.)"
    good = [case for case, one in zip(cases, gaps, strict=True) if not one]
    before = f"right at {_where(task, good[0])}, but " if good else ""
    changed = "".join(f" And {name} was changed: copy it first." for name in given[first].changed)
    return False, f"{before}at {where} {gap}.{changed}"


def _call(task: Task, function: Callable, case: tuple) -> _Outcome:
    """One call on copies of the arguments."""
    arguments, returned = copy.deepcopy(case), []

    def noted(*given):
        returned.append(function(*given))
        return returned[-1]

    try:
        value, error = task.observe(noted, *arguments) if task.observe else noted(*arguments), None
    except NotImplementedError:
        raise
    except (Exception, SystemExit) as raised:
        # Strides are not the subject: what needs them plain gets them plain.
        plain = tuple(a.contiguous() if isinstance(a, Tensor) else a for a in case)
        if "view size" in str(raised) and any(a is not b for a, b in zip(plain, case, strict=True)):
            return _call(task, function, plain)
        value, error = None, raised
    blank = str(returned[0]) if returned and (returned[0] is None or returned[0] is Ellipsis) else ""
    named = zip(inspect.signature(task.answer).parameters, case, arguments, strict=False)
    changed = tuple(name for name, was, now in named if not callable(was) and _difference(now, was, 0.0))
    return _Outcome(value, error, changed, blank)


def with_gradient(function: Callable, *given: Any, at: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """For ``observe``: what the function gives, and the gradients that reach the arguments at these places.

    >>> with_gradient(lambda x: (x**2).sum(), torch.tensor([3.0]))
    {'value': tensor(9.), 'gradient': tensor([6.])}
    """
    leaves = {i: given[i].detach().clone().requires_grad_() for i in at}
    inputs = [leaves[i].clone() if i in at else x for i, x in enumerate(given)]  # like logits, free to be changed
    value = function(*inputs)
    for i in at:
        given[i].copy_(inputs[i].detach())
    slopes = [torch.zeros_like(leaf) for leaf in leaves.values()]
    if isinstance(value, Tensor) and value.requires_grad and value.is_floating_point():
        upstream = torch.arange(1, value.numel() + 1, dtype=value.dtype).view(value.shape)
        slopes = torch.autograd.grad(value, [*leaves.values()], upstream, allow_unused=True, materialize_grads=True)
    value = value.detach() if isinstance(value, Tensor) else value
    names = (f"gradient of argument {i + 1}" if i else "gradient" for i in at)
    return {"value": value} | dict(zip(names, slopes, strict=True))


# --- comparing --------------------------------------------------------------------------------------------------------


def _gap(task: Task, given: _Outcome, right: _Outcome, case: tuple) -> str:
    """What is off, as the end of a sentence that starts with "at alpha = 0.5"; empty if nothing is."""
    if given.error is not None:
        return f"it raised {_error(given.error)}"
    gap = _difference(given.value, right.value, task.tolerance, task.slack)
    if names := re.search(r"\((.+)\)", task.expects):
        gap = re.sub(r"^in item (\d+)", lambda item: f"in {names[1].split(', ')[int(item[1]) - 1]}", gap)
    if gap and task.same is not None:
        with contextlib.suppress(Exception):  # whatever the learner's value is
            return "" if task.same(given.value, right.value, *copy.deepcopy(case)) else gap
    return gap


def _alike(task: Task, given: _Outcome, wrong: _Outcome) -> bool:
    if given.error is not None or wrong.error is not None:
        return type(given.error) is type(wrong.error)
    return not _difference(given.value, wrong.value, task.tolerance, task.slack)


def _difference(got: Any, want: Any, tolerance: float, slack: float = 0.0) -> str:
    if isinstance(want, Mapping):
        if not isinstance(got, Mapping) or got.keys() != want.keys():
            return f"you return {_kind(got)}, expected {_kind(want)}"
        gaps = {key: _difference(got[key], want[key], tolerance, slack) for key in want}
        many = isinstance(want.get("value"), Tensor) and want["value"].numel() > 1
        note = " (of the sum of all entries, weighed 1, 2, 3, …)" if many else ""
        return next((gap if key == "value" else f"in the {key}{note} {gap}" for key, gap in gaps.items() if gap), "")
    if isinstance(want, (tuple, list)):
        if isinstance(got, (Tensor, np.ndarray)) and got.ndim > 0 and not any(isinstance(w, Tensor) for w in want):
            got = got.tolist()
        if not isinstance(got, (tuple, list)) or len(got) != len(want):
            return f"you return {_kind(got)}, expected {_kind(want)}"
        gaps = [_difference(g, w, tolerance, slack) for g, w in zip(got, want, strict=True)]
        return next((f"in item {i} {gap}" for i, gap in enumerate(gaps, 1) if gap), "")
    if want is None or isinstance(want, str):
        return "" if type(got) is type(want) and got == want else f"yours is {_shown(got)}, expected {_shown(want)}"
    returned, got, want = got, _tensor(got, want), _tensor(want, want)
    if got is None or _family(got) != _family(want) or got.shape != want.shape:
        return f"you return {_kind(returned)}, expected {_kind(want)}"
    if want.dtype is torch.bool and want.dim() and got.sum() != want.sum():
        return f"yours keeps {int(got.sum())} of {got.numel()}, expected {int(want.sum())}"
    a, b = got.detach().double().cpu(), want.detach().double()
    if bool(a.isnan().any()) and not bool(b.isnan().any()):
        return "yours is NaN" if a.dim() == 0 else f"yours has {int(a.isnan().sum())} NaN of {a.numel()}"
    finite = b[b.isfinite()]
    slack = slack + tolerance * float(finite.abs().max()) if finite.numel() and _family(want) == "float" else 0.0
    off = ~((a == b) | ((a - b).abs() <= slack) | (a.isnan() & b.isnan()))
    if not bool(off.any()):
        return ""
    place = tuple(int(i) for i in off.nonzero()[0])
    mine, theirs = (t[place].item() for t in (got.detach(), want.detach()))
    yours = f"yours has {_shown(mine)} at {list(place)}" if place else f"yours is {_shown(mine)}"
    return f"{yours}, expected {_shown(theirs)}{_times(mine, theirs)}"


def _times(mine: Any, theirs: Any) -> str:
    """A clean factor between two real numbers is worth saying."""
    if not isinstance(mine, float) or mine == 0 or theirs == 0:
        return ""
    for ratio, word in ((theirs / mine, "small"), (mine / theirs, "large")):
        if 1.5 < ratio < 1000 and abs(ratio - round(ratio)) < 1e-3 * ratio:
            return f": {round(ratio)} times too {word}"
    return ": the sign is wrong" if abs(mine + theirs) < 1e-4 * abs(theirs) else ""


def _tensor(value: Any, want: Any) -> Tensor | None:
    """Numbers, arrays and tensors as a tensor, where one of that kind may stand for what is wanted."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = torch.as_tensor(value)
    if isinstance(value, (bool, Real)) and (not isinstance(want, Tensor) or want.dim() == 0):
        value = torch.tensor(value, dtype=torch.bool if isinstance(value, bool) else None)
        value = value.double() if value.is_floating_point() else value
    if not isinstance(value, Tensor):
        return None
    if isinstance(want, Integral) and not isinstance(want, bool) and value.is_floating_point() and value.dim() == 0:
        return value.long() if bool(value == value.round()) else value  # a count may be 12.0
    if isinstance(want, float) and value.dim() == 0 and value.dtype is not torch.bool:
        return value.double()  # ... and a real number 12
    return value


def _family(value: Tensor) -> str:
    """What may stand for each other: floats of all lengths, integers of all lengths, but a stored byte is a byte."""
    if value.dtype in (torch.bool, torch.int8, torch.uint8):
        return str(value.dtype)
    return "float" if value.is_floating_point() else "int"


# --- words ------------------------------------------------------------------------------------------------------------


def _where(task: Task, case: tuple) -> str:
    names = inspect.signature(task.answer).parameters.values()
    pairs = ((p.name, value) for p, value in zip(names, case, strict=False) if p.default is p.empty)
    return ", ".join(f"{name} {_argument(value)}" for name, value in pairs)


def _argument(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        short = 0 < len(value.reshape(-1)) <= 12
        return f"= {_shown(value.tolist())}" if short else f"of shape {list(value.shape)}"
    if isinstance(value, (list, tuple)) and (len(value) > 12 or any(isinstance(v, Mapping) for v in value)):
        return f"of {len(value)}"
    if isinstance(value, Mapping):
        return f"with {', '.join(map(str, value))}"
    return f"= {inspect.getdoc(value) or value.__name__}" if callable(value) else f"= {_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_shown, value)) + "]"
    if isinstance(value, float):
        return f"{value + 0.0:.4g}".replace("-", "−")
    return str(value).replace("-", "−") if isinstance(value, int) else repr(value)[:60]


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        value = torch.as_tensor(value)
    if isinstance(value, Tensor):
        name = str(value.dtype).removeprefix("torch.")
        name = f"an {name}" if name.startswith("i") else f"a {name}"
        return f"{name} tensor of shape {list(value.shape)}" if value.dim() else _shown(value.item())
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return _shown(value) if value is None or isinstance(value, (bool, Real)) else f"a {type(value).__name__}"


def _error(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return type(error).__name__ + (f": {lines[0][:160].rstrip('.')}" if lines else "")
