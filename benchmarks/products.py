#!/usr/bin/env python
"""Compare the matrix products of a base model in XLA and in PyTorch, on a CPU.

    make pytorch
    python benchmarks/products.py [--python .venv-pytorch/bin/python] [--tokens 1024]
        [--vocab_size 50265] [--runs 3] [--json FILE]

A step of a base model spends most of its time in these products, so their rates bound the steps a
second. Each linear layer has three products: its outputs, the gradients of its inputs and those of
its weights. Weights are stored as nn.Dense and nn.Linear do; GPT-2's layers and a tied head store
them transposed. Processes of the two libraries alternate. Columns, medians of the runs:

    XLA        GFLOP/s, float32
    PyTorch    the same in PyTorch
    ratio      median of the ratios of XLA's rate to PyTorch's
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 768
REPETITIONS = 9
# The products of a layer: inputs [tokens, width] and weights [width, outputs], and the gradients of
# the outputs, [tokens, outputs].
PRODUCTS = {
    "outputs": lambda inputs, weights, gradients: inputs @ weights,
    "gradients of inputs": lambda inputs, weights, gradients: gradients @ weights.T,
    "gradients of weights": lambda inputs, weights, gradients: inputs.T @ gradients,
}


def median_seconds(compute) -> float:
    """Time `compute` some times, after a first call that warms up."""
    compute()
    seconds = []
    for _ in range(REPETITIONS):
        begin = time.perf_counter()
        compute()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def xla_seconds(product, arrays: list[np.ndarray]) -> float:
    """Time a product that XLA compiles."""
    import jax

    operands = [jax.device_put(array) for array in arrays]
    compiled = jax.jit(product)
    return median_seconds(lambda: compiled(*operands).block_until_ready())


def pytorch_seconds(product, arrays: list[np.ndarray]) -> float:
    """Time a product in PyTorch, which stores the weights of a layer transposed."""
    import torch

    inputs, weights, gradients = map(torch.from_numpy, arrays)
    weights = weights.T.contiguous().T
    return median_seconds(lambda: product(inputs, weights, gradients))


def measure(library: str, tokens: int, shapes: list[tuple[int, int]]) -> dict[str, float]:
    """The GFLOP/s of each product of layers of `shapes`, (inputs, outputs)."""
    seconds = xla_seconds if library == "XLA" else pytorch_seconds
    rng = np.random.default_rng(0)
    rates = {}
    for num_inputs, num_outputs in shapes:
        sizes = ((tokens, num_inputs), (num_inputs, num_outputs), (tokens, num_outputs))
        arrays = [rng.standard_normal(size, np.float32) for size in sizes]
        for name, product in PRODUCTS.items():
            flops = 2 * tokens * num_inputs * num_outputs
            rate = flops / seconds(product, arrays) / 1e9
            rates[f"{num_inputs:,} to {num_outputs:,}, {name}"] = rate
    return rates


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-pytorch" / "bin" / "python")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in a batch")
    parser.add_argument("--vocab_size", type=int, default=50265)
    parser.add_argument("--runs", type=int, default=3, help="processes of each library")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()

    shapes = [
        (WIDTH, WIDTH),
        (WIDTH, 4 * WIDTH),
        (4 * WIDTH, WIDTH),
        (WIDTH, args.vocab_size),
    ]
    if args.child:
        print(json.dumps(measure(args.child, args.tokens, shapes)))
        return

    pythons = {"XLA": sys.executable, "PyTorch": str(args.python)}
    flags = [f"--tokens={args.tokens}", f"--vocab_size={args.vocab_size}"]
    runs = {library: [] for library in pythons}
    for _ in range(args.runs):
        for library, python in pythons.items():
            command = [python, __file__, f"--child={library}", *flags]
            environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
            run = subprocess.run(
                command, stdout=subprocess.PIPE, env=environment, text=True, check=True
            )
            runs[library].append(json.loads(run.stdout))
    figures = {}
    print(f"{'product':40}{'XLA':>8}{'PyTorch':>9}{'ratio':>7}")
    for name in runs["XLA"][0]:
        rates = {library: [run[name] for run in runs[library]] for library in runs}
        ratio = statistics.median(np.divide(rates["XLA"], rates["PyTorch"]))
        figures[name] = {**rates, "ratio": ratio}
        medians = [statistics.median(rates[library]) for library in runs]
        print(f"{name:40}{medians[0]:8.0f}{medians[1]:9.0f}{ratio:7.2f}", flush=True)
    if args.json:
        import harness

        harness.write_json(args.json, figures)


if __name__ == "__main__":
    main()
