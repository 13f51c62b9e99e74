"""Training is the same on one device, on eight, and on two processes with four devices each.

The code with which processes stop and resume together is word for word the same in all scripts, so
its tests run only for the template.
"""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from clusters import EIGHT_DEVICES, finish_cluster, start_cluster
from outputs import evaluation, losses
from safetensors.numpy import load_file
from training_scripts import (
    SCRIPTS,
    TEMPLATE,
    Place,
    checkpoints,
    full_but,
    template_alone,
    wait_for,
    write_text,
)

STEPS = 18
FEWER_STEPS = 12
SAVE_STEPS = 3
TRAINING = {
    "max_steps": STEPS,
    "save_steps": SAVE_STEPS,
    "save_total_limit": 20,
    "logging_steps": 1,
    "eval_steps": 12,
}
ONE_DEVICE = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 5}


def training(place: Place) -> dict:
    """Return the flags of a run. Only runs of the template are resumed; the others are shorter."""
    if place.script is TEMPLATE:
        return TRAINING
    fewer = {"max_steps": FEWER_STEPS, "save_steps": FEWER_STEPS, "eval_steps": FEWER_STEPS // 2}
    return {**TRAINING, **fewer}


def eight_devices(place: Place) -> dict:
    """Return the flags of a run on eight devices, one row each, that accumulates two batches."""
    return {**training(place), **EIGHT_DEVICES}


@pytest.fixture(scope="module")
def place(script, tmp_path_factory) -> Place:
    return Place(script, tmp_path_factory.mktemp("hosts"), dropout=False)


@pytest.fixture(scope="module")
def one_device(place) -> Path:
    """The output directory of a run on one device."""
    run = place.run("one_device", **training(place), **ONE_DEVICE, devices=1)
    assert (run.returncode, run.lines) == (0, [])
    assert len(losses(place.directory / "one_device")) == training(place)["max_steps"]
    return place.directory / "one_device"


@pytest.fixture(scope="module")
def two_processes(place) -> Path:
    """The output directory of a run on two processes."""
    return finish_cluster(place, "two_processes", **eight_devices(place))


def check_same(a: Path, b: Path):
    """Check that two runs have the same losses, up to rounding."""
    assert losses(a) == pytest.approx(losses(b), rel=0, abs=1e-4)
    assert evaluation(a) == pytest.approx(evaluation(b), rel=1e-4)


@pytest.mark.parametrize("script", full_but(SCRIPTS, TEMPLATE), ids=str, indirect=True)
def test_eight_devices_with_accumulation_train_as_one(place, one_device):
    run = place.run("eight_devices", **eight_devices(place), devices=8)
    assert (run.returncode, run.lines) == (0, [])
    check_same(place.directory / "eight_devices", one_device)


@pytest.mark.parametrize(
    "script",
    full_but((script for script in SCRIPTS if not script.is_stream), TEMPLATE),
    ids=str,
    indirect=True,
)
def test_two_processes_train_as_one(two_processes, one_device):
    check_same(two_processes, one_device)


@template_alone
@pytest.mark.full
def test_accumulation_trains_as_a_larger_batch(place, one_device):
    batches = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "per_device_eval_batch_size": 3,
    }
    run = place.run("accumulated", **TRAINING, **batches, devices=2)
    assert (run.returncode, run.lines) == (0, [])
    check_same(place.directory / "accumulated", one_device)


@template_alone
@pytest.mark.full
def test_the_comparison_can_fail(place, one_device):
    flags = {**TRAINING, **ONE_DEVICE, "max_steps": 3, "per_device_train_batch_size": 8}
    run = place.run("other", **flags, devices=1)
    assert run.returncode == 0
    expected = losses(one_device)
    found = losses(place.directory / "other")
    assert any(abs(loss - expected[step]) > 1e-3 for step, loss in found.items())


def wait_for_signal(script):
    """Let the seventh batch wait for a file that says that the signal is sent."""
    import pathlib
    import time

    train_batches = script.train_batches

    def slow_train_batches(*args):
        for number, batch in enumerate(train_batches(*args), start=1):
            while number == 7 and not pathlib.Path("sent").exists():
                time.sleep(0.01)
            yield batch

    script.train_batches = slow_train_batches


