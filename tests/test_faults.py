"""Killed, stopped, damaged, out of disk: every training script goes on from there, to the very same weights.

All of it for the template, whose programs are optimized as users' are; for the others a part, which would show if they
used differently what they have word for word in common with it.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from training_scripts import (
    TEMPLATE,
    Place,
    checkpoints,
    child_environment,
    snapshot,
    template_alone,
)

STEPS, KEPT = 30, 5
TRAINING = {
    "max_steps": STEPS,
    "save_steps": 3,
    "save_total_limit": KEPT,
    "logging_steps": 1,
    "eval_steps": 20,
}
EXPORTED = ("config.json", "flax_model.msgpack", "model.safetensors", "tokenizer.json")


# -------------------------------------------------------------------------------------------------------- readers


def state_of(checkpoint: Path) -> dict[str, np.ndarray]:
    """All leaves by name, read by Orbax alone."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        leaves = jax.tree_util.tree_leaves_with_path(reader.restore(checkpoint.resolve() / "state"))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def bits(state: dict[str, np.ndarray]) -> dict:
    return {name: (value.shape, str(value.dtype), value.tobytes()) for name, value in state.items()}


def outcome(output_dir: Path) -> dict:
    """All that must not depend on the history of a run."""
    result = {name: (output_dir / name).read_bytes() for name in (*EXPORTED, "eval_results.json")}
    result["checkpoint"] = checkpoints(output_dir)[-1]
    return {**result, **bits(state_of(output_dir / "checkpoints" / str(result["checkpoint"])))}


def differing(a: dict, b: dict) -> list[str]:
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def logged_steps(output_dir: Path) -> list[int]:
    """The steps with a train_loss in TensorBoard, in the order of writing."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = []
    for path in sorted(
        output_dir.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns
    ):
        events = EventAccumulator(str(path), size_guidance={"tensors": 0}).Reload()
        if "train_loss" in events.Tags()["tensors"]:
            steps += [event.step for event in events.Tensors("train_loss")]
    return steps


def rewind(output_dir: Path, step: int):
    """As it was when the run had made `step` steps."""
    for later in checkpoints(output_dir):
        if later > step:
            shutil.rmtree(output_dir / "checkpoints" / str(later))
    for name in ("train", "eval", "all"):
        (output_dir / f"{name}_results.json").unlink()


def check_whole(output_dir: Path):
    """Every file that a reader would take for a result is one."""
    from flax import serialization
    from safetensors.numpy import load_file

    if not output_dir.exists():
        return
    for path in output_dir.iterdir():
        if (
            path.name.startswith(".tmp")
            or path.suffix == ".tmp"
            or path.name.startswith("events.out.tfevents.")
        ):
            continue
        if path.suffix == ".json":
            assert json.loads(path.read_text()), path
        elif path.suffix == ".safetensors":
            assert all(np.isfinite(value).all() for value in load_file(path).values())
        elif path.suffix == ".msgpack":
            assert serialization.msgpack_restore(path.read_bytes())
        else:
            assert path.name in (
                "checkpoints",
                "vocab.txt",
                "vocab.json",
                "merges.txt",
                "spiece.model",
            ), path
    for path in (output_dir / "checkpoints").glob("*"):
        assert path.name.isdigit() or "tmp" in path.name, path
    if steps := checkpoints(output_dir):
        state_of(output_dir / "checkpoints" / str(steps[-1]))


# ------------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="module")
def place(script, tmp_path_factory) -> Place:
    return Place(script, tmp_path_factory.mktemp("faults"), optimized=script is TEMPLATE)


@pytest.fixture(scope="module")
def undisturbed(place) -> Path:
    run = place.run("undisturbed", **TRAINING, compiles="compiles")
    assert (run.returncode, run.lines) == (0, [])
    return place.directory / "undisturbed"


@pytest.fixture(scope="module")
def expected(undisturbed) -> dict:
    assert checkpoints(undisturbed) == list(range(STEPS, 0, -3))[KEPT - 1 :: -1]
    check_whole(undisturbed)
    return outcome(undisturbed)


@pytest.fixture
def output_dir(place, request):
    """A fresh folder name for a test's run."""
    path = place.directory / request.node.name.replace("/", "_").replace("[", "-").rstrip("]")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def copied(undisturbed, output_dir) -> Path:
    shutil.copytree(undisturbed, output_dir)
    return output_dir


