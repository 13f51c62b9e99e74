"""Runs on two processes, as on two hosts."""

import socket
from pathlib import Path

from training_scripts import Place

# Flags for eight devices that train as one device with a batch of 16 does.
EIGHT_DEVICES = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 1,
}


def start_cluster(place: Place, output_dir: str, first=(), **flags):
    """Start two processes with four devices each and return their runs.

    The second process has an output directory of its own, which it must not create. `first` are
    options of the first process alone.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    options = {"distributed": True, "devices": 4, **flags}
    first_env = {**cluster, "JAX_PROCESS_ID": "0"}
    second_env = {**cluster, "JAX_PROCESS_ID": "1"}
    return [
        place.start(output_dir, **options, **dict(first), env=first_env),
        place.start(f"{output_dir}-of-the-second", **options, env=second_env),
    ]


def finish_cluster(place: Place, output_dir: str, **flags) -> Path:
    """Run two processes to the end, and return the output directory of the first."""
    for run in start_cluster(place, output_dir, **flags):
        run.wait()
        assert (run.returncode, run.lines) == (0, [])
    assert not (place.directory / f"{output_dir}-of-the-second").exists()
    return place.directory / output_dir
