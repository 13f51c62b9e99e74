#!/usr/bin/env python
"""Compare the train step of run_mlm_flax.py with plain steps, in one process, as ratios.

    python benchmarks/mlm_step.py [--seconds 45] [--models "2 x 128" "4 x 768"] [--json FILE]

Four train steps of a RoBERTa alternate on one CPU device, each with its own state, on the same
batches:

    script     train_step of run_mlm_flax.py: the head is computed at the masked positions only
    one-hot    plain: logits of all positions, cross-entropy with one-hot labels times the mask
    indices    plain, with integer labels in place of one-hot labels
    threefry   the script's step, with dropout from JAX's default generator, threefry2x32,
               in place of a hash

All have the same model, weights, optimizer (AdamW), dropout rates and dropout keys. Each round runs
every step once, to its end, in random order. Other work on the machine slows all steps down, so
times say little and the ratios of one run say a lot. The ratios of processor time, summed over all
threads, depend on other work the least.
"""

import argparse
import os
import random
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple
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

ROWS = 8
LENGTH = 128
NUM_BATCHES = 16
WARM_UP = 2  # rounds
MIN_ROUNDS = 10
# How far apart the first losses may be. The steps draw different dropout. That the losses are equal
# without dropout is for the tests to show.
TOLERANCE = 0.05
FLAGS = [
    "--output_dir=-",
    "--config_name=-",
    "--tokenizer_name=-",
    "--train_file=-",
    "--weight_decay=0.01",
    "--learning_rate=1e-4",
    f"--per_device_train_batch_size={ROWS}",
]
TOTALS = ("loss", "predicted", "tokens", "grad_norm", "learning_rate")


class Size(NamedTuple):
    """The size of a RoBERTa, and the ratio of the one-hot step that the project demands."""

    layers: int
    width: int
    heads: int
    intermediate_width: int
    vocab_size: int
    demanded_ratio: float


SIZES = {
    "2 x 128": Size(2, 128, 2, 512, 8_000, 2.0),
    "4 x 768": Size(4, 768, 12, 3072, 30_000, 1.4),
}


class Tokenizer:
    """The part of a tokenizer that the collator and the batches use."""

    all_special_ids = (0, 1, 2, 3, 4)
    mask_token_id = 4
    pad_token_id = 1
    name_or_path = "-"

    def __init__(self, size: int):
        self.size = size

    def __len__(self):
        return self.size


def plain_step(state, totals, batch, model, seed, one_hot: bool = True):
    """Take the textbook's step, with the arguments and the dropout keys of the script's step."""
    # [batch, length] int32
    batch = {name: array[0] for name, array in batch.items()}
    rng = jax.random.fold_in(jax.random.key(seed, impl=script.dropout_prng()), state.step)
    rng = jax.random.fold_in(rng, jax.lax.axis_index("batch"))
    # The script folds in the number of the micro-batch, here always 0.
    dropout_rng = jax.random.fold_in(rng, 0)
    mask = (batch["labels"] != script.IGNORE).astype(jnp.float32)
    labels = jnp.where(mask > 0, batch["labels"], 0)

    def loss_fn(params):
        outputs = model(
            batch["input_ids"],
            batch["attention_mask"],
            params=params,
            dropout_rng=dropout_rng,
            train=True,
        )
        logits = outputs.logits.astype(jnp.float32)
        if one_hot:
            one_hot_labels = jax.nn.one_hot(labels, logits.shape[-1])
            losses = optax.softmax_cross_entropy(logits, one_hot_labels)
        else:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return (losses * mask).sum()

    loss_and_grads = jax.value_and_grad(loss_fn)(state.params)
    (loss, grads), predicted = jax.lax.psum((loss_and_grads, mask.sum()), "batch")
    grads = jax.tree.map(lambda grad: grad / predicted, grads)
    totals = {"loss": totals["loss"] + loss, "predicted": predicted}
    return state.apply_gradients(grads=grads), totals


def train_step_with_threefry(*args, **kwargs):
    """Take the script's step with another generator, which is read while the step is traced."""
    with mock.patch.object(script, "dropout_prng", return_value="threefry2x32"):
        return script.train_step(*args, **kwargs)


def make_config(size: Size) -> transformers.RobertaConfig:
    return transformers.RobertaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.intermediate_width,
        max_position_embeddings=LENGTH + 2,
        type_vocab_size=1,
    )


