"""What other people's machines run: checked by the formats' own schemas and by tools that need no network."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
CITATION = ROOT / "CITATION.cff"
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


def tool(name, *arguments):
    """Run a command line tool of this environment in the project: (exit code, what it printed)."""
    program = shutil.which(name, path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip(f"{name} is not installed: make setup-dev")
    done = subprocess.run([program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(("schema", "path"), [("github-workflows", WORKFLOW), ("citation-file-format", CITATION)])
def test_files_of_the_cloud_fit_their_schemas(schema, path):
    schemas = pytest.importorskip("check_jsonschema.builtin_schemas", reason="make setup-dev installs the schemas")
    import jsonschema
    import ruamel.yaml

    schema = schemas.get_builtin_schema(f"vendor.{schema}")
    check = jsonschema.validators.validator_for(schema)(schema)
    read = ruamel.yaml.YAML(typ="safe").load(path.read_text(encoding="utf-8"))  # YAML 1.2, where `on` is a word
    told = json.loads(json.dumps(read, default=str))
    assert list(check.iter_errors(told)) == []
    told.pop(next(name for name in ("jobs", "authors") if name in told))
    assert list(check.iter_errors(told))


def test_the_workflow_is_safe_and_runs_what_the_makefile_has():
    code, told = tool("zizmor", "--offline", "--no-progress", "--persona", "auditor", str(WORKFLOW))
    assert code == 0, told
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step["uses"]) for step in steps if "uses" in step)
    commands = [step["run"] for step in steps if "run" in step]
    assert ".ci/run" in commands
    systems = workflow["jobs"]["first-lessons"]["strategy"]["matrix"]["system"]
    assert {name.partition("-")[0] for name in systems} == {"ubuntu", "macos", "windows"}
    used = {word for line in commands if line.startswith("make ") for word in re.findall(r" ([a-z]+)\b(?!=)", line)}
    assert {"course", "book"} <= used <= TARGETS


def test_binder_takes_python_and_packages_from_the_environment_file():
    code, told = tool("repo2docker", "--no-build", "--debug", ".")  # prints the recipe, needs no engine
    assert code == 0, told
    assert 'env update -p ${NB_PYTHON_PREFIX} --file "environment.yml"' in told
    asked = re.search(r"python =([\d.]+)", (ROOT / "environment.yml").read_text(encoding="utf-8"))[1]
    assert f"Building conda environment for python={asked}" in told


def test_the_container_is_set_up_by_a_make_target():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    assert container["image"].count(":") == 1, "a tag, not whatever is the latest"
    assert container["postCreateCommand"].removeprefix("make ") in TARGETS
    assert set(container) <= {
        "name", "image", "hostRequirements", "containerEnv", "postCreateCommand", "forwardPorts", "portsAttributes",
        "customizations",
    }  # fmt: skip


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load(CITATION.read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
