#!/usr/bin/env python
# ruff: noqa: E402, XLA reads its flags when jax is imported
"""Memory of the train step of each objective at base size, as it is and with each flag that makes it smaller.

    python benchmarks/memory.py [--objectives masked causal span-masked denoising] [--rows 8] [--length 512]
        [--changes as_it_is accumulate checkpointing bfloat16 adafactor shorter together] [--json FILE]

Memory is what XLA plans for the compiled step (`memory_analysis`) on one CPU device; parameters and batches are
shapes, nothing is allocated or run. Columns, in GB of 10^9 bytes:

    arguments      weights, the optimizer's state and the batch, which stay from step to step
    temporaries    what the step needs beside them: gradients, activations, the optimizer's updates
    sum            of the two, and how much of the first row's it is

XLA's compiler for CPUs differs from those for GPUs and TPUs in two ways that matter here. It orders operations for
concurrency: here it is asked for two orders, for memory and for concurrency, and the smaller plan counts. And its
passes merge the recomputation of --gradient_checkpointing with the first computation: here they are told not to (see
clm_memory.py). Still, it is a plan for a CPU: other devices fuse other operations, and may need no float32 copies of
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

os.environ["JAX_PLATFORMS"] = "cpu"
BARRIERS = "--xla_disable_hlo_passes=cse_barrier_expander"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} {BARRIERS}".strip()
)  # read when jax starts
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
CONFIGS = {  # the sizes of RoBERTa-base, GPT-2 small, T5 v1.0 base and BART-base
    "roberta": {"vocab_size": 50_265, "max_position_embeddings": 514, "type_vocab_size": 1},
    "gpt2": {},
    "t5": {
        "vocab_size": 32_128,
        "num_layers": LAYERS,
        "d_model": WIDTH,
        "num_heads": HEADS,
        "d_ff": 4 * WIDTH,
    },
    "bart": {"d_model": WIDTH}
    | {f"{side}_layers": 6 for side in ("encoder", "decoder")}
    | {f"{side}_attention_heads": HEADS for side in ("encoder", "decoder")}
    | {f"{side}_ffn_dim": 4 * WIDTH for side in ("encoder", "decoder")},
}
CHANGES = {  # name: rows divided by, length divided by, flags
    "as_it_is": (1, 1, ""),
    "accumulate": (4, 1, "--gradient_accumulation_steps=4"),
    "checkpointing": (1, 1, "--gradient_checkpointing"),
    "bfloat16": (1, 1, "--dtype=bfloat16"),
    "adafactor": (1, 1, "--adafactor"),
    "shorter": (1, 4, ""),
    "together": (
        4,
        1,
        "--gradient_accumulation_steps=4 --gradient_checkpointing --dtype=bfloat16 --adafactor",
    ),
}
FLAGS = "--output_dir=- --config_name=- --tokenizer_name=- --train_file=- --weight_decay=0.01 --warmup_steps=100"
TOTALS = ("loss", "predicted", "tokens", "grad_norm")


def fixed_arguments(script, objective: str, args, model) -> dict:
    """What `main` of the script fixes of its step."""
    if objective == "masked":
        collator = SimpleNamespace(mlm_probability=args.mlm_probability, whole_words=False)
        return {
            "model": model,
            "num_slots": partial(script.FlaxDataCollatorForLanguageModeling.num_slots, collator),
        }
    return {"model": model} | (
        {} if objective == "span-masked" else {"checkpointing": args.gradient_checkpointing}
    )


def lengths(script, objective: str, args, length: int) -> dict[str, int]:
    """Of each array of a batch."""
    found = dict.fromkeys(("input_ids", "attention_mask", "labels"), length)
    if objective == "span-masked":
        _, targets = script.compute_input_and_target_lengths(
            length, args.mlm_probability, args.mean_noise_span_length
        )
        return found | dict.fromkeys(("labels", "decoder_input_ids"), targets)
    return found | ({"decoder_input_ids": length} if objective == "denoising" else {})


def planned(objective: str, rows: int, length: int, flags: str) -> tuple[float, dict[str, float]]:
    """GB of the arguments, and of the temporaries in each order of operations."""
    name, model_type, _ = harness.OBJECTIVES[objective]
    script, found = import_module(name.removesuffix(".py")), {}
    args = script.parse_args(
        [*FLAGS.split(), f"--per_device_train_batch_size={rows}", *flags.split()]
    )
    config = CONFIG_MAPPING[model_type](**CONFIGS[model_type])

    if hasattr(script, "mend_clip"):  # as its main does
        script.mend_clip()

    def parameters():
        found["model"], params = script.load_model(args, config)
        return params

    optimizer, _ = script.make_optimizer(args, 10_000)
    params = jax.eval_shape(parameters)
    state = jax.eval_shape(
        lambda params: TrainState.create(apply_fn=None, params=params, tx=optimizer), params
    )
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), state)
    shape = (1, args.gradient_accumulation_steps, rows)
    batch = {
        name: jax.ShapeDtypeStruct((*shape, length), jnp.int32)
        for name, length in lengths(script, objective, args, length).items()
    }
    totals = {name: jax.ShapeDtypeStruct((1,), jnp.float32) for name in TOTALS}
    fixed = fixed_arguments(script, objective, args, found["model"])
    step = jax.pmap(partial(script.train_step, **fixed, seed=args.seed), "batch", donate_argnums=0)
    lowered, temporaries = step.lower(state, totals, batch), {}
    for order, name in ORDERS.items():
        analysis = lowered.compile(
            compiler_options={"xla_cpu_scheduler_type": name}
        ).memory_analysis()
        temporaries[order] = analysis.temp_size_in_bytes / 1e9
    return analysis.argument_size_in_bytes / 1e9, temporaries


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--objectives", nargs="+", choices=harness.OBJECTIVES, default=list(harness.OBJECTIVES)
    )
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    args = parser.parse_args()
    figures = {"jax": jax.__version__, "machine": platform.machine(), "planned": []}
    print(
        f"planned for a step of {args.rows} x {args.length} tokens, base sizes, jax {jax.__version__}, in GB"
    )
    print(f"{'':12} {'':14} {'arguments':>10} {'temporaries':>12} {'sum':>8}")
    for objective in args.objectives:
        whole = None
        for change in args.changes:
            divisor, shorter, flags = CHANGES[change]
            rows, length = args.rows // divisor, args.length // shorter
            arguments, orders = planned(objective, rows, length, flags)
            temporaries = min(orders.values())
            total = arguments + temporaries
            whole = whole or total
            found = {
                "objective": objective,
                "change": change,
                "flags": flags,
                "rows": rows,
                "length": length,
            }
            figures["planned"].append({**found, "arguments": arguments, "temporaries": orders})
            figures_of_row = (
                f"{arguments:10.2f} {temporaries:12.2f} {total:8.2f} {total / whole:6.0%}"
            )
            print(f"{objective:12} {change:14} {figures_of_row}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
