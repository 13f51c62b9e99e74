"""Keeps what the scripts have in common word for word the same. run_mlm_flax.py is the template of the others.

    python tests/copies.py         says what differs
    python tests/copies.py --fix   writes the template's version into the others (make fix-copies)

Functions, classes and constants of the same name must have the same source, comments included, and stand in the same
order. Those that differ by objective are named here; of some, only so many lines, removed and added, may differ.
"""

import ast
import difflib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = "run_mlm_flax.py"
ANY = 10**6
DIFFER_BY_OBJECTIVE = {  # name: lines that may differ from the template's
    "ModelArguments": 2,
    "DataTrainingArguments": ANY,
    "check_args": 20,
    "loss_sums": ANY,
    "load_texts": 10,
    "text_column": 16,
    "encode": ANY,
    "Sequences": 12,
    "tokenize": 30,
    "make_batch": 20,
    "load_config_and_tokenizer": 30,
    "load_model": 10,
    "main": 16,
}
MORE_BY_SCRIPT = {  # a stream has no known length, no lines, and a position that is saved
    "run_mlm_flax_stream.py": {
        "TrainingArguments": 6,
        "parse_args": 3,
        "FlaxDataCollatorForLanguageModeling": 20,
        "load_texts": 24,
        "text_column": 22,
        "train_batches": ANY,
        "eval_batches": 16,
        "main": 56,
    }
}


def definitions(source: str) -> dict[str, range]:
    """Name of each function, class and constant of a module to its lines, counted from 0, decorators included."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = range(first - 1, node.end_lineno)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = range(node.lineno - 1, node.end_lineno)
    return found


def texts(source: str) -> dict[str, list[str]]:
    lines = source.splitlines(keepends=True)
    return {name: [lines[i] for i in where] for name, where in definitions(source).items()}


def changed_lines(a: list[str], b: list[str]) -> list[str]:
    return [
        line
        for line in difflib.unified_diff(a, b, n=0)
        if not line.startswith(("---", "+++", "@@"))
    ]


def scripts(root: Path = ROOT) -> list[Path]:
    """The template first."""
    found = sorted(root.glob("run_*_flax*.py"), key=lambda path: (path.name != TEMPLATE, path.name))
    if not found or found[0].name != TEMPLATE:
        raise FileNotFoundError(f"{root / TEMPLATE} is not there")
    return found


def allowed(script: Path):
    """Of a script, the function from a name to the lines that may differ, as `dict.get`."""
    return {**DIFFER_BY_OBJECTIVE, **MORE_BY_SCRIPT.get(script.name, {})}.get


def differences(root: Path = ROOT) -> list[tuple[Path, str, str]]:
    """Script, name and diff of each definition that is not as the first script that has it says."""
    first, found = {}, []
    for path in scripts(root):
        for name, lines in texts(path.read_text("utf-8")).items():
            origin, expected = first.setdefault(name, (path, lines))
            changed = changed_lines(expected, lines)
            if len(changed) > allowed(path)(name, 0):
                heading = f"{path.name}: {name}: {len(changed)} lines are not as in {origin.name}"
                found.append((path, name, f"{heading}\n{''.join(changed)}"))
    return found


def fix(root: Path = ROOT) -> list[tuple[Path, str]]:
    """Writes the template's definitions over those of the same name, where they must be equal; what was changed."""
    wanted, changed = texts((root / TEMPLATE).read_text("utf-8")), []
    for path in scripts(root)[1:]:
        source = path.read_text("utf-8")
        lines = source.splitlines(keepends=True)
        for name, where in sorted(definitions(source).items(), key=lambda item: -item[1].start):
            if (
                name in wanted
                and not allowed(path)(name)
                and lines[where.start : where.stop] != wanted[name]
            ):
                lines[where.start : where.stop] = wanted[name]
                changed.append((path, name))
        if "".join(lines) != source:
            path.write_text("".join(lines), "utf-8")
    return changed


def main() -> int:
    if "--fix" in sys.argv[1:]:
        for path, name in fix():
            print(f"{path.name}: {name} is now as in {TEMPLATE}")
    left = differences()
    for _, _, message in left:
        print(message)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
