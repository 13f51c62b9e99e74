#!/usr/bin/env python
"""Show where the time of a train step goes on a CPU, by operation of the compiled program.

    python benchmarks/operations.py [--objectives masked causal span-masked denoising]
        [--size small] [--rows 8] [--length 128] [--vocab_size 8000] [--dtype float32]
        [--steps 10] [--top 0] [--json FILE]

The scripts run as a whole, on Python's documentation, and write a trace of some steps
(--profile_steps). Times are added up. An operation that uses several threads may count once, and
operations that overlap count each.
The name of an operation decides how it counts. Columns:

    ms          of all operations of a step
    products    fraction in matrix products, and in the reductions that the compiler fuses with them
    copies      fraction in operations that copy or transpose an array
    others      fraction in all others: dropout, softmax, LayerNorm, the optimizer and more

--top prints that many operations with the longest times below each row.
"""

import argparse
import gzip
import json
import os
import re
import tempfile
from collections import Counter
from pathlib import Path

import harness

# The names of operations as XLA's compiler for CPUs chooses them, without their numbers. Its
# products are `dot`, or fusions that the library YNNPACK runs.
PRODUCTS = re.compile(r"dot|ynn_fusion")
COPIES = re.compile(r"copy|transpose")


def read_times(trace: Path) -> Counter:
    """The microseconds of each operation in a trace, added over threads and steps."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    times = Counter()
    for event in events:
        if "hlo_op" in event.get("args", {}):
            times[event["name"]] += event["dur"]
    return times


def kind(operation: str) -> str:
    """The column that an operation counts in."""
    if PRODUCTS.match(operation):
        return "products"
    if COPIES.search(operation):
        return "copies"
    return "others"


def measure(args, directory: Path, objective: str) -> tuple[dict, Counter]:
    """Run an objective's script. Returns the figures of a row and the times of its operations."""
    text = harness.write_corpus(directory, 1)
    model_type = harness.OBJECTIVES[objective].model_type
    folder = harness.write_model(
        directory, text, model_type, args.size, args.length, args.vocab_size
    )
    first = harness.WARM_UP + 1
    last = harness.WARM_UP + args.steps
    output_dir = directory / f"out-{objective}"
    script, flags = harness.command(
        objective,
        folder,
        text,
        output_dir,
        args.rows,
        args.length,
        max_steps=last,
        profile_steps=f"{first}:{last}",
        dtype=args.dtype,
    )
    harness.run(directory, script, flags, flops=False)
    (trace,) = output_dir.glob("profile/plugins/profile/*/*.trace.json.gz")
    times = read_times(trace)
    by_kind = Counter()
    for operation, microseconds in times.items():
        by_kind[kind(operation)] += microseconds
    total = times.total()
    figures = {name: by_kind[name] / total for name in ("products", "copies", "others")}
    return {"ms": total / 1000 / args.steps, **figures}, times


def main():
    os.environ["JAX_PLATFORMS"] = "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    objectives = list(harness.OBJECTIVES)
    parser.add_argument("--objectives", nargs="+", choices=objectives, default=objectives)
    parser.add_argument("--size", choices=harness.SIZES, default="small")
    parser.add_argument("--rows", type=int, default=8, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--vocab_size", type=int, default=8000)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=10, help="steps in the trace")
    parser.add_argument("--top", type=int, default=0, help="operations to print for each objective")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()

    print(f"{'':12}{'ms':>8}{'products':>10}{'copies':>8}{'others':>8}")
    figures = {}
    with tempfile.TemporaryDirectory() as directory:
        for objective in args.objectives:
            found, times = measure(args, Path(directory), objective)
            figures[f"{objective}, {args.size}"] = found
            shares = f"{found['products']:10.0%}{found['copies']:8.0%}{found['others']:8.0%}"
            print(f"{objective:12}{found['ms']:8.1f}{shares}", flush=True)
            for operation, microseconds in times.most_common(args.top):
                print(f"    {microseconds / 1000 / args.steps:8.2f} ms  {operation}")
            harness.write_json(args.json, figures)


if __name__ == "__main__":
    main()
