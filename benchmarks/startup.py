#!/usr/bin/env python
"""Seconds from the command to the first step, with a cold and with a warm compilation cache.

    python benchmarks/startup.py [--objective masked] [--sizes small base] [--runs 3] [--json FILE]

Whole runs of a script over a megabyte of text, by turns with an empty cache of compiled programs and with that of the
run before; texts are tokenized anew in each. Medians of the runs; `other` is Python's start, the devices', and what is
set up in between. `all` ends when the first step is under way; how long it then takes is not part of it.
"""

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

import harness

PARTS = ("imports", "data", "initialization", "compilation")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objective", choices=harness.OBJECTIVES, default="masked")
    parser.add_argument("--sizes", nargs="+", choices=harness.SIZES, default=list(harness.SIZES))
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    args = parser.parse_args()
    figures = {}
    columns = (*PARTS, "other", "all")
    print(
        f"seconds to the first step of {args.objective} language modeling, medians of {args.runs} runs"
    )
    print(f"{'':12}" + "".join(f"{name:>{len(name) + 3}}" for name in columns))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        text = harness.write_corpus(directory, 1)
        for size in args.sizes:
            vocab_size = {"small": 8000, "base": 50265}[size]
            model_type = harness.OBJECTIVES[args.objective][1]
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
                for kind in runs:
                    notes = harness.run(directory, script, flags)
                    other = notes["to_first_step"] - sum(notes[part] for part in PARTS)
                    runs[kind].append(
                        [*(notes[part] for part in PARTS), other, notes["to_first_step"]]
                    )
            for kind, found in runs.items():
                medians = [statistics.median(column) for column in zip(*found, strict=True)]
                figures[f"{size}, {kind}"] = dict(zip(columns, medians, strict=True))
                numbers = "".join(
                    f"{value:>{len(name) + 3}.1f}"
                    for name, value in zip(columns, medians, strict=True)
                )
                print(f"{size + ', ' + kind:12}{numbers}", flush=True)
            ratio = statistics.median(
                warm[-1] / cold[-1] for cold, warm in zip(*runs.values(), strict=True)
            )
            figures[f"{size}, ratio"] = ratio
            print(
                f"{size}: warm start takes {ratio:.0%} of the cold one, median of pairs", flush=True
            )
    harness.write_json(args.json, figures)


if __name__ == "__main__":
    main()
