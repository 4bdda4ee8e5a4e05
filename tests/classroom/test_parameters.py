"""Parameters: what a cell may declare, and which texts stand for which values."""

import pytest

from course_lib.classroom.parameters import CourseError, Parameter, check_known_names, convert, merge, read_parameters


def test_types_come_from_annotations_or_literals():
    found = read_parameters('"""Doc."""\n# comment\na: int = 1\nb = "x"\nc: float | None = None\nd = -2.5', "n")
    assert {name: (p.type, p.default) for name, p in found.items()} == {
        "a": ("int", 1),
        "b": ("str", "x"),
        "c": ("float | None", None),
        "d": ("float", -2.5),
    }
    assert read_parameters("", "n") == {}


@pytest.mark.parametrize("source", ["a = b", "import os", "a: int", "a = b = f()", "x.y = 1", "a += 1", "a, b = 1, 2"])
def test_anything_but_literals_is_refused(source):
    with pytest.raises(CourseError, match=r"02_x\.ipynb: the parameters cell holds .*; only name: type = literal fits"):
        read_parameters(source, "02_x.ipynb")


def test_broken_python_is_named_with_its_line():
    with pytest.raises(CourseError, match=r"n: the parameters cell is no Python: .* in line 2"):
        read_parameters("a = 1\nb = (", "n")


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("str", "None", "None"),
        ("int", "-3", -3),
        ("float", "1e-3", 1e-3),
        ("float", "2", 2.0),
        ("bool", "False", False),
        ("bool", "yes", True),
        ("int | None", "none", None),
        ("int | None", "4", 4),
        ("str | None", "None", None),
        ("str | None", "x", "x"),
        ("Optional[float]", "None", None),
        ("Optional[float]", "0.5", 0.5),
        ("Literal['a', 'b']", "b", "b"),
        ("Literal[4]", "4", 4),
        ("list", "['x', 1]", ["x", 1]),
        ("list[float]", "[1, 2.5]", [1, 2.5]),
        ("tuple[int, ...]", "(1, 2, 3)", (1, 2, 3)),
        ("tuple[int, str]", "(1, 'x')", (1, "x")),
        ("dict[str, int]", "{'a': 1}", {"a": 1}),
        ("dict[str, list[int]]", "{'a': [1]}", {"a": [1]}),
        ("Widths", "[1]", [1]),
    ],
)
def test_texts_become_values_of_the_type(kind, text, value):
    converted = convert(Parameter("x", kind, []), text)
    assert converted == value
    assert type(converted) is type(value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("int", "3.5"),
        ("int", "True"),
        ("int", ""),
        ("float", "nan"),
        ("float", "inf"),
        ("float", "a"),
        ("bool", "2"),
        ("int | None", "x"),
        ("Literal['a', 'b']", "c"),
        ("list[int]", "[1, 'x']"),
        ("list[int]", "[True]"),
        ("list[int]", "(1,)"),
        ("list[int]", "[1"),
        ("tuple[int, str]", "(1, 2)"),
        ("tuple[int, str]", "(1,)"),
        ("tuple[int, ...]", "(1, 'x')"),
        ("dict[str, int]", "{1: 1}"),
        ("list", "__import__('os').getcwd()"),
        ("Widths", "3"),
        ("list", "9" * 5000),
    ],
)
def test_texts_of_another_type_are_refused(kind, text):
    with pytest.raises(CourseError) as caught:
        convert(Parameter("x", kind, []), text)
    assert str(caught.value) == f"x must be {kind}, got {text!r}"


def test_shared_parameters_have_ranges():
    seed, profile, dataset = Parameter("seed", "int", 0), Parameter("profile", "str", "quick"), "digits"
    assert convert(seed, "4294967295") == 2**32 - 1
    for text in ("-1", "4294967296"):
        with pytest.raises(CourseError, match=f"seed must be an integer from 0 to 4294967295, got '{text}'"):
            convert(seed, text)
    assert convert(profile, "full") == "full"
    with pytest.raises(CourseError, match=r"profile must be one of quick, full, got 'Ful' \(did you mean full\?\)"):
        convert(profile, "Ful")
    assert convert(Parameter("dataset", "str", dataset), "kmnist") == "kmnist"
    with pytest.raises(
        CourseError, match=r"dataset must be one of digits, .*cifar10, got 'mnits' \(did you mean mnist"
    ):
        convert(Parameter("dataset", "str", dataset), "mnits")


def test_options_and_assignments_are_merged():
    assert merge({"seed": "1", "profile": None}, ["alpha=a=b", "seed=1"]) == (
        {"seed": "1", "alpha": "a=b"},
        {"alpha", "seed"},
    )
    for wrong in ("alpha", "=3", "2x=3"):
        with pytest.raises(CourseError, match=r"-p takes NAME=VALUE, got"):
            merge({}, [wrong])
    with pytest.raises(CourseError, match="seed is given twice: '1' and '2'"):
        merge({"seed": "1"}, ["seed=2"])


def test_an_explicit_name_must_be_known():
    check_known_names({"seed"}, ["seed"])
    with pytest.raises(CourseError, match=r"has a parameter 'alpah' \(did you mean alpha\?\); they have seed, alpha"):
        check_known_names({"alpah"}, ["seed", "alpha", "seed"])
    with pytest.raises(CourseError, match="'zz'; they have none"):
        check_known_names({"zz"}, [])
