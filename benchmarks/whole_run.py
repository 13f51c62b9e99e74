#!/usr/bin/env python
"""Compare a whole run of run_mlm_flax.py with a run of the same script made simple.

    python benchmarks/whole_run.py [--runs 5] [--vocab_sizes 8000 30522] [--json FILE]

Both train a RoBERTa of 2 layers of width 128 for one epoch over a megabyte of text, with 8 x 128
tokens a step, evaluate once and save once. They alternate, with vocabularies of 8,000 tokens and of
BERT's 30,522. The time is that of the process. The simple run (`simplify`) replaces these parts of
the script:

- the loss is computed from the logits of all positions and one-hot labels;
- masking goes row by row and token by token;
- a batch is made only when the previous step is done;
- the initialization is not compiled.

In the first pair the cache of compiled programs is empty for both. The medians are of the pairs
after it, as in daily work.
"""

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

import harness
import numpy as np


def simplify(script):
    """Replace functions of run_mlm_flax.py with the simplest ones that do the same."""
    script.loss_sums = make_loss_sums(script.IGNORE)
    script.FlaxDataCollatorForLanguageModeling.__call__ = mask
    script.load_model = without_compilation(script.load_model)

    def one_by_one(items, size=None):
        yield from items

    script.prefetch = one_by_one


def make_loss_sums(ignore: int):
    """Make a `loss_sums` that computes the logits of all positions and uses one-hot labels."""
    import jax
    import jax.numpy as jnp
    import optax

    def loss_sums(params, batch, model, num_slots, dropout_rng=None):
        train = dropout_rng is not None
        outputs = model(
            batch["input_ids"],
            batch["attention_mask"],
            params=params,
            dropout_rng=dropout_rng,
            train=train,
        )
        logits = outputs.logits.astype(jnp.float32)
        predicted = batch["labels"] != ignore
        labels = jnp.where(predicted, batch["labels"], 0)
        losses = optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1]))
        sums = {
            "loss": jnp.where(predicted, losses, 0).sum(),
            "predicted": predicted.sum(dtype=jnp.float32),
        }
        if not train:
            correct = predicted & (logits.argmax(-1) == labels)
            sums["accuracy"] = correct.sum(dtype=jnp.float32)
        return sums["loss"], sums

    return loss_sums


def mask(self, examples, rng, group_size):
    """Take the place of the collator's `__call__`, and mask one token at a time."""
    from collator import mask_by_rows

    input_ids, labels = mask_by_rows(
        examples["input_ids"], self.tokenizer, rng, self.mlm_probability
    )
    return {**examples, "input_ids": input_ids, "labels": labels}


def without_compilation(load_model):
    """Wrap `load_model` so that it does not compile the initialization of the weights."""
    import jax

    jit = jax.jit

    def jit_all_but_init(*args, **kwargs):
        if args and getattr(args[0], "__name__", "") == "init_weights":
            return args[0]
        return jit(*args, **kwargs)

    def load_model_slowly(*args):
        jax.jit = jit_all_but_init
        try:
            return load_model(*args)
        finally:
            jax.jit = jit

    return load_model_slowly


def measure(directory: Path, num_pairs: int, vocab_size: int) -> dict:
    """Run pairs of the script and its simple form; return their seconds and the ratios."""
    text = harness.write_corpus(directory, 1)
    folder = harness.write_model(directory, text, "roberta", "small", 128, vocab_size)
    script, flags = harness.command(
        "masked",
        folder,
        text,
        directory / "out",
        8,
        128,
        do_eval=True,
        num_train_epochs=1,
        overwrite_cache=True,
        logging_steps=100,
    )
    seconds = {"script": [], "simple": []}
    for pair in range(num_pairs + 1):
        for kind in seconds:
            shutil.rmtree(directory / "out", ignore_errors=True)
            is_simple = kind == "simple"
            found = harness.run(directory, script, flags, notes="", simple=is_simple)
            # The first pair fills the cache of compiled programs.
            if pair > 0:
                seconds[kind].append(found["process"])
    ratios = np.divide(seconds["simple"], seconds["script"])
    return {"ratio": statistics.median(ratios), "ratios": list(ratios), "seconds": seconds}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="pairs of runs that are counted")
    parser.add_argument(
        "--vocab_sizes",
        type=int,
        nargs="+",
        default=[8000, 30522],
        help="rows of the model's embedding table",
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()

    columns = "vocabulary    script s    simple s    ratio    lowest   highest"
    print(f"{columns}, medians of {args.runs} pairs")
    figures = {}
    for vocab_size in args.vocab_sizes:
        with tempfile.TemporaryDirectory() as directory:
            found = measure(Path(directory), args.runs, vocab_size)
        figures[vocab_size] = found
        cells = (
            f"{vocab_size:>10,}",
            f"{statistics.median(found['seconds']['script']):12.1f}",
            f"{statistics.median(found['seconds']['simple']):12.1f}",
            f"{found['ratio']:9.2f}",
            f"{min(found['ratios']):10.2f}",
            f"{max(found['ratios']):10.2f}",
        )
        print("".join(cells), flush=True)
    harness.write_json(args.json, figures)


if __name__ == "__main__":
    main()
