"""Locks, stops, changed settings and odd names: what happens around a run, in real processes.

The code is word for word the same in all scripts, so only the template is tested.
"""

import itertools
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from outputs import EXPORTED, differing, logged_steps, outcome
from safetensors.numpy import load_file
from training_scripts import Place, checkpoints, full_but, template_alone, wait_for
from transformers import RobertaConfig

import run_mlm_flax

pytestmark = template_alone
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
TRAINING = {"max_steps": 12, "save_steps": 3, "logging_steps": 1, "save_total_limit": 5}


@pytest.fixture(scope="module")
def place(script, tmp_path_factory) -> Place:
    return Place(script, tmp_path_factory.mktemp("reliability"))


@pytest.fixture(scope="module")
def finished(place) -> Path:
    """The output directory of a run that nothing interrupted."""
    run = place.run("finished", **TRAINING)
    assert (run.returncode, run.lines) == (0, [])
    return place.directory / "finished"


@pytest.fixture
def copied(place, finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copied"))


# ---------------------------------------------------------------------------------------
# Lock
# ---------------------------------------------------------------------------------------


def test_a_second_run_in_an_output_directory_is_refused(place, tmp_path):
    output_dir = tmp_path / "out"
    first = place.start(output_dir, **{**TRAINING, "max_steps": 100_000})
    wait_for(lambda: checkpoints(output_dir), first)
    before = checkpoints(output_dir)[0]
    for flags in ({}, {"overwrite_output_dir": True}):
        second = place.run(output_dir, **TRAINING, **flags)
        assert second.returncode == 1
        (line,) = second.lines
        assert f"process {first.pid} on {socket.gethostname()}" in line
        assert str(output_dir) in line
        assert "overwrite" not in line
    # The first one goes on.
    wait_for(lambda: checkpoints(output_dir)[-1] > before + 6, first)
    first.kill()
    step = checkpoints(output_dir)[-1]
    third = place.run(output_dir, **{**TRAINING, "max_steps": step + 1})
    assert (third.returncode, third.lines) == (0, [])
    assert not (output_dir / ".lock").exists()


def wait_for_the_other_run(script):
    """Let a run take the lock only after two runs have seen that nobody has it."""
    import os
    import pathlib
    import time

    acquire = script.OutputLock.acquire

    def late_acquire(lock):
        pathlib.Path(f"checked-{os.getpid()}").touch()
        while len(list(pathlib.Path().glob("checked-*"))) < 2:
            time.sleep(0.01)
        acquire(lock)

    script.OutputLock.acquire = late_acquire


def test_two_runs_that_start_at_once(place, finished, tmp_path):
    """One of them trains. The other one ends with one line and breaks nothing."""
    output_dir = tmp_path / "out"
    options = {**TRAINING, "change": wait_for_the_other_run}
    runs = [place.start(output_dir, **options) for _ in range(2)]
    codes = sorted(run.wait().returncode for run in runs)
    assert codes == [0, 1]
    (refused,) = [run for run in runs if run.returncode == 1]
    (line,) = refused.lines
    assert str(output_dir) in line
    for name in EXPORTED:
        assert (output_dir / name).read_bytes() == (finished / name).read_bytes()


HOLD_LOCK = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write("process 1 on host")
file.flush()
print(flush=True)
time.sleep(600)
"""


def test_checkpoints_that_another_run_replaces_while_they_are_read(copied):
    """The message names the other run. It does not say that the checkpoints are damaged."""
    found = run_mlm_flax.list_checkpoints(copied)
    # The other run takes the lock after this one has looked for it, and deletes all of them.
    shutil.rmtree(copied / "checkpoints")
    command = [sys.executable, "-c", HOLD_LOCK, str(copied / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        try:
            with pytest.raises(run_mlm_flax.InputError, match="process 1 on host writes to it"):
                run_mlm_flax.restore(found, state=None, settings={}, num_steps=12)
        finally:
            other.kill()


# ---------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------


def evaluate_slowly(script):
    """Write to a file how many batches of an evaluation are left.

    After two of them, wait for a file that says that the signal is sent.
    """
    import pathlib
    import time

    original = script.eval_batches

    def slow_batches(*args):
        batches = list(original(*args))
        yield batches.pop(0)
        yield batches.pop(0)
        while batches:
            pathlib.Path("left").write_text(str(len(batches)))
            while not pathlib.Path("sent").exists():
                time.sleep(0.01)
            yield batches.pop(0)

    script.eval_batches = slow_batches


@pytest.mark.parametrize(
    ("moment", "number"),
    full_but(
        itertools.product(("during training", "at the end"), STOP_SIGNALS),
        ("during training", signal.SIGTERM),
        ("at the end", signal.SIGINT),
    ),
)
def test_a_signal_stops_an_evaluation_between_two_batches(
    place, finished, tmp_path, moment, number
):
    output_dir = tmp_path / "out"
    eval_steps = 6 if moment == "during training" else 100
    flags = {**TRAINING, "do_train": True, "do_eval": True, "eval_steps": eval_steps}
    flags["per_device_eval_batch_size"] = 1
    left = place.directory / "left"
    sent = place.directory / "sent"
    for file in (left, sent):
        file.unlink(missing_ok=True)
    run = place.start(output_dir, **flags, change=evaluate_slowly)
    step = 6 if moment == "during training" else 12
    wait_for(lambda: f"Step {step}: train_loss" in run.stderr and left.exists(), run)
    run.send_signal(number)
    sent.touch()
    run.wait()
    assert int(left.read_text()) > 1
    assert (run.returncode, run.lines) == (128 + number, [])
    assert not (output_dir / "eval_results.json").exists()
    assert checkpoints(output_dir)[-1] >= step

    run = place.run(output_dir, **flags)
    assert (run.returncode, run.lines) == (0, [])
    for name in EXPORTED:
        assert (output_dir / name).read_bytes() == (finished / name).read_bytes()
    assert (output_dir / "eval_results.json").exists()


def ignore_sighup(script):
    import signal

    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_nohup_holds(place, tmp_path):
    """The run gets a SIGHUP when it names its first checkpoint, and goes on."""
    hang_up = {"kill_at": [r"^rename .*/checkpoints/\d+$"], "kill_with": signal.SIGHUP}
    run = place.run(tmp_path / "out", **TRAINING, **hang_up, change=ignore_sighup)
    assert (run.returncode, run.lines) == (0, [])
    assert checkpoints(tmp_path / "out")[-1] == 12


def tokenize_slowly(script):
    """Let tokenizing take minutes. Each process writes a file once it has begun."""
    import os
    import pathlib
    import time

    original = script.encode

    def slow_encode(batch, **options):
        pathlib.Path(f"tokenizing-{os.getpid()}").touch()
        time.sleep(600)
        return original(batch, **options)

    script.encode = slow_encode


def children_of(pid: int) -> list[int]:
    """The processes that `pid` has started and that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("number", full_but(STOP_SIGNALS[:2], signal.SIGTERM))
def test_a_signal_while_other_processes_tokenize(place, tmp_path, number):
    flags = {**TRAINING, "preprocessing_num_workers": 2, "overwrite_cache": True}
    run = place.start(tmp_path / "out", **flags, change=tokenize_slowly)

    def tokenizing_workers():
        names = {path.name for path in place.directory.glob("tokenizing-*")}
        return [pid for pid in children_of(run.pid) if f"tokenizing-{pid}" in names]

    wait_for(lambda: len(tokenizing_workers()) == 2, run)
    workers = children_of(run.pid)
    run.send_signal(number)
    run.wait()
    assert (run.returncode, run.lines) == (128 + number, [])
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


# ---------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "is_own"),
    [
        (None, True),
        ("", True),
        ("out", True),
        ("../folder/out/checkpoints/9", True),
        ("link/checkpoints/9", True),
        ("out/pretrain", False),
        ("out/pretrain/checkpoints/9", False),
        ("output/checkpoints/9", False),
    ],
)
def test_what_is_the_runs_own(script, tmp_path, monkeypatch, source, is_own):
    """The checkpoints of another run may lie below --output_dir, and a path has several names."""
    folder = tmp_path / "folder"
    (folder / "out").mkdir(parents=True)
    (folder / "link").symlink_to("out")
    monkeypatch.chdir(folder)
    args = Namespace(output_dir="out", resume_from_checkpoint=source)
    assert run_mlm_flax.resumes_from_own(args) is is_own


