"""Every script is standalone and executable, lists its dependencies, and documents its flags."""

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
from training_scripts import full_but

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # a dependency of pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(ROOT.glob("run_*.py"))
MODULES = {path.stem for path in ROOT.glob("*.py")}
# The block of inline script metadata of PEP 723.
METADATA = re.compile(r"^# /// script\n((?:#(?: .*)?\n)+)# ///$", re.MULTILINE)
ARGUMENT_CLASSES = (
    "ModelArguments",
    "DataTrainingArguments",
    "TrainingArguments",
    "BenchmarkArguments",
)

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)


def parse_requirements(lines) -> dict[str, set[str]]:
    """Map the name of each distribution to its bounds, as in {"jax": {">=0.6.2", "<0.13"}}."""
    found = {}
    for line in lines:
        requirement = Requirement(line)
        bounds = {str(bound) for bound in requirement.specifier}
        found[canonicalize_name(requirement.name)] = bounds
    return found


def listed_requirements() -> dict[str, set[str]]:
    """Names and bounds of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    without_comments = [line.partition("#")[0].strip() for line in lines]
    return parse_requirements(line for line in without_comments if line)


def read_metadata(script: Path) -> dict:
    (block,) = METADATA.findall(script.read_text())
    lines = block.splitlines(keepends=True)
    return tomllib.loads("".join(line[2:] or "\n" for line in lines))


def find_imports(script: Path) -> set[str]:
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
    """Map each top-level package or module to the distributions with files in it.

    `importlib.metadata.packages_distributions` of Python 3.10 misses those without a top_level.txt.
    """
    packages = defaultdict(set)
    for distribution in installed.distributions():
        name = canonicalize_name(distribution.metadata["Name"])
        for top in {file.parts[0].removesuffix(".py") for file in distribution.files or []}:
            packages[top].add(name)
    return packages


def imported_distributions(script: Path) -> dict[str, set[str]]:
    """Map each third-party package that a script imports to the distributions that provide it."""
    third_party = find_imports(script) - set(sys.stdlib_module_names)
    return {name: installed_packages().get(name, set()) for name in third_party}


def test_the_first_script_is_here():
    assert ROOT / "run_mlm_flax.py" in SCRIPTS


def test_requirements_have_both_bounds():
    for name, bounds in listed_requirements().items():
        assert {re.match(r"[<>]", bound)[0] for bound in bounds} == {"<", ">"}, name


@each_script
def test_metadata_agrees_with_requirements(script):
    found = read_metadata(script)
    assert found["requires-python"] == ">=3.10"
    listed = listed_requirements()
    own = parse_requirements(found["dependencies"])
    assert own == {name: listed.get(name) for name in own}


@each_script
def test_metadata_lists_what_is_imported_and_no_more(script):
    listed = set(parse_requirements(read_metadata(script)["dependencies"]))
    imported = imported_distributions(script)
    assert [name for name, providers in imported.items() if not providers & listed] == []
    assert listed - set().union(*imported.values()) == set()


def test_every_requirement_is_imported_by_some_script():
    providers = set()
    for path in ROOT.glob("*.py"):
        providers.update(*imported_distributions(path).values())
    assert set(listed_requirements()) - providers == set()


@each_script
def test_script_stands_alone(script):
    relative = ""
    assert find_imports(script) & (MODULES | {relative}) == set()


@each_script
def test_script_is_executable(script):
    assert script.read_text().startswith("#!/usr/bin/env python\n")
    assert os.access(script, os.X_OK)


def argument_groups(script: Path) -> dict[str, list[str]]:
    """Map the title of each group of flags to the flags.

    A flag that is on by default is followed by the one that turns it off.
    """
    module = importlib.import_module(script.stem)
    found = {}
    for group in (getattr(module, name) for name in ARGUMENT_CLASSES if hasattr(module, name)):
        flags = []
        for field in dataclasses.fields(group):
            flags.append(f"--{field.name}")
            if field.default is True:
                flags.append(f"--no_{field.name}")
        found[group._argument_group_name] = flags
    return found


def settings_of(module):
    """The function of a script that makes settings of a command line."""
    return getattr(module, "parse_args", None) or module.read_args


def shown_groups(text: str) -> dict[str, list[str]]:
    """Map the title of each group in the text of --help to the flags."""
    _, *parts = re.split(r"(?m)^(\w+):\n", text)
    groups = zip(parts[::2], parts[1::2], strict=True)
    return {title: re.findall(r"(?m)^  (--\w+)", part) for title, part in groups}


@pytest.mark.parametrize(
    "script", full_but(SCRIPTS, ROOT / "run_mlm_flax.py", ROOT / "run_bert_flax.py"), ids=str
)
def test_help_is_readable(script, run_script):
    """In 80 columns, each flag once and in its group, and no output of any library."""
    variables = {"COLUMNS": "80", "NO_COLOR": "1", "FORCE_COLOR": None}
    done = run_script([script.name, "--help"], env=variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert done.stdout.startswith(f"usage: {script.name} ")
    docstring = ast.get_docstring(ast.parse(script.read_text()), clean=False)
    description = docstring.partition("\n\n")[0]
    assert " ".join(description.split()) in " ".join(done.stdout.split())
    groups = shown_groups(done.stdout)
    options = groups.pop("options")
    assert groups == argument_groups(script)
    # The only option is -h.
    assert options == []
    below_usage = "".join(done.stdout.partition("options:")[1:])
    # Help texts may name other flags. Entries begin after two spaces.
    counts = Counter(re.findall(r"(?m)^  (--\w[\w-]*)", below_usage))
    assert counts.most_common(1)[0][1] == 1


def help_pattern(field) -> str:
    """Regular expression of the entry of --help of a flag, after its name, on one line."""
    value = r"[\[\]A-Z0-9]+(?: \[[A-Z]+ \.\.\.\])? "
    if field.type is bool:
        value = ""
    elif typing.get_origin(field.type) is typing.Literal:
        choices = "{" + ",".join(typing.get_args(field.type)) + "}"
        if field.metadata.get("nargs") == "?":
            choices = f"[{choices}]"
        value = re.escape(f"{choices} ")
    default = ""
    is_shown = field.default not in (dataclasses.MISSING, None) and field.default is not False
    if is_shown:
        default = re.escape(f" (default: {field.default})")
    return value + re.escape(field.metadata["help"]) + default


@each_script
@pytest.mark.parametrize("columns", [80, 120])
def test_help_says_what_a_flag_takes(script, columns, capsys, monkeypatch):
    """A word for a value and none for a switch, the choices, and a default but None and False."""
    module = importlib.import_module(script.stem)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    # -h works at any place in the command line.
    with pytest.raises(SystemExit, match=r"^0$"):
        settings_of(module)(["--seed=3", "-h"])
    text = capsys.readouterr().out
    # The first line has the name of the program that runs the tests.
    assert max(map(len, text.splitlines()[1:])) <= columns
    shown = {}
    for entry in re.findall(r"(?m)^  --.*(?:\n    .*)*", text):
        flag, *words = entry.split()
        shown[flag] = " ".join(words)
    assert shown["--seed"].startswith("SEED ")
    groups = [getattr(module, name) for name in dir(module) if name.endswith("Arguments")]
    for field in (field for group in groups for field in dataclasses.fields(group)):
        assert re.fullmatch(help_pattern(field), shown[f"--{field.name}"]), field.name


@each_script
def test_flags_may_be_dashed(script):
    module = importlib.import_module(script.stem)
    is_training_script = script.name != "run_bert_flax.py"
    flag = "--max-steps=2" if is_training_script else "--batch-size=2"
    required = ["--output-dir=x"] if is_training_script else []
    with pytest.raises(module.InputError, match=r"^(?!unknown)"):
        settings_of(module)([flag, "--seed=-1"])
    with pytest.raises(module.InputError, match=r"^unknown arguments: --no-such-flag"):
        settings_of(module)([*required, flag, "--no-such-flag"])


def test_no_tracked_file_names_a_path_of_one_machine():
    command = ["git", "ls-files", "-z"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    folders = rf"{re.escape(str(ROOT))}|/(?:home/\w+|Users/\w+|root|work|workspace)"
    one_machine = re.compile(rf"(?<![\w.~-])(?:{folders})/")
    found = set()
    for path in (ROOT / name for name in listing.stdout.split("\0") if name):
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            found |= {
                f"{path.relative_to(ROOT)}: {match[0]}" for match in one_machine.finditer(text)
            }
    assert found == set()
