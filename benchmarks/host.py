#!/usr/bin/env python
"""What the host does before and between steps: tokens a second of each objective, and the tokenizer's share.

    python benchmarks/host.py [--megabytes 4] [--rows 64] [--length 128] [--repetitions 5] [--json FILE]

In one process without parallel tokenizing, on Python's documentation. Columns, medians:

    tokenizer   the tokenizer's own call on the texts, a thousand at a time
    prepared    texts to sequences as the script makes them: tokenized, stored, read in bulk, cut into blocks
    share       of the tokenizer's calls in the time of `prepared`, by a clock around each of them
    batches     permuted, gathered, masked and laid out for the devices, beside the same of rows taken one by one and
                masked by loops (benchmarks/collator.py and bart_collator.py have the collators alone)
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from unittest import mock

os.environ |= {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
import datasets
import harness
import numpy as np

sys.path.insert(0, str(harness.ROOT / "tests"))


class Captured(Exception):
    """What `main` had in hand when it came to its first batch."""


def capture(script, flags: list[str]) -> dict:
    """The arguments of `tokenize` and `train_batches` in a run."""
    found, tokenize = {}, script.tokenize

    def noted(*args):
        found.setdefault("tokenize", args)
        return tokenize(*args)

    def stop(*args):
        found["train_batches"] = args
        raise Captured

    script.set_up = lambda args: None  # which would log
    train_batches, script.tokenize, script.train_batches = script.train_batches, noted, stop
    try:
        script.main(script.parse_args(flags))
    except Captured:
        return found
    finally:
        script.tokenize, script.train_batches = tokenize, train_batches
    raise AssertionError("the run asked for no batch")


def batch_by_rows(objective: str, collator, rows: list[list[int]], seed: int):
    """A batch in the plainest words, of the references of the tests."""
    rng = np.random.default_rng(seed)
    if objective == "causal":
        return np.array([list(row) for row in rows]), np.array([list(row) for row in rows])
    if objective == "masked":
        from collator import mask_by_rows

        return mask_by_rows(np.array(rows, np.int32), collator.tokenizer, rng)
    if objective == "span-masked":
        from collator import corrupt_by_rows

        return corrupt_by_rows(
            np.array(rows, np.int32), collator.num_noise, collator.num_spans, rng
        )
    from test_bart_objective import denoise_row

    starts = [[1] + [0] * (len(row) - 1) for row in rows]  # each row one sentence
    return [
        denoise_row(*row, random.Random(seed), 0.3, 1.0, 3.0)
        for row in zip(rows, starts, strict=True)
    ]


def median_seconds(function, repetitions: int) -> float:
    seconds = []
    for repetition in range(repetitions + 1):
        begin = time.perf_counter()
        function(repetition)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def measure(args, directory: Path, objective: str) -> dict:
    text = harness.write_corpus(directory, args.megabytes)
    folder = harness.write_model(
        directory, text, harness.OBJECTIVES[objective][1], "small", args.length, 8000
    )
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
    found = capture(script, flags)
    dataset, tokenizer = found["tokenize"][:2]
    sequences, collator, seed, _, shape = found["train_batches"]
    texts = [row["text"] for row in dataset if row["text"].strip()]
    num_tokens = len(sequences.input_ids)

    def call_tokenizer(_):
        return [
            tokenizer(texts[i : i + 1000], return_attention_mask=False, verbose=False)["input_ids"]
            for i in range(0, len(texts), 1000)
        ]

    def batches(repetition):
        steps = range(repetition * count, (repetition + 1) * count)
        for _ in script.train_batches(sequences, collator, seed, steps, shape):
            pass

    count = max(1, min(50, len(sequences.ends) // args.rows))

    def prepare(_):
        call, begin, within = type(tokenizer).__call__, time.perf_counter(), []

        def timed(*args, **kwargs):
            begin = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                within.append(time.perf_counter() - begin)

        with mock.patch.object(type(tokenizer), "__call__", timed):
            script.tokenize(*found["tokenize"])
        shares.append(sum(within) / (time.perf_counter() - begin))

    shares = []
    alone = median_seconds(call_tokenizer, args.repetitions)
    prepared = median_seconds(prepare, args.repetitions)
    ends = sequences.ends[:8].tolist()
    length = ends[1] - ends[0]  # in the data: T5's is longer than its inputs
    rows = [sequences.input_ids[end - length : end].tolist() for end in ends]
    by_rows = median_seconds(
        lambda seed: batch_by_rows(objective, collator, rows, seed), args.repetitions
    )
    return {
        "tokenizer": num_tokens / alone,
        "prepared": num_tokens / prepared,
        "share": statistics.median(shares[1:]),
        "batches": count * args.rows * length / median_seconds(batches, args.repetitions),
        "batches_by_rows": len(rows) * length / by_rows,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--objectives", nargs="+", choices=harness.OBJECTIVES, default=list(harness.OBJECTIVES)
    )
    parser.add_argument("--megabytes", type=float, default=4)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    figures, kinds = {}, ("tokenizer", "prepared", "batches", "batches_by_rows")
    print(
        f"million tokens a second, {args.rows} x {args.length} a batch, medians of {args.repetitions}"
    )
    print(f"{'':12}{'tokenizer':>12}{'prepared':>12}{'share':>8}{'batches':>12}{'by rows':>12}")
    with tempfile.TemporaryDirectory() as name:
        os.environ["HF_DATASETS_CACHE"] = f"{name}/datasets"
        for objective in args.objectives:
            found = figures[objective] = measure(args, Path(name), objective)
            alone, prepared, batches, by_rows = (found[kind] / 1e6 for kind in kinds)
            print(
                f"{objective:12}{alone:12.2f}{prepared:12.2f}{found['share']:8.0%}{batches:12.1f}{by_rows:12.2f}"
            )
    harness.write_json(args.json, figures)


if __name__ == "__main__":
    main()
