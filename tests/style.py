"""Check the rules of style that ruff has no rule for.

    python tests/style.py             checks every Python file of the project
    python tests/style.py FILE ...    checks these files

Each violation is printed as `FILE:LINE: MESSAGE`. The exit status is 1 if there is any.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TRAINING_SCRIPTS = {
    "run_mlm_flax.py",
    "run_clm_flax.py",
    "run_t5_mlm_flax.py",
    "run_bart_dlm_flax.py",
    "run_mlm_flax_stream.py",
}
# nanoGPT, big_vision, CleanRL, nanodo and the lm1b example of Flax have 5 to 8 nodes a line.
SCRIPT_NODES_PER_LINE = 9.0
OTHER_NODES_PER_LINE = 12.0
FUNCTION_LINES = 60
MAIN_LINES = 120
TRAILING_COMMENT_WORDS = 6
# The parts of a training script, in order. What a reader most often changes comes first.
PARTS = [
    "Arguments",
    "Objective",
    "Data",
    "Model and optimizer",
    "Training and evaluation steps",
    "Plumbing (the same in every script)",
    "Main",
]
BANNER_RULE = "# " + "-" * 87


class Violation(NamedTuple):
    line: int
    message: str


def check_density(source: str, tree: ast.Module, limit: float) -> Iterator[Violation]:
    """Limit the mean number of syntax nodes in a line that is not blank."""
    num_nodes = sum(1 for _ in ast.walk(tree))
    num_lines = sum(1 for line in source.splitlines() if line.strip())
    if num_nodes > limit * num_lines:
        mean = num_nodes / num_lines
        yield Violation(1, f"{mean:.2f} syntax nodes a line, and the limit is {limit:g}")


def check_packed_statements(tree: ast.Module) -> Iterator[Violation]:
    """Refuse `x and f()`, a comprehension, a conditional or a tuple as a whole statement."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Expr):
            continue
        value = node.value
        if isinstance(value, (ast.Call, ast.Yield, ast.YieldFrom, ast.Await)):
            continue
        if isinstance(value, ast.Constant) and (isinstance(value.value, str) or value.value is ...):
            continue
        yield Violation(node.lineno, "packed statement: use if, for or several lines")


def is_swap(target: ast.Tuple, value: ast.Tuple) -> bool:
    """Whether the values of `a, b = b, a` are its targets in another order."""
    targets = [ast.unparse(element) for element in target.elts]
    values = [ast.unparse(element) for element in value.elts]
    return sorted(targets) == sorted(values)


def check_tuple_assignments(tree: ast.Module) -> Iterator[Violation]:
    """Refuse `a, b = x, y`, but not the swap `a, b = b, a`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, (ast.Tuple, ast.List)):
            continue
        for target in node.targets:
            if isinstance(target, (ast.Tuple, ast.List)) and not is_swap(target, node.value):
                yield Violation(node.lineno, "tuple assignment: use one line for each name")


def check_named_lambdas(tree: ast.Module) -> Iterator[Violation]:
    """Refuse `f = lambda x: ...`, also with an annotation, in a tuple or with a walrus."""
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
            continue
        is_tuple = isinstance(node.value, (ast.Tuple, ast.List))
        values = node.value.elts if is_tuple else [node.value]
        if any(isinstance(value, ast.Lambda) for value in values):
            yield Violation(node.lineno, "lambda with a name: use def")


def check_walruses(tree: ast.Module) -> Iterator[Violation]:
    """Refuse `f(x := 1)`, at any depth within the argument."""
    lines = set()
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        for argument in [*call.args, *call.keywords]:
            for node in ast.walk(argument):
                if isinstance(node, ast.NamedExpr):
                    lines.add(node.lineno)
    for line in sorted(lines):
        yield Violation(line, "walrus in a call's argument: assign on a line before")


def check_lengths(tree: ast.Module) -> Iterator[Violation]:
    """Limit the lines of a function, from `def` to its last one."""
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        length = node.end_lineno - node.lineno + 1
        limit = MAIN_LINES if node.name == "main" else FUNCTION_LINES
        if length > limit:
            yield Violation(
                node.lineno, f"{node.name} has {length} lines, and the limit is {limit}"
            )


def check_docstrings(tree: ast.Module) -> Iterator[Violation]:
    """Require text on the first line that starts with a capital letter, a digit or code.

    That the line ends in a period and that a blank line follows are D400 and D205 of ruff.
    """
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        docstring = ast.get_docstring(node, clean=False) if isinstance(node, documented) else None
        if docstring is not None and not re.match(r"[A-Z0-9`]", docstring):
            message = "docstring: start the first line with a capital letter, a digit or code"
            yield Violation(node.body[0].lineno, message)


def check_trailing_comments(source: str) -> Iterator[Violation]:
    """Limit a comment behind code to a unit, a shape or a few words."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, column = token.start
        is_trailing = lines[line - 1][:column].strip() != ""
        words = re.sub(r"# noqa(: *[A-Z0-9, ]+)?", "#", token.string).lstrip("# ").split()
        if is_trailing and len(words) > TRAILING_COMMENT_WORDS:
            message = f"trailing comment of {len(words)} words: put it on a line of its own above"
            yield Violation(line, message)


def check_banners(source: str) -> Iterator[Violation]:
    """Require the banner comment of each part of a training script, in order, and no other one.

    A banner is the title as a comment between two lines of `BANNER_RULE`.
    """
    lines = source.splitlines()
    found = []
    for number, line in enumerate(lines):
        if line == BANNER_RULE and lines[number + 2 : number + 3] == [BANNER_RULE]:
            found.append((number + 2, lines[number + 1].removeprefix("# ")))
    titles = [title for _, title in found]
    for title in PARTS:
        if title not in titles:
            yield Violation(1, f"no banner comment for the part: {title}")
    for position, (line, title) in enumerate(found):
        if title not in PARTS:
            yield Violation(line, f"banner comment of no known part: {title}")
        elif title in titles[:position]:
            yield Violation(line, f"second banner comment of the part: {title}")
    known = [title for title in titles if title in PARTS]
    if known != sorted(known, key=PARTS.index):
        yield Violation(1, f"parts in the wrong order: {', '.join(known)}")
    in_banners = {line + offset for line, _ in found for offset in (-1, 1)}
    for number, line in enumerate(lines, start=1):
        if re.match(r"#\s*[-=#]{5,}", line) and number not in in_banners:
            yield Violation(number, "comment that looks like a banner and is none")


def check(path: Path, root: Path = ROOT) -> list[Violation]:
    """Violations in a file of the project at `root`, which has its scripts at the top."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    is_script = path.parent == root
    limit = SCRIPT_NODES_PER_LINE if is_script else OTHER_NODES_PER_LINE
    found = [
        *check_density(source, tree, limit),
        *check_packed_statements(tree),
        *check_tuple_assignments(tree),
        *check_named_lambdas(tree),
        *check_walruses(tree),
        *check_lengths(tree),
        *check_docstrings(tree),
    ]
    if is_script:
        found += check_trailing_comments(source)
    if path.name in TRAINING_SCRIPTS:
        found += check_banners(source)
    return sorted(found)


def project_files() -> list[Path]:
    """All Python files of the project: the scripts, then tests and benchmarks."""
    patterns = ("*.py", "tests/**/*.py", "benchmarks/*.py", "docs/*.py")
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def main() -> int:
    paths = [Path(name).resolve() for name in sys.argv[1:]] or project_files()
    failed = False
    for path in paths:
        name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        for violation in check(path):
            failed = True
            print(f"{name}:{violation.line}: {violation.message}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