def test_a_run_that_resumes_from_a_folder_below_keeps_its_checkpoints(place, finished, tmp_path):
    """The same command, given again, resumes from the run's own checkpoints."""
    output_dir = tmp_path / "out"
    pretrained = output_dir / "pretrained"
    shutil.copytree(finished, pretrained)
    for step in checkpoints(pretrained)[1:]:
        shutil.rmtree(pretrained / "checkpoints" / str(step))
    first = checkpoints(pretrained)
    flags = {**TRAINING, "resume_from_checkpoint": pretrained}
    run = place.run(output_dir, **flags, kill_at=[rf"^mkdir .*/checkpoints/{first[0] + 6}\b"])
    assert run.returncode == 137, run.stderr
    own = checkpoints(output_dir)
    assert own
    assert own[-1] > first[0]
    run = place.run(output_dir, **flags)
    assert (run.returncode, run.lines) == (0, [])
    assert set(own) <= set(checkpoints(output_dir))
    assert f"steps {own[-1]} to 12" in run.stderr


@pytest.mark.parametrize("name", ["tie_word_embeddings", "is_decoder"])
def test_a_model_of_another_kind_does_not_resume(script, name):
    """The JSON of a config leaves out what has the default of all model types."""
    args = Namespace(adafactor=False)
    settings = []
    for value in (False, True):
        config = RobertaConfig(**{name: value})
        settings.append(run_mlm_flax.settings_to_match(args, config, batch_size=8))
    differing_names = {key for key in settings[0] if settings[0][key] != settings[1].get(key)}
    assert name in differing_names


