"""The code that several scripts share is the same in each, and the check finds a difference."""

import itertools
import shutil
import subprocess
import sys

import copies
import pytest
from training_scripts import full_but


@pytest.fixture
def root(tmp_path):
    """A folder with copies of the scripts, for tests to edit."""
    for path in copies.find_scripts():
        shutil.copy(path, tmp_path)
    if len(copies.find_scripts(tmp_path)) == 1:
        pytest.skip("there is only one script")
    return tmp_path


def definitions_of(path) -> dict[str, slice]:
    return copies.find_definitions(path.read_text("utf-8"))


def scripts_with(name: str, root) -> list:
    """The scripts other than the template that have a definition."""
    return [path for path in copies.find_scripts(root)[1:] if name in definitions_of(path)]


def test_same_name_same_source():
    assert [message for _, _, message in copies.find_differences()] == []


def test_same_order():
    template, *others = [list(definitions_of(path)) for path in copies.find_scripts()]
    for order in others:
        shared = [name for name in order if name in template]
        assert shared == [name for name in template if name in order]


def test_tables_name_definitions_that_exist():
    template = definitions_of(copies.ROOT / copies.TEMPLATE)
    for script, names in copies.DIFFERENCES.items():
        assert names.keys() <= definitions_of(copies.ROOT / script).keys(), script
    for script, names in copies.ABSENT.items():
        assert names <= template.keys(), script


def change(path, name: str, edit) -> str:
    """Edit the lines of a definition in place, and return the source from before."""
    source = path.read_text("utf-8")
    where = copies.find_definitions(source)[name]
    lines = source.splitlines(keepends=True)
    lines[where] = edit(lines[where])
    path.write_text("".join(lines), "utf-8")
    return source


def add_comment(lines: list[str]) -> list[str]:
    return [*lines[:-1], lines[-1].rstrip("\n") + "  # changed\n"]


def add_space(lines: list[str]) -> list[str]:
    return [*lines[:-1], lines[-1].rstrip("\n") + " \n"]


def add_line(lines: list[str]) -> list[str]:
    return [lines[0], "    # changed\n", *lines[1:]]


def add_forty_lines(lines: list[str]) -> list[str]:
    added = [f"    # {i}\n" for i in range(40)]
    return [lines[0], *added, *lines[1:]]


def replace_by_another_number(lines: list[str]) -> list[str]:
    return ["IGNORE = -101\n"]


NAMES = ("InputError", "TrainingLog", "Saver", "prefetch", "make_optimizer")
EDITS = (add_comment, add_space, add_line)


@pytest.mark.parametrize(
    ("name", "edit"),
    full_but(
        itertools.product(NAMES, EDITS),
        ("Saver", add_space),
        ("prefetch", add_comment),
        ("make_optimizer", add_line),
    ),
)
def test_changed_copy_is_found_and_fixed(root, name, edit):
    before = {path: change(path, name, edit) for path in scripts_with(name, root)}
    differences = copies.find_differences(root)
    assert [(path, what) for path, what, _ in differences] == [(path, name) for path in before]
    assert all(path.name in message for path, _, message in differences)
    assert copies.fix(root) == [(path, name) for path in before]
    assert {path: path.read_text("utf-8") for path in before} == before
    assert copies.find_differences(root) == []


def test_one_changed_copy_is_found(root):
    path = scripts_with("Saver", root)[1]
    change(path, "Saver", add_line)
    ((found, what, _),) = copies.find_differences(root)
    assert (found, what) == (path, "Saver")


def test_changed_constant_is_found(root):
    change(root / "run_t5_mlm_flax.py", "IGNORE", replace_by_another_number)
    assert [name for _, name, _ in copies.find_differences(root)] == ["IGNORE"]


def test_changed_template_is_copied_into_all(root):
    change(root / copies.TEMPLATE, "prefetch", add_comment)
    others = scripts_with("prefetch", root)
    assert sorted(copies.fix(root)) == sorted((path, "prefetch") for path in others)
    assert copies.find_differences(root) == []
    for path in others:
        assert "  # changed\n" in path.read_text("utf-8")


def test_difference_by_objective_is_not_fixed_but_limited(root):
    path = root / "run_t5_mlm_flax.py"
    before = change(path, "tokenize", add_forty_lines)
    assert copies.fix(root) == []
    assert path.read_text("utf-8") != before
    assert [name for _, name, _ in copies.find_differences(root)] == ["tokenize"]


def donate_totals(lines: list[str]) -> list[str]:
    return [line.replace("donate_argnums=0", "donate_argnums=(0, 1)") for line in lines]


def test_a_change_of_the_template_that_is_not_copied_is_found(root):
    """`make_steps` differs by objective, so it is not copied, but not in the streaming script."""
    change(root / copies.TEMPLATE, "make_steps", donate_totals)
    assert copies.fix(root) == [(root / "run_mlm_flax_stream.py", "make_steps")]
    for name in ("run_clm_flax.py", "run_t5_mlm_flax.py", "run_bart_dlm_flax.py"):
        change(root / name, "loss_sums", add_line)
    found = {path.name for path, name, _ in copies.find_differences(root) if name == "make_steps"}
    assert found == {"run_clm_flax.py", "run_t5_mlm_flax.py", "run_bart_dlm_flax.py"}


def test_a_difference_that_has_become_smaller_is_found(root):
    lines = copies.read_definitions(root / copies.TEMPLATE)["make_steps"]
    change(root / "run_clm_flax.py", "make_steps", lambda old: lines)
    ((path, name, message),) = copies.find_differences(root)
    assert (path.name, name) == ("run_clm_flax.py", "make_steps")
    assert "0 lines differ" in message


def add_helper(lines: list[str]) -> list[str]:
    return ["def helper():\n", "    return 1\n", "\n", "\n", *lines]


def rename(lines: list[str]) -> list[str]:
    return [line.replace("def prefetch(", "def read_ahead(") for line in lines]


@pytest.mark.parametrize(("edit", "missing"), [(add_helper, "helper"), (rename, "read_ahead")])
def test_added_and_renamed_definitions_of_the_template_are_found(root, edit, missing):
    change(root / copies.TEMPLATE, "prefetch", edit)
    found = {(path.name, name) for path, name, _ in copies.find_differences(root)}
    assert found == {(script, missing) for script in copies.ABSENT}


def test_a_changed_comment_above_a_definition_is_found(root):
    change(root / "run_t5_mlm_flax.py", "MAX_STEPS", lambda lines: ["# Changed.\n", lines[-1]])
    assert [name for _, name, _ in copies.find_differences(root)] == ["MAX_STEPS"]


def test_definitions_do_not_overlap():
    for path in copies.find_scripts():
        for first, second in itertools.pairwise(definitions_of(path).values()):
            assert first.stop <= second.start


def test_command():
    done = subprocess.run(
        [sys.executable, copies.__file__], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
