"""What bad input gets: one line on stderr that says what is wrong, status 2 or 1, nothing written.

Status 2 where the command line alone shows that it is wrong, 1 where a file had to be looked at. Cases for code that
the scripts have word for word in common run for the template alone.
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
    TEMPLATE,
    Place,
    Script,
    child_environment,
    snapshot,
    template_alone,
    word_tokenizer,
)

SECRET = "hf_aSecretOfTheTests"


@pytest.fixture(scope="module")
def place(script, tmp_path_factory) -> Place:
    place = Place(script, tmp_path_factory.mktemp("bad_input"))
    run = place.run("present", max_steps=1, do_train=True)
    assert (run.returncode, run.lines) == (0, [])
    write_files(place)
    return place


def write_files(place: Place):
    """Data, models and tokenizers that are wrong in one way each; runs have their folder as working directory."""
    import pandas

    folder = place.directory
    files = {
        "empty.txt": b"",
        "blank.txt": b"\n  \n\t\n" * 50,
        "latin1.txt": "w1 w2 sch\xf6n\n".encode("latin1") * 50,
        "short.txt": b"w1 w2 w3\n" * 4,
        "two_lines.txt": b"w1 w2 w3\nw4 w5 w6\n",
        "text.doc": b"w1 w2 w3\n" * 100,
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
    pandas.DataFrame({"text": [["w1"], ["w2"]] * 50}).to_parquet(folder / "lists.parquet")
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
    settings = {
        name: place.settings(output_dir) | changes
        for name, (output_dir, changes) in SETTINGS.items()
    }
    for name, values in settings.items():
        (folder / name).write_text(json.dumps(values, default=str))


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
    return set(re.findall(r"^    (\w+): ", script.path.read_text(), re.MULTILINE))


def vocabulary(script: Script) -> int:
    """The size of its tokenizer's, five special tokens included."""
    return NUM_WORDS + 5 + script.num_sentinels


def check_refused(run, status: int, words):
    assert run.returncode == status, run.stderr
    assert len(run.lines) == 1, run.stderr
    assert run.stderr.count("\n") == 1, run.stderr  # nothing else is said before
    assert len(run.stderr) < 700
    assert run.stdout == ""
    for word in words:
        assert str(word) in run.stderr
    assert SECRET not in run.stderr


# ----------------------------------------------------------------------------------------------------- command line

NO_DATA = {"train_file": None, "validation_file": None}
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
    "eval of a config": ({"do_eval": True}, ["--model_name_or_path"]),
    "unknown model_type": ({"model_type": "nonsense"}, ["--model_type", "nonsense"]),
    "model_type without this objective": ({"model_type": "vit"}, ["--model_type", "vit"]),
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
SIZES = ["0", "-1", "1.5", "many", "nan", ""]
REALS = ["-1", "nan", "inf", "-inf", "many"]
NUMBERS = {
    **{f"per_device_{split}_batch_size": SIZES for split in ("train", "eval")},
    **{f"{what}_steps": SIZES for what in ("gradient_accumulation", "logging", "save", "eval")},
    **{f"max_{what}": SIZES for what in ("train_samples", "eval_samples", "seq_length")},
    **dict.fromkeys(("save_total_limit", "preprocessing_num_workers"), SIZES),
    "block_size": ["1", *SIZES],  # the one token would have none to predict
    **dict.fromkeys(("num_train_steps", "num_eval_samples", "shuffle_buffer_size"), SIZES),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm"), REALS),
    **{name: ["0", *REALS] for name in ("num_train_epochs", "adam_epsilon")},
    **{name: ["1", "1.5", *REALS] for name in ("adam_beta1", "adam_beta2")},
    "mlm_probability": ["0", "1", "1.5", *REALS],
    "mean_noise_span_length": ["0", *REALS],
    "permute_sentence_ratio": ["1.5", *REALS],
    "poisson_lambda": ["0", *REALS],
    "validation_split_percentage": ["-1", "100", "1.5", "many", "nan"],
    "max_steps": ["0", "-2", "1.5", "many"],
    "warmup_steps": ["-1", "1.5", "many", "nan"],
    "seed": ["-1", str(2**32), "1.5", "many"],
}  # fmt: skip


MADE_UP = {"no_such_flag", "train_fil", "tokne"}


def each_case(cases, applies=lambda script, case: True):
    """Each script with each case whose flags it has."""

    def runs(script, case):
        flags = {case} if cases is NUMBERS else set(cases[case][0])
        return flags - MADE_UP <= flags_of(script) and applies(script, case)

    return lambda test: pytest.mark.only_where.with_args(runs)(
        pytest.mark.parametrize("case", cases)(test)
    )


@pytest.fixture
def parse(place, capfd, monkeypatch):
    """Function that runs a wrong command line in this process, which takes no time: it ends before anything else is
    done."""

    def parse(argv):
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        module = importlib.import_module(place.script.path.stem)
        capfd.readouterr()
        try:
            returncode = module.cli([str(word) for word in argv])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        stdout, stderr = capfd.readouterr()
        return SimpleNamespace(
            returncode=returncode, stdout=stdout, stderr=stderr, lines=stderr.splitlines()
        )

    monkeypatch.chdir(place.directory)
    before = snapshot(place.directory)
    yield parse
    assert snapshot(place.directory) == before


@each_case(COMMAND_LINES, lambda script, case: script.needs_model_type or case != "no model")
def test_wrong_command_line(place, parse, case):
    """In two folders: one with a run in it, where an evaluation finds a model, and one that is not there."""
    changes, words = COMMAND_LINES[case]
    for folder in ("absent",) if "do_eval" in changes else ("present", "absent"):
        check_refused(parse(place.flags(**{"output_dir": folder, **changes})), 2, words)


