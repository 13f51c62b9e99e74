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


def test_table_has_no_name_that_is_the_same_in_all_scripts():
    scripts = [copies.read_definitions(path) for path in copies.find_scripts()]
    for name in copies.DIFFER_BY_OBJECTIVE:
        sources = {"".join(definitions[name]) for definitions in scripts if name in definitions}
        assert len(sources) > 1, name


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


def test_definitions_do_not_overlap():
    for path in copies.find_scripts():
        for first, second in itertools.pairwise(definitions_of(path).values()):
            assert first.stop <= second.start


def test_command():
    done = subprocess.run(
        [sys.executable, copies.__file__], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
