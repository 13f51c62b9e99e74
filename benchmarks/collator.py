#!/usr/bin/env python
"""Measure how fast the collators of the masked objectives work on one core.

    python benchmarks/collator.py [--repetitions 1000] [--json FILE]

Beside each collator stands a loop over rows and tokens, as simple as possible. A batch is that of
one device and has full rows, and each row has a generator, as in training.
Rows for run_mlm_flax.py have a special token at both ends. Rows for run_t5_mlm_flax.py have the
length that gives inputs of the length in the table. Figures are medians. They leave out the copy of
the tokens that a collator may overwrite.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from row_collators import corrupt_by_rows

from run_mlm_flax import FlaxDataCollatorForLanguageModeling, sequence_generators
from run_t5_mlm_flax import FlaxDataCollatorForT5MLM

SHAPES = ((8, 128), (64, 128), (32, 512))
T5_EOS_TOKEN_ID = 1
T5_FIRST_SENTINEL = 32099


class Tokenizer:
    """The part of RoBERTa's tokenizer that the collator uses."""

    all_special_ids = (0, 1, 2, 3, 50264)
    mask_token_id = 50264
    name_or_path = "as RoBERTa"

    def __len__(self) -> int:
        return 50265


class TokenizerOfT5:
    """The part of T5's tokenizer that the collator uses."""

    eos_token_id = T5_EOS_TOKEN_ID
    name_or_path = "as T5"

    def get_vocab(self):
        return {f"<extra_id_{i}>": T5_FIRST_SENTINEL - i for i in range(100)}


def mask_by_rows(
    input_ids: np.ndarray, tokenizer: Tokenizer, rng: np.random.Generator, probability: float = 0.15
) -> tuple[np.ndarray, np.ndarray]:
    """Mask tokens one at a time, as BERT does.

    Returns input ids and labels, each of the shape of `input_ids`. Labels are -100 at tokens that
    are not predicted.
    """
    masked_ids = input_ids.copy()
    labels = np.full_like(input_ids, -100)
    for row in range(input_ids.shape[0]):
        for position in range(input_ids.shape[1]):
            token = int(input_ids[row, position])
            if token in tokenizer.all_special_ids or rng.random() >= probability:
                continue
            labels[row, position] = token
            kind = rng.random()
            if kind < 0.8:
                masked_ids[row, position] = tokenizer.mask_token_id
            elif kind < 0.9:
                masked_ids[row, position] = rng.integers(len(tokenizer))
    return masked_ids, labels


def make_batch(
    rows: int, length: int, rng: np.random.Generator, whole_words: bool
) -> dict[str, np.ndarray]:
    """Make rows of random tokens, `[rows, length] int32`, between <s> and </s>."""
    input_ids = rng.integers(4, 50264, (rows, length), dtype=np.int32)
    input_ids[:, 0] = 0
    input_ids[:, -1] = 2
    batch = {
        "input_ids": input_ids,
        "attention_mask": np.ones_like(input_ids),
    }
    if whole_words:
        is_continuation = rng.random((rows, length)) < 0.25
        batch["continues_word"] = is_continuation.astype(np.int8)
    return batch


def make_rngs(repetition: int, rows: int):
    """Make generators as training does for the rows of a batch."""
    return sequence_generators((42, 1, repetition), np.arange(rows))


def median_seconds(prepare, repetitions: int) -> float:
    """Time the function that `prepare(repetition)` returns. The first tenth warms up."""
    num_warm_up = repetitions // 10 + 1
    seconds = []
    for repetition in range(-num_warm_up, repetitions):
        function = prepare(abs(repetition))
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[num_warm_up:])


def measure(rows: int, length: int, repetitions: int, whole_words: bool) -> float:
    """Measure the collator of run_mlm_flax.py in tokens per second."""
    collator = FlaxDataCollatorForLanguageModeling(Tokenizer(), length, 0.15, whole_words)
    batch = make_batch(rows, length, np.random.default_rng(0), whole_words)

    def prepare(repetition: int):
        examples = {name: array.copy() for name, array in batch.items()}
        return lambda: collator(examples, make_rngs(repetition, rows), group_size=rows)

    seconds = median_seconds(prepare, repetitions)
    return rows * length / seconds


def measure_by_rows(rows: int, length: int, repetitions: int) -> float:
    """Measure the loop for masked language modeling in tokens per second."""
    batch = make_batch(rows, length, np.random.default_rng(0), whole_words=False)

    def prepare(repetition: int):
        rng = np.random.default_rng(repetition)
        return lambda: mask_by_rows(batch["input_ids"], Tokenizer(), rng)

    seconds = median_seconds(prepare, max(3, repetitions // 100))
    return rows * length / seconds


def measure_t5(rows: int, length: int, repetitions: int) -> tuple[float, float]:
    """Measure the collator of run_t5_mlm_flax.py and its loop in tokens per second."""
    collator = FlaxDataCollatorForT5MLM(TokenizerOfT5(), length)
    shape = (rows, collator.max_length)
    input_ids = np.random.default_rng(0).integers(3, 32000, shape, dtype=np.int32)

    def prepare(repetition: int):
        return lambda: collator({"input_ids": input_ids}, make_rngs(repetition, rows))

    def prepare_by_rows(repetition: int):
        rng = np.random.default_rng(repetition)
        counts = (collator.num_noise, collator.num_spans)
        sentinels = collator.sentinels.tolist()
        return lambda: corrupt_by_rows(input_ids, *counts, sentinels, T5_EOS_TOKEN_ID, rng)

    by_rows_seconds = median_seconds(prepare_by_rows, max(3, repetitions // 100))
    seconds = median_seconds(prepare, repetitions)
    return input_ids.size / seconds, input_ids.size / by_rows_seconds


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()

    # Run on one core.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

    columns = ("MLM", "whole words", "by rows", "T5", "by rows")
    header = "".join(f"{name:>14}" for name in columns)
    print(f"{'rows x length':>14}{header}   million tokens per second")
    rates = {}
    for rows, length in SHAPES:
        t5, t5_by_rows = measure_t5(rows, length, args.repetitions)
        tokens_per_second = {
            "collator": measure(rows, length, args.repetitions, whole_words=False),
            "whole_words": measure(rows, length, args.repetitions, whole_words=True),
            "by_rows": measure_by_rows(rows, length, args.repetitions),
            "t5": t5,
            "t5_by_rows": t5_by_rows,
        }
        found = {name: rate / 1e6 for name, rate in tokens_per_second.items()}
        rates[f"{rows}x{length}"] = {name: round(rate, 3) for name, rate in found.items()}
        numbers = "".join(f"{rate:>14.2f}" for rate in found.values())
        print(f"{rows:>8} x {length:<3}{numbers}")
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
