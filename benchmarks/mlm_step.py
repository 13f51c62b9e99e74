#!/usr/bin/env python
"""The train step of run_mlm_flax.py beside the plain one, in one process, as ratios.

    python benchmarks/mlm_step.py [--seconds 45] [--models "2 x 128" "4 x 768"] [--json FILE]

Four train steps of a RoBERTa take turns on one CPU device, each with a state of its own, on the same batches:

    script     train_step of run_mlm_flax.py: the head on the masked positions
    one-hot    the plain step: logits of all positions, cross-entropy with one-hot labels times the mask
    indices    the plain step with integer labels in place of one-hot ones
    threefry   the script's step with dropout from JAX's default generator, threefry2x32, in place of rbg

Model, weights, optimizer (AdamW) and dropout rates are the same, and so are the keys of dropout. Each round runs every
step once, in a random order, each to its end. Other work on the machine slows all of them down, so the times say
little, and the ratios of one run a lot; those of processor time, of all threads, depend on it least.
"""

import argparse
import os
import random
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers
from flax import __version__ as flax_version
from flax.training.train_state import TrainState

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness

import run_mlm_flax as script

ROWS, LENGTH, WARM_UP = 8, 128, 2
TOLERANCE = 0.05  # of the first losses, which dropout may set apart; exact equality is for the tests to show
SIZES = {  # name: layers, width, heads, intermediate width, vocabulary, and the ratio that the project demands
    "2 x 128": (2, 128, 2, 512, 8_000, 2.0),
    "4 x 768": (4, 768, 12, 3072, 30_000, 1.4),
}
FLAGS = "--output_dir=- --config_name=- --tokenizer_name=- --train_file=- --weight_decay=0.01 --learning_rate=1e-4"


class Tokenizer:
    """What the collator and the batches need of one."""

    all_special_ids = (0, 1, 2, 3, 4)
    mask_token_id, pad_token_id, name_or_path = 4, 1, "-"

    def __init__(self, size: int):
        self.size = size

    def __len__(self):
        return self.size


def plain_step(state, totals, batch, model, seed, one_hot: bool = True):
    """The textbook step, with the arguments, and the dropout keys, of the script's step."""
    batch = {name: array[0] for name, array in batch.items()}  # [batch, length] int32
    rng = jax.random.fold_in(jax.random.key(seed, impl=script.DROPOUT_PRNG), state.step)
    dropout_rng = jax.random.fold_in(jax.random.fold_in(rng, jax.lax.axis_index("batch")), 0)
    mask = (batch["labels"] != script.IGNORE).astype(jnp.float32)
    labels = jnp.where(mask > 0, batch["labels"], 0)

    def loss_fn(params):
        inputs = batch["input_ids"], batch["attention_mask"]
        logits = model(*inputs, params=params, dropout_rng=dropout_rng, train=True).logits.astype(
            jnp.float32
        )
        if one_hot:
            losses = optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1]))
        else:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return (losses * mask).sum()

    loss_and_grads = jax.value_and_grad(loss_fn)(state.params)
    (loss, grads), predicted = jax.lax.psum((loss_and_grads, mask.sum()), "batch")
    grads = jax.tree.map(lambda grad: grad / predicted, grads)
    return state.apply_gradients(grads=grads), {
        "loss": totals["loss"] + loss,
        "predicted": predicted,
    }


def with_threefry(*args, **kwargs):
    with mock.patch.object(script, "DROPOUT_PRNG", "threefry2x32"):  # read when the step is traced
        return script.train_step(*args, **kwargs)


