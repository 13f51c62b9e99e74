"""The README is true: its code blocks run from top to bottom, its flags exist, its links lead somewhere, and so are
CONTRIBUTING.md's; the messages that it explains are those of the scripts.

The blocks run in one temporary folder, with a copy of the scripts, as a reader would run them, but for what the tables
below replace: sizes, and what needs a network or never ends. A new value in the README needs no change here unless it
is large. `python tests/test_readme.py` writes the tables of flags anew.
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

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
SCRIPTS = sorted(path.stem for path in ROOT.glob("run_*.py"))

# Smaller values of flags of the training scripts, in commands and JSON files. All other flags stay as written.
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
# Smaller sizes in Python blocks.
PYTHON = {
    "vocab_size=50_265": "vocab_size=600",
    "vocab_size=50_257": "vocab_size=600",
    "hidden_size=768": "hidden_size=32",
    "num_hidden_layers=12": "num_hidden_layers=1",
    "num_attention_heads=12": "num_attention_heads=2",
    "intermediate_size=3072": "intermediate_size=64",
    '"n_layer": 12, "n_head": 12, "n_embd": 768': '"n_layer": 1, "n_head": 2, "n_embd": 24',
    "num_layers=12, d_model=768, d_ff=3072, num_heads=12": "num_layers=1, d_model=32, d_ff=64, num_heads=2",
    'encoder_layers": 6': 'encoder_layers": 1',
    'decoder_layers": 6': 'decoder_layers": 1',
    'coder_ffn_dim": 3072': 'coder_ffn_dim": 64',
    "d_model=768": "d_model=24",
}
# Other words in shell blocks.
SHELL = {
    "make ": f"make --dry-run --directory={shlex.quote(str(ROOT))} ",  # would install, or run this very test
    ". .venv/bin/activate": "type python | grep bin/python",  # the environment of the tests is active
    "tensorboard --logdir": "tensorboard --inspect --logdir",  # lists what is there, and ends
    "127.0.0.1:12321": None,  # a port that is free
    "srun ": "./srun ",  # see SRUN
    "--vocab_size 32000": "--vocab_size 500",
    "run_bert_flax.py": "run_bert_flax.py --batch_size=2 --seq_length=8 --num_warmup=0 --num_iters=1",
}
SRUN = """\
#!/bin/sh
# Stands in for SLURM's: starts a command as two processes on this machine, with the variables that JAX reads.
export SLURM_JOB_ID=$$ SLURM_STEP_NODELIST=127.0.0.1 SLURM_NTASKS=2
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" &
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" && wait $!
"""
ADDED = (
    "inspect",
    "dry",
    "directory",
    "batch_size",
    "seq_length",
    "num_warmup",
    "num_iters",
)  # flags in these
LINES = {"train.txt": 40, "validation.txt": 8}  # of the corpus
LEFT_OUT = (
    "XLA_FLAGS",
    "MAKEFLAGS",
    "CI",
)  # in CI, Transformers prints its warnings twice, and once more aloud
ENVIRONMENT = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiles faster

NOT_RUN = {  # section: the reason, as the comment before the block gives it
    "Use the model": "needs PyTorch and Transformers 5, which has no Flax classes",
    "Upload to the Hub": "needs an account; tests/test_hub.py trains against a stand-in for the Hub",
    "Models": "the second environment has PyTorch and Transformers 5, which has no Flax classes",
    "Datasets": "needs the Hub; the tests run offline, on folders and files",
    "Where to run": "needs a TPU pod",
}
DOCUMENTED = {  # section: script, folder, and its flags beside those that name folders
    "Train": (
        "run_mlm_flax.py",
        "my-roberta",
        """--model_type="roberta" --max_seq_length="128" --weight_decay="0.01" --per_device_train_batch_size="128"
        --per_device_eval_batch_size="128" --learning_rate="3e-4" --warmup_steps="1000" --overwrite_output_dir
        --num_train_epochs="18" --adam_beta1="0.9" --adam_beta2="0.98" --logging_steps="500" --save_steps="2500"
        --eval_steps="2500" """,
    ),
    "A dataset larger than the disk": (
        "run_mlm_flax_stream.py",
        "my-roberta",
        """--model_type="roberta" --max_seq_length="128" --per_device_train_batch_size="128"
        --per_device_eval_batch_size="128" --learning_rate="3e-4" --warmup_steps="1000" --overwrite_output_dir
        --adam_beta1="0.9" --adam_beta2="0.98" --num_train_steps="10000" --num_eval_samples="5000"
        --logging_steps="250" --eval_steps="1000" """,
    ),
    "Train GPT-2": (
        "run_clm_flax.py",
        "my-gpt2",
        """--model_type="gpt2" --do_train --do_eval --block_size="512" --per_device_train_batch_size="64"
        --learning_rate="5e-3" --warmup_steps="1000" --adam_beta1="0.9" --adam_beta2="0.98" --weight_decay="0.01"
        --overwrite_output_dir --num_train_epochs="20" --logging_steps="500" --save_steps="2500"
        --eval_steps="2500" """,
    ),
    "Train T5": (
        "run_t5_mlm_flax.py",
        "my-t5",
        """--model_type="t5" --max_seq_length="512" --per_device_train_batch_size="32" --adafactor
        --learning_rate="0.005" --weight_decay="0.001" --warmup_steps="2000" --overwrite_output_dir
        --logging_steps="500" --save_steps="10000" --eval_steps="2500" """,
    ),
    "Train BART": (
        "run_bart_dlm_flax.py",
        "my-bart",
        """--max_seq_length="1024" --per_device_train_batch_size="32" --learning_rate="1e-4" --warmup_steps="2000"
        --overwrite_output_dir --logging_steps="500" --save_steps="2000" --eval_steps="2000" """,
    ),
}
OTHER_FLAGS = {
    "help",
    "logdir",
    "vocab_size",
    "xla_force_host_platform_device_count",
}  # not of the scripts
OTHER_FLAGS |= {"xla_gpu_deterministic_ops"}
OTHER_FLAGS |= {
    "nodes",
    "ntasks",
    "gpus",
    "time",
    "signal",
    "dry",
    "worker",
    "command",
}  # as far as the first dash
BENCHMARK_FLAGS = {
    flag
    for path in (ROOT / "benchmarks").glob("*.py")
    for flag in re.findall(r'add_argument\(\s*"--(\w+)"', path.read_text(encoding="utf-8"))
}
SOURCES = {  # library: where its messages are; None: in no Python file, or in no installed package
    "datasets": ("datasets", "load.py"),
    "huggingface_hub": ("huggingface_hub", "utils/_http.py"),
    "transformers": ("transformers", "configuration_utils.py"),
    "jax": ("jax", "_src/xla_bridge.py", "_src/distributed.py"),
    "Python": None,
    "libtpu": None,
    "XLA": None,
}


# ------------------------------------------------------------------------------------------------- the README, read


class Block(typing.NamedTuple):
    section: str
    language: str
    code: str
    note: str  # the HTML comment on the line before, without its brackets
    number: int  # of the same language in its section

    def __str__(self):
        return f"{slug(self.section)}-{self.language}-{self.number}"


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def read_blocks(text: str) -> list[Block]:
    blocks, code, note, section, fence, previous = [], [], "", "", None, ""
    for line in text.splitlines():
        if fence is not None:
            if line == "```":
                same = sum(block.section == section and block.language == fence for block in blocks)
                blocks.append(Block(section, fence, "".join(code), note, same + 1))
                fence = None
            else:
                code.append(line + "\n")
        elif line.startswith("```"):
            fence, code, note = line[3:], [], (re.findall(r"^<!-- (.*) -->$", previous) or [""])[0]
        elif line.startswith("#"):
            section = line.lstrip("# ")
        previous = line
    assert fence is None, "a block has no end"
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


# ------------------------------------------------------------------------------------------------- blocks, run


@pytest.fixture(scope="module")
def place(tmp_path_factory, corpus) -> Path:
    """What a reader has after `make quickstart`, with a corpus that is a part of it."""
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
    """Runs a command, and what it starts, to its end; returns what it printed."""
    variables = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    variables |= ENVIRONMENT
    variables["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), variables["PATH"]))
    pipes = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "start_new_session": True,
    }
    with subprocess.Popen(command, cwd=directory, env=variables, **pipes) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, output
    assert not re.search(r"Traceback|\bWARNING\b|\bERROR\b|error:", output), output
    return output


def scaled_shell(code: str) -> str:
    for old, new in SHELL.items():
        if new is None and old in code:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                new = f"127.0.0.1:{free.getsockname()[1]}"
        code = re.sub(
            rf"^{re.escape(old)}|(?<= |=){re.escape(old)}", str(new), code, flags=re.MULTILINE
        )
    smaller = lambda match: f"--{match[1]}={match[2]}{FLAGS.get(match[1], match[3])}{match[2]}"  # noqa: E731
    return re.sub(r'--(\w+)=(")([^"\n]*)"', smaller, code)


def scaled_python(code: str) -> str:
    for old, new in PYTHON.items():
        code = code.replace(old, new)
    return code


def scaled_json(code: str) -> str:
    settings = json.loads(code)
    return json.dumps({name: FLAGS.get(name, value) for name, value in settings.items()})


def interrupt(output_dir: Path) -> bytes:
    """Makes of a finished run one that was killed before its last save; returns the weights that it had."""
    weights = (output_dir / "flax_model.msgpack").read_bytes()
    steps = sorted((output_dir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    assert len(steps) == 2
    shutil.rmtree(steps[-1])
    for name in ("flax_model.msgpack", "model.safetensors"):
        (output_dir / name).unlink()
    return weights


def apply(block: Block, directory: Path):
    """Applies a diff to the script that it names: lines may have moved, not changed."""
    (directory / "change.diff").write_text(block.code, encoding="utf-8")
    run(["git", "apply", "--verbose", "change.diff"], directory)
    (name,) = re.findall(r"^\+\+\+ b/(.*)", block.code, re.MULTILINE)
    compile((directory / name).read_text(encoding="utf-8"), name, "exec")


def parse(code: str):
    """Of commands that are not run: the shell's syntax, and what the scripts make of their flags."""
    subprocess.run(["bash", "-n", "-c", code], check=True)
    for line in code.replace("\\\n", "").splitlines():
        words = shlex.split(line)
        if words[:1] == ["python"] and words[1].startswith("run_"):
            importlib.import_module(words[1].removesuffix(".py")).parse_args(words[2:])


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block(block, place, tmp_path):
    kind, _, value = block.note.partition(": ")
    if kind == "not run":
        assert NOT_RUN[block.section] == value
        assert block.language in ("python", "sh")
        if block.language == "python":
            compile(block.code, str(block), "exec")
        else:
            parse(block.code)
        pytest.skip(value)
    if block.language == "sh":
        assert kind == ""
        directory = (
            shutil.copytree(place, tmp_path / "copy") if block.section == "Resume" else place
        )
        resumed = block.section == "Resume" and interrupt(directory / "my-roberta")
        start = time.time()
        run(["bash", "-euo", "pipefail", "-c", scaled_shell(block.code)], directory)
        for output_dir in re.findall(
            r'--output_dir="(.*)"', block.code
        ):  # also of processes in the background
            assert (place / output_dir / "eval_results.json").stat().st_mtime >= start - 1
        assert (
            not resumed or (directory / "my-roberta" / "flax_model.msgpack").read_bytes() == resumed
        )
    elif block.language == "python":
        assert kind == ""
        run([sys.executable, "-c", scaled_python(block.code)], place)
    elif block.language == "diff":
        assert kind == ""
        shutil.copy(place / "my_mlm.py", tmp_path)
        apply(block, tmp_path)
        assert len(re.findall("^[-+](?![-+])", block.code, re.MULTILINE)) <= 12  # a small change
    elif block.language == "json":
        assert kind == "file"
        (place / value).write_text(scaled_json(block.code))
    else:
        assert (block.language, kind) == ("text", "listing of")
        listed = [line.split()[0] for line in block.code.splitlines()]
        found = {path.name + "/" * path.is_dir() for path in (place / value).iterdir()}
        unlisted = {
            name
            for name in found
            if not any(Path(name).match(pattern.rstrip("/")) for pattern in listed)
        }
        assert unlisted == set()
        assert [
            pattern for pattern in listed if not list((place / value).glob(pattern.rstrip("/")))
        ] == []