def test_the_best_of_another_run_counts_only_with_the_flag(script, caplog):
    found = {"best": {**run_mlm_flax.NO_BEST, "step": 9, "eval_loss": 1.0}}
    args = Namespace(
        output_dir="absent",
        resume_from_checkpoint=None,
        overwrite_output_dir=False,
        load_best_model_at_end=False,
    )
    assert run_mlm_flax.best_before(args, found) == run_mlm_flax.NO_BEST
    assert caplog.text == ""


def test_a_resumed_run_logs_the_settings_that_differ(place, copied):
    train_file = place.directory / "other.txt"
    train_file.write_text(place.train_file.read_text().replace("w1", "w2"))
    flags = {
        **TRAINING,
        "max_steps": 15,
        "learning_rate": 0.02,
        "seed": 7,
        "mlm_probability": 0.2,
        "train_file": train_file,
    }
    run = place.run(copied, **flags)
    assert (run.returncode, run.lines) == (0, [])
    changed = re.findall(r"INFO (.*) is (\S+) now, and was (\S+) before", run.stderr)
    found = {name: (before, now) for name, now, before in changed}
    assert set(found) == {
        "--max_steps",
        "--learning_rate",
        "--seed",
        "--mlm_probability",
        "--train_file",
        "checksum of the training text",
    }
    assert found["--seed"] == ("42", "7")
    assert found["--learning_rate"] == ("0.01", "0.02")

    # The next checkpoint has the settings of this run.
    run = place.run(copied, **{**flags, "max_steps": 16})
    changed = re.findall(r"INFO (.*) is (\S+) now, and was (\S+) before", run.stderr)
    assert changed == [("--max_steps", "16", "15")]


def test_secrets_are_not_stored(place, tmp_path):
    flags = {**TRAINING, "token": "hf_secret1", "hub_token": "hf_secret2"}
    run = place.run(tmp_path / "out", **flags)
    assert run.returncode == 0
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"hf_secret" not in path.read_bytes()


def test_fewer_steps_than_the_checkpoint_has(place, copied):
    run = place.run(copied, **{**TRAINING, "max_steps": 5})
    assert run.returncode == 1
    (line,) = run.lines
    assert "checkpoints/12: this run ends before, at step 5" in line
    assert checkpoints(copied)[-1] == 12


# ---------------------------------------------------------------------------------------
# Odd files, names and numbers
# ---------------------------------------------------------------------------------------

NAMES = ["lr[3e-4]", "a*b?", "#%{}", "two words", "new\nline", "Žluťoučký"]


