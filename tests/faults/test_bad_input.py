"""Bad input gets one line on stderr that says what is wrong, and nothing is written.

The exit status is 2 if the command line alone shows the error, and 1 if the script had to read a
file. Code that is word for word the same in all scripts is tested only in the template.
"""

import importlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.numpy import load_file
from training_scripts import (
    LENGTH,
    NUM_WORDS,
    SCRIPTS,
    T5,
    TEMPLATE,
    Place,
    Script,
    child_environment,
    full_but,
    snapshot,
    template_alone,
    word_tokenizer,
)

SECRET = "hf_aSecretOfTheTests"


@pytest.fixture(scope="module")
def place(script, tmp_path_factory) -> Place:
    """A place with bad files, and with a finished run in the folder `present`."""
    place = Place(script, tmp_path_factory.mktemp("bad_input"))
    run = place.run("present", max_steps=1, do_train=True)
    assert (run.returncode, run.lines) == (0, [])
    write_files(place)
    return place


def write_files(place: Place):
    """Write data, models, tokenizers and settings that are wrong in one way each.

    They are in the working directory of the runs.
    """
    folder = place.directory
    write_bad_data(folder)
    (folder / "directory.txt").mkdir()
    (folder / "no_files").mkdir()
    (folder / "other_files").mkdir()
    (folder / "other_files" / "notes.txt").write_text("mine")
    (folder / "a_file").write_text("mine")

    shutil.copytree(place.model, folder / "broken_config")
    (folder / "broken_config" / "config.json").write_text('{"model_type": ')
    shutil.copytree(folder / "present", folder / "broken_weights")
    (folder / "broken_weights" / "flax_model.msgpack").write_bytes(b"no weights")
    (folder / "broken_weights" / "model.safetensors").unlink()

    count = place.script.num_sentinels
    word_tokenizer(folder / "without_mask", without=("mask",), sentinels=count)
    word_tokenizer(folder / "without_pad", without=("pad",), sentinels=count)
    word_tokenizer(folder / "without_eos", without=("eos",), sentinels=count)
    word_tokenizer(folder / "without_sentinels")
    word_tokenizer(folder / "larger", num_words=NUM_WORDS + 10, sentinels=count)

    for name, (output_dir, changes) in SETTINGS.items():
        settings = {**place.settings(output_dir), **changes}
        (folder / name).write_text(json.dumps(settings, default=str))


