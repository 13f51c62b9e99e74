"""What several scripts need stands in each of them, word for word; the check notices when it does not."""

import shutil
import subprocess
import sys
from itertools import pairwise

import copies
import pytest


@pytest.fixture
def root(tmp_path):
    for path in copies.scripts():
        shutil.copy(path, tmp_path)
    if len(copies.scripts(tmp_path)) == 1:
        pytest.skip("there is only one script")
    return tmp_path


def test_same_name_same_source():
    assert [message for _, _, message in copies.differences()] == []


def test_same_order():
    orders = [list(copies.definitions(path.read_text("utf-8"))) for path in copies.scripts()]
    for order in orders[1:]:
        shared = [name for name in order if name in orders[0]]
        assert shared == [name for name in orders[0] if name in order]


def test_the_list_of_those_that_differ_is_no_longer_than_needed():
    found = [copies.texts(path.read_text("utf-8")) for path in copies.scripts()]
    for name in copies.DIFFER_BY_OBJECTIVE:
        assert len({"".join(texts[name]) for texts in found if name in texts}) > 1, name


def change(path, name: str, edit) -> str:
    """Edits the lines of a definition in place, and returns the source from before."""
    source = path.read_text("utf-8")
    where, lines = copies.definitions(source)[name], source.splitlines(keepends=True)
    lines[where.start : where.stop] = edit(lines[where.start : where.stop])
    path.write_text("".join(lines), "utf-8")
    return source


EDITS = {
    "a comment more": lambda lines: [*lines[:-1], lines[-1].rstrip("\n") + "  # changed\n"],
    "a space more": lambda lines: [*lines[:-1], lines[-1].rstrip("\n") + " \n"],
    "a line more": lambda lines: [lines[0], "    # changed\n", *lines[1:]],
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(
    "name", ["InputError", "TrainingLog", "Saver", "prefetch", "make_optimizer"]
)
def test_a_changed_copy_is_found_and_fixed(root, name, edit):
    for path in [
        path
        for path in copies.scripts(root)[1:]
        if name in copies.definitions(path.read_text("utf-8"))
    ]:
        before = change(path, name, EDITS[edit])
        ((found, what, message),) = copies.differences(root)
        assert (found, what) == (path, name)
        assert path.name in message
        assert copies.fix(root) == [(path, name)]
        assert path.read_text("utf-8") == before
    assert copies.differences(root) == []


def test_a_changed_constant_is_found(root):
    path = root / "run_t5_mlm_flax.py"
    change(path, "IGNORE", lambda lines: ["IGNORE = -101\n"])
    assert [name for _, name, _ in copies.differences(root)] == ["IGNORE"]


def test_a_changed_template_is_written_into_all(root):
    template, *others = copies.scripts(root)
    change(template, "prefetch", EDITS["a comment more"])
    others = [path for path in others if "prefetch" in copies.definitions(path.read_text("utf-8"))]
    assert sorted(copies.fix(root)) == sorted((path, "prefetch") for path in others)
    assert copies.differences(root) == []
    assert all("  # changed\n" in path.read_text("utf-8") for path in others)


def test_what_differs_by_objective_is_left_alone_but_watched(root):
    path = root / "run_t5_mlm_flax.py"
    changed = change(
        path, "main", lambda lines: [lines[0], *(f"    # {i}\n" for i in range(40)), *lines[1:]]
    )
    assert copies.fix(root) == []
    assert path.read_text("utf-8") != changed
    assert [name for _, name, _ in copies.differences(root)] == ["main"]


def test_neighbouring_definitions_stay_apart():
    sources = [path.read_text("utf-8") for path in copies.scripts()]
    for where in (list(copies.definitions(source).values()) for source in sources):
        assert all(a.stop <= b.start for a, b in pairwise(where))


def test_the_command():
    run = subprocess.run(
        [sys.executable, copies.__file__], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