@pytest.mark.parametrize("block", read_blocks(DOCUMENTS[CONTRIBUTING.name]), ids=str)
def test_block_of_contributing(block):
    assert (block.language, block.note) == ("sh", "")
    collected = block.code.replace(
        "python -m pytest", "python -m pytest --collect-only -p no:cacheprovider"
    )
    run(["bash", "-euo", "pipefail", "-c", scaled_shell(collected)], ROOT)


def test_scalars_are_those_of_the_logs(place):
    """After the blocks have run: the table has what TensorBoard shows, and nothing else."""
    output = run(["tensorboard", "--inspect", "--logdir=my-roberta"], place)
    names = r"\b(?:train|eval)_\w+"
    (section,) = re.findall(r"^### Watch$(.*?)^#", TEXT, re.MULTILINE | re.DOTALL)
    assert set(re.findall(rf"^\| `({names})`", section, re.MULTILINE)) == set(
        re.findall(names, output)
    )


def test_continued_words(place):
    """After the blocks have run: a token continues a word of the reference file if no space is before or in it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "my-roberta")
    for split in ("train", "validation"):
        lines = (place / "corpus" / f"{split}.txt").read_text(encoding="utf-8").splitlines()
        refs = (place / "corpus" / f"{split}.ref").read_text(encoding="utf-8").splitlines()
        for line, ref in zip(lines, refs, strict=True):
            tokens = tokenizer.convert_ids_to_tokens(tokenizer(line)["input_ids"])
            assert (tokens[0], tokens[-1]) == ("<s>", "</s>")
            assert json.loads(ref) == [
                i for i in range(2, len(tokens) - 1) if not tokens[i].startswith("Ġ")
            ]
        assert any(ref != "[]" for ref in refs)


# ------------------------------------------------------------------------------------------------- scaling


def test_scaling_changes_values_only():
    """Every flag of every command is passed as written, and only values of the table are smaller."""
    flags = r'--(\w+)(?:="([^"]*)")?'
    for block in BLOCKS:
        if block.language == "sh":
            before, after = (
                re.findall(flags, code) for code in (block.code, scaled_shell(block.code))
            )
            after = [pair for pair in after if pair[0] not in ADDED]
            assert [name for name, _ in before] == [name for name, _ in after]
            changed = {
                name for (name, old), (_, new) in zip(before, after, strict=True) if old != new
            }
            assert changed <= set(FLAGS)


def test_every_replacement_is_used():
    shell, python = (
        "".join(block.code for block in BLOCKS if block.language == one) for one in ("sh", "python")
    )
    assert [flag for flag in FLAGS if f"--{flag}=" not in shell] == []
    assert [old for old in SHELL if old not in shell] == []
    assert [old for old in PYTHON if old not in python] == []
    notes = {block.section: block.note for block in BLOCKS if block.note.startswith("not run: ")}
    assert notes == {section: f"not run: {reason}" for section, reason in NOT_RUN.items()}


def flags_of(block: Block) -> tuple[str, dict[str, str]]:
    """Script and flags of a command."""
    python, script, *words = shlex.split(block.code.replace("\\\n", ""))
    assert python == "python"
    return script, dict(word.removeprefix("--").partition("=")[::2] for word in words)


@pytest.mark.parametrize("section", DOCUMENTED)
def test_documented_command(section):
    """The commands that this collection is known for, flag for flag; what a reader adds is the evaluation's batch."""
    script, model, known = DOCUMENTED[section]
    found, flags = flags_of(block_of(section, "sh"))
    known = dict(word.removeprefix("--").partition("=")[::2] for word in shlex.split(known))
    places = dict.fromkeys(("config_name", "tokenizer_name"), model) | {"dataset_name": "corpus"}
    assert found == script
    assert {**flags, **known, **places} == flags
    assert flags["output_dir"].startswith(model)
    assert flags.keys() - known.keys() - places.keys() <= {
        "output_dir",
        "per_device_eval_batch_size",
    }