def make_batches(vocab_size: int, collator, seed: int) -> list:
    """Make batches of random tokens in full rows, on the device."""
    num_tokens = NUM_BATCHES * ROWS * LENGTH
    tokens = np.random.default_rng(0).integers(5, vocab_size, num_tokens, dtype=np.int32)
    continues_word = np.zeros(num_tokens, np.int8)
    columns = (script.Tokens([tokens]), script.Tokens([continues_word]))
    sequences = script.Sequences(*columns, num_tokens // LENGTH, LENGTH, LENGTH)
    batches = script.train_batches(sequences, collator, seed, range(NUM_BATCHES), (1, ROWS))
    return [script.shard(batch) for batch in batches]


def copy_to_device(tree):
    """Copy arrays to the device with a leading axis of length 1, as for `jax.pmap`."""
    return script.shard(jax.tree.map(lambda array: np.asarray(array)[None], tree))


def make_steps(size: Size) -> tuple[list, dict]:
    """Make the batches and the steps.

    A step is a function of a batch that runs to its end and returns the mean loss.
    """
    args = script.parse_args(FLAGS)
    model, params = script.load_model(args, make_config(size))
    schedule = script.make_schedule(args, num_steps=10_000)
    optimizer = script.make_optimizer(args, schedule)
    state = jax.device_get(TrainState.create(apply_fn=None, params=params, tx=optimizer))
    collator = script.FlaxDataCollatorForLanguageModeling(Tokenizer(size.vocab_size), LENGTH)
    batches = make_batches(size.vocab_size, collator, args.seed)
    zeros = copy_to_device(dict.fromkeys(TOTALS, np.float32(0)))

    def make_step(function, **fixed):
        bound = partial(function, seed=args.seed, **fixed)
        p_step = jax.pmap(bound, "batch", donate_argnums=0)
        current_state = copy_to_device(state)

        def step(batch) -> float:
            nonlocal current_state
            current_state, sums = jax.block_until_ready(p_step(current_state, zeros, batch))
            return float(np.asarray(sums["loss"])[0] / np.asarray(sums["predicted"])[0])

        return step

    loss_fn = partial(script.loss_sums, model=model, num_slots=collator.num_slots)
    of_script = {"loss_fn": loss_fn, "schedule": schedule}
    steps = {
        "script": make_step(script.train_step, **of_script),
        "one-hot": make_step(plain_step, model=model),
        "indices": make_step(plain_step, model=model, one_hot=False),
        "threefry": make_step(train_step_with_threefry, **of_script),
    }
    return batches, steps


def time_rounds(batches: list, steps: dict, seconds: float) -> tuple[dict, dict]:
    """Time rounds for `seconds`, at least ten; return wall and processor times of each step."""
    wall = {name: [] for name in steps}
    processor = {name: [] for name in steps}
    rng = random.Random(0)
    end = time.perf_counter() + seconds
    num_rounds = 0
    while time.perf_counter() < end or num_rounds < MIN_ROUNDS:
        batch = batches[num_rounds % len(batches)]
        order = list(steps)
        rng.shuffle(order)
        for name in order:
            wall_begin = time.perf_counter()
            processor_begin = time.process_time()
            steps[name](batch)
            wall[name].append(time.perf_counter() - wall_begin)
            processor[name].append(time.process_time() - processor_begin)
        num_rounds += 1
    return wall, processor


def measure(size: Size, seconds: float) -> dict:
    """Measure each step's median time and its ratios to the script's.

    Raises SystemExit if the first losses are far apart. This is a coarse check of the batches, for
    the steps draw different dropout. tests/objectives/test_mlm_objective.py shows that loss and
    gradients are equal.
    """
    batches, steps = make_steps(size)
    first_loss = {name: step(batches[0]) for name, step in steps.items()}
    if max(first_loss.values()) - min(first_loss.values()) > TOLERANCE:
        raise SystemExit(f"the steps differ in their first loss: {first_loss}")
    for _ in range(WARM_UP):
        for step in steps.values():
            step(batches[0])
    wall, processor = time_rounds(batches, steps, seconds)

    median_wall = {name: statistics.median(times) for name, times in wall.items()}
    median_processor = {name: statistics.median(times) for name, times in processor.items()}
    figures = {"rounds": len(wall["script"]), "first_loss": first_loss, "steps": {}}
    for name in steps:
        pairs = zip(wall[name], wall["script"], strict=True)
        ratios = [step_time / script_time for step_time, script_time in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4)
        figures["steps"][name] = {
            "median_milliseconds": median_wall[name] * 1e3,
            "ratio_of_medians": median_wall[name] / median_wall["script"],
            "median_of_ratios": middle,
            "quartiles_of_ratios": [low, high],
            "ratio_of_processor_time": median_processor[name] / median_processor["script"],
        }
    return figures


def print_row(model: str, step: str, found: dict, demanded_ratio: float):
    """Print the figures of a step. The project demands a ratio of the one-hot step only."""
    low, high = found["quartiles_of_ratios"]
    columns = (
        f"{model:<9}",
        f"{step:<9}",
        f"{found['median_milliseconds']:>9.1f}",
        f"{found['ratio_of_medians']:>12.2f}",
        f"{found['median_of_ratios']:>10.2f}",
        f"{f'{low:.2f} - {high:.2f}':>14}",
        f"{found['ratio_of_processor_time']:>7.2f}",
        f"{demanded_ratio if step == 'one-hot' else '':>8}",
    )
    print("".join(columns))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=45.0, help="for each model; at least ten rounds are run"
    )
    parser.add_argument(
        "--models", nargs="+", choices=SIZES, default=list(SIZES), help="default: both"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()

    libraries = f"flax {flax_version}, transformers {transformers.__version__}"
    print(f"{harness.processor()}, jax {jax.__version__}, {libraries}")
    print(f"batch {ROWS} x {LENGTH}; ratios are to the step of the script, times are medians\n")
    ratio_columns = f"{'of medians':>12}{'of pairs':>10}{'quartiles':>14}{'CPU':>7}{'demand':>8}"
    print(f"model    step            ms{ratio_columns}")
    figures = {}
    for name in args.models:
        size = SIZES[name]
        measured = measure(size, args.seconds)
        figures[name] = {"demanded": size.demanded_ratio, **measured}
        for step, found in measured["steps"].items():
            print_row(name, step, found, size.demanded_ratio)
        print(f"{'':<9}{measured['rounds']} rounds\n", flush=True)
    harness.write_json(args.json, figures)


if __name__ == "__main__":
    main()
