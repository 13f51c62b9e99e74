"""After a kill, a signal, damage or a full disk, every training script resumes to the same weights.

All tests run for the template, whose programs are optimized as they are for users. For the other
scripts one is enough: their code for faults is word for word the same, and a run that is killed,
stopped and resumed shows that they call it in the same way.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from outputs import bits, check_whole, differing, logged_steps, losses, outcome, state_of
from training_scripts import (
    SCRIPTS,
    STREAM,
    T5,
    TEMPLATE,
    Place,
    checkpoints,
    child_environment,
    full_but,
    other_scripts,
    snapshot,
    template_alone,
    wait_for,
    without_alarms,
)

STEPS = 30
KEPT = 5
SAVE_STEPS = 3
TRAINING = {
    "max_steps": STEPS,
    "save_steps": SAVE_STEPS,
    "save_total_limit": KEPT,
    "logging_steps": 1,
    "eval_steps": 20,
}
# The states of the causal and the denoising script have the form of the template's.
each_kind_of_state = pytest.mark.parametrize(
    "script", full_but(SCRIPTS, TEMPLATE, T5, STREAM), ids=str, indirect=True
)


# ---------------------------------------------------------------------------------------
# Readers
# ---------------------------------------------------------------------------------------


def rewind(output_dir: Path, step: int):
    """Restore an output directory to its state after `step` steps of the run."""
    for later in checkpoints(output_dir):
        if later > step:
            shutil.rmtree(output_dir / "checkpoints" / str(later))
    for name in ("train", "eval", "all"):
        (output_dir / f"{name}_results.json").unlink()


# ---------------------------------------------------------------------------------------
# Fixtures
# ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(script, tmp_path_factory) -> Place:
    return Place(script, tmp_path_factory.mktemp("faults"), optimized=script is TEMPLATE)


@pytest.fixture(scope="module")
def undisturbed(place) -> Path:
    """The output directory of a run that nothing interrupted."""
    run = place.run("undisturbed", **TRAINING, compiles="compiles")
    assert (run.returncode, run.lines) == (0, [])
    return place.directory / "undisturbed"


@pytest.fixture(scope="module")
def expected(undisturbed) -> dict:
    """The results of a run that nothing interrupted."""
    saved = list(range(SAVE_STEPS, STEPS + 1, SAVE_STEPS))
    assert checkpoints(undisturbed) == saved[-KEPT:]
    check_whole(undisturbed)
    return outcome(undisturbed)


@pytest.fixture
def output_dir(place, request):
    """A folder for a test's run. It does not exist yet and is deleted after the test."""
    path = place.directory / request.node.name.replace("/", "_").replace("[", "-").rstrip("]")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def copied(undisturbed, output_dir) -> Path:
    """A copy of the output directory of a run that nothing interrupted."""
    shutil.copytree(undisturbed, output_dir)
    return output_dir


@each_kind_of_state
def test_both_exports_have_the_weights_of_the_last_checkpoint(undisturbed, expected, tmp_path):
    """The class that config.json names reads each file of weights without the other."""
    import transformers
    from flax.traverse_util import flatten_dict

    from run_t5_mlm_flax import restore_clip_argument

    restore_clip_argument()
    (architecture,) = json.loads((undisturbed / "config.json").read_text())["architectures"]
    trained = {name: value for name, value in expected.items() if name.startswith("params/")}
    for name in ("flax_model.msgpack", "model.safetensors"):
        (tmp_path / name).mkdir()
        for file in (name, "config.json"):
            shutil.copy(undisturbed / file, tmp_path / name)
        model = getattr(transformers, f"Flax{architecture}").from_pretrained(tmp_path / name)
        params = flatten_dict(model.params)
        assert model.required_params == set(params)
        # The keys are those of `state_of`.
        found = {}
        for path, value in params.items():
            name = "/".join(("params", *path))
            found[name] = np.asarray(value)
        assert differing(bits(found), trained) == []


# ---------------------------------------------------------------------------------------
# Kills
# ---------------------------------------------------------------------------------------

