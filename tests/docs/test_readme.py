"""README.md and CONTRIBUTING.md are correct: code blocks run, flags and messages exist, links work.

The blocks of the README run from top to bottom in one temporary folder with a copy of the scripts,
as a reader would run them. The tables below replace large sizes and whatever needs a network or
never ends, so a new value in the README needs no change here unless it is large.
`python tests/docs/test_readme.py` updates the tables of flags in the README.
"""

import ast
import dataclasses
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import typing
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
SCRIPTS = sorted(path.stem for path in ROOT.glob("run_*.py"))

# Smaller values for flags of the training scripts, in commands and JSON files. Other flags stay as
# they are.
FLAGS = {
    "max_seq_length": 16,
    "block_size": 16,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "warmup_steps": 5,
    "num_train_steps": 20,
    "num_eval_samples": 16,
    "num_train_epochs": 1,
    "logging_steps": 5,
    "save_steps": 12,
    "eval_steps": 20,
}
# Replacements in Python blocks: smaller sizes.
PYTHON = {
    "vocab_size=50_265": "vocab_size=600",
    "vocab_size=50_257": "vocab_size=600",
    "hidden_size=768": "hidden_size=32",
    "num_hidden_layers=12": "num_hidden_layers=1",
    "num_attention_heads=12": "num_attention_heads=2",
    "intermediate_size=3072": "intermediate_size=64",
    '"n_layer": 12, "n_head": 12, "n_embd": 768': '"n_layer": 1, "n_head": 2, "n_embd": 24',
    "num_layers=12, d_model=768, d_ff=3072, num_heads=12": (
        "num_layers=1, d_model=32, d_ff=64, num_heads=2"
    ),
    'encoder_layers": 6': 'encoder_layers": 1',
    'decoder_layers": 6': 'decoder_layers": 1',
    'coder_ffn_dim": 3072': 'coder_ffn_dim": 64',
    "d_model=768": "d_model=24",
}
# Replacements in shell blocks, at the start of a line or after a space or an equals sign.
SHELL = {
    # Without --dry-run it would install packages, or run this very test.
    "make ": f"make --dry-run --directory={shlex.quote(str(ROOT))} ",
    # The environment of the tests is already active.
    ". .venv/bin/activate": "type python | grep bin/python",
    # --inspect lists the logs and ends.
    "tensorboard --logdir": "tensorboard --inspect --logdir",
    # `free_address` replaces this one.
    "127.0.0.1:12321": None,
    # The script SRUN.
    "srun ": "./srun ",
    "--vocab_size 32000": "--vocab_size 500",
    "run_bert_flax.py": (
        "run_bert_flax.py --batch_size=2 --seq_length=8 --num_warmup=0 --num_iters=1"
    ),
}
# Flags that these replacements add.
ADDED = (
    "inspect",
    "dry",
    "directory",
    "batch_size",
    "seq_length",
    "num_warmup",
    "num_iters",
)
SRUN = """\
#!/bin/sh
# A stand-in for SLURM's srun: starts two processes here, with the variables that JAX reads.
export SLURM_JOB_ID=$$ SLURM_STEP_NODELIST=127.0.0.1 SLURM_NTASKS=2
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" &
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" && wait $!
"""
# Lines of each file of the corpus.
LINES = {"train.txt": 40, "validation.txt": 8}
# Transformers prints more warnings if CI is set.
LEFT_OUT = ("XLA_FLAGS", "MAKEFLAGS", "CI")
# Without optimization, compilation is faster.
ENVIRONMENT = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

