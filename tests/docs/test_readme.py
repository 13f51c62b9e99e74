"""The fenced blocks of README.md and docs/ run, and the documented commands are complete.

The blocks run page after page, from top to bottom, in one temporary folder with a copy of the
scripts, as a reader would run them. The README comes first. The tables of tests/pages.py replace
large sizes and whatever needs a network or never ends, so a new value on a page needs no change
there unless it is large.
"""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pages import (
    ADDED,
    BLOCKS,
    CONTRIBUTING,
    FLAGS,
    PYTHON,
    ROOT,
    SHELL,
    TEXTS,
    apply,
    block_of,
    flags_of,
    parse_flags,
    read_blocks,
    run,
    scaled_json,
    scaled_python,
    scaled_shell,
)

SCRIPTS = sorted(path.stem for path in ROOT.glob("run_*.py"))
SRUN = """\
#!/bin/sh
# A stand-in for SLURM's srun: starts two processes here, with the variables that JAX reads.
export SLURM_JOB_ID=$$ SLURM_STEP_NODELIST=127.0.0.1 SLURM_NTASKS=2
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" &
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" && wait $!
"""
# Lines of each file of the corpus.
LINES = {"train.txt": 40, "validation.txt": 8}

# Page and section of a block, and the reason why it is not run, as the comment before the block
# states it.
NOT_RUN = {
    ("docs/masked-language-modeling.md", "Use the model in PyTorch"): (
        "needs PyTorch and Transformers 5, which has no Flax classes"
    ),
    ("docs/streaming.md", "Train"): "needs the Hub; the tests run offline, on folders and files",
    ("docs/data.md", "Datasets on the Hub"): (
        "needs the Hub; the tests run offline, on folders and files"
    ),
    ("docs/hub.md", "Upload a model to the Hub"): (
        "needs an account; a test trains against a stand-in for the Hub"
    ),
    ("docs/models.md", "Comparison with PyTorch"): (
        "the second environment has PyTorch and Transformers 5, which has no Flax classes"
    ),
    ("docs/hardware.md", "TPU pods"): "needs a TPU pod",
}
# Page and section of a command, and its script, its model and its flags other than those that name
# folders.
DOCUMENTED = {
    ("docs/masked-language-modeling.md", "Train RoBERTa-base"): (
        "run_mlm_flax.py",
        "my-roberta-base",
        """--model_type="roberta" --max_seq_length="128" --weight_decay="0.01"
        --per_device_train_batch_size="128" --per_device_eval_batch_size="128"
        --learning_rate="3e-4" --warmup_steps="1000" --overwrite_output_dir --num_train_epochs="18"
        --adam_beta1="0.9" --adam_beta2="0.98" --logging_steps="500" --save_steps="2500"
        --eval_steps="2500" """,
    ),
    ("docs/streaming.md", "Train"): (
        "run_mlm_flax_stream.py",
        "my-roberta",
        """--model_type="roberta" --max_seq_length="128" --per_device_train_batch_size="128"
        --per_device_eval_batch_size="128" --learning_rate="3e-4" --warmup_steps="1000"
        --overwrite_output_dir --adam_beta1="0.9" --adam_beta2="0.98" --num_train_steps="10000"
        --num_eval_samples="5000" --logging_steps="250" --eval_steps="1000" """,
    ),
    ("docs/causal-language-modeling.md", "Train GPT-2"): (
        "run_clm_flax.py",
        "my-gpt2",
        """--model_type="gpt2" --do_train --do_eval --block_size="512"
        --per_device_train_batch_size="64" --learning_rate="5e-3" --warmup_steps="1000"
        --adam_beta1="0.9" --adam_beta2="0.98" --weight_decay="0.01" --overwrite_output_dir
        --num_train_epochs="20" --logging_steps="500" --save_steps="2500" --eval_steps="2500" """,
    ),
    ("docs/span-masked-language-modeling.md", "Train T5"): (
        "run_t5_mlm_flax.py",
        "my-t5",
        """--model_type="t5" --max_seq_length="512" --per_device_train_batch_size="32"
        --adafactor --learning_rate="0.005" --weight_decay="0.001" --warmup_steps="2000"
        --overwrite_output_dir --logging_steps="500" --save_steps="10000" --eval_steps="2500" """,
    ),
    ("docs/denoising-language-modeling.md", "Train BART"): (
        "run_bart_dlm_flax.py",
        "my-bart",
        """--max_seq_length="1024" --per_device_train_batch_size="32" --learning_rate="1e-4"
        --warmup_steps="2000" --overwrite_output_dir --logging_steps="500" --save_steps="2000"
        --eval_steps="2000" """,
    ),
}


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


