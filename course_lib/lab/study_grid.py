"""Grids of experiments as plain records: a method, a level, a seed, options, and a key made of their content."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["COLUMNS", "Trial", "distinct", "make_grid", "plain"]

COLUMNS = ("method", "level", "seed", "error", "seconds")
"""Columns that every table of a study has, around the options and the measured values."""


@dataclass(frozen=True, eq=False)
class Trial:
    """One cell of a grid: a method, how hard it presses, and a seed.

    Two trials are equal when their content is: ``level=8`` and ``level=8.0`` are the same cell. numpy numbers become
    Python's.

    Attributes:
        method: the name of a family, such as ``"magnitude"``.
        level: a number or a word that the method understands (a sparsity, a bit width), or ``None``.
        seed: a whole number of at least 0.
        options: pairs (name, value) of whatever else determines the result, sorted by name; a mapping is taken as well.
        key: a sha256 of all that, the same in every process and on every machine.

    Raises:
        TypeError, ValueError: an attribute of another kind, a number that is not finite, an option named twice or like
            a column of the result.

    >>> trial = Trial("magnitude", 0.9, seed=0, options={"model": "lenet300"})
    >>> trial.options, trial == Trial("magnitude", 0.9, 0, (("model", "lenet300"),))
    ((('model', 'lenet300'),), True)
    """

    method: str
    level: int | float | str | None
    seed: int
    options: tuple[tuple[str, object], ...] = ()
    key: str = field(init=False, repr=False)

    def __post_init__(self):
        if not isinstance(self.method, str) or not self.method:
            raise TypeError(f"method must be a name, got {self.method!r}")
        level, seed = plain(self.level), plain(self.seed)
        if isinstance(level, bool) or not (level is None or isinstance(level, (int, float, str))):
            raise TypeError(f"level must be a number, a word or None, got {self.level!r}")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed must be a whole number of at least 0, got {self.seed!r}")
        content = [self.method, _canonical(level, "level"), seed, *_pairs(self.options)]
        for name, value in (("level", level), ("seed", seed), ("options", tuple(content[3:]))):
            object.__setattr__(self, name, value)
        content[3:] = [[name, _canonical(value, name)] for name, value in content[3:]]
        object.__setattr__(self, "key", hashlib.sha256(json.dumps(content).encode()).hexdigest())

    def __eq__(self, other):
        return self.key == other.key if isinstance(other, Trial) else NotImplemented

    def __hash__(self):
        return hash(self.key)


def make_grid(levels: Mapping[str, Sequence], seeds: Iterable[int], **options) -> list[Trial]:
    """Every method at each of its levels with every seed.

    Args:
        levels: method -> its levels (numbers, words or ``None``), each once; ``[None]`` for a method that has none.
        seeds: whole numbers, each once.
        options: given to every trial; numbers, words, booleans or ``None``. To vary an option, add grids together.

    Raises:
        TypeError, ValueError: something is empty, double, or of a kind that a trial cannot have; says which.

    >>> [(t.method, t.level, t.seed) for t in make_grid({"dense": [None], "int": [8, 4]}, seeds=[0])]
    [('dense', None, 0), ('int', 8, 0), ('int', 4, 0)]
    """
    if not isinstance(levels, Mapping):
        raise TypeError(f"levels must map each method to its levels, got {type(levels).__name__}")
    seeds = _listed(seeds, "seeds")
    if not levels:
        raise ValueError("levels names no method: there is nothing to run")
    grid = []
    for method, given in levels.items():
        cells = itertools.product(_listed(given, f"levels of {method}"), seeds)
        grid += [Trial(method, level, seed, options) for level, seed in cells]
    return distinct(grid)


def distinct(trials: list[Trial]) -> list[Trial]:
    """The trials, refused if there are none, if one comes twice or is something else."""
    if not trials:
        raise ValueError("the grid is empty: there is nothing to run")
    seen = set()
    for trial in trials:
        if not isinstance(trial, Trial):
            raise TypeError(f"a grid holds trials, got {trial!r}")
        if trial in seen:
            raise ValueError(f"the grid holds a cell twice: {trial}")
        seen.add(trial)
    return trials


def plain(value: object) -> object:
    """A numpy number or a tensor with one element as Python's number; anything else as it is."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def _canonical(value: object, where: str) -> object:
    # As Python compares them: 8 and 8.0 are one number, with one key.
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} must be finite, got {value}")
        return int(value) if value.is_integer() else value
    return value


def _pairs(options: Mapping | Iterable) -> list[tuple[str, object]]:
    pairs = options.items() if isinstance(options, Mapping) else options
    try:
        found = sorted((name, plain(value)) for name, value in pairs)
    except (TypeError, ValueError) as error:
        raise TypeError(f"options must be pairs (name, value) with names of their own, got {options!r}") from error
    for name, value in found:
        if not isinstance(name, str) or not name or name in COLUMNS:
            raise ValueError(f"an option needs a name other than {', '.join(COLUMNS)}, got {name!r}")
        if not (value is None or isinstance(value, (bool, int, float, str))):
            fits = "one number, word, boolean or None; add grids to vary it"
            raise TypeError(f"option {name} must be {fits}, got {value!r}")
    if len({name for name, _ in found}) < len(found):
        raise ValueError(f"an option is given twice in {options!r}")
    return found


def _listed(values: Iterable, where: str) -> list:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(f"{where} must be a sequence, got {values!r}")
    values = list(values)
    if not values:
        raise ValueError(f"{where}: the sequence is empty")
    return values