def write_bad_data(folder: Path):
    """Write files of text, word references and settings that are wrong in one way each."""
    import pandas

    files = {
        "empty.txt": b"",
        "blank.txt": b"\n  \n\t\n" * 50,
        "latin1.txt": "w1 w2 sch\xf6n\n".encode("latin1") * 50,
        "short.txt": b"w1 w2 w3\n" * 4,
        "two_lines.txt": b"w1 w2 w3\nw4 w5 w6\n",
        "text.doc": b"w1 w2 w3\n" * 100,
        "text.doc.gz": b"w1 w2 w3\n" * 100,
        "lists.parquet.gz": b"any",
        "broken.txt.gz": b"\x1f\x8b\x08 and then something else",
        "empty.json": b"",
        "broken.json": b'{"text": "w1 w2"}\n{"text": "w1',
        "broken.jsonl": b'{"text": "w1 w2"}\nno json at all\n',
        "broken.csv": b'text,number\n"w1 w2,1\nw3",2,3,4\n"w5\n',
        "broken.parquet": b"PAR1 and then something else",
        "numbers.csv": b"text,count\n" + b"1,2\n" * 50,
        "ambiguous.csv": b"title,body\n" + b"w1 w2,w3 w4\n" * 50,
        "count.csv": b"text,count\n" + b"w1 w2,2\n" * 50,
        "short.refs": b"[1]\n[2]\n",
        "broken.refs": b"[1]\nnot a list\n",
        "broken_settings.json": b'{"output_dir": "absent",',
        "list_settings.json": b'["--output_dir=absent"]',
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    lists = pandas.DataFrame({"text": [["w1"], ["w2"]] * 50})
    lists.to_parquet(folder / "lists.parquet")


# {file of settings: (output_dir, changes of `Place.settings`)}
SETTINGS = {
    "good_settings.json": (
        "from_settings",
        {"max_steps": 2, "adam_beta1": 0.8, "do_train": True, "eval_steps": None},
    ),
    "unknown_settings.json": ("absent", {"tokne": SECRET}),
    "wrong_settings.json": ("absent", {"per_device_train_batch_size": "many"}),
}


@cache
def flags_of(script: Script) -> set[str]:
    """Return the names of all dataclass fields of a script, which are its flags."""
    return set(re.findall(r"^    (\w+): ", script.path.read_text(), re.MULTILINE))


def vocab_size(script: Script) -> int:
    """Return the size of the tokenizer's vocabulary, which has five special tokens."""
    return NUM_WORDS + 5 + script.num_sentinels


def check_refused(run, status: int, words):
    """Check that a run ended with one line that contains all of `words`, and no log lines."""
    assert run.returncode == status, run.stderr
    assert len(run.lines) == 1, run.stderr
    assert run.stderr.count("\n") == 1, run.stderr
    assert len(run.stderr) < 700
    assert run.stdout == ""
    for word in words:
        assert str(word) in run.stderr
    assert SECRET not in run.stderr


# ---------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------

NO_DATA = {"train_file": None, "validation_file": None}
# {case: (changes of the flags, words of the error)}
COMMAND_LINES = {
    "no output_dir": ({"output_dir": None}, ["--output_dir"]),
    "no data": (NO_DATA, ["--dataset_name", "--train_file"]),
    "two sources": ({"dataset_name": "folder"}, ["--dataset_name", "folder", "train.txt"]),
    "validation alone": ({"train_file": None}, ["--validation_file", "--train_file"]),
    "no model": (
        {"config_name": None, "model_type": None},
        ["--model_name_or_path", "--config_name", "--model_type"],
    ),
    "no tokenizer": ({"tokenizer_name": None}, ["--tokenizer_name"]),
    "eval without model": (
        {"do_eval": True, "config_name": None, "model_type": None},
        ["--model_name_or_path"],
    ),
    "a cache in the output directory": (
        {"output_dir": "absent", "cache_dir": "absent/cache", "push_to_hub": True},
        ["--cache_dir", "absent/cache", "--push_to_hub"],
    ),
    "eval of a config": ({"do_eval": True}, ["--model_name_or_path"]),
    "unknown model_type": ({"model_type": "nonsense"}, ["--model_type", "nonsense"]),
    "model_type without this objective": ({"model_type": "vit"}, ["--model_type", "vit"]),
    "overrides of a pretrained model": (
        {"model_name_or_path": "start", "config_name": None, "config_overrides": "n_layer=1"},
        ["--config_overrides", "n_layer=1", "--model_name_or_path"],
    ),
    "the best model without evaluation": (
        {"load_best_model_at_end": True, "eval_steps": 1, "do_train": True},
        ["--load_best_model_at_end", "--do_eval"],
    ),
    "the best model of a stream": (
        {"load_best_model_at_end": True, "shuffle_buffer_size": 9},
        ["--load_best_model_at_end", "--eval_steps"],
    ),
    "patience without the best model": (
        {"early_stopping_patience": 1},
        ["--early_stopping_patience", "--load_best_model_at_end"],
    ),
    "dtype": ({"dtype": "float8"}, ["--dtype", "float8"]),
    "lr_scheduler_type": ({"lr_scheduler_type": "zigzag"}, ["--lr_scheduler_type", "zigzag"]),
    "switch": ({"do_train": "perhaps"}, ["--do_train", "perhaps"]),
    "unknown flag": ({"no_such_flag": 1}, ["--no_such_flag"]),
    "abbreviated flag": ({"train_fil": "train.txt"}, ["--train_fil"]),
    "mistyped secret": ({"tokne": SECRET}, ["--tokne"]),
    "secret and another error": (
        {"token": SECRET, "hub_token": SECRET, "seed": -1},
        ["--seed", "-1"],
    ),
    "whole words of a slow tokenizer": (
        {"whole_word_mask": True, "use_fast_tokenizer": "False"},
        ["--whole_word_mask", "fast"],
    ),
    "train_ref_file with blocks": (
        {"train_ref_file": "short.refs", "line_by_line": False},
        ["--train_ref_file", "--line_by_line"],
    ),
    "validation_ref_file with blocks": (
        {"validation_ref_file": "short.refs", "line_by_line": False},
        ["--validation_ref_file", "--line_by_line"],
    ),
    "train_ref_file": ({"train_ref_file": "short.refs"}, ["--train_ref_file", "short.refs"]),
    "validation_ref_file": (
        {"validation_ref_file": "short.refs"},
        ["--validation_ref_file", "short.refs"],
    ),
    "too short for a span": (
        {"max_seq_length": 2, "mean_noise_span_length": 3},
        ["--max_seq_length", "2", "3"],
    ),
    "train_ref_file with a dataset": (
        {**NO_DATA, "dataset_name": "folder", "train_ref_file": "short.refs", "line_by_line": True},
        ["--train_ref_file", "--train_file"],
    ),
    "pad_to_max_length with blocks": (
        {"pad_to_max_length": True},
        ["--pad_to_max_length", "--line_by_line"],
    ),
}
# Cases of --profile_steps.
COMMAND_LINES |= {
    f"profile_steps {value}": ({"profile_steps": value}, ["--profile_steps", value, "10:13"])
    for value in ("10", "0:3", "5:4", "-1:3", "1:2:3", "a:b", "1.5:3", ":", "")
}
# Values that are wrong for any size, and for any real number.
SIZES = ["0", "-1", "1.5", "many", "nan", ""]
REALS = ["-1", "nan", "inf", "-inf", "many"]
# {flag: wrong values}
NUMBERS = {
    "per_device_train_batch_size": SIZES,
    "per_device_eval_batch_size": SIZES,
    "gradient_accumulation_steps": SIZES,
    "logging_steps": SIZES,
    "save_steps": SIZES,
    "eval_steps": SIZES,
    "max_train_samples": SIZES,
    "max_eval_samples": SIZES,
    "max_seq_length": SIZES,
    "save_total_limit": SIZES,
    "preprocessing_num_workers": SIZES,
    "early_stopping_patience": SIZES,
    # A block of one token has none to predict.
    "block_size": ["1", *SIZES],
    "num_train_steps": SIZES,
    "num_eval_samples": SIZES,
    "shuffle_buffer_size": SIZES,
    "learning_rate": REALS,
    "weight_decay": REALS,
    "max_grad_norm": REALS,
    "z_loss": REALS,
    "num_train_epochs": ["0", *REALS],
    "adam_epsilon": ["0", *REALS],
    "adam_beta1": ["1", "1.5", *REALS],
    "adam_beta2": ["1", "1.5", *REALS],
    "mlm_probability": ["0", "1", "1.5", *REALS],
    "mean_noise_span_length": ["0", *REALS],
    "permute_sentence_ratio": ["1.5", *REALS],
    "poisson_lambda": ["0", "1e-17", *REALS],
    "validation_split_percentage": ["-1", "100", "1.5", "many", "nan"],
    "max_steps": ["0", "-2", "1.5", "many"],
    "warmup_steps": ["-1", "1.5", "many", "nan", str(2**31)],
    "seed": ["-1", str(2**32), "1.5", "many"],
}
# Flags of the cases that no script has.
MADE_UP = {"no_such_flag", "train_fil", "tokne"}


def applies_always(script: Script, case: str) -> bool:
    return True


def each_case(cases, applies=applies_always):
    """Decorate a test so that it runs for each script with each case whose flags the script has."""

    def is_run(script, case):
        flags = {case} if cases is NUMBERS else set(cases[case][0])
        return flags - MADE_UP <= flags_of(script) and applies(script, case)

    def decorate(test):
        test = pytest.mark.parametrize("case", cases)(test)
        return pytest.mark.only_where.with_args(is_run)(test)

    return decorate


@pytest.fixture
def parse(place, capfd, monkeypatch):
    """A function that runs a wrong command line in this process.

    That is fast because the script ends before it does anything else.
    """

    def parse(argv):
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        module = importlib.import_module(place.script.path.stem)
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                module.main([str(word) for word in argv])
            returncode = ended.value.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        stdout, stderr = capfd.readouterr()
        lines = stderr.splitlines()
        return SimpleNamespace(returncode=returncode, stdout=stdout, stderr=stderr, lines=lines)

    monkeypatch.chdir(place.directory)
    before = snapshot(place.directory)
    yield parse
    assert snapshot(place.directory) == before


def command_line_applies(script: Script, case: str) -> bool:
    return script.needs_model_type or case != "no model"


@each_case(COMMAND_LINES, command_line_applies)
def test_wrong_command_line(place, parse, case):
    """With an output directory that has a run in it, and with one that does not exist.

    The former has a model, so an evaluation would not be refused there.
    """
    changes, words = COMMAND_LINES[case]
    for folder in ("absent",) if "do_eval" in changes else ("present", "absent"):
        flags = {"output_dir": folder, **changes}
        check_refused(parse(place.flags(**flags)), 2, words)


@each_case(NUMBERS)
def test_number_out_of_range(place, parse, case):
    for value in NUMBERS[case]:
        argv = place.flags("absent", **{case: value})
        check_refused(parse(argv), 2, [f"--{case}", value])


# Together with --output_dir these flags are a complete command.
ENOUGH = (
    "--config_name=start",
    "--tokenizer_name=start",
    "--train_file=train.txt",
    "--validation_file=train.txt",
)


@template_alone
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["missing.json"], ["missing.json"]),
        (["broken_settings.json"], ["broken_settings.json"]),
        (["list_settings.json"], ["list_settings.json"]),
        (["unknown_settings.json"], ["tokne"]),
        (["wrong_settings.json"], ["per_device_train_batch_size", "many"]),
        # A file of settings must be the only argument.
        (["good_settings.json", "--seed=1"], ["argument"]),
        (["--output_dir=absent", "--tokne", SECRET], ["--tokne"]),
        (["--output_dir=absent", SECRET], ["argument"]),
        (["--output_dir=absent", "--seed"], ["--seed"]),
        (
            ["--output_dir=gs://bucket/out", *ENOUGH],
            ["--output_dir gs://bucket/out", "a local folder"],
        ),
        ([], ["--output_dir"]),
    ],
    ids=lambda value: " ".join(value[:2]).replace(SECRET, "SECRET"),
)
def test_wrong_words(parse, argv, words):
    check_refused(parse(argv), 2, words)