@pytest.mark.parametrize("name", full_but(NAMES, "new\nline"))
def test_odd_characters_in_every_path(place, finished, tmp_path, name):
    """A run stops, resumes, and is evaluated from its exported model."""
    folder = tmp_path / name
    folder.mkdir()
    files = {
        "train_file": folder / f"{name}.txt",
        "validation_file": folder / f"{name} v.txt",
        "config_name": folder / "model",
        "tokenizer_name": folder / "model",
        "cache_dir": folder / "cache" if "{" not in name else None,
    }
    shutil.copy(place.train_file, files["train_file"])
    shutil.copy(place.validation_file, files["validation_file"])
    shutil.copytree(place.model, files["config_name"])
    output_dir = folder / name
    kill_at = [r"(?s)^rename .*/checkpoints/6$"]
    run = place.run(output_dir, **TRAINING, **files, kill_at=kill_at)
    assert (run.returncode, checkpoints(output_dir)) == (137, [3])
    run = place.run(output_dir, **TRAINING, **files)
    assert (run.returncode, run.lines) == (0, [])
    assert "steps 3 to 12" in run.stderr
    for weights in ("flax_model.msgpack", "model.safetensors"):
        assert (output_dir / weights).read_bytes() == (finished / weights).read_bytes()
    changes = {"model_name_or_path": output_dir, "config_name": None, "tokenizer_name": None}
    changes |= {"do_eval": True, "model_type": None}
    run = place.run(folder / "evaluation", **{**files, **changes})
    assert (run.returncode, run.lines) == (0, [])


def test_a_file_with_brackets_comes_before_a_pattern(place, tmp_path):
    """The text is that of the file `glob[1].txt` and not that of `glob1.txt`."""
    (tmp_path / "glob1.txt").write_text("w1 w2\n")
    shutil.copy(place.train_file, tmp_path / "glob[1].txt")
    run = place.run(tmp_path / "out", **TRAINING, train_file=tmp_path / "glob[1].txt")
    assert (run.returncode, run.lines) == (0, [])


def test_all_results_that_are_damaged(place, copied):
    (copied / "all_results.json").write_text('{"eval_loss": 1.')
    run = place.run(copied, **TRAINING)
    assert run.returncode == 0
    (line,) = run.lines
    assert "WARNING" in line
    assert "all_results.json" in line
    train, evaluation, both = (
        json.loads((copied / f"{name}_results.json").read_text())
        for name in ("train", "eval", "all")
    )
    assert both == {**train, **evaluation}


def test_an_evaluation_alone_adds_no_point_to_the_curves(place, copied):
    """It is of no step. The curves of the training lie in the same folder."""
    events = sorted(copied.glob("events.*"))
    before = [path.read_bytes() for path in events]
    run = place.run(copied, do_eval=True)
    assert (run.returncode, run.lines) == (0, [])
    assert sorted(copied.glob("events.*")) == events
    assert [path.read_bytes() for path in events] == before
    assert "Step 0" not in run.stderr
    assert " eval_loss " in run.stderr


def test_the_log_line_of_a_step_comes_before_that_of_its_evaluation(place, tmp_path):
    flags = {"max_steps": 5, "eval_steps": 2, "logging_steps": 2, "save_steps": 100}
    run = place.run(tmp_path / "out", **flags)
    assert run.returncode == 0
    found = re.findall(r"Step (\d): (train|eval)_loss", run.stderr)
    names = ("train", "eval")
    assert found == [(step, name) for step in "245" for name in names]


def fail_the_first_save(script):
    """Change the script: no checkpoint can be written. A save has failed before the next step."""
    from concurrent.futures import wait

    def write_checkpoint(*args):
        raise OSError("no space left")

    save = script.Saver.save

    def save_and_wait(self, *args, **progress):
        save(self, *args, **progress)
        wait([self.saving])

    script.write_checkpoint = write_checkpoint
    script.Saver.save = save_and_wait


def test_training_ends_when_a_save_has_failed(place, tmp_path):
    """And not only at the next save, since all steps until then would be lost."""
    flags = {"max_steps": 100, "save_steps": 50, "logging_steps": 1}
    run = place.run(tmp_path / "out", **flags, change=fail_the_first_save)
    assert run.returncode == 1
    (line,) = run.lines
    assert "saving failed" in line
    assert "no space left" in line
    assert logged_steps(tmp_path / "out")[-1] in (50, 51)