def test_both_exports_are_the_last_checkpoint(undisturbed, expected, tmp_path):
    """Read by the class that config.json names, from a folder with one file of weights and from one with the other."""
    import transformers
    from flax.traverse_util import flatten_dict

    from run_t5_mlm_flax import mend_clip

    mend_clip()
    (architecture,) = json.loads((undisturbed / "config.json").read_text())["architectures"]
    trained = {name: value for name, value in expected.items() if name.startswith("['params']")}
    for name in ("flax_model.msgpack", "model.safetensors"):
        (tmp_path / name).mkdir()
        for file in (name, "config.json"):
            shutil.copy(undisturbed / file, tmp_path / name)
        model = getattr(transformers, f"Flax{architecture}").from_pretrained(tmp_path / name)
        found = {path: np.asarray(value) for path, value in flatten_dict(model.params).items()}
        assert model.required_params == set(found)
        found = {
            "".join(f"[{key!r}]" for key in ("params", *path)): value
            for path, value in found.items()
        }
        assert differing(bits(found), trained) == []


# ----------------------------------------------------------------------------------------------------------- kills

# The file operations before which a run kills itself, each pattern after the one before.
KILLS = {
    "before the folder of checkpoints": [r"^mkdir .*/checkpoints$"],
    "before the first log": [r"^open .*/events\.out\.tfevents"],
    "in the first checkpoint": [r"^(open|rename) .*/checkpoints/3\b.*tmp"],
    "before a checkpoint gets its name": [r"^rename .*/checkpoints/\d+$"],
    "between checkpoint and export": [r"^rename .*/checkpoints/\d+$", r"^rename .*/flax_model\.msgpack$"],
    "in the export": [r"^rename .*/checkpoints/\d+$", r"^rename .*/model\.safetensors$"],
    "while the oldest checkpoint is removed": [r"^rename .*/checkpoints/\d+$", r"^rmdir (.*/)?state$"],
}  # fmt: skip


def wait_for(condition, run, seconds: float = 60):
    end = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None, run.stderr
        assert time.monotonic() < end
        time.sleep(0.001)


@template_alone
def test_killed_while_importing(place, output_dir):
    """The one moment that a forked child cannot show."""
    command = [sys.executable, str(place.script.path), *place.flags(output_dir, **TRAINING)]
    process = subprocess.Popen(command, env=child_environment(), stderr=subprocess.DEVNULL)
    time.sleep(random.Random(0).uniform(0.1, 1))
    process.kill()
    process.wait()
    check_whole(output_dir)


def test_killed_again_and_again(place, undisturbed, expected, output_dir):
    rng, in_full = random.Random(f"kills of {place.script}"), place.script is TEMPLATE
    for _ in range(2 if in_full else 1):  # data, initialization, compilation
        run = place.start(output_dir, **TRAINING)
        time.sleep(rng.uniform(0, 1))
        run.kill()
        assert run.returncode == 137, run.stderr
        check_whole(output_dir)

    for moment, kill_at in KILLS.items():
        if moment != "between checkpoint and export" and not in_full:
            continue
        before = checkpoints(output_dir)
        run = place.run(output_dir, **TRAINING, kill_at=kill_at)
        assert (moment, run.returncode, run.lines) == (moment, 137, [])
        check_whole(output_dir)
        assert checkpoints(output_dir)[-1:] >= before[-1:]

        if moment in (
            "in the first checkpoint",
            "between checkpoint and export",
        ):  # anywhere between two saves
            before = checkpoints(output_dir)
            run = place.start(output_dir, **TRAINING)
            wait_for(lambda before=before: checkpoints(output_dir)[-1:] > before[-1:], run)
            time.sleep(rng.uniform(0, 0.15))
            run.kill()
            assert run.returncode == 137, run.stderr
            check_whole(output_dir)

    run = place.run(output_dir, **TRAINING)
    assert (run.returncode, run.lines) == (0, [])
    check_whole(output_dir)
    assert differing(outcome(output_dir), expected) == []
    assert checkpoints(output_dir) == checkpoints(undisturbed)
    assert sorted(os.listdir(output_dir / "checkpoints")) == sorted(
        map(str, checkpoints(output_dir))
    )
    names = [
        {p.name for p in d.iterdir() if "tfevents" not in p.name} for d in (output_dir, undisturbed)
    ]
    assert names[0] == names[1]


