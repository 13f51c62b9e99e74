#!/usr/bin/env python
"""How long a save stops the training loop: with a RoBERTa of 125 million parameters and AdamW, 1.5 GB.

    python benchmarks/save.py [--repetitions 5] [--json FILE]

`stopped` is the time of `Saver.save` when the save before is written, which a run waits for only if it saves again
before; `copy` that of a plain copy of the state from the device, by turns; `written` the time until the checkpoint and
both files of weights are on the disk, in the background. Medians.
"""

import argparse
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import harness


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=harness.SIZES, default="base")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    args = parser.parse_args()
    import jax
    import numpy as np
    from flax.training.train_state import TrainState

    import run_mlm_flax as script

    seconds = {"stopped": [], "copy": [], "written": []}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        text = harness.write_corpus(directory, 1)
        folder = harness.write_model(directory, text, "roberta", args.size, 512, 50265)
        _, flags = harness.command("masked", folder, text, directory / "out", 8, 512)
        settings = script.parse_args(flags)
        config, tokenizer, _ = script.load_config_and_tokenizer(settings)
        model, params = script.load_model(settings, config)
        optimizer, _ = script.make_optimizer(settings, 100)
        state = jax.device_get(
            jax.jit(partial(TrainState.create, apply_fn=None, tx=optimizer))(params=params)
        )
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        state = script.shard(jax.tree.map(lambda x: np.broadcast_to(x, (1, *np.shape(x))), state))
        with script.Saver(settings, model, tokenizer, {}, 0, None) as saver:
            for step in range(1, args.repetitions + 1):
                begin = time.perf_counter()
                copied = jax.tree.map(lambda x: np.array(x.addressable_shards[0].data), state)
                seconds["copy"].append(time.perf_counter() - begin)
                del copied
                begin = time.perf_counter()
                saver.save(state, step, last=False)
                seconds["stopped"].append(time.perf_counter() - begin)
                saver.saving.result()
                seconds["written"].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    figures = {
        "gigabytes": size / 1e9,
        **medians,
        "stopped_to_copy": medians["stopped"] / medians["copy"],
    }
    print(f"A state of {figures['gigabytes']:.2f} GB, medians of {args.repetitions} saves:")
    print(
        f"stopped {medians['stopped']:.2f} s, copy {medians['copy']:.2f} s, written {medians['written']:.2f} s"
    )
    harness.write_json(args.json, figures)


if __name__ == "__main__":
    main()
