#!/usr/bin/env python
"""Measure how fast the collator of run_bart_dlm_flax.py noises tokens on one core.

    python benchmarks/bart_collator.py [--repetitions 200] [--json FILE]

Beside the collator stands a loop over rows and tokens, the reference implementation of
tests/bart_reference.py. Rows are full blocks from documents of 400 tokens on average, with
sentences of 22 tokens on average. Each row has a generator, as in training.
Figures are medians of CPU time.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from bart_reference import denoise_row, make_rows
from training_scripts import word_tokenizer

from run_bart_dlm_flax import FlaxDataCollatorForBartDenoisingLM, sequence_generators

SHAPES = ((8, 128), (8, 1024), (32, 512), (32, 1024))
NUM_ROWS = 8  # rows for the loop


def median_seconds(function, repetitions: int) -> float:
    """Measure the CPU time of `function(repetition)`. The first tenth of the calls warms up.

    Other processes slow down the CPU time of a thread much less than they slow down the wall clock.
    """
    num_warm_up = repetitions // 10
    seconds = []
    for repetition in range(repetitions + num_warm_up):
        begin = time.thread_time()
        function(repetition)
        seconds.append(time.thread_time() - begin)
    return statistics.median(seconds[num_warm_up:])


def measure(tokenizer, rows: int, length: int, repetitions: int) -> dict[str, float]:
    """Measure both ways on batches of one shape, in million tokens per second."""
    examples = make_rows(rows, length, sentence=22, document=400)
    collator = FlaxDataCollatorForBartDenoisingLM(tokenizer, length, decoder_start_token_id=2)
    columns = [array[:NUM_ROWS].tolist() for array in examples.values()]
    plain_rows = list(zip(*columns, strict=True))

    def noise(seed: int):
        collator(examples, sequence_generators((42, 1, seed), np.arange(rows)))

    def noise_by_rows(seed: int):
        rng = random.Random(seed)
        for row in plain_rows:
            denoise_row(*row, rng, 0.3, 1.0, 3.0)

    seconds = median_seconds(noise, repetitions)
    seconds_by_rows = median_seconds(noise_by_rows, max(3, repetitions // 20))
    return {
        "collator": rows * length / seconds / 1e6,
        "by_rows": len(plain_rows) * length / seconds_by_rows / 1e6,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()

    # Run on one core.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = word_tokenizer(Path(directory), num_words=20_000)

    rates = {}
    print(f"{'rows x length':>14}{'collator':>12}{'by rows':>12}   million tokens per second")
    for rows, length in SHAPES:
        found = measure(tokenizer, rows, length, args.repetitions)
        rates[f"{rows}x{length}"] = {name: round(rate, 3) for name, rate in found.items()}
        print(f"{rows:>8} x {length:<4}{found['collator']:>11.1f}{found['by_rows']:>12.3f}")
    if args.json:
        figures = {
            "numpy": np.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "million_tokens_per_second": rates,
        }
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
