#!/usr/bin/env python
"""Masked language modeling (BERT, RoBERTa, ...) with JAX/Flax over a streamed dataset of any size.

The objective is BERT's (Devlin et al., 2018, https://arxiv.org/abs/1810.04805). The text is read,
tokenized and shuffled while the model trains, and none of it is stored, so it may be larger than
the disk.

    python run_mlm_flax_stream.py --output_dir=out --dataset_name=corpus \
        --config_name=./my-roberta --tokenizer_name=./my-roberta
"""

# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "datasets>=3.6,<6",
#     "flax>=0.10.7,<0.13",
#     "huggingface_hub>=0.34,<1",
#     "jax>=0.6.2,<0.13",
#     "numpy>=2,<3",
#     "optax>=0.2.5,<0.3",
#     "requests>=2.32.2,<3",
#     "safetensors>=0.5,<1",
#     "tensorboard>=2.19,<3",
#     "tqdm>=4.66.3,<5",
#     "transformers>=4.57.1,<5",
# ]
# ///

import fcntl
import glob
import hashlib
import inspect
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Literal, NamedTuple

if __name__ == "__main__":
    # Ctrl-C during the imports that follow, which take seconds, shows no traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import datasets
import flax.linen as nn
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import optax
import requests
import transformers
from datasets.distributed import split_dataset_by_node
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.extend.random import define_prng_impl
from safetensors.numpy import load_file, save_file
from tensorboard.summary import Writer
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import AutoConfig, AutoTokenizer, FlaxAutoModelForMaskedLM, HfArgumentParser
from transformers.hf_argparser import HfArg
from transformers.models.auto import modeling_flax_auto

logger = logging.getLogger(__name__)

# Label of a token that is not predicted. The loss skips it.
IGNORE = -100

# The class that builds the model from a config or loads it.
MODEL_CLASS = FlaxAutoModelForMaskedLM

# Flags of run_mlm_flax.py that make no sense here: a stream has no lines and no length.
NOT_OF_A_STREAM = {
    "--line_by_line",
    "--pad_to_max_length",
    "--train_ref_file",
    "--validation_ref_file",
    "--whole_word_mask",
    "--num_train_epochs",
    "--validation_split_percentage",
}

# Texts that are read and tokenized at a time.
TEXTS_AT_A_TIME = 64

# The builder of `datasets` for each extension of a data file.
LOADERS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}

# A second extension of a data file, if it is compressed. .zst needs the package zstandard.
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

# Each use of the seed has random numbers of its own: the order of the data, the noise in training,
# and that in evaluation.
ORDER_STREAM = 0
TRAINING_STREAM = 1
EVALUATION_STREAM = 2

# The sums that `loss_sums` returns in training. `train_step` adds them up.
TRAINING_SUMS = ("loss", "predicted")

# The optimizer counts its steps in int32.
MAX_STEPS = 2**31 - 1

# Signals that stop a run after the current step. The run saves a checkpoint first. A terminal that
# is closed sends SIGHUP.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

# The flags of TrainingArguments and ModelArguments that change what a run learns. A resumed run
# logs those that differ.
LEARNING_FLAGS = (
    "dtype",
    "seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "num_train_steps",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "load_best_model_at_end",
    "early_stopping_patience",
)

# Seconds that a server of the Hub has to answer a request.
HUB_SECONDS = 50

# The file in the output directory that a run locks.
LOCK_FILE = ".lock"

# The folder in the output directory where files are written before they get their place.
TEMPORARY_FOLDER = ".tmp"

# The checksums of an exported model, for `sha256sum --check`.
CHECKSUM_FILE = "SHA256SUMS"

# What is known of the best evaluation before the first one: the loss is the largest float32.
NO_BEST = {
    "step": 0,
    "eval_loss": float(np.finfo(np.float32).max),
    "evaluated": 0,
    "without_improvement": 0,
}

# Settings of a config that --config_overrides leaves alone: they say what the config is.
FIXED_SETTINGS = ("model_type", "architectures", "transformers_version")

# Files of a checkpoint, which is the folder checkpoints/STEP.
STATE_FILE = "state.safetensors"
RUN_FILE = "run.json"


class InputError(Exception):
    """An error the user can fix. `main` prints it as one line, without a traceback."""