LOG = r"^open .*/events\.out\.tfevents"
# TensorBoard opens its file for the header, and for each of the four values of a logged step. The
# sixth time is for the second step that is logged.
SECOND_LOG = [LOG] * 6
CHECKPOINT_IS_SAVED = r"^rename .*/checkpoints/\d+$"
# The moments at which a run kills itself, as in `kill_at` of `ForkServer.start`.
KILLS = {
    "before the folder of checkpoints": [r"^mkdir .*/checkpoints$"],
    "before the first log": [LOG],
    "in the first checkpoint": [r"^open .*/checkpoints/3\b[^/]*/run\.json$"],
    "before a checkpoint gets its name": [CHECKPOINT_IS_SAVED],
    "between checkpoint and export": [CHECKPOINT_IS_SAVED, r"^rename .*/flax_model\.msgpack$"],
    "in the export": [CHECKPOINT_IS_SAVED, r"^rename .*/model\.safetensors$"],
    "while the oldest checkpoint is removed": [
        CHECKPOINT_IS_SAVED,
        r"^remove (.*/)?state\.safetensors$",
    ],
}


# A program that runs a script, and sends itself a signal when the script imports a module.
SIGNAL_AT_IMPORT = """
import os, runpy, sys
number, wanted, script = int(sys.argv[1]), sys.argv[2], sys.argv[3]
sys.argv = sys.argv[3:]
sys.path.insert(0, os.path.dirname(script))

def send_signal(event, arguments):
    global wanted
    if event == "import" and arguments[0] == wanted:
        wanted = None
        os.kill(os.getpid(), number)

sys.addaudithook(send_signal)
runpy.run_path(script, run_name="__main__")
"""


def run_with_signal_at_import(place: Place, output_dir: Path, module: str, number: int):
    """Run the script in a new process, which gets a signal when it begins to import a module.

    A forked child has imported everything. Returns the completed process.
    """
    flags = place.flags(output_dir, **TRAINING)
    words = [str(int(number)), module, str(place.script.path), *flags]
    command = [sys.executable, "-c", SIGNAL_AT_IMPORT, *words]
    return subprocess.run(
        command, env=child_environment(), capture_output=True, text=True, timeout=600, check=False
    )