@template_alone
@pytest.mark.parametrize(
    "result", ["flax_model.msgpack", "train_results.json", "eval_results.json"]
)
def test_killed_after_the_last_checkpoint(place, expected, copied, result):
    """No step is left to train then, but what belongs to the last one is still to be written."""
    rewind(copied, STEPS - 3)
    kill_at = [rf"^rename .*/checkpoints/{STEPS}$", rf"^rename .*/{result}$"]
    run = place.run(copied, **TRAINING, kill_at=kill_at)
    assert (run.returncode, checkpoints(copied)[-1]) == (137, STEPS)
    assert result == "flax_model.msgpack" or not (copied / result).exists()
    check_whole(copied)
    run = place.run(copied, **TRAINING)
    assert (run.returncode, run.lines) == (0, [])
    check_whole(copied)
    assert differing(outcome(copied), expected) == []


@template_alone
def test_the_comparison_can_fail(place, expected, output_dir):
    place.run(output_dir, **TRAINING, seed=43)
    assert {"flax_model.msgpack", "model.safetensors", "eval_results.json"} <= set(
        differing(outcome(output_dir), expected)
    )


# --------------------------------------------------------------------------------------------------------- signals

LOG = r"^open .*/events\.out\.tfevents"
STOPS = (  # moment, signal, the file operation at which it comes, whether training has begun
    ("data", signal.SIGTERM, [r"^(open|mkdir) .*/datasets"], False),
    ("data", signal.SIGINT, [r"^(open|mkdir) .*/datasets"], False),
    ("before the first step", signal.SIGTERM, [r"^mkdir .*/checkpoints$"], False),
    ("training", signal.SIGINT, [LOG] * 6, True),
    ("training", signal.SIGTERM, [LOG] * 6, True),
    ("saving", signal.SIGINT, [r"^(open|rename) .*/checkpoints/\d.*tmp"], True),
)


def test_stopped_by_sigterm_and_ctrl_c(place, expected, output_dir):
    flags = {**TRAINING, "save_steps": 9}
    stops = STOPS if place.script is TEMPLATE else STOPS[-2:]
    for moment, number, signal_at, training in stops:
        before = checkpoints(output_dir)
        run = place.run(output_dir, **flags, kill_at=signal_at, kill_with=number)
        assert (moment, run.returncode, run.lines) == (moment, 128 + number, [])
        check_whole(output_dir)
        after = checkpoints(output_dir)
        if training:
            assert before[-1:] < after[-1:] < [STEPS]
            assert moment == "saving" or after[-1] % 9  # it stopped at once, not at the next save
        if after:
            assert after[-1] == logged_steps(output_dir)[-1]  # the very step
            assert not (output_dir / "eval_results.json").exists()

    run = place.run(
        output_dir, **flags, kill_at=[r"^rename .*/train_results\.json$"], kill_with=signal.SIGTERM
    )
    assert ("last evaluation", run.returncode, run.lines) == ("last evaluation", 143, [])
    assert checkpoints(output_dir)[-1] == STEPS

    run = place.run(output_dir, **flags)
    assert (run.returncode, run.lines) == (0, [])
    assert differing(outcome(output_dir), expected) == []
    assert sorted(set(logged_steps(output_dir))) == list(range(1, STEPS + 1))


@template_alone
def test_stopped_while_importing(place, output_dir):
    """SIGTERM, that is: until the imports are done, Ctrl-C shows Python's own traceback."""
    command = [sys.executable, str(place.script.path), *place.flags(output_dir, **TRAINING)]
    for seconds in (0.3, 1):
        process = subprocess.Popen(
            command, env=child_environment(), stderr=subprocess.PIPE, text=True
        )
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        stderr = process.communicate(timeout=60)[1]
        assert process.returncode in (143, -signal.SIGTERM)  # the latter is 143 for a shell
        assert stderr == ""
        assert not output_dir.exists()