@each_case(NUMBERS)
def test_number_out_of_range(place, parse, case):
    for value in NUMBERS[case]:
        check_refused(parse(place.flags("absent", **{case: value})), 2, [f"--{case}", value])


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
        (["good_settings.json", "--seed=1"], ["argument"]),  # a file alone is settings
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


# --------------------------------------------------------------------------------------------- data and environment

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
    "undecodable": ({"train_file": "latin1.txt"}, ["--train_file", "latin1.txt", "utf-8"]),
    **{
        f"broken {kind}": ({"train_file": f"broken.{kind}"}, ["--train_file", f"broken.{kind}"])
        for kind in ("json", "jsonl", "csv", "parquet")
    },
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
    "too little for a block": (
        {"train_file": "short.txt"},
        ["20", "BLOCK"],
    ),  # 4 lines of <s>, 3 words, </s>
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


IN_COMMON = {  # what the scripts word for word have in common finds these
    *(
        "missing validation file",
        "a directory as file",
        "empty file",
        "empty json",
        "unknown extension",
        "no split",
    ),
    *(
        "no such dataset",
        "a folder without data",
        "broken json",
        "broken csv",
        "broken parquet",
        "ambiguous columns",
    ),
    *(
        "lists as text",
        "a column of numbers",
        "blank validation file",
        "no such config",
        "a folder without tokenizer",
    ),
}


def applies(script: Script, case: str) -> bool:
    if case == "too long" and not script.has_positions:
        return False
    if case == "no mask token" and "mask_token" not in script.path.read_text():
        return False
    if case == "too little to split" and script.is_stream:
        return False
    return script is TEMPLATE or script.is_stream or case not in IN_COMMON


@each_case(ENVIRONMENT, applies)
def test_wrong_data_or_environment(place, case):
    """In a folder with a run in it; for the template in one that is not there, too."""
    changes, words = ENVIRONMENT[case]
    script, own = place.script, vocabulary(place.script)
    names = {"OTHER": script.other_model_type, "OWN": script.model_type, "BLOCK": script.block}
    names |= {"VOCABULARY": own, "VOCABULARY + 10": own + 10}
    changes = {flag: names.get(value, value) for flag, value in changes.items()}
    before = snapshot(place.directory)
    folders = ("present", "absent") if script is TEMPLATE else ("present",)
    for run in [place.start(folder, **changes) for folder in folders]:
        check_refused(run.wait(), 1, [names.get(word, word) for word in words])
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
    model = {"model_name_or_path": "present", "config_name": None} if do == "do_eval" else {}
    check_refused(
        place.run(Path(output_dir), **model, **{do: True}), 1, ["--output_dir", output_dir]
    )
    assert snapshot(place.directory) == before


@template_alone
def test_read_only_output_dir(place, tmp_path):
    """For root, too, for whom permissions are no hindrance."""
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)],
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    try:
        for output_dir in (tmp_path, tmp_path / "below"):
            check_refused(place.run(output_dir), 1, ["--output_dir", tmp_path])
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# ----------------------------------------------------------------------------------------------------- what is fine


@template_alone
def test_a_file_of_settings_equals_flags(place):
    run = place.start_argv(["good_settings.json"]).wait()
    assert (run.returncode, run.lines) == (0, [])
    run = place.run("from_flags", **SETTINGS["good_settings.json"][1])
    assert (run.returncode, run.lines) == (0, [])
    both = [
        (place.directory / name / "flax_model.msgpack").read_bytes()
        for name in ("from_settings", "from_flags")
    ]
    assert both[0] == both[1]
    default = (place.directory / "present" / "flax_model.msgpack").read_bytes()
    assert both[0] != default


def test_a_larger_tokenizer_gets_a_larger_table(place):
    run = place.run("enlarged", tokenizer_name="larger", max_steps=1, do_train=True)
    assert run.returncode == 0, run.stderr
    (line,) = run.lines
    assert "WARNING" in line
    own = vocabulary(place.script)
    assert {str(own + 10), str(own)} <= set(re.findall(r"\d+", line))
    assert (
        json.loads((place.directory / "enlarged" / "config.json").read_text())["vocab_size"]
        == own + 10
    )
    weights = load_file(place.directory / "enlarged" / "model.safetensors")
    sizes = {size for value in weights.values() for size in value.shape}
    assert own + 10 in sizes
    assert own not in sizes


@template_alone
def test_quoted_values_through_a_shell(place):
    argv = [shlex.quote(word) for word in place.flags("quoted", do_train=True)]
    command = (
        f"{shlex.quote(sys.executable)} {shlex.quote(str(place.script.path))} {' '.join(argv)}"
    )
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
    both = [
        (place.directory / name / "flax_model.msgpack").read_bytes()
        for name in ("quoted", "unquoted")
    ]
    assert both[0] == both[1]


@template_alone
@pytest.mark.parametrize(
    ("changes", "status", "word"),
    [({"seed": -1}, 2, "--seed"), ({"train_file": "broken.jsonl"}, 1, "broken.jsonl")],
    ids=["command line", "data"],
)
def test_in_a_process_of_its_own(place, changes, status, word):
    """Whose end is not that of a forked child."""
    run = subprocess.run(
        [sys.executable, str(place.script.path), *place.flags("absent", **changes)],
        cwd=place.directory, env=child_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == status, run.stderr
    assert run.stderr.count("\n") == 1
    assert word in run.stderr
    assert run.stdout == ""
    assert not (place.directory / "absent").exists()
