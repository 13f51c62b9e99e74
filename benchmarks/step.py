#!/usr/bin/env python
"""The train step of each objective: tokens a second, and how much of the device it uses.

    python benchmarks/step.py [--objectives masked causal span-masked denoising] [--size small] [--rows 8]
        [--length 128] [--dtype float32] [--segment 25] [--segments 6] [--runs 3] [--json FILE]

Whole runs of the scripts, on one device and Python's documentation. Columns, medians of the runs:

    tokens/s       of the compiled step on a batch that lies ready
    utilization    its matrix products, counted in the traced program, a second, beside the measured rate of a large
                   product of the same precision on the same device
    loop           time of a step of the run, with its batch, its logging and the rest of Python, beside that
    waiting        share of that time in which the device waits for the host: 1 - 1 / loop

T5's step has 0.2 targets for each of the tokens counted here, those of its inputs; BART's has one.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import harness


def measure(args, directory: Path, objective: str) -> dict:
    text = harness.write_corpus(directory, 4)
    folder = harness.write_model(
        directory, text, harness.OBJECTIVES[objective][1], args.size, args.length, args.vocab_size
    )
    steps = harness.WARM_UP + args.segments * args.segment
    more = {"max_steps": steps, "logging_steps": 20, "dtype": args.dtype}
    script, flags = harness.command(
        objective,
        folder,
        text,
        directory / "out",
        args.rows,
        args.length,
        **more,
        **dict(args.flags),
    )
    product = (args.dtype, 8192 if args.size == "base" else 2048)
    runs = [
        harness.run(directory, script, flags, segment=args.segment, product=product)
        for _ in range(args.runs)
    ]
    median = lambda values: statistics.median(values)  # noqa: E731
    return {
        "tokens_per_second": median(run["tokens"] / run["bare"] for run in runs),
        "utilization": median(run["flops"] / run["bare"] / run["product_flops"] for run in runs),
        "ratio": median(run["ratio"] for run in runs),
        "waiting": median(1 - 1 / run["ratio"] for run in runs),
        "flops": runs[0]["flops"],
        "product_flops": median(run["product_flops"] for run in runs),
        "peak_bytes": runs[0]["peak_bytes"],
        "device": runs[0]["device"],
        "jax": runs[0]["jax"],
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--objectives", nargs="+", choices=harness.OBJECTIVES, default=list(harness.OBJECTIVES)
    )
    parser.add_argument(
        "--size", choices=harness.SIZES, default="small", help="2 layers of 128, or 12 of 768"
    )
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--vocab_size", type=int, default=8000)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--segment",
        type=int,
        default=25,
        help="steps of the run, then as many on the batch that lies",
    )
    parser.add_argument("--segments", type=int, default=6)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--flags",
        nargs="*",
        type=lambda x: x.split("=", 1),
        default=[],
        help="NAME=VALUE of the script",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    args = parser.parse_args()
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        os.environ["XLA_FLAGS"] = ""  # one device, which has all cores
    figures = {}
    print(
        f"{args.size}, {args.rows} x {args.length} tokens, {args.dtype}, medians of {args.runs} runs"
    )
    print(f"{'':12}{'tokens/s':>12}{'utilization':>13}{'loop':>8}{'waiting':>10}")
    with tempfile.TemporaryDirectory() as directory:
        for objective in args.objectives:
            found = figures[objective] = measure(args, Path(directory), objective)
            print(
                f"{objective:12}{found['tokens_per_second']:>12,.0f}{found['utilization']:>13.0%}"
                f"{found['ratio']:>8.3f}{max(found['waiting'], 0):>10.1%}",
                flush=True,
            )
    about = {
        name: getattr(args, name)
        for name in ("size", "rows", "length", "vocab_size", "dtype", "runs")
    }
    harness.write_json(args.json, about | figures)


if __name__ == "__main__":
    main()