# ---------------------------------------------------------------------------------------
# Data and environment
# ---------------------------------------------------------------------------------------

# {case: (changes of the flags, words of the error)}. `test_wrong_data_or_environment` replaces
# words in upper case by values that depend on the script.
ENVIRONMENT = {
    "missing file": ({"train_file": "missing.txt"}, ["--train_file", "missing.txt"]),
    "missing validation file": (
        {"validation_file": "missing.txt"},
        ["--validation_file", "missing.txt"],
    ),
    "a directory as file": ({"train_file": "directory.txt"}, ["--train_file", "directory.txt"]),
    "empty file": ({"train_file": "empty.txt"}, ["--train_file", "empty.txt"]),
    "empty json": ({"train_file": "empty.json"}, ["--train_file", "empty.json"]),
    "blank file": ({"train_file": "blank.txt"}, ["blank"]),
    "blank validation file": ({"validation_file": "blank.txt"}, ["blank"]),
    "one of several files is missing": (
        {"train_file": "train.txt", "validation_file": "missing-*.txt"},
        ["--validation_file", "missing-*.txt"],
    ),
    "files of several formats": ({"train_file": "[bc]*.[cj]s*"}, ["--train_file", "csv", "json"]),
    "a file of no known format among others": (
        {"train_file": "t*.???"},
        ["--train_file", "text.doc", ".jsonl", ".xz"],
    ),
    "an unknown extension before that of gzip": ({"train_file": "text.doc.gz"}, ["text.doc.gz"]),
    "parquet in gzip": ({"train_file": "lists.parquet.gz"}, ["lists.parquet.gz", ".gz"]),
    "only empty files": ({"train_file": "empty.*"}, ["--train_file", "empty"]),
    "broken gzip": ({"train_file": "broken.txt.gz"}, ["--train_file", "broken.txt.gz"]),
    "undecodable": ({"train_file": "latin1.txt"}, ["--train_file", "latin1.txt", "utf-8"]),
    "broken json": ({"train_file": "broken.json"}, ["--train_file", "broken.json"]),
    "broken jsonl": ({"train_file": "broken.jsonl"}, ["--train_file", "broken.jsonl"]),
    "broken csv": ({"train_file": "broken.csv"}, ["--train_file", "broken.csv"]),
    "broken parquet": ({"train_file": "broken.parquet"}, ["--train_file", "broken.parquet"]),
    "unknown extension": ({"train_file": "text.doc"}, ["--train_file", "text.doc", "jsonl"]),
    "no such dataset": ({**NO_DATA, "dataset_name": "no/such"}, ["--dataset_name", "no/such"]),
    "a folder without data": (
        {**NO_DATA, "dataset_name": "no_files"},
        ["--dataset_name", "no_files"],
    ),
    "no such column": (
        {"train_file": "count.csv", "text_column_name": "words"},
        ["count.csv", "words", "count"],
    ),
    "numbers as text": ({"train_file": "numbers.csv"}, ["numbers.csv", "text", "int64"]),
    "lists as text": ({"train_file": "lists.parquet"}, ["lists.parquet", "text", "not text"]),
    "a column of numbers": (
        {"train_file": "count.csv", "text_column_name": "count"},
        ["count.csv", "count", "int64"],
    ),
    "ambiguous columns": (
        {"train_file": "ambiguous.csv"},
        ["ambiguous.csv", "title", "body", "--text_column_name"],
    ),
    # Each of the 4 lines is <s>, 3 words and </s>.
    "too little for a block": ({"train_file": "short.txt"}, ["20", "BLOCK"]),
    "too little for a batch": ({"per_device_train_batch_size": 1000}, ["2000"]),
    "too little to split": (
        {"train_file": "two_lines.txt", "validation_file": None},
        ["--validation", "2", "5"],
    ),
    "too little to hold out": (
        {"train_file": "short.txt", "validation_file": None, "num_eval_samples": 5},
        ["--num_eval_samples", "5", "short.txt", "0 blocks"],
    ),
    "no split": (
        {"validation_file": None, "validation_split_percentage": 0},
        ["--validation_split_percentage", "400"],
    ),
    "too long a block": ({"block_size": LENGTH + 1}, ["--block_size", LENGTH + 1, f" {LENGTH} "]),
    "too long": ({"max_seq_length": LENGTH + 1}, ["--max_seq_length", LENGTH + 1, f" {LENGTH} "]),
    "no such config": ({"config_name": "missing"}, ["missing"]),
    "a broken config": ({"config_name": "broken_config"}, ["broken_config"]),
    "overrides of no setting": (
        {"config_overrides": "n_layers=1"},
        ["--config_overrides", "n_layers=1", "vocab_size"],
    ),
    "no such tokenizer": ({"tokenizer_name": "missing"}, ["missing"]),
    "a folder without tokenizer": ({"tokenizer_name": "no_files"}, ["no_files"]),
    "no such model": ({"model_name_or_path": "missing", "config_name": None}, ["missing"]),
    "a model without weights": ({"model_name_or_path": "start", "config_name": None}, ["start"]),
    "a model with broken weights": ({"model_name_or_path": "broken_weights"}, ["broken_weights"]),
    "model_type of another config": ({"model_type": "OTHER"}, ["--model_type", "OTHER", "OWN"]),
    "no mask token": ({"tokenizer_name": "without_mask"}, ["without_mask", "mask token"]),
    "no eos token": (
        {"tokenizer_name": "without_eos", "mean_noise_span_length": 3},
        ["without_eos", "eos token"],
    ),
    "no sentinels": (
        {"tokenizer_name": "without_sentinels", "mean_noise_span_length": 3},
        ["without_sentinels", "extra_id"],
    ),
    "too few sentinels": (
        {"max_seq_length": 512, "mean_noise_span_length": 3},
        ["8", "28", "--max_seq_length"],
    ),
    "no pad token for sentences": (
        {"tokenizer_name": "without_pad", "poisson_lambda": 3},
        ["without_pad", "pad token"],
    ),
    "no eos token for documents": (
        {"tokenizer_name": "without_eos", "poisson_lambda": 3},
        ["without_eos", "eos token"],
    ),
    "no pad token": (
        {"tokenizer_name": "without_pad", "line_by_line": True},
        ["without_pad", "pad token"],
    ),
    "a tokenizer too large": (
        {"model_name_or_path": "present", "tokenizer_name": "larger"},
        ["larger", "VOCABULARY + 10", "VOCABULARY"],
    ),
    "word references of another text": (
        {"train_ref_file": "short.refs", "line_by_line": True},
        ["short.refs", "2", "400"],
    ),
    "broken word references": (
        {"train_ref_file": "broken.refs", "line_by_line": True},
        ["broken.refs"],
    ),
    "missing word references": (
        {"train_ref_file": "missing.refs", "line_by_line": True},
        ["missing.refs"],
    ),
}