def test_json_of_the_command():
    _, flags = flags_of(block_of("Train", "sh"))
    settings = json.loads(block_of("Resume", "json").code)
    assert "overwrite_output_dir" not in settings
    same = {name: type(value)(flags[name]) for name, value in settings.items()}
    assert settings == same
    assert len(settings) == len(flags) - 1


# ------------------------------------------------------------------------------------------------- flags, links


def fields(script: str) -> list[tuple[str, list]]:
    """Groups of settings of a script, by their title in --help."""
    module = importlib.import_module(script)
    names = ("ModelArguments", "DataTrainingArguments", "TrainingArguments", "BenchmarkArguments")
    classes = [getattr(module, name) for name in names if hasattr(module, name)]
    return [(one._argument_group_name, list(dataclasses.fields(one))) for one in classes]


DEFAULTS = {"None": "", "True": "on", "False": "off"}


TEMPLATE = "run_mlm_flax"


def flag_tables(script: str) -> str:
    """Markdown tables of the flags of a script, from the same source as --help. Of a training script other than the
    template: those that the template has not."""
    alone = script == TEMPLATE or fields(script)[0][0] == "benchmark"
    known = (
        []
        if alone
        else [
            (f.name, f.default, f.metadata["help"]) for _, group in fields(TEMPLATE) for f in group
        ]
    )
    left_out = {name for name, _, _ in known} - {
        field.name for _, group in fields(script) for field in group
    }
    names = ", ".join(f"`--{name}`" for name, _, _ in known if name in left_out)
    differs = f"As those of `{TEMPLATE}.py`, without {names}, and with:"
    tables = [textwrap.fill(differs, 100, break_on_hyphens=False)] if known else []
    for title, group in fields(script):
        rows = [(title, "default", "meaning")]
        group = [
            field
            for field in group
            if (field.name, field.default, field.metadata["help"]) not in known
        ]
        for field in group:
            required = field.default is dataclasses.MISSING
            default = (
                "required" if required else DEFAULTS.get(repr(field.default), str(field.default))
            )
            choices = (
                typing.get_args(field.type)
                if typing.get_origin(field.type) is typing.Literal
                else ()
            )
            meaning = field.metadata["help"] + (f" One of {', '.join(choices)}." if choices else "")
            rows.append((f"`--{field.name}`", default, meaning))
        if len(rows) == 1:
            continue
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        lines = [f"| {a:{widths[0]}} | {b:{widths[1]}} | {c} |" for a, b, c in rows]
        lines.insert(1, f"|{'-' * (widths[0] + 2)}|{'-' * (widths[1] + 2)}|---|")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


