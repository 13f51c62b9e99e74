#!/usr/bin/env python
# ruff: noqa: E402, the compilers read their settings when jax is imported
"""Compile the steps of the training scripts for TPUs and GPUs that this machine does not have.

    make accelerators
    python benchmarks/accelerators.py [--targets v3-8 v5e-8 h100] [--dtypes float32 bfloat16]
        [--objectives masked causal span-masked denoising] [--rows N] [--length N]
        [--flags=--gradient_checkpointing] [--steps train plain evaluation] [--buffers]
        [--json FILE]

Without --rows and --length, the sizes are those of the documented commands. No step is run: XLA's
compiler plans its memory (`memory_analysis`), and counts its operations and the bytes that it moves
(`cost_analysis`). The numbers are those of one device (of a TPU v3-8: one core) and, for the same
versions, exactly repeatable. Columns, in GB of 10^9 bytes:

    state          weights, state of the optimizer, batch
    temporaries    gradients, activations, updates of the optimizer
    limit          what the compiler lets the sum of the two have
    TFLOP, moved   floating-point operations and bytes of a step; no figure for GPUs
    bound          the larger of the times that the two take at the device's rates, in ms

Steps: `train` is the train step as the script builds it, `evaluation` its evaluation step, `plain`
the train step with the logits of all positions, one-hot labels, JAX's "rbg" for dropout and no
recomputation.

With --buffers, a list follows each step: the arrays that fill the memory at the peak of the
compiled program (benchmarks/buffers.py).

TPUs need the package libtpu, GPUs need CUDA's packages (benchmarks/accelerators.txt).
"""

import argparse
import os
import re
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"
# libtpu asks the cloud for its topology and locks the TPU, but there is none.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
# GPU code is chosen without trying candidates on a GPU. The default tiles of Triton, chosen in this
# way, do not fit the products of T5 (JAX 0.10.2).
GPU_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {GPU_FLAGS}".strip()
import buffers
import harness
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from jax.experimental import topologies
from transformers import CONFIG_MAPPING


class Target(NamedTuple):
    """A kind of device. Rates are those of its maker's data sheet, for one device of JAX."""

    topology: str
    # Matrix products: bfloat16 on TPUs, where it is the default for float32 too.
    flops_per_second: float
    bytes_per_second: float
    # GPUs only: multiprocessors, GB of memory, compute capability.
    multiprocessors: int = 0
    gigabytes: float = 0
    capability: tuple[int, int] = (0, 0)
    cache_megabytes: float = 0
    clock_gigahertz: float = 0


TARGETS = {
    "v3-8": Target("v3:2x2", 61.5e12, 450e9),
    "v4-8": Target("v4:2x2x1", 275e12, 1228e9),
    "v5e-8": Target("v5e:2x4", 197e12, 819e9),
    "v5p-8": Target("v5p:2x2x1", 459e12, 2765e9),
    "v6e-8": Target("v6e:2x4", 918e12, 1640e9),
    "a100": Target("1x1x1", 312e12, 2039e9, 108, 80, (8, 0), 40, 1.41),
    "h100": Target("1x1x1", 989e12, 3352e9, 132, 80, (9, 0), 50, 1.98),
}


class Workload(NamedTuple):
    """Sizes and flags of a documented command, on each device of a TPU v3-8."""

    rows: int
    length: int
    flags: str = ""


WORKLOADS = {
    "masked": Workload(128, 128, "--weight_decay=0.01"),
    "causal": Workload(64, 512, "--weight_decay=0.01"),
    "span-masked": Workload(32, 512, "--adafactor --weight_decay=0.001"),
    "denoising": Workload(32, 1024),
}