# Cases that are found by code that is word for word the same in all scripts but the streaming one.
IN_COMMON = {
    "missing validation file",
    "a directory as file",
    "empty file",
    "empty json",
    "unknown extension",
    "one of several files is missing",
    "files of several formats",
    "a file of no known format among others",
    "an unknown extension before that of gzip",
    "parquet in gzip",
    "only empty files",
    "no split",
    "no such dataset",
    "a folder without data",
    "broken json",
    "broken csv",
    "broken parquet",
    "ambiguous columns",
    "lists as text",
    "a column of numbers",
    "blank validation file",
    "no such config",
    "overrides of no setting",
    "a folder without tokenizer",
}


def environment_applies(script: Script, case: str) -> bool:
    if case == "too long" and not script.has_positions:
        return False
    if case == "no mask token" and "mask_token" not in script.path.read_text():
        return False
    if case in ("too little to split", "too little for a block") and script.is_stream:
        # The former is none. The latter is found after the checkpoints of `present`, which are of
        # another text: see test_too_little_data_is_refused.
        return False
    return script is TEMPLATE or script.is_stream or case not in IN_COMMON


@each_case(ENVIRONMENT, environment_applies)
def test_wrong_data_or_environment(place, case):
    """With an output directory that has a run in it, and for the template with a new one, too."""
    script = place.script
    values = {
        "OTHER": script.other_model_type,
        "OWN": script.model_type,
        "BLOCK": script.block,
        "VOCABULARY": vocab_size(script),
        "VOCABULARY + 10": vocab_size(script) + 10,
    }
    changes, words = ENVIRONMENT[case]
    changes = {flag: values.get(value, value) for flag, value in changes.items()}
    words = [values.get(word, word) for word in words]
    before = snapshot(place.directory)
    folders = ("present", "absent") if script is TEMPLATE else ("present",)
    for run in [place.start(folder, **changes) for folder in folders]:
        check_refused(run.wait(), 1, words)
    assert snapshot(place.directory) == before


