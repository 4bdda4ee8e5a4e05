"""Parameters of a chapter: read from its typed literals, and checked by name and value before anything is started."""

import ast
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["PROFILES", "CourseError", "Parameter", "check_known_names", "convert", "merge", "read_parameters"]

PROFILES = ("quick", "full")
MAX_SEED = 2**32 - 1

_SIMPLE = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "tuple": tuple, "dict": dict}
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class CourseError(Exception):
    """Something that the user can mend: the text says what was given and what fits. Exit code 2."""


@dataclass(frozen=True)
class Parameter:
    """One line of a ``parameters`` cell: its name, its type as written (or taken from the literal), its default."""

    name: str
    type: str
    default: Any


def read_parameters(source: str, where: str) -> dict[str, Parameter]:
    """The parameters that a cell declares, ``name: type = literal`` a line (the type may be left out).

    Raises:
        CourseError: the cell is no Python, or holds anything but such lines.

    >>> read_parameters('seed: int = 0  # of the run', "02_pruning.ipynb")
    {'seed': Parameter(name='seed', type='int', default=0)}
    """
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise CourseError(f"{where}: the parameters cell is no Python: {error.msg} in line {error.lineno}") from None
    found = {}
    for statement in statements:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue
        try:
            target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
            name, default = target.id, ast.literal_eval(statement.value)
        except (AttributeError, TypeError, ValueError):
            line = ast.unparse(statement)
            raise CourseError(f"{where}: the parameters cell holds {line!r}; only name: type = literal fits") from None
        annotated = isinstance(statement, ast.AnnAssign)
        found[name] = Parameter(
            name, ast.unparse(statement.annotation) if annotated else type(default).__name__, default
        )
    return found


def convert(parameter: Parameter, text: str) -> Any:
    """The value that a text from the command line stands for.

    Raises:
        CourseError: the text is no value of the parameter's type, or a value out of its range (``dataset``,
            ``profile`` and ``seed`` mean the same in every chapter).

    >>> convert(Parameter("widths", "list[int]", [8]), "[8, 32]")
    [8, 32]
    """
    try:
        value = _parse(ast.parse(parameter.type, mode="eval").body, text, parameter.default)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise CourseError(f"{parameter.name} must be {parameter.type}, got {text!r}") from None
    if parameter.name == "profile" and value not in PROFILES:
        raise CourseError(f"profile must be one of {', '.join(PROFILES)}, got {text!r}{_near(text, PROFILES)}")
    if parameter.name == "seed" and isinstance(value, int) and not 0 <= value <= MAX_SEED:
        raise CourseError(f"seed must be an integer from 0 to {MAX_SEED}, got {text!r}")
    if parameter.name == "dataset" and value != parameter.default:
        from course_lib.lab.data import DATASETS

        if value not in DATASETS:
            raise CourseError(f"dataset must be one of {', '.join(DATASETS)}, got {text!r}{_near(text, DATASETS)}")
    return value


def merge(common: Mapping[str, str | None], assignments: Sequence[str]) -> tuple[dict[str, str], set[str]]:
    """The texts given for each name, by options such as ``--seed`` and by ``-p NAME=VALUE``, and the latter's names.

    Raises:
        CourseError: an assignment without ``=`` or name, or two values for one name.

    >>> merge({"seed": "1", "dataset": None}, ["alpha=0.5"])
    ({'seed': '1', 'alpha': '0.5'}, {'alpha'})
    """
    given = {name: text for name, text in common.items() if text is not None}
    explicit = set()
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            raise CourseError(f"-p takes NAME=VALUE, got {assignment!r}")
        if given.get(name, text) != text:
            raise CourseError(f"{name} is given twice: {given[name]!r} and {text!r}")
        given[name] = text
        explicit.add(name)
    return given, explicit


def check_known_names(explicit: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a name given by ``-p`` that none of the chapters has.

    Raises:
        CourseError: with the names that there are.
    """
    known = list(dict.fromkeys(known))
    for name in sorted(set(explicit) - set(known)):
        listed = f"they have {', '.join(known)}" if known else "they have none"
        raise CourseError(f"no selected chapter has a parameter {name!r}{_near(name, known)}; {listed}")


def _near(text: str, words: Sequence[str]) -> str:
    near = difflib.get_close_matches(text.lower(), words, n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def _parse(wanted: ast.expr, text: str, default: Any) -> Any:
    match wanted:
        case ast.BinOp(left=first, op=ast.BitOr(), right=second):
            return _first_that_fits((first, second), text, default)
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return _first_that_fits((ast.Constant(None), inner), text, default)
        case ast.Constant(value=None) | ast.Name(id="NoneType" | "None"):
            if text.strip().lower() != "none":
                raise ValueError(text)
            return None
        case ast.Name(id="str"):
            return text
        case ast.Name(id="bool"):
            if text.strip().lower() not in _TRUTH:
                raise ValueError(text)
            return _TRUTH[text.strip().lower()]
        case ast.Name(id="int"):
            return int(text)
        case ast.Name(id="float"):
            value = float(text)
            if not math.isfinite(value):
                raise ValueError(text)
            return value
        case ast.Subscript(value=ast.Name(id="Literal")):
            literal = ast.literal_eval(wanted.slice)
            choices = {str(choice): choice for choice in (literal if isinstance(literal, tuple) else (literal,))}
            if text not in choices:
                raise ValueError(text)
            return choices[text]
    value = ast.literal_eval(text)
    if not _fits(value, wanted, default):
        raise ValueError(text)
    return value


def _first_that_fits(alternatives: Iterable[ast.expr], text: str, default: Any) -> Any:
    # None first: read as a str, the text "None" would fit anything.
    for wanted in sorted(alternatives, key=lambda node: not (isinstance(node, ast.Constant) and node.value is None)):
        try:
            return _parse(wanted, text, default)
        except (ValueError, SyntaxError):
            continue
    raise ValueError(text)


def _fits(value: Any, wanted: ast.expr, default: Any) -> bool:
    match wanted:
        case ast.Name(id=name) if name in _SIMPLE:
            real = {float: (float, int)}.get(_SIMPLE[name], _SIMPLE[name])
            return isinstance(value, real) and (name == "bool" or not isinstance(value, bool))
        case ast.Subscript(value=ast.Name(id="list"), slice=inner):
            return isinstance(value, list) and all(_fits(item, inner, item) for item in value)
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=inner)):
            if len(inner) == 2 and isinstance(inner[1], ast.Constant) and inner[1].value is ...:
                return isinstance(value, tuple) and all(_fits(item, inner[0], item) for item in value)
            return (
                isinstance(value, tuple)
                and len(value) == len(inner)
                and all(_fits(item, kind, item) for item, kind in zip(value, inner, strict=True))
            )
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[key, inner])):
            return isinstance(value, dict) and all(_fits(k, key, k) and _fits(v, inner, v) for k, v in value.items())
    # An annotation that is not known here, such as an alias: the default shows what is meant.
    return type(value) is type(default)
