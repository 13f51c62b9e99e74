#!/usr/bin/env python
# ruff: noqa: E402, XLA reads its flags when jax is imported
"""Compare memory and time of the train step of run_clm_flax.py with those of a plain step.

    python benchmarks/clm_memory.py [--seconds 60] [--layers 12] [--chunks 1 8 32] [--xla memory]
        [--json FILE]

The plain step is the textbook's: it computes the logits of all positions, shifts them, and takes
the cross-entropy with one-hot labels. Both steps have the same model, optimizer (AdamW) and
dropout.

Memory is what XLA plans for the compiled step beside its arguments (temporaries in
`memory_analysis`), for GPT-2 small with 8 sequences of length 512 on one CPU device. Nothing is run
for it.

Time is measured with a smaller model. Both steps alternate in random order. The median of the
ratios of pairs depends little on other work on the machine.

XLA's compiler for CPUs differs from those for GPUs and TPUs in two ways that matter here:

- It orders operations for concurrency. AdamW's moments, which the update writes in place, are then
  copied before the forward pass rather than after the backward pass. `--xla memory`, the default,
  makes it order operations for memory. XLA of jax 0.6 does not have this flag.
- It removes the barriers between the first computation and the recomputation of
  --gradient_checkpointing, and merges the two. `--xla barriers` makes it keep the barriers.

`--xla as_it_is` changes neither.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from functools import partial
from pathlib import Path

XLA = {
    "memory": "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "barriers": "--xla_disable_hlo_passes=cse_barrier_expander",
    "as_it_is": "",
}
# The choice is needed before jax is imported. `main` checks it later.
chosen = "memory"
if "--xla" in sys.argv[:-1]:
    chosen = sys.argv[sys.argv.index("--xla") + 1]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA.get(chosen, '')}".strip()
import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers
from flax.training.train_state import TrainState

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import run_clm_flax as script

FLAGS = [
    "--output_dir=-",
    "--config_name=-",
    "--tokenizer_name=-",
    "--train_file=-",
    "--weight_decay=0.01",
    "--learning_rate=1e-4",
]
TOTALS = ("loss", "z_loss", "predicted", "tokens", "grad_norm", "learning_rate")
# The batch whose memory is planned.
ROWS = 8
LENGTH = 512
# The model and the batch for the time.
SMALL = {"n_layer": 4, "n_embd": 512, "n_head": 8, "vocab_size": 32_000}
SMALL_ROWS = 4
SMALL_LENGTH = 256
MIN_ROUNDS = 10


def plain_step(state, totals, batch, seed, model, checkpointing):
    """Take the textbook's step, with the arguments and the dropout keys of the script's step."""
    rng = jax.random.fold_in(jax.random.key(seed, impl=script.dropout_prng()), state.step)
    rng = jax.random.fold_in(rng, jax.lax.axis_index("batch"))
    # The script folds in the number of the micro-batch, here always 0.
    dropout_rng = jax.random.fold_in(rng, 0)
    input_ids = batch["input_ids"][0]
    attention_mask = batch["attention_mask"][0]
    labels = batch["labels"][0]

    def loss_fn(params):
        outputs = model(
            input_ids, attention_mask, params=params, dropout_rng=dropout_rng, train=True
        )
        logits = outputs.logits[:, :-1]
        one_hot = jax.nn.one_hot(labels[:, 1:], logits.shape[-1])
        return optax.softmax_cross_entropy(logits.astype(jnp.float32), one_hot).mean()

    if checkpointing:
        loss_fn = script.recompute(loss_fn, "layers")
    loss_and_grads = jax.value_and_grad(loss_fn)(state.params)
    loss, grads = jax.lax.pmean(loss_and_grads, "batch")
    totals = {**totals, "loss": loss, "predicted": jnp.float32(1)}
    return state.apply_gradients(grads=grads), totals


def make_model(**settings):
    """Make the arguments of a run, the config of a GPT-2, the model and the schedule."""
    config = transformers.GPT2Config(**settings)
    args = script.parse_args(FLAGS)
    model = transformers.FlaxAutoModelForCausalLM.from_config(config, _do_init=False)
    schedule = script.make_schedule(args, num_steps=10_000)
    return args, config, model, schedule


def make_step(args, model, schedule, plain: bool, checkpointing: bool):
    """Make the plain or the script's step, as a function of state, totals and batch."""
    if plain:
        return partial(plain_step, model=model, checkpointing=checkpointing, seed=args.seed)
    loss_fn = partial(script.loss_sums, model=model)
    if checkpointing:
        loss_fn = script.recompute(loss_fn, "layers")
    return partial(script.train_step, loss_fn=loss_fn, schedule=schedule, seed=args.seed)


