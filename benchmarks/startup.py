#!/usr/bin/env python
"""Measure the seconds from the command to the first step, with a cold and a warm cache.

    python benchmarks/startup.py [--objective masked] [--sizes small base] [--runs 3] [--json FILE]
    python benchmarks/startup.py --smoke [--runs 3] [--json FILE]

The cache is that of compiled programs. Whole runs of a script over a megabyte of text alternate:
one with an empty cache, then one with the cache that the former has filled. All runs tokenize the
texts again. Figures are medians of the runs. `other` is the start of Python and of the devices, and
the setup between the parts. `all` ends when the first step is dispatched, and does not include the
time of that step.

With --smoke: whole runs of each script as a CI job would do them, two steps of a tiny model with no
config file and an evaluation, cold (nothing is cached) and warm. Then `save` is the time of writing
the checkpoint and the model, `all` that of the process, and `cpu` its CPU time, user and system, on
all cores. CPU time is the one to compare where other work runs on the machine.
"""

import argparse
import resource
import shutil
import statistics
import tempfile
from pathlib import Path

import harness

PARTS = ("imports", "data", "initialization", "compilation")
COLUMNS = (*PARTS, "other", "all")
WIDTHS = {column: len(column) + 3 for column in COLUMNS}  # characters
VOCAB_SIZES = {"small": 8000, "base": 50265}
SMOKE_COLUMNS = (*PARTS, "save", "other", "all", "cpu")
# A tiny model of each family, as --config_overrides.
TINY = {
    "roberta": "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32",
    "gpt2": "n_embd=16,n_layer=1,n_head=2",
    "t5": "d_model=16,d_kv=8,d_ff=32,num_layers=1,num_heads=2",
    "bart": "d_model=16,encoder_layers=1,decoder_layers=1,encoder_attention_heads=2,"
    "decoder_attention_heads=2,encoder_ffn_dim=32,decoder_ffn_dim=32",
}


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


def child_cpu_seconds() -> float:
    """CPU time of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def smoke_run(directory: Path, script: str, flags: list[str]) -> dict[str, float]:
    """Run a script to its end and return the seconds of each of SMOKE_COLUMNS."""
    cpu_before = child_cpu_seconds()
    notes = harness.run(directory, script, flags, flops=False)
    found = {part: notes[part] for part in (*PARTS, "save")}
    found["other"] = notes["process"] - sum(found.values())
    found["all"] = notes["process"]
    found["cpu"] = child_cpu_seconds() - cpu_before
    return found


def smoke(args, directory: Path) -> dict:
    """Print the medians of smoke runs of each script, cold and warm, and return the figures."""
    widths = {column: len(column) + 3 for column in SMOKE_COLUMNS}
    header = "".join(f"{column:>{width}}" for column, width in widths.items())
    print(f"seconds of a smoke run, medians of {args.runs} runs\n{'':30}{header}")
    text = harness.write_corpus(directory, 0.1)
    scripts = {objective.script: name for name, objective in harness.OBJECTIVES.items()}
    scripts["run_mlm_flax_stream.py"] = "masked"
    figures = {}
    for script, objective in scripts.items():
        model_type = harness.OBJECTIVES[objective].model_type
        folder = harness.write_model(directory, text, model_type, "small", 32, 500)
        flags = {"max_steps": 2, "config_overrides": f"{TINY[model_type]},vocab_size=700"}
        flags |= {"validation_file": text, "max_eval_samples": 16, "do_eval": True}
        if "stream" in script:
            flags["num_eval_samples"] = 16
        _, words = harness.command(objective, folder, text, directory / "out", 2, 32, **flags)
        words = [word for word in words if not word.startswith("--config_name=")]
        runs = {"cold": [], "warm": []}
        for _ in range(args.runs):
            for cache in ("compiled", "datasets"):
                shutil.rmtree(directory / cache, ignore_errors=True)
            for found in runs.values():
                found.append(smoke_run(directory, script, words))
        for cache, found in runs.items():
            name = f"{script}, {cache}"
            medians = {
                column: statistics.median(run[column] for run in found) for column in SMOKE_COLUMNS
            }
            figures[name] = medians
            cells = [f"{medians[column]:>{width}.1f}" for column, width in widths.items()]
            print(f"{name:30}{''.join(cells)}", flush=True)
    return figures


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
    parser.add_argument(
        "--smoke", action="store_true", help="whole runs of two steps of each script instead"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()

    if args.smoke:
        with tempfile.TemporaryDirectory() as directory:
            harness.write_json(args.json, smoke(args, Path(directory)))
        return

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