@pytest.mark.parametrize(
    "kill_at", [r"^mkdir .*/checkpoints$", r"^remove (.*/)?state\.safetensors$"]
)
def test_killed_while_it_replaces_the_checkpoints(place, copied, kill_at):
    """The same command without --overwrite_output_dir runs then."""
    run = place.run(copied, **TRAINING, overwrite_output_dir=True, kill_at=[kill_at])
    assert (run.returncode, checkpoints(copied)) == (137, [])
    run = place.run(copied, **TRAINING)
    assert (run.returncode, run.lines) == (0, [])
    assert checkpoints(copied)[-1] == TRAINING["max_steps"]
    assert not (copied / ".tmp").exists()


def test_an_evaluation_batch_larger_than_the_set(place, copied):
    flags = {"do_eval": True, "model_name_or_path": copied}
    expected = place.run(copied, **flags)
    loss = json.loads((copied / "eval_results.json").read_text())["eval_loss"]
    run = place.run(copied, **flags, per_device_eval_batch_size=10**9)
    assert (expected.returncode, run.returncode, run.lines) == (0, 0, [])
    found = json.loads((copied / "eval_results.json").read_text())["eval_loss"]
    assert found == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"max_steps": 10**25}, ["--max_steps", "2147483647"]),
        ({"num_train_epochs": 1e12}, ["--num_train_epochs", "2147483647"]),
    ],
    ids=lambda value: str(next(iter(value))),
)
def test_numbers_and_names_that_are_refused(place, tmp_path, flags, words):
    run = place.run(tmp_path / "out", **flags)
    assert run.returncode in (1, 2)
    (line,) = run.lines
    assert all(word in line for word in words)


def test_a_cache_dir_with_braces_is_refused(place, tmp_path):
    """`datasets` cannot use it."""
    run = place.run(tmp_path / "out", cache_dir=tmp_path / "{}")
    assert run.returncode == 2
    (line,) = run.lines
    assert "--cache_dir" in line


def test_an_empty_output_dir_is_refused(place):
    argv = [flag for flag in place.flags("out") if not flag.startswith("--output_dir")]
    run = place.start_argv([*argv, "--output_dir="]).wait()
    assert run.returncode == 2
    (line,) = run.lines
    assert "--output_dir" in line


def test_a_very_large_number_of_steps(place, tmp_path):
    """The run starts to train. A list of the steps would take 16 GB."""
    run = place.start(tmp_path / "out", max_steps=2 * 10**9, logging_steps=1)
    wait_for(lambda: "Step 2: train_loss" in run.stderr, run)
    status = Path(f"/proc/{run.pid}/status").read_text()
    run.kill()
    assert int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) < 2**22


def test_an_evaluation_that_predicts_nothing(place, copied, tmp_path):
    file = tmp_path / "validation.txt"
    file.write_text("w1\n")
    run = place.run(
        copied,
        do_eval=True,
        model_name_or_path=copied,
        validation_file=file,
        line_by_line=True,
        mlm_probability=1e-9,
    )
    assert run.returncode == 1
    (line,) = run.lines
    assert "predicts no token" in line


def test_leftovers_of_interrupted_writes_are_deleted(place, copied):
    for folder in (copied / ".tmp", copied / "checkpoints" / "9.tmp"):
        folder.mkdir()
        (folder / "large").write_bytes(bytes(1000))
    run = place.run(copied, **TRAINING)
    assert (run.returncode, run.lines) == (0, [])
    assert not (copied / ".tmp").exists()
    assert not (copied / "checkpoints" / "9.tmp").exists()