# Section of a block, and the reason why it is not run, as the comment before the block states it.
NOT_RUN = {
    "Use the model": "needs PyTorch and Transformers 5, which has no Flax classes",
    "Upload to the Hub": (
        "needs an account; tests/hub/test_hub.py trains against a stand-in for the Hub"
    ),
    "Models": "the second environment has PyTorch and Transformers 5, which has no Flax classes",
    "Datasets": "needs the Hub; the tests run offline, on folders and files",
    "Where to run": "needs a TPU pod",
}
# Section of a command, and its script, its model and its flags other than those that name folders.
DOCUMENTED = {
    "Train": (
        "run_mlm_flax.py",
        "my-roberta",
        """--model_type="roberta" --max_seq_length="128" --weight_decay="0.01"
        --per_device_train_batch_size="128" --per_device_eval_batch_size="128"
        --learning_rate="3e-4" --warmup_steps="1000" --overwrite_output_dir --num_train_epochs="18"
        --adam_beta1="0.9" --adam_beta2="0.98" --logging_steps="500" --save_steps="2500"
        --eval_steps="2500" """,
    ),
    "A dataset larger than the disk": (
        "run_mlm_flax_stream.py",
        "my-roberta",
        """--model_type="roberta" --max_seq_length="128" --per_device_train_batch_size="128"
        --per_device_eval_batch_size="128" --learning_rate="3e-4" --warmup_steps="1000"
        --overwrite_output_dir --adam_beta1="0.9" --adam_beta2="0.98" --num_train_steps="10000"
        --num_eval_samples="5000" --logging_steps="250" --eval_steps="1000" """,
    ),
    "Train GPT-2": (
        "run_clm_flax.py",
        "my-gpt2",
        """--model_type="gpt2" --do_train --do_eval --block_size="512"
        --per_device_train_batch_size="64" --learning_rate="5e-3" --warmup_steps="1000"
        --adam_beta1="0.9" --adam_beta2="0.98" --weight_decay="0.01" --overwrite_output_dir
        --num_train_epochs="20" --logging_steps="500" --save_steps="2500" --eval_steps="2500" """,
    ),
    "Train T5": (
        "run_t5_mlm_flax.py",
        "my-t5",
        """--model_type="t5" --max_seq_length="512" --per_device_train_batch_size="32"
        --adafactor --learning_rate="0.005" --weight_decay="0.001" --warmup_steps="2000"
        --overwrite_output_dir --logging_steps="500" --save_steps="10000" --eval_steps="2500" """,
    ),
    "Train BART": (
        "run_bart_dlm_flax.py",
        "my-bart",
        """--max_seq_length="1024" --per_device_train_batch_size="32" --learning_rate="1e-4"
        --warmup_steps="2000" --overwrite_output_dir --logging_steps="500" --save_steps="2000"
        --eval_steps="2000" """,
    ),
}
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
# Reading the documents
# ---------------------------------------------------------------------------------------


class Block(typing.NamedTuple):
    section: str
    language: str
    code: str
    # The text of the HTML comment on the line before, or "".
    note: str
    # Counts the blocks of the same language in the section, from 1.
    number: int

    def __str__(self):
        return f"{slug(self.section)}-{self.language}-{self.number}"


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def read_blocks(text: str) -> list[Block]:
    blocks = []
    section = ""
    previous = ""
    # The language, the note and the lines of the block that is being read.
    language = None
    note = ""
    code = []
    for line in text.splitlines():
        if language is not None and line != "```":
            code.append(line + "\n")
        elif language is not None:
            same = [one for one in blocks if (one.section, one.language) == (section, language)]
            blocks.append(Block(section, language, "".join(code), note, len(same) + 1))
            language = None
        elif line.startswith("```"):
            language = line[3:]
            code = []
            comment = re.search(r"^<!-- (.*) -->$", previous)
            note = comment[1] if comment else ""
        elif line.startswith("#"):
            section = line.lstrip("# ")
        previous = line
    assert language is None, "a block has no end"
    return blocks


TEXT = README.read_text(encoding="utf-8")
BLOCKS = read_blocks(TEXT)
DOCUMENTS = {path.name: path.read_text(encoding="utf-8") for path in (README, CONTRIBUTING)}
PROSE = {
    name: re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for name, text in DOCUMENTS.items()
}
each_document = pytest.mark.parametrize("document", DOCUMENTS)