MARKED = re.compile(r"(?ms)(?<=^<!-- flags of: )(\w+)(\.py -->\n)(.*?)(?=^<!-- end of flags -->$)")


@pytest.mark.parametrize("script", SCRIPTS)
def test_tables_have_every_flag(script):
    tables = {match[1]: match[3].strip() for match in MARKED.finditer(TEXT)}
    assert tables[script] == flag_tables(script), (
        "python tests/test_readme.py writes the tables anew"
    )


def test_every_flag_exists():
    ours = {field.name for script in SCRIPTS for _, group in fields(script) for field in group}
    ours |= {
        f"no_{field.name}"
        for s in SCRIPTS
        for _, group in fields(s)
        for field in group
        if field.default is True
    }
    named = set(re.findall(r"(?<![\w-])--([a-z]\w*)", "".join(DOCUMENTS.values())))
    assert named - ours - OTHER_FLAGS - BENCHMARK_FLAGS == set()
    assert OTHER_FLAGS - named == set()


@each_document
def test_links_lead_somewhere(document):
    anchors = {
        name: {slug(line) for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
        for name, text in PROSE.items()
    }
    links = re.findall(r"\]\(([^)\s]+)\)", PROSE[document])
    assert len(links) > 5
    for link in links:
        name, _, anchor = link.partition("#")
        if not link.startswith("https://"):
            assert not name or (ROOT / name).exists(), link
            assert not anchor or anchor in anchors[name or document], link


@each_document
def test_named_files_exist(document):
    """Files of the project that are named in the running text, and targets of make."""
    named = re.findall(
        r"`((?:tests/|benchmarks/)?\w+\.(?:py|txt)|Makefile|\.ci/\w+)`", PROSE[document]
    )
    corpus = set(LINES)
    assert [name for name in named if name not in corpus and not (ROOT / name).exists()] == []
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake ([\w-]+)[`\n]", DOCUMENTS[document])) <= {*targets, "and"}


@each_document
def test_lines_are_short(document):
    """To be read as plain text, too; rows of tables may be longer, and lines of the scripts."""
    diffs = {
        line for block in BLOCKS if block.language == "diff" for line in block.code.splitlines()
    }
    lines = {*DOCUMENTS[document].splitlines()} - diffs
    assert [line for line in lines if len(line) > 105 and not line.startswith("|")] == []


# ------------------------------------------------------------------------------------------------- messages


DIFFERS = re.compile(
    r"(?<![A-Z])(?:COLUMN|FILE|FLAG|FOLDER|KEY|NAMES|NAME|N|REASON|SPLIT|TYPE|VALUE)(?![A-Z])"
)


def messages(title: str) -> list[list[str]]:
    """Rows of a table of messages: the message and the other cells."""
    (table,) = re.findall(rf"(?s)<!-- messages of {title} -->\n\n(.*?)\n\n", TEXT)
    rows = [row.strip("| ").split(" | ") for row in table.splitlines()[2:]]
    return [[row[0].strip("`"), *row[1:]] for row in rows]


def literals(path: Path) -> list[str]:
    """The texts in a module, with a null character for each value that an f-string puts in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            found.append(
                "".join(
                    part.value if isinstance(part, ast.Constant) else "\0" for part in node.values
                )
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def occurs(message: str, texts: list[str]) -> bool:
    """In one text, or in parts: a message may be put together of several, at a comma, a colon or a value."""
    if any(DIFFERS.sub("\0", message) in text for text in texts):
        return True
    parts = [
        part.strip() for part in re.split(r"\0|[,:] ", DIFFERS.sub("\0", message)) if part.strip()
    ]
    return max(map(len, parts)) >= 10 and all(any(part in text for text in texts) for part in parts)


@pytest.mark.parametrize("message", [row[0] for row in messages("the scripts")])
def test_message_is_one_of_ours(message):
    assert any(occurs(message, literals(ROOT / f"{script}.py")) for script in SCRIPTS)


@pytest.mark.parametrize(("message", "library"), [row[:2] for row in messages("libraries")])
def test_message_is_one_of_a_library(message, library):
    if SOURCES[library] is None:
        pytest.skip(f"{library}: no Python file has its messages")
    package, *files = SOURCES[library]
    directory = Path(importlib.util.find_spec(package).origin).parent
    assert any(occurs(message, literals(directory / file)) for file in files)


def test_messages_that_are_not_there_are_noticed():
    texts = literals(ROOT / "run_mlm_flax.py")
    assert occurs("no data: give --dataset_name or --train_file", texts)
    assert not occurs("no data: give --dataset_names or --train_file", texts)
    assert not occurs("too much training data: N sequences of N tokens", texts)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    written = MARKED.sub(lambda match: f"{match[1]}{match[2]}\n{flag_tables(match[1])}\n\n", TEXT)
    README.write_text(written, encoding="utf-8")