# ----------------------------------------------------------------------------------------------------------- damage


def damage(folder: Path, how: str):
    files = [path for path in folder.rglob("*") if path.is_file()]
    if how == "truncated":
        for path in files:  # the second half of one alone may hold nothing that is still needed
            if path.stat().st_size > 4000:
                os.truncate(path, path.stat().st_size // 2)
    elif how == "emptied":
        shutil.rmtree(folder)
        folder.mkdir()
    else:
        (folder / how).unlink()


DAMAGES = ("emptied", "state/manifest.ocdbt", "run/metadata", "truncated")


@template_alone
def test_damaged_checkpoints_are_skipped(place, expected, copied):
    """Four of five in four ways; the damaged folders are in the way of the saves that follow."""
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
@pytest.mark.parametrize("how", ["truncated", "emptied"])
def test_a_damaged_newest_checkpoint(place, expected, copied, how):
    """In a process of its own, whose end may have something to say, too."""
    damage(copied / "checkpoints" / str(STEPS), how)
    command = [sys.executable, str(place.script.path), *place.flags(copied, **TRAINING)]
    env = child_environment(JAX_DISABLE_MOST_OPTIMIZATIONS="0")
    process = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    noise = [line for line in process.stderr.splitlines() if " INFO " not in line]
    assert process.returncode == 0, process.stderr
    assert len(noise) == 1
    assert f"checkpoints/{STEPS} " in noise[0]
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
    assert "--overwrite_output_dir" in error
    assert snapshot(copied) == before


# ----------------------------------------------------------------------------------------------------------- resume


@template_alone
def test_a_finished_command_trains_no_step(place, expected, copied):
    before = {
        name: (copied / name).read_bytes() for name in ("train_results.json", "all_results.json")
    }
    run = place.run(copied, **TRAINING)
    assert (run.returncode, run.lines) == (0, [])
    assert logged_steps(copied) == list(range(1, STEPS + 1))
    assert differing(outcome(copied), expected) == []
    assert {name: (copied / name).read_bytes() for name in before} == before


@template_alone
@pytest.mark.parametrize("source", ["", "output_dir", "checkpoints/STEP", "another"])
def test_resume_from_checkpoint(place, undisturbed, expected, copied, source):
    first = checkpoints(copied)[0]
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
    before = 0 if source == "another" else STEPS  # the copy's own log
    assert logged_steps(copied)[before:] == list(range(start + 1, STEPS + 1))
    assert differing(outcome(copied), expected) == []


@template_alone
def test_another_run_s_checkpoint_given_again(place, undisturbed, expected, output_dir):
    """A command that was killed goes on from its own checkpoints, unless it is to overwrite them or names one."""
    first = checkpoints(undisturbed)[0]
    flags = {**TRAINING, "resume_from_checkpoint": undisturbed / "checkpoints" / str(first)}
    run = place.run(output_dir, **flags, kill_at=[rf"^rename .*/checkpoints/{first + 6}$"])
    assert (run.returncode, checkpoints(output_dir)) == (137, [first + 3])
    own = output_dir / "checkpoints" / str(first + 3)
    before = snapshot(own)
    for start, changes in (
        (first + 3, {"resume_from_checkpoint": undisturbed}),  # which has trained on
        (STEPS, {}),
        (first + 3, {"resume_from_checkpoint": own}),
        (first, {"overwrite_output_dir": True}),
    ):
        run = place.run(output_dir, **{**flags, **changes})
        assert (run.returncode, run.lines) == (0, [])
        assert f"steps {start} to {STEPS}" in run.stderr
        assert changes.get("overwrite_output_dir") or snapshot(own) == before
        assert checkpoints(output_dir) == list(range(first + 3, STEPS + 1, 3))
        assert differing(outcome(output_dir), expected) == []


@template_alone
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"resume_from_checkpoint": "nowhere"}, "nowhere"),
        ({"resume_from_checkpoint": "start"}, "start"),  # a folder without checkpoints
        (
            {"resume_from_checkpoint": f"undisturbed/checkpoints/{STEPS + 1}"},
            f"checkpoints/{STEPS + 1}",
        ),
        ({"adafactor": True}, "optimizer"),
        ({"per_device_train_batch_size": 2}, "batch"),
        ({"gradient_accumulation_steps": 2}, "batch"),
    ],
    ids=lambda value: next(iter(value.items())) if isinstance(value, dict) else "",
)
def test_a_checkpoint_that_does_not_fit(place, copied, changes, named):
    before = snapshot(copied)
    run = place.run(copied, **{**TRAINING, **changes})
    assert run.returncode == 1
    (line,) = run.lines
    assert named in line
    assert snapshot(copied) == before