@template_alone
@pytest.mark.parametrize(
    "output_dir",
    ["other_files", "a_file", "a_file/below", "/proc/nowhere", "/proc/version/below"],
)
@pytest.mark.parametrize("do", ["do_train", "do_eval"])
def test_wrong_output_dir(place, output_dir, do):
    if (output_dir, do) == ("other_files", "do_eval"):
        pytest.skip("an evaluation may write its results there")
    before = snapshot(place.directory)
    flags = {do: True}
    if do == "do_eval":
        flags["model_name_or_path"] = "present"
        flags["config_name"] = None
    run = place.run(Path(output_dir), **flags)
    check_refused(run, 1, ["--output_dir", output_dir])
    assert snapshot(place.directory) == before


@template_alone
def test_read_only_output_dir(place, tmp_path):
    """A read-only file system refuses root, too, whom permissions do not stop."""
    command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    try:
        for output_dir in (tmp_path, tmp_path / "below"):
            check_refused(place.run(output_dir), 1, ["--output_dir", tmp_path])
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# ---------------------------------------------------------------------------------------
# Good input
# ---------------------------------------------------------------------------------------


def flax_model(place: Place, output_dir: str) -> bytes:
    """Return the weights that a run has exported."""
    return (place.directory / output_dir / "flax_model.msgpack").read_bytes()


