"""The rules of style hold in every file of the project, and the check finds what breaks them."""

import subprocess
import sys

import pytest
import style

RULE = style.BANNER_RULE
BANNERS = [f"{RULE}\n# {title}\n{RULE}\n" for title in style.PARTS]


def long_function(name: str, lines: int) -> str:
    return f"def {name}():\n" + "    pass\n" * (lines - 1)


@pytest.fixture
def check(tmp_path):
    """Function that writes a source into a file of a checkout and returns the violations in it."""

    def run(name: str, source: str) -> list[style.Violation]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
        return style.check(path, tmp_path)

    return run


@pytest.mark.parametrize("path", style.project_files(), ids=lambda path: path.name)
def test_file_keeps_the_rules(path):
    assert style.check(path) == []


def test_every_tracked_file_is_checked():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    try:
        listing = subprocess.run(
            command, cwd=style.ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    tracked = {style.ROOT / name for name in listing.stdout.splitlines()}
    assert {path for path in tracked if path.exists()} == set(style.project_files())


def test_every_training_script_is_known():
    scripts = {path.name for path in style.ROOT.glob("run_*_flax*.py")}
    assert scripts - {"run_bert_flax.py"} == style.TRAINING_SCRIPTS


PLANTED = {
    "and": ("x and f()", "packed statement"),
    "or": ("x or f()", "packed statement"),
    "comprehension": ("[f(x) for x in y]", "packed statement"),
    "generator": ("(f(x) for x in y)", "packed statement"),
    "conditional": ("f() if x else g()", "packed statement"),
    "tuple of calls": ("f(), g()", "packed statement"),
    "number": ("1", "packed statement"),
    "not": ("not f()", "packed statement"),
    "tuple assignment": ("a, b = x, y", "tuple assignment"),
    "tuple assignment in brackets": ("[a, b] = (x, y)", "tuple assignment"),
    "tuple assignment to attributes": ("self.a, self.b = a, b", "tuple assignment"),
    "tuple assignment with a star": ("a, b, _ = *f(), y", "tuple assignment"),
    "tuple assignment in a chain": ("c = a, b = x, y", "tuple assignment"),
    "more than a swap": ("a, b = b, a + 1", "tuple assignment"),
    "lambda": ("f = lambda x: x", "lambda with a name"),
    "lambda with a type": ("f: Callable = lambda x: x", "lambda with a name"),
    "lambda of an attribute": ("self.f = lambda x: x", "lambda with a name"),
    "lambda in a walrus": ("if f := lambda x: x:\n    pass", "lambda with a name"),
    "lambda in a tuple": ("fs = (lambda x: x), 1", "lambda with a name"),
    "walrus in an argument": ("f((x := 1))", "walrus in a call's argument"),
    "walrus in a named argument": ("f(x=(y := 1))", "walrus in a call's argument"),
    "walrus deep in an argument": ("f([1, (x := 1) + 2])", "walrus in a call's argument"),
    "walrus under two calls": ("f(g((x := 1)))", "walrus in a call's argument"),
    "docstring of a module": ('"""checks."""', "docstring"),
    "docstring of a class": ('class A:\n    """checks."""', "docstring"),
    "docstring of a function": ('def f():\n    """checks."""', "docstring"),
    "docstring of a method": (
        'class A:\n    async def f(self):\n        """checks."""',
        "docstring",
    ),
    "docstring with an empty line": ('def f():\n    """\n    Check.\n    """', "docstring"),
    "long function": (long_function("f", 61), "f has 61 lines, and the limit is 60"),
    "long main": (long_function("main", 121), "main has 121 lines, and the limit is 120"),
    "long function in another": (
        "def main():\n" + "".join(f"    {line}\n" for line in long_function("f", 61).splitlines()),
        "f has 61 lines",
    ),
}


@pytest.mark.parametrize("name", ["run_bert_flax.py", "tests/x/test_x.py", "benchmarks/x.py"])
@pytest.mark.parametrize(("source", "message"), PLANTED.values(), ids=PLANTED)
def test_planted_violation_is_found(check, name, source, message):
    # Lines without any node keep the density of these short sources out of this.
    padding = "#\n" * 5
    (violation,) = check(name, f"{source}\n{padding}")
    assert message in violation.message


def test_line_is_that_of_the_violation(check):
    source = '"""Docstring."""\n\nx = 1\n\n\ndef f():\n    #\n    x and f()\n'
    assert [violation.line for violation in check("a.py", source)] == [8]


PERMITTED = {
    "call": "f()",
    "method": "a.b[0].c()",
    "await": "async def f():\n    await g()",
    "yield": "def f():\n    yield\n    yield from g()\n    x = yield 1",
    "ellipsis": "class A:\n    ...",
    "swap": "a, b = b, a",
    "swap of items": "a[0], a[1] = a[1], a[0]",
    "rotation": "a, b, c = b, c, a",
    "two results": "a, b = f()",
    "tuple": "a = x, y",
    "chain": "a = b = 1",
    "loop": "for a, b in x:\n    pass",
    "lambda as an argument": "f(key=lambda x: x)",
    "lambda in a dictionary": "f = {1: lambda x: x}",
    "walrus in a condition": "if x := f():\n    pass",
    "walrus in a loop": "while x := f(1):\n    pass",
    "walrus in a filter": "ys = [y for x in z if (y := f(x))]",
    "docstring": 'def f():\n    """Check.\n\n    details\n    """',
    "docstring with code": '"""`f` of x."""',
    "docstring with a number": '"""15% of x."""',
    "function": long_function("f", 60),
    "main": long_function("main", 120),
    "comments and decorators before": "@g\n" + long_function("f", 60),
}


@pytest.mark.parametrize("source", PERMITTED.values(), ids=PERMITTED)
def test_other_forms_are_permitted(check, source):
    assert check("run_bert_flax.py", source + "\n" + "#\n" * 5) == []


# Nodes of a line: 4 of `x = 1` (Assign, Name, Store, Constant), 5 of `x = y` (Assign, twice a Name
# with Store or Load), 2 more for each minus (UnaryOp, USub). The module is one more.
AT_LIMIT = {
    "a.py": "x = ---y\n" * 2 + "x = 1\n",  # 27 in 3 lines
    "tests/a.py": "x = ----y\n" * 7 + "x = 1\n",  # 96 in 8 lines
    "benchmarks/a.py": "x = ----y\n" * 7 + "x = 1\n",
}


@pytest.mark.parametrize("name", AT_LIMIT)
@pytest.mark.parametrize("blank_lines", [0, 20])
def test_density(check, name, blank_lines):
    at_limit = AT_LIMIT[name] + "\n   " * blank_lines
    assert check(name, at_limit) == []
    (violation,) = check(name, at_limit.replace("x = 1", "x = y"))
    assert "syntax nodes a line" in violation.message


SIX = "one two three four five six"
TRAILING_COMMENTS = {
    f"x = 1  # {SIX}": 0,
    f"x = 1  # {SIX} seven": 1,
    f"# {SIX} seven\nx = 1": 0,
    f"if x:\n    # {SIX} seven\n    pass": 0,
    f"x = '# {SIX} seven'": 0,
    f"x = 1  # noqa: E731  {SIX}": 0,
    f"x = 1  # noqa: E731, F401  {SIX} seven": 1,
    f"x = [\n    1,  # {SIX} seven\n    # {SIX} seven\n    2,  # {SIX} seven\n]": 2,
}


@pytest.mark.parametrize(("source", "count"), TRAILING_COMMENTS.items())
def test_trailing_comments(check, source, count):
    found = check("run_bert_flax.py", source)
    assert len(found) == count
    assert all("trailing comment of 7 words" in violation.message for violation in found)
    assert check("tests/x/test_x.py", source) == []
    assert check("benchmarks/x.py", source) == []


def with_banners(banners: list[str]) -> str:
    """A module with banner comments and code between them."""
    return "x = 1\n\n\n" + "\n\ny = 2\n\n\n".join(banners) + "\n\nz = 3\n"


def test_banners_in_order(check):
    for name in style.TRAINING_SCRIPTS:
        assert check(name, with_banners(BANNERS)) == []
    assert check("run_bert_flax.py", "x = 1\n") == []


SHORT_RULE = BANNERS[2].replace(RULE, RULE[:-1])
BAD_BANNERS = {
    "missing first": (BANNERS[1:], "no banner comment for the part: Arguments"),
    "missing last": (BANNERS[:-1], "no banner comment for the part: Main"),
    "swapped": ([BANNERS[1], BANNERS[0], *BANNERS[2:]], "parts in the wrong order"),
    "unknown": ([BANNERS[0].replace("Arg", "Docu"), *BANNERS], "no known part: Docuuments"),
    "title in other words": ([BANNERS[0].lower(), *BANNERS[1:]], "part: Arguments"),
    "twice": ([*BANNERS, BANNERS[-1]], "second banner comment of the part: Main"),
    "short rule": ([*BANNERS[:2], SHORT_RULE, *BANNERS[3:]], "part: Data"),
    "another form": ([*BANNERS, "# ------- Main"], "looks like a banner and is none"),
}


@pytest.mark.parametrize(("banners", "message"), BAD_BANNERS.values(), ids=BAD_BANNERS)
def test_bad_banners_are_found(check, banners, message):
    found = check("run_t5_mlm_flax.py", with_banners(banners))
    assert any(message in violation.message for violation in found)


def test_command():
    command = [sys.executable, style.__file__]
    done = subprocess.run(
        [*command, style.__file__, __file__], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_command_prints_each_violation(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("x and f()\n\nf = lambda x: x\n#\n#\n")
    command = [sys.executable, style.__file__, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines() == [
        f"{path}:1: packed statement: use if, for or several lines",
        f"{path}:3: lambda with a name: use def",
    ]