def test_checkpoints_is_a_file(place, tmp_path):
    (tmp_path / "checkpoints").write_text("")
    run = place.run(tmp_path, **TRAINING)
    assert run.returncode == 1
    (line,) = run.lines
    assert f"--output_dir {tmp_path}: checkpoints is a file" in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pad_token_id": None}, ["pad_token_id", "null"]),
        ({"num_attention_heads": 3}, ["hidden_size 16", "num_attention_heads 3"]),
        ({"hidden_act": "nosuch"}, ["config", "unknown name 'nosuch'"]),
        ({"max_position_embeddings": 1}, ["max_position_embeddings"]),
        (
            {"position_embedding_type": "relative_key"},
            ["position_embedding_type is relative_key", "absolute built in"],
        ),
    ],
    ids=lambda value: next(iter(value)),
)
def test_configs_that_no_model_can_have(place, tmp_path, changes, words):
    model = tmp_path / "model"
    place.script.write_model(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    flags = {**TRAINING, "config_name": model, "max_seq_length": None}
    run = place.run(tmp_path / "out", **flags)
    assert run.returncode == 1
    (line,) = run.lines
    assert all(word in line for word in words), line


def test_a_slow_tokenizer_without_its_files(place, tmp_path):
    model = shutil.copytree(place.model, tmp_path / "model")
    (model / "tokenizer.json").unlink()
    run = place.run(tmp_path / "out", **TRAINING, tokenizer_name=model)
    assert run.returncode == 1
    (line,) = run.lines
    assert f"{model}: cannot load its tokenizer, or files of it are missing" in line


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.csv"])
def test_an_empty_file(place, tmp_path, name):
    (tmp_path / name).write_text("")
    run = place.run(tmp_path / "out", **TRAINING, train_file=tmp_path / name)
    assert run.returncode == 1
    (line,) = run.lines
    assert f"{name}: the file is empty" in line


def test_a_folder_of_several_formats(place, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(place.train_file, folder / "a.txt")
    (folder / "b.jsonl").write_text('{"text": "w1 w2"}\n')
    flags = {"train_file": None, "validation_file": None, "dataset_name": folder}
    run = place.run(tmp_path / "out", **TRAINING, **flags)
    assert run.returncode == 1
    (line,) = run.lines
    assert "several formats, json, text" in line
    (folder / "b.jsonl").unlink()
    # These are no data.
    (folder / ".cache").mkdir()
    (folder / ".cache" / "c.jsonl").write_text("{}\n")
    (folder / "dataset_infos.json").write_text("{}")
    assert place.run(tmp_path / "out", **TRAINING, **flags).returncode == 0


@pytest.mark.parametrize("flag", ["learning_rate", "num_train_epochs", "adam_epsilon"])
@pytest.mark.parametrize("value", ["nan", "inf", "1e-320"])
def test_numbers_that_are_not_finite(place, tmp_path, flag, value):
    if value == "1e-320" and flag != "adam_epsilon":
        pytest.skip("it is a small number like any other")
    run = place.run(tmp_path / "out", **{flag: value})
    assert run.returncode == 2
    (line,) = run.lines
    assert f"--{flag}" in line
    assert "finite" in line


# ---------------------------------------------------------------------------------------
# Flipped bits
# ---------------------------------------------------------------------------------------


def test_a_flipped_bit_is_detected_or_without_effect(finished):
    """200 random bits of all files of a checkpoint, one at a time."""
    from run_mlm_flax import read_run

    checkpoint = finished / "checkpoints" / "12"
    expected = read_run(checkpoint)
    rng = random.Random(0)
    files = sorted(path for path in checkpoint.iterdir())
    num_detected = 0
    for number in range(200):
        path = files[number % len(files)]
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            found = read_run(checkpoint)
        except (ValueError, KeyError, OSError):
            num_detected += 1
        else:
            assert found == expected
        finally:
            path.write_bytes(content)
    assert num_detected > 150
    assert load_file(checkpoint / "state.safetensors")


@pytest.mark.parametrize("name", ["flax_model.msgpack", "model.safetensors"])
def test_a_flipped_bit_in_an_exported_model_is_detected(place, copied, name):
    check = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=copied, check=True
    )
    assert check.returncode == 0
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    flags = {"do_eval": True, "model_name_or_path": copied, "config_name": None}
    run = place.run(copied / "evaluation", **flags)
    assert run.returncode == 1
    (line,) = run.lines
    assert f"{copied / name}: it does not match its checksum" in line

    # A file that the user has replaced.
    (copied / "SHA256SUMS").unlink()
    assert place.run(copied / "evaluation", **flags).returncode == 0


def test_a_run_with_a_flipped_bit_resumes_from_the_checkpoint_before(place, finished, copied):
    expected = outcome(finished)
    path = copied / "checkpoints" / "12" / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    run = place.run(copied, **TRAINING)
    assert run.returncode == 0
    (line,) = run.lines
    assert "checkpoints/12 cannot be read and is skipped" in line
    assert "steps 9 to 12" in run.stderr
    assert differing(outcome(copied), expected) == []
