"""The promises that every script keeps: standalone, documented dependencies, short, executable."""

import ast
import os
import re
import subprocess
import sys
from collections import defaultdict
from functools import cache
from importlib import metadata as installed
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("run_*.py"))
MODULES = {path.stem for path in ROOT.glob("*.py")}
METADATA = re.compile(r"^# /// script\n((?:#(?: .*)?\n)+)# ///$", re.MULTILINE)  # PEP 723

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)


def requirements(lines) -> dict[str, set[str]]:
    """Name of each distribution to its bounds, such as {"jax": {">=0.6.2", "<0.11"}}."""
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(one.name): {str(bound) for bound in one.specifier} for one in parsed}


def listed_requirements() -> dict[str, set[str]]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return requirements(filter(None, lines))


def metadata(script: Path) -> dict:
    (block,) = METADATA.findall(script.read_text())
    return tomllib.loads("".join(line[2:] or "\n" for line in block.splitlines(keepends=True)))


def imports(script: Path) -> set[str]:
    """Names of the top-level packages that a script imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return {name.partition(".")[0] for name in names}


@cache
def installed_packages() -> dict[str, set[str]]:
    """Each top-level package or module to the distributions with files in it.

    `importlib.metadata.packages_distributions` of Python 3.10 misses those without a top_level.txt.
    """
    packages = defaultdict(set)
    for distribution in installed.distributions():
        name = canonicalize_name(distribution.metadata["Name"])
        for top in {file.parts[0].removesuffix(".py") for file in distribution.files or []}:
            packages[top].add(name)
    return packages


def distributions(script: Path) -> dict[str, set[str]]:
    """Each third-party package that a script imports, to the distributions that may have brought it."""
    return {name: installed_packages().get(name, set()) for name in imports(script) - set(sys.stdlib_module_names)}


def test_the_first_script_is_here():
    assert ROOT / "run_mlm_flax.py" in SCRIPTS


def test_requirements_have_both_bounds():
    for name, bounds in listed_requirements().items():
        assert {re.match(r"[<>]", bound)[0] for bound in bounds} == {"<", ">"}, name


@each_script
def test_metadata_agrees_with_requirements(script):
    found = metadata(script)
    assert found["requires-python"] == ">=3.10"
    listed = listed_requirements()
    own = requirements(found["dependencies"])
    assert own == {name: listed.get(name) for name in own}


@each_script
def test_metadata_lists_what_is_imported_and_no_more(script):
    listed = set(requirements(metadata(script)["dependencies"]))
    imported = distributions(script)
    assert [name for name, brought_by in imported.items() if not brought_by & listed] == []
    assert listed - set().union(*imported.values()) == set()


def test_every_requirement_is_imported_by_some_script():
    brought_by = set().union(*(names for path in ROOT.glob("*.py") for names in distributions(path).values()))
    assert set(listed_requirements()) - brought_by == set()


@each_script
def test_script_stands_alone(script):
    assert imports(script) & (MODULES | {""}) == set()  # "" is a relative import


@each_script
def test_script_is_executable(script):
    assert script.read_text().startswith("#!/usr/bin/env python\n")
    assert os.access(script, os.X_OK)


@each_script
def test_script_is_short(script):
    source = script.read_text()
    assert len(source.splitlines()) < 700
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    main = functions.get("main") or functions["run"]  # what only measures is no copy of the others' main
    assert main.end_lineno - main.lineno + 1 <= 100


def test_no_tracked_file_names_a_path_of_one_machine():
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    one_machine = re.compile(rf"(?<![\w.~-])(?:{re.escape(str(ROOT))}|/(?:home/\w+|Users/\w+|root|work|workspace))/")
    files = [ROOT / name for name in listing.split("\0") if name]
    found = {
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files
        if path.is_file()
        for match in one_machine.finditer(path.read_text(encoding="utf-8", errors="replace"))
    }
    assert found == set()
