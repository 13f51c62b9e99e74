#!/usr/bin/env python
"""Measure how long a save stops the training loop.

    python benchmarks/save.py [--size base] [--repetitions 5] [--json FILE]

The state is that of a RoBERTa with 125 million parameters and of AdamW, 1.5 GB. Figures are
medians:

    stopped   time of `Saver.save` when the previous save is complete; a run waits for the previous
              save only if it saves again before that is complete
    copy      time of a plain copy of the state from the device, taken before each save
    written   time until the checkpoint and both weight files are on disk, in the background
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import harness


def make_run(directory: Path, size: str) -> tuple:
    """Make the settings, the model, the tokenizer and the state that a save needs.

    Returns them and the size of the state in bytes.
    """
    import jax

    import run_mlm_flax as script

    text = harness.write_corpus(directory, 1)
    folder = harness.write_model(directory, text, "roberta", size, 512, 50265)
    _, flags = harness.command("masked", folder, text, directory / "out", 8, 512)
    settings = script.parse_args(flags)
    config, tokenizer, _ = script.load_config_and_tokenizer(settings)
    model, params = script.load_model(settings, config)
    optimizer = script.make_optimizer(settings, script.make_schedule(settings, 100))
    state = script.create_train_state(params, optimizer)
    num_bytes = sum(array.nbytes for array in jax.tree.leaves(state))
    return settings, model, tokenizer, script.replicate(state), num_bytes


def measure(directory: Path, size: str, repetitions: int) -> tuple[int, dict[str, float]]:
    """Save several times; return the size of the state in bytes and median seconds."""
    import jax
    import numpy as np

    import run_mlm_flax as script

    settings, model, tokenizer, state, num_bytes = make_run(directory, size)
    seconds = {"stopped": [], "copy": [], "written": []}
    with (
        script.OutputLock(settings.output_dir) as lock,
        script.Saver(settings, model, tokenizer, {}, 0, None, lock) as saver,
    ):
        for step in range(1, repetitions + 1):
            begin = time.perf_counter()
            copied = jax.tree.map(lambda array: np.array(array.addressable_shards[0].data), state)
            seconds["copy"].append(time.perf_counter() - begin)
            del copied
            begin = time.perf_counter()
            saver.save(state, step, is_last=False)
            seconds["stopped"].append(time.perf_counter() - begin)
            saver.saving.result()
            seconds["written"].append(time.perf_counter() - begin)
    return num_bytes, {name: statistics.median(values) for name, values in seconds.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=harness.SIZES, default="base")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as directory:
        num_bytes, medians = measure(Path(directory), args.size, args.repetitions)
    figures = {
        "gigabytes": num_bytes / 1e9,
        **medians,
        "stopped_to_copy": medians["stopped"] / medians["copy"],
    }
    print(f"A state of {figures['gigabytes']:.2f} GB, medians of {args.repetitions} saves:")
    print(
        f"stopped {medians['stopped']:.2f} s, copy {medians['copy']:.2f} s,"
        f" written {medians['written']:.2f} s"
    )
    harness.write_json(args.json, figures)


if __name__ == "__main__":
    main()