@template_alone
def test_stopped_and_killed_processes_resume(place, two_processes):
    """SIGTERM to one process, then SIGKILL during a save, then a run to the end."""
    output_dir = place.directory / "resumed"

    # SIGTERM to the second process alone stops both at the same step.
    runs = start_cluster(place, "resumed", **eight_devices(place), change=wait_for_signal)
    wait_for(lambda: checkpoints(output_dir), *runs)
    runs[1].send_signal(signal.SIGTERM)
    (place.directory / "sent").touch()
    for run in runs:
        run.wait()
        assert (run.returncode, run.lines) == (143, [])
    stopped = checkpoints(output_dir)[-1]
    killed = STEPS - SAVE_STEPS
    assert stopped == max(losses(output_dir)) < killed

    kill_at = [rf"^rename .*/checkpoints/{killed}$"]
    runs = start_cluster(place, "resumed", first={"kill_at": kill_at}, **eight_devices(place))
    runs[0].wait()
    runs[1].kill()
    assert runs[0].returncode == 137, runs[0].stderr
    assert stopped <= checkpoints(output_dir)[-1] < killed

    assert finish_cluster(place, "resumed", **eight_devices(place)) == output_dir
    assert sorted(losses(output_dir)) == list(range(1, STEPS + 1))
    for name in ("flax_model.msgpack", "model.safetensors", "eval_results.json"):
        assert (output_dir / name).read_bytes() == (two_processes / name).read_bytes()
    # Nothing temporary is left.
    names = os.listdir(output_dir / "checkpoints")
    assert sorted(names) == sorted(map(str, checkpoints(output_dir)))


@template_alone
def test_an_error_of_one_process_ends_both(place):
    """Only the first process sees that output_dir is a file. The second must not wait forever."""
    (place.directory / "a_file").write_text("mine")
    runs = start_cluster(place, "a_file", **eight_devices(place))
    for run in runs:
        run.wait()
        assert run.returncode != 0
    assert runs[0].returncode == 1
    assert len(runs[0].lines) == 1
    assert "--output_dir" in runs[0].stderr


@template_alone
def test_processes_with_different_text_end_both(place):
    """One host has an old copy of the text. The processes would train on different texts."""
    other = write_text(place.directory / "other.txt", 400, seed=9)
    runs = start_cluster(place, "different", first={"train_file": other}, **eight_devices(place))
    for run in runs:
        run.wait()
        assert run.returncode != 0
    assert runs[0].returncode == 1
    (line,) = runs[0].lines
    assert "--distributed: the checksum of the training text differs between processes" in line
    assert not (place.directory / "different").exists()


def slow_start(script):
    """Make tokenization take an hour. A file `starting-PROCESS` says that it has begun."""
    import os
    import pathlib
    import time

    tokenize = script.tokenize

    def slow_tokenize(*args):
        pathlib.Path(f"starting-{os.environ['JAX_PROCESS_ID']}").write_text("")
        time.sleep(3600)
        return tokenize(*args)

    script.tokenize = slow_tokenize


@template_alone
def test_sigterm_before_training(place):
    """SIGTERM before the first step ends both processes.

    Forming the cluster installs a handler of JAX, which only notes the signal for a training loop.
    No loop runs yet, so the script's own handler must end the process.
    """
    runs = start_cluster(place, "stopped_early", **eight_devices(place), change=slow_start)
    wait_for(lambda: len(list(place.directory.glob("starting-*"))) == 2, *runs)
    for run in runs:
        run.send_signal(signal.SIGTERM)
    for run in runs:
        run.wait()
        assert (run.returncode, run.lines) == (143, [])


def slow_end(script):
    """Make the first process write its results for 40 s, and JAX wait 20 s for the last process."""
    import functools
    import time

    import jax

    write_results = script.write_results
    initialize = jax.distributed.initialize

    def slow_write_results(*args):
        time.sleep(40)
        write_results(*args)

    script.write_results = slow_write_results
    jax.distributed.initialize = functools.partial(initialize, shutdown_timeout_seconds=20)


def plan_evaluations(script):
    """Let the evaluation at step 6 be the best. Runs in each process of the script."""
    evaluate = script.evaluate

    def planned(*args):
        step = args[-1]
        return {**evaluate(*args), "eval_loss": float(abs(step - 6))}

    script.evaluate = planned


@template_alone
def test_two_processes_stop_early_and_export_the_best_model(place):
    flags = {
        **eight_devices(place),
        "load_best_model_at_end": True,
        "early_stopping_patience": 2,
        "max_steps": 30,
        "eval_steps": 3,
        "save_steps": 5,
        "save_total_limit": 1,
    }
    output_dir = finish_cluster(place, "best", **flags, change=plan_evaluations)
    # The evaluations at steps 9 and 12 are worse. The best checkpoint is kept beside the newest.
    assert checkpoints(output_dir) == [6, 12]
    assert evaluation(output_dir)["eval_loss"] == 0
    exported = load_file(output_dir / "model.safetensors")
    best = load_file(output_dir / "checkpoints" / "6" / "state.safetensors")
    embeddings = best["params/roberta/embeddings/word_embeddings/embedding"]
    assert np.array_equal(exported["roberta.embeddings.word_embeddings.weight"], embeddings)


@template_alone
@pytest.mark.full
def test_processes_wait_for_a_slow_end(place):
    """An upload may take longer than JAX waits for the last process to end."""
    flags = {**eight_devices(place), "max_steps": 2, "do_train": True}
    finish_cluster(place, "slow_end", **flags, change=slow_end)