def test_a_checkpoint_of_another_model(place, copied):
    place.script.write_model(place.directory / "wider", **{place.script.width: 32})
    test_a_checkpoint_that_does_not_fit(place, copied, {"config_name": "wider"}, place.script.width)


@template_alone
def test_overwrite_output_dir(place, copied):
    """Checkpoints are discarded; what the user put there, the configuration and tokenizer above all, stays."""
    (copied / "notes.txt").write_text("mine")
    (copied / "checkpoints" / "99.orbax-checkpoint-tmp").mkdir()  # of a killed run
    flags = {"config_name": copied, "tokenizer_name": copied, "do_train": True}
    run = place.run(copied, **{**TRAINING, **flags, "max_steps": 2, "overwrite_output_dir": True})
    assert (run.returncode, run.lines) == (0, [])
    assert os.listdir(copied / "checkpoints") == ["2"]
    assert (copied / "notes.txt").read_text() == "mine"
    assert logged_steps(copied)[-2:] == [1, 2]
    run = place.run(
        "fresh", **{**TRAINING, "max_steps": 2, "do_train": True}
    )  # save_steps is larger than the run
    assert run.returncode == 0
    fresh = state_of(place.directory / "fresh" / "checkpoints" / "2")
    assert bits(state_of(copied / "checkpoints" / "2")) == bits(fresh)
    weights = [
        (path / "model.safetensors").read_bytes() for path in (copied, place.directory / "fresh")
    ]
    assert weights[0] == weights[1]


# ------------------------------------------------------------------------------------------------- loss, disk, time


def test_a_loss_that_is_not_finite(place, output_dir):
    for logging_steps in (1, 7) if place.script is TEMPLATE else (1,):
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
                assert np.isfinite(value).all() or "params" not in name, (step, name)
        check_whole(output_dir)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own; only root may mount one, and not in every container."""
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
    assert run.returncode == 1, run.stderr
    assert len(run.lines) == 1, run.stderr
    (line,) = run.lines
    assert str(output_dir) in line
    check_whole(output_dir)
    assert checkpoints(output_dir)[0] == first


@template_alone
@pytest.mark.parametrize("free", [4096, 100_000])
def test_full_disk(place, undisturbed, expected, small_disk, free):
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
    """What a full disk looks like where none can be mounted. The text is small, so that its copies fit."""
    flags = {**TRAINING, "train_file": place.validation_file}
    assert place.run(output_dir, **flags).returncode == 0
    complete = outcome(output_dir)
    first = checkpoints(output_dir)[0]
    rewind(output_dir, first)
    check_failed_save(place.run(output_dir, **flags, file_limit=10_000), output_dir, first)
    assert place.run(output_dir, **flags).returncode == 0
    assert differing(outcome(output_dir), complete) == []


def without_optimizers(script):
    import optax

    del optax.adamw, optax.adafactor


def test_evaluation_alone_has_no_optimizer(place, undisturbed, expected):
    """Whose state is as large as two more models."""
    changes = {"do_eval": True, "model_name_or_path": undisturbed, "config_name": None}
    run = place.run("evaluated", **changes, change=without_optimizers)
    assert (run.returncode, run.lines) == (0, [])
    assert (place.directory / "evaluated" / "eval_results.json").read_bytes() == expected[
        "eval_results.json"
    ]


def test_steps_compile_once(place, undisturbed):
    compiled = (place.directory / "compiles").read_text().split("\n")
    steps = [
        name
        for name in compiled
        if any(part in name for part in ("_fun", "train_step", "eval_step"))
    ]
    assert len(steps) == 2, compiled  # since jax 0.8 each function under pmap is called _fun
    assert len(compiled) < 20, compiled  # nothing compiles in the loop: it has 30 steps
