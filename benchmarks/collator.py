#!/usr/bin/env python
"""Tokens a second that the collators mask on one core, beside loops over rows and tokens in the plainest words.

    python benchmarks/collator.py [--repetitions 1000] [--json FILE]

Batches are of one device, of full rows, masked with a fresh generator each, as in training: for run_mlm_flax.py with
a special token at both ends, for run_t5_mlm_flax.py of the length that makes inputs of the length given. Figures are
medians; the copy of the tokens that the collator may overwrite is not in them.
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
from run_mlm_flax import FlaxDataCollatorForLanguageModeling
from run_t5_mlm_flax import FlaxDataCollatorForT5MLM

SHAPES = ((8, 128), (64, 128), (32, 512))


class Tokenizer:
    """What the collator needs of RoBERTa's."""

    all_special_ids = (0, 1, 2, 3, 50264)
    mask_token_id = 50264
    name_or_path = "as RoBERTa"

    def __len__(self):
        return 50265


class TokenizerOfT5:
    eos_token_id = 1
    name_or_path = "as T5"

    def get_vocab(self):
        return {f"<extra_id_{i}>": 32099 - i for i in range(100)}


def mask_by_rows(
    input_ids: np.ndarray, tokenizer: Tokenizer, rng: np.random.Generator, probability: float = 0.15
):
    """The objective in the plainest words: one row and one token after the other."""
    shown, labels = input_ids.copy(), np.full_like(input_ids, -100)
    for row in range(input_ids.shape[0]):
        for position in range(input_ids.shape[1]):
            token = int(input_ids[row, position])
            if token not in tokenizer.all_special_ids and rng.random() < probability:
                labels[row, position], kind = token, rng.random()
                if kind < 0.8:
                    shown[row, position] = tokenizer.mask_token_id
                elif kind < 0.9:
                    shown[row, position] = rng.integers(len(tokenizer))
    return shown, labels


def random_composition(total: int, parts: int, rng: np.random.Generator) -> list[int]:
    ends = np.sort(1 + rng.choice(total - 1, parts - 1, replace=False))
    return np.diff(ends, prepend=0, append=total).tolist()


def corrupt_by_rows(rows: np.ndarray, num_noise: int, num_spans: int, rng: np.random.Generator):
    """T5's objective in the plainest words."""
    inputs, targets = [], []
    for row in rows.tolist():
        plain = random_composition(len(row) - num_noise, num_spans, rng)
        noise = random_composition(num_noise, num_spans, rng)
        inputs.append([])
        targets.append([])
        tokens = iter(row)
        for number in range(num_spans):
            for _ in range(plain[number]):
                inputs[-1].append(next(tokens))
            inputs[-1].append(32099 - number)
            targets[-1].append(32099 - number)
            for _ in range(noise[number]):
                targets[-1].append(next(tokens))
        inputs[-1].append(1)
        targets[-1].append(1)
    labels = np.array(targets, np.int32)
    return (
        np.array(inputs, np.int32),
        labels,
        np.concatenate([np.zeros_like(labels[:, :1]), labels[:, :-1]], axis=1),
    )


def make_batch(
    rows: int, length: int, rng: np.random.Generator, whole_words: bool
) -> dict[str, np.ndarray]:
    input_ids = rng.integers(4, 50264, (rows, length), dtype=np.int32)
    input_ids[:, 0], input_ids[:, -1] = 0, 2
    batch = {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids)}
    if whole_words:
        batch["continues_word"] = (rng.random((rows, length)) < 0.25).astype(np.int8)
    return batch


def median_seconds(function, repetitions: int) -> float:
    """`function(repetition)` returns what to time; the first tenth warms up."""
    times = []
    for repetition in range(-(repetitions // 10) - 1, repetitions):
        timed = function(abs(repetition))
        start = time.perf_counter()
        timed()
        times.append(time.perf_counter() - start)
    return statistics.median(times[repetitions // 10 + 1 :])


def measure(rows: int, length: int, repetitions: int, whole_words: bool) -> float:
    collator = FlaxDataCollatorForLanguageModeling(Tokenizer(), length, 0.15, whole_words)
    batch = make_batch(rows, length, np.random.default_rng(0), whole_words)

    def prepare(repetition):
        examples = {name: array.copy() for name, array in batch.items()}
        rng = np.random.Generator(np.random.PCG64((42, 1, repetition)))
        return lambda: collator(examples, rng, group_size=rows)

    return rows * length / median_seconds(prepare, repetitions)


def measure_by_rows(rows: int, length: int, repetitions: int) -> float:
    batch = make_batch(rows, length, np.random.default_rng(0), whole_words=False)

    def prepare(repetition):
        rng = np.random.default_rng(repetition)
        return lambda: mask_by_rows(batch["input_ids"], Tokenizer(), rng)

    return rows * length / median_seconds(prepare, max(3, repetitions // 100))


def measure_t5(rows: int, length: int, repetitions: int) -> tuple[float, float]:
    """Of the collator, and of the loop over rows."""
    collator = FlaxDataCollatorForT5MLM(TokenizerOfT5(), length)
    input_ids = np.random.default_rng(0).integers(
        3, 32000, (rows, collator.max_length), dtype=np.int32
    )

    def prepare(repetition):
        rng = np.random.Generator(np.random.PCG64((42, 1, repetition)))
        return lambda: collator({"input_ids": input_ids}, rng)

    def prepare_by_rows(repetition):
        rng = np.random.default_rng(repetition)
        return lambda: corrupt_by_rows(input_ids, collator.num_noise, collator.num_spans, rng)

    by_rows = median_seconds(prepare_by_rows, max(3, repetitions // 100))
    return input_ids.size / median_seconds(prepare, repetitions), input_ids.size / by_rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    figures = {
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    figures["million_tokens_per_second"] = {}
    columns = ("MLM", "whole words", "by rows", "T5", "by rows")
    print(
        f"{'rows x length':>14}{''.join(f'{name:>14}' for name in columns)}   million tokens a second"
    )
    for rows, length in SHAPES:
        found = {
            "collator": measure(rows, length, args.repetitions, whole_words=False) / 1e6,
            "whole_words": measure(rows, length, args.repetitions, whole_words=True) / 1e6,
            "by_rows": measure_by_rows(rows, length, args.repetitions) / 1e6,
        }
        found["t5"], found["t5_by_rows"] = (
            rate / 1e6 for rate in measure_t5(rows, length, args.repetitions)
        )
        figures["million_tokens_per_second"][f"{rows}x{length}"] = {
            k: round(v, 3) for k, v in found.items()
        }
        print(f"{rows:>8} x {length:<3}{''.join(f'{rate:>14.2f}' for rate in found.values())}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