@template_alone
def test_killed_while_importing(place, output_dir):
    process = run_with_signal_at_import(place, output_dir, "jaxlib", signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not output_dir.exists()


def stop_at_ninth_batch(script):
    """Let the ninth batch of a run wait for an hour, so that the run does not reach its end."""
    import time

    train_batches = script.train_batches

    def few_train_batches(*args):
        for number, batch in enumerate(train_batches(*args), start=1):
            if number == 9:
                time.sleep(3600)
            yield batch

    script.train_batches = few_train_batches


def kill_after(place: Place, output_dir: Path, seconds: float, wait_for_save: bool):
    """Kill a run `seconds` after its start, or after the first checkpoint that it saves."""
    before = checkpoints(output_dir)

    def has_saved():
        return checkpoints(output_dir)[-1:] > before[-1:]

    run = place.start(output_dir, **TRAINING, change=stop_at_ninth_batch)
    if wait_for_save:
        wait_for(has_saved, run)
    time.sleep(seconds)
    run.kill()
    assert run.returncode == 137, run.stderr
    check_whole(output_dir)


def kill_itself_at(place: Place, output_dir: Path, moment: str):
    """Run until the moment at which the run kills itself. It loses no checkpoint."""
    before = checkpoints(output_dir)
    run = place.run(output_dir, **TRAINING, kill_at=KILLS[moment])
    assert (moment, run.returncode, run.lines) == (moment, 137, [])
    check_whole(output_dir)
    assert checkpoints(output_dir)[-1:] >= before[-1:]


def check_resumed(place: Place, output_dir: Path, undisturbed: Path, expected: dict):
    """Run to the end. The result is that of an undisturbed run, and nothing temporary is left."""
    run = place.run(output_dir, **TRAINING)
    assert (run.returncode, run.lines) == (0, [])
    check_whole(output_dir)
    assert differing(outcome(output_dir), expected) == []
    assert checkpoints(output_dir) == checkpoints(undisturbed)
    names = os.listdir(output_dir / "checkpoints")
    assert sorted(names) == sorted(map(str, checkpoints(output_dir)))
    found, wanted = (
        {path.name for path in folder.iterdir() if "tfevents" not in path.name}
        for folder in (output_dir, undisturbed)
    )
    assert found == wanted


@template_alone
def test_killed_while_it_saves(place, undisturbed, expected, output_dir):
    for moment in ("in the first checkpoint", "before a checkpoint gets its name", "in the export"):
        kill_itself_at(place, output_dir, moment)
    check_resumed(place, output_dir, undisturbed, expected)


@template_alone
@pytest.mark.full
def test_killed_again_and_again(place, undisturbed, expected, output_dir):
    rng = random.Random(0)
    # While data is read, weights are initialized or programs are compiled.
    for _ in range(2):
        kill_after(place, output_dir, rng.uniform(0, 1), wait_for_save=False)
    for moment in KILLS:
        kill_itself_at(place, output_dir, moment)
        # At a moment after the first save.
        if moment in ("in the first checkpoint", "between checkpoint and export"):
            kill_after(place, output_dir, rng.uniform(0, 0.15), wait_for_save=True)
    check_resumed(place, output_dir, undisturbed, expected)


@other_scripts
@each_kind_of_state
def test_killed_and_stopped(place, undisturbed, expected, output_dir):
    kill_itself_at(place, output_dir, "between checkpoint and export")
    killed = checkpoints(output_dir)
    stop = {"kill_at": SECOND_LOG, "kill_with": signal.SIGTERM}
    run = place.run(output_dir, **TRAINING, **stop)
    assert (run.returncode, run.lines) == (143, [])
    assert killed[-1:] < checkpoints(output_dir)[-1:] < [STEPS]
    assert checkpoints(output_dir)[-1] == logged_steps(output_dir)[-1]
    check_resumed(place, output_dir, undisturbed, expected)


@template_alone
@pytest.mark.parametrize(
    "result",
    full_but(
        ["flax_model.msgpack", "train_results.json", "eval_results.json"],
        "flax_model.msgpack",
        "eval_results.json",
    ),
)
def test_killed_after_the_last_checkpoint(place, expected, copied, result):
    """All steps are trained then, but the results of the last one are not written yet."""
    rewind(copied, STEPS - SAVE_STEPS)
    kill_at = [rf"^rename .*/checkpoints/{STEPS}$", rf"^rename .*/{result}$"]
    run = place.run(copied, **TRAINING, kill_at=kill_at)
    assert (run.returncode, checkpoints(copied)[-1]) == (137, STEPS)
    # The weights are those of an earlier export.
    if result != "flax_model.msgpack":
        assert not (copied / result).exists()
    check_whole(copied)
    run = place.run(copied, **TRAINING)
    assert (run.returncode, run.lines) == (0, [])
    check_whole(copied)
    assert differing(outcome(copied), expected) == []
    # The last log line is that of the killed run.
    train_results = json.loads((copied / "train_results.json").read_text())
    assert train_results["train_loss"] == pytest.approx(losses(copied)[STEPS], rel=1e-6)


@template_alone
@pytest.mark.full
def test_the_comparison_can_fail(place, expected, output_dir):
    place.run(output_dir, **TRAINING, seed=43)
    differences = differing(outcome(output_dir), expected)
    assert {"flax_model.msgpack", "model.safetensors", "eval_results.json"} <= set(differences)


# ---------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------


class Stop(NamedTuple):
    """A signal, and the file operations after which it comes, as in `ForkServer.start`."""

    moment: str
    number: int
    kill_at: list[str]
    has_trained: bool


STOPS = (
    Stop("data", signal.SIGTERM, [r"^(open|mkdir) .*/datasets"], has_trained=False),
    Stop("data", signal.SIGINT, [r"^(open|mkdir) .*/datasets"], has_trained=False),
    Stop("before the first step", signal.SIGTERM, [r"^mkdir .*/checkpoints$"], has_trained=False),
    Stop("training", signal.SIGINT, SECOND_LOG, has_trained=True),
    Stop("training", signal.SIGTERM, SECOND_LOG, has_trained=True),
    Stop("saving", signal.SIGINT, [r"^(open|rename) .*/checkpoints/\d.*tmp"], has_trained=True),
)


@template_alone
def test_stopped_by_sigterm_and_ctrl_c(place, expected, output_dir):
    save_steps = 9
    flags = {**TRAINING, "save_steps": save_steps}
    for stop in STOPS:
        before = checkpoints(output_dir)
        run = place.run(output_dir, **flags, kill_at=stop.kill_at, kill_with=stop.number)
        assert (stop.moment, run.returncode, run.lines) == (stop.moment, 128 + stop.number, [])
        check_whole(output_dir)
        after = checkpoints(output_dir)
        if stop.has_trained:
            assert before[-1:] < after[-1:] < [STEPS]
        if stop.has_trained and stop.moment != "saving":
            # The run stops at once, not at the next regular save.
            assert after[-1] % save_steps != 0
        if after:
            assert after[-1] == logged_steps(output_dir)[-1]
            assert not (output_dir / "eval_results.json").exists()

    # Between training and the last evaluation.
    kill_at = [r"^rename .*/train_results\.json$"]
    run = place.run(output_dir, **flags, kill_at=kill_at, kill_with=signal.SIGTERM)
    assert (run.returncode, run.lines) == (143, [])
    assert checkpoints(output_dir)[-1] == STEPS

    run = place.run(output_dir, **flags)
    assert (run.returncode, run.lines) == (0, [])
    assert differing(outcome(output_dir), expected) == []
    assert sorted(set(logged_steps(output_dir))) == list(range(1, STEPS + 1))


@template_alone
def test_stopped_while_importing(place, output_dir):
    """Neither SIGTERM nor Ctrl-C shows a traceback."""
    for module, number in (
        ("numpy", signal.SIGTERM),
        ("jaxlib", signal.SIGTERM),
        ("numpy", signal.SIGINT),
    ):
        process = run_with_signal_at_import(place, output_dir, module, number)
        # A shell shows the latter as 128 + the number.
        assert process.returncode in (128 + number, -number)
        assert process.stderr == ""
        assert not output_dir.exists()


# ---------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------


def damage(folder: Path, how: str):
    """Damage a checkpoint: "truncated", "emptied", or the path of a file to delete."""
    if how == "truncated":
        # The second half of a single file may contain nothing that is needed, so truncate all.
        for path in folder.rglob("*"):
            if path.is_file() and path.stat().st_size > 4000:
                os.truncate(path, path.stat().st_size // 2)
    elif how == "emptied":
        shutil.rmtree(folder)
        folder.mkdir()
    else:
        (folder / how).unlink()


DAMAGES = ("emptied", "state.safetensors", "run.json", "truncated")


@template_alone
def test_damaged_checkpoints_are_skipped(place, expected, copied):
    """Four of five checkpoints are damaged, each in another way. Later saves replace them."""
    good, *damaged = checkpoints(copied)
    for step, how in zip(damaged, DAMAGES, strict=True):
        damage(copied / "checkpoints" / str(step), how)
    run = place.run(copied, **TRAINING)
    assert run.returncode == 0, run.stderr
    assert len(run.lines) == len(damaged), run.lines
    for step, line in zip(damaged, reversed(run.lines), strict=True):
        assert "WARNING" in line
        assert f"checkpoints/{step} " in line
    assert logged_steps(copied)[STEPS:] == list(range(good + 1, STEPS + 1))
    assert differing(outcome(copied), expected) == []
    assert checkpoints(copied) == [good, *damaged]
    for step in damaged:
        state_of(copied / "checkpoints" / str(step))


@template_alone
@pytest.mark.parametrize("how", full_but(["truncated", "emptied"], "truncated"))
def test_a_damaged_newest_checkpoint(place, expected, copied, how):
    """In a process of its own, which might print more when it ends than a forked child does."""
    damage(copied / "checkpoints" / str(STEPS), how)
    command = [sys.executable, str(place.script.path), *place.flags(copied, **TRAINING)]
    env = child_environment(JAX_DISABLE_MOST_OPTIMIZATIONS="0")
    process = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert process.returncode == 0, process.stderr
    lines = without_alarms(process.stderr).splitlines()
    (warning,) = [line for line in lines if " INFO " not in line]
    assert f"checkpoints/{STEPS} " in warning
    assert "Traceback" not in process.stderr
    assert differing(outcome(copied), expected) == []


@template_alone
def test_only_damaged_checkpoints(place, copied):
    for step in checkpoints(copied):
        damage(copied / "checkpoints" / str(step), "truncated")
    before = snapshot(copied)
    run = place.run(copied, **TRAINING)
    assert run.returncode == 1
    *warnings, error = run.lines
    assert len(warnings) == KEPT
    assert all("WARNING" in line for line in warnings)
    assert "checkpoints" in error
    assert "choose another --output_dir" in error
    assert "--overwrite_output_dir" not in error
    assert snapshot(copied) == before


# ---------------------------------------------------------------------------------------
# Resume
# ---------------------------------------------------------------------------------------


@template_alone
def test_a_finished_command_trains_no_step(place, expected, copied):
    names = ("train_results.json", "all_results.json")
    before = {name: (copied / name).read_bytes() for name in names}
    run = place.run(copied, **TRAINING)
    assert (run.returncode, run.lines) == (0, [])
    assert logged_steps(copied) == list(range(1, STEPS + 1))
    assert differing(outcome(copied), expected) == []
    assert {name: (copied / name).read_bytes() for name in names} == before


@template_alone
@pytest.mark.parametrize("source", ["", "output_dir", "checkpoints/STEP", "another"])
def test_resume_from_checkpoint(place, undisturbed, expected, copied, source):
    first = checkpoints(copied)[0]
    # The value of the flag, and the step that the run resumes from.
    flag, start = {
        "": (True, STEPS),
        "output_dir": (copied, STEPS),
        "checkpoints/STEP": (copied / "checkpoints" / str(first), first),
        "another": (undisturbed / "checkpoints" / str(first), first),
    }[source]
    if source == "another":
        shutil.rmtree(copied)
    run = place.run(copied, **TRAINING, resume_from_checkpoint=flag)
    assert (run.returncode, run.lines) == (0, [])
    # The log begins with the steps of the copied run, if there is one.
    num_copied = 0 if source == "another" else STEPS
    assert logged_steps(copied)[num_copied:] == list(range(start + 1, STEPS + 1))
    assert differing(outcome(copied), expected) == []


@template_alone
def test_a_killed_run_resumes_from_its_own_checkpoints(place, undisturbed, expected, output_dir):
    """It started from a checkpoint of another run, and its command still names that one.

    Its own checkpoints take precedence unless it overwrites them or names one of them.
    """
    first = checkpoints(undisturbed)[0]
    second = first + SAVE_STEPS
    third = second + SAVE_STEPS
    flags = {**TRAINING, "resume_from_checkpoint": undisturbed / "checkpoints" / str(first)}
    run = place.run(output_dir, **flags, kill_at=[rf"^rename .*/checkpoints/{third}$"])
    assert (run.returncode, checkpoints(output_dir)) == (137, [second])
    own = output_dir / "checkpoints" / str(second)
    before = snapshot(own)
    # The step that the run resumes from, and the changes of its command.
    cases = (
        # The other run has later checkpoints.
        (second, {"resume_from_checkpoint": undisturbed}),
        (STEPS, {}),
        (second, {"resume_from_checkpoint": own}),
        (first, {"overwrite_output_dir": True}),
    )
    for start, changes in cases:
        run = place.run(output_dir, **{**flags, **changes})
        assert (run.returncode, run.lines) == (0, [])
        assert f"steps {start} to {STEPS}" in run.stderr
        if "overwrite_output_dir" not in changes:
            assert snapshot(own) == before
        assert checkpoints(output_dir) == list(range(second, STEPS + 1, SAVE_STEPS))
        assert differing(outcome(output_dir), expected) == []


@template_alone
def test_overwrite_output_dir_by_a_run_that_resumes_from_another(place, undisturbed, copied):
    """None of the checkpoints in the output directory stays, the earlier ones neither."""
    assert len(checkpoints(copied)) > 1
    flags = {"overwrite_output_dir": True, "resume_from_checkpoint": undisturbed}
    run = place.run(copied, **{**TRAINING, **flags})
    assert (run.returncode, run.lines) == (0, [])
    assert f"steps {STEPS} to {STEPS}" in run.stderr
    assert checkpoints(copied) == [STEPS]


@template_alone
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"resume_from_checkpoint": "nowhere"}, "nowhere"),
        # A folder without checkpoints.
        ({"resume_from_checkpoint": "start"}, "start"),
        (
            {"resume_from_checkpoint": f"undisturbed/checkpoints/{STEPS + 1}"},
            f"checkpoints/{STEPS + 1}",
        ),
        ({"adafactor": True}, "optimizer"),
        ({"per_device_train_batch_size": 2}, "batch"),
        ({"gradient_accumulation_steps": 2}, "batch"),
        ({"config_name": "wider"}, "hidden_size"),
    ],
    ids=lambda value: next(iter(value.items())) if isinstance(value, dict) else "",
)
def test_a_checkpoint_that_does_not_fit(place, copied, changes, named):
    place.script.write_model(place.directory / "wider", hidden_size=32)
    before = snapshot(copied)
    run = place.run(copied, **{**TRAINING, **changes})
    assert run.returncode == 1
    (line,) = run.lines
    assert named in line
    assert snapshot(copied) == before