LAYERS, WIDTH, HEADS = harness.SIZES["base"]
# RoBERTa-base, GPT-2 small, T5 1.1 base and BART-base.
CONFIGS = {
    "roberta": {"vocab_size": 50_265, "max_position_embeddings": 514, "type_vocab_size": 1},
    "gpt2": {},
    "t5": {
        "vocab_size": 32_128,
        "num_layers": LAYERS,
        "d_model": WIDTH,
        "num_heads": HEADS,
        "d_ff": 2048,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
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
FLAGS = [
    "--output_dir=-",
    "--config_name=-",
    "--tokenizer_name=-",
    "--train_file=-",
    "--warmup_steps=100",
]
STEPS = ("train", "plain", "evaluation")


# --------------------------------------------------------------------------------- devices


def target_config(target: Target) -> str:
    """Describe a GPU to XLA's compiler: xla's GpuTargetConfigProto as text.

    The limits are those that CUDA gives for this compute capability. XLA's repository has such
    files in xla/backends/gpu/target_config/specs.
    """
    major, minor = target.capability
    shared_memory = {(8, 0): (167_936, 166_912), (9, 0): (233_472, 232_448)}[target.capability]
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024
          threads_per_warp: 32
          shared_memory_per_block: 49152
          shared_memory_per_core: {shared_memory[0]}
          shared_memory_per_block_optin: {shared_memory[1]}
          threads_per_core_limit: 2048
          core_count: {target.multiprocessors}
          fpus_per_core: {64 if major == 8 else 128}
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          thread_dim_limit_x: 1024
          thread_dim_limit_y: 1024
          thread_dim_limit_z: 64
          memory_bandwidth: {target.bytes_per_second:.0f}
          l2_cache_size: {target.cache_megabytes * 2**20:.0f}
          clock_rate_ghz: {target.clock_gigahertz}
          device_memory_size: {target.gigabytes * 2**30:.0f}
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          device_vendor: "NVIDIA Corporation"
          device_address_bits: 64
          driver_version: "13.0.0"
          runtime_version: "13.0.0"
          compile_time_toolkit_version: "13.0.0"
          dnn_version: "9.10.0"
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        device_description_str: "NVIDIA GPU"
        """


def target_devices(name: str) -> list:
    """The devices of a target, as `jax.pmap` takes them."""
    target = TARGETS[name]
    if target.multiprocessors:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name=target.topology,
            topology=target.topology,
            target_config=target_config(target),
        )
    else:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=target.topology)
    return topology.devices


# ----------------------------------------------------------------------------------- steps


def make_args(script, workload: Workload, dtype: str, flags: str):
    """The arguments of a run of the script."""
    batch_flag = f"--per_device_train_batch_size={workload.rows}"
    words = [*FLAGS, batch_flag, f"--dtype={dtype}", *workload.flags.split(), *flags.split()]
    return script.parse_args(words)


def make_collator(script, objective: str, args, length: int):
    """What the steps take from the collator, without a tokenizer.

    `inputs_length` is for the span-masked script, whose texts are longer than its inputs.
    """
    collator = SimpleNamespace(max_length=length, inputs_length=length)
    if objective == "masked":
        collator.mlm_probability = args.mlm_probability
        collator.whole_words = False
        collator.num_slots = partial(script.FlaxDataCollatorForLanguageModeling.num_slots, collator)
    return collator


def make_plain_loss_fn(objective: str, ignore: int, model):
    """Make the loss as one would write it first: all logits, one-hot labels."""

    def loss_fn(params, batch, dropout_rng=None, z_loss=0.0):
        inputs = {name: array for name, array in batch.items() if name != "labels"}
        outputs = model(
            **inputs, params=params, dropout_rng=dropout_rng, train=dropout_rng is not None
        )
        logits = outputs.logits.astype(jnp.float32)
        labels = batch["labels"]
        if objective == "causal":
            logits = logits[:, :-1]
            labels = labels[:, 1:]
        is_predicted = labels != ignore
        one_hot = jax.nn.one_hot(labels, logits.shape[-1])
        losses = jnp.where(is_predicted, optax.softmax_cross_entropy(logits, one_hot), 0)
        sums = {"loss": losses.sum(), "predicted": is_predicted.sum(dtype=jnp.float32)}
        if objective != "masked":
            sums["z_loss"] = jnp.float32(0)
        return sums["loss"], sums

    return loss_fn


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
    """Make the model, and the shapes of its train state on one device."""
    model, params = script.load_model(args, config)
    optimizer = script.make_optimizer(args, schedule)

    def make_state(params):
        return TrainState.create(apply_fn=None, params=params, tx=optimizer)

    return model, jax.eval_shape(make_state, params)


def on_all_devices(shapes, num_devices: int):
    """Add the axis of `jax.pmap` to a tree of shapes."""

    def add_axis(array):
        return jax.ShapeDtypeStruct((num_devices, *array.shape), array.dtype)

    return jax.tree.map(add_axis, shapes)


def lower_step(objective: str, config, workload: Workload, dtype: str, flags: str, step, devices):
    """Lower a step for `devices`, as the script builds it. `step` is one of STEPS."""
    script = import_module(harness.OBJECTIVES[objective].script.removesuffix(".py"))
    # The main function of a script that has this workaround calls it, too.
    if hasattr(script, "restore_clip_argument"):
        script.restore_clip_argument()
    args = make_args(script, workload, dtype, flags)
    schedule = script.make_schedule(args, 10_000)
    model, state = make_model_and_state(script, args, config, schedule)
    collator = make_collator(script, objective, args, workload.length)
    with ExitStack() as patches:
        for_devices = partial(jax.pmap, devices=devices)
        patches.enter_context(mock.patch.object(jax, "pmap", for_devices))
        if step == "plain":
            plain_loss_fn = make_plain_loss_fn(objective, script.IGNORE, model)
            make_loss_fn = mock.Mock(return_value=plain_loss_fn)
            patches.enter_context(mock.patch.object(script, "make_loss_fn", make_loss_fn))
            prng = mock.Mock(return_value="rbg")
            patches.enter_context(mock.patch.object(script, "dropout_prng", prng))
        p_train_step, p_eval_step = script.make_steps(args, model, collator, schedule)

    accumulation = [args.gradient_accumulation_steps] if step != "evaluation" else []
    batch = {}
    for name, length in array_lengths(script, objective, args, workload.length).items():
        batch[name] = jax.ShapeDtypeStruct((*accumulation, workload.rows, length), jnp.int32)
    if step == "evaluation":
        return p_eval_step.lower(*on_all_devices((state.params, batch), len(devices)))

    names = (*script.TRAINING_SUMS, "tokens", "grad_norm", "learning_rate")
    totals = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in names}
    return p_train_step.lower(*on_all_devices((state, totals, batch), len(devices)))


def compile_step(lowered) -> tuple[dict, jax.stages.Compiled | None]:
    """Compile a lowered step. Returns its figures for one device, and the program.

    The figures are in bytes and operations. If the step does not fit, they are the temporaries that
    it `needed`, and the `limit`, and there is no program.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = re.search(
            r"temporaries \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", str(error)
        )
        if not found:
            raise
        # These gigabytes are of 2^30 bytes.
        return {"needed": float(found[1]) * 2**30, "limit": float(found[2]) * 2**30}, None
    memory = compiled.memory_analysis()
    figures = {
        "state": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    cost = compiled.cost_analysis()
    if cost:
        figures |= {"flops": cost["flops"], "bytes": cost["bytes accessed"]}
    return figures, compiled


# ------------------------------------------------------------------------------------ report


def report_line(row: dict) -> str:
    """A line of the table for the terminal."""
    figures = row["figures"]
    target = TARGETS[row["target"]]
    cells = f"{row['target']:6} {row['objective']:12} {row['dtype']:9} {row['step']:11}"
    if "needed" in figures:
        needed = figures["needed"] / 1e9
        limit = figures["limit"] / 1e9
        return f"{cells} does not fit: {needed:.1f} GB of temporaries, {limit:.1f} GB of memory"
    cells += f"{figures['state'] / 1e9:6.2f} {figures['temporaries'] / 1e9:12.2f}"
    if "flops" in figures:
        seconds = max(
            figures["flops"] / target.flops_per_second, figures["bytes"] / target.bytes_per_second
        )
        cells += f"{figures['flops'] / 1e12:9.2f} {figures['bytes'] / 1e9:8.1f} GB"
        cells += f"{1000 * seconds:8.0f}"
    return cells


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["v3-8", "v5e-8", "h100"])
    parser.add_argument("--objectives", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=["train", "plain"])
    parser.add_argument("--rows", type=int, help="sequences on a device")
    parser.add_argument("--length", type=int, help="tokens in a sequence")
    parser.add_argument("--flags", default="", help="more flags of the script, in one argument")
    parser.add_argument("--buffers", action="store_true", help="list what fills the memory")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()

    print(f"jax {jax.__version__}; one device; GB are 10^9 bytes")
    print(f"{'':41}{'state':>6} {'temporaries':>12} {'TFLOP':>8} {'moved':>11} {'bound':>7}")
    rows = []
    for target in args.targets:
        devices = target_devices(target)
        for objective in args.objectives:
            workload = WORKLOADS[objective]
            workload = workload._replace(
                rows=args.rows or workload.rows, length=args.length or workload.length
            )
            model_type = harness.OBJECTIVES[objective].model_type
            config = CONFIG_MAPPING[model_type](**CONFIGS[model_type])
            for dtype in args.dtypes:
                for step in args.steps:
                    lowered = lower_step(
                        objective, config, workload, dtype, args.flags, step, devices
                    )
                    figures, program = compile_step(lowered)
                    row = {
                        "target": target,
                        "objective": objective,
                        "dtype": dtype,
                        "step": step,
                        "rows": workload.rows,
                        "length": workload.length,
                        "flags": f"{workload.flags} {args.flags}".strip(),
                        "figures": figures,
                    }
                    rows.append(row)
                    print(report_line(row), flush=True)
                    if args.buffers and program:
                        print(buffers.report(buffers.find_peak(program.as_text())), flush=True)
                    harness.write_json(args.json, rows)


if __name__ == "__main__":
    main()
