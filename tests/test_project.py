"""The promises that every script keeps: standalone, documented dependencies, short, executable."""

import ast
import dataclasses
import importlib
import os
import re
import subprocess
import sys
import typing
from collections import Counter, defaultdict
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
    """Name of each distribution to its bounds, such as {"jax": {">=0.6.2", "<0.13"}}."""
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(one.name): {str(bound) for bound in one.specifier} for one in parsed}


def listed_requirements() -> dict[str, set[str]]:
    lines = (
        line.partition("#")[0].strip()
        for line in (ROOT / "requirements.txt").read_text().splitlines()
    )
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
    return {
        name: installed_packages().get(name, set())
        for name in imports(script) - set(sys.stdlib_module_names)
    }


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
    brought_by = set().union(
        *(names for path in ROOT.glob("*.py") for names in distributions(path).values())
    )
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
    functions = {
        node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)
    }
    main = (
        functions.get("main") or functions["run"]
    )  # what only measures is no copy of the others' main
    assert main.end_lineno - main.lineno + 1 <= 100


def argument_groups(script: Path) -> dict[str, list[str]]:
    """Title of each group of flags to the flags, with those that turn off what is on by default."""
    module, found = importlib.import_module(script.stem), {}
    for name in (
        "ModelArguments",
        "DataTrainingArguments",
        "TrainingArguments",
        "BenchmarkArguments",
    ):
        if group := getattr(module, name, None):
            fields = [(f.name, f.default is True) for f in dataclasses.fields(group)]
            flags = [
                flag for name, on in fields for flag in (name, *([f"no_{name}"] if on else []))
            ]
            found[group._argument_group_name] = [f"--{flag}" for flag in flags]
    return found


def settings_of(module):
    """Its function from a command line to settings."""
    return getattr(module, "parse_args", None) or module.read_args


def shown_groups(text: str) -> dict[str, list[str]]:
    """The same, as the text of --help has it."""
    parts = re.split(r"(?m)^(\w+):\n", text)
    return {
        title: re.findall(r"(?m)^  (--\w+)", part)
        for title, part in zip(parts[1::2], parts[2::2], strict=True)
    }


@each_script
def test_help_is_readable(script, run_script):
    """As a process: 80 columns, each flag once and in its group, nothing to do with any library."""
    done = run_script(
        [script.name, "--help"], env={"COLUMNS": "80", "NO_COLOR": "1", "FORCE_COLOR": None}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert done.stdout.startswith(f"usage: {script.name} ")
    description = ast.get_docstring(ast.parse(script.read_text()), clean=False).partition("\n\n")[0]
    assert " ".join(description.split()) in " ".join(done.stdout.split())
    groups = shown_groups(done.stdout)
    assert {
        title: flags for title, flags in groups.items() if title != "options"
    } == argument_groups(script)
    assert groups["options"] == []  # -h
    assert (
        Counter(
            re.findall(r"--\w[\w-]*", "".join(done.stdout.partition("options:")[1:]))
        ).most_common(1)[0][1]
        == 1
    )


@each_script
@pytest.mark.parametrize("columns", [80, 120])
def test_help_says_what_a_flag_takes(script, columns, capsys, monkeypatch):
    """A word for its value, none for a switch; the choices; a default if it is neither None nor False."""
    module = importlib.import_module(script.stem)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit, match=r"^0$"):
        settings_of(module)(["--seed=3", "-h"])  # wherever it stands
    text = capsys.readouterr().out
    assert (
        max(map(len, text.splitlines()[1:])) <= columns
    )  # the first has the name of the tests' program
    entries = [" ".join(entry.split()) for entry in re.findall(r"(?m)^  --.*(?:\n    .*)*", text)]
    shown = {flag: rest for flag, _, rest in (entry.partition(" ") for entry in entries)}
    assert shown["--seed"].startswith("SEED ")
    groups = [getattr(module, name) for name in dir(module) if name.endswith("Arguments")]
    for field in (field for group in groups for field in dataclasses.fields(group)):
        choices = (
            typing.get_args(field.type) if typing.get_origin(field.type) is typing.Literal else ()
        )
        value = (
            ""
            if field.type is bool
            else f"{{{','.join(choices)}}} "
            if choices
            else r"[\[\]A-Z0-9]+ "
        )
        said = not (field.default in (dataclasses.MISSING, None) or field.default is False)
        default = re.escape(f" (default: {field.default})") if said else ""
        pattern = re.compile(
            value.replace("{", r"\{") + re.escape(field.metadata["help"]) + default
        )
        assert pattern.fullmatch(shown[f"--{field.name}"]), field.name


@each_script
def test_flags_may_be_dashed(script):
    module = importlib.import_module(script.stem)
    flag = "--batch-size=2" if script.name == "run_bert_flax.py" else "--max-steps=2"
    with pytest.raises(module.InputError, match=r"^(?!unknown)"):
        settings_of(module)([flag, "--seed=-1"])
    with pytest.raises(module.InputError, match=r"^unknown arguments: --no-such-flag"):
        settings_of(module)(
            ["--output-dir=x"] * (flag == "--max-steps=2") + [flag, "--no-such-flag"]
        )


def test_no_tracked_file_names_a_path_of_one_machine():
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    one_machine = re.compile(
        rf"(?<![\w.~-])(?:{re.escape(str(ROOT))}|/(?:home/\w+|Users/\w+|root|work|workspace))/"
    )
    files = [ROOT / name for name in listing.split("\0") if name]
    found = {
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files
        if path.is_file()
        for match in one_machine.finditer(path.read_text(encoding="utf-8", errors="replace"))
    }
    assert found == set()