@template_alone
def test_overwrite_output_dir(place, copied):
    """The checkpoints are deleted. The user's files, configuration and tokenizer included, stay."""
    (copied / "notes.txt").write_text("mine")
    # As a killed run leaves it.
    (copied / "checkpoints" / "99.tmp").mkdir()
    # save_steps is larger than the number of steps.
    two_steps = {**TRAINING, "max_steps": 2, "do_train": True}
    flags = {"config_name": copied, "tokenizer_name": copied, "overwrite_output_dir": True}
    run = place.run(copied, **two_steps, **flags)
    assert (run.returncode, run.lines) == (0, [])
    assert os.listdir(copied / "checkpoints") == ["2"]
    assert (copied / "notes.txt").read_text() == "mine"
    assert logged_steps(copied)[-2:] == [1, 2]
    run = place.run("fresh", **two_steps)
    assert run.returncode == 0
    fresh = place.directory / "fresh"
    fresh_state = state_of(fresh / "checkpoints" / "2")
    assert bits(state_of(copied / "checkpoints" / "2")) == bits(fresh_state)
    weights = (copied / "model.safetensors").read_bytes()
    assert weights == (fresh / "model.safetensors").read_bytes()


# ---------------------------------------------------------------------------------------
# Loss, disk, time
# ---------------------------------------------------------------------------------------