@contextmanager
def input_errors(what: str):
    """Turn an error that a library raises in the block into an InputError.

    The message is `what`, followed by the message of the error's first cause.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        cause = error
        while cause.__cause__:
            cause = cause.__cause__
        reason = str(cause)[:400] or type(cause).__name__
        if isinstance(cause, KeyError):
            # The message of a KeyError is the key alone.
            reason = f"unknown name {reason}"
        raise InputError(f"{what}: {reason}") from error


# ---------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------


@dataclass
class ModelArguments:
    """Which model and tokenizer to train or evaluate."""

    _argument_group_name = "model"
    model_name_or_path: str | None = HfArg(
        default=None,
        help="Hub id or folder of a pretrained model to continue training or to evaluate.",
    )
    model_type: str | None = HfArg(
        default=None,
        help="Model family to train from scratch with its default config, such as roberta.",
    )
    config_name: str | None = HfArg(
        default=None, help="Hub id or folder of a config. Default: that of --model_name_or_path."
    )
    config_overrides: str | None = HfArg(
        default=None,
        help="Settings of the config to replace in a model that is trained from scratch, such as "
        "hidden_size=128,num_attention_heads=2. A list is written as in JSON.",
    )
    tokenizer_name: str | None = HfArg(
        default=None, help="Hub id or folder of a tokenizer. Default: that of --model_name_or_path."
    )
    cache_dir: str | None = HfArg(
        default=None, help="Folder for downloads, tokenized data and compiled programs."
    )
    token: str | None = HfArg(
        default=None, help="Hub access token for private models and datasets.", repr=False
    )
    use_fast_tokenizer: bool = HfArg(
        default=True,
        help="Use the fast (Rust) tokenizer. --no_use_fast_tokenizer uses the one in Python.",
    )
    dtype: Literal["float32", "float16", "bfloat16"] = HfArg(
        default="float32", help="Compute dtype. Weights stay in float32."
    )
    trust_remote_code: bool = HfArg(
        default=False, help="Run the code that comes with a model or dataset on the Hub."
    )


@dataclass
class DataTrainingArguments:
    """Which text to train and evaluate on, and how to mask it."""

    _argument_group_name = "data"
    dataset_name: str | None = HfArg(
        default=None, help="Hub id of a dataset, or a folder of data files."
    )
    dataset_config_name: str | None = HfArg(
        default=None, help="Configuration of the dataset, such as its language."
    )
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "action": "extend",
            "help": "Files of training text: .parquet, or .txt, .json, .jsonl and .csv, which may "
            "be compressed (.gz, .bz2, .xz, .zst). They are read in this order. Those of a quoted "
            "pattern, such as 'part-*.txt.gz', are sorted.",
        },
    )
    validation_file: list[str] | None = field(
        default=None,
        metadata={
            "action": "extend",
            "help": "Files of evaluation text, given in the same way.",
        },
    )
    text_column_name: str = HfArg(
        default="text",
        help="Column that holds the text. Without it, the only string column is used.",
    )
    num_eval_samples: int = HfArg(
        default=50000,
        help="Blocks of the evaluation set. Without validation data, these are the first blocks of "
        "the training data, which are then not trained on.",
    )
    shuffle_buffer_size: int = HfArg(
        default=10000,
        help="Blocks that are shuffled at a time, at least those of a batch.",
    )
    max_seq_length: int | None = HfArg(
        default=None, help="Sequence length in tokens. Default: the limit of tokenizer and model."
    )
    mlm_probability: float = HfArg(default=0.15, help="Fraction of the tokens to predict.")
    max_train_samples: int | None = HfArg(default=None, help="Blocks of an epoch, at most.")
    max_eval_samples: int | None = HfArg(default=None, help="Evaluate on at most this many blocks.")
    preprocessing_num_workers: int | None = HfArg(
        default=None, help="Number of threads that tokenize. Default: one for each core."
    )
    overwrite_cache: bool = HfArg(default=False, help="Has no effect: a stream is never cached.")


@dataclass
class TrainingArguments:
    """How to train, evaluate, save and upload."""

    _argument_group_name = "training"
    output_dir: str = HfArg(help="Folder for the model, its checkpoints and its logs.")
    overwrite_output_dir: bool = HfArg(
        default=False, help="Start from the beginning and delete the checkpoints in --output_dir."
    )
    resume_from_checkpoint: str | None = HfArg(
        default=None,
        metadata={"nargs": "?", "const": ""},
        help="Checkpoint or output directory to resume from. Without a value: --output_dir. A run "
        "resumes from its own checkpoints without this flag.",
    )
    do_train: bool = HfArg(
        default=False, help="Train. Without --do_eval, skip evaluation. With neither flag, do both."
    )
    do_eval: bool = HfArg(
        default=False, help="Evaluate. Without --do_train, evaluate a trained model."
    )
    per_device_train_batch_size: int = HfArg(
        default=8, help="Sequences on each device in a forward pass of training."
    )
    per_device_eval_batch_size: int = HfArg(
        default=8, help="Sequences on each device in a forward pass of evaluation."
    )
    gradient_accumulation_steps: int = HfArg(
        default=1, help="Number of batches whose gradients are summed for each optimizer step."
    )
    gradient_checkpointing: Literal["auto", "none", "attention", "layers"] = HfArg(
        default="auto",
        metadata={"nargs": "?", "const": "layers"},
        help="What to recompute in the backward pass. This saves memory and takes time. auto: "
        "attention from 512 tokens on. Without a value: layers.",
    )
    num_train_steps: int = HfArg(default=50000, help="Number of optimizer steps.")
    max_steps: int = HfArg(
        default=-1,
        help="If positive, the number of optimizer steps, instead of --num_train_steps.",
    )
    learning_rate: float = HfArg(default=5e-5, help="Peak learning rate.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "inverse_sqrt"] = HfArg(
        default="linear", help="Learning rate schedule after the warm-up."
    )
    warmup_steps: int = HfArg(
        default=0, help="Steps over which the learning rate rises linearly from 0 to its peak."
    )
    weight_decay: float = HfArg(
        default=0.0, help="Decoupled weight decay on matrices, not on biases or norms."
    )
    adam_beta1: float = HfArg(default=0.9, help="Decay rate of AdamW's first moment.")
    adam_beta2: float = HfArg(default=0.999, help="Decay rate of AdamW's second moment.")
    adam_epsilon: float = HfArg(default=1e-8, help="Epsilon of AdamW.")
    adafactor: bool = HfArg(default=False, help="Use Adafactor instead of AdamW.")
    max_grad_norm: float = HfArg(
        default=0.0, help="Clip gradients to this global norm. 0 turns clipping off."
    )
    logging_steps: int = HfArg(
        default=500, help="Write a log line every this many optimizer steps."
    )
    save_steps: int = HfArg(default=500, help="Save a checkpoint every this many optimizer steps.")
    save_total_limit: int = HfArg(default=2, help="Number of checkpoints to keep.")
    eval_steps: int | None = HfArg(
        default=None, help="Steps between two evaluations. Default: only at the end."
    )
    load_best_model_at_end: bool = HfArg(
        default=False,
        help="Save a checkpoint at each evaluation, too, and evaluate after the last step. Keep "
        "the checkpoint with the lowest eval_loss, and export its weights at the end.",
    )
    early_stopping_patience: int | None = HfArg(
        default=None,
        help="With --load_best_model_at_end: stop training after this many evaluations without a "
        "lower eval_loss.",
    )
    profile_steps: str | None = HfArg(
        default=None,
        help="First and last step, such as 10:13, of a trace for TensorBoard's profile plugin. It "
        "is written to the folder profile in --output_dir.",
    )
    seed: int = HfArg(default=42, help="Seed of initialization, data order, masks and dropout.")
    distributed: bool = HfArg(
        default=False,
        help="This is one process of several, started by a TPU pod, SLURM, Open MPI, or with "
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.",
    )
    disable_tqdm: bool = HfArg(
        default=False,
        help="Hide progress bars. They are always hidden if stderr is not a terminal.",
    )
    push_to_hub: bool = HfArg(default=False, help="Upload --output_dir to the Hub at each save.")
    hub_model_id: str | None = HfArg(
        default=None, help="Repository to upload to. Default: the name of --output_dir."
    )
    hub_token: str | None = HfArg(
        default=None,
        help="Hub access token for uploads. Default: --token, or else the token of your login.",
        repr=False,
    )


def check_objective_args(args) -> None:
    """Check the flags that only this script has. Raises InputError."""
    names = "max_seq_length num_train_steps shuffle_buffer_size"
    check_range(args, names, "at least 1", lambda value: value >= 1)
    check_range(args, "mlm_probability", "above 0 and below 1", lambda value: 0 < value < 1)
    least = 1 if args.do_eval else 0
    check_range(
        args, "num_eval_samples", "at least 0, and with evaluation 1", lambda value: value >= least
    )
    if args.load_best_model_at_end and not args.eval_steps:
        raise InputError("--load_best_model_at_end needs --eval_steps: a stream has no epochs")
    families = sorted(modeling_flax_auto.FLAX_MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    if args.model_type not in (None, *families):
        raise InputError(f"--model_type {args.model_type}: not one of {', '.join(families)}")


# ---------------------------------------------------------------------------------------
# Objective
# ---------------------------------------------------------------------------------------


@dataclass
class FlaxDataCollatorForLanguageModeling:
    """BERT's masking, for a whole batch at once.

    Each token that is not special is predicted with probability `mlm_probability`. Of the predicted
    tokens, 80% are replaced by the mask token, 10% by a random token of the whole vocabulary, and
    10% are left unchanged.
    """

    tokenizer: transformers.PreTrainedTokenizerBase
    max_length: int
    mlm_probability: float = 0.15

    def __post_init__(self):
        if self.tokenizer.mask_token_id is None:
            raise InputError(f"{self.tokenizer.name_or_path}: it has no mask token")
        vocabulary = np.arange(count_token_ids(self.tokenizer))
        self.is_special = np.isin(vocabulary, self.tokenizer.all_special_ids)

    def num_slots(self, num_tokens: int) -> int:
        """Count the slots for predicted tokens in a forward pass over `num_tokens` tokens.

        The head and the loss run on a fixed number of slots, so that shapes are static. Four
        standard deviations above the mean suffice in all but one of ten thousand passes.
        """
        mean = num_tokens * self.mlm_probability
        deviation = math.sqrt(mean * (1 - self.mlm_probability))
        return min(num_tokens, 16 * math.ceil((mean + 4 * deviation) / 16))

    def __call__(self, examples: dict[str, np.ndarray], rngs, group_size: int):
        """Mask `input_ids` in place and add `labels`, both [rows, length] int32.

        `rngs` yields a NumPy generator for each row. A forward pass takes `group_size` rows, whose
        predicted tokens share its slots.
        """
        input_ids = examples["input_ids"]
        num_rows, length = input_ids.shape
        # Two uniform numbers for each token. The first one decides whether it is predicted, the
        # second one what is shown in its place.
        draws = np.concatenate([rng.random((length, 2)) for rng in rngs])
        choice_draws, replacement_draws = draws.T

        # Positions count through the whole batch.
        tokens = input_ids.ravel()
        positions = np.flatnonzero((choice_draws < self.mlm_probability) & ~self.is_special[tokens])
        positions = self.drop_surplus(positions, choice_draws, group_size * length)
        labels = np.full(tokens.shape, IGNORE, np.int32)
        labels[positions] = tokens[positions]
        input_ids.flat[positions] = self.replace(tokens[positions], replacement_draws[positions])
        return {**examples, "labels": labels.reshape(num_rows, length)}

    def drop_surplus(self, positions: np.ndarray, draws: np.ndarray, num_tokens: int):
        """Keep at most `num_slots` positions in each forward pass over `num_tokens` tokens.

        Those with the smallest `draws`, [tokens], stay. This alone depends on which sequences are
        in a batch together, in one of ten thousand passes.
        """
        slots = self.num_slots(num_tokens)
        kept = []
        for start in range(0, len(draws), num_tokens):
            first, end = np.searchsorted(positions, (start, start + num_tokens))
            group = positions[first:end]
            if len(group) > slots:
                limit = np.sort(draws[group])[slots]
                group = group[draws[group] < limit]
            kept.append(group)
        return np.concatenate(kept)

    def replace(self, tokens: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """What is shown in place of `tokens`: 80% mask token, 10% a random token, 10% unchanged.

        `draws` are uniform in [0, 1), and both arrays are [predicted].
        """
        # A draw from 0.8 to 0.9 is scaled to a token id.
        vocab_size = len(self.is_special)
        random_tokens = ((draws - 0.8) / 0.1 * vocab_size).astype(np.int32)
        # Rounding must not lead beyond the vocabulary.
        random_tokens = np.minimum(random_tokens, vocab_size - 1)
        shown = np.where(draws < 0.9, random_tokens, tokens)
        return np.where(draws < 0.8, self.tokenizer.mask_token_id, shown)


def keep_only(positions: jax.Array, last_layer: str):
    """Make an interceptor that keeps the hidden states of `positions` only.

    `positions`, [slots] int32, count through the batch. The hidden states become [1, slots, width].
    After the last attention, positions no longer interact. So the rest of the last layer and the
    head are not needed where nothing is predicted. This makes the whole step 1.5 to 2 times as fast
    (benchmarks/mlm_step.py). The cut is made before the output projection of the last attention,
    or, in a model whose modules have other names, such as ALBERT, after its base model. Make
    one for each call of the model, for `flax.linen.intercept_methods`.
    """
    is_cut = False

    def select(hidden_states: jax.Array) -> jax.Array:
        width = hidden_states.shape[-1]
        return hidden_states.reshape(-1, width).at[positions].get(mode="clip")[None]

    def interceptor(next_function, args, kwargs, context):
        nonlocal is_cut
        path = context.module.path
        # For example ("bert", "encoder", "layer", "11", "attention", "output").
        if path[2:] == ("layer", last_layer, "attention", "output"):
            is_cut = True
            # Its arguments are the attention's result and the residual.
            return next_function(*map(select, args), **kwargs)
        outputs = next_function(*args, **kwargs)
        is_base_model = len(path) == 1 and isinstance(outputs, tuple)
        if is_base_model and not is_cut:
            return (select(outputs[0]), *outputs[1:])
        return outputs

    return interceptor


def cross_entropy_sums(logits, labels, with_accuracy: bool) -> dict:
    """Sum the cross-entropy of the tokens with a label other than -100.

    Args:
        logits: [tokens, vocabulary].
        labels: [tokens] int32.
        with_accuracy: Whether to count the correct predictions.

    Returns:
        The sums `loss`, `predicted` (the number of predicted tokens) and, if asked for, `accuracy`
        (the number of correct ones), float32 scalars.
    """
    logits = logits.astype(jnp.float32)
    is_predicted = labels != IGNORE
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, jnp.where(is_predicted, labels, 0)
    )
    sums = {
        "loss": jnp.where(is_predicted, losses, 0).sum(),
        "predicted": is_predicted.sum(dtype=jnp.float32),
    }
    if with_accuracy:
        is_correct = is_predicted & (logits.argmax(-1) == labels)
        sums["accuracy"] = is_correct.sum(dtype=jnp.float32)
    return sums


def loss_sums(params, batch, model, num_slots, dropout_rng=None):
    """Sum the cross-entropy of the predicted tokens, those with a label other than -100.

    Args:
        params: Parameters of the model.
        batch: `input_ids`, `attention_mask` and `labels`, [batch, length] int32.
        model: The Flax model.
        num_slots: Function from batch * length to the number of predicted tokens that fit. Labels
            beyond them are ignored, so a collator must not set more.
        dropout_rng: Key of dropout. Without a key the model evaluates.

    Returns:
        The sum, and a dict of the sums that means are computed from: `loss`, `predicted` (the
        number of predicted tokens), and in evaluation `accuracy` (the number of correct ones). All
        are float32 scalars.
    """
    is_training = dropout_rng is not None
    labels = batch["labels"].reshape(-1)

    # Each slot takes the position and the label of a predicted token. Slots beyond them stay empty.
    (positions,) = jnp.nonzero(
        labels != IGNORE, size=num_slots(labels.size), fill_value=labels.size
    )
    slot_labels = labels.at[positions].get(mode="fill", fill_value=IGNORE)

    last_layer = str(model.config.num_hidden_layers - 1)
    options = {"params": params, "dropout_rng": dropout_rng, "train": is_training}
    options |= extra_model_inputs(model.config.model_type, batch, dropout_rng)
    with nn.intercept_methods(keep_only(positions, last_layer)):
        logits = model(batch["input_ids"], batch["attention_mask"], return_dict=False, **options)[0]
    if logits.shape[:2] == (1, slot_labels.size):
        logits = logits[0]
    else:
        # The interceptor did not fit this model, whose head has run on every position.
        logits = logits.reshape(-1, logits.shape[-1])[positions]
    sums = cross_entropy_sums(logits, slot_labels, with_accuracy=not is_training)
    return sums["loss"], sums


def recompute(loss_fn, part: str):
    """Make `loss_fn` recompute a part of the model in the backward pass. This saves memory.

    Args:
        loss_fn: A loss of the model.
        part: "layers" or "attention". Only the inputs of these modules are kept, not what they
            compute. The weights of attention, [batch, heads, length, length] in each layer, take
            most of the memory of long sequences, and little time to compute again (selective
            recomputation, Korthikanti et al., 2022, https://arxiv.org/abs/2205.05198).

    In Transformers, a module whose name is a number is a layer, and the class of an attention
    module has a name that ends in Attention. An interceptor wraps their calls in `nn.remat`,
    because few of the Flax classes support gradient checkpointing themselves.
    """

    def is_part(module) -> bool:
        if part == "attention":
            return type(module).__name__.endswith("Attention")
        return bool(module.path) and module.path[-1].isdigit()

    def loss_fn_that_recomputes(*loss_args, **loss_kwargs):
        is_inside_part = False

        def interceptor(next_function, args, kwargs, context):
            nonlocal is_inside_part
            is_call = context.method_name == "__call__"
            if is_inside_part or not is_call or not is_part(context.module):
                return next_function(*args, **kwargs)

            # The call of the module by nn.remat comes through this interceptor again.
            is_inside_part = True
            outputs = nn.remat(lambda module: module(*args, **kwargs))(context.module)
            is_inside_part = False
            return outputs

        with nn.intercept_methods(interceptor):
            return loss_fn(*loss_args, **loss_kwargs)

    return loss_fn_that_recomputes


def part_to_recompute(args, length: int) -> str:
    """What the backward pass recomputes: "none", or the `part` of `recompute`.

    By default it is attention if sequences have 512 tokens or more. So the documented commands fit
    a TPU v3-8, for about 10% more operations (benchmarks/accelerators.py).
    """
    if args.gradient_checkpointing == "auto":
        return "attention" if length >= 512 else "none"
    return args.gradient_checkpointing


def make_loss_fn(args, model, collator):
    """`loss_sums` with the model given, which recomputes what --gradient_checkpointing says."""
    loss_fn = partial(loss_sums, model=model, num_slots=collator.num_slots)
    part = part_to_recompute(args, collator.max_length)
    return loss_fn if part == "none" else recompute(loss_fn, part)


def extra_model_inputs(model_type: str, batch, dropout_rng) -> dict:
    """Inputs that only some model families take in Flax."""
    if model_type == "electra":
        # Its default token type is 1 in Flax, but 0 in PyTorch.
        return {"token_type_ids": 0 * batch["input_ids"]}
    if model_type == "big_bird":
        # The key that its random attention blocks are drawn from.
        return {"indices_rng": dropout_rng}
    return {}


# ---------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------


class HeldOut(NamedTuple):
    """What evaluation takes from the beginning of the training data."""

    num_texts: list[int]  # of each shard
    # Tokens of these texts that are not used for evaluation.
    tokens: np.ndarray  # [tokens] int32


def load_data(args, tokenizer, max_length: int):
    """Open the streams and read the evaluation set.

    Returns the training stream, the evaluation set, [blocks, length] int32, and what it has taken
    from the training stream.
    """
    if args.preprocessing_num_workers:
        # The threads of the tokenizers library.
        os.environ["RAYON_NUM_THREADS"] = str(args.preprocessing_num_workers)
    train_texts, eval_texts = load_texts(args)
    train_stream = BlockStream(*train_texts, tokenizer, max_length) if train_texts else None
    if eval_texts:
        eval_stream = BlockStream(*eval_texts, tokenizer, max_length)
        limit = args.num_eval_samples if args.do_eval else 0
        eval_set, _ = eval_stream.take_first(limit, needed=min(limit, 1))
        held_out = HeldOut([], np.zeros(0, np.int32))
    else:
        limit = args.num_eval_samples
        eval_set, held_out = train_stream.take_first(limit, needed=limit)
    return train_stream, eval_set[: args.max_eval_samples], held_out


def load_texts(args):
    """Open the streams of training and evaluation texts.

    Returns two results of `select_text`, None where there is no such text. Raises InputError.
    """
    splits = load_splits(args, streaming=True)
    return splits.get("train"), splits.get("validation")


def load_splits(args, text_options: dict | None = None, **load_options) -> dict:
    """Load the splits of --dataset_name, --train_file and --validation_file.

    Returns them by name. `train` and `validation` have one column of text. `text_options` go to
    `datasets.load_dataset` for .txt files only, `load_options` for all data. run_clm_flax.py has
    the former, run_mlm_flax_stream.py the latter. Raises InputError.
    """
    load_options |= {"cache_dir": args.cache_dir, "token": args.token}
    if int(datasets.__version__.split(".")[0]) < 4:
        # Version 4 no longer takes this argument.
        load_options["trust_remote_code"] = args.trust_remote_code
    splits = {}
    sources = {}
    if args.dataset_name:
        source = f"--dataset_name {args.dataset_name}"
        check_formats(source, Path(args.dataset_name))
        with input_errors(f"{source}: cannot be read"):
            splits = dict(
                datasets.load_dataset(args.dataset_name, args.dataset_config_name, **load_options)
            )
        sources = dict.fromkeys(splits, source)
    for split, files in (("train", args.train_file), ("validation", args.validation_file)):
        if files:
            # The message of an error names the first of many files.
            sources[split] = f"--{split}_file {' '.join(files[:3])}{' ...' * (len(files) > 3)}"
            found = find_files(sources[split], files)
            splits[split] = load_text_files(sources[split], found, text_options or {}, load_options)

    for split in ("train", "validation"):
        if split in splits:
            splits[split] = select_text(splits[split], args.text_column_name, sources[split])
    has_data = splits.get("train") or (splits.get("validation") and not args.do_train)
    if not has_data:
        source = ", ".join(dict.fromkeys(sources.values()))
        found = ", ".join(splits) or "none"
        raise InputError(f"{source}: it has no training data; its splits: {found}")
    return splits


def check_formats(source: str, folder: Path) -> None:
    """Raise InputError if a folder has data of several formats: `datasets` reads one of them.

    A README.md may choose files, so a folder that has one is not checked. Hidden files and
    dataset_infos.json are no data.
    """
    if not folder.is_dir() or (folder / "README.md").exists():
        return
    loaders = set()
    for path in folder.rglob("*"):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        loader = LOADERS.get(data_extension(path))
        if loader and not is_hidden and path.name != "dataset_infos.json":
            loaders.add(loader)
    if len(loaders) > 1:
        raise InputError(
            f"{source}: it has files of several formats, {', '.join(sorted(loaders))}; keep one"
        )


def data_extension(file: str | Path) -> str:
    """Extension of a data file without that of its compression: .txt for corpus.txt.gz.

    Parquet files have a compression of their own, so .parquet.gz counts as .gz, which is no format.
    """
    path = Path(file)
    extension = path.suffix.lower()
    inner = Path(path.stem).suffix.lower()
    return inner if extension in COMPRESSIONS and inner != ".parquet" else extension


def find_files(source: str, patterns: list[str]) -> list[str]:
    """Find the files that are not empty among those that `patterns` name.

    The files of a pattern are sorted. `source` names the flag in the message of an InputError,
    which is raised if a pattern finds no file or if all files are empty.
    """
    files = []
    for pattern in patterns:
        found = [pattern]
        # A file whose name has brackets is not a pattern.
        if not Path(pattern).exists() and "://" not in pattern:
            found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise InputError(f"{source}: there is no file {pattern}")
        files += [file for file in found if file not in files]
    empty = [file for file in files if Path(file).is_file() and Path(file).stat().st_size == 0]
    if empty == files:
        raise InputError(f"{source}: {'the file is' if len(files) == 1 else 'all files are'} empty")
    if empty:
        logger.warning(f"{source}: {len(empty)} empty files are left out, such as {empty[0]}.")
    return [file for file in files if file not in empty]


def load_text_files(source: str, files: list[str], text_options: dict, load_options: dict):
    """Load data files of one format. `source` names the flag in the message of an InputError."""
    for file in files:
        if data_extension(file) not in LOADERS:
            raise InputError(
                f"{source}: the extension of {file} must be one of {', '.join(LOADERS)}; "
                f"{', '.join(COMPRESSIONS)} may follow all of them but .parquet"
            )
    loaders = sorted({LOADERS[data_extension(file)] for file in files})
    if len(loaders) > 1:
        raise InputError(f"{source}: files of several formats, {', '.join(loaders)}; keep one")
    if loaders == ["text"]:
        load_options = load_options | text_options
    with input_errors(f"{source}: cannot be read"):
        # `datasets` treats names as patterns, so those of local files are escaped.
        data_files = [file if "://" in file else glob.escape(file) for file in files]
        return datasets.load_dataset(
            loaders[0], data_files=data_files, split="train", **load_options
        )


def select_text(dataset, column_name: str, source: str):
    """Keep the text column alone. Returns the dataset, the column's name, and `source`.

    Reads a row, because a stream may not know its columns before. Raises InputError.
    """
    with input_errors(f"{source}: no text"):
        first_table = next(dataset.with_format("arrow").iter(1))
    dtypes = {field.name: str(field.type) for field in first_table.schema}
    strings = [name for name, dtype in dtypes.items() if dtype in ("string", "large_string")]
    name = column_name
    if name == "text" and name not in dtypes and len(strings) == 1:
        name = strings[0]
    if name not in dtypes:
        raise InputError(
            f"{source}: no column {name}, set --text_column_name to one of {list(dtypes)}"
        )
    if name not in strings:
        raise InputError(f"{source}: column {name} holds {dtypes[name]}, not text")
    return dataset.select_columns([name]), name, source


class Chunk(NamedTuple):
    """Consecutive texts of a stream, as blocks.

    `state` is the dataset's state before these texts, None at the start. `carried`, [tokens] int32,
    are the tokens left over before them. `blocks`, [blocks, length] int32, is what the texts fill,
    and `rest`, [tokens] int32, what is left over after them.
    """

    state: dict | None
    carried: np.ndarray
    num_texts: int
    blocks: np.ndarray
    rest: np.ndarray


def start_of_epoch(epoch: int, carried: list[int]) -> dict:
    """The position of a stream at the start of an epoch. A position is what a checkpoint holds.

    `state` is that of the dataset before a chunk, and `carried` the tokens left over there. `used`
    counts the blocks of this chunk that came before the position, and `seen` those of the chunks
    before it in this epoch. `offset` counts the blocks taken from the shuffled window that begins
    there.
    """
    return {
        "epoch": epoch,
        "state": None,
        "carried": carried,
        "used": 0,
        "seen": 0,
        "offset": 0,
    }


@dataclass
class BlockStream:
    """Texts as blocks of `length` tokens, cut from the concatenated tokens of all texts."""

    dataset: datasets.IterableDataset
    column: str
    source: str
    tokenizer: transformers.PreTrainedTokenizerBase
    length: int

    def read(self, dataset, state: dict | None, carried: np.ndarray, skip: int = 0):
        """Generate the chunks of `dataset`, from `state` on, or else after the first `skip` texts.

        `dataset` is that of the stream, a shard of it, or the share of a process. `carried` are
        tokens that precede those of the first text. Raises InputError.
        """
        first_state = state
        dataset.load_state_dict(state)
        # Row by row: datasets 3.6 to 5.0 lose rows if a stream is resumed twice within one Arrow
        # table.
        rows = islice(dataset, 0 if state else skip, None)
        # This call removes the truncation and padding that tokenizer.json may ask for.
        self.tokenizer("")
        while True:
            with input_errors(f"{self.source}: cannot be read"):
                texts = [row[self.column] for row in islice(rows, TEXTS_AT_A_TIME)]
                tokens = np.concatenate([carried, *self.encode(texts)])
            if not texts and state is not None:
                if state is first_state:
                    raise InputError(
                        f"{self.source}: it ends before the position of the checkpoint, so texts "
                        "are missing"
                    )
                return
            num_tokens = len(tokens) // self.length * self.length
            blocks = tokens[:num_tokens].reshape(-1, self.length)
            rest = tokens[num_tokens:]
            yield Chunk(state, carried, len(texts), blocks, rest)
            state = dataset.state_dict()
            carried = rest

    def encode(self, texts: list[str | None]) -> list[np.ndarray]:
        """Tokenize texts. Blank ones are left out."""
        filled = [text for text in texts if text and text.strip()]
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            token_lists = [self.tokenizer.encode(text, verbose=False) for text in filled]
        else:
            # In threads, and without the attention masks and offsets of the usual call.
            token_lists = [encoding.ids for encoding in backend.encode_batch_fast(filled)]
        return [np.array(tokens, np.int32) for tokens in token_lists]

    def take_first(self, limit: int, needed: int):
        """Read the first `limit` blocks, or fewer if there are only `needed`.

        Returns the blocks and the HeldOut that they leave. Raises InputError.
        """
        blocks = []
        rest = np.zeros(0, np.int32)
        num_texts = [0] * self.dataset.num_shards
        for shard_index in range(len(num_texts)):
            shard_dataset = self.dataset.shard(len(num_texts), shard_index)
            chunks = self.read(shard_dataset, None, rest)
            while len(blocks) < limit and (chunk := next(chunks, None)):
                num_texts[shard_index] += chunk.num_texts
                blocks.extend(chunk.blocks)
                rest = chunk.rest
        if len(blocks) < needed:
            raise InputError(f"--num_eval_samples {limit}: {self.source} has {len(blocks)} blocks")
        eval_set = np.array(blocks[:limit]).reshape(-1, self.length)
        return eval_set, HeldOut(num_texts, np.concatenate([*blocks[limit:], rest]))

    def blocks(self, position: dict, local_batch_size: int, limit: int | None, held_out: HeldOut):
        """Generate the blocks of this process, epoch after epoch.

        Yields pairs: the position before a block, and the block, [length] int32. Texts that are
        held out are skipped. Their remaining tokens open each epoch of process 0. Tokens after the
        last block of an epoch open the next one.

        Args:
            position: Where to start.
            local_batch_size: Blocks of this process in a batch. An epoch must have as many.
            limit: Blocks of an epoch of all processes, at most.
            held_out: What is not trained on.
        """
        rank = jax.process_index()
        num_processes = jax.process_count()
        local_limit = (limit or sys.maxsize) // num_processes
        # This deals out the shards or, if their number is not a multiple, the texts.
        dataset = split_dataset_by_node(self.dataset, rank, num_processes)
        if len(held_out.num_texts) % num_processes == 0:
            skip = sum(held_out.num_texts[rank::num_processes])
        else:
            skip = len(range(rank, sum(held_out.num_texts), num_processes))

        while True:
            opening = list(position["carried"])
            if rank == 0 and not position["state"]:
                opening.extend(held_out.tokens)
            chunks = self.read(dataset, position["state"], np.array(opening, np.int32), skip)
            for chunk in prefetch(chunks):
                if chunk.state:
                    position["state"] = chunk.state
                    position["carried"] = chunk.carried.tolist()
                end = min(len(chunk.blocks), local_limit - position["seen"])
                for index in range(position["used"], end):
                    yield position | {"used": index}, chunk.blocks[index]
                position["used"] = 0
                position["seen"] = min(position["seen"] + len(chunk.blocks), local_limit)
                if position["seen"] == local_limit:
                    break

            if position["seen"] < local_batch_size:
                if position["seen"] == local_limit:
                    raise InputError(
                        f"--max_train_samples {limit}: that is {local_limit} blocks for each "
                        f"process, and a batch takes {local_batch_size} of each"
                    )
                raise InputError(
                    f"too little training data: {self.source} has {position['seen']:,} blocks of "
                    f"{self.length} tokens, {len(chunk.rest)} more; a batch takes "
                    f"{local_batch_size}"
                )
            logger.info(
                f"Epoch {position['epoch'] + 1} is read, {position['seen']:,} blocks; "
                "the next is reshuffled."
            )
            carried = [] if position["seen"] == local_limit else chunk.rest.tolist()
            position = start_of_epoch(position["epoch"] + 1, carried)


def shuffle(positioned_blocks, size: int, seed: int):
    """Shuffle each window of `size` blocks of an epoch.

    Takes pairs of the position before a block and the block. Yields pairs of the position after a
    block, which is the start of its window with the `offset` after this block, and the block. So a
    checkpoint stores no blocks: a resumed run reads the window again.
    """
    for epoch, epoch_blocks in groupby(positioned_blocks, key=lambda item: item[0]["epoch"]):
        while window := list(islice(epoch_blocks, size)):
            start, _ = window[0]
            first_block = start["seen"] + start["used"]
            rng = np.random.default_rng((seed, ORDER_STREAM, epoch, first_block))
            for offset, index in enumerate(rng.permutation(len(window)), 1):
                yield start | {"offset": offset}, window[index][1]


def training_blocks(args, stream, position: dict, batch_size: int, held_out: HeldOut):
    """What `shuffle` yields in this process from `position` on.

    Raises InputError if that is nothing.
    """
    blocks = stream.blocks(
        dict(position), batch_size // jax.process_count(), args.max_train_samples, held_out
    )
    positioned_blocks = shuffle(blocks, max(args.shuffle_buffer_size, batch_size), args.seed)
    positioned_blocks = islice(positioned_blocks, position["offset"], None)
    # Read a block now: if the data is too small, the run ends before it writes anything.
    return chain([next(positioned_blocks)], positioned_blocks)


def make_collator(args, config, tokenizer, max_length: int):
    """Make the collator that the flags ask for."""
    return FlaxDataCollatorForLanguageModeling(tokenizer, max_length, args.mlm_probability)


def sequence_generators(seed: tuple[int, ...], numbers: np.ndarray):
    """Yield a NumPy generator for each sequence, a function of `seed` and its number alone.

    So the noise of a sequence does not depend on the batch, the device or the host that it is on.
    Philox (Salmon et al., 2011) is a generator whose state is a key, here made from the seed, and a
    counter of four words, whose last one is set to the number. It is one object that is reset for
    each sequence, which takes 2 us, where a new one takes 15. So use each before the next.
    """
    bit_generator = np.random.Philox(np.random.SeedSequence(seed))
    rng = np.random.Generator(bit_generator)
    state = bit_generator.state
    for number in numbers:
        state["state"]["counter"][3] = number
        bit_generator.state = state
        yield rng


def make_batch(blocks, numbers, collator, seed: tuple[int, ...], shape: tuple[int, ...]):
    """Collate this process's part of a global batch.

    Args:
        blocks: [rows, length] int32.
        numbers: Numbers of the blocks, [rows] int64. The noise of a block depends on its number.
        collator: Masks the batch and adds labels.
        seed: Seed of the noise.
        shape: Batch shape on a device, (batch,) or (accumulation steps, batch).

    Returns:
        Arrays [local devices, *shape, length] int32.
    """
    rngs = sequence_generators(seed, numbers)
    batch = {"input_ids": blocks, "attention_mask": np.ones_like(blocks)}
    batch = collator(batch, rngs, group_size=shape[-1])
    num_devices = jax.local_device_count()
    return {name: array.reshape(num_devices, *shape, -1) for name, array in batch.items()}


class StreamProgress:
    """Where the stream stands after the latest step, and the error that has ended it."""

    def __init__(self, position: dict):
        self.position = position
        # Batches are made ahead of their use, so their positions are noted by step.
        self.position_after = {}
        self.error = None
        self.has_ended_training = False

    def advance(self, step: int) -> None:
        """Move to the position after `step`."""
        self.position = self.position_after.pop(step)

    def save(self, saver, state, step: int, is_last: bool, log, evaluations) -> None:
        """Save with the positions of all processes, which must all call this."""
        progress = {"stream": share_json(self.position), "results": log.results}
        if saver:
            saver.save(state, step, is_last, **progress, **evaluations.to_store())

    def raise_error(self, step: int) -> None:
        """Raise InputError if an error of the stream has ended the training. `step` is saved."""
        if self.error and self.has_ended_training:
            raise InputError(
                f"{self.error}; step {step} is saved: to resume there, give the same command "
                "without --overwrite_output_dir"
            )

    def end_training(self) -> None:
        """Note that the batches have ended before the training.

        Raises the error if there are several processes: all end at once then, and none saves.
        """
        self.has_ended_training = True
        if self.error and jax.process_count() > 1:
            raise self.error


def stream_settings(args, max_length: int, held_out) -> dict:
    """More settings in which a run must agree: those that a position in the stream depends on."""
    sources = [args.dataset_name, args.dataset_config_name, *(args.train_file or [])]
    return {
        # A folder may have moved.
        "training data": [Path(source).name for source in sources if source],
        "number of processes": jax.process_count(),
        "max_seq_length": max_length,
        "held-out texts": held_out.num_texts,
        "seed": args.seed,
        "shuffle_buffer_size": args.shuffle_buffer_size,
        "max_train_samples": args.max_train_samples,
    }


def share_json(value) -> list:
    """Return the values of all processes. They may be anything that JSON can hold."""
    text = json.dumps(value)
    size = int(multihost_utils.process_allgather(len(text)).max())
    padded = np.frombuffer(text.ljust(size).encode(), np.uint8)
    texts = multihost_utils.process_allgather(padded).reshape(-1, size)
    return [json.loads(bytes(text)) for text in texts]


def stored_positions(checkpoint_settings: dict, checkpoints: Path) -> list[dict]:
    """The positions of all processes in the settings of a checkpoint. Raises InputError."""
    if "stream" not in checkpoint_settings:
        raise InputError(
            f"{checkpoints}: its checkpoints have no position in a stream, so another script has "
            "written them"
        )
    return checkpoint_settings["stream"]


def train_batches(
    positioned_blocks, collator, seed: int, steps: range, shape, progress: StreamProgress
):
    """Generate the batches of `steps`, up to an error of the stream.

    `positioned_blocks` are those of `shuffle`. The noise of a block is a function of the seed and
    of its number among all that are trained on.
    """
    local_size = jax.local_device_count() * math.prod(shape)
    batch_size = jax.process_count() * local_size
    local_rows = jax.process_index() * local_size + np.arange(local_size)
    try:
        for step in steps:
            positions, rows = zip(*islice(positioned_blocks, local_size), strict=True)
            progress.position_after[step + 1] = positions[-1]
            numbers = step * batch_size + local_rows
            yield make_batch(np.stack(rows), numbers, collator, (seed, TRAINING_STREAM), shape)
    except InputError as error:
        progress.error = error


def eval_batches(blocks, collator, seed: int, per_device_batch_size: int):
    """Generate batches with every block once.

    The noise of a block is a function of the seed and its number: it is the same in every
    evaluation and for any number of devices.
    """
    num_rows = len(blocks)
    local_size = jax.local_device_count() * per_device_batch_size
    shape = (per_device_batch_size,)
    for start in range(0, num_rows, jax.process_count() * local_size):
        rows = start + jax.process_index() * local_size + np.arange(local_size)
        batch_blocks = blocks[rows % num_rows]
        # Mask tokens are special, so nothing is predicted in rows that fill the batch.
        batch_blocks[rows >= num_rows] = collator.tokenizer.mask_token_id
        yield make_batch(batch_blocks, rows, collator, (seed, EVALUATION_STREAM), shape)


def prefetch(items, size: int = 2):
    """Generate `items`, made in a background thread up to `size` ahead of their use.

    When the generator is closed, it waits for the item in progress, and no more are made.
    """
    items = iter(items)
    pool = ThreadPoolExecutor(1)
    try:
        pending = deque(pool.submit(next, items, None) for _ in range(size))
        while (item := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, items, None))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------
# Model and optimizer
# ---------------------------------------------------------------------------------------


def load_config_and_tokenizer(args):
    """Load config and tokenizer, make them fit each other, and choose the sequence length.

    Returns config, tokenizer and length. Raises InputError if they do not fit.
    """
    config = override_config(load_config(args), args.config_overrides)
    name = args.config_name or args.model_name_or_path or f"--model_type {args.model_type}"
    if type(config) not in transformers.FLAX_MODEL_FOR_MASKED_LM_MAPPING:
        raise InputError(f"{name}: type {config.model_type} has no masked-language model in Flax")
    check_config(config, name)
    tokenizer = load_tokenizer(args)
    enlarge_vocabulary(args, config, tokenizer)

    positions = max_positions(config, name)
    length = args.max_seq_length or min(tokenizer.model_max_length, positions)
    if length > positions:
        raise InputError(f"--max_seq_length {length}: the model has {positions} positions")
    adapt_to_flax(args, config, length)
    return config, tokenizer, length


def check_config(config, name: str) -> None:
    """Raise InputError for a setting that PyTorch's class follows and Flax's class ignores.

    Training would compute something else than PyTorch does with the same weights.
    """
    built_in = {"position_embedding_type": "absolute"}
    if config.model_type == "electra":
        # In the head, PyTorch applies gelu, and Flax hidden_act.
        built_in["hidden_act"] = "gelu"
    for key, value in built_in.items():
        found = getattr(config, key, value)
        if found != value:
            raise InputError(
                f"{name}: {key} is {found}, but Flax's {config.model_type} has {value} built in"
            )


def max_positions(config, name: str) -> int:
    """Count the positions of the model. Raises InputError if its config, `name`, is not valid."""
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"{name}: hidden_size {config.hidden_size} is not a multiple of "
            f"num_attention_heads {config.num_attention_heads}"
        )
    positions = config.max_position_embeddings
    if "roberta" in config.model_type:
        if config.pad_token_id is None:
            raise InputError(f"{name}: its pad_token_id is null; {config.model_type} needs one")
        # The positions of a sequence start after the pad id.
        positions -= config.pad_token_id + 1
    if positions < 1:
        raise InputError(f"{name}: max_position_embeddings leaves no position for a token")
    return positions


def adapt_to_flax(args, config, length: int) -> None:
    """Adjust the config to limits of the Flax classes of BigBird and RoFormer."""
    if config.model_type == "big_bird":
        # Sparse attention needs a multiple of block_size that is longer than 11 blocks.
        fits_blocks = length % config.block_size == 0 and length > 11 * config.block_size
        if not fits_blocks:
            config.update({"attention_type": "original_full"})
            logger.info("Using full attention: sparse attention needs longer sequences.")
    if config.model_type == "roformer":
        # FlaxRoFormer ignores embedding_size.
        config.update({"embedding_size": config.hidden_size})


def load_config(args):
    """Load the config that --config_name, --model_name_or_path or --model_type names."""
    name = args.config_name or args.model_name_or_path
    if name is None:
        return transformers.CONFIG_MAPPING[args.model_type]()
    with input_errors(f"{name}: cannot load its config"):
        config = AutoConfig.from_pretrained(name, **args.hub_options)
    if args.model_type not in (None, config.model_type):
        raise InputError(f"--model_type {args.model_type}: {name} is of type {config.model_type}")
    return config


def given_settings(config) -> dict:
    """The settings of a config that its constructor does not choose or derive from the others.

    The decoder of T5 has as many layers as its encoder, and `feed_forward_proj` decides about two
    other settings. Where they are as the constructor chooses them, they are left out.
    """
    everything = config.to_dict()
    settings = config.to_dict()
    for name in everything:
        others = {other: value for other, value in settings.items() if other != name}
        # A constructor may refuse a config without the setting.
        with suppress(Exception):
            if type(config).from_dict(deepcopy(others)).to_dict() == everything:
                settings = others
    return settings


def override_config(config, overrides: str | None):
    """Replace settings of a config by those of --config_overrides. Raises InputError.

    The result is constructed again, because a constructor may derive one setting from another.
    """
    if overrides is None:
        return config
    changes = {}
    # A comma within a value is not followed by a name and an equals sign.
    for item in re.split(r",(?=\s*\w+\s*=)", overrides):
        name, has_value, text = (part.strip() for part in item.partition("="))
        # Some settings have a second name, which all model types share.
        name = config.attribute_map.get(name, name)
        if not has_value or name not in config.to_dict() or name in FIXED_SETTINGS:
            known = ", ".join(inspect.signature(type(config)).parameters).removesuffix(", kwargs")
            raise InputError(
                f"--config_overrides {item}: not name=value with a name of a {config.model_type} "
                f"config: {known}"
            )
        changes[name] = parse_setting(item, text, getattr(config, name))

    settings = given_settings(config)
    # The version that has written the config. `to_dict` has that of this process.
    settings["transformers_version"] = config.transformers_version
    settings |= changes
    with input_errors(f"--config_overrides {overrides}: no valid {config.model_type} config"):
        overridden = type(config).from_dict(settings)
    shown = [f"{name} is {value}, not {getattr(config, name)}" for name, value in changes.items()]
    logger.info(f"--config_overrides: {'; '.join(shown)}.")
    return overridden


def parse_setting(item: str, text: str, current):
    """Convert the value of a setting, `text`, to the type of its `current` value.

    A setting that is None takes any value. `item`, name=value, is for the InputError.
    """
    if isinstance(current, str):
        return text
    try:
        # Constants may be spelled as in Python.
        constants = {"True": "true", "False": "false", "None": "null"}
        value = json.loads(constants.get(text, text))
    except ValueError:
        value = text
    if isinstance(current, float) and type(value) is int:
        value = float(value)
    is_finite = not isinstance(value, float) or math.isfinite(value)
    if not is_finite or (current is not None and type(value) is not type(current)):
        raise InputError(
            f"--config_overrides {item}: it must be of type {type(current).__name__}, such as "
            f"{json.dumps(current)}"
        )
    return value


def load_tokenizer(args):
    """Load the tokenizer that --tokenizer_name or --model_name_or_path names."""
    name = args.tokenizer_name or args.model_name_or_path
    with input_errors(f"{name}: cannot load its tokenizer, or files of it are missing"):
        return AutoTokenizer.from_pretrained(
            name, use_fast=args.use_fast_tokenizer, **args.hub_options
        )


def enlarge_vocabulary(args, config, tokenizer) -> None:
    """Make the embedding table as large as the tokenizer. Raises InputError if it is pretrained.

    JAX raises no error for token ids outside the table: their embeddings are NaN.
    """
    num_ids = count_token_ids(tokenizer)
    if num_ids <= config.vocab_size:
        return
    message = (
        f"the tokenizer of {tokenizer.name_or_path} has {num_ids} tokens, "
        f"the model's table {config.vocab_size}"
    )
    if args.model_name_or_path:
        raise InputError(f"{message}: use the tokenizer that the model was trained with")
    logger.warning(f"{message}: the table is enlarged.")
    config.vocab_size = num_ids


def count_token_ids(tokenizer) -> int:
    """One more than the highest token id. Some ids below it may be unused."""
    return 1 + max(tokenizer.get_vocab().values())


def load_model(args, config):
    """Make the Flax model and its parameters.

    Returns the model, which holds no parameters, and a tree of float32 NumPy arrays. Parameters
    that are not pretrained are initialized by one compiled program. Raises InputError.
    """
    dtype = getattr(jnp, args.dtype)
    with input_errors("cannot build a model from the config"):
        model = MODEL_CLASS.from_config(config, dtype=dtype, _do_init=False)

    params = {}
    if args.model_name_or_path:
        params = load_pretrained_params(args, config, model)
    missing = model.required_params - set(params)
    if missing:
        if params:
            names = ", ".join(sorted(".".join(path) for path in missing))
            logger.warning(f"{args.model_name_or_path} lacks {names}: initialized at random.")
        init_weights = jax.jit(model.init_weights, static_argnums=1)
        initial = init_weights(jax.random.PRNGKey(args.seed), model.input_shape)
        for path, array in flatten_dict(initial).items():
            if path in missing:
                params[path] = np.asarray(array)
    return model, unflatten_dict(params)


def load_pretrained_params(args, config, model) -> dict:
    """Load the parameters of --model_name_or_path, float32, by their paths.

    Those that its files lack are left out.
    """
    name = args.model_name_or_path
    verify_checksums(Path(name))

    # Transformers 4.57 compares PyTorch files with `model.params`, of which it uses the shapes.
    # This class supplies the shapes, so that nothing is initialized.
    class ModelOfShapes(type(model)):
        params = property(lambda self: self.params_shape_tree)

    problem = f"{name}: cannot load a model of type {config.model_type} that fits its config"
    with input_errors(problem):
        pretrained, params = ModelOfShapes.from_pretrained(
            name, config=config, dtype=model.dtype, _do_init=False, **args.hub_options
        )
    model.generation_config = pretrained.generation_config
    params = flatten_dict(pretrained.to_fp32(params))
    if not params:
        raise InputError(f"{problem}: no weight matches")
    return {path: np.asarray(array) for path, array in params.items()}


def make_schedule(args, num_steps: int):
    """Linear warm-up, then --lr_scheduler_type.

    Returns a function from the step, counted from 0, to the learning rate. `num_steps` is 0 if
    there is no training.
    """
    peak = args.learning_rate
    warmup = args.warmup_steps
    decay_steps = max(1, num_steps - warmup)
    if args.lr_scheduler_type == "linear":
        decay = optax.linear_schedule(peak, 0.0, decay_steps)
    elif args.lr_scheduler_type == "cosine":
        decay = optax.cosine_decay_schedule(peak, decay_steps)
    elif args.lr_scheduler_type == "constant":
        decay = optax.constant_schedule(peak)
    elif args.lr_scheduler_type == "inverse_sqrt":
        # Without a warm-up the time scale is 10,000 steps.
        time_scale = warmup or 10_000

        def decay(steps_after_warmup):
            return peak / jnp.sqrt(1 + steps_after_warmup / time_scale)

    else:
        raise InputError(f"--lr_scheduler_type {args.lr_scheduler_type}: no such schedule")

    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def make_optimizer(args, schedule):
    """AdamW or Adafactor, with decoupled weight decay on matrices only, not on biases or norms."""

    def decay_mask(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.ndim > 1 and "bias" not in jax.tree_util.keystr(path), params
        )

    # AdamW multiplies its weight decay by the learning rate. Adafactor does not.
    def scheduled_weight_decay(step):
        return args.weight_decay * schedule(step)

    if args.adafactor:
        optimizer = optax.adafactor(
            schedule, weight_decay_rate=scheduled_weight_decay, weight_decay_mask=decay_mask
        )
    else:
        optimizer = optax.adamw(
            schedule,
            b1=args.adam_beta1,
            b2=args.adam_beta2,
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            mask=decay_mask,
        )
    clip = optax.clip_by_global_norm(args.max_grad_norm) if args.max_grad_norm else optax.identity()
    return optax.chain(clip, optimizer)


def plan_steps(args) -> tuple[int, int]:
    """Return the global batch size and the number of steps."""
    batch_size = (
        jax.device_count() * args.gradient_accumulation_steps * args.per_device_train_batch_size
    )
    return batch_size, args.max_steps if args.max_steps > 0 else args.num_train_steps


def create_train_state(params, optimizer) -> TrainState:
    """Make the state of step 0 by one compiled program: NumPy arrays on the host."""
    create = jax.jit(partial(TrainState.create, apply_fn=None, tx=optimizer))
    return jax.device_get(create(params=params))


# ---------------------------------------------------------------------------------------
# Training and evaluation steps
# ---------------------------------------------------------------------------------------


def dropout_bits(key, bit_width: int, shape: tuple[int, ...]):
    """Random bits for dropout: a hash of the key and of the index of each element.

    XLA can compute the hash again wherever the mask is used, so it need not store the bits. By the
    plan of XLA's compiler for a TPU v3, the documented step of RoBERTa takes 17% less memory and
    moves 6% fewer bytes than with JAX's generator "rbg"; that of BART takes 4% more memory and
    moves 3% fewer bytes. The bits are the same on every kind of device.

    Args:
        key: [2] uint32.
        bit_width: Bits of a number. Dropout takes 32; others come from JAX's default generator.
        shape: Shape of the result. The bits repeat after 2**32 elements.

    Returns:
        An array of `shape`, uint32 for a `bit_width` of 32.
    """
    if bit_width != 32:
        typed_key = jax.random.wrap_key_data(key, impl="threefry2x32")
        return jax.random.bits(typed_key, shape, f"uint{bit_width}")

    def mix(bits):
        # The last steps of MurmurHash3: each bit of the result depends on all bits.
        bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
        bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
        return bits ^ (bits >> 16)

    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return mix(mix(index ^ key[0]) + key[1])


def dropout_prng():
    """The generator of the dropout masks: JAX's default one with `dropout_bits` as its bits."""

    def typed(key):
        return jax.random.wrap_key_data(key, impl="threefry2x32")

    return define_prng_impl(
        key_shape=(2,),
        seed=lambda seed: jax.random.key_data(jax.random.key(seed, impl="threefry2x32")),
        split=lambda key, shape: jax.random.key_data(jax.random.split(typed(key), shape)),
        fold_in=lambda key, data: jax.random.key_data(jax.random.fold_in(typed(key), data)),
        random_bits=dropout_bits,
        name="dropout",
    )


def embed_in_float32(next_function, args, kwargs, context):
    """Interceptor for `flax.linen.Embed`: round embeddings to the compute dtype after the lookup.

    Flax rounds the table first, so that the gradients of equal tokens are summed in bfloat16. That
    is wrong by up to half of the gradient's norm (tests/objectives/test_embeddings.py).
    """
    module = context.module
    if type(module) is not nn.Embed or context.method_name != "__call__":
        return next_function(*args, **kwargs)
    return jnp.take(module.embedding, *args, axis=0).astype(module.dtype)


def train_step(state, totals, batch, loss_fn, schedule, seed: int):
    """Take one optimizer step. Runs on each device under `jax.pmap` with axis "batch".

    Args:
        state: The TrainState.
        totals: Sums since the last log line, float32 scalars: TRAINING_SUMS and `tokens`, which
            counts what `attention_mask` marks. Beside them `grad_norm`, also summed, which is there
            to notice gradients that are not finite, and `learning_rate` of the last step.
        batch: Arrays [accumulation steps, batch, length] int32.
        loss_fn: `loss_sums` with the other arguments given.
        schedule: Function from the step to the learning rate.
        seed: Seed of dropout.

    Returns:
        The new state and totals. Gradients are summed over the accumulation steps and all devices,
        then divided once by the number of predicted tokens.
    """
    rng = jax.random.fold_in(jax.random.key(seed, impl=dropout_prng()), state.step)
    rng = jax.random.fold_in(rng, jax.lax.axis_index("batch"))

    def micro_step(grads_and_sums, inputs):
        micro_batch, index = inputs
        dropout_rng = jax.random.fold_in(rng, index)
        # This changes gradients only, so the evaluation does without it.
        with nn.intercept_methods(embed_in_float32):
            grad_fn = jax.grad(loss_fn, has_aux=True)
            new_grads_and_sums = grad_fn(state.params, micro_batch, dropout_rng=dropout_rng)
        return jax.tree.map(jnp.add, grads_and_sums, new_grads_and_sums), None

    # The gradients and the sums that `loss_fn` returns in training.
    zeros = jax.tree.map(jnp.zeros_like, (state.params, dict.fromkeys(TRAINING_SUMS, 0.0)))
    num_micro_steps = len(batch["labels"])
    (grads, sums), _ = jax.lax.scan(micro_step, zeros, (batch, jnp.arange(num_micro_steps)))
    sums["tokens"] = batch["attention_mask"].sum(dtype=jnp.float32)

    grads, sums = jax.lax.psum((grads, sums), "batch")
    grads = jax.tree.map(lambda grad: grad / jnp.maximum(sums["predicted"], 1), grads)
    sums["grad_norm"] = optax.global_norm(grads)
    new_totals = {name: totals[name] + value for name, value in sums.items()}
    new_totals["learning_rate"] = jnp.float32(schedule(state.step))
    return state.apply_gradients(grads=grads), new_totals


def zero_totals():
    """The totals of `train_step` before the first step, on all devices."""
    names = (*TRAINING_SUMS, "tokens", "grad_norm", "learning_rate")
    return replicate({name: np.float32(0) for name in names})


def eval_step(params, batch, loss_fn):
    """Sums of one batch over all devices. Runs under `jax.pmap` with axis "batch"."""
    _, sums = loss_fn(params, batch)
    return jax.lax.psum(sums, "batch")


def make_steps(args, model, collator, schedule):
    """Map `train_step` and `eval_step` to all devices.

    They are compiled when they are first called.
    """
    loss_fn = make_loss_fn(args, model, collator)
    p_train_step = jax.pmap(
        partial(train_step, loss_fn=loss_fn, schedule=schedule, seed=args.seed),
        axis_name="batch",
        donate_argnums=0,
    )
    p_eval_step = jax.pmap(partial(eval_step, loss_fn=loss_fn), axis_name="batch")
    return p_train_step, p_eval_step


def evaluate(args, p_eval_step, eval_set, collator, log, stop, params, step: int) -> dict:
    """Evaluate `params`, and log and return the results.

    These are the mean loss of all predicted tokens, its perplexity, and the accuracy if `loss_sums`
    counts it. They are empty if a signal has stopped the evaluation. Raises InputError if there is
    nothing to predict.
    """
    # At most one device's share of the set, so that a small set is not mostly padding.
    share = math.ceil(len(eval_set) / jax.device_count())
    per_device = min(args.per_device_eval_batch_size, share)
    batches = eval_batches(eval_set, collator, args.seed, per_device)
    num_batches = math.ceil(len(eval_set) / (jax.device_count() * per_device))
    totals = {}
    pending = None
    with log.bar("Evaluating", num_batches, unit="batch", leave=False) as bar:
        for number, batch in enumerate(prefetch(map(shard, batches)), 1):
            # Fetch the sums of a batch when the devices have the next one to work on.
            sums = p_eval_step(params, batch)
            add_host_values(totals, pending)
            pending = sums
            bar.update()
            if stop.check(number):
                return {}
        add_host_values(totals, pending)

    num_predicted = totals["predicted"]
    if num_predicted == 0:
        raise InputError(
            f"the evaluation predicts no token: its {len(eval_set)} sequences are too short"
        )
    results = {"eval_loss": totals["loss"] / num_predicted}
    if "accuracy" in totals:
        results["eval_accuracy"] = totals["accuracy"] / num_predicted
    results["eval_perplexity"] = math.exp(min(results["eval_loss"], 700))
    log.scalars(results, step)
    return results


def add_host_values(totals: dict[str, float], sums) -> None:
    """Add the sums, which are equal on all devices, to `totals`. Waits for their computation."""
    for name, array in (sums or {}).items():
        totals[name] = totals.get(name, 0.0) + float(np.asarray(array)[0])


def train(
    args, state, p_train_step, batches, steps: range, log, saver, stop, evaluations, progress
):
    """Run the training loop.

    Args:
        args, log, stop: The settings, the TrainingLog and the StopSignals.
        state, p_train_step: The TrainState on the devices, and `train_step` under pmap.
        batches: The batches of `steps`, on the devices. They end early if the stream fails.
        steps: The steps to take, counted from 0.
        saver: The Saver, or None in a process that does not write.
        evaluations, progress: The Evaluations, and the StreamProgress of `batches`.

    Returns the last state, and the number of steps that it has taken.
    """
    evaluations.run_missing(state.params, steps.start)
    if evaluations.ends:
        batches = ()
    is_last = False
    totals = zeros = zero_totals()
    step = steps.start
    for step, batch in enumerate(batches, steps.start + 1):
        previous_totals = totals
        state, totals = p_train_step(state, totals, batch)
        # The host stays exactly one step ahead of the devices.
        jax.block_until_ready(previous_totals)
        log.flush()
        log.training_bar.update()
        progress.advance(step)
        is_stopping = stop.check(step) != 0
        is_last = is_stopping or step == steps.stop
        is_evaluation = evaluations.are_due(step) and not is_stopping
        is_candidate = is_evaluation and evaluations.keeps_best
        is_save = step % args.save_steps == 0 or is_last or is_candidate
        raise_save_failure(saver)
        if step % args.logging_steps == 0 or is_save:
            log.due = (step, totals)
            totals = zeros
        if is_save:
            # Raises InputError if the loss is not finite, so that such a state is never saved.
            log.flush()
            if is_candidate:
                # The checkpoint stores the result.
                is_last = evaluations.run(state.params, step) or is_last
            progress.save(saver, state, step, is_last, log, evaluations)
        if is_last:
            break
        if is_evaluation and not is_candidate:
            # The log line of this step comes before that of the evaluation.
            log.flush()
            evaluations.run(state.params, step)

    if not is_last:
        progress.end_training()
        # The stream has failed, or an earlier run took all steps and may not have exported.
        if totals is not zeros:
            log.due = (step, totals)
        log.flush()
        progress.save(saver, state, step, True, log, evaluations)
    return state, step


# ---------------------------------------------------------------------------------------
# Plumbing (the same in every script)
# ---------------------------------------------------------------------------------------


def parse_args(argv: list[str]):
    """Read all settings from the command line, or from the one .json file that it names.

    Returns one namespace with the fields of the three dataclasses, and `hub_options`, the arguments
    of every `from_pretrained`. Raises InputError.
    """
    if len(argv) == 1 and argv[0].endswith(".json"):
        with input_errors(f"{argv[0]}: cannot read a JSON object"):
            settings = json.loads(Path(argv[0]).read_text("utf-8")).items()
        argv = []
        for name, value in settings:
            for item in value if isinstance(value, list) else [value]:
                if item is not None:
                    # True is a switch without a value.
                    argv.append(f"--{name}" if item is True else f"--{name}={item}")
    parser = HfArgumentParser(
        (ModelArguments, DataTrainingArguments, TrainingArguments),
        allow_abbrev=False,
        description=__doc__.partition("\n\n    ")[0],
        usage="%(prog)s --output_dir DIR [--FLAG VALUE ...] | FILE.json",
    )
    parser.error = raise_input_error
    if {"-h", "--help"} & set(argv):
        simplify_help(parser)
        argv = ["--help"]
    args, rest = parser.parse_known_args(argv)
    if rest:
        # Only flags are shown: a value may be a secret.
        unknown = [word.partition("=")[0] for word in rest if word.startswith("--")]
        problem = "unknown arguments"
        if NOT_OF_A_STREAM & set(unknown):
            problem = "a stream has no lines and no length, see --num_train_steps"
        raise InputError(f"{problem}: {' '.join(unknown) or 'a value without a flag'}")

    if not args.do_train and not args.do_eval:
        args.do_train = True
        args.do_eval = True
    args.hub_options = {
        "cache_dir": args.cache_dir,
        "token": args.token,
        "trust_remote_code": args.trust_remote_code,
    }
    has_model = (Path(args.output_dir) / "flax_model.msgpack").is_file()
    if has_model and not args.do_train and not args.model_name_or_path:
        # The config of the finished run has all settings, such as an enlarged vocabulary.
        args.model_name_or_path = args.output_dir
        args.config_name = None
        args.config_overrides = None
    check_args(args)
    check_objective_args(args)
    return args


def raise_input_error(message: str):
    """Raise InputError. argparse's own `error` prints the usage of sixty flags first."""
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


def check_args(args) -> None:
    """Check the flags that all scripts have. Raises InputError."""
    check_range(
        args,
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
        "logging_steps eval_steps save_steps save_total_limit max_train_samples max_eval_samples "
        "preprocessing_num_workers early_stopping_patience",
        "at least 1",
        lambda value: value >= 1,
    )
    check_range(
        args,
        "max_steps",
        f"between 1 and {MAX_STEPS}, or -1",
        lambda value: 1 <= value <= MAX_STEPS or value == -1,
    )
    check_range(
        args, "warmup_steps", f"between 0 and {MAX_STEPS}", lambda value: 0 <= value <= MAX_STEPS
    )
    check_range(
        args,
        "learning_rate weight_decay max_grad_norm",
        "at least 0 and finite",
        lambda value: 0 <= value < math.inf,
    )
    check_range(args, "num_train_epochs", "above 0 and finite", lambda value: 0 < value < math.inf)
    # It is a float32.
    check_range(
        args, "adam_epsilon", "at least 1e-37 and finite", lambda value: 1e-37 <= value < math.inf
    )
    check_range(
        args, "adam_beta1 adam_beta2", "at least 0 and below 1", lambda value: 0 <= value < 1
    )
    check_range(
        args, "validation_split_percentage", "between 0 and 99", lambda value: 0 <= value <= 99
    )
    # `datasets` 5.0 takes braces for names of its own.
    check_range(args, "cache_dir", "a path without braces", lambda value: "{" not in value)
    check_range(args, "output_dir", "a local folder", lambda value: value and "://" not in value)
    if args.push_to_hub and args.cache_dir:
        output_dir = Path(args.output_dir).resolve()
        if Path(args.cache_dir).resolve().is_relative_to(output_dir):
            raise InputError(
                f"--cache_dir {args.cache_dir}: --push_to_hub would upload it with --output_dir; "
                "choose a folder elsewhere"
            )
    check_range(args, "seed", "between 0 and 4294967295", lambda value: 0 <= value < 2**32)

    check_range(
        args, "profile_steps", "FIRST:LAST, two numbers of steps, such as 10:13", is_range_of_steps
    )
    check_sources(args)
    if args.load_best_model_at_end and not (args.do_train and args.do_eval):
        raise InputError("--load_best_model_at_end needs --do_train and --do_eval, or neither")
    if args.early_stopping_patience and not args.load_best_model_at_end:
        raise InputError("--early_stopping_patience needs --load_best_model_at_end")


def is_range_of_steps(value: str) -> bool:
    """Whether a value of --profile_steps names a first step and a last one."""
    match = re.fullmatch(r"(\d+):(\d+)", value)
    return match is not None and 1 <= int(match[1]) <= int(match[2])


def check_sources(args) -> None:
    """Check the flags that name the model, the tokenizer and the data. Raises InputError."""
    if args.config_overrides is not None and args.model_name_or_path:
        raise InputError(
            f"--config_overrides {args.config_overrides}: the weights of --model_name_or_path "
            "need their own config; leave one of the two out"
        )
    has_new_model = args.do_train and (args.config_name or args.model_type)
    if not args.model_name_or_path and not has_new_model:
        raise InputError(
            "no model: give --model_name_or_path, or, to train from scratch, --config_name or "
            "--model_type"
        )
    if not args.tokenizer_name and not args.model_name_or_path:
        raise InputError("no tokenizer: give --tokenizer_name or --model_name_or_path")
    file = args.train_file or args.validation_file
    if not file and not args.dataset_name:
        raise InputError("no data: give --dataset_name or --train_file")
    if file and args.dataset_name:
        raise InputError(f"two data sources: --dataset_name {args.dataset_name} and {file[0]}")
    if args.do_train and args.validation_file and not args.train_file:
        raise InputError("--validation_file needs --train_file, or --do_eval alone")


def check_range(args, names: str, meaning: str, is_valid) -> None:
    """Raise InputError for the first flag whose value is not valid.

    `names` are flags, separated by spaces. One that the script does not have, or whose value is
    None, is skipped.
    """
    for name in names.split():
        value = getattr(args, name, None)
        if value is not None and not is_valid(value):
            raise InputError(f"--{name} {value}: it must be {meaning}")


class TrainingLog:
    """Log lines, TensorBoard scalars and progress bars.

    To fetch a value is to wait for the step that computes it. So the loop sets `due` to a step and
    its totals, and `flush` fetches them when the devices have the next step to work on.
    """

    def __init__(self, args, steps: range, steps_per_epoch: int | None):
        self.writing_fails = f"{args.output_dir}: cannot write what TensorBoard shows"
        self.writer = None
        # An evaluation alone has no step, so it adds no point to the curves of the training.
        self.trains = args.do_train
        if self.trains and is_writer(args):
            with input_errors(self.writing_fails):
                self.writer = Writer(str(args.output_dir))
        self.show_bars = is_writer(args) and not args.disable_tqdm and sys.stderr.isatty()
        self.steps = steps
        self.steps_per_epoch = steps_per_epoch
        self.training_bar = None
        self.due = None
        self.results = {}
        self.start = time.perf_counter()
        self.last = self.start

    def __enter__(self):
        self.training_bar = self.bar(
            "Training", self.steps.stop, initial=self.steps.start, unit="step"
        )
        return self

    def __exit__(self, *_):
        self.training_bar.close()

    def bar(self, description: str, total: int, **options) -> tqdm:
        """A progress bar, which shows nothing where there is no terminal."""
        disable = not self.show_bars
        return tqdm(desc=description, total=total, dynamic_ncols=True, disable=disable, **options)

    def flush(self) -> None:
        """Write the means that are due. Raises InputError if loss or gradients are not finite."""
        if self.due is None:
            return
        step, totals = self.due
        self.due = None
        sums = {name: float(np.asarray(array)[0]) for name, array in totals.items()}
        if not all(math.isfinite(value) for value in sums.values()):
            raise InputError(
                f"step {step}: the loss or its gradient is not finite; lower --learning_rate, set "
                "--max_grad_norm, or check the dropout of the config"
            )
        now = time.perf_counter()
        self.results = {
            "train_loss": sums["loss"] / max(sums["predicted"], 1),
            "train_learning_rate": sums["learning_rate"],
            "train_time": now - self.start,
            "train_tokens_per_second": sums["tokens"] / (now - self.last),
        }
        self.last = now
        if sums.get("z_loss"):
            self.results["train_z_loss"] = sums["z_loss"] / max(sums["predicted"], 1)
        shown = [f"epoch {step / self.steps_per_epoch:.2f}"] if self.steps_per_epoch else []
        shown.append(f"loss {self.results['train_loss']:.3f}")
        shown.append(f"{self.results['train_tokens_per_second']:,.0f} tokens/s")
        self.training_bar.set_postfix_str(", ".join(shown))
        self.scalars(self.results, step)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write values to TensorBoard and to the log."""
        if self.writer:
            with input_errors(self.writing_fails):
                for name, value in values.items():
                    self.writer.add_scalar(name, value, step)
                self.writer.flush()
        shown = ", ".join(f"{name} {value:.5g}" for name, value in values.items())
        logger.info(f"Step {step}: {shown}" if self.trains else shown)


@contextmanager
def profiled(p_train_step, args, steps: range):
    """Yield `p_train_step`, which with --profile_steps writes a trace of these steps.

    The trace is in the folder profile/plugins/profile/TIME of the output directory, where the
    profile plugin of TensorBoard looks for it. Raises InputError if it cannot be written.
    """
    if args.profile_steps is None or not is_writer(args):
        yield p_train_step
        return
    first, last = map(int, args.profile_steps.split(":"))
    if not steps.start < first <= steps.stop:
        logger.warning(
            f"--profile_steps {args.profile_steps}: no trace, this run takes the steps "
            f"{steps.start + 1} to {steps.stop}."
        )
    folder = Path(args.output_dir, "profile")
    numbers = iter(range(steps.start + 1, steps.stop + 1))
    is_tracing = False

    def stop_tracing():
        with input_errors(f"--profile_steps {args.profile_steps}: cannot write to {folder}"):
            jax.profiler.stop_trace()
        logger.info(f"--profile_steps: the trace is written. tensorboard --logdir={folder}")

    def traced_step(*inputs):
        nonlocal is_tracing
        step = next(numbers)
        if step == first:
            # The steps before are not part of the trace.
            jax.block_until_ready(inputs)
            jax.profiler.start_trace(str(folder))
            is_tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            outputs = p_train_step(*inputs)
        if step == last and is_tracing:
            jax.block_until_ready(outputs)
            is_tracing = False
            stop_tracing()
        return outputs

    try:
        yield traced_step
    finally:
        # Training ends before the last step of the trace.
        if is_tracing:
            stop_tracing()


def write_results(output_dir: str, results: dict[str, float], split: str) -> None:
    """Write SPLIT_results.json, and add the same values to all_results.json."""
    path = Path(output_dir, "all_results.json")
    # An evaluation alone may be the first to write there.
    path.parent.mkdir(parents=True, exist_ok=True)
    previous = {}
    if path.exists():
        try:
            previous = dict(json.loads(path.read_text()))
        except (ValueError, TypeError):
            logger.warning(f"{path} is not a JSON object and is replaced.")
    for name, content in ((path.name, previous | results), (f"{split}_results.json", results)):
        temporary = path.with_name(f"{name}.tmp")
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        temporary.replace(path.with_name(name))


def shard(tree):
    """Move arrays [local devices, ...] to the local devices.

    They get the mesh that pmap over "batch" gives its own outputs. With that of
    `flax.jax_utils.replicate`, pmap of jax 0.8 and later compiles a second time when its outputs
    come back as inputs.
    """
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("batch",))
    return jax.device_put(
        tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    )


def replicate(tree):
    """Copy arrays to all local devices, [local devices, ...]."""
    num_devices = jax.local_device_count()
    return shard(
        jax.tree.map(lambda leaf: np.broadcast_to(leaf, (num_devices, *np.shape(leaf))), tree)
    )


def fetch(tree):
    """Copy the first device's copy of replicated arrays to the host, all arrays at once.

    The result shares no memory with the devices, which may reuse theirs. `leaf[0]` would run a
    program for each array.
    """
    first = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data, tree)
    return jax.tree.map(lambda leaf: np.array(leaf)[0, ...], jax.device_get(first))


def to_pytorch(params) -> dict[str, np.ndarray]:
    """Flax parameters under the names and in the layout of Transformers' PyTorch classes."""
    names = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    arrays = {}
    for (*path, name), array in flatten_dict(params).items():
        if name == "kernel":
            array = array.T
        arrays[".".join([*path, names.get(name, name)])] = np.ascontiguousarray(array)
    return arrays


def leaf_name(path) -> str:
    """Name of a leaf of the state in a checkpoint, such as params/lm_head/bias."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def write_checkpoint(checkpoints: Path, state, step: int, settings: dict) -> None:
    """Write the folder checkpoints/STEP, which gets its name when it is complete.

    `state.safetensors` has the leaves of `state` by `leaf_name`. `run.json` has the step, the
    settings, the versions of the libraries, the SHA-256 of `state.safetensors` and that of its own
    other content. Batches and dropout are functions of the seed and the step, so nothing else is
    needed to resume.
    """
    temporary = checkpoints / f"{step}.tmp"
    temporary.mkdir()
    leaves = jax.tree_util.tree_leaves_with_path(state)
    save_file({leaf_name(path): np.asarray(leaf) for path, leaf in leaves}, temporary / STATE_FILE)
    run = {
        "step": step,
        "settings": settings,
        "versions": {module.__name__: module.__version__ for module in (jax, optax, transformers)},
        "state_sha256": file_sha256(temporary / STATE_FILE),
    }
    run["run_sha256"] = run_sha256(run)
    (temporary / RUN_FILE).write_text(json.dumps(run, indent=2))
    # Sync before the rename, so that no crash leaves an incomplete checkpoint under its final name.
    for path in (temporary / STATE_FILE, temporary / RUN_FILE, temporary):
        sync_to_disk(path)
    temporary.rename(checkpoints / str(step))
    sync_to_disk(checkpoints)


def sync_to_disk(path: Path) -> None:
    """Wait until a file or a folder's list of files is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def verify_checksums(folder: Path) -> None:
    """Raise InputError if a file of an exported model does not match its checksum there."""
    path = folder / CHECKSUM_FILE
    lines = path.read_text().splitlines() if path.is_file() else []
    for line in lines:
        checksum, _, name = line.partition("  ")
        if (folder / name).is_file() and file_sha256(folder / name) != checksum:
            raise InputError(
                f"{folder / name}: it does not match its checksum in {CHECKSUM_FILE}, so it is "
                f"damaged; if you have replaced it, delete {CHECKSUM_FILE}"
            )


def run_sha256(run: dict) -> str:
    """SHA-256 of the content of `run.json` without this checksum."""
    content = {name: value for name, value in run.items() if name != "run_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_run(checkpoint: Path) -> dict:
    """The content of a checkpoint's `run.json`. Raises ValueError if a checksum does not match."""
    run = json.loads((checkpoint / RUN_FILE).read_text())
    if run["run_sha256"] != run_sha256(run):
        raise ValueError(f"{RUN_FILE} does not match its checksum")
    if run["state_sha256"] != file_sha256(checkpoint / STATE_FILE):
        raise ValueError(f"{STATE_FILE} does not match its checksum")
    return run


def read_state(checkpoint: Path, template):
    """The state of a checkpoint, in the tree of `template`. Raises InputError if shapes differ."""
    arrays = load_file(checkpoint / STATE_FILE)

    def leaf(path, expected):
        array = arrays.get(leaf_name(path))
        if array is None or array.shape != np.shape(expected):
            raise InputError(f"{checkpoint}: it has no {leaf_name(path)} of this model's shape")
        return array

    return jax.tree_util.tree_map_with_path(leaf, template)


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint. Renamed first, it is never seen as an incomplete one."""
    temporary = checkpoint.with_name(f"{checkpoint.name}.tmp")
    shutil.rmtree(checkpoint.rename(temporary))


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of an output directory, newest first."""
    folder = output_dir / "checkpoints"
    found = folder.iterdir() if folder.is_dir() else []
    found = [path for path in found if path.name.isdigit()]
    return sorted(found, key=lambda path: -int(path.name))


def check_output_dir(args) -> None:
    """Raise InputError if --output_dir cannot be written or holds files of something else."""
    output_dir = Path(args.output_dir).absolute()
    nearest = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    with input_errors(f"--output_dir {output_dir}: {nearest} is not writable"):
        tempfile.TemporaryFile(dir=nearest).close()
    if (output_dir / "checkpoints").is_file():
        raise InputError(f"--output_dir {output_dir}: checkpoints is a file in it, not a folder")
    is_new = nearest != output_dir
    is_empty = is_new or {file.name for file in output_dir.iterdir()} <= {LOCK_FILE}
    sources = [Path(name).absolute() for name in (args.config_name, args.tokenizer_name) if name]
    may_have_files = (
        args.overwrite_output_dir
        or not args.do_train
        or args.resume_from_checkpoint
        or (output_dir / "checkpoints").is_dir()
        # A run was killed while it replaced the checkpoints.
        or any(path.name.isdigit() for path in (output_dir / TEMPORARY_FOLDER).glob("*"))
        or output_dir in sources
    )
    if not is_empty and not may_have_files:
        raise InputError(
            f"--output_dir {output_dir}: it has files but no checkpoints; choose another folder, "
            "or give --overwrite_output_dir"
        )


def resumes_from_own(args) -> bool:
    """Whether the checkpoints to resume from are those of --output_dir itself."""
    output_dir = Path(args.output_dir).resolve()
    source = Path(args.resume_from_checkpoint or output_dir).resolve()
    return source == output_dir or source.is_relative_to(output_dir / "checkpoints")


def find_checkpoints(args) -> list[Path]:
    """The checkpoints to resume from, the best first; none for a new run. Raises InputError.

    The run's own come before those of another run that --resume_from_checkpoint names: the same
    command, given again, resumes where it was.
    """
    output_dir = Path(args.output_dir).absolute()
    if args.resume_from_checkpoint is None:
        return [] if args.overwrite_output_dir else list_checkpoints(output_dir)
    path = Path(args.resume_from_checkpoint or output_dir).absolute()
    is_checkpoint = path.parent.name == "checkpoints" and path.name.isdigit() and path.is_dir()
    wanted = [path] if is_checkpoint else list_checkpoints(path)
    if not wanted:
        raise InputError(f"--resume_from_checkpoint {path}: it has no checkpoint")
    if args.overwrite_output_dir or resumes_from_own(args):
        return wanted
    return [*list_checkpoints(output_dir), *wanted]


def settings_to_match(args, config, batch_size: int) -> dict:
    """The settings in which a run must agree with the checkpoint that it resumes from."""
    settings = json.loads(config.to_json_string())
    # Another version of Transformers may resume.
    settings |= {"transformers_version": None, "architectures": None}
    # The JSON leaves out what equals the default of all model types.
    for name in ("tie_word_embeddings", "is_decoder"):
        settings[name] = getattr(config, name)
    settings["batch_size"] = batch_size
    settings["optimizer"] = "Adafactor" if args.adafactor else "AdamW"
    return settings


def settings_to_log(args, train_set) -> dict:
    """The settings in which a resumed run may differ. It logs those that do."""
    names = [argument.name for argument in fields(DataTrainingArguments)]
    names = [name for name in names if name not in ("overwrite_cache", "preprocessing_num_workers")]
    settings = {f"--{name}": getattr(args, name) for name in [*names, *LEARNING_FLAGS]}
    for name in ("--train_file", "--validation_file"):
        # A checkpoint of one file may be older than lists of files.
        settings[name] = " ".join(settings[name] or []) or None
    settings["number of devices"] = jax.device_count()
    if hasattr(train_set, "input_ids"):
        settings["checksum of the training text"] = train_set.input_ids.checksum()
    return settings


def check_processes_agree(num_steps: int, eval_set, settings: dict) -> None:
    """Raise InputError in all processes if they have different data.

    They would train on different texts, or wait for each other forever. `settings` are those of
    `settings_to_log`.
    """
    numbers = {
        "number of steps": num_steps,
        "number of evaluation sequences": 0 if eval_set is None else len(eval_set),
        "checksum of the training text": settings.get("checksum of the training text", 0),
    }
    for name, number in numbers.items():
        found = np.unique(multihost_utils.process_allgather(np.uint32(number)))
        if len(found) > 1:
            raise InputError(
                f"--distributed: the {name} differs between processes: {found.tolist()}; all need "
                "the same data and flags"
            )


def log_changed_settings(before: dict, now: dict) -> None:
    """Log each setting of `now` that was another one in the checkpoint."""
    for name, value in now.items():
        if before.get(name, value) != value:
            logger.info(f"{name} is {value} now, and was {before[name]} before this checkpoint.")


def restore(checkpoints: list[Path], state, settings: dict, num_steps: int):
    """Read the first readable checkpoint.

    Returns the state, on the host, its step, and the settings stored with it, among which the
    streaming script has its position. Raises InputError if the checkpoint is of another model,
    optimizer or batch size, of a step beyond `num_steps`, or if none can be read.
    """
    for checkpoint in checkpoints:
        try:
            run = read_run(checkpoint)
            for name, value in settings.items():
                # An older checkpoint may lack a setting.
                found = run["settings"].get(name, value)
                if found != value:
                    raise InputError(f"{checkpoint}: its {name} is {found}, here {value}")
            if run["step"] > num_steps:
                raise InputError(
                    f"{checkpoint}: this run ends before, at step {num_steps}; train for more "
                    "steps, or choose another --output_dir"
                )
            return read_state(checkpoint, state), run["step"], run["settings"]
        except InputError:
            raise
        except Exception as error:
            # A damaged file can raise anything.
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            logger.warning(f"{checkpoint} cannot be read and is skipped: {reason}")
    # Another run may have begun in the meantime, and have replaced them.
    OutputLock(checkpoints[0].parents[1]).check()
    raise InputError(
        f"{checkpoints[0].parent}: no readable checkpoint; choose another --output_dir"
    )


class Evaluations:
    """The evaluations during training, and the best of them with --load_best_model_at_end.

    With this flag, each evaluation is followed by a checkpoint, and the last step by an evaluation.
    A checkpoint stores `best`, so that a resumed run decides as an undisturbed one does. Its items:
    `step` and `eval_loss`, of the best evaluation; `evaluated`, the step of the latest one;
    `without_improvement`, the number of evaluations since the best.
    """

    def __init__(self, args, eval_steps: int | None, last_step: int, evaluate_now, best: dict):
        self.eval_steps = eval_steps if args.do_eval else None
        self.last_step = last_step
        self.evaluate_now = evaluate_now
        self.keeps_best = args.load_best_model_at_end
        self.patience = args.early_stopping_patience or math.inf
        # `broadcast_one_to_all` has made arrays of the numbers.
        self.best = {name: value.item() for name, value in best.items()}
        # Whether training ends: patience is exhausted, or a signal has stopped an evaluation.
        self.ends = self.best["without_improvement"] >= self.patience

    def are_due(self, step: int) -> bool:
        """Whether to evaluate after `step`.

        After the last step only with --load_best_model_at_end, which needs the loss to choose the
        best. Otherwise `main` evaluates the final weights.
        """
        if step == self.last_step:
            return self.keeps_best
        return bool(self.eval_steps) and step % self.eval_steps == 0

    def run(self, params, step: int) -> bool:
        """Evaluate, and update `best`. Returns whether training ends."""
        results = self.evaluate_now(params, step)
        if not results:
            self.ends = True
        elif self.keeps_best:
            # As float32 it is the same in all processes. One that is NaN is not below any other.
            loss = float(np.float32(results["eval_loss"]))
            if loss < self.best["eval_loss"]:
                self.best = NO_BEST | {"step": step, "eval_loss": loss, "evaluated": step}
            else:
                count = self.best["without_improvement"] + 1
                self.best = self.best | {"evaluated": step, "without_improvement": count}
                self.ends = count >= self.patience
                if self.ends:
                    logger.info(f"--early_stopping_patience: training ends after step {step}.")
        return self.ends

    def run_missing(self, params, step: int) -> None:
        """Run the evaluation of the step that a run resumes from, if a signal has prevented it."""
        is_missing = self.keeps_best and step > 0 and self.best["evaluated"] != step
        if is_missing and self.are_due(step):
            self.run(params, step)

    def to_store(self) -> dict:
        """What a checkpoint stores."""
        return {"best": self.best} if self.keeps_best else {}


def best_before(args, checkpoint_settings: dict) -> dict:
    """The `best` of Evaluations in the settings of the checkpoint to resume from.

    It counts only if its checkpoint is in this output directory, so a run that resumes from another
    run starts with NO_BEST.
    """
    best = checkpoint_settings.get("best", NO_BEST) if args.load_best_model_at_end else NO_BEST
    checkpoint = Path(args.output_dir).absolute() / "checkpoints" / str(best["step"])
    # --overwrite_output_dir deletes the run's own checkpoints if it resumes from another run.
    is_deleted = args.overwrite_output_dir and not resumes_from_own(args)
    if best["step"] and (is_deleted or not checkpoint.is_dir()):
        logger.warning(f"{checkpoint}, the best one, is missing: the best is chosen from now on.")
        return NO_BEST
    return best


def export_best(state, step: int, evaluations: Evaluations, saver, stop):
    """Export the weights of the best checkpoint, if it is kept and no signal has stopped the run.

    `saver` is None in a process that does not write. Returns the state with these weights, and
    their step. Raises InputError if the checkpoint cannot be read.
    """
    best = evaluations.best
    if not evaluations.keeps_best or stop.agreed:
        return state, step
    if not best["step"]:
        logger.warning("No evaluation had a finite loss, so the last weights are exported.")
    if best["step"] in (0, step):
        return state, step
    params = fetch(state.params)
    if saver:
        checkpoint = saver.checkpoints / str(best["step"])
        with input_errors(f"{checkpoint}: the best checkpoint cannot be read"):
            read_run(checkpoint)
            params = read_state(checkpoint, {"params": params})["params"]
            saver.export(params)
    logger.info(f"Exported step {best['step']}, the best, with eval_loss {best['eval_loss']:.5g}.")
    params = jax.tree.map(multihost_utils.broadcast_one_to_all, params)
    return state.replace(params=replicate(params)), best["step"]


class Saver:
    """Writes a run's checkpoints and model, and uploads them, in background threads.

    Every file and every checkpoint gets its name when it is complete. A new Saver locks the output
    directory, and deletes the checkpoints after `first_step`.
    """

    def __init__(self, args, model, tokenizer, settings: dict, first_step: int, upload, lock):
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.upload = upload
        self.save_total_limit = args.save_total_limit
        self.output_dir = Path(args.output_dir)
        self.checkpoints = self.output_dir / "checkpoints"
        self.temporary = self.output_dir / TEMPORARY_FOLDER
        self.pool = ThreadPoolExecutor(2)
        self.saving = None
        self.uploading = None
        self.output_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        self.clean_up(args, first_step)

    def clean_up(self, args, first_step: int) -> None:
        """Delete what an interrupted run left, and the checkpoints that this run replaces."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        keeps_own = args.resume_from_checkpoint is not None and resumes_from_own(args)
        if args.overwrite_output_dir and not keeps_own and self.checkpoints.exists():
            # One rename removes them all at once. The new folder shows that files are this run's.
            self.checkpoints.rename(self.temporary)
            self.checkpoints.mkdir()
            shutil.rmtree(self.temporary)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for leftover in self.checkpoints.glob("*.tmp"):
            shutil.rmtree(leftover)
        for checkpoint in list_checkpoints(self.output_dir):
            if int(checkpoint.name) > first_step:
                logger.info(f"{checkpoint} is deleted: this run resumes from step {first_step}.")
                delete_checkpoint(checkpoint)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pool.shutdown()

    def save(self, state, step: int, is_last: bool, **progress) -> None:
        """Save `state` with the settings and with `progress`.

        `progress` are the values of the last log line, `best` of Evaluations, if it is kept, and in
        the streaming script the position in the data. With `is_last`, the model is exported even if
        an upload has to end first.

        Returns when the state is copied from the device and the previous save is written.
        """
        state = fetch(state)
        self.wait()
        settings = self.settings | progress
        self.saving = self.pool.submit(self.write, state, step, is_last, settings)

    def wait(self) -> None:
        """Wait for the save in progress. Raises InputError if it failed."""
        if self.saving:
            with input_errors(f"{self.output_dir}: saving failed, earlier checkpoints are intact"):
                self.saving.result()

    def write(self, state, step: int, is_last: bool, settings: dict) -> None:
        """Write a checkpoint and the model, and start an upload."""
        if not (self.checkpoints / str(step)).exists():
            write_checkpoint(self.checkpoints, state, step, settings)
            best_step = settings.get("best", NO_BEST)["step"]
            for checkpoint in list_checkpoints(self.output_dir)[self.save_total_limit :]:
                if int(checkpoint.name) != best_step:
                    delete_checkpoint(checkpoint)
        if self.uploading and not self.uploading.done() and not is_last:
            # No file may change during an upload. A later save exports the model.
            return
        if self.uploading:
            self.uploading.result()
        self.export(state.params)
        if self.upload and not is_last:
            self.uploading = self.pool.submit(self.try_upload, step)

    def export(self, params) -> None:
        """Write the model and the tokenizer for `from_pretrained` in Flax and in PyTorch."""
        # The limit is beyond any model, so that all weights are in one file.
        self.model.save_pretrained(self.temporary, params=params, max_shard_size="1000GB")
        self.tokenizer.save_pretrained(self.temporary)
        weights = self.temporary / "model.safetensors"
        save_file(to_pytorch(params), weights, metadata={"format": "pt"})
        # safetensors lets only the owner read its files.
        weights.chmod((self.temporary / "config.json").stat().st_mode)
        names = ("flax_model.msgpack", weights.name)
        lines = [f"{file_sha256(self.temporary / name)}  {name}\n" for name in names]

        # The checksums come last, so that they never belong to other weights.
        (self.output_dir / CHECKSUM_FILE).unlink(missing_ok=True)
        # A tokenizer with several chat templates has a folder of them.
        for file in [path for path in self.temporary.rglob("*") if path.is_file()]:
            target = self.output_dir / file.relative_to(self.temporary)
            target.parent.mkdir(exist_ok=True)
            file.replace(target)
        (self.temporary / CHECKSUM_FILE).write_text("".join(lines))
        (self.temporary / CHECKSUM_FILE).replace(self.output_dir / CHECKSUM_FILE)
        shutil.rmtree(self.temporary)

    def try_upload(self, step: int) -> None:
        """Upload the output directory. A failure is a warning: the next upload includes it."""
        try:
            # The files of TensorBoard still grow.
            self.upload(f"Step {step}", "events.*")
        except Exception as error:
            reason = " ".join(str(error).split())
            logger.warning(
                f"The upload of step {step} failed, the next upload includes it: {reason}"
            )


def raise_save_failure(saver: Saver | None) -> None:
    """Raise InputError if the latest save has failed. A save in progress goes on."""
    if saver and saver.saving and saver.saving.done():
        saver.wait()


class TimeLimit(requests.adapters.HTTPAdapter):
    """An HTTP adapter that gives up a request after HUB_SECONDS without an answer.

    Without it, `huggingface_hub` 0.36 waits forever for a server that accepts and never answers.
    """

    def send(self, request, **options):
        options["timeout"] = options.get("timeout") or HUB_SECONDS
        return super().send(request, **options)


def make_session() -> requests.Session:
    """A session for `huggingface_hub`, whose requests have a time limit."""
    session = requests.Session()
    for prefix in ("http://", "https://"):
        session.mount(prefix, TimeLimit())
    return session


def connect_hub(args):
    """Create the repository on the Hub and check that it can be written to.

    Returns a function of a commit message and patterns of files to leave out, which uploads
    --output_dir. Raises InputError.
    """
    api = huggingface_hub.HfApi(token=args.hub_token or args.token)
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    with input_errors(f"--push_to_hub: cannot write to {name}, check --hub_token"):
        repo_id = api.create_repo(name, exist_ok=True).repo_id
        # Asks for permission to upload a file, but uploads none.
        api.preupload_lfs_files(repo_id, [huggingface_hub.CommitOperationAdd("a", b"-")])

    def upload(message: str, *ignored: str) -> None:
        api.upload_folder(
            repo_id=repo_id,
            folder_path=args.output_dir,
            commit_message=message,
            ignore_patterns=["checkpoints/**", "profile/**", "*.tmp*", LOCK_FILE, *ignored],
        )

    return upload


class OutputLock:
    """The lock of an output directory: one run at a time writes to it.

    It is a POSIX lock of the file `.lock`, which names the process that holds it. The kernel
    releases it when the process ends. Between hosts it works if their file system has such locks,
    as NFS has.
    """

    def __init__(self, output_dir: str):
        self.output_dir = Path(output_dir)
        self.path = self.output_dir / LOCK_FILE
        self.checkpoints = []
        self.file = None

    def check(self) -> None:
        """Raise InputError if another process has the lock, and note the checkpoints for `acquire`.

        It changes no file.
        """
        self.checkpoints = list_checkpoints(self.output_dir)
        with suppress(FileNotFoundError), self.path.open("r+b") as file:
            self.lock(file)

    def acquire(self) -> None:
        """Take the lock. Raises InputError if another run has it, or had it since `check`."""
        while self.file is None:
            file = self.path.open("a+b", buffering=0)
            self.lock(file)
            # The run that had the lock may have deleted this file.
            if self.path.exists() and os.path.samestat(self.path.stat(), os.fstat(file.fileno())):
                self.file = file
        with input_errors(f"{self.output_dir}: cannot write to it"):
            self.file.truncate(0)
            self.file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        if list_checkpoints(self.output_dir) != self.checkpoints:
            raise InputError(
                f"--output_dir {self.output_dir}: another run has saved checkpoints there since "
                "this one was started; start again to resume from them"
            )

    def lock(self, file) -> None:
        """Lock `file`. Raises InputError if another process has locked it.

        A POSIX lock ends as soon as this process closes any descriptor of the file.
        """
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            holder = file.read().decode() or "another process"
            raise InputError(
                f"--output_dir {self.output_dir}: {holder} writes to it; wait until it ends, or "
                "choose another folder"
            ) from error
        except OSError as error:
            logger.warning(f"{self.path}: this file system has no locks: {error}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.file:
            self.path.unlink(missing_ok=True)
            self.file.close()


def prepare_output(args, lock: OutputLock):
    """Find out what the run resumes from, and whether it can write and upload.

    Returns the checkpoints to resume from, and the function that uploads, None without
    --push_to_hub. Raises InputError.
    """
    check_output_dir(args)
    if args.do_train:
        lock.check()
    upload = connect_hub(args) if args.push_to_hub else None
    return find_checkpoints(args), upload


def publish(args, config, upload) -> None:
    """Write a model card if there is none, and upload the output directory. Raises InputError."""
    card = Path(args.output_dir) / "README.md"
    if not card.exists():
        tags = ["flax", config.model_type]
        huggingface_hub.metadata_save(card, {"library_name": "transformers", "tags": tags})
    with input_errors(
        f"--push_to_hub: the final upload failed, all files are in {args.output_dir}"
    ):
        upload("End of training")


class StopSignals:
    """SIGTERM, SIGHUP and Ctrl-C.

    Before training they end the process, later they stop it after a step or a batch. Three
    attributes have the number of a signal, or 0: `received` the highest one that came to this
    process, `agreed` the one that all processes stop for, `exiting` the one that ends the process.
    """

    def __init__(self):
        self.process_id = os.getpid()
        self.exiting = 0
        self.received = 0
        self.agreed = 0

    def handle(self, handler) -> None:
        """Let `handler` handle the signals."""
        for number in STOP_SIGNALS:
            # nohup makes a process ignore SIGHUP, and that is to last.
            is_ignored = signal.getsignal(number) == signal.SIG_IGN
            if number != signal.SIGHUP or not is_ignored:
                signal.signal(number, handler)

    def exit_now(self, number, frame) -> None:
        """End the process."""
        if os.getpid() != self.process_id:
            # A process that tokenizes for this one has inherited the handler.
            os._exit(128 + number)
        # Python drops an exception that is raised in a callback of the garbage collector or in
        # __del__. If the signal came there, the run stops as if it had come in training.
        self.received = max(self.received, number)
        while frame and frame.f_code.co_name != "_xla_gc_callback":
            frame = frame.f_back
        if frame:
            # JAX 0.10 has such a callback. Send the signal again when it has returned.
            threading.Timer(0.01, os.kill, (self.process_id, number)).start()
            return
        self.exiting = number
        sys.exit(128 + number)

    def record(self, number, frame) -> None:
        """Record the signal for `check`. A second one kills the process."""
        self.received = max(self.received, number)
        signal.signal(number, signal.SIG_DFL)

    def check(self, step: int) -> int:
        """Return the signal to stop for after `step`, which may be a batch of an evaluation, or 0.

        All processes must stop after the same step. They ask each other every tenth step.
        """
        if jax.process_count() == 1:
            self.agreed = self.received
        elif not self.agreed and step % 10 == 0:
            self.agreed = int(multihost_utils.process_allgather(self.received).max())
        return self.agreed


def start_distributed() -> None:
    """Join the cluster that the environment describes. Raises InputError."""
    options = {}
    with input_errors("--distributed"):
        for name in ("num_processes", "process_id"):
            value = os.environ.get(f"JAX_{name.upper()}")
            if value:
                options[name] = int(value)
        jax.distributed.initialize(**options)


def is_writer(args) -> bool:
    """Whether this process writes the files: the first does.

    Without --distributed this does not ask JAX, because the answer would start the devices.
    """
    return not args.distributed or jax.process_index() == 0


def ignore_os_errors_in_threads(info) -> None:
    """A `threading.excepthook` for TensorBoard 2.20, whose thread writes to the disk.

    When the disk is full, the thread would print a traceback. `TrainingLog.scalars` gets the same
    error and raises it.
    """
    if not issubclass(info.exc_type, OSError):
        threading.__excepthook__(info)


def keep_compiled_programs(args, undo: ExitStack) -> None:
    """Let a second start take its compiled programs from a folder in --cache_dir.

    JAX's own settings, such as JAX_COMPILATION_CACHE_DIR, come first. By default JAX keeps no
    program that compiles in less than a second. The programs of a small model do. If they are kept,
    too, a second start of it takes 4 to 5 seconds in place of 5 to 6 (benchmarks/startup.py
    --smoke). `undo` gets what restores the settings.
    """
    settings = {}
    if not jax.config.jax_compilation_cache_dir:
        parent = args.cache_dir or huggingface_hub.constants.HF_HOME
        settings["jax_compilation_cache_dir"] = f"{parent}/jax-compilation-cache"
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        settings["jax_persistent_cache_min_compile_time_secs"] = 0
    for name, value in settings.items():
        undo.callback(jax.config.update, name, getattr(jax.config, name))
        jax.config.update(name, value)


@contextmanager
def process_settings(args):
    """Set up the cluster, signals, logging, bars and the compilation cache.

    The end of the block restores everything except the cluster. Yields the StopSignals.
    """
    if args.distributed:
        start_distributed()
    with ExitStack() as undo:
        stop = StopSignals()
        for number in STOP_SIGNALS:
            undo.callback(signal.signal, number, signal.getsignal(number) or signal.SIG_DFL)
        stop.handle(stop.exit_now)

        undo.callback(setattr, threading, "excepthook", threading.excepthook)
        threading.excepthook = ignore_os_errors_in_threads

        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        root = logging.getLogger()
        undo.callback(setattr, root, "handlers", root.handlers)
        root.handlers = [handler]
        levels = {root: "ERROR", logger: "INFO" if is_writer(args) else "ERROR"}
        levels[logging.getLogger("datasets")] = "CRITICAL"
        for some_logger, level in levels.items():
            undo.callback(some_logger.setLevel, some_logger.level)
            some_logger.setLevel(level)
        undo.callback(transformers.logging.set_verbosity, transformers.logging.get_verbosity())
        transformers.logging.set_verbosity_error()
        # Log lines go above the bars.
        undo.enter_context(logging_redirect_tqdm())

        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            huggingface_hub.configure_http_backend(make_session)
            undo.callback(huggingface_hub.configure_http_backend)
        if not huggingface_hub.utils.are_progress_bars_disabled():
            # Uploads run in the background.
            huggingface_hub.utils.disable_progress_bars()
            undo.callback(huggingface_hub.utils.enable_progress_bars)
        hide_bars = args.disable_tqdm or not sys.stderr.isatty()
        if hide_bars and not datasets.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            undo.callback(datasets.enable_progress_bars)

        keep_compiled_programs(args, undo)
        try:
            yield stop
        except Exception as error:
            if stop.exiting:
                # `datasets` 5.0 raises an error of its own when its processes are stopped.
                raise SystemExit(128 + stop.exiting) from error
            raise


@contextmanager
def out_of_memory_errors(args):
    """Turn the error of a device that has no memory left into an InputError.

    XLA raises it when it compiles a program that does not fit, or when the program runs.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).partition("\n")[0][:300]
        raise InputError(f"a device has no memory left: {reason}; {memory_advice(args)}") from error


def memory_advice(args) -> str:
    """What a device computes at a time, and the flags that lower its memory."""
    per_device = args.per_device_train_batch_size
    per_device_eval = args.per_device_eval_batch_size
    advice = []
    if args.do_train and per_device > 1:
        # The smallest divisor, for the same global batch size.
        divisor = next(d for d in range(2, per_device + 1) if per_device % d == 0)
        advice.append(
            f"--per_device_train_batch_size={per_device // divisor} with "
            f"--gradient_accumulation_steps={divisor * args.gradient_accumulation_steps}"
        )
    if not args.do_train and per_device_eval > 1:
        advice.append(f"--per_device_eval_batch_size={per_device_eval // 2}")
    if args.do_train and args.gradient_checkpointing != "layers":
        advice.append("--gradient_checkpointing")
    if args.dtype == "float32":
        advice.append("--dtype=bfloat16")
    if args.do_train and not args.adafactor:
        advice.append("--adafactor, in a new run")
    length_flag = "block_size" if hasattr(args, "block_size") else "max_seq_length"
    advice.append(f"a smaller --{length_flag}")
    what_helps = f"what lowers memory, in the order to try: {', '.join(advice)}"
    if not args.do_train:
        return f"a device computes at most {per_device_eval} sequences at a time; {what_helps}"
    num_devices = jax.device_count()
    accumulation = args.gradient_accumulation_steps
    return (
        f"a device computes {per_device} sequences at a time in training, and {per_device_eval} in "
        f"evaluation; the global batch is {num_devices} devices x {accumulation} x {per_device} = "
        f"{num_devices * accumulation * per_device}; {what_helps}; in an evaluation: "
        "--per_device_eval_batch_size"
    )


@contextmanager
def exit_with_one_line(status: int, is_distributed: bool = False):
    """End the process with one line and `status` for an error that the user can fix."""
    try:
        yield
    except (InputError, OSError, jax.errors.JaxRuntimeError) as error:
        # JaxRuntimeError: another process of the cluster has ended, for example.
        message = " ".join(f"{Path(__file__).name}: error: {error}"[:2000].split())
        print(message, file=sys.stderr, flush=True)
        if is_distributed:
            # A regular exit would wait for the other processes, and they wait for this one.
            os._exit(status)
        raise SystemExit(status) from error


# ---------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Train and evaluate a model as `argv`, or else the command line, says.

    Ends with SystemExit: status 2 for a wrong command line, 1 for wrong data or a failure of the
    environment, 128 plus the number of the signal for a run that was stopped.
    """
    with exit_with_one_line(status=2):
        args = parse_args(sys.argv[1:] if argv is None else argv)
    with (
        exit_with_one_line(1, args.distributed),
        process_settings(args) as stop,
        OutputLock(args.output_dir) as lock,
        out_of_memory_errors(args),
    ):
        # One process writes. Find out before anything else whether it can.
        writes = is_writer(args)
        checkpoints, upload = prepare_output(args, lock) if writes else ([], None)

        # Load.
        config, tokenizer, max_length = load_config_and_tokenizer(args)
        collator = make_collator(args, config, tokenizer, max_length)
        train_stream, eval_set, held_out = load_data(args, tokenizer, collator.max_length)
        batch_size, num_steps = plan_steps(args)

        # Initialize or restore.
        model, params = load_model(args, config)
        num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
        schedule = make_schedule(args, num_steps)
        optimizer = make_optimizer(args, schedule) if args.do_train else optax.identity()
        # The state has a copy of the parameters.
        state = create_train_state(params, optimizer)
        del params
        required_settings = settings_to_match(args, config, batch_size)
        required_settings |= stream_settings(args, max_length, held_out)
        logged_settings = settings_to_log(args, train_set=None)
        check_processes_agree(num_steps, eval_set, logged_settings)
        first_step = 0
        checkpoint_settings = {}
        positions = [start_of_epoch(0, carried=[])] * jax.process_count()
        if checkpoints and args.do_train:
            state, first_step, checkpoint_settings = restore(
                checkpoints, state, required_settings, num_steps
            )
            positions = stored_positions(checkpoint_settings, checkpoints[0].parent)
        # Process 0 sends the state to the others, one array at a time to limit memory.
        state, first_step, best = jax.tree.map(
            multihost_utils.broadcast_one_to_all,
            (state, first_step, best_before(args, checkpoint_settings)),
        )
        state = replicate(state)
        position = share_json(positions)[0][jax.process_index()]
        steps = range(int(first_step), num_steps)
        step = steps.start

        p_train_step, p_eval_step = make_steps(args, model, collator, schedule)
        if args.do_train:
            blocks = training_blocks(args, train_stream, position, batch_size, held_out)
        # The Saver makes the folder of checkpoints before TensorBoard writes its file. A run is not
        # started again in a folder that has files but no checkpoints.
        saver = None
        if args.do_train and writes:
            settings = required_settings | logged_settings
            saver = Saver(args, model, tokenizer, settings, steps.start, upload, lock)
        log = TrainingLog(args, steps, steps_per_epoch=None)
        log.results = checkpoint_settings.get("results", {})
        evaluate_now = partial(evaluate, args, p_eval_step, eval_set, collator, log, stop)
        evaluations = Evaluations(args, args.eval_steps, num_steps, evaluate_now, best)

        # Train.
        if args.do_train:
            log_changed_settings(checkpoint_settings, logged_settings)
            logger.info(
                f"Training {num_params:,} parameters, steps {steps.start} to {num_steps} of "
                f"{jax.device_count()} {jax.default_backend()} devices x "
                f"{args.gradient_accumulation_steps} x {args.per_device_train_batch_size} blocks "
                f"of {max_length} tokens."
            )
            stop.handle(stop.record)
            shape = (args.gradient_accumulation_steps, args.per_device_train_batch_size)
            progress = StreamProgress(position)
            batches = train_batches(blocks, collator, args.seed, steps, shape, progress)
            # The next window is read while this one trains. Each process has a window of its own.
            num_ahead = 2 + args.shuffle_buffer_size * jax.process_count() // batch_size
            # The end of this block, even by an error, waits for what is being written.
            with (
                saver or nullcontext(),
                log,
                profiled(p_train_step, args, steps) as p_step,
                closing(prefetch(batches, num_ahead)) as batches_ahead,
                closing(prefetch(map(shard, batches_ahead))) as sharded,
            ):
                state, step = train(
                    args, state, p_step, sharded, steps, log, saver, stop, evaluations, progress
                )
                if saver:
                    saver.wait()
                progress.raise_error(step)
                state, step = export_best(state, step, evaluations, saver, stop)
            if saver and log.results:
                write_results(args.output_dir, log.results, "train")

        # Evaluate. With several processes, only a signal that all have agreed on stops the run.
        is_stopped = stop.agreed or (stop.received and not args.distributed)
        if args.do_eval and not is_stopped:
            results = evaluate_now(state.params, step)
            if writes and results:
                write_results(args.output_dir, results, "eval")

        # Publish.
        if upload and not (stop.agreed or stop.received):
            publish(args, config, upload)
        if args.distributed:
            # JAX kills processes that finish five minutes after the first.
            multihost_utils.sync_global_devices("end")
        if stop.agreed or stop.received:
            sys.exit(128 + max(stop.agreed, stop.received))


if __name__ == "__main__":
    main()
