"""Keep the code that the scripts share the same, with run_mlm_flax.py as the template.

    python tests/copies.py         prints what differs
    python tests/copies.py --fix   copies the template's version into the others (make fix-copies)

Functions, classes and constants of the same name must have the same source, comments included. The
tables below name those that differ by objective, with the number of lines that do, and those that
a script does not have. Removed and added lines both count.
"""

import ast
import difflib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = "run_mlm_flax.py"
# Any number of lines.
ANY = -1
# For each script, the definitions that differ by objective, and how many lines do: exactly so many,
# lest another difference hides among them. MODEL_CLASS, for example, is one line removed and one
# added.
DIFFERENCES = {
    "run_clm_flax.py": {
        "MODEL_CLASS": 2,
        "ORDER_STREAM": 3,
        "TRAINING_SUMS": 2,
        "LEARNING_FLAGS": 1,
        "ModelArguments": 2,
        "DataTrainingArguments": ANY,
        "TrainingArguments": 6,
        "check_objective_args": ANY,
        "loss_sums": ANY,
        "make_loss_fn": 2,
        "load_texts": ANY,
        "encode": ANY,
        "Sequences": 17,
        "tokenize": 36,
        "make_collator": 5,
        "make_batch": 31,
        "train_batches": 5,
        "eval_batches": 7,
        "load_config_and_tokenizer": 19,
        "check_config": ANY,
        "load_config": 4,
        "make_steps": 3,
    },
    "run_t5_mlm_flax.py": {
        "MODEL_CLASS": 2,
        "TRAINING_SUMS": 2,
        "LEARNING_FLAGS": 1,
        "ModelArguments": 2,
        "DataTrainingArguments": ANY,
        "TrainingArguments": 6,
        "check_objective_args": ANY,
        "output_head": 15,
        "loss_sums": ANY,
        "make_loss_fn": 4,
        "load_texts": ANY,
        "encode": ANY,
        "Sequences": 17,
        "tokenize": 30,
        "make_collator": 11,
        "make_batch": 27,
        "load_config_and_tokenizer": 31,
        "load_model": 4,
        "make_steps": 3,
        "main": 8,
    },
    "run_bart_dlm_flax.py": {
        "MODEL_CLASS": 2,
        "TRAINING_SUMS": 2,
        "LEARNING_FLAGS": 1,
        "ModelArguments": 4,
        "DataTrainingArguments": ANY,
        "TrainingArguments": 6,
        "check_objective_args": ANY,
        "loss_sums": ANY,
        "make_loss_fn": 2,
        "load_texts": ANY,
        "encode": ANY,
        "Sequences": 15,
        "tokenize": 25,
        "make_collator": 10,
        "make_batch": 28,
        "load_config_and_tokenizer": 20,
        "load_config": 3,
        "make_steps": 3,
    },
    "run_mlm_flax_stream.py": {
        "LEARNING_FLAGS": 2,
        "DataTrainingArguments": ANY,
        "TrainingArguments": 8,
        "check_objective_args": ANY,
        "FlaxDataCollatorForLanguageModeling": 17,
        "load_data": ANY,
        "load_texts": ANY,
        "select_text": 23,
        "make_collator": 5,
        "make_batch": 33,
        "train_batches": ANY,
        "eval_batches": 23,
        "load_config_and_tokenizer": 6,
        "adapt_to_flax": 2,
        "plan_steps": ANY,
        "train": 36,
        "parse_args": 5,
        "main": 38,
    },
    "run_bert_flax.py": {
        "main": ANY,
    },
}
# The definitions of the template that a script does not have. run_bert_flax.py, which trains
# nothing, has few.
ABSENT = {
    "run_clm_flax.py": {
        "EVALUATION_STREAM",
        "FlaxDataCollatorForLanguageModeling",
        "Lines",
        "TRAINING_STREAM",
        "adapt_to_flax",
        "add_refs",
        "extra_model_inputs",
        "first_tokens_of_words",
        "keep_only",
        "max_positions",
        "sequence_generators",
    },
    "run_t5_mlm_flax.py": {
        "FlaxDataCollatorForLanguageModeling",
        "Lines",
        "adapt_to_flax",
        "add_refs",
        "check_config",
        "extra_model_inputs",
        "first_tokens_of_words",
        "keep_only",
        "max_positions",
    },
    "run_bart_dlm_flax.py": {
        "FlaxDataCollatorForLanguageModeling",
        "Lines",
        "adapt_to_flax",
        "add_refs",
        "check_config",
        "extra_model_inputs",
        "first_tokens_of_words",
        "keep_only",
        "max_positions",
    },
    "run_mlm_flax_stream.py": {
        "Lines",
        "Sequences",
        "Tokens",
        "add_refs",
        "encode",
        "first_tokens_of_words",
        "hold_out_validation",
        "open_tokens",
        "tokenize",
    },
}


def find_definitions(source: str) -> dict[str, slice]:
    """Find the lines, counted from 0, of each function, class and constant of a module.

    Decorators, and comments directly above, are part of a definition.
    """
    lines = source.splitlines()
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
        while lines[first - 2].startswith("#"):
            first -= 1
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


def find_differences(root: Path = ROOT) -> list[tuple[Path, str, str]]:
    """Compare each definition with that of the first script that has it.

    Returns the script, the name and a message, with a diff, for each one that differs by another
    number of lines than DIFFERENCES says, and for each one that is missing or not in ABSENT.
    """
    originals = {}
    found = []
    for path in find_scripts(root):
        allowed = DIFFERENCES.get(path.name, {})
        definitions = read_definitions(path)
        for name, lines in definitions.items():
            origin, expected = originals.setdefault(name, (path, lines))
            changed = changed_lines(expected, lines)
            if allowed.get(name, 0) not in (ANY, len(changed)):
                heading = f"{path.name}: {name}: {len(changed)} lines differ from {origin.name}"
                heading += f", and tests/copies.py says {allowed[name]}" if name in allowed else ""
                found.append((path, name, f"{heading}\n{''.join(changed)}"))
        if path.name in ABSENT:
            absent = set(read_definitions(root / TEMPLATE)) - set(definitions)
            for name in sorted(absent ^ ABSENT[path.name]):
                verb = "lacks" if name in absent else "has"
                found.append((path, name, f"{path.name} {verb} {name}: see tests/copies.py"))
    return found


def fix(root: Path = ROOT) -> list[tuple[Path, str]]:
    """Replace each definition that must equal the template's, and return what was replaced."""
    wanted = read_definitions(root / TEMPLATE)
    replaced = []
    for path in find_scripts(root)[1:]:
        source = path.read_text("utf-8")
        lines = source.splitlines(keepends=True)
        may_differ = DIFFERENCES.get(path.name, {})
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
