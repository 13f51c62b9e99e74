#!/usr/bin/env python
"""Inference speed of BERT and other encoders in float32 and bfloat16 with JAX/Flax, on random tokens.
On processors with AMX bfloat16 should be more than twice as fast. JAX takes that path only where a product of bfloat16
operands is accumulated in float32, as AMX does (Intel's Architecture Instruction Set Extensions Reference, TDPBF16PS):
here all products are, and then rounded to bfloat16.

    python run_bert_flax.py --precision bfloat16
    python run_bert_flax.py --compare
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["flax>=0.10.7,<0.13", "jax>=0.6.2,<0.13", "numpy>=2,<3", "transformers>=4.57.1,<5"]
# ///

import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.extend.core import Literal as Constant
from transformers import AutoConfig, FlaxAutoModel, HfArgumentParser
from transformers.hf_argparser import HfArg

DEFAULT_MODEL = "bert-base-uncased"
PRODUCT_SIZE = 2048  # rows and columns

class InputError(Exception):
    """What a user can mend: printed as one line, without a traceback."""

def require(condition, message: str):
    if not condition:
        raise InputError(message)

def explain(what: str, function, *args, **kwargs):
    """`function(*args, **kwargs)`; what a library raises there becomes an InputError, `what` and the first cause."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        while error.__cause__:
            error = error.__cause__
        raise InputError(f"{what}: {str(error)[:400] or type(error).__name__}") from error

@dataclass
class BenchmarkArguments:
    _argument_group_name = "benchmark"
    precision: Literal["float32", "bfloat16"] = HfArg(default="float32", help="Of weights and activations.")
    compare: bool = HfArg(default=False, help="Run both precisions by turns, and say how their times compare.")
    model_name_or_path: str = HfArg(default=DEFAULT_MODEL, help="Hub id or folder of an encoder's weights.")
    batch_size: int = HfArg(default=32, help="Sequences a pass.")
    seq_length: int = HfArg(default=128, help="Tokens a sequence.")
    num_warmup: int = HfArg(default=5, help="Passes before the clock starts.")
    num_iters: int = HfArg(default=100, help="Passes that are timed.")
    seed: int = HfArg(default=42, help="Of the tokens, and of weights where there are none to load.")

def read_args(argv: list[str]) -> BenchmarkArguments:
    """The settings of the command line. Raises InputError."""
    parser = HfArgumentParser(BenchmarkArguments, allow_abbrev=False,
        description=__doc__.partition("\n\n")[0], usage="%(prog)s [--FLAG VALUE ...]")
    parser.error = partial(require, False)
    for action in parser._actions if {"-h", "--help"} & {*argv} else ():  # shown in one spelling, switches as such
        argv, action.option_strings = ["--help"], action.option_strings[:1]
        action.metavar = None if action.choices else action.dest.split("_")[-1].upper()
        action.nargs = 0 if isinstance(action.const, bool) else action.nargs
        action.help += "%(default).0s" * (str(action.default) in ("None", "False"))  # mentioned here, so not added
    args, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    require(not rest, f"unknown arguments: {' '.join(rest)}")
    for name, least in (("batch_size", 1), ("seq_length", 1), ("num_warmup", 0), ("num_iters", 1), ("seed", 0)):
        require(getattr(args, name) >= least, f"--{name} {getattr(args, name)}: it must be at least {least}")
    return args

def subprogram(equation):
    """The program that an operation calls as it is, for example a jitted function; None if it calls none."""
    inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
    return inner if equation.primitive.name in ("jit", "pjit", "custom_jvp_call", "custom_vjp_call") else None

def accumulate_in_float32(function):
    """`function` with the products of bfloat16 operands accumulated in float32 and rounded to bfloat16 after that,
    those of attention as well as those of layers. For such products XLA has a fast path on CPUs with jax 0.10 (not
    with 0.6), and none for those whose result is bfloat16 at once, which Flax asks for."""
    def evaluate(program, consts, inputs):
        values = dict(zip((*program.constvars, *program.invars), (*consts, *inputs), strict=True))
        read = lambda x: x.val if isinstance(x, Constant) else values[x]  # noqa: E731
        for equation in program.eqns:
            operands, inner = [read(x) for x in equation.invars], subprogram(equation)
            if inner is not None:
                results = evaluate(inner.jaxpr, inner.consts, operands)
            elif equation.primitive is jax.lax.dot_general_p and all(x.dtype == jnp.bfloat16 for x in operands):
                params = {**equation.params, "preferred_element_type": np.dtype("float32")}
                results = [equation.primitive.bind(*operands, **params).astype(jnp.bfloat16)]
            else:
                results = equation.primitive.bind(*operands, **equation.params)
                results = results if equation.primitive.multiple_results else [results]
            values.update(zip(equation.outvars, results, strict=True))
        return [read(x) for x in program.outvars]
    def accumulating(*args):
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        results = evaluate(program.jaxpr, program.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)
    return accumulating

def count_flops(program) -> int:
    """Floating-point operations of the matrix products of a program: two for each multiplication and addition."""
    total = 0
    for equation in program.eqns:
        if equation.primitive is jax.lax.dot_general_p:
            (contracted, _), _ = equation.params["dimension_numbers"]
            sizes = equation.invars[0].aval.shape
            sums = math.prod(sizes[i] for i in contracted) if contracted else 0  # a mask of heads sums up nothing
            total += 2 * math.prod(equation.outvars[0].aval.shape) * sums
        elif subprogram(equation) is not None:
            total += count_flops(subprogram(equation).jaxpr)
    return total

