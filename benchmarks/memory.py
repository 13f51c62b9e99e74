#!/usr/bin/env python
# ruff: noqa: E402, XLA reads its flags when jax is imported
"""Compare the memory of each objective's train step at base size, with and without memory flags.

    python benchmarks/memory.py [--objectives masked causal span-masked denoising]
        [--rows 8] [--length 512]
        [--changes as_it_is accumulate checkpointing bfloat16 adafactor shorter together]
        [--json FILE]

Memory is what XLA plans for the compiled step (`memory_analysis`) on one CPU device. No step is
run, and batches and the train state are only shapes. Columns, in GB of 10^9 bytes:

    arguments      the weights, the state of the optimizer and the batch
    temporaries    the rest: gradients, activations, updates of the optimizer
    sum            the sum of the two, and its ratio to that of the objective's first row

XLA's compiler for CPUs differs from those for GPUs and TPUs in two ways that matter here:

- It orders operations for concurrency. Here each step is compiled twice, ordered for memory and for
  concurrency, and the smaller plan counts.
- Its passes merge the recomputation of --gradient_checkpointing with the first computation. Here
  they are told not to (see clm_memory.py).

Still, the plan is for a CPU. Other devices fuse other operations, and may need no float32 copies of
bfloat16 operands.
"""

import argparse
import json
import os
import platform
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

KEEP_BARRIERS = "--xla_disable_hlo_passes=cse_barrier_expander"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {KEEP_BARRIERS}".strip()
import harness
import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState
from transformers import CONFIG_MAPPING

ORDERS = {
    "memory": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "concurrency": "CPU_SCHEDULER_TYPE_CONCURRENCY_OPTIMIZED",
}
LAYERS, WIDTH, HEADS = harness.SIZES["base"]
# The sizes of RoBERTa-base, GPT-2 small, T5 v1.0 base and BART-base.
CONFIGS = {
    "roberta": {"vocab_size": 50_265, "max_position_embeddings": 514, "type_vocab_size": 1},
    "gpt2": {},
    "t5": {
        "vocab_size": 32_128,
        "num_layers": LAYERS,
        "d_model": WIDTH,
        "num_heads": HEADS,
        "d_ff": 4 * WIDTH,
    },
    "bart": {
        "d_model": WIDTH,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "encoder_ffn_dim": 4 * WIDTH,
        "decoder_ffn_dim": 4 * WIDTH,
    },
}


class Change(NamedTuple):
    """Flags to add to a run, and divisors of its number of rows and of its length."""

    flags: str
    divide_rows: int = 1
    divide_length: int = 1


CHANGES = {
    "as_it_is": Change(""),
    "accumulate": Change("--gradient_accumulation_steps=4", divide_rows=4),
    "checkpointing": Change("--gradient_checkpointing"),
    "bfloat16": Change("--dtype=bfloat16"),
    "adafactor": Change("--adafactor"),
    "shorter": Change("", divide_length=4),
    "together": Change(
        "--gradient_accumulation_steps=4 --gradient_checkpointing --dtype=bfloat16 --adafactor",
        divide_rows=4,
    ),
}
FLAGS = [
    "--output_dir=-",
    "--config_name=-",
    "--tokenizer_name=-",
    "--train_file=-",
    "--weight_decay=0.01",
    "--warmup_steps=100",
]
OTHER_TOTALS = ("tokens", "grad_norm", "learning_rate")


def make_loss_fn(script, objective: str, args, model):
    """Make the loss of the train step, without a tokenizer for the collator."""
    collator = None
    if objective == "masked":
        collator = SimpleNamespace(mlm_probability=args.mlm_probability, whole_words=False)
        collator.num_slots = partial(script.FlaxDataCollatorForLanguageModeling.num_slots, collator)
    return script.make_loss_fn(args, model, collator)


