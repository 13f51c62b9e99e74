#!/usr/bin/env python
"""A whole run of run_mlm_flax.py beside the same script made simple: full head, loops over rows, nothing ahead.

    python benchmarks/whole_run.py [--runs 5] [--json FILE]

Both train a RoBERTa of 2 layers of width 128 for one epoch over a megabyte of text, 8 x 128 tokens a step, evaluate
once and save once, by turns; time is that of the process. The simple one (`simplify`) puts in place of the script's
functions: the loss over the one-hot labels of all positions, masking row by row and token by token, a fresh batch when
the step before is done, and an initialization that is not compiled. Both have an empty cache of compiled programs in
the first pair; the medians are of the pairs after it, as in daily work.
"""

import argparse
import json
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
        logits = model(*inputs, params=params, dropout_rng=dropout_rng, train=train).logits.astype(jnp.float32)
        predicted = batch["labels"] != script.IGNORE
        labels = jnp.where(predicted, batch["labels"], 0)
        losses = optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1]))
        sums = {"loss": jnp.where(predicted, losses, 0).sum(), "predicted": predicted.sum(dtype=jnp.float32)}
        if not train:
            sums["accuracy"] = (predicted & (logits.argmax(-1) == labels)).sum(dtype=jnp.float32)
        return sums["loss"], sums

    def mask(self, examples, rng, group_size):
        from collator import mask_by_rows

        shown, labels = mask_by_rows(examples["input_ids"], self.tokenizer, rng, self.mlm_probability)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="pairs that count")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    args = parser.parse_args()
    seconds = {"script": [], "simple": []}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        text = harness.write_corpus(directory, 1)
        folder = harness.write_model(directory, text, "roberta", "small", 128, 8000)
        script, flags = harness.command(
            "masked", folder, text, directory / "out", 8, 128,
            do_eval=True, num_train_epochs=1, overwrite_cache=True, logging_steps=100,
        )  # fmt: skip
        for pair in range(args.runs + 1):
            for kind in seconds:
                shutil.rmtree(directory / "out", ignore_errors=True)
                found = harness.run(directory, script, flags, notes="", simple=kind == "simple")["process"]
                if pair:
                    seconds[kind].append(found)
    ratios = np.divide(seconds["simple"], seconds["script"])
    figures = {"ratio": statistics.median(ratios), "ratios": list(ratios), "seconds": seconds}
    print(f"simple / script: {figures['ratio']:.2f}, median of {args.runs} pairs between {min(ratios):.2f} and "
          f"{max(ratios):.2f}")  # fmt: skip
    for kind, values in seconds.items():
        print(f"{kind:8}{statistics.median(values):8.1f} s")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
