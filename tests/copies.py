"""Keep the code that the scripts share the same, with run_mlm_flax.py as the template.

    python tests/copies.py         prints what differs
    python tests/copies.py --fix   copies the template's version into the others (make fix-copies)

Functions, classes and constants of the same name must have the same source, comments included, and
the same order. The tables below name those that differ by objective, and how many lines may differ:
removed and added lines both count.
"""

import ast
import difflib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = "run_mlm_flax.py"
ANY = 10**6
# Name of a definition, and the number of lines that may differ from the template.
DIFFER_BY_OBJECTIVE = {
    "MODEL_CLASS": 2,
    # The z-loss is for models that predict every token of a text.
    "TRAINING_SUMS": 2,
    "LEARNING_FLAGS": 1,
    "TrainingArguments": 6,
    "make_steps": 3,
    "ModelArguments": 4,
    "DataTrainingArguments": ANY,
    "check_objective_args": ANY,
    "loss_sums": ANY,
    "make_loss_fn": 2,
    "load_texts": ANY,
    "encode": ANY,
    "Sequences": 18,
    "tokenize": 43,
    "make_collator": 16,
    "make_batch": 33,
    "load_config": 4,
    "check_config": ANY,
    "adapt_to_flax": 2,
    "load_config_and_tokenizer": 31,
}
# A stream has no known length and no access by line, and its position is saved in checkpoints.
MORE_BY_SCRIPT = {
    "run_mlm_flax_stream.py": {
        "LEARNING_FLAGS": 2,
        "TrainingArguments": 8,
        "FlaxDataCollatorForLanguageModeling": 27,
        "load_data": ANY,
        "select_text": 30,
        "make_batch": 35,
        "train_batches": ANY,
        "eval_batches": 24,
        "plan_steps": ANY,
        "train": 40,
        "parse_args": 5,
        "main": 70,
    },
    # Nothing in a batch is random.
    "run_clm_flax.py": {"train_batches": 8, "eval_batches": 8},
    "run_t5_mlm_flax.py": {"main": 8, "make_loss_fn": 4, "output_head": 17, "load_model": 4},
    # It measures inference and trains nothing.
    "run_bert_flax.py": {"main": ANY},
}


def find_definitions(source: str) -> dict[str, slice]:
    """Find the lines, counted from 0, of each function, class and constant of a module.

    Decorators are part of a definition.
    """
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name = node.name
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            first = node.lineno
        else:
            continue
        found[name] = slice(first - 1, node.end_lineno)
    return found


def read_definitions(path: Path) -> dict[str, list[str]]:
    """Read the lines of each definition of a script."""
    source = path.read_text("utf-8")
    lines = source.splitlines(keepends=True)
    return {name: lines[where] for name, where in find_definitions(source).items()}


def changed_lines(old: list[str], new: list[str]) -> list[str]:
    """Removed and added lines, as in a unified diff."""
    diff = difflib.unified_diff(old, new, n=0)
    return [line for line in diff if not line.startswith(("---", "+++", "@@"))]


def find_scripts(root: Path = ROOT) -> list[Path]:
    """Find all training scripts, with the template first."""
    found = sorted(root.glob("run_*_flax*.py"), key=lambda path: (path.name != TEMPLATE, path.name))
    if not found or found[0].name != TEMPLATE:
        raise FileNotFoundError(f"{root / TEMPLATE} is not there")
    return found


def allowed_changes(script: Path) -> dict[str, int]:
    """Name of each definition that may differ in a script, and the number of lines that may."""
    return DIFFER_BY_OBJECTIVE | MORE_BY_SCRIPT.get(script.name, {})


def find_differences(root: Path = ROOT) -> list[tuple[Path, str, str]]:
    """Compare each definition with that of the first script that has it.

    Returns the script, the name and a message with a diff for each one with too many changed lines.
    """
    originals = {}
    found = []
    for path in find_scripts(root):
        allowed = allowed_changes(path)
        for name, lines in read_definitions(path).items():
            origin, expected = originals.setdefault(name, (path, lines))
            changed = changed_lines(expected, lines)
            if len(changed) > allowed.get(name, 0):
                heading = f"{path.name}: {name}: {len(changed)} lines differ from {origin.name}"
                found.append((path, name, f"{heading}\n{''.join(changed)}"))
    return found


def fix(root: Path = ROOT) -> list[tuple[Path, str]]:
    """Replace each definition that must equal the template's, and return what was replaced."""
    wanted = read_definitions(root / TEMPLATE)
    replaced = []
    for path in find_scripts(root)[1:]:
        source = path.read_text("utf-8")
        lines = source.splitlines(keepends=True)
        may_differ = allowed_changes(path)
        definitions = find_definitions(source)
        # From the last to the first: a replacement may move the lines below it.
        for name in sorted(definitions, key=lambda name: definitions[name].start, reverse=True):
            where = definitions[name]
            if name not in wanted or name in may_differ or lines[where] == wanted[name]:
                continue
            lines[where] = wanted[name]
            replaced.append((path, name))
        if "".join(lines) != source:
            path.write_text("".join(lines), "utf-8")
    return replaced


def main() -> int:
    if "--fix" in sys.argv[1:]:
        for path, name in fix():
            print(f"{path.name}: {name} is now the same as in {TEMPLATE}")
    differences = find_differences()
    for _, _, message in differences:
        print(message)
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
