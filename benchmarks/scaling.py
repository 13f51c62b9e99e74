#!/usr/bin/env python
"""What the training loop adds to the compiled step, on 1, 2, 4 and 8 virtual CPU devices and in 1 and 2 processes.

    python benchmarks/scaling.py [--objective masked] [--devices 1 2 4 8] [--processes 1 2] [--size small] [--runs 3]
        [--json FILE]

Whole runs of a script with 64 sequences a step in all, so that each run computes the same. `bare` is a step of the
compiled program on a batch that lies ready, `loop` a step of the run, with its batches, its logging and the rest of
Python; medians of the runs. Virtual devices share the cores of one machine: more of them are not faster.
"""

import argparse
import socket
import statistics
import tempfile
from pathlib import Path

import harness

ROWS = 64


def cluster(processes: int, devices: int) -> list[dict]:
    """The environments of processes with `devices` each."""
    xla = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    if processes == 1:
        return [xla]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    xla |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    return [{**xla, "JAX_PROCESS_ID": str(i)} for i in range(processes)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objective", choices=harness.OBJECTIVES, default="masked")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8], help="in all")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--size", choices=harness.SIZES, default="small", help="2 layers of 128, or 12 of 768"
    )
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument(
        "--segment",
        type=int,
        default=25,
        help="steps of the run, then as many on the batch that lies",
    )
    parser.add_argument("--segments", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    args = parser.parse_args()
    figures = []
    print(
        f"{args.objective}, {args.size}, {ROWS} x {args.length} tokens a step, medians of {args.runs} runs"
    )
    print(
        f"{'processes':>10}{'devices':>9}{'bare ms':>10}{'loop ms':>10}{'added ms':>10}{'loop / bare':>13}"
    )
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        text = harness.write_corpus(directory, 4)
        folder = harness.write_model(
            directory, text, harness.OBJECTIVES[args.objective][1], args.size, args.length, 8000
        )
        for processes, devices in ((p, d) for p in args.processes for d in args.devices if d >= p):
            script, flags = harness.command(
                args.objective, folder, text, directory / "out", ROWS // devices, args.length,
                max_steps=harness.WARM_UP + args.segments * args.segment, logging_steps=20,
                **({"distributed": True} if processes > 1 else {}),
            )  # fmt: skip
            runs = []
            for _ in range(args.runs):
                started = harness.start(
                    directory,
                    script,
                    flags,
                    cluster(processes, devices // processes),
                    segment=args.segment,
                )
                runs.append(harness.finish(directory, started))
            bare, loop = (
                1e3 * statistics.median(run[kind] for run in runs) for kind in ("bare", "loop")
            )
            ratio = statistics.median(run["ratio"] for run in runs)
            added = bare * (ratio - 1)
            figures.append(
                {"processes": processes, "devices": devices, "bare_ms": bare, "loop_ms": loop}
            )
            figures[-1] |= {"added_ms": added, "ratio": ratio}
            print(
                f"{processes:>10}{devices:>9}{bare:>10.1f}{loop:>10.1f}{added:>10.2f}{ratio:>13.3f}",
                flush=True,
            )
    harness.write_json(args.json, figures)


if __name__ == "__main__":
    main()