def make_steps(layers: int, width: int, heads: int, intermediate: int, vocabulary: int):
    """The batches, and each step as a function of a batch that runs it to its end and returns the mean loss."""
    config = transformers.RobertaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=LENGTH + 2,
        type_vocab_size=1,
    )
    args = script.parse_args([*FLAGS.split(), f"--per_device_train_batch_size={ROWS}"])
    model, params = script.load_model(args, config)
    optimizer, _ = script.make_optimizer(args, num_steps=10_000)
    state = jax.device_get(TrainState.create(apply_fn=None, params=params, tx=optimizer))
    collator = script.FlaxDataCollatorForLanguageModeling(Tokenizer(vocabulary), LENGTH)
    tokens = np.random.default_rng(0).integers(5, vocabulary, 16 * ROWS * LENGTH, dtype=np.int32)
    ends = np.arange(LENGTH, len(tokens) + 1, LENGTH)
    sequences = script.Sequences(
        tokens, np.zeros(len(tokens), np.int8), ends - LENGTH, ends, LENGTH, LENGTH
    )
    batches = list(
        map(
            script.shard, script.train_batches(sequences, collator, args.seed, range(16), (1, ROWS))
        )
    )
    copy = lambda tree: script.shard(jax.tree.map(lambda x: np.asarray(x)[None], tree))  # noqa: E731
    zeros = copy(dict.fromkeys(("loss", "predicted", "tokens", "grad_norm"), np.float32(0)))
    fixed = {"model": model, "seed": args.seed}

    functions = {
        "script": partial(script.train_step, num_slots=collator.num_slots, **fixed),
        "one-hot": partial(plain_step, **fixed),
        "indices": partial(plain_step, one_hot=False, **fixed),
        "threefry": partial(with_threefry, num_slots=collator.num_slots, **fixed),
    }

    def run_to_its_end(p_step, states, batch) -> float:
        states[0], sums = jax.block_until_ready(p_step(states[0], zeros, batch))
        return float(np.asarray(sums["loss"])[0] / np.asarray(sums["predicted"])[0])

    return batches, {
        name: partial(run_to_its_end, jax.pmap(function, "batch", donate_argnums=0), [copy(state)])
        for name, function in functions.items()
    }


def measure(size, seconds: float) -> dict:
    """Rounds for `seconds`, at least ten: each step's median time, and the ratios to the script's.

    Raises SystemExit where the first losses are far apart: a coarse check of the batches, since the steps draw other
    dropout. That loss and gradients are equal is shown by tests/test_mlm_objective.py.
    """
    batches, steps = make_steps(*size)
    first = {name: step(batches[0]) for name, step in steps.items()}
    if max(first.values()) - min(first.values()) > TOLERANCE:
        raise SystemExit(f"the steps differ in their first loss: {first}")
    for _ in range(WARM_UP):
        [step(batches[0]) for step in steps.values()]
    wall, processor = {name: [] for name in steps}, {name: [] for name in steps}
    shuffle, end = random.Random(0).shuffle, time.perf_counter() + seconds
    while time.perf_counter() < end or len(wall["script"]) < 10:
        batch, order = batches[len(wall["script"]) % len(batches)], list(steps)
        shuffle(order)
        for name in order:
            start = time.perf_counter(), time.process_time()
            steps[name](batch)
            wall[name].append(time.perf_counter() - start[0])
            processor[name].append(time.process_time() - start[1])
    figures = {"rounds": len(wall["script"]), "first_loss": first, "steps": {}}
    for name in steps:
        ratios = [
            step / script_step for step, script_step in zip(wall[name], wall["script"], strict=True)
        ]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found = {
            "median_milliseconds": statistics.median(wall[name]) * 1e3,
            "ratio_of_medians": statistics.median(wall[name]) / statistics.median(wall["script"]),
            "median_of_ratios": middle,
            "quartiles_of_ratios": [low, high],
            "ratio_of_processor_time": statistics.median(processor[name])
            / statistics.median(processor["script"]),
        }
        figures["steps"][name] = found
    return figures


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=45.0, help="a model; at least ten rounds in any case"
    )
    parser.add_argument(
        "--models", nargs="+", choices=SIZES, default=list(SIZES), help="default: both"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    args = parser.parse_args()
    figures = {}
    print(
        f"{harness.processor()}, jax {jax.__version__}, flax {flax_version}, transformers {transformers.__version__}"
    )
    print(f"batch {ROWS} x {LENGTH}; ratios are to the step of the script, times are medians\n")
    print(
        f"model    step            ms{'of medians':>12}{'of pairs':>10}{'quartiles':>14}{'CPU':>7}{'demand':>8}"
    )
    for name in args.models:
        *size, demanded = SIZES[name]
        figures[name] = measured = {"demanded": demanded, **measure(size, args.seconds)}
        for step, found in measured["steps"].items():
            low, high = found["quartiles_of_ratios"]
            print(
                f"{name:<9}{step:<9}{found['median_milliseconds']:>9.1f}{found['ratio_of_medians']:>12.2f}"
                f"{found['median_of_ratios']:>10.2f}{f'{low:.2f} - {high:.2f}':>14}"
                f"{found['ratio_of_processor_time']:>7.2f}{demanded if step == 'one-hot' else '':>8}"
            )
        print(f"{'':<9}{measured['rounds']} rounds\n", flush=True)
    harness.write_json(args.json, figures)


if __name__ == "__main__":
    main()
