#!/usr/bin/env python
"""A whole run of run_mlm_flax.py beside the same script made simple: full head, loops over rows, nothing ahead.

    python benchmarks/whole_run.py [--runs 5] [--vocab_sizes 8000 30522] [--json FILE]

Both train a RoBERTa of 2 layers of width 128 for one epoch over a megabyte of text, 8 x 128 tokens a step, evaluate
once and save once, by turns, with vocabularies of 8,000 tokens and of BERT's 30,522; time is that of the process. The
simple one (`simplify`) puts in place of the script's functions: the loss over the one-hot labels of all positions,
masking row by row and token by token, a fresh batch when the step before is done, and an initialization that is not
compiled. Both have an empty cache of compiled programs in the first pair; the medians are of the pairs after it, as in
daily work.
"""

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

import harness
import numpy as np


def simplify(script):
    """Replaces functions of run_mlm_flax.py by the plainest ones that do the same."""
    import jax
    import jax.numpy as jnp
    import optax

    def loss_sums(params, batch, model, num_slots, dropout_rng=None):
        train = dropout_rng is not None
        inputs = batch["input_ids"], batch["attention_mask"]
        logits = model(*inputs, params=params, dropout_rng=dropout_rng, train=train).logits.astype(
            jnp.float32
        )
        predicted = batch["labels"] != script.IGNORE
        labels = jnp.where(predicted, batch["labels"], 0)
        losses = optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1]))
        sums = {
            "loss": jnp.where(predicted, losses, 0).sum(),
            "predicted": predicted.sum(dtype=jnp.float32),
        }
        if not train:
            sums["accuracy"] = (predicted & (logits.argmax(-1) == labels)).sum(dtype=jnp.float32)
        return sums["loss"], sums

    def mask(self, examples, rng, group_size):
        from collator import mask_by_rows

        shown, labels = mask_by_rows(
            examples["input_ids"], self.tokenizer, rng, self.mlm_probability
        )
        return {**examples, "input_ids": shown, "labels": labels}

    jit = jax.jit

    def init_without_jit(*args, **kwargs):
        plain = args and getattr(args[0], "__name__", "") == "init_weights"
        return args[0] if plain else jit(*args, **kwargs)

    script.loss_sums = loss_sums
    script.FlaxDataCollatorForLanguageModeling.__call__ = mask
    script.prefetch = lambda batches, *args, **kwargs: map(script.shard, batches)
    load_model = script.load_model

    def load_slowly(*args):
        jax.jit = init_without_jit
        try:
            return load_model(*args)
        finally:
            jax.jit = jit

    script.load_model = load_slowly


def measure(directory: Path, runs: int, vocab_size: int) -> dict:
    text = harness.write_corpus(directory, 1)
    folder = harness.write_model(directory, text, "roberta", "small", 128, vocab_size)
    script, flags = harness.command(
        "masked", folder, text, directory / "out", 8, 128,
        do_eval=True, num_train_epochs=1, overwrite_cache=True, logging_steps=100,
    )  # fmt: skip
    seconds = {"script": [], "simple": []}
    for pair in range(runs + 1):
        for kind in seconds:
            shutil.rmtree(directory / "out", ignore_errors=True)
            found = harness.run(directory, script, flags, notes="", simple=kind == "simple")[
                "process"
            ]
            if pair:
                seconds[kind].append(found)
    ratios = np.divide(seconds["simple"], seconds["script"])
    return {"ratio": statistics.median(ratios), "ratios": list(ratios), "seconds": seconds}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="pairs that count")
    parser.add_argument(
        "--vocab_sizes",
        type=int,
        nargs="+",
        default=[8000, 30522],
        help="rows of the model's table",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    args = parser.parse_args()
    figures = {}
    print(
        f"vocabulary    script s    simple s    ratio    lowest   highest, medians of {args.runs} pairs"
    )
    for vocab_size in args.vocab_sizes:
        with tempfile.TemporaryDirectory() as name:
            found = figures[vocab_size] = measure(Path(name), args.runs, vocab_size)
        times, ratios = map(statistics.median, found["seconds"].values()), found["ratios"]
        numbers = "".join(f"{value:12.1f}" for value in times)
        print(
            f"{vocab_size:>10,}{numbers}{found['ratio']:9.2f}{min(ratios):10.2f}{max(ratios):10.2f}",
            flush=True,
        )
    harness.write_json(args.json, figures)


if __name__ == "__main__":
    main()
