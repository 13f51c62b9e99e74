"""The pages of the documentation, README.md, docs/*.md, CONTRIBUTING.md, and their blocks."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs"), str(ROOT / "benchmarks")]
import generate  # noqa: E402, F401

CONTRIBUTING = "CONTRIBUTING.md"
# The README comes first: the other pages use the folders that its blocks create.
HANDBOOK = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in (*HANDBOOK, CONTRIBUTING)}

# Transformers prints more warnings if CI is set.
LEFT_OUT = ("XLA_FLAGS", "MAKEFLAGS", "CI")
# Without optimization, compilation is faster.
ENVIRONMENT = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


# ---------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------


class Block(NamedTuple):
    """A fenced block."""

    page: str
    section: str
    language: str
    code: str
    # The text of the HTML comment on the line before, or "".
    note: str
    # Counts the blocks of the same language in the section, from 1.
    number: int

    def __str__(self):
        page = Path(self.page).stem
        return f"{page}-{slug(self.section)}-{self.language}-{self.number}"


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def headings(text: str) -> list[str]:
    """The headings of a page, in its order."""
    return re.findall(r"^#+ (.*)$", without_blocks(text), re.MULTILINE)


def without_blocks(text: str) -> str:
    """The text of a page between its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def read_blocks(page: str) -> list[Block]:
    """The fenced blocks of a page."""
    blocks = []
    section = ""
    previous = ""
    # The language, the note and the lines of the block that is being read.
    language = None
    note = ""
    code = []
    for line in TEXTS[page].splitlines():
        if language is not None and line != "```":
            code.append(line + "\n")
        elif language is not None:
            same = [one for one in blocks if (one.section, one.language) == (section, language)]
            number = len(same) + 1
            blocks.append(Block(page, section, language, "".join(code), note, number))
            language = None
        elif line.startswith("```"):
            language = line[3:]
            code = []
            comment = re.search(r"^<!-- (.*) -->$", previous)
            note = comment[1] if comment else ""
        elif line.startswith("#"):
            section = line.lstrip("# ")
        previous = line
    assert language is None, f"{page}: a block has no end"
    return blocks


BLOCKS = [block for page in HANDBOOK for block in read_blocks(page)]


def block_of(page: str, section: str, language: str) -> Block:
    """The first block of a language in a section."""
    found = [
        block
        for block in BLOCKS
        if (block.page, block.section, block.language) == (page, section, language)
    ]
    return found[0]


def diff_of(change: str) -> Block:
    """The block with a change of docs/changes.py."""
    (block,) = [block for block in BLOCKS if block.note == f"diff of: {change}"]
    return block


# ---------------------------------------------------------------------------------------
# Smaller sizes
# ---------------------------------------------------------------------------------------

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
    "vocab_size=4_000": "vocab_size=600",
    "vocab_size=50_265": "vocab_size=600",
    "vocab_size=50_257": "vocab_size=600",
    "hidden_size=128": "hidden_size=32",
    "hidden_size=768": "hidden_size=32",
    "num_hidden_layers=2": "num_hidden_layers=1",
    "num_hidden_layers=12": "num_hidden_layers=1",
    "num_attention_heads=12": "num_attention_heads=2",
    "intermediate_size=512": "intermediate_size=64",
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
    # A stand-in.
    "srun ": "./srun ",
    "--vocab_size 32000": "--vocab_size 500",
    # A smaller model than BERT-base: the one that the README's recipe has trained.
    "run_bert_flax.py": (
        "run_bert_flax.py --model_name_or_path=my-roberta"
        " --batch_size=2 --seq_length=8 --num_warmup=0 --num_iters=1"
    ),
}
# Flags that these replacements add.
ADDED = (
    "inspect",
    "dry",
    "directory",
    "model_name_or_path",
    "batch_size",
    "seq_length",
    "num_warmup",
    "num_iters",
)


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


def flags_of(block: Block) -> tuple[str, dict[str, str]]:
    """Script and flags of a command. The value of a switch is ""."""
    python, script, *words = shlex.split(block.code.replace("\\\n", ""))
    assert python == "python"
    return script, parse_flags(words)


def parse_flags(words: list[str]) -> dict[str, str]:
    return dict(word.removeprefix("--").partition("=")[::2] for word in words)


# ---------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------


def run(command: list[str], directory: Path, timeout: float = 900) -> str:
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


def apply(block: Block, directory: Path):
    """Apply a diff to the script that it names. Its lines may have moved but not changed."""
    (directory / "change.diff").write_text(block.code, encoding="utf-8")
    run(["git", "apply", "--verbose", "change.diff"], directory)
    (name,) = re.findall(r"^\+\+\+ b/(.*)", block.code, re.MULTILINE)
    compile((directory / name).read_text(encoding="utf-8"), name, "exec")