@template_alone
def test_a_file_of_settings_equals_flags(place):
    run = place.start_argv(["good_settings.json"]).wait()
    assert (run.returncode, run.lines) == (0, [])
    _, flags = SETTINGS["good_settings.json"]
    run = place.run("from_flags", **flags)
    assert (run.returncode, run.lines) == (0, [])
    assert flax_model(place, "from_settings") == flax_model(place, "from_flags")
    # The settings make a difference.
    assert flax_model(place, "from_settings") != flax_model(place, "present")


@pytest.mark.parametrize("script", full_but(SCRIPTS, TEMPLATE, T5), ids=str, indirect=True)
def test_a_larger_tokenizer_gets_a_larger_table(place):
    run = place.run("enlarged", tokenizer_name="larger", max_steps=1, do_train=True)
    assert run.returncode == 0, run.stderr
    (line,) = run.lines
    assert "WARNING" in line
    old_size = vocab_size(place.script)
    new_size = old_size + 10
    assert {str(new_size), str(old_size)} <= set(re.findall(r"\d+", line))
    config = json.loads((place.directory / "enlarged" / "config.json").read_text())
    assert config["vocab_size"] == new_size
    weights = load_file(place.directory / "enlarged" / "model.safetensors")
    sizes = {size for array in weights.values() for size in array.shape}
    assert new_size in sizes
    assert old_size not in sizes
    # The configuration that is named here has the old size, and that of the model counts.
    run = place.run("enlarged", tokenizer_name="larger", do_eval=True)
    assert (run.returncode, run.lines) == (0, [])


@template_alone
@pytest.mark.full
def test_quoted_values_through_a_shell(place):
    argv = [sys.executable, str(place.script.path), *place.flags("quoted", do_train=True)]
    command = shlex.join(argv)
    quoted = '--adam_beta1="0.8" --max_steps="2" --weight_decay="0.0" --seed="42"'
    run = subprocess.run(
        ["/bin/sh", "-c", f"{command} {quoted}"],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    run = place.run("unquoted", max_steps=2, adam_beta1=0.8, do_train=True)
    assert flax_model(place, "quoted") == flax_model(place, "unquoted")


@template_alone
@pytest.mark.parametrize(
    ("changes", "status", "word"),
    [({"seed": -1}, 2, "--seed"), ({"train_file": "broken.jsonl"}, 1, "broken.jsonl")],
    ids=["command line", "data"],
)
def test_in_a_process_of_its_own(place, changes, status, word):
    """A process of its own ends in another way than a forked child."""
    run = subprocess.run(
        [sys.executable, str(place.script.path), *place.flags("absent", **changes)],
        cwd=place.directory,
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == status, run.stderr
    assert run.stderr.count("\n") == 1
    assert word in run.stderr
    assert run.stdout == ""
    assert not (place.directory / "absent").exists()
