"""What the pages name exists: flags, links, files, messages. Generated parts are current."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
from pages import BLOCKS, HANDBOOK, ROOT, TEXTS, generate, headings, slug, without_blocks

SCRIPTS = sorted(path.stem for path in ROOT.glob("run_*.py"))
MESSAGES = TEXTS["docs/messages.md"]
PROSE = {name: without_blocks(text) for name, text in TEXTS.items()}
each_page = pytest.mark.parametrize("page", TEXTS)
# Flags of other programs. A regular expression reads them up to the first dash.
OTHER_FLAGS = {
    "help",
    "logdir",
    "vocab_size",
    "xla_force_host_platform_device_count",
    "xla_gpu_deterministic_ops",
    "nodes",
    "ntasks",
    "gpus",
    "time",
    "signal",
    "dry",
    "worker",
    "command",
}
BENCHMARK_FLAGS = {
    flag
    for path in (ROOT / "benchmarks").glob("*.py")
    for flag in re.findall(r'add_argument\(\s*"--(\w+)"', path.read_text(encoding="utf-8"))
}
# Package and files with the messages of each library; None if they are in no installed Python file.
SOURCES = {
    "datasets": ("datasets", "load.py"),
    "huggingface_hub": ("huggingface_hub", "utils/_http.py"),
    "transformers": ("transformers", "configuration_utils.py"),
    "jax": ("jax", "_src/xla_bridge.py", "_src/distributed.py"),
    "Python": None,
    "libtpu": None,
    "XLA": None,
}


# ---------------------------------------------------------------------------------------
# Generated parts
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", HANDBOOK)
def test_generated_parts_are_current(page):
    assert generate.fill(TEXTS[page]) == TEXTS[page], "make docs"


def test_everything_is_generated_once():
    """Each script, each file of results, each change and the families have one place."""
    import changes
    import tables

    found = []
    for page in HANDBOOK:
        found += [match.groups() for match in generate.GENERATED.finditer(TEXTS[page])]
    expected = [("families", None)]
    expected += [("flags of", f"{script}.py") for script in SCRIPTS]
    expected += [("measured", path.stem) for path in tables.RESULTS.iterdir()]
    # A second table of a file.
    expected.append(("measured", "accelerators/batches"))
    expected += [("diff of", change) for change in changes.CHANGES]
    assert sorted(found, key=str) == sorted(expected, key=str)


def test_a_diff_does_not_depend_on_other_lines(monkeypatch, tmp_path):
    """Lines that are added elsewhere in the script move a diff and change nothing else."""
    before = {change: generate.diff(change) for change in ("masking", "schedule", "source")}
    source = (ROOT / "run_mlm_flax.py").read_text(encoding="utf-8")
    (tmp_path / "run_mlm_flax.py").write_text(source.replace("\nimport", "\n# New.\nimport", 1))
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    for change, text in before.items():
        moved = generate.diff(change)
        assert moved != text
        assert re.sub("@@.*@@", "", moved) == re.sub("@@.*@@", "", text)


def test_a_change_that_no_longer_fits_is_named():
    with pytest.raises(SystemExit, match=r"masking: the script has this text 0 times"):
        generate.changed_script("masking", "import jax\n")


# ---------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------


def test_every_flag_exists():
    ours = set()
    for field in (field for script in SCRIPTS for field in generate.fields_of(script)):
        ours.add(field.name)
        if field.default is True:
            ours.add(f"no_{field.name}")
    named = set(re.findall(r"(?<![\w-])--([a-z]\w*)", "".join(TEXTS.values())))
    assert named - ours - OTHER_FLAGS - BENCHMARK_FLAGS == set()
    assert OTHER_FLAGS - named == set()


# ---------------------------------------------------------------------------------------
# Size, links, files and lines
# ---------------------------------------------------------------------------------------


def test_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 350
    assert len(PROSE["README.md"].split()) <= 2500


def test_readme_has_the_measured_ratios_to_pytorch():
    """Those of the rows in float32 on a CPU, and of all on a GPU."""
    expected = []
    for name, dtypes in (("pytorch_cpu", ["float32"]), ("pytorch_gpu", ["bfloat16"])):
        for row in re.findall(r"^\| .* \|$", generate.measured(name), re.MULTILINE)[2:]:
            model, ratio, *_ = row.strip("| ").split(" | ")
            if model.rpartition(", ")[2] in dtypes:
                expected.append(ratio)
    (section,) = re.findall(r"(?s)\*\*With PyTorch\.\*\*.*?\n\n(\|.*?)\n\n", TEXTS["README.md"])
    assert re.findall(r"\| (\d\.\d\d) \|$", section, re.MULTILINE) == expected


def test_readme_links_to_every_page():
    for page in HANDBOOK[1:]:
        assert f"]({page})" in TEXTS["README.md"], page


@each_page
def test_links_lead_somewhere(page):
    anchors = {(ROOT / name).resolve(): headings(text) for name, text in TEXTS.items()}
    links = re.findall(r"\]\(([^)\s]+)\)", PROSE[page])
    assert links
    for link in links:
        name, _, anchor = link.partition("#")
        if link.startswith("https://"):
            continue
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), link
        if anchor:
            assert anchor in map(slug, anchors[path.resolve()]), link


@each_page
def test_headings_of_a_page_are_unique(page):
    """So an anchor leads to one place."""
    slugs = [slug(heading) for heading in headings(TEXTS[page])]
    assert len(set(slugs)) == len(slugs)


@each_page
def test_named_files_exist(page):
    """Files of the project that the text names, and targets of make."""
    file_name = (
        r"`((?:tests/|benchmarks/|docs/)?\w+\.py|requirements[\w-]*\.txt|Makefile|\.ci/\w+)`"
    )
    shown = {block.note.removeprefix("file: ") for block in BLOCKS} | {"my_mlm.py"}
    for name in set(re.findall(file_name, PROSE[page])) - shown:
        # The text names the modules of the tests without their folder.
        in_tests = list((ROOT / "tests").glob(f"**/{Path(name).name}"))
        assert in_tests or (ROOT / name).exists(), name
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake ([\w-]+)[`\n]", TEXTS[page])) <= {*targets, "and"}


@each_page
def test_lines_are_short(page):
    """The source is easy to read, too. Rows of tables and lines of the scripts may be longer."""
    diffs = "".join(block.code for block in BLOCKS if block.language == "diff")
    lines = set(TEXTS[page].splitlines()) - set(diffs.splitlines())
    exempt = ("|", "![")
    assert [line for line in lines if len(line) > 112 and not line.startswith(exempt)] == []


# ---------------------------------------------------------------------------------------
# Messages
# ---------------------------------------------------------------------------------------

# Words on the page that stand for a value in a message.
PLACEHOLDER = re.compile(
    r"(?<![A-Z])(?:COLUMN|FILE|FLAG|FOLDER|KEY|NAMES|NAME|N|REASON|SPLIT|TYPE|VALUE)(?![A-Z])"
)


def documented_messages(title: str) -> list[list[str]]:
    """Rows of a table of messages: the message and the other cells."""
    (table,) = re.findall(rf"(?s)<!-- messages of {title} -->\n\n(.*?)\n\n", MESSAGES)
    rows = [row.strip("| ").split(" | ") for row in table.splitlines()[2:]]
    return [[row[0].strip("`"), *row[1:]] for row in rows]


def string_literals(path: Path) -> list[str]:
    """The strings in a module; a null character replaces each value in an f-string."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
            found.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def occurs(message: str, texts: list[str]) -> bool:
    """Whether a message occurs in one text, or in parts in several.

    A script may join a message from several strings at a comma, a colon or a value.
    """
    message = PLACEHOLDER.sub("\0", message)
    if any(message in text for text in texts):
        return True
    parts = [part.strip() for part in re.split(r"\0|[,:] ", message)]
    parts = [part for part in parts if part]
    # Short words alone would occur anywhere.
    if max(map(len, parts)) < 10:
        return False
    return all(any(part in text for text in texts) for part in parts)


@pytest.mark.parametrize("message", [row[0] for row in documented_messages("the scripts")])
def test_message_is_one_of_ours(message):
    assert any(occurs(message, string_literals(ROOT / f"{script}.py")) for script in SCRIPTS)


@pytest.mark.parametrize(
    ("message", "library"), [row[:2] for row in documented_messages("libraries")]
)
def test_message_is_one_of_a_library(message, library):
    if SOURCES[library] is None:
        pytest.skip(f"{library}: no Python file has its messages")
    package, *files = SOURCES[library]
    directory = Path(importlib.util.find_spec(package).origin).parent
    assert any(occurs(message, string_literals(directory / file)) for file in files)


def test_messages_that_are_not_there_are_noticed():
    texts = string_literals(ROOT / "run_mlm_flax.py")
    assert occurs("no data: give --dataset_name or --train_file", texts)
    assert not occurs("no data: give --dataset_names or --train_file", texts)
    assert not occurs("too much training data: N sequences of N tokens", texts)
