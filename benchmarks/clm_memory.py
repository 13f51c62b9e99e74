#!/usr/bin/env python
# ruff: noqa: E402, XLA reads its flags when jax is imported
"""Memory and time of the train step of run_clm_flax.py beside the plain one-hot step.

    python benchmarks/clm_memory.py [--seconds 60] [--layers 12] [--pieces 1 8 32] [--xla memory] [--json FILE]

Memory is what XLA plans for the compiled step beyond its arguments (`memory_analysis`, temporaries), for GPT-2 small,
batch 8, length 512, on one CPU device; nothing is run for it. The plain step is the textbook's: logits of all
positions, shifted, and cross-entropy with one-hot labels. Model, optimizer (AdamW) and dropout are the same.

Time is taken at a smaller size: both steps take turns in a random order, and the median of the ratios of pairs says
what the other work on the machine does not.

XLA's compiler for CPUs differs from those for GPUs and TPUs in two ways that matter here. It orders operations for
concurrency, so that AdamW's moments, which the update writes in place, are copied before the forward pass and not
after the backward pass: with --xla memory, the default, it orders them for memory. And it takes away the barriers
that keep the recomputation of --gradient_checkpointing apart from the first computation, and merges the two: with
--xla barriers it keeps them. With --xla as_it_is it does neither. XLA of jax 0.6 does not know the first flag.
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

os.environ["JAX_PLATFORMS"] = "cpu"
XLA = {
    "memory": "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "barriers": "--xla_disable_hlo_passes=cse_barrier_expander",
    "as_it_is": "",
}
chosen = sys.argv[sys.argv.index("--xla") + 1] if "--xla" in sys.argv[:-1] else "memory"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} {XLA.get(chosen, '')}".strip()
)  # read when jax starts
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers
from flax.training.train_state import TrainState

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import run_clm_flax as script

FLAGS = "--output_dir=- --config_name=- --tokenizer_name=- --train_file=- --weight_decay=0.01 --learning_rate=1e-4"
SMALL = {"n_layer": 4, "n_embd": 512, "n_head": 8, "vocab_size": 32_000}  # for the time
SMALL_ROWS, SMALL_LENGTH = 4, 256
TOTALS = ("loss", "predicted", "tokens", "grad_norm")


def plain_step(state, totals, batch, seed, model, checkpointing):
    """With the arguments, and the dropout keys, of the script's step."""
    rng = jax.random.fold_in(jax.random.key(seed, impl=script.DROPOUT_PRNG), state.step)
    rng = jax.random.fold_in(jax.random.fold_in(rng, jax.lax.axis_index("batch")), 0)
    input_ids, mask, labels = (batch[name][0] for name in ("input_ids", "attention_mask", "labels"))
    interceptor = (
        script.recompute_blocks()
        if checkpointing
        else lambda next_function, args, kwargs, _: next_function(*args, **kwargs)
    )

    def loss_fn(params):
        with nn.intercept_methods(interceptor):
            logits = model(input_ids, mask, params=params, dropout_rng=rng, train=True).logits[
                :, :-1
            ]
        one_hot = jax.nn.one_hot(labels[:, 1:], logits.shape[-1])
        return optax.softmax_cross_entropy(logits.astype(jnp.float32), one_hot).mean()

    loss, grads = jax.lax.pmean(jax.value_and_grad(loss_fn)(state.params), "batch")
    return state.apply_gradients(grads=grads), {**totals, "loss": loss, "predicted": jnp.float32(1)}


def make_model(**settings):
    config = transformers.GPT2Config(**settings)
    args = script.parse_args(FLAGS.split())
    model = transformers.FlaxAutoModelForCausalLM.from_config(config, _do_init=False)
    return args, config, model, script.make_optimizer(args, num_steps=10_000)[0]


