"""Who may import whom, how long a module may be, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "course_lib").rglob("*.py"))
HEAVY = ("sklearn", "scipy", "torchvision", "onnx", "matplotlib", "papermill")
FORBIDDEN = {
    "methods": {"evidence", "lab", "classroom"},
    "evidence": {"methods", "lab", "classroom"},
    "lab": {"classroom"},
    "classroom": set(),
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import hides its room"
            yield from (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "course_lib"
                else [node.module]
            )


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_keep_to_their_neighbours(path):
    room = path.relative_to(ROOT / "course_lib").parts[0]
    for name in imported(path):
        parts = name.split(".")
        assert parts[0] != "notebooks", f"{path.name} imports a notebook"
        if parts[0] == "course_lib" and len(parts) > 1 and room in FORBIDDEN:
            assert parts[1] not in FORBIDDEN[room], f"{path.name}: {room} may not import {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_stay_short_and_say_what_they_are(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 330
    assert ast.get_docstring(ast.parse(text))


def test_the_rule_would_catch_an_offence(tmp_path):
    offender = tmp_path / "bad.py"
    offender.write_text("def f():\n    from course_lib.lab.data import Split\n    from course_lib import lab\n")
    assert list(imported(offender)) == ["course_lib.lab.data", "course_lib.lab"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_public_name_has_a_docstring(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lists = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    public = {name for found in lists for name in ast.literal_eval(found)}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in public:
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


def test_importing_the_library_costs_next_to_nothing():
    report = "import sys; print([m for m in " + repr(HEAVY) + " if m in sys.modules])"
    timed = "import time, torch; t = time.perf_counter(); import course_lib; print(time.perf_counter() - t); " + report
    seconds, loaded = run(timed).splitlines()
    assert float(seconds) < 0.05
    assert loaded == run("import torch; " + report)


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_rooms_are_reached_by_name():
    import course_lib

    assert course_lib.lab.__name__ == "course_lib.lab"
    assert {"methods", "evidence", "lab", "classroom"} <= set(dir(course_lib))
    with pytest.raises(AttributeError, match="its rooms are methods"):
        _ = course_lib.kitchen
