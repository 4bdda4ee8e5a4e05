"""The documents say what is there: commands, links, versions."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from rattler import MatchSpec, Version, VersionSpec

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONDA_NAMES = {"torch": "pytorch"}
NOT_FOR_READERS = {"pip", "python", "setuptools"}


def locked(name):
    """The locked versions of a package, one for each environment marker."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    wanted = re.sub(r"[-_.]+", "-", name).lower()
    return [line.split(" ;")[0].split("==")[1] for line in lines if line.split("==")[0].split("[")[0].lower() == wanted]


def conda():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    return environment, {
        spec.name.normalized: spec
        for spec in map(MatchSpec, filter(lambda d: isinstance(d, str), environment["dependencies"]))
    }


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_links_and_make_targets_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (ROOT / link).exists(), link
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    used = set(
        re.findall(
            r"\bmake ([a-z]+)", re.sub(r"```sh\nmake  ", "", "\n".join(re.findall(r"`[^`]+`|```sh[\s\S]*?```", text)))
        )
    )
    assert used
    assert used <= targets, used - targets


def test_python_commands_of_the_readme_exist():
    from course_lib.classroom.cli import main

    commands = set(re.findall(r"-m course_lib (\w+)", README))
    assert {"doctor", "list", "claims"} <= commands
    for command in commands:
        assert main([command, "--help"]) == 0


def test_the_readme_shows_what_the_stored_chapters_measured():
    from course_lib.classroom.readme import refresh_readme

    assert refresh_readme(ROOT, ROOT / "notebooks", check=True) == [], "make readme brings it up to date"


def test_the_readme_leads_to_every_chapter():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"(notebooks/{path.name})" in README, path.name


def test_make_alone_prints_every_target():
    shown = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ["setup", "course", "test", "lint", "format", "notebooks", "readme", "lab", "bench", "lock", "clean"]:
        assert re.search(rf"^  make {target} +\S", shown, re.M), target


def test_ci_runs_the_readmes_two_commands():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("make")] == ["make test", "make course"]
    assert "set -euo pipefail" in lines


def test_the_lock_is_exact_and_names_no_address():
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"[\w.\[\]-]+==[\w.+!]+( ; .+)?$", line) for line in lines if not line.startswith("#"))
    assert {"win32", "darwin", "linux"} <= set(re.findall(r"sys_platform == '(\w+)'", "\n".join(lines)))


@pytest.mark.parametrize("text", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]])
def test_every_requirement_is_locked_within_its_range(text):
    requirement = Requirement(text)
    assert locked(requirement.name)
    assert all(version in requirement.specifier for version in locked(requirement.name))


def test_environment_yml_agrees_with_pyproject_and_lock():
    environment, specs = conda()
    assert environment["channels"] == ["conda-forge"]
    needed = {
        CONDA_NAMES.get(Requirement(text).name, Requirement(text).name): Requirement(text)
        for text in PROJECT["dependencies"]
    }
    assert set(needed) <= set(specs)
    assert set(specs) - set(needed) == NOT_FOR_READERS
    for name, requirement in needed.items():
        for version in locked(requirement.name):
            assert VersionSpec(specs[name].version).matches(Version(version)), (
                f"{name}: {specs[name].version} against the lock's {version}"
            )
        lower = [s.version for s in requirement.specifier if s.operator in (">=", "==")]
        assert lower, text_of(requirement)
        assert VersionSpec(specs[name].version).matches(Version(lower[0])), f"{name}: pyproject allows {lower[0]}"
    least = PROJECT["requires-python"].removeprefix(">=")
    assert VersionSpec(specs["python"].version).matches(Version(least))
    assert not VersionSpec(specs["python"].version).matches(Version("3.10"))


def text_of(requirement):
    return f"{requirement} has no lower bound"


def test_every_line_of_environment_yml_says_why_it_is_there():
    lines = (ROOT / "environment.yml").read_text(encoding="utf-8").splitlines()
    entries = [line for line in lines if line.lstrip().startswith("- ") and line.strip() != "- pip:"]
    assert len(entries) > 20
    assert all(re.search(r"  # \w", line) for line in entries)


def test_a_warm_setup_takes_under_a_second():
    import time

    if not (ROOT / ".venv" / "installed.lock").exists():
        pytest.skip("not installed by make setup")
    started = time.perf_counter()
    subprocess.run(["make", "-s", "setup"], cwd=ROOT, check=True)
    assert time.perf_counter() - started < 1.0
