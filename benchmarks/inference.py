#!/usr/bin/env python
"""Compare inference in float32 and bfloat16, by several runs of `run_bert_flax.py --compare`.

    python benchmarks/inference.py [--runs 5] [--plain_iters 10] [--json FILE]
        [FLAGS of run_bert_flax.py]

Two variants alternate, each run in its own process: `script` is the script unchanged. `plain` is
the script with the matrix products as Flax asks for them, for `plain_iters` passes. The table has
medians of the runs. The ratio says how many times faster bfloat16 is than float32: it is the median
of the ratios of all runs.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import harness

# The program of the plain variant.
PLAIN = """
import run_bert_flax

def leave_unchanged(function):
    return function

run_bert_flax.accumulate_in_float32 = leave_unchanged
run_bert_flax.main()
"""
PRECISIONS = ("float32", "bfloat16")
COLUMNS = (
    "examples/s",
    "tokens/s",
    "median ms",
    "95% ms",
    "GFLOP/s",
    "% of a product",
    "product's GFLOP/s",
)


def compare(code: list[str], flags: list[str]) -> dict:
    """Run the comparison once, and read what it prints.

    Returns a row of COLUMNS for each precision, the ratio, and the error in percent.
    """
    command = [sys.executable, *code, "--compare", *flags]
    env = {"HF_HUB_OFFLINE": "1", **os.environ}
    done = subprocess.run(command, cwd=harness.ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    found = {}
    for precision in PRECISIONS:
        line = re.search(rf"^{precision} .*", done.stdout, re.MULTILINE)[0]
        cells = line.removeprefix(precision).replace(",", "")
        numbers = [float(number) for number in re.findall(r"[\d.]+", cells)]
        found[precision] = dict(zip(COLUMNS, numbers, strict=True))
    found["error"] = float(re.search(r"([\d.]+)%\.$", done.stdout, re.MULTILINE)[1])
    found["ratio"] = float(re.search(r"bfloat16 is ([\d.]+) times", done.stdout)[1])
    return found


def report(variant: str, runs: list[dict]) -> dict:
    """Print the medians of a variant's runs, and return its figures."""
    figures = {}
    for precision in PRECISIONS:
        row = {}
        for column in COLUMNS:
            row[column] = statistics.median(run[precision][column] for run in runs)
        name = f"{variant}, {precision}"
        figures[name] = row
        cells = [f"{row[column]:>{len(column) + 3},.6g}" for column in COLUMNS]
        print(f"{name:18}{''.join(cells)}")
    ratios = [run["ratio"] for run in runs]
    figures[f"{variant}, ratios"] = ratios
    figures[f"{variant}, error"] = statistics.median(run["error"] for run in runs)
    median = statistics.median(ratios)
    print(f"{variant}: ratio {median:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return figures


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="runs of each variant")
    parser.add_argument("--plain_iters", type=int, default=10, help="passes in a plain run")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args, flags = parser.parse_known_args()

    variants = {
        "script": (["run_bert_flax.py"], flags),
        "plain": (["-c", PLAIN], [*flags, f"--num_iters={args.plain_iters}"]),
    }
    runs = {variant: [] for variant in variants}
    for _ in range(args.runs):
        for variant, (code, variant_flags) in variants.items():
            found = compare(code, variant_flags)
            runs[variant].append(found)
            ratio = found["ratio"]
            print(f"{variant}: bfloat16 is {ratio:.2f} times as fast as float32", flush=True)

    header = "".join(f"{column:>{len(column) + 3}}" for column in COLUMNS)
    print(f"\nmedians of {args.runs} runs\n{'':18}{header}")
    figures = {}
    for variant in variants:
        figures |= report(variant, runs[variant])
    harness.write_json(args.json, figures)


if __name__ == "__main__":
    main()
