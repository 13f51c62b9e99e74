#!/usr/bin/env python
"""Tokens a second that the collator of run_bart_dlm_flax.py noises on one core, beside a loop over rows and tokens.

    python benchmarks/bart_collator.py [--repetitions 200] [--json FILE]

Rows are full blocks out of documents of 400 tokens with sentences of 22, on average, noised with a fresh generator
each time, as in training. Figures are of CPU time, medians. The loop is the reference of tests/test_bart_objective.py.
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
from test_bart_objective import denoise_row, make_rows
from training_scripts import word_tokenizer

from run_bart_dlm_flax import FlaxDataCollatorForBartDenoisingLM

SHAPES = ((8, 128), (8, 1024), (32, 512), (32, 1024))


def median_seconds(function, repetitions: int) -> float:
    """CPU time of `function(repetition)`; the first tenth warms up."""
    times = []
    for repetition in range(repetitions + repetitions // 10):
        start = (
            time.thread_time()
        )  # which other processes do not slow down as they do the clock on the wall
        function(repetition)
        times.append(time.thread_time() - start)
    return statistics.median(times[repetitions // 10 :])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = word_tokenizer(Path(directory), num_words=20_000)
    figures = {
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    figures["million_tokens_per_second"] = {}
    print(f"{'rows x length':>14}{'collator':>12}{'by rows':>12}   million tokens a second")
    for rows, length in SHAPES:
        examples = make_rows(rows, length, sentence=22, document=400)
        collator = FlaxDataCollatorForBartDenoisingLM(tokenizer, length, decoder_start_token_id=2)
        plain = list(zip(*(array[:8].tolist() for array in examples.values()), strict=True))

        def fast(seed, examples=examples, collator=collator):
            collator(examples, np.random.Generator(np.random.PCG64(seed)))

        def slow(seed, plain=plain):
            rng = random.Random(seed)
            [denoise_row(*row, rng, 0.3, 1.0, 3.0) for row in plain]

        found = {
            "collator": rows * length / median_seconds(fast, args.repetitions) / 1e6,
            "by_rows": len(plain)
            * length
            / median_seconds(slow, max(3, args.repetitions // 20))
            / 1e6,
        }
        figures["million_tokens_per_second"][f"{rows}x{length}"] = {
            k: round(v, 3) for k, v in found.items()
        }
        print(f"{rows:>8} x {length:<4}{found['collator']:>11.1f}{found['by_rows']:>12.3f}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