def load(args):
    """The config, and the parameters in float32. Raises InputError."""
    name = args.model_name_or_path
    try:
        config = AutoConfig.from_pretrained(name)
        supported = type(config) in transformers.FLAX_MODEL_FOR_MASKED_LM_MAPPING and not config.is_encoder_decoder
        require(supported, f"--model_name_or_path {name}: type {config.model_type} has no encoder in Flax")
        try:
            model, params = FlaxAutoModel.from_pretrained(name, config=config, _do_init=False)
        except ValueError:  # PyTorch's files are read into an initialized model only
            model = FlaxAutoModel.from_pretrained(name, config=config)
            params = model.params
    except InputError:
        raise
    except Exception as error:
        message = f"--model_name_or_path {name}: it cannot be loaded: {' '.join(str(error).split())[:300]}"
        require(name == DEFAULT_MODEL and not Path(name).exists(), message)
        print(f"{name} cannot be fetched: random weights of its size instead, which are as fast.")
        config, params = transformers.BertConfig(), {}
    positions = config.max_position_embeddings
    positions -= config.pad_token_id + 1 if "roberta" in config.model_type else 0  # they count from the pad id on
    require(args.seq_length <= positions, f"--seq_length {args.seq_length}: the model has {positions} positions")
    model = FlaxAutoModel.from_config(config, _do_init=False)
    init = jax.jit(partial(model.init_weights, input_shape=(1, 1)))(jax.random.PRNGKey(args.seed))
    return config, unflatten_dict({**flatten_dict(init), **flatten_dict(params)})  # an MLM checkpoint has no pooler

def make_encoder(config, params, precision: str):
    """A jitted function of parameters and tokens [batch, length] int32 to the last hidden state, and the parameters in
    `precision`. They are arguments of it: with constants XLA could compute beforehand."""
    model = FlaxAutoModel.from_config(config, dtype=jnp.dtype(precision), _do_init=False)
    encode = accumulate_in_float32(lambda params, ids: model(ids, params=params, return_dict=False)[0])
    return jax.jit(encode), jax.tree.map(lambda x: jnp.asarray(x, precision), params)

def make_product(precision: str):
    """A large matrix product with operands of `precision`, accumulated in float32: what the device can reach."""
    product = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32).astype(precision))
    return partial(product, jax.random.normal(jax.random.key(0), (PRODUCT_SIZE, PRODUCT_SIZE), precision))

def timed(functions: dict, num_warmup: int, num_iters: int) -> dict[str, np.ndarray]:
    """Seconds of each call of each function, [num_iters]: they take turns, and each result is waited for."""
    seconds = {name: [] for name in functions}
    for _ in range(num_warmup + num_iters):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values[num_warmup:]) for name, values in seconds.items()}

def hint() -> str:
    """What gain bfloat16 promises on this device, in a sentence."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.is_file() else set()
    if jax.default_backend() != "cpu":
        return f"Device: {jax.devices()[0].device_kind}."
    if "amx_bf16" in flags:
        return "This processor has AMX: bfloat16 should run more than twice as fast as float32."
    if "avx512_bf16" in flags:
        return "This processor has no AMX, only AVX512_BF16, which about doubles the rate of products: expect no more."
    return "This processor has neither AMX nor AVX512_BF16: it computes in float32, and no gain is to be expected."

def run(args) -> int:
    transformers.logging.set_verbosity_error()
    config, params = load(args)
    ids = np.random.default_rng(args.seed).integers(0, config.vocab_size, (args.batch_size, args.seq_length), np.int32)
    encoders = {name: make_encoder(config, params, name) for name in ("float32", "bfloat16")}
    outputs = {name: np.asarray(encode(weights, ids), np.float32) for name, (encode, weights) in encoders.items()}
    error = np.linalg.norm(outputs["bfloat16"] - outputs["float32"]) / np.linalg.norm(outputs["float32"])
    flops = count_flops(jax.make_jaxpr(encoders["float32"][0])(params, ids).jaxpr)
    chosen = ("float32", "bfloat16") if args.compare else (args.precision,)
    functions = {name: partial(*encoders[name], ids) for name in chosen}
    functions |= {f"product in {name}": make_product(name) for name in chosen}
    print(f"{config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}, {args.batch_size} x "
          f"{args.seq_length} tokens, {flops / 1e9:,.0f} GFLOP a pass, jax {jax.__version__}")
    print(hint())
    seconds = timed(functions, args.num_warmup, args.num_iters)
    medians = {name: np.median(values) for name, values in seconds.items()}
    rates = {name: 2 * PRODUCT_SIZE**3 / medians[f"product in {name}"] for name in chosen}
    print(f"{'':10}examples/s   tokens/s  median ms   95% ms   GFLOP/s   of a large product's")
    for name in chosen:
        median, slow, rate = medians[name], np.quantile(seconds[name], 0.95), flops / medians[name]
        print(f"{name:10}{args.batch_size / median:10,.1f}{ids.size / median:11,.0f}{1e3 * median:11,.1f}"
              f"{1e3 * slow:9,.1f}{rate / 1e9:10,.0f}{rate / rates[name]:8.0%} of {rates[name] / 1e9:,.0f}")
    print(f"Relative error of bfloat16's last hidden state against float32's: {error:.2%}.")
    if args.compare:
        print(f"bfloat16 is {medians['float32'] / medians['bfloat16']:.2f} times as fast as float32.")
    return 0

def cli_of_benchmark(argv: list[str]) -> int:
    """Runs `run`. What a user can mend is one line: status 2 for the command line, 1 for the model."""
    args = None
    try:
        args = read_args(argv)
        return run(args)
    except InputError as error:
        print(" ".join(f"{Path(__file__).name}: error: {error}".split()), file=sys.stderr)
        return 1 if args else 2

if __name__ == "__main__":
    sys.exit(cli_of_benchmark(sys.argv[1:]))
