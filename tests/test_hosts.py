"""Training is the same on one device, on eight, and on two processes with four devices each.

The code with which processes stop and resume together is word for word the same in all scripts, so
its tests run only for the template.
"""

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from training_scripts import SCRIPTS, TEMPLATE, Place, checkpoints, template_alone

STEPS = 30
FEWER_STEPS = 12
SAVE_STEPS = 3
TRAINING = {
    "max_steps": STEPS,
    "save_steps": SAVE_STEPS,
    "save_total_limit": 20,
    "logging_steps": 1,
    "eval_steps": 20,
}
ONE_DEVICE = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 5}
EIGHT_DEVICES = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 1,
}


def training(place: Place) -> dict:
    """Return the flags of a run. Only runs of the template are resumed; the others are shorter."""
    if place.script is TEMPLATE:
        return TRAINING
    fewer = {"max_steps": FEWER_STEPS, "save_steps": FEWER_STEPS, "eval_steps": FEWER_STEPS // 2}
    return {**TRAINING, **fewer}


def losses(output_dir: Path) -> dict[int, float]:
    """Return {step: training loss} from TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    values = {}
    for path in output_dir.glob("events.out.tfevents.*"):
        events = EventAccumulator(str(path), size_guidance={"tensors": 0}).Reload()
        if "train_loss" in events.Tags()["tensors"]:
            for event in events.Tensors("train_loss"):
                values[event.step] = float(make_ndarray(event.tensor_proto))
    return values


def evaluation(output_dir: Path) -> dict[str, float]:
    return json.loads((output_dir / "eval_results.json").read_text())


def start_cluster(place: Place, output_dir: str, first=(), **flags):
    """Start two processes with four devices each and return their runs.

    The second process has an output directory of its own, which it must not create. `first` are
    options of the first process alone.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    options = {**training(place), **EIGHT_DEVICES, "distributed": True, "devices": 4, **flags}
    first_env = {**cluster, "JAX_PROCESS_ID": "0"}
    second_env = {**cluster, "JAX_PROCESS_ID": "1"}
    return [
        place.start(output_dir, **options, **dict(first), env=first_env),
        place.start(f"{output_dir}-of-the-second", **options, env=second_env),
    ]


def finish_cluster(place: Place, output_dir: str, **flags) -> Path:
    """Run two processes to the end, and return the output directory of the first."""
    for run in start_cluster(place, output_dir, **flags):
        run.wait(240)
        assert (run.returncode, run.lines) == (0, [])
    assert not (place.directory / f"{output_dir}-of-the-second").exists()
    return place.directory / output_dir


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
    return finish_cluster(place, "two_processes")


def check_same(a: Path, b: Path):
    """Check that two runs have the same losses, up to rounding."""
    assert losses(a) == pytest.approx(losses(b), rel=0, abs=1e-4)
    assert evaluation(a) == pytest.approx(evaluation(b), rel=1e-4)


def test_eight_devices_with_accumulation_train_as_one(place, one_device):
    run = place.run("eight_devices", **training(place), **EIGHT_DEVICES, devices=8)
    assert (run.returncode, run.lines) == (0, [])
    check_same(place.directory / "eight_devices", one_device)


@pytest.mark.parametrize(
    "script", [script for script in SCRIPTS if not script.is_stream], ids=str, indirect=True
)
def test_two_processes_train_as_one(two_processes, one_device):
    check_same(two_processes, one_device)


@template_alone
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
def test_the_comparison_can_fail(place, one_device):
    flags = {**TRAINING, **ONE_DEVICE, "max_steps": 3, "per_device_train_batch_size": 8}
    run = place.run("other", **flags, devices=1)
    assert run.returncode == 0
    expected = losses(one_device)
    found = losses(place.directory / "other")
    assert any(abs(loss - expected[step]) > 1e-3 for step, loss in found.items())


def wait_until(condition, runs, seconds: float):
    """Wait until `condition()` is true. No run may end before."""
    end = time.monotonic() + seconds
    while not condition():
        assert all(run.poll() is None for run in runs), [run.stderr for run in runs]
        assert time.monotonic() < end
        time.sleep(0.005)


@template_alone
def test_stopped_and_killed_processes_resume(place, two_processes):
    """SIGTERM to one process, then SIGKILL during a save, then a run to the end."""
    output_dir = place.directory / "resumed"

    # SIGTERM to the second process alone stops both at the same step.
    runs = start_cluster(place, "resumed")
    wait_until(lambda: checkpoints(output_dir), runs, 120)
    runs[1].send_signal(signal.SIGTERM)
    for run in runs:
        run.wait()
        assert (run.returncode, run.lines) == (143, [])
    stopped = checkpoints(output_dir)[-1]
    killed = STEPS - SAVE_STEPS
    assert stopped == max(losses(output_dir)) < killed

    kill_at = [rf"^rename .*/checkpoints/{killed}$"]
    runs = start_cluster(place, "resumed", first={"kill_at": kill_at})
    runs[0].wait()
    runs[1].kill()
    assert runs[0].returncode == 137, runs[0].stderr
    assert stopped <= checkpoints(output_dir)[-1] < killed

    assert finish_cluster(place, "resumed") == output_dir
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
    runs = start_cluster(place, "a_file")
    for run in runs:
        run.wait(60)
        assert run.returncode != 0
    assert runs[0].returncode == 1
    assert len(runs[0].lines) == 1
    assert "--output_dir" in runs[0].stderr


def slow_start(script):
    """Make tokenization take half a minute for each data set.

    A file `starting-PROCESS` says that it has begun.
    """
    import os
    import pathlib
    import time

    tokenize = script.tokenize

    def slow_tokenize(*args):
        pathlib.Path(f"starting-{os.environ['JAX_PROCESS_ID']}").write_text("")
        time.sleep(30)
        return tokenize(*args)

    script.tokenize = slow_tokenize


@template_alone
def test_sigterm_before_training(place):
    """The script must react itself: JAX handles the signal once the cluster is formed.

    JAX would leave it to the training loop, which does not run yet.
    """
    runs = start_cluster(place, "stopped_early", change=slow_start)
    wait_until(lambda: len(list(place.directory.glob("starting-*"))) == 2, runs, 60)
    start = time.monotonic()
    for run in runs:
        run.send_signal(signal.SIGTERM)
    for run in runs:
        run.wait(60)
        assert (run.returncode, run.lines) == (143, [])
    assert time.monotonic() - start < 20


def slow_end(script):
    """Make the first process write its results for 7 s, and JAX wait 3 s for the last process."""
    import functools
    import time

    import jax

    write_results = script.write_results
    initialize = jax.distributed.initialize

    def slow_write_results(*args):
        time.sleep(7)
        write_results(*args)

    script.write_results = slow_write_results
    jax.distributed.initialize = functools.partial(initialize, shutdown_timeout_seconds=3)


@template_alone
def test_processes_wait_for_a_slow_end(place):
    """An upload may take longer than JAX waits for the last process to end."""
    finish_cluster(place, "slow_end", change=slow_end, max_steps=2, do_train=True)