@template_alone
def test_a_loss_that_is_not_finite(place, output_dir):
    for logging_steps in (1, 7):
        flags = {
            **TRAINING,
            "logging_steps": logging_steps,
            "save_steps": 1,
            "overwrite_output_dir": True,
        }
        run = place.run(output_dir, **flags, learning_rate=1e30)
        assert run.returncode == 1
        (line,) = run.lines
        assert "not finite" in line
        assert checkpoints(output_dir)
        for step in checkpoints(output_dir):
            for name, value in state_of(output_dir / "checkpoints" / str(step)).items():
                if "params" in name:
                    assert np.isfinite(value).all(), (step, name)
        check_whole(output_dir)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB. Only root can mount one, and not in every container."""
    directory = tmp_path / "disk"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(directory)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def check_failed_save(run, output_dir: Path, first: int):
    """Check that a run failed with one line and left the files as they were."""
    assert run.returncode == 1, run.stderr
    assert len(run.lines) == 1, run.stderr
    (line,) = run.lines
    assert str(output_dir) in line
    check_whole(output_dir)
    assert checkpoints(output_dir)[0] == first


@template_alone
@pytest.mark.parametrize("free", full_but([0, 4096, 8192, 100_000], 4096, 100_000))
def test_full_disk(place, undisturbed, expected, small_disk, free):
    """`free` is the number of bytes that are free when the run starts."""
    output_dir = small_disk / "output"
    shutil.copytree(undisturbed, output_dir)
    first = checkpoints(output_dir)[0]
    rewind(output_dir, first)
    usage = os.statvfs(small_disk)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(usage.f_bavail * usage.f_frsize - free))
    check_failed_save(place.run(output_dir, **TRAINING), output_dir, first)
    filler.unlink()
    assert place.run(output_dir, **TRAINING).returncode == 0
    assert differing(outcome(output_dir), expected) == []


@template_alone
def test_file_size_limit(place, output_dir):
    """As on a full disk, for machines where none can be mounted.

    The text is small, so that its preprocessed copies fit.
    """
    flags = {**TRAINING, "train_file": place.validation_file}
    assert place.run(output_dir, **flags).returncode == 0
    complete = outcome(output_dir)
    first = checkpoints(output_dir)[0]
    rewind(output_dir, first)
    check_failed_save(place.run(output_dir, **flags, file_limit=10_000), output_dir, first)
    assert place.run(output_dir, **flags).returncode == 0
    assert differing(outcome(output_dir), complete) == []


def without_optimizers(script):
    """Make a run fail if it uses an optimizer."""
    import optax

    del optax.adamw, optax.adafactor


@each_kind_of_state
def test_evaluation_alone_has_no_optimizer(place, undisturbed, expected):
    """The state of an optimizer takes the memory of two more models."""
    changes = {"do_eval": True, "model_name_or_path": undisturbed, "config_name": None}
    run = place.run("evaluated", **changes, change=without_optimizers)
    assert (run.returncode, run.lines) == (0, [])
    results = (place.directory / "evaluated" / "eval_results.json").read_bytes()
    assert results == expected["eval_results.json"]


@each_kind_of_state
def test_steps_compile_once(place, undisturbed):
    compiled = (place.directory / "compiles").read_text().split("\n")
    # Since jax 0.8 each function under pmap is called _fun.
    steps = [name for name in compiled if re.search("_fun|train_step|eval_step", name)]
    assert len(steps) == 2, compiled
    # Nothing compiles within the loop, which has 30 steps.
    assert len(compiled) < 20, compiled
