"""The three places that name dependencies agree with each other and with what is installed."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kamal_lib.report import FOR_KERNELS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = {"kamal_lib", "", *(path.stem for path in (ROOT / "tests").glob("*.py"))}
ASKED = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]


def constraints() -> dict[str, Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {canonicalize_name(each.name): each for each in map(Requirement, filter(None, lines))}


def test_conda_environment_equals_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    *conda, pip = environment
    assert conda == [f"python{PROJECT['requires-python']}", "pip"]
    options = [line for line in pip["pip"] if line.startswith("-")]
    assert options == ["-c constraints.txt", "-e ."]
    assert sorted(line for line in pip["pip"] if line not in options) == sorted(ASKED)


@pytest.mark.parametrize(("folder", "asked"), [("kamal_lib", PROJECT["dependencies"]), ("tests", ASKED)])
def test_everything_imported_is_asked_for(folder: str, asked: list[str]):
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / folder).rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {each.name for node in nodes if isinstance(node, ast.Import) for each in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    modules = {name.split(".")[0] for name in names} - sys.stdlib_module_names - OURS
    providers = importlib.metadata.packages_distributions()
    declared = {canonicalize_name(Requirement(each).name) for each in asked}
    assert [m for m in sorted(modules) if not declared & set(map(canonicalize_name, providers[m]))] == []


def test_every_direct_dependency_has_one_exact_tested_version():
    tested = constraints()
    for asked in map(Requirement, ASKED):
        (pin,) = tested[canonicalize_name(asked.name)].specifier
        assert pin.operator == "=="
        assert asked.specifier.contains(pin.version), f"{asked} excludes the tested {pin.version}"


def test_installed_versions_are_the_tested_ones():
    tested, other = constraints(), []
    for asked in map(Requirement, ASKED):
        installed = importlib.metadata.version(asked.name)
        assert asked.specifier.contains(installed, prereleases=True), (
            f"{installed} is installed, {asked} needed"
        )
        if not tested[canonicalize_name(asked.name)].specifier.contains(installed):
            other.append(f"{asked.name} {installed}")
    if other:
        pytest.skip(f"within the bounds, but not the tested versions: {', '.join(other)}")


def test_make_and_the_report_give_kernels_the_same_environment():
    """Who has no make runs the report alone; the numbers stand in both."""
    lines = re.findall(r"^export (\w+) := (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert dict(lines) == FOR_KERNELS
