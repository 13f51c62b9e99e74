#!/usr/bin/env python
"""Inference speed of BERT and other encoders in float32 and bfloat16 with JAX/Flax.

It measures the forward pass on random tokens. On processors with AMX, bfloat16 should be more than
twice as fast as float32. JAX uses AMX only for products of bfloat16 matrices that are accumulated
in float32, as AMX does (TDPBF16PS in Intel's Architecture Instruction Set Extensions Reference).
This script computes all products that way and rounds their results to bfloat16.

    python run_bert_flax.py --precision bfloat16
    python run_bert_flax.py --compare
"""

# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "flax>=0.10.7,<0.13",
#     "jax>=0.6.2,<0.13",
#     "numpy>=2,<3",
#     "transformers>=4.57.1,<5",
# ]
# ///

import math
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.extend import core
from transformers import AutoConfig, FlaxAutoModel, HfArgumentParser
from transformers.hf_argparser import HfArg

# If this model cannot be downloaded, random weights of the same size do as well.
DEFAULT_MODEL = "bert-base-uncased"

PRECISIONS = ("float32", "bfloat16")

# Rows and columns of the matrices in the reference product. It is large enough to show the rate of
# multiplication that the device can reach.
PRODUCT_SIZE = 2048


class InputError(Exception):
    """An error the user can fix. `main` prints it as one line, without a traceback."""


# ---------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------


@dataclass
class BenchmarkArguments:
    """What to measure, and how often."""

    _argument_group_name = "benchmark"
    precision: Literal["float32", "bfloat16"] = HfArg(
        default="float32", help="Precision of weights and activations."
    )
    compare: bool = HfArg(
        default=False, help="Alternate between both precisions and report how their times compare."
    )
    model_name_or_path: str = HfArg(
        default=DEFAULT_MODEL, help="Hub id or folder of the encoder to run."
    )
    batch_size: int = HfArg(default=32, help="Number of sequences in a forward pass.")
    seq_length: int = HfArg(default=128, help="Number of tokens in a sequence.")
    num_warmup: int = HfArg(
        default=5, help="Number of forward passes that run before the measurement."
    )
    num_iters: int = HfArg(default=100, help="Number of forward passes to measure.")
    seed: int = HfArg(
        default=42, help="Seed of the random tokens, and of weights that the model does not have."
    )


# ---------------------------------------------------------------------------------------
# Matrix products
# ---------------------------------------------------------------------------------------


def accumulate_in_float32(function):
    """Make a version of `function` that accumulates products of bfloat16 operands in float32.

    The result of each product, in attention as well as in the layers, is then rounded to bfloat16.
    XLA for CPUs has a fast path for such products with JAX 0.10 (not with 0.6). It has none for
    products that result in bfloat16 at once, which is what Flax asks for. On a processor with
    AVX512_BF16, bfloat16 was 2.27 times as fast as float32 with this function, and 0.88 times as
    fast without it. It can go when XLA or Flax accumulates in float32 by itself.
    """

    def accumulating_function(*args):
        program, output_shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        outputs = eval_jaxpr(program.jaxpr, program.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(output_shapes), outputs)

    return accumulating_function


