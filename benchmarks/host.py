#!/usr/bin/env python
"""Measure the work of the host before and between steps, for each objective.

    python benchmarks/host.py [--megabytes 4] [--rows 64] [--length 128] [--repetitions 5]
        [--objectives masked causal span-masked denoising] [--json FILE]

Everything runs in one process, without parallel tokenization, on Python's documentation. Columns,
in million tokens per second except for `share`, medians:

    tokenizer   the tokenizer's own call on the texts, a thousand at a time
    prepared    from texts to sequences as the script makes them: tokenize, store, read back, cut
    share       fraction of the time of `prepared` that is spent in the tokenizer's calls
    batches     permute, gather, mask, and lay out batches for the devices
    by rows     take rows one by one and mask them in loops

benchmarks/collator.py and benchmarks/bart_collator.py measure the collators alone.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from unittest import mock

os.environ |= {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
import datasets
import harness
import numpy as np

sys.path.insert(0, str(harness.ROOT / "tests"))
MAX_STEPS = 50  # batches in a repetition
NUM_ROWS = 8  # rows for the loops


class Captured(Exception):
    """Ends a run at its first batch."""


def capture(script, flags: list[str]) -> dict[str, tuple]:
    """Run a script up to its first batch, and return the arguments of two of its functions.

    These are the first call of `tokenize`, which is for the training data, and the call of
    `train_batches`.
    """
    found = {}
    tokenize = script.tokenize

    def keep_settings(args):
        """Keep the run from logging and from handling signals."""
        return nullcontext(mock.Mock(received=0, agreed=0))

    def recorded_tokenize(*args):
        found.setdefault("tokenize", args)
        return tokenize(*args)

    def stop(*args):
        found["train_batches"] = args
        raise Captured

    replacements = {
        "process_settings": keep_settings,
        "tokenize": recorded_tokenize,
        "train_batches": stop,
    }
    with mock.patch.multiple(script, **replacements):
        try:
            script.main(flags)
        except Captured:
            return found
    raise AssertionError("the run asked for no batch")


def batch_by_rows(objective: str, collator, rows: list[list[int]], seed: int):
    """Make a batch in loops, with the reference implementations of the tests."""
    rng = np.random.default_rng(seed)
    if objective == "causal":
        input_ids = np.array([list(row) for row in rows])
        labels = np.array([list(row) for row in rows])
        return input_ids, labels
    if objective == "masked":
        from collator import mask_by_rows

        return mask_by_rows(np.array(rows, np.int32), collator.tokenizer, rng)
    if objective == "span-masked":
        from row_collators import corrupt_by_rows

        counts = (collator.num_noise, collator.num_spans)
        ids = (collator.sentinels.tolist(), collator.eos_token_id)
        return corrupt_by_rows(np.array(rows, np.int32), *counts, *ids, rng)
    from bart_reference import denoise_row

    noised = []
    for row in rows:
        # Each row is one sentence.
        sentence_starts = [1] + [0] * (len(row) - 1)
        noised.append(denoise_row(row, sentence_starts, random.Random(seed), 0.3, 1.0, 3.0))
    return noised


def median_seconds(function, repetitions: int) -> float:
    """Time `function(repetition)`. A first call warms up."""
    seconds = []
    for repetition in range(repetitions + 1):
        begin = time.perf_counter()
        function(repetition)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def capture_run(args, directory: Path, objective: str) -> tuple:
    """Run an objective's script up to its first batch; return the script and what was captured."""
    text = harness.write_corpus(directory, args.megabytes)
    model_type = harness.OBJECTIVES[objective].model_type
    folder = harness.write_model(directory, text, model_type, "small", args.length, 8000)
    name, flags = harness.command(
        objective,
        folder,
        text,
        directory / "out",
        args.rows,
        args.length,
        overwrite_cache=True,
        max_steps=1,
    )
    script = import_module(name.removesuffix(".py"))
    return script, capture(script, flags)


