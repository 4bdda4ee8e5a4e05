"""The documents say what is there: commands, links, versions; and make installs what they say."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rattler import MatchSpec, Version, VersionSpec

from course_lib.classroom.cli import main
from course_lib.classroom.lessons import find_lessons
from course_lib.classroom.reports import refresh_readme

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LOCKS = {n: (ROOT / f"requirements{n}.lock").read_text(encoding="utf-8").splitlines() for n in ("", "-dev")}
CONDA_NAMES = {"torch": "pytorch"}
NOT_FOR_READERS = {"pip", "python", "setuptools"}
TOOLS = {"pytest", "ruff", "nbval", "hypothesis", "jupytext", "uv", "torchmetrics", "torch-pruning", "distributed"}


def locked(name, *locks):
    """The locked versions of a package, one for each environment marker."""
    wanted = re.sub(r"[-_.]+", "-", name).lower()
    lines = [line for lock in locks or LOCKS for line in LOCKS[lock]]
    return [line.split(" ;")[0].split("==")[1] for line in lines if line.split("==")[0].split("[")[0].lower() == wanted]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_links_and_make_targets_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        assert link.startswith("https://") or (ROOT / link).exists(), link
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    spoken = "\n".join(re.findall(r"`[^`]+`|```sh[\s\S]*?```", text))
    used = set(re.findall(r"\bmake ([a-z]+)", re.sub(r"```sh\nmake  ", "", spoken)))
    assert used
    assert used <= targets, used - targets


def test_python_commands_of_the_readme_exist():
    commands = set(re.findall(r"-m course_lib (\w+)", README))
    assert {"doctor", "list", "claims"} <= commands
    for command in commands - {"practice"}:
        assert main([command, "--help"]) == 0


def test_the_readme_shows_what_the_stored_lessons_measured_and_leads_to_them():
    assert refresh_readme(ROOT / "notebooks", check=True) == [], "make readme brings it up to date"
    for chapter in {lesson.place.parts[0] for lesson in find_lessons(ROOT / "notebooks")}:
        assert f"(notebooks/{chapter}" in README, chapter


def test_make_alone_prints_every_target():
    shown = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wanted = "setup course lab practice test lint format notebooks readme replicate bench demo book slides lock clean"
    for target in wanted.split():
        assert re.search(rf"^  make {target} +\S", shown, re.M), target


def test_ci_runs_the_readmes_two_commands():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("make")] == ["make test", "make course"]
    assert "set -euo pipefail" in lines


def test_the_locks_are_exact_name_no_address_and_share_nothing():
    for lines in LOCKS.values():
        assert all(re.match(r"[\w.\[\]-]+==[\w.+!]+( ; .+)?$", line) for line in lines)
    assert not set(LOCKS[""]) & set(LOCKS["-dev"])
    assert {"win32", "darwin", "linux"} <= set(re.findall(r"sys_platform == '(\w+)'", "\n".join(LOCKS[""])))


def test_a_learner_gets_what_the_lessons_need_and_no_tools():
    assert not any(locked(name, "") for name in TOOLS)
    assert all(locked(Requirement(text).name, "") for text in PROJECT["dependencies"])


@pytest.mark.parametrize("text", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]])
def test_every_requirement_is_locked_within_its_range(text):
    requirement = Requirement(text)
    assert locked(requirement.name)
    assert all(version in requirement.specifier for version in locked(requirement.name))


def test_environment_yml_agrees_with_pyproject_and_lock():
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    environment = yaml.safe_load(text)
    assert environment["channels"] == ["conda-forge"]
    asked = map(MatchSpec, (line for line in environment["dependencies"] if isinstance(line, str)))
    specs = {spec.name.normalized: spec for spec in asked}
    needed = {CONDA_NAMES.get(r.name, r.name): r for r in map(Requirement, PROJECT["dependencies"])}
    assert set(specs) == set(needed) | NOT_FOR_READERS
    for name, requirement in needed.items():
        least = [s.version for s in requirement.specifier if s.operator in (">=", "==")]
        assert least, f"{requirement} has no lower bound"
        for version in [*locked(requirement.name), least[0]]:
            assert VersionSpec(specs[name].version).matches(Version(version)), f"{name}: {version}"
    version = re.fullmatch(r"(3\.\d+)\.\*", str(specs["python"].version))[1]  # Binder takes one version, no range
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)
    entries = [line for line in text.splitlines() if line.lstrip().startswith("- ") and line.strip() != "- pip:"]
    assert all(re.search(r"  # \w", line) for line in entries), "every line says why it is there"


@pytest.fixture
def make(tmp_path):
    """``make`` with an environment whose Python only writes down what it is told: (run, what was told)."""
    program, told = tmp_path / "v" / "bin" / "python", tmp_path / "told"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\necho "$*" >> "{told}"\ncase "$*" in *"$REFUSE"*) exit 1;; esac\n')
    program.chmod(0o755)

    def run(*arguments, refuse="nothing at all"):
        told.write_text("")
        env = {n: v for n, v in os.environ.items() if not n.startswith("MAKE")} | {"REFUSE": refuse}
        command = ["make", "-s", f"VENV={tmp_path / 'v'}", f"PYTHON={program}", *arguments]
        code = subprocess.run(command, cwd=ROOT, env=env, capture_output=True).returncode
        return code, [line for line in told.read_text().splitlines() if "pip install" in line or "course_lib" in line]

    return run


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for Python")
def test_make_installs_the_learners_lock_and_the_tools_on_top(make, tmp_path):
    assert make("setup", refuse="requirements.lock")[0] != 0
    assert not (tmp_path / "v" / "installed.lock").exists()
    code, told = make("course", "CHAPTERS=02 05.1", "SEED=3")
    assert code == 0
    assert [line.split()[-1] for line in told[:2]] == ["requirements.lock", "."]
    assert told[2] == "-m course_lib run 02 05.1 --dataset digits --profile quick --seed 3 --jobs 2"
    assert make("replicate", "SEEDS=1 2", "DATASET=mnist")[1] == [
        "-m course_lib replicate --seeds 1 2 --dataset mnist --profile quick --jobs 2"
    ]
    code, told = make("lint")
    assert (code, [line.split()[-1] for line in told]) == (0, ["requirements-dev.lock"])
    assert make("lint", "setup") == (0, [])


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for Python")
def test_make_takes_torch_from_the_index_that_is_named(make, tmp_path):
    code, told = make("setup", "TORCH_INDEX=https://example.org/cpu")
    assert code == 0
    assert "--no-deps -r" in told[0]
    assert "--index-url https://example.org/cpu -r" in told[1]
    torch, rest = ((tmp_path / "v" / name).read_text().splitlines() for name in ("torch.lock", "rest.lock"))
    assert [line.partition("==")[0] for line in torch] == ["torch", "torchvision"]
    assert set(torch) | set(rest) <= set(LOCKS[""])
    left = {line.partition("==")[0] for line in set(LOCKS[""]) - set(torch) - set(rest)}
    assert {"triton", "nvidia-cublas", "cuda-toolkit"} <= left
    assert all(name == "triton" or name.startswith(("nvidia-", "cuda-")) for name in left)
    assert make("setup") == (0, [])
    assert [line.split()[-1] for line in make("lint")[1]] == ["requirements-dev.lock"]