def eval_jaxpr(jaxpr, consts, inputs) -> list:
    """Evaluate a jaxpr, with products of bfloat16 operands accumulated in float32."""
    variables = (*jaxpr.constvars, *jaxpr.invars)
    values = dict(zip(variables, (*consts, *inputs), strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        outputs = eval_equation(equation, operands)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def eval_equation(equation, operands) -> list:
    """Evaluate one equation of a jaxpr."""
    called = called_jaxpr(equation)
    if called is not None:
        return eval_jaxpr(called.jaxpr, called.consts, operands)
    primitive = equation.primitive
    is_product = primitive is jax.lax.dot_general_p
    # Operands of other primitives may be Python numbers (JAX 0.6.2).
    if is_product and all(operand.dtype == jnp.bfloat16 for operand in operands):
        params = {**equation.params, "preferred_element_type": np.dtype("float32")}
        product = primitive.bind(*operands, **params)
        return [product.astype(equation.outvars[0].aval.dtype)]
    outputs = primitive.bind(*operands, **equation.params)
    return outputs if primitive.multiple_results else [outputs]


def called_jaxpr(equation):
    """The jaxpr that an equation calls, such as that of a jitted function, or None."""
    if equation.primitive.name not in ("jit", "pjit", "custom_jvp_call", "custom_vjp_call"):
        return None
    return equation.params.get("jaxpr") or equation.params.get("call_jaxpr")


def count_flops(jaxpr) -> int:
    """Count the floating-point operations of all matrix products in a jaxpr.

    A multiplication and the addition that follows count as two.
    """
    total = 0
    for equation in jaxpr.eqns:
        called = called_jaxpr(equation)
        if called is not None:
            total += count_flops(called.jaxpr)
        elif equation.primitive is jax.lax.dot_general_p:
            (contracted, _), _ = equation.params["dimension_numbers"]
            # A product that contracts no dimension adds nothing up: it scales by a head mask.
            if contracted:
                left_shape = equation.invars[0].aval.shape
                num_terms = math.prod(left_shape[axis] for axis in contracted)
                total += 2 * math.prod(equation.outvars[0].aval.shape) * num_terms
    return total


# ---------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------


def load_encoder(args):
    """Load the config, and the parameters in float32. Raises InputError."""
    name = args.model_name_or_path
    try:
        config, params = load_pretrained(name)
    except InputError:
        raise
    except Exception as error:
        if name != DEFAULT_MODEL or Path(name).exists():
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"--model_name_or_path {name}: it cannot be loaded: {reason}"
            ) from error
        print(
            f"{name} cannot be fetched. Using random weights of the same size, which are as fast."
        )
        config = transformers.BertConfig()
        params = {}

    num_positions = config.max_position_embeddings
    if "roberta" in config.model_type:
        # RoBERTa numbers its positions from the pad id plus one.
        num_positions -= config.pad_token_id + 1
    if args.seq_length > num_positions:
        raise InputError(f"--seq_length {args.seq_length}: the model has {num_positions} positions")

    if config.model_type == "big_bird":
        # The block-sparse attention of Flax takes whole blocks of tokens only.
        config.attention_type = "original_full"
        print("big_bird is measured with full attention.")

    # Initialize what the files lack. The checkpoint of a masked language model has no pooler.
    model = FlaxAutoModel.from_config(config, _do_init=False)
    init_weights = jax.jit(partial(model.init_weights, input_shape=(1, 1)))
    initial = init_weights(jax.random.PRNGKey(args.seed))
    return config, unflatten_dict({**flatten_dict(initial), **flatten_dict(params)})


def load_pretrained(name: str):
    """Load the config and the parameters of the encoder `name`, a Hub id or a folder."""
    config = AutoConfig.from_pretrained(name)
    has_flax_class = type(config) in transformers.FLAX_MODEL_FOR_MASKED_LM_MAPPING
    if not has_flax_class or config.is_encoder_decoder:
        raise InputError(
            f"--model_name_or_path {name}: type {config.model_type} has no encoder in Flax"
        )
    try:
        _, params = FlaxAutoModel.from_pretrained(name, config=config, _do_init=False)
        return config, params
    except ValueError:
        # Transformers reads PyTorch weights only into an initialized model.
        return config, FlaxAutoModel.from_pretrained(name, config=config).params


def make_encoder(config, params, precision: str):
    """Make a jitted function for the forward pass, and the parameters in `precision`.

    The function maps the parameters and tokens, [batch, length] int32, to the last hidden state,
    [batch, length, width]. The parameters are an argument, because XLA may fold constants when it
    compiles.
    """
    model = FlaxAutoModel.from_config(config, dtype=jnp.dtype(precision), _do_init=False)

    def forward(params, input_ids):
        return model(input_ids, params=params, return_dict=False)[0]

    weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, precision), params)
    return jax.jit(accumulate_in_float32(forward)), weights


# ---------------------------------------------------------------------------------------
# Measurement
# ---------------------------------------------------------------------------------------


def make_product(precision: str):
    """Make a function that multiplies two large matrices, to show what rate the device can reach.

    The operands have the dtype `precision`. The product is accumulated in float32.
    """
    shape = (PRODUCT_SIZE, PRODUCT_SIZE)
    matrix = jax.random.normal(jax.random.key(0), shape, precision)

    @jax.jit
    def multiply(matrix):
        product = jnp.dot(matrix, matrix, preferred_element_type=jnp.float32)
        return product.astype(precision)

    return partial(multiply, matrix)


def time_calls(functions: dict, num_warmup: int, num_iters: int) -> dict[str, np.ndarray]:
    """Measure the seconds of each call of each function, [num_iters] float64.

    The functions take turns, so that a change in the load of the machine affects all of them. A
    call ends when its result is ready.
    """
    seconds = {name: [] for name in functions}
    for _ in range(num_warmup + num_iters):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values[num_warmup:]) for name, values in seconds.items()}


def relative_error(encoders: dict, input_ids: np.ndarray) -> float:
    """Norm of the error of bfloat16's last hidden state, relative to float32's norm."""
    outputs = {}
    for precision, (encode, weights) in encoders.items():
        outputs[precision] = np.asarray(encode(weights, input_ids), np.float32)
    difference = outputs["bfloat16"] - outputs["float32"]
    return np.linalg.norm(difference) / np.linalg.norm(outputs["float32"])


def expected_speed() -> str:
    """What speed to expect of bfloat16 on this device, in a sentence."""
    if jax.default_backend() != "cpu":
        return f"Device: {jax.devices()[0].device_kind}."
    cpu_info = Path("/proc/cpuinfo")
    features = set(cpu_info.read_text().split()) if cpu_info.is_file() else set()
    if "amx_bf16" in features:
        return "This processor has AMX: bfloat16 should run more than twice as fast as float32."
    if "avx512_bf16" in features:
        return (
            "This processor has AVX512_BF16 but no AMX: "
            "expect products to be about twice as fast, but no more than that."
        )
    return (
        "This processor has neither AMX nor AVX512_BF16: it computes in float32, so expect no gain."
    )