def block_of(section: str, language: str) -> Block:
    return next(block for block in BLOCKS if (block.section, block.language) == (section, language))


# ---------------------------------------------------------------------------------------
# Running the blocks
# ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory, corpus) -> Path:
    """A folder as it is after `make quickstart`, with a small part of the corpus."""
    directory = tmp_path_factory.mktemp("readme")
    for name in (*SCRIPTS, "t5_tokenizer_model", "quickstart"):
        shutil.copy(ROOT / f"{name}.py", directory)
    (directory / "srun").write_text(SRUN)
    (directory / "srun").chmod(0o755)
    (directory / "quickstart" / "corpus").mkdir(parents=True)
    for name, count in LINES.items():
        lines = (corpus / name).read_text(encoding="utf-8").splitlines(keepends=True)[:count]
        (directory / "quickstart" / "corpus" / name).write_text("".join(lines), encoding="utf-8")
    return directory


def run(command: list[str], directory: Path, timeout: float = 120) -> str:
    """Run a command that succeeds without a warning, and return its output."""
    variables = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    variables |= ENVIRONMENT
    variables["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), variables["PATH"]))
    # A session of its own, so that the processes that the command starts can be killed with it.
    with subprocess.Popen(
        command,
        cwd=directory,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, output
    assert not re.search(r"Traceback|\bWARNING\b|\bERROR\b|error:", output), output
    return output


def free_address() -> str:
    """Host and port at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def scale_flag(match: re.Match) -> str:
    name, quote, value = match.groups()
    return f"--{name}={quote}{FLAGS.get(name, value)}{quote}"


def scaled_shell(code: str) -> str:
    for old, new in SHELL.items():
        if new is None:
            new = free_address()
        word = re.escape(old)
        code = re.sub(rf"^{word}|(?<= |=){word}", new, code, flags=re.MULTILINE)
    return re.sub(r'--(\w+)=(")([^"\n]*)"', scale_flag, code)


def scaled_python(code: str) -> str:
    for old, new in PYTHON.items():
        code = code.replace(old, new)
    return code


def scaled_json(code: str) -> str:
    settings = json.loads(code)
    return json.dumps({name: FLAGS.get(name, value) for name, value in settings.items()})


def interrupt(output_dir: Path) -> bytes:
    """Undo the last save of a finished run, and return the weights that it had saved."""
    weights = (output_dir / "flax_model.msgpack").read_bytes()
    steps = sorted((output_dir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    assert len(steps) == 2
    shutil.rmtree(steps[-1])
    for name in ("flax_model.msgpack", "model.safetensors"):
        (output_dir / name).unlink()
    return weights


def apply(block: Block, directory: Path):
    """Apply a diff to the script that it names. Its lines may have moved but not changed."""
    (directory / "change.diff").write_text(block.code, encoding="utf-8")
    run(["git", "apply", "--verbose", "change.diff"], directory)
    (name,) = re.findall(r"^\+\+\+ b/(.*)", block.code, re.MULTILINE)
    compile((directory / name).read_text(encoding="utf-8"), name, "exec")


def parse(code: str):
    """Check the shell syntax of commands without running them, and the flags of the scripts."""
    subprocess.run(["bash", "-n", "-c", code], check=True)
    for line in code.replace("\\\n", "").splitlines():
        words = shlex.split(line)
        if words[:1] == ["python"] and words[1].startswith("run_"):
            importlib.import_module(words[1].removesuffix(".py")).parse_args(words[2:])


def check_block_that_is_not_run(block: Block, reason: str):
    assert NOT_RUN[block.section] == reason
    assert block.language in ("python", "sh")
    if block.language == "python":
        compile(block.code, str(block), "exec")
    else:
        parse(block.code)


def run_shell_block(block: Block, directory: Path):
    """Run the commands; each run of a script must evaluate the model."""
    start = time.time()
    run(["bash", "-euo", "pipefail", "-c", scaled_shell(block.code)], directory)
    # A script that is started in the background fails without an exit status.
    for output_dir in re.findall(r'--output_dir="(.*)"', block.code):
        assert (directory / output_dir / "eval_results.json").stat().st_mtime >= start - 1


def run_resuming_block(block: Block, directory: Path):
    """Run the commands on an interrupted run, which must end with the weights that it had."""
    weights = interrupt(directory / "my-roberta")
    run_shell_block(block, directory)
    assert (directory / "my-roberta" / "flax_model.msgpack").read_bytes() == weights


def check_listing(block: Block, folder: Path):
    """Check that all that is in a folder is listed, and that all that is listed is there."""
    patterns = [line.split()[0].rstrip("/") for line in block.code.splitlines()]
    unlisted = set()
    for path in folder.iterdir():
        if not any(Path(path.name).match(pattern) for pattern in patterns):
            unlisted.add(path.name)
    assert unlisted == set()
    assert [pattern for pattern in patterns if not list(folder.glob(pattern))] == []


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block(block, place, tmp_path):
    kind, _, value = block.note.partition(": ")
    if kind == "not run":
        check_block_that_is_not_run(block, value)
        pytest.skip(value)
    if block.language == "sh":
        assert kind == ""
        if block.section == "Resume":
            run_resuming_block(block, shutil.copytree(place, tmp_path / "copy"))
        else:
            run_shell_block(block, place)
    elif block.language == "python":
        assert kind == ""
        run([sys.executable, "-c", scaled_python(block.code)], place)
    elif block.language == "diff":
        assert kind == ""
        shutil.copy(place / "my_mlm.py", tmp_path)
        apply(block, tmp_path)
        # The README shows small changes only.
        assert len(re.findall("^[-+](?![-+])", block.code, re.MULTILINE)) <= 12
    elif block.language == "json":
        assert kind == "file"
        (place / value).write_text(scaled_json(block.code))
    else:
        assert (block.language, kind) == ("text", "listing of")
        check_listing(block, place / value)


@pytest.mark.parametrize("block", read_blocks(DOCUMENTS[CONTRIBUTING.name]), ids=str)
def test_block_of_contributing(block):
    assert (block.language, block.note) == ("sh", "")
    collect = "python -m pytest --collect-only -p no:cacheprovider"
    collected = block.code.replace("python -m pytest", collect)
    run(["bash", "-euo", "pipefail", "-c", scaled_shell(collected)], ROOT)


def test_scalars_are_those_of_the_logs(place):
    """After the blocks have run, the table has what TensorBoard shows, and nothing else."""
    output = run(["tensorboard", "--inspect", "--logdir=my-roberta"], place)
    names = r"\b(?:train|eval)_\w+"
    (section,) = re.findall(r"^### Watch$(.*?)^#", TEXT, re.MULTILINE | re.DOTALL)
    listed = set(re.findall(rf"^\| `({names})`", section, re.MULTILINE))
    assert listed == set(re.findall(names, output))


def test_continued_words(place):
    """After the blocks have run, a reference file has the tokens that continue a word.

    These are all but the first token of a line and those with a space before or in them.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "my-roberta")
    for split in ("train", "validation"):
        lines = (place / "corpus" / f"{split}.txt").read_text(encoding="utf-8").splitlines()
        refs = (place / "corpus" / f"{split}.ref").read_text(encoding="utf-8").splitlines()
        for line, ref in zip(lines, refs, strict=True):
            tokens = tokenizer.convert_ids_to_tokens(tokenizer(line)["input_ids"])
            assert (tokens[0], tokens[-1]) == ("<s>", "</s>")
            positions = range(2, len(tokens) - 1)
            assert json.loads(ref) == [i for i in positions if not tokens[i].startswith("Ġ")]
        assert any(ref != "[]" for ref in refs)


# ---------------------------------------------------------------------------------------
# Replacements and documented commands
# ---------------------------------------------------------------------------------------


def flag_values(code: str) -> list[tuple[str, str]]:
    """Name and value of each flag in shell code; the value of a switch is ""."""
    return re.findall(r'--(\w+)(?:="([^"]*)")?', code)


def test_scaling_changes_values_only():
    """Every flag of every command remains, and only values of the table are smaller."""
    for block in BLOCKS:
        if block.language != "sh":
            continue
        before = flag_values(block.code)
        after = [pair for pair in flag_values(scaled_shell(block.code)) if pair[0] not in ADDED]
        assert [name for name, _ in before] == [name for name, _ in after]
        changed = set()
        for (name, old), (_, new) in zip(before, after, strict=True):
            if old != new:
                changed.add(name)
        assert changed <= set(FLAGS)


def test_every_replacement_is_used():
    shell = "".join(block.code for block in BLOCKS if block.language == "sh")
    python = "".join(block.code for block in BLOCKS if block.language == "python")
    assert [flag for flag in FLAGS if f"--{flag}=" not in shell] == []
    assert [old for old in SHELL if old not in shell] == []
    assert [old for old in PYTHON if old not in python] == []
    notes = {block.section: block.note for block in BLOCKS if block.note.startswith("not run: ")}
    assert notes == {section: f"not run: {reason}" for section, reason in NOT_RUN.items()}


def parse_flags(words: list[str]) -> dict[str, str]:
    return dict(word.removeprefix("--").partition("=")[::2] for word in words)


def flags_of(block: Block) -> tuple[str, dict[str, str]]:
    """Script and flags of a command."""
    python, script, *words = shlex.split(block.code.replace("\\\n", ""))
    assert python == "python"
    return script, parse_flags(words)


@pytest.mark.parametrize("section", DOCUMENTED)
def test_documented_command(section):
    """The well-known commands of these scripts are complete.

    Only the batch size of the evaluation may be added to them.
    """
    script, model, command = DOCUMENTED[section]
    found, flags = flags_of(block_of(section, "sh"))
    known = parse_flags(shlex.split(command))
    folders = {"config_name": model, "tokenizer_name": model, "dataset_name": "corpus"}
    assert found == script
    assert {**flags, **known, **folders} == flags
    assert flags["output_dir"].startswith(model)
    added = flags.keys() - known.keys() - folders.keys()
    assert added <= {"output_dir", "per_device_eval_batch_size"}


def test_json_of_the_command():
    _, flags = flags_of(block_of("Train", "sh"))
    settings = json.loads(block_of("Resume", "json").code)
    assert "overwrite_output_dir" not in settings
    same = {name: type(value)(flags[name]) for name, value in settings.items()}
    assert settings == same
    assert len(settings) == len(flags) - 1


# ---------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------

DEFAULTS = {"None": "", "True": "on", "False": "off"}
TEMPLATE = "run_mlm_flax"
MARKED = re.compile(r"(?ms)(?<=^<!-- flags of: )(\w+)(\.py -->\n)(.*?)(?=^<!-- end of flags -->$)")


def field_groups(script: str) -> list[tuple[str, list]]:
    """The fields of each dataclass of settings of a script, by the title of the group in --help."""
    module = importlib.import_module(script)
    names = ("ModelArguments", "DataTrainingArguments", "TrainingArguments", "BenchmarkArguments")
    groups = [getattr(module, name) for name in names if hasattr(module, name)]
    return [(group._argument_group_name, list(dataclasses.fields(group))) for group in groups]


def fields_of(script: str) -> list:
    return [field for _, group in field_groups(script) for field in group]


def documentation(field) -> tuple:
    """What a row of a table depends on, and what is the same if two scripts share a flag."""
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
    """Markdown tables of the flags of a script, made of the texts of --help.

    Those of a training script other than the template have only the flags that differ from it.
    """
    groups = field_groups(script)
    is_complete = script == TEMPLATE or groups[0][0] == "benchmark"
    known = [] if is_complete else [documentation(field) for field in fields_of(TEMPLATE)]
    tables = []
    if known:
        own = {field.name for field in fields_of(script)}
        left_out = ", ".join(f"`--{name}`" for name, _, _ in known if name not in own)
        text = f"As those of `{TEMPLATE}.py`, without {left_out}, and with:"
        tables.append(textwrap.fill(text, 100, break_on_hyphens=False))
    for title, group in groups:
        rows = [flag_row(field) for field in group if documentation(field) not in known]
        if rows:
            tables.append(markdown_table((title, "default", "meaning"), rows))
    return "\n\n".join(tables)


@pytest.mark.parametrize("script", SCRIPTS)
def test_tables_have_every_flag(script):
    tables = {match[1]: match[3].strip() for match in MARKED.finditer(TEXT)}
    message = "python tests/docs/test_readme.py updates the tables"
    assert tables[script] == flag_tables(script), message


def test_every_flag_exists():
    ours = set()
    for field in (field for script in SCRIPTS for field in fields_of(script)):
        ours.add(field.name)
        if field.default is True:
            ours.add(f"no_{field.name}")
    named = set(re.findall(r"(?<![\w-])--([a-z]\w*)", "".join(DOCUMENTS.values())))
    assert named - ours - OTHER_FLAGS - BENCHMARK_FLAGS == set()
    assert OTHER_FLAGS - named == set()


# ---------------------------------------------------------------------------------------
# Links, files and lines
# ---------------------------------------------------------------------------------------


@each_document
def test_links_lead_somewhere(document):
    anchors = {}
    for name, text in PROSE.items():
        anchors[name] = {slug(line) for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    links = re.findall(r"\]\(([^)\s]+)\)", PROSE[document])
    assert len(links) > 5
    for link in links:
        name, _, anchor = link.partition("#")
        if not link.startswith("https://"):
            assert not name or (ROOT / name).exists(), link
            assert not anchor or anchor in anchors[name or document], link


@each_document
def test_named_files_exist(document):
    """Files of the project that the text names, and targets of make."""
    file_name = r"`((?:tests/(?:\w+/)?|benchmarks/)?\w+\.(?:py|txt)|Makefile|\.ci/\w+)`"
    named = set(re.findall(file_name, PROSE[document])) - set(LINES)
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake ([\w-]+)[`\n]", DOCUMENTS[document])) <= {*targets, "and"}


@each_document
def test_lines_are_short(document):
    """The source is easy to read, too. Rows of tables and lines of the scripts may be longer."""
    diffs = [block.code for block in BLOCKS if block.language == "diff"]
    lines = set(DOCUMENTS[document].splitlines()) - set("".join(diffs).splitlines())
    assert [line for line in lines if len(line) > 105 and not line.startswith("|")] == []


# ---------------------------------------------------------------------------------------
# Messages
# ---------------------------------------------------------------------------------------

# Words in the README that stand for a value in a message.
PLACEHOLDER = re.compile(
    r"(?<![A-Z])(?:COLUMN|FILE|FLAG|FOLDER|KEY|NAMES|NAME|N|REASON|SPLIT|TYPE|VALUE)(?![A-Z])"
)


def documented_messages(title: str) -> list[list[str]]:
    """Rows of a table of messages: the message and the other cells."""
    (table,) = re.findall(rf"(?s)<!-- messages of {title} -->\n\n(.*?)\n\n", TEXT)
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


def write_flag_table(match: re.Match) -> str:
    return f"{match[1]}{match[2]}\n{flag_tables(match[1])}\n\n"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    README.write_text(MARKED.sub(write_flag_table, TEXT), encoding="utf-8")