def temporaries(
    layers: int, plain: bool, checkpointing: bool, pieces: int = script.PIECES
) -> float:
    """GB of the compiled step."""
    script.PIECES = pieces
    args, _, model, optimizer = make_model(n_layer=layers)
    params = jax.eval_shape(lambda: model.init_weights(jax.random.PRNGKey(0), (1, 1)))
    state = jax.eval_shape(
        lambda params: TrainState.create(apply_fn=None, params=params, tx=optimizer), params
    )
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), state)
    batch = {
        name: jax.ShapeDtypeStruct((1, 1, 8, 512), jnp.int32)
        for name in ("input_ids", "attention_mask", "labels")
    }
    totals = {name: jax.ShapeDtypeStruct((1,), jnp.float32) for name in TOTALS}
    step = partial(
        plain_step if plain else script.train_step,
        model=model,
        checkpointing=checkpointing,
        seed=args.seed,
    )
    compiled = jax.pmap(step, "batch", donate_argnums=0).lower(state, totals, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e9


def time_ratio(seconds: float) -> dict:
    """The script's step over the plain one, in pairs, for `seconds` and at least ten rounds."""
    args, config, model, optimizer = make_model(**SMALL)
    _, params = script.load_model(args, config)
    state = jax.device_get(TrainState.create(apply_fn=None, params=params, tx=optimizer))
    copy = lambda tree: script.shard(jax.tree.map(lambda x: np.asarray(x)[None], tree))  # noqa: E731
    ids = np.random.default_rng(0).integers(
        0, config.vocab_size, (1, SMALL_ROWS, SMALL_LENGTH), dtype=np.int32
    )
    batch = copy({"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids})
    totals = copy(dict.fromkeys(TOTALS, np.float32(0)))
    steps, states, times = {}, {}, {"script": [], "plain": []}
    for name, function in (("script", script.train_step), ("plain", plain_step)):
        step = partial(function, model=model, checkpointing=False, seed=args.seed)
        steps[name], states[name] = jax.pmap(step, "batch", donate_argnums=0), copy(state)

    def run(name: str) -> float:
        states[name], sums = jax.block_until_ready(steps[name](states[name], totals, batch))
        return float(np.asarray(sums["loss"])[0] / np.asarray(sums["predicted"])[0])

    losses = {name: run(name) for name in steps}
    if abs(losses["script"] / losses["plain"] - 1) > 1e-5:
        raise SystemExit(f"not the same step: {losses}")
    shuffle, end = random.Random(0).shuffle, time.perf_counter() + seconds
    [run(name) for name in steps]
    while time.perf_counter() < end or len(times["plain"]) < 10:
        order = list(steps)
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            run(name)
            times[name].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(times["script"], times["plain"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    medians = {name: round(statistics.median(found), 4) for name, found in times.items()}
    return {
        "rounds": len(ratios),
        "medians": medians,
        "ratio": round(middle, 3),
        "quartiles": [low, high],
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="for the time; 0: no time is taken"
    )
    parser.add_argument(
        "--layers", type=int, default=12, help="of the model whose memory is asked for; 0: of none"
    )
    parser.add_argument("--pieces", type=int, nargs="+", default=[script.PIECES], help="to compare")
    parser.add_argument("--xla", choices=XLA, default="memory", help="how it compiles, see above")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    args = parser.parse_args()
    figures = {
        "jax": jax.__version__,
        "machine": platform.machine(),
        "xla": args.xla,
        "temporaries": {},
    }
    if args.layers:
        print(
            f"temporaries of the compiled step: GPT-2, {args.layers} layers, batch 8 x 512, jax {jax.__version__}"
        )
        whole = None
        for checkpointing in (False, True):
            for pieces in (None, *args.pieces):
                name = f"script, {pieces} pieces" if pieces else "plain"
                name += ", --gradient_checkpointing" if checkpointing else ""
                found = temporaries(args.layers, not pieces, checkpointing, pieces or script.PIECES)
                whole = whole or found
                figures["temporaries"][name] = found
                print(f"{name:<45}{found:8.2f} GB {found / whole:7.1%}", flush=True)
    if args.seconds:
        figures["time"] = found = time_ratio(args.seconds)
        low, high = found["quartiles"]
        print(
            f"time, {SMALL_ROWS} x {SMALL_LENGTH} tokens, {SMALL}: {found['ratio']:.2f} of the plain step's,",
            end=" ",
        )
        print(
            f"quartiles {low:.2f} - {high:.2f}, {found['rounds']} rounds, medians {found['medians']}"
        )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
