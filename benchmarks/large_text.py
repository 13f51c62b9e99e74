#!/usr/bin/env python
"""Measure the memory of whole runs over texts of several sizes, cold and warm, and of two runs.

    python benchmarks/large_text.py [--objective masked] [--megabytes 1 100] [--json FILE]

Each run of a script trains a tiny model for some steps over the whole of a text. The text is a
megabyte of Python's documentation, repeated with changed words. The first run of a size tokenizes
the text, and the second one starts from the stored tokens. Then two runs over the same text work
side by side. The figures are peaks in MB, from /proc/PID/smaps_rollup:

    own     anonymous memory, also swapped: it belongs to the process alone
    pages   what is mapped from files: the kernel shares it between processes and may drop it
    both    proportional set size of two processes that run side by side: a page that both have
            mapped counts half for each
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import harness

STEPS = 20
ROWS = 64
WORDS = 2000  # changed words that there are


def write_text(directory: Path, megabytes: float) -> Path:
    """Write a text of this size: a megabyte repeated, each time with every eighth word changed."""
    seed_text = harness.write_corpus(directory, min(megabytes, 1))
    lines = [line.split(" ") for line in seed_text.read_text("utf-8").splitlines()]
    path = directory / f"repeated-{megabytes:g}.txt"
    size = 0
    repetition = 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            changed = []
            for number, words in enumerate(lines):
                words = words.copy()
                for place in range((number + repetition) % 8, len(words), 8):
                    words[place] = f"word{(number * repetition + place) % WORDS}"
                changed.append(" ".join(words))
            text = "\n".join(changed) + "\n"
            file.write(text)
            size += len(text.encode())
            repetition += 1
    return path


def read_memory(pid: int) -> dict[str, float]:
    """Memory of a process in MB, by the names of the kernel. Empty if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except (OSError, ValueError):
        return {}
    values = {}
    for line in lines:
        name, value = line.split()[:2]
        values[name.rstrip(":")] = int(value) * 1024 / 1e6
    return values


def watch(processes: list) -> dict[str, float]:
    """Wait for the processes, and return the peaks of one process, and of the sum of all."""
    peaks = {"own": 0.0, "pages": 0.0, "both": 0.0}
    while any(process.poll() is None for process in processes):
        found = [memory for process in processes if (memory := read_memory(process.pid))]
        for memory in found:
            own = memory["Anonymous"] + memory["Swap"]
            peaks["own"] = max(peaks["own"], own)
            peaks["pages"] = max(peaks["pages"], memory["Rss"] - memory["Anonymous"])
        peaks["both"] = max(peaks["both"], sum(memory["Pss"] for memory in found))
        time.sleep(0.05)
    return peaks


def run(directory: Path, script: str, flags: list[list[str]]) -> dict[str, float]:
    """Run a script once for each list of flags, side by side, and return the peaks and the time.

    If a run fails, exit with its error.
    """
    begin = time.perf_counter()
    processes = []
    for number, some_flags in enumerate(flags):
        errors = (directory / f"errors-{number}").open("w")
        env = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(directory / "datasets"),
            "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled"),
        }
        command = [sys.executable, str(harness.ROOT / script), *some_flags]
        processes.append(harness.subprocess.Popen(command, env=env, stderr=errors))
    peaks = watch(processes)
    for number, process in enumerate(processes):
        if process.returncode:
            sys.exit((directory / f"errors-{number}").read_text())
    return peaks | {"seconds": time.perf_counter() - begin}


def measure(args, directory: Path, megabytes: float) -> dict[str, dict[str, float]]:
    """Measure a cold run, a warm one, and two at once over a text of this size."""
    objective = harness.OBJECTIVES[args.objective]
    text = write_text(directory, megabytes)
    seed_text = harness.write_corpus(directory, min(args.megabytes))
    folder = directory / f"{objective.model_type}-small-{args.length}"
    if not folder.exists():
        harness.write_model(directory, seed_text, objective.model_type, "small", args.length, 2000)

    def flags_of(number: int) -> list[str]:
        _, flags = harness.command(
            args.objective,
            folder,
            text,
            directory / f"out-{number}",
            ROWS,
            args.length,
            max_steps=STEPS,
            **({"line_by_line": True} if args.lines else {}),
        )
        return flags

    found = {"cold": run(directory, objective.script, [flags_of(0)])}
    found["warm"] = run(directory, objective.script, [flags_of(0)])
    found["two"] = run(directory, objective.script, [flags_of(0), flags_of(1)])
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--objective",
        choices=harness.OBJECTIVES,
        default="masked",
        help="objective of the script that runs",
    )
    parser.add_argument(
        "--megabytes", nargs="+", type=float, default=[1, 100], help="sizes of the text"
    )
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--lines", action="store_true", help="a line is a sequence (masked only)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()

    print(f"peak memory in MB of {args.objective} language modeling, {STEPS} steps")
    print(f"{'':16}{'own':>8}{'pages':>8}{'both':>8}{'seconds':>9}")
    figures = {}
    with tempfile.TemporaryDirectory() as directory:
        for megabytes in args.megabytes:
            for name, found in measure(args, Path(directory), megabytes).items():
                label = f"{megabytes:g} MB, {name}"
                figures[label] = found
                both = f"{found['both']:8.0f}" if name == "two" else " " * 8
                cells = f"{found['own']:8.0f}{found['pages']:8.0f}{both}{found['seconds']:9.1f}"
                print(f"{label:16}{cells}", flush=True)
    harness.write_json(args.json, figures)


if __name__ == "__main__":
    main()
