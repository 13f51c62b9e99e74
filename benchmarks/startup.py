#!/usr/bin/env python
"""Measure the seconds from the command to the first step, with a cold and a warm cache.

    python benchmarks/startup.py [--objective masked] [--sizes small base] [--runs 3] [--json FILE]

The cache is that of compiled programs. Whole runs of a script over a megabyte of text alternate:
one with an empty cache, then one with the cache that the former has filled. All runs tokenize the
texts again. Figures are medians of the runs. `other` is the start of Python and of the devices, and
the setup between the parts. `all` ends when the first step is dispatched, and does not include the
time of that step.
"""

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

import harness

PARTS = ("imports", "data", "initialization", "compilation")
COLUMNS = (*PARTS, "other", "all")
WIDTHS = {column: len(column) + 3 for column in COLUMNS}  # characters
VOCAB_SIZES = {"small": 8000, "base": 50265}


def run_once(directory: Path, script: str, flags: list[str]) -> dict[str, float]:
    """Run a script and return the seconds of each column."""
    notes = harness.run(directory, script, flags)
    found = {part: notes[part] for part in PARTS}
    found["other"] = notes["to_first_step"] - sum(found.values())
    found["all"] = notes["to_first_step"]
    return found


def measure(args, directory: Path, size: str) -> dict[str, list[dict[str, float]]]:
    """Run a script with cold and with warm caches.

    Returns the seconds of each run, with a cold and with a warm cache.
    """
    text = harness.write_corpus(directory, 1)
    model_type = harness.OBJECTIVES[args.objective].model_type
    vocab_size = VOCAB_SIZES[size]
    folder = harness.write_model(directory, text, model_type, size, args.length, vocab_size)
    script, flags = harness.command(
        args.objective,
        folder,
        text,
        directory / "out",
        8,
        args.length,
        max_steps=1,
        overwrite_cache=True,
    )
    runs = {"cold": [], "warm": []}
    for _ in range(args.runs):
        shutil.rmtree(directory / "compiled", ignore_errors=True)
        runs["cold"].append(run_once(directory, script, flags))
        runs["warm"].append(run_once(directory, script, flags))
    return runs


def report(size: str, runs: dict[str, list[dict[str, float]]]) -> dict:
    """Print the medians of the runs at one size, and return the figures."""
    figures = {}
    for cache, found in runs.items():
        medians = {}
        for column in COLUMNS:
            medians[column] = statistics.median(run[column] for run in found)
        name = f"{size}, {cache}"
        figures[name] = medians
        cells = [f"{medians[column]:>{width}.1f}" for column, width in WIDTHS.items()]
        print(f"{name:12}{''.join(cells)}", flush=True)
    ratios = []
    for cold, warm in zip(runs["cold"], runs["warm"], strict=True):
        ratios.append(warm["all"] / cold["all"])
    ratio = statistics.median(ratios)
    figures[f"{size}, ratio"] = ratio
    print(f"{size}: a warm start takes {ratio:.0%} of a cold one, median of pairs", flush=True)
    return figures


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = list(harness.SIZES)
    parser.add_argument(
        "--objective",
        choices=harness.OBJECTIVES,
        default="masked",
        help="objective of the script that runs",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=sizes,
        default=sizes,
        help="2 layers of width 128, or 12 layers of width 768",
    )
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--runs", type=int, default=3, help="pairs of runs for each size")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()

    what = f"first step of {args.objective} language modeling"
    print(f"seconds to the {what}, medians of {args.runs} runs")
    header = "".join(f"{column:>{width}}" for column, width in WIDTHS.items())
    print(f"{'':12}{header}")
    figures = {}
    with tempfile.TemporaryDirectory() as directory:
        for size in args.sizes:
            figures |= report(size, measure(args, Path(directory), size))
    harness.write_json(args.json, figures)


if __name__ == "__main__":
    main()