def interrupt(output_dir: Path) -> bytes:
    """Undo the last save of a finished run, and return the weights that it had saved."""
    weights = (output_dir / "flax_model.msgpack").read_bytes()
    steps = sorted((output_dir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    assert len(steps) == 2
    shutil.rmtree(steps[-1])
    for name in ("flax_model.msgpack", "model.safetensors"):
        (output_dir / name).unlink()
    return weights


def commands_of(code: str) -> list[list[str]]:
    """The words of each command of a script in shell code."""
    lines = [shlex.split(line) for line in code.replace("\\\n", "").splitlines()]
    return [words for words in lines if words[:1] == ["python"] and words[1].startswith("run_")]


def check_block_that_is_not_run(block, reason: str):
    """Check the syntax, and the flags of the scripts."""
    assert NOT_RUN[block.page, block.section] == reason
    assert block.language in ("python", "sh")
    if block.language == "python":
        compile(block.code, str(block), "exec")
        return
    subprocess.run(["bash", "-n", "-c", block.code], check=True)
    for _, script, *words in commands_of(block.code):
        importlib.import_module(script.removesuffix(".py")).parse_args(words)


def check_shortened_command(block, page: str):
    """Check that a page runs this command, with these flags and perhaps more."""
    script, flags = flags_of(block)
    complete = []
    for other in read_blocks(page):
        if other.language == "sh" and not other.note and f"python {script}" in other.code:
            complete.append(flags_of(other))
    assert any(found == script and {**full, **flags} == full for found, full in complete)


def run_shell_block(block, directory: Path):
    """Run the commands; each run of a script must evaluate the model."""
    start = time.time()
    run(["bash", "-euo", "pipefail", "-c", scaled_shell(block.code)], directory)
    # A script that is started in the background fails without an exit status.
    for output_dir in re.findall(r'--output_dir="(.*)"', block.code):
        assert (directory / output_dir / "eval_results.json").stat().st_mtime >= start - 1


def run_resuming_block(block, directory: Path):
    """Run the commands on an interrupted run, which must end with the weights that it had."""
    weights = interrupt(directory / "my-roberta")
    run_shell_block(block, directory)
    assert (directory / "my-roberta" / "flax_model.msgpack").read_bytes() == weights


def check_listing(block, folder: Path):
    """Check that all that is in a folder is listed, and that all that is listed is there."""
    patterns = [line.split()[0].rstrip("/") for line in block.code.splitlines()]
    unlisted = set()
    for path in folder.iterdir():
        if not any(Path(path.name).match(pattern) for pattern in patterns):
            unlisted.add(path.name)
    assert unlisted == set()
    assert [pattern for pattern in patterns if not list(folder.glob(pattern))] == []


def write_file(block, path: Path):
    """Write the file that a block shows, for the blocks below."""
    if block.language == "json":
        path.write_text(scaled_json(block.code))
    else:
        assert block.language == "python"
        path.write_text(block.code)


def without_repeated(blocks: list) -> list:
    """The blocks without those that repeat commands of an earlier one, word for word."""
    first_of = {}
    for block in blocks:
        first_of.setdefault((block.note, block.code), block)
    return list(first_of.values())


def check_diff(block, place: Path, directory: Path):
    """Check that a diff applies, and that it is small."""
    shutil.copy(place / "my_mlm.py", directory)
    apply(block, directory)
    assert len(re.findall("^[-+](?![-+])", block.code, re.MULTILINE)) <= 12


@pytest.mark.parametrize("block", without_repeated(BLOCKS), ids=str)
def test_block(block, place, tmp_path):
    kind, _, value = block.note.partition(": ")
    if kind == "not run":
        check_block_that_is_not_run(block, value)
        pytest.skip(value)
    elif kind == "run in":
        check_shortened_command(block, value)
    elif kind == "file":
        write_file(block, place / value)
    elif kind == "listing of":
        check_listing(block, place / value)
    elif kind == "diff of":
        check_diff(block, place, tmp_path)
    elif block.language == "python":
        assert kind == ""
        run([sys.executable, "-c", scaled_python(block.code)], place)
    else:
        assert (block.language, kind) == ("sh", "")
        if block.section == "Keep the flags in a file":
            run_resuming_block(block, shutil.copytree(place, tmp_path / "copy"))
        else:
            run_shell_block(block, place)


@pytest.mark.parametrize("block", read_blocks(CONTRIBUTING), ids=str)
def test_block_of_contributing(block):
    assert (block.language, block.note) == ("sh", "")
    collect = "python -m pytest --collect-only -p no:cacheprovider"
    collected = block.code.replace("python -m pytest", collect)
    run(["bash", "-euo", "pipefail", "-c", scaled_shell(collected)], ROOT)


def test_scalars_are_those_of_the_logs(place):
    """After the blocks have run, the table has what TensorBoard shows, and nothing else."""
    output = run(["tensorboard", "--inspect", "--logdir=my-roberta"], place)
    names = r"\b(?:train|eval)_\w+"
    listed = set(re.findall(rf"^\| `({names})`", TEXTS["docs/output.md"], re.MULTILINE))
    # No block uses --z_loss.
    assert listed - {"train_z_loss"} == set(re.findall(names, output))


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
        before = [pair for pair in flag_values(block.code) if pair[0] not in ADDED]
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
    notes = {}
    for block in BLOCKS:
        if block.note.startswith("not run: "):
            notes[block.page, block.section] = block.note.removeprefix("not run: ")
    assert notes == NOT_RUN


@pytest.mark.parametrize(("page", "section"), DOCUMENTED)
def test_documented_command(page, section):
    """The well-known commands of these scripts are complete.

    Only the batch size of the evaluation may be added to them.
    """
    script, model, command = DOCUMENTED[page, section]
    found, flags = flags_of(block_of(page, section, "sh"))
    known = parse_flags(shlex.split(command))
    folders = {"config_name": model, "tokenizer_name": model, "dataset_name": "corpus"}
    assert found == script
    assert {**flags, **known, **folders} == flags
    assert flags["output_dir"].startswith(model)
    added = flags.keys() - known.keys() - folders.keys()
    assert added <= {"output_dir", "per_device_eval_batch_size"}


def test_json_of_the_command():
    """The file of flags has those of the recipe of the README."""
    _, flags = flags_of(block_of("README.md", "3. Train", "sh"))
    settings = json.loads(block_of("docs/resuming.md", "Keep the flags in a file", "json").code)
    same = {name: type(value)(flags[name]) for name, value in settings.items()}
    assert settings == same
    assert len(settings) == len(flags)
