"""Runs on two processes, as on two hosts."""

import random
import socket
from contextlib import suppress
from pathlib import Path

from training_scripts import Place

# Flags for eight devices that train as one device with a batch of 16 does.
EIGHT_DEVICES = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 1,
}


def free_port() -> int:
    """Find a free port below those that the kernel gives to connections."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port


def start_cluster(place: Place, output_dir: str, first=(), **flags):
    """Start two processes with four devices each and return their runs.

    The second process has an output directory of its own, which it must not create. `first` are
    options of the first process alone.
    """
    port = free_port()
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
    runs = [run.wait() for run in start_cluster(place, output_dir, **flags)]
    assert [(run.returncode, run.lines) for run in runs] == [(0, []), (0, [])]
    assert not (place.directory / f"{output_dir}-of-the-second").exists()
    return place.directory / output_dir
