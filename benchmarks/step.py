#!/usr/bin/env python
"""Measure the train step of each objective: its speed, and how much of the device it uses.

    python benchmarks/step.py [--objectives masked causal span-masked denoising] [--size small]
        [--rows 8] [--length 128] [--dtype float32] [--segment 25] [--segments 6] [--runs 3]
        [--json FILE]

The scripts run as a whole, on one device and on Python's documentation. Columns, medians of the
runs:

    tokens/s       of the compiled step on a batch that is already on the device
    utilization    operations per second of the step's matrix products, as a fraction of the
                   measured rate of a large product in the same precision on the same device; the
                   operations are counted in the traced program
    loop           time of a step of the run, with its batch, its logging and the rest of Python, as
                   a ratio to the time of the compiled step alone
    waiting        fraction of that time in which the device waits for the host: 1 - 1 / loop

The tokens are those of the inputs. T5 has 0.2 targets for each of them, BART has one.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import harness


def measure(args, directory: Path, objective: str) -> dict:
    """Run an objective's script several times and return the medians."""
    text = harness.write_corpus(directory, 4)
    model_type = harness.OBJECTIVES[objective].model_type
    folder = harness.write_model(
        directory, text, model_type, args.size, args.length, args.vocab_size
    )
    script, flags = harness.command(
        objective,
        folder,
        text,
        directory / "out",
        args.rows,
        args.length,
        max_steps=harness.WARM_UP + args.segments * args.segment,
        logging_steps=20,
        dtype=args.dtype,
        **dict(args.flags),
    )
    product_size = 8192 if args.size == "base" else 2048
    settings = {"segment": args.segment, "product": (args.dtype, product_size)}
    runs = [harness.run(directory, script, flags, **settings) for _ in range(args.runs)]
    values = {
        "tokens_per_second": [run["tokens"] / run["bare"] for run in runs],
        "utilization": [run["flops"] / run["bare"] / run["product_flops"] for run in runs],
        "ratio": [run["ratio"] for run in runs],
        "waiting": [1 - 1 / run["ratio"] for run in runs],
        "product_flops": [run["product_flops"] for run in runs],
    }
    figures = {name: statistics.median(found) for name, found in values.items()}
    # These are the same in all runs, or nearly so.
    for name in ("flops", "peak_bytes", "device", "jax"):
        figures[name] = runs[0][name]
    return figures


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    objectives = list(harness.OBJECTIVES)
    parser.add_argument("--objectives", nargs="+", choices=objectives, default=objectives)
    parser.add_argument(
        "--size",
        choices=harness.SIZES,
        default="small",
        help="2 layers of width 128, or 12 layers of width 768",
    )
    parser.add_argument("--rows", type=int, default=8, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--vocab_size", type=int, default=8000)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--segment", type=int, default=25, help="steps of the run between as many bare steps"
    )
    parser.add_argument("--segments", type=int, default=6, help="segments in a run")
    parser.add_argument("--runs", type=int, default=3, help="runs of each objective")
    parser.add_argument(
        "--flags",
        nargs="*",
        type=lambda word: word.split("=", 1),
        default=[],
        metavar="NAME=VALUE",
        help="more flags of the scripts",
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()

    if os.environ.get("JAX_PLATFORMS") == "cpu":
        # One device, which has all cores.
        os.environ["XLA_FLAGS"] = ""
    tokens = f"{args.rows} x {args.length} tokens"
    print(f"{args.size}, {tokens}, {args.dtype}, medians of {args.runs} runs")
    print(f"{'':12}{'tokens/s':>12}{'utilization':>13}{'loop':>8}{'waiting':>10}")
    figures = {}
    for name in ("size", "rows", "length", "vocab_size", "dtype", "runs"):
        figures[name] = getattr(args, name)
    with tempfile.TemporaryDirectory() as directory:
        for objective in args.objectives:
            found = measure(args, Path(directory), objective)
            figures[objective] = found
            columns = (
                f"{objective:12}",
                f"{found['tokens_per_second']:>12,.0f}",
                f"{found['utilization']:>13.0%}",
                f"{found['ratio']:>8.3f}",
                f"{max(found['waiting'], 0):>10.1%}",
            )
            print("".join(columns), flush=True)
    harness.write_json(args.json, figures)


if __name__ == "__main__":
    main()
