#!/usr/bin/env python
"""Inference in float32 and bfloat16, by several runs of run_bert_flax.py --compare.

    python benchmarks/inference.py [--runs 5] [--plain_iters 10] [--json FILE] [FLAGS of run_bert_flax.py]

By turns, each in a process of its own: the script as it is, and the script with the matrix products that Flax asks for
(`plain`), for `plain_iters` passes. Medians of the runs; `ratio` is how many times as fast bfloat16 is as float32, the
median of the runs' own ratios and all of them.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import harness

PLAIN = """import sys, run_bert_flax
run_bert_flax.accumulate_in_float32 = lambda function: function
sys.exit(run_bert_flax.cli_of_benchmark(sys.argv[1:]))"""
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
    """What one run prints: a row of COLUMNS for each precision, the ratio, and the error in percent."""
    command = [sys.executable, *code, "--compare", *flags]
    env = {"HF_HUB_OFFLINE": "1", **os.environ}
    done = subprocess.run(command, cwd=harness.ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    found = {}
    for name in PRECISIONS:
        row = re.search(rf"^{name} .*", done.stdout, re.MULTILINE)[0]
        numbers = [float(x) for x in re.findall(r"[\d.]+", row.removeprefix(name).replace(",", ""))]
        found[name] = dict(zip(COLUMNS, numbers, strict=True))
    found["error"] = float(re.search(r"([\d.]+)%\.$", done.stdout, re.MULTILINE)[1])
    found["ratio"] = float(re.search(r"bfloat16 is ([\d.]+) times", done.stdout)[1])
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--plain_iters", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    args, flags = parser.parse_known_args()
    ways = {"script": (["run_bert_flax.py"], flags)}
    ways["plain"] = (["-c", PLAIN], [*flags, f"--num_iters={args.plain_iters}"])
    runs = {way: [] for way in ways}
    for _ in range(args.runs):
        for way, (code, given) in ways.items():
            found = compare(code, given)
            runs[way].append(found)
            print(f"{way}: bfloat16 is {found['ratio']:.2f} times as fast as float32", flush=True)
    figures = {}
    print(
        f"\nmedians of {args.runs} runs\n{'':18}"
        + "".join(f"{name:>{len(name) + 3}}" for name in COLUMNS)
    )
    for way, found in runs.items():
        for name in PRECISIONS:
            row = {
                column: statistics.median(run[name][column] for run in found) for column in COLUMNS
            }
            figures[f"{way}, {name}"] = row
            print(
                f"{way + ', ' + name:18}"
                + "".join(f"{row[column]:>{len(column) + 3},.6g}" for column in COLUMNS)
            )
        ratios = [run["ratio"] for run in found]
        figures[f"{way}, ratios"] = ratios
        figures[f"{way}, error"] = statistics.median(run["error"] for run in found)
        print(
            f"{way}: ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    harness.write_json(args.json, figures)


if __name__ == "__main__":
    main()