def array_lengths(script, objective: str, args, length: int) -> dict[str, int]:
    """The length of the sequences in each array of a batch."""
    lengths = {"input_ids": length, "attention_mask": length, "labels": length}
    if objective == "span-masked":
        _, target_length = script.compute_input_and_target_lengths(
            length, args.mlm_probability, args.mean_noise_span_length
        )
        lengths["labels"] = target_length
        lengths["decoder_input_ids"] = target_length
    if objective == "denoising":
        lengths["decoder_input_ids"] = length
    return lengths


def make_model_and_state(script, args, config, schedule):
    """Make the model, and the shapes of its train state, [1, ...] each as for one device."""
    model, params = script.load_model(args, config)
    optimizer = script.make_optimizer(args, schedule)

    def make_state(params):
        return TrainState.create(apply_fn=None, params=params, tx=optimizer)

    def on_one_device(array):
        return jax.ShapeDtypeStruct((1, *array.shape), array.dtype)

    state = jax.tree.map(on_one_device, jax.eval_shape(make_state, params))
    return model, state


def planned_memory(
    objective: str, rows: int, length: int, flags: str
) -> tuple[float, dict[str, float]]:
    """Plan the memory of a step in GB: the arguments, and the temporaries in each order."""
    script_name, model_type, _ = harness.OBJECTIVES[objective]
    script = import_module(script_name.removesuffix(".py"))
    batch_flag = f"--per_device_train_batch_size={rows}"
    args = script.parse_args([*FLAGS, batch_flag, *flags.split()])
    config = CONFIG_MAPPING[model_type](**CONFIGS[model_type])
    # The main function of a script that has this workaround calls it, too.
    if hasattr(script, "restore_clip_argument"):
        script.restore_clip_argument()

    schedule = script.make_schedule(args, 10_000)
    model, state = make_model_and_state(script, args, config, schedule)
    batch = {}
    for name, array_length in array_lengths(script, objective, args, length).items():
        shape = (1, args.gradient_accumulation_steps, rows, array_length)
        batch[name] = jax.ShapeDtypeStruct(shape, jnp.int32)
    names = (*script.TRAINING_SUMS, *OTHER_TOTALS)
    totals = {name: jax.ShapeDtypeStruct((1,), jnp.float32) for name in names}

    loss_fn = make_loss_fn(script, objective, args, model)
    step = partial(script.train_step, loss_fn=loss_fn, schedule=schedule, seed=args.seed)
    p_step = jax.pmap(step, "batch", donate_argnums=0)
    lowered = p_step.lower(state, totals, batch)
    temporaries = {}
    for order, scheduler in ORDERS.items():
        compiled = lowered.compile(compiler_options={"xla_cpu_scheduler_type": scheduler})
        analysis = compiled.memory_analysis()
        temporaries[order] = analysis.temp_size_in_bytes / 1e9
    return analysis.argument_size_in_bytes / 1e9, temporaries


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    objectives = list(harness.OBJECTIVES)
    parser.add_argument("--objectives", nargs="+", choices=objectives, default=objectives)
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument("--rows", type=int, default=8, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=512, help="tokens in a sequence")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()

    figures = {"jax": jax.__version__, "machine": platform.machine(), "planned": []}
    print(
        f"planned for a step of {args.rows} x {args.length} tokens, base sizes,"
        f" jax {jax.__version__}, in GB"
    )
    print(f"{'':12} {'':14} {'arguments':>10} {'temporaries':>12} {'sum':>8}")
    for objective in args.objectives:
        first_total = None
        for name in args.changes:
            change = CHANGES[name]
            rows = args.rows // change.divide_rows
            length = args.length // change.divide_length
            arguments, orders = planned_memory(objective, rows, length, change.flags)
            temporaries = min(orders.values())
            total = arguments + temporaries
            first_total = first_total or total
            row = {
                "objective": objective,
                "change": name,
                "flags": change.flags,
                "rows": rows,
                "length": length,
                "arguments": arguments,
                "temporaries": orders,
            }
            figures["planned"].append(row)
            numbers = f"{arguments:10.2f} {temporaries:12.2f} {total:8.2f}"
            print(f"{objective:12} {name:14} {numbers} {total / first_total:6.0%}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
