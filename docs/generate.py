#!/usr/bin/env python
"""Write what is generated in README.md and docs/*.md.

    make docs
    python docs/generate.py

Each generated part lies between two HTML comments, such as `<!-- flags of: run_mlm_flax.py -->` and
`<!-- end of flags -->`. There are four kinds:

    flags of: SCRIPT      the tables of a script's flags, from its dataclasses
    families              the table of model families, from the list of those that the tests train
    measured: NAME        a table of benchmarks/results/NAME.json
    diff of: CHANGE       a change of docs/changes.py as a diff of run_mlm_flax.py

A test checks that the pages are what this command would write.
"""

import dataclasses
import difflib
import importlib
import os
import re
import sys
import textwrap
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = re.compile(
    r"^<!-- (flags of|families|measured|diff of)(?:: (\S+))? -->\n"
    r".*?"
    r"^<!-- end of \w+ -->$",
    re.MULTILINE | re.DOTALL,
)


# ---------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------

# The other training scripts list only the flags that differ from those of this one.
TEMPLATE = "run_mlm_flax"
GROUPS = ("ModelArguments", "DataTrainingArguments", "TrainingArguments", "BenchmarkArguments")
DEFAULTS = {"None": "", "True": "on", "False": "off"}


def field_groups(script: str) -> list[tuple[str, list]]:
    """The fields of each dataclass of flags of a script, by the title of the group in --help."""
    module = importlib.import_module(script)
    groups = [getattr(module, name) for name in GROUPS if hasattr(module, name)]
    return [(group._argument_group_name, list(dataclasses.fields(group))) for group in groups]


def fields_of(script: str) -> list:
    return [field for _, group in field_groups(script) for field in group]


def documentation(field) -> tuple:
    """What a row of a table depends on. It is equal for a flag that two scripts share."""
    return field.name, field.default, field.metadata["help"]


def flag_row(field) -> tuple[str, str, str]:
    """Name, default and meaning of a flag."""
    if field.default is dataclasses.MISSING:
        default = "required"
    else:
        default = DEFAULTS.get(repr(field.default), str(field.default))
    meaning = field.metadata["help"]
    if typing.get_origin(field.type) is typing.Literal:
        meaning += f" One of {', '.join(typing.get_args(field.type))}."
    return f"`--{field.name}`", default, meaning


def markdown_table(header: tuple[str, str, str], rows: list[tuple[str, str, str]]) -> str:
    """A table whose first two columns are aligned in the source."""
    rows = [header, *rows]
    first, second = (max(len(row[column]) for row in rows) for column in range(2))
    lines = [f"| {row[0]:{first}} | {row[1]:{second}} | {row[2]} |" for row in rows]
    lines.insert(1, f"|{'-' * (first + 2)}|{'-' * (second + 2)}|---|")
    return "\n".join(lines)


def flag_tables(script: str) -> str:
    """Markdown tables of the flags of a script, made of the texts of --help."""
    groups = field_groups(script)
    is_complete = script == TEMPLATE or groups[0][0] == "benchmark"
    known = [] if is_complete else [documentation(field) for field in fields_of(TEMPLATE)]
    tables = []
    if known:
        own = {field.name for field in fields_of(script)}
        left_out = ", ".join(f"`--{name}`" for name, _, _ in known if name not in own)
        without = f" except {left_out}," if left_out else ""
        text = f"All flags of `{TEMPLATE}.py`,{without} and these, which are new or differ:"
        tables.append(textwrap.fill(text, 100, break_on_hyphens=False))
    for title, group in groups:
        rows = [flag_row(field) for field in group if documentation(field) not in known]
        if rows:
            tables.append(markdown_table((title, "default", "meaning"), rows))
    return "\n\n".join(tables)


# ---------------------------------------------------------------------------------------
# Diffs
# ---------------------------------------------------------------------------------------


def changed_script(change: str, source: str) -> str:
    """Apply a change of docs/changes.py to the source of run_mlm_flax.py."""
    from changes import CHANGES

    for old, new in CHANGES[change]:
        if source.count(old) != 1:
            count = source.count(old)
            message = f"docs/changes.py: {change}: the script has this text {count} times, not once"
            raise SystemExit(f"{message}:\n{old}")
        source = source.replace(old, new)
    return source


def diff(change: str) -> str:
    """The diff of a change, between fences, for a copy of the script named my_mlm.py."""
    before = (ROOT / f"{TEMPLATE}.py").read_text(encoding="utf-8")
    after = changed_script(change, before)
    names = {"fromfile": "a/my_mlm.py", "tofile": "b/my_mlm.py", "n": 2, "lineterm": ""}
    lines = difflib.unified_diff(before.split("\n"), after.split("\n"), **names)
    # An empty line of context is a line with one space, which editors remove.
    text = "\n".join(line.rstrip() for line in lines)
    return f"```diff\n{text}\n```"


# ---------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------


def families() -> str:
    """The table of the model families that the tests train."""
    sys.path.insert(0, str(ROOT / "tests"))
    return importlib.import_module("families").table()


def measured(name: str) -> str:
    """A table of measurements and the line that says how they were made."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    return importlib.import_module("tables").measured(name)


def write_part(match: re.Match) -> str:
    """Return a generated part with its comments."""
    kind, name = match.groups()
    # A diff follows its comment at once, as the comments of other fenced blocks do.
    if kind == "diff of":
        return f"<!-- diff of: {name} -->\n{diff(name)}\n<!-- end of diff -->"
    if kind == "flags of":
        text = flag_tables(name.removesuffix(".py"))
    elif kind == "families":
        text = families()
    else:
        text = measured(name)
    end = kind.removesuffix(" of")
    start = f"{kind}: {name}" if name else kind
    return f"<!-- {start} -->\n\n{text}\n\n<!-- end of {end} -->"


def fill(text: str) -> str:
    """Replace the generated parts of a page by new ones."""
    return GENERATED.sub(write_part, text)


def main():
    # The scripts import JAX, which would look for an accelerator.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(ROOT))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new_text = fill(text)
        if new_text != text:
            page.write_text(new_text, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