def planned_temporaries(
    layers: int, plain: bool, checkpointing: bool, chunks: int = script.CHUNKS
) -> float:
    """Compile a step and return the planned memory beside its arguments, in GB."""
    script.CHUNKS = chunks
    args, _, model, schedule = make_model(n_layer=layers)
    optimizer = script.make_optimizer(args, schedule)

    def make_state():
        params = model.init_weights(jax.random.PRNGKey(0), (1, 1))
        return TrainState.create(apply_fn=None, params=params, tx=optimizer)

    def on_one_device(array):
        return jax.ShapeDtypeStruct((1, *array.shape), array.dtype)

    state = jax.tree.map(on_one_device, jax.eval_shape(make_state))
    tokens = jax.ShapeDtypeStruct((1, 1, ROWS, LENGTH), jnp.int32)
    batch = {"input_ids": tokens, "attention_mask": tokens, "labels": tokens}
    totals = {name: jax.ShapeDtypeStruct((1,), jnp.float32) for name in TOTALS}
    step = make_step(args, model, schedule, plain, checkpointing)
    p_step = jax.pmap(step, "batch", donate_argnums=0)
    compiled = p_step.lower(state, totals, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e9


def copy_to_device(tree):
    """Copy arrays to the device with a leading axis of length 1, as for `jax.pmap`."""
    return script.shard(jax.tree.map(lambda array: np.asarray(array)[None], tree))


def make_runs() -> dict:
    """Make each step as a function that runs it to its end and returns the loss."""
    args, config, model, schedule = make_model(**SMALL)
    optimizer = script.make_optimizer(args, schedule)
    _, params = script.load_model(args, config)
    state = jax.device_get(TrainState.create(apply_fn=None, params=params, tx=optimizer))
    shape = (1, SMALL_ROWS, SMALL_LENGTH)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids}
    batch = copy_to_device(batch)
    totals = copy_to_device(dict.fromkeys(TOTALS, np.float32(0)))

    def make_run(plain: bool):
        step = make_step(args, model, schedule, plain, checkpointing=False)
        p_step = jax.pmap(step, "batch", donate_argnums=0)
        current_state = copy_to_device(state)

        def run() -> float:
            nonlocal current_state
            outputs = p_step(current_state, totals, batch)
            current_state, sums = jax.block_until_ready(outputs)
            return float(np.asarray(sums["loss"])[0] / np.asarray(sums["predicted"])[0])

        return run

    return {"script": make_run(plain=False), "plain": make_run(plain=True)}


def time_steps(seconds: float) -> dict:
    """Time pairs of the script's and the plain step, for `seconds` and at least ten rounds."""
    runs = make_runs()
    losses = {name: run() for name, run in runs.items()}
    if abs(losses["script"] / losses["plain"] - 1) > 1e-5:
        raise SystemExit(f"not the same step: {losses}")

    end = time.perf_counter() + seconds
    for run in runs.values():
        run()
    times = {name: [] for name in runs}
    rng = random.Random(0)
    while time.perf_counter() < end or len(times["plain"]) < MIN_ROUNDS:
        order = list(runs)
        rng.shuffle(order)
        for name in order:
            begin = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - begin)

    pairs = zip(times["script"], times["plain"], strict=True)
    ratios = [script_time / plain_time for script_time, plain_time in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    medians = {name: round(statistics.median(found), 4) for name, found in times.items()}
    return {
        "rounds": len(ratios),
        "medians": medians,
        "ratio": round(middle, 3),
        "quartiles": [low, high],
    }


def report_temporaries(layers: int, all_chunks: list[int]) -> dict[str, float]:
    """Print the memory of each step, in GB and as a fraction of that of the plain step."""
    model = f"GPT-2, {layers} layers, batch {ROWS} x {LENGTH}"
    print(f"temporaries of the compiled step: {model}, jax {jax.__version__}")
    figures = {}
    plain = None
    for checkpointing in (False, True):
        for chunks in (None, *all_chunks):
            name = f"script, {chunks} chunks" if chunks else "plain"
            if checkpointing:
                name += ", --gradient_checkpointing"
            found = planned_temporaries(layers, not chunks, checkpointing, chunks or script.CHUNKS)
            # The first row is the plain step.
            plain = plain or found
            figures[name] = found
            print(f"{name:<45}{found:8.2f} GB {found / plain:7.1%}", flush=True)
    return figures


def report_time(seconds: float) -> dict:
    """Print the time of the script's step as a ratio to that of the plain step."""
    found = time_steps(seconds)
    low, high = found["quartiles"]
    print(
        f"time, {SMALL_ROWS} x {SMALL_LENGTH} tokens, {SMALL}:"
        f" {found['ratio']:.2f} times that of the plain step,"
        f" quartiles {low:.2f} - {high:.2f}, {found['rounds']} rounds, medians {found['medians']}"
    )
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="duration of the timing; 0: none"
    )
    parser.add_argument(
        "--layers", type=int, default=12, help="of the model whose memory is planned; 0: none"
    )
    parser.add_argument(
        "--chunks", type=int, nargs="+", default=[script.CHUNKS], help="values of CHUNKS to compare"
    )
    parser.add_argument("--xla", choices=XLA, default="memory", help="how XLA compiles, see above")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()

    figures = {
        "jax": jax.__version__,
        "machine": platform.machine(),
        "xla": args.xla,
        "temporaries": {},
    }
    if args.layers:
        figures["temporaries"] = report_temporaries(args.layers, args.chunks)
    if args.seconds:
        figures["time"] = report_time(args.seconds)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