def time_tokenizer(tokenizer, dataset, repetitions: int) -> float:
    """Seconds of the tokenizer's own call on all texts, a thousand at a time."""
    texts = [row["text"] for row in dataset if row["text"].strip()]

    def call_tokenizer(_):
        # All results are kept to the end, as a caller who needs them would.
        encoded = []
        for start in range(0, len(texts), 1000):
            batch = texts[start : start + 1000]
            result = tokenizer(batch, return_attention_mask=False, verbose=False)
            encoded.append(result["input_ids"])
        return encoded

    return median_seconds(call_tokenizer, repetitions)


def time_preparation(script, tokenize_args: tuple, repetitions: int) -> tuple[float, float]:
    """Seconds of the script's `tokenize`, and the fraction spent in the tokenizer's calls."""
    tokenizer_class = type(tokenize_args[1])
    call = tokenizer_class.__call__
    shares = []

    def prepare(_):
        begin = time.perf_counter()
        call_seconds = []

        def timed_call(*args, **kwargs):
            call_begin = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                call_seconds.append(time.perf_counter() - call_begin)

        with mock.patch.object(tokenizer_class, "__call__", timed_call):
            script.tokenize(*tokenize_args)
        shares.append(sum(call_seconds) / (time.perf_counter() - begin))

    seconds = median_seconds(prepare, repetitions)
    # The first is the warm-up.
    return seconds, statistics.median(shares[1:])


def measure(args, directory: Path, objective: str) -> dict[str, float]:
    """Measure an objective: tokens per second, and the tokenizer's share."""
    script, captured = capture_run(args, directory, objective)
    dataset, tokenizer = captured["tokenize"][:2]
    sequences, collator, seed, _, shape = captured["train_batches"]
    num_tokens = len(sequences.input_ids)
    num_steps = max(1, min(MAX_STEPS, len(sequences) // args.rows))

    # T5's sequences in the data are longer than its inputs, so the length is not args.length.
    length = sequences.max_length
    starts = np.arange(min(NUM_ROWS, len(sequences))) * length
    rows = sequences.input_ids.read(starts, length).tolist()

    def make_batches(repetition: int):
        steps = range(repetition * num_steps, (repetition + 1) * num_steps)
        for _ in script.train_batches(sequences, collator, seed, steps, shape):
            pass

    def make_batch_by_rows(repetition: int):
        batch_by_rows(objective, collator, rows, seed=repetition)

    tokenizer_seconds = time_tokenizer(tokenizer, dataset, args.repetitions)
    prepared_seconds, share = time_preparation(script, captured["tokenize"], args.repetitions)
    by_rows_seconds = median_seconds(make_batch_by_rows, args.repetitions)
    batches_seconds = median_seconds(make_batches, args.repetitions)
    return {
        "tokenizer": num_tokens / tokenizer_seconds,
        "prepared": num_tokens / prepared_seconds,
        "share": share,
        "batches": num_steps * args.rows * length / batches_seconds,
        "batches_by_rows": len(rows) * length / by_rows_seconds,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    objectives = list(harness.OBJECTIVES)
    parser.add_argument("--objectives", nargs="+", choices=objectives, default=objectives)
    parser.add_argument("--megabytes", type=float, default=4, help="size of the text")
    parser.add_argument("--rows", type=int, default=64, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()

    datasets.disable_progress_bars()
    batch = f"{args.rows} x {args.length} a batch"
    print(f"million tokens per second, {batch}, medians of {args.repetitions}")
    print(f"{'':12}{'tokenizer':>12}{'prepared':>12}{'share':>8}{'batches':>12}{'by rows':>12}")
    figures = {}
    with tempfile.TemporaryDirectory() as directory:
        os.environ["HF_DATASETS_CACHE"] = f"{directory}/datasets"
        for objective in args.objectives:
            found = measure(args, Path(directory), objective)
            figures[objective] = found
            columns = (
                f"{objective:12}",
                f"{found['tokenizer'] / 1e6:12.2f}",
                f"{found['prepared'] / 1e6:12.2f}",
                f"{found['share']:8.0%}",
                f"{found['batches'] / 1e6:12.1f}",
                f"{found['batches_by_rows'] / 1e6:12.2f}",
            )
            print("".join(columns))
    harness.write_json(args.json, figures)


if __name__ == "__main__":
    main()
