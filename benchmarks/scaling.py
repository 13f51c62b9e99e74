#!/usr/bin/env python
"""Measure what the training loop adds to the compiled step, over devices and processes.

    python benchmarks/scaling.py [--objective masked] [--devices 1 2 4 8] [--processes 1 2]
        [--size small] [--runs 3] [--json FILE]

Each row of the table is from whole runs of a script, on virtual CPU devices, with 64 sequences a
step on all devices together, so all runs compute the same. Figures are medians of the runs:

    bare   a step of the compiled program on a batch that is already on the devices
    loop   a step of the run, with its batch, its logging and the rest of Python

Virtual devices share the cores of one machine, so more of them are not faster.
"""

import argparse
import socket
import statistics
import tempfile
from pathlib import Path

import harness

ROWS = 64


def cluster(num_processes: int, devices_per_process: int) -> list[dict[str, str]]:
    """Make the environment of each process of a cluster on this machine."""
    env = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices_per_process}",
    }
    if num_processes == 1:
        return [env]
    # The system chooses a free port.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
    env["JAX_NUM_PROCESSES"] = str(num_processes)
    return [{**env, "JAX_PROCESS_ID": str(process)} for process in range(num_processes)]


def measure(
    args, directory: Path, text: Path, folder: Path, num_processes: int, num_devices: int
) -> dict:
    """Measure runs on `num_devices` devices, which the processes share equally."""
    flags = {
        "max_steps": harness.WARM_UP + args.segments * args.segment,
        "logging_steps": 20,
    }
    if num_processes > 1:
        flags["distributed"] = True
    rows_per_device = ROWS // num_devices
    output_dir = directory / "out"
    script, words = harness.command(
        args.objective, folder, text, output_dir, rows_per_device, args.length, **flags
    )
    runs = []
    for _ in range(args.runs):
        envs = cluster(num_processes, num_devices // num_processes)
        processes = harness.start(directory, script, words, envs, segment=args.segment)
        runs.append(harness.finish(directory, processes))
    bare = 1e3 * statistics.median(run["bare"] for run in runs)
    loop = 1e3 * statistics.median(run["loop"] for run in runs)
    ratio = statistics.median(run["ratio"] for run in runs)
    return {
        "processes": num_processes,
        "devices": num_devices,
        "bare_ms": bare,
        "loop_ms": loop,
        "added_ms": bare * (ratio - 1),
        "ratio": ratio,
    }


def print_row(found: dict):
    columns = (
        f"{found['processes']:>10}",
        f"{found['devices']:>9}",
        f"{found['bare_ms']:>10.1f}",
        f"{found['loop_ms']:>10.1f}",
        f"{found['added_ms']:>10.2f}",
        f"{found['ratio']:>13.3f}",
    )
    print("".join(columns), flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objective", choices=harness.OBJECTIVES, default="masked")
    parser.add_argument(
        "--devices", type=int, nargs="+", default=[1, 2, 4, 8], help="in all processes together"
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--size",
        choices=harness.SIZES,
        default="small",
        help="2 layers of width 128, or 12 layers of width 768",
    )
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    parser.add_argument(
        "--segment", type=int, default=25, help="steps of the run between as many bare steps"
    )
    parser.add_argument("--segments", type=int, default=4, help="segments in a run")
    parser.add_argument("--runs", type=int, default=3, help="runs for each row")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()

    tokens = f"{ROWS} x {args.length} tokens a step"
    print(f"{args.objective}, {args.size}, {tokens}, medians of {args.runs} runs")
    times = f"{'bare ms':>10}{'loop ms':>10}{'added ms':>10}{'loop / bare':>13}"
    print(f"{'processes':>10}{'devices':>9}{times}")
    figures = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        text = harness.write_corpus(directory, 4)
        model_type = harness.OBJECTIVES[args.objective].model_type
        folder = harness.write_model(directory, text, model_type, args.size, args.length, 8000)
        for num_processes in args.processes:
            for num_devices in args.devices:
                # Each process needs a device.
                if num_devices < num_processes:
                    continue
                found = measure(args, directory, text, folder, num_processes, num_devices)
                figures.append(found)
                print_row(found)
    harness.write_json(args.json, figures)


if __name__ == "__main__":
    main()