def print_table(args, seconds: dict[str, np.ndarray], precisions, flops: int) -> None:
    """Print a row of rates and times for each precision. `flops` is that of a forward pass."""
    num_tokens = args.batch_size * args.seq_length
    print(f"{'':10}examples/s   tokens/s  median ms   95% ms   GFLOP/s   of a large product's")
    for precision in precisions:
        median = np.median(seconds[precision])
        percentile_95 = np.quantile(seconds[precision], 0.95)
        rate = flops / median
        product_rate = 2 * PRODUCT_SIZE**3 / np.median(seconds[f"product in {precision}"])
        print(
            f"{precision:10}{args.batch_size / median:10,.1f}{num_tokens / median:11,.0f}"
            f"{1e3 * median:11,.1f}{1e3 * percentile_95:9,.1f}"
            f"{rate / 1e9:10,.0f}{rate / product_rate:8.0%} of {product_rate / 1e9:,.0f}"
        )


# ---------------------------------------------------------------------------------------
# Plumbing
# ---------------------------------------------------------------------------------------


def read_args(argv: list[str]) -> BenchmarkArguments:
    """Read all settings from the command line. Raises InputError."""
    parser = HfArgumentParser(
        BenchmarkArguments,
        allow_abbrev=False,
        description=__doc__.partition("\n\n    ")[0],
        usage="%(prog)s [--FLAG VALUE ...]",
    )
    parser.error = raise_parser_error
    if {"-h", "--help"} & set(argv):
        simplify_help(parser)
        argv = ["--help"]
    args, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if rest:
        # Only flags are shown: a value may be a secret.
        unknown = [word.partition("=")[0] for word in rest if word.startswith("--")]
        raise InputError(f"unknown arguments: {' '.join(unknown) or 'a value without a flag'}")
    check_range(args, "batch_size seq_length num_iters", "at least 1", lambda value: value >= 1)
    check_range(args, "num_warmup seed", "at least 0", lambda value: value >= 0)
    return args


def raise_parser_error(message: str):
    """Raise InputError. argparse's own `error` prints the usage first and ends the process."""
    raise InputError(message)


def simplify_help(parser) -> None:
    """Show each flag in one spelling, with the kind of its value, and its default if it has one."""
    for action in parser._actions:
        action.option_strings = action.option_strings[:1]
        if isinstance(action.const, bool):
            action.nargs = 0
        if not action.choices:
            action.metavar = action.dest.split("_")[-1].upper()
        if str(action.default) in ("None", "False"):
            # A help text that mentions its default gets no "(default: None)".
            action.help += "%(default).0s"


def check_range(args, names: str, meaning: str, is_valid) -> None:
    """Raise InputError for the first flag whose value is not valid.

    `names` are flags, separated by spaces. One that the script does not have, or whose value is
    None, is skipped.
    """
    for name in names.split():
        value = getattr(args, name, None)
        if value is not None and not is_valid(value):
            raise InputError(f"--{name} {value}: it must be {meaning}")


@contextmanager
def exit_on_input_error(status: int):
    """End the process with one line on stderr and `status` for an error that the user can fix."""
    try:
        yield
    except InputError as error:
        message = " ".join(f"{Path(__file__).name}: error: {error}".split())
        print(message, file=sys.stderr)
        raise SystemExit(status) from error


# ---------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Measure an encoder as `argv`, or else the command line, says.

    Ends with SystemExit for an error that the user can fix: status 2 for a wrong command line, 1
    for a model that cannot be used.
    """
    with exit_on_input_error(status=2):
        args = read_args(sys.argv[1:] if argv is None else argv)
    transformers.logging.set_verbosity_error()
    with exit_on_input_error(status=1):
        config, params = load_encoder(args)

    # Compile both precisions, whichever is measured: the report has the error of bfloat16.
    shape = (args.batch_size, args.seq_length)
    input_ids = np.random.default_rng(args.seed).integers(0, config.vocab_size, shape, np.int32)
    encoders = {precision: make_encoder(config, params, precision) for precision in PRECISIONS}
    error = relative_error(encoders, input_ids)
    encode_float32, _ = encoders["float32"]
    flops = count_flops(jax.make_jaxpr(encode_float32)(params, input_ids).jaxpr)
    print(
        f"{config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"{args.batch_size} x {args.seq_length} tokens, {flops / 1e9:,.0f} GFLOP a pass, "
        f"jax {jax.__version__}"
    )
    print(expected_speed())

    # Measure.
    chosen = PRECISIONS if args.compare else (args.precision,)
    functions = {}
    for precision in chosen:
        encode, weights = encoders[precision]
        functions[precision] = partial(encode, weights, input_ids)
    for precision in chosen:
        functions[f"product in {precision}"] = make_product(precision)
    seconds = time_calls(functions, args.num_warmup, args.num_iters)

    # Report.
    print_table(args, seconds, chosen, flops)
    print(f"Relative error of bfloat16's last hidden state against float32's: {error:.2%}.")
    if args.compare:
        ratio = np.median(seconds["float32"]) / np.median(seconds["bfloat16"])
        print(f"bfloat16 is {ratio:.2f} times as fast as float32.")


if __name__ == "__main__":
    main()
