#!/usr/bin/env python
# Copyright 2026 The authors of this collection. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Masked language modeling (BERT, RoBERTa, ALBERT, ELECTRA, ...) with JAX/Flax on CPU, GPU or TPU.

The objective is BERT's (Devlin et al., 2018, https://arxiv.org/abs/1810.04805): 15% of the tokens are predicted from
their context; of these 80% are shown as the mask token, 10% as a random token and 10% as themselves.

    python run_mlm_flax.py --output_dir=my-roberta --model_type=roberta --config_name=my-roberta \
        --tokenizer_name=my-roberta --train_file=corpus.txt --max_seq_length=128 --num_train_epochs=3
"""
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "datasets>=3.6,<6",
#     "flax>=0.10.6,<0.13",
#     "huggingface_hub>=0.34,<1",
#     "jax>=0.6.2,<0.12",
#     "numpy>=2,<3",
#     "optax>=0.2.5,<0.3",
#     "orbax-checkpoint>=0.11.16,<0.13",
#     "safetensors>=0.5,<1",
#     "tensorboard>=2.19,<3",
#     "tqdm>=4.66,<5",
#     "transformers>=4.57,<5",
# ]
# ///

import inspect
import json
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import datasets
import flax.linen as nn
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import transformers
from flax import serialization
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file
from tensorboard.summary import Writer
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import (
    CONFIG_MAPPING,
    FLAX_MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    FlaxAutoModelForMaskedLM,
    HfArgumentParser,
)
from transformers.hf_argparser import HfArg

logger = logging.getLogger(__name__)

DROPOUT_PRNG = "rbg"  # jax.random's faster generator; its bits depend on the key alone, on one kind of device
IGNORE = -100  # the label of a token that is not predicted


class InputError(Exception):
    """Something that the user can mend: printed as one line, exit status 1."""

    status = 1


class UsageError(InputError):
    """A wrong command line: exit status 2."""

    status = 2


# ---------------------------------------------------------------------------------------------------- arguments


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    model_name_or_path: str | None = HfArg(default=None, help="Hub id or folder of a model to go on from.")
    model_type: str | None = HfArg(default=None, help="Model family, if trained from scratch: bert, roberta, ...")
    config_name: str | None = HfArg(default=None, help="Hub id or folder of a config, if not the model's.")
    tokenizer_name: str | None = HfArg(default=None, help="Hub id or folder of a tokenizer, if not the model's.")
    cache_dir: str | None = HfArg(default=None, help="Where downloads, tokenized data and compiled programs go.")
    token: str | None = HfArg(default=None, help="Hub token for private models and datasets.", repr=False)
    use_fast_tokenizer: bool = HfArg(default=True, help="Use a tokenizer of the tokenizers library.")
    dtype: Literal["float32", "float16", "bfloat16"] = HfArg(default="float32", help="Of activations; weights are float32.")
    trust_remote_code: bool = HfArg(default=False, help="Run code that comes with a model or dataset.")


@dataclass
class DataTrainingArguments:
    _argument_group_name = "data"

    dataset_name: str | None = HfArg(default=None, help="Hub id of a dataset, or a folder of data files.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of the dataset.")
    train_file: str | None = HfArg(default=None, help="Training text: .txt, .json, .jsonl, .csv or .parquet.")
    validation_file: str | None = HfArg(default=None, help="Evaluation text, in one of the same formats.")
    train_ref_file: str | None = HfArg(default=None, help="Per line, a JSON list of the tokens that continue a word.")
    validation_ref_file: str | None = HfArg(default=None, help="The same for the evaluation text.")
    text_column_name: str | None = HfArg(default=None, help="Default: text, else the only string column.")
    validation_split_percentage: int = HfArg(default=5, help="Part of train to evaluate on without a validation split.")
    max_seq_length: int | None = HfArg(default=None, help="Tokens a sequence. Default: what tokenizer and model allow.")
    mlm_probability: float = HfArg(default=0.15, help="Part of the tokens to predict.")
    whole_word_mask: bool = HfArg(default=False, help="Mask all tokens of a word together.")
    line_by_line: bool = HfArg(default=False, help="One line is one sequence; else text is cut into full blocks.")
    pad_to_max_length: bool = HfArg(default=False, help="With line_by_line: pad to max_seq_length, not to the batch.")
    max_train_samples: int | None = HfArg(default=None, help="Train on at most so many sequences.")
    max_eval_samples: int | None = HfArg(default=None, help="Evaluate on at most so many sequences.")
    preprocessing_num_workers: int | None = HfArg(default=None, help="Processes that tokenize.")
    overwrite_cache: bool = HfArg(default=False, help="Tokenize anew, whatever the cache holds.")


@dataclass
class TrainingArguments:
    _argument_group_name = "training"

    output_dir: str = HfArg(help="Where the model, its checkpoints and logs are written.")
    overwrite_output_dir: bool = HfArg(default=False, help="Start over: discard the checkpoints in output_dir.")
    resume_from_checkpoint: str | None = HfArg(
        default=None, metadata={"nargs": "?", "const": "newest"}, help="Go on from here. Default: output_dir's newest."
    )
    do_train: bool = HfArg(default=False, help="Only train. With neither do_train nor do_eval: both.")
    do_eval: bool = HfArg(default=False, help="Only evaluate; with do_train: both.")
    per_device_train_batch_size: int = HfArg(default=8, help="Sequences a device and a forward pass.")
    per_device_eval_batch_size: int = HfArg(default=8, help="The same in evaluation.")
    gradient_accumulation_steps: int = HfArg(default=1, help="Forward passes an optimizer step.")
    gradient_checkpointing: bool = HfArg(default=False, help="Recompute activations: less memory, more time.")
    num_train_epochs: float = HfArg(default=3.0, help="Passes over the data, fractions allowed.")
    max_steps: int = HfArg(default=-1, help="If positive: optimizer steps, in place of num_train_epochs.")
    learning_rate: float = HfArg(default=5e-5, help="Peak learning rate.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "inverse_sqrt"] = HfArg(default="linear", help="After warm-up.")
    warmup_steps: int = HfArg(default=0, help="Steps of linear warm-up.")
    weight_decay: float = HfArg(default=0.0, help="Not applied to biases and LayerNorm scales.")
    adam_beta1: float = HfArg(default=0.9, help="AdamW's decay of the first moment.")
    adam_beta2: float = HfArg(default=0.999, help="AdamW's decay of the second moment.")
    adam_epsilon: float = HfArg(default=1e-8, help="AdamW's epsilon.")
    adafactor: bool = HfArg(default=False, help="Adafactor in place of AdamW.")
    max_grad_norm: float = HfArg(default=0.0, help="Clip gradients to this global norm; 0: off.")
    logging_steps: int = HfArg(default=500, help="Steps between two log lines.")
    save_steps: int = HfArg(default=500, help="Steps between two checkpoints.")
    save_total_limit: int = HfArg(default=2, help="Checkpoints to keep.")
    eval_steps: int | None = HfArg(default=None, help="Steps between two evaluations. Default: an epoch.")
    seed: int = HfArg(default=42, help="Of weights, masks, dropout and the order of the data.")
    distributed: bool = HfArg(default=False, help="One process of several: TPU pod, SLURM, Open MPI, JAX_PROCESS_ID.")
    push_to_hub: bool = HfArg(default=False, help="Upload output_dir at each save.")
    hub_model_id: str | None = HfArg(default=None, help="Repository to upload to. Default: output_dir's name.")
    hub_token: str | None = HfArg(default=None, help="Hub token for uploads. Default: token, else the login.", repr=False)


def require(condition, message: str, error=UsageError):
    if not condition:
        raise error(message)


def parse_args(argv: list[str] | None):
    """Command line, or one .json file of the same settings, to the three argument groups. Raises UsageError."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if len(argv) == 1 and argv[0].endswith(".json"):
        try:
            with open(argv[0], encoding="utf-8") as file:
                argv = [f"--{flag}={value}" for flag, value in json.load(file).items() if value is not None]
        except (OSError, ValueError, AttributeError) as error:
            raise UsageError(f"{argv[0]}: not a JSON object of settings: {error}") from error
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments), allow_abbrev=False)

    def fail(message):
        raise UsageError(message)

    parser.error = fail  # argparse prints the usage of sixty flags before its one line
    *groups, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    unknown = [argument.partition("=")[0] if argument.startswith("--") else "a value" for argument in unknown]
    require(not unknown, f"unrecognized arguments: {' '.join(unknown)}")
    check_args(*groups)
    return groups


def check_args(model_args, data_args, training_args):
    """Raises UsageError for numbers outside their range and for flags that exclude or need each other."""
    flags = {**vars(model_args), **vars(data_args), **vars(training_args)}
    for holds, meaning, names in (
        (lambda x: x >= 1, "at least 1", "per_device_train_batch_size per_device_eval_batch_size logging_steps save_steps "
         "eval_steps gradient_accumulation_steps save_total_limit max_train_samples max_eval_samples max_seq_length "
         "preprocessing_num_workers"),
        (lambda x: x >= 0, "at least 0", "warmup_steps"),
        (lambda x: 0 <= x < 2**32, "between 0 and 2**32 - 1", "seed"),
        (lambda x: x == -1 or x >= 1, "at least 1, or -1", "max_steps"),
        (lambda x: 0 <= x < math.inf, "a number of at least 0", "learning_rate weight_decay max_grad_norm"),
        (lambda x: 0 < x < math.inf, "a number above 0", "num_train_epochs adam_epsilon"),
        (lambda x: 0 <= x < 1, "at least 0 and below 1", "adam_beta1 adam_beta2"),
        (lambda x: 0 < x < 1, "between 0 and 1", "mlm_probability"),
        (lambda x: 0 <= x < 100, "between 0 and 99", "validation_split_percentage"),
    ):  # fmt: skip
        for name in names.split():
            require(flags[name] is None or holds(flags[name]), f"--{name} {flags[name]}: it must be {meaning}")
    files = [flag for flag in ("train_file", "validation_file") if flags[flag]]
    require(files or data_args.dataset_name, "no data: give --dataset_name or --train_file")
    require(not (files and data_args.dataset_name), f"two data sources: --dataset_name and --{files and files[0]}")
    only_eval = training_args.do_eval and not training_args.do_train
    require("validation_file" not in files or "train_file" in files or only_eval, "--validation_file needs --train_file")
    require(
        model_args.model_name_or_path or model_args.config_name or model_args.model_type or only_eval,
        "no model: give --model_name_or_path, --config_name or --model_type",
    )
    for split in ("train", "validation"):
        if flags[f"{split}_ref_file"]:
            require(data_args.line_by_line, f"--{split}_ref_file needs --line_by_line: its lines go with lines of text")
            require(flags[f"{split}_file"], f"--{split}_ref_file needs --{split}_file: its lines go with that file's")
    require(data_args.line_by_line or not data_args.pad_to_max_length, "--pad_to_max_length needs --line_by_line")
    require(
        model_args.use_fast_tokenizer or not data_args.whole_word_mask,
        "--whole_word_mask needs a fast tokenizer: it alone knows the words",
    )


# ---------------------------------------------------------------------------------------------------- objective


@dataclass
class FlaxDataCollatorForLanguageModeling:
    """BERT's masking, of a whole batch at once.

    Of the tokens that are not special each is predicted with probability `mlm_probability`, or each word if the batch
    has `continues_word`. 80% of the predicted tokens become the mask token, 10% a token drawn from the whole
    vocabulary, 10% stay. Each token takes one 64-bit draw, so that row r starts at draw r * max_length of `rng`, on
    whichever device or host it is.
    """

    tokenizer: transformers.PreTrainedTokenizerBase
    max_length: int
    mlm_probability: float = 0.15
    whole_words: bool = False

    def __post_init__(self):
        require(self.tokenizer.mask_token_id is not None, "the tokenizer has no mask token, which MLM needs", InputError)
        self.is_special = np.zeros(len(self.tokenizer), bool)
        self.is_special[self.tokenizer.all_special_ids] = True

    def num_slots(self, num_tokens: int) -> int:
        """How many of `num_tokens` tokens may be predicted: the mean and 4 standard deviations, a multiple of 16."""
        mean = num_tokens * self.mlm_probability
        deviation = math.sqrt(mean * (1 - self.mlm_probability)) * (3 if self.whole_words else 1)  # words of up to 9
        return min(num_tokens, 16 * math.ceil((mean + 4 * deviation) / 16))

    def __call__(self, examples: dict[str, np.ndarray], rng: np.random.Generator, group_size: int):
        """Masks `input_ids` [rows, length] int32 in place and adds `labels` [rows, length] int32, -100 if not predicted.

        Of each `group_size` rows, those of one forward pass on one device, at most `num_slots` tokens are predicted;
        the surplus, one batch in ten thousand, is left unmasked.
        """
        input_ids, continues_word = examples["input_ids"], examples.pop("continues_word", None)
        rows, length = input_ids.shape
        draws = rng.integers(2**64 - 1, size=(rows, self.max_length), dtype=np.uint64, endpoint=True)[:, :length]
        keys = draws
        if continues_word is not None:  # the key of a word is that of its first token; a row starts a word
            starts = np.where(continues_word, 0, np.arange(length))
            keys = np.take_along_axis(draws, np.maximum.accumulate(starts, axis=1), axis=1)
        predict = (keys < np.uint64(self.mlm_probability * 2**64)) & ~self.is_special[input_ids]

        grouped, slots = predict.reshape(-1, group_size * length), self.num_slots(group_size * length)
        for group in np.flatnonzero(grouped.sum(axis=1) > slots):
            group_keys = keys.reshape(grouped.shape)[group]
            grouped[group] &= group_keys < np.partition(group_keys[grouped[group]], slots)[slots]

        where = np.flatnonzero(predict)
        flat_ids, labels = input_ids.reshape(-1), np.full(rows * length, IGNORE, np.int32)
        labels[where] = flat_ids[where]
        low = draws[predict] % 2**32  # independent of the key, which its high bits decide
        first, last = int(0.8 * 2**32), int(0.9 * 2**32)
        random_ids = (low - first) * len(self.is_special) // (last - first)
        masked, random = low < first, (first <= low) & (low < last)
        flat_ids[where[masked]] = self.tokenizer.mask_token_id
        flat_ids[where[random]] = random_ids[random]
        return {**examples, "labels": labels.reshape(rows, length)}


def head_only_at(positions):
    """Interceptor (`flax.linen.intercept_methods`) that hands the head only some of the hidden states.

    Every masked-language model of Transformers is a base model that returns a tuple, hidden states [batch, length,
    width] first, and a head that works on each position by itself; the base model is replaced by [1, positions, width].
    """

    def interceptor(next_function, args, kwargs, context):
        outputs = next_function(*args, **kwargs)
        if len(context.module.path) == 1 and isinstance(outputs, tuple):
            hidden = outputs[0]
            return (hidden.reshape(-1, hidden.shape[-1]).at[positions].get(mode="clip")[None], *outputs[1:])
        return outputs

    return interceptor


def loss_sums(params, batch, model, num_slots, dropout_rng=None):
    """Cross-entropy of the predicted tokens, those with a label other than -100, in float32.

    `batch` has input_ids, attention_mask and labels, [batch, length] int32. The head, the larger part of a small model,
    runs on `num_slots(batch * length)` positions instead of all. Returns the loss summed over the predicted tokens, and
    the sums of loss, accuracy and tokens to take means of, all scalars.
    """
    labels = batch["labels"].reshape(-1)
    num_slots = num_slots(labels.size)
    (positions,) = jnp.nonzero(labels != IGNORE, size=num_slots, fill_value=labels.size)
    labels = labels.at[positions].get(mode="fill", fill_value=IGNORE)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    train = dropout_rng is not None
    with nn.intercept_methods(head_only_at(positions)):
        logits = model(**inputs, params=params, dropout_rng=dropout_rng, train=train, return_dict=False)[0]
    if logits.shape[:2] != (1, num_slots):  # a model of another anatomy ran its head on every position
        logits = logits.reshape(-1, logits.shape[-1]).at[positions].get(mode="clip")[None]
    logits, predicted = logits[0].astype(jnp.float32), labels != IGNORE
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(predicted, labels, 0))
    sums = {"loss": jnp.where(predicted, losses, 0).sum(), "predicted": predicted.sum().astype(jnp.float32)}
    if not train:
        sums["accuracy"] = (predicted & (logits.argmax(-1) == labels)).sum().astype(jnp.float32)
    return sums["loss"], sums


# --------------------------------------------------------------------------------------------------------- data


@dataclass
class Sequences:
    """Tokenized sequences, end to end in a memory-mapped file, so that a batch is one NumPy gather."""

    input_ids: np.ndarray  # [tokens] int32
    continues_word: np.ndarray | None  # [tokens] int8, 1 where a token goes on with the word of the one before
    offsets: np.ndarray  # [sequences + 1] int64, where each sequence starts
    max_length: int
    pad_token_id: int
    pad_to_multiple_of: int

    def __len__(self):
        return len(self.offsets) - 1

    def padded_length(self, rows: np.ndarray) -> int:
        longest = (self.offsets[rows + 1] - self.offsets[rows]).max()
        return min(self.max_length, math.ceil(longest / self.pad_to_multiple_of) * self.pad_to_multiple_of)

    def gather(self, rows: np.ndarray, length: int) -> dict[str, np.ndarray]:
        """input_ids and attention_mask, [rows, length] int32, and continues_word, [rows, length] int8, if there."""
        index = self.offsets[rows, None] + np.arange(length)
        inside = index < self.offsets[rows + 1, None]
        index = np.minimum(index, len(self.input_ids) - 1)
        columns = {
            "input_ids": np.where(inside, self.input_ids[index], np.int32(self.pad_token_id)),
            "attention_mask": inside.astype(np.int32),
        }
        if self.continues_word is not None:
            columns["continues_word"] = self.continues_word[index]
        return columns


def one_line(error: BaseException) -> str:
    """The first cause of an error, without line breaks."""
    while error.__cause__:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def read_source(source: str, path: str, model_args, **kwargs):
    """`datasets.load_dataset`, its many errors as an InputError that names the source."""
    if "trust_remote_code" in inspect.signature(datasets.load_dataset).parameters:  # until datasets 3
        kwargs["trust_remote_code"] = model_args.trust_remote_code
    try:
        return datasets.load_dataset(path, cache_dir=model_args.cache_dir, token=model_args.token, **kwargs)
    except Exception as error:  # each builder raises its own
        raise InputError(f"{source}: cannot be read: {one_line(error)}") from error


def read_file(flag: str, file: str | None, model_args):
    """The rows of one data file, None without a file."""
    if file is None:
        return None
    builders = {"txt": "text", "json": "json", "jsonl": "json", "csv": "csv", "parquet": "parquet"}
    extension = os.path.splitext(file)[1].lower().lstrip(".")
    require(extension in builders, f"--{flag} {file}: its extension must be one of {', '.join(builders)}", InputError)
    require(os.path.isfile(file), f"--{flag} {file}: no such file", InputError)
    require(os.path.getsize(file) > 0, f"--{flag} {file}: the file is empty", InputError)
    return read_source(f"--{flag} {file}", builders[extension], model_args, data_files=[file], split="train")


def text_column(dataset, wanted: str | None, source: str):
    """`dataset` with its text column alone, named "text"."""
    kinds = {name: str(getattr(feature, "dtype", feature)) for name, feature in dataset.features.items()}
    strings = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    name = wanted or ("text" if "text" in kinds else strings[0] if len(strings) == 1 else None)
    found = f"its columns are {', '.join(kinds)}"
    require(name, f"{source}: which column is the text? {found}; name it with --text_column_name", InputError)
    require(name in kinds, f"{source}: no column {name!r} (--text_column_name); {found}", InputError)
    require(name in strings, f"{source}: column {name!r} holds {kinds[name]}, not text", InputError)
    return dataset.select_columns([name]).rename_column(name, "text") if name != "text" else dataset.select_columns([name])


def split_lines(dataset, ref_file: str | None, data_args):
    """One row a line that is not blank, with the word references of `ref_file`, one JSON list a line, beside it."""
    lines = dataset.map(
        lambda batch: {"text": [line for text in batch["text"] for line in (text or "").split("\n") if line.strip()]},
        batched=True,
        num_proc=data_args.preprocessing_num_workers,
        load_from_cache_file=not data_args.overwrite_cache,
        desc="Splitting lines",
    )
    if ref_file is None:
        return lines
    try:
        with open(ref_file, encoding="utf-8") as file:
            refs = [[int(position) for position in json.loads(line)] for line in file if line.strip()]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{ref_file}: not a JSON list of token positions a line: {one_line(error)}") from error
    require(len(refs) == len(lines), f"{ref_file}: {len(refs)} lines for {len(lines)} lines of text", InputError)
    return lines.add_column("refs", refs)


def load_texts(model_args, data_args, do_train: bool, do_eval: bool):
    """The training and the evaluation texts, rows of "text", None for what is not there."""
    if data_args.dataset_name:
        source = f"--dataset_name {data_args.dataset_name}"
        splits = read_source(source, data_args.dataset_name, model_args, name=data_args.dataset_config_name)
        splits = {name: splits.get(name) for name in ("train", "validation")}
        require(splits["train"] is not None or not do_train, f"{source}: it has no train split", InputError)
    else:
        splits = {s: read_file(f"{s}_file", getattr(data_args, f"{s}_file"), model_args) for s in ("train", "validation")}
    for split, dataset in splits.items():
        if dataset is not None:
            source = data_args.dataset_name or getattr(data_args, f"{split}_file")
            splits[split] = text_column(dataset, data_args.text_column_name, f"{source} ({split})")
            if data_args.line_by_line:
                splits[split] = split_lines(splits[split], getattr(data_args, f"{split}_ref_file"), data_args)
    train, validation = splits["train"], splits["validation"]
    if validation is None and train is not None:
        count = len(train) * data_args.validation_split_percentage // 100
        if do_eval and not 0 < count < len(train):
            unit = "lines" if data_args.line_by_line else "texts"
            raise InputError(
                f"too little to evaluate on: --validation_split_percentage {data_args.validation_split_percentage} of "
                f"{len(train)} {unit} is {count}; give a larger part or --validation_file"
            )
        validation, train = train.select(range(count)), train.select(range(count, len(train)))
    require(validation is not None or not do_eval, "no evaluation data: give a validation or a train split", InputError)
    return (train if do_train else None), (validation if do_eval else None)


def encode(batch, tokenizer, max_length: int | None, whole_words: bool):
    """Texts to lists of token ids; with words or references, also to marks of the tokens that continue a word."""
    texts = [text for text in batch["text"] if text and not text.isspace()]
    if not texts:
        return {"input_ids": [], **({"continues_word": []} if whole_words or "refs" in batch else {})}
    encoded = tokenizer(
        texts, truncation=max_length is not None, max_length=max_length, return_attention_mask=False, verbose=False
    )
    columns = {"input_ids": encoded["input_ids"]}
    if whole_words or "refs" in batch:
        continues = [np.zeros(len(ids), np.int8) for ids in encoded["input_ids"]]
        for i in range(len(texts) if whole_words else 0):
            words = np.array([-1 if word is None else word for word in encoded.word_ids(i)])
            continues[i][1:] = (words[1:] == words[:-1]) & (words[1:] >= 0)
        for marks, positions in zip(continues, batch.get("refs", []), strict=False):
            marks[[position for position in positions if position < len(marks)]] = 1  # the rest was cut off
        columns["continues_word"] = continues
    return columns


def flat_column(dataset, name: str, directory: str) -> np.ndarray:
    """The values of a list column end to end, in an unnamed file: read from the page cache, not held in memory."""
    with tempfile.TemporaryFile(dir=directory) as file:
        for chunk in dataset.data.column(name).chunks:
            values = chunk.flatten().to_numpy()
            file.write(values)
        file.flush()
        return np.memmap(file, values.dtype, mode="r")


def tokenize(dataset, tokenizer, max_length: int, model_args, data_args, limit: int | None, what: str) -> Sequences:
    """Lines cut off at `max_length`, or blocks of `max_length` tokens out of all texts end to end."""
    whole_words = data_args.whole_word_mask or "refs" in dataset.column_names
    lists = {"input_ids": "int32", "continues_word": "int8"} if whole_words else {"input_ids": "int32"}
    encoded = dataset.map(
        partial(
            encode,
            tokenizer=tokenizer,
            max_length=max_length if data_args.line_by_line else None,
            whole_words=data_args.whole_word_mask,
        ),
        batched=True,
        remove_columns=dataset.column_names,
        features=datasets.Features({name: datasets.Sequence(datasets.Value(kind)) for name, kind in lists.items()}),
        num_proc=data_args.preprocessing_num_workers,
        load_from_cache_file=not data_args.overwrite_cache,
        desc=f"Tokenizing {what}",
    )
    require(len(encoded) > 0, f"the {what} data has no text: all of its {len(dataset)} rows are blank", InputError)
    directory = model_args.cache_dir or datasets.config.HF_DATASETS_CACHE
    columns = {name: flat_column(encoded, name, directory) for name in lists}
    num_tokens = len(columns["input_ids"])
    if data_args.line_by_line:
        lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in encoded.data.column("input_ids").chunks]
        offsets = np.concatenate([[0], *lengths]).cumsum()
    else:
        offsets = np.arange(0, num_tokens + 1, max_length)
    require(
        len(offsets) > 1, f"too little {what} data: {num_tokens} tokens do not fill one block of {max_length}", InputError
    )
    return Sequences(
        columns["input_ids"],
        columns.get("continues_word"),
        offsets[: limit + 1] if limit else offsets,
        max_length,
        pad_token_id=tokenizer.pad_token_id if data_args.line_by_line else 0,
        pad_to_multiple_of=16 if data_args.line_by_line and not data_args.pad_to_max_length else max_length,
    )


def make_batch(sequences, rows, collator, seed, first_row: int, shape: tuple[int, ...]):
    """This process's part of the global batch of `rows`: arrays [local devices, *shape, length] int32.

    Rows of -1 fill up a partial batch and have no labels. `first_row` is the place of rows[0] in the stream of draws
    that `seed` starts.
    """
    length = sequences.padded_length(rows)
    local = np.split(rows, jax.process_count())[jax.process_index()]
    first_row += jax.process_index() * len(local)
    rng = np.random.Generator(np.random.PCG64(seed).advance(first_row * collator.max_length))
    batch = collator(sequences.gather(np.maximum(local, 0), length), rng, group_size=shape[-1])
    batch["labels"][local < 0] = IGNORE
    return {name: array.reshape(jax.local_device_count(), *shape, length) for name, array in batch.items()}


def train_batches(sequences, collator, seed: int, steps: range, shape: tuple[int, int]) -> Iterator[dict]:
    """The batches of `steps`, each a function of the seed and its number; an epoch is a permutation of all rows."""
    batch_size = jax.device_count() * math.prod(shape)
    steps_per_epoch, current_epoch = len(sequences) // batch_size, None
    for step in steps:
        epoch, index = divmod(step, steps_per_epoch)
        if epoch != current_epoch:
            order, current_epoch = np.random.default_rng((seed, 0, epoch)).permutation(len(sequences)), epoch
        rows = order[index * batch_size : (index + 1) * batch_size]
        yield make_batch(sequences, rows, collator, (seed, 1, step), 0, shape)


def eval_batches(sequences, collator, seed: int, per_device_batch_size: int) -> Iterator[dict]:
    """Every row once, masked alike in every evaluation and on any number of devices."""
    batch_size = jax.device_count() * per_device_batch_size
    for start in range(0, len(sequences), batch_size):
        rows = np.arange(start, start + batch_size)
        rows[rows >= len(sequences)] = -1
        yield make_batch(sequences, rows, collator, (seed, 2), start, (per_device_batch_size,))


def prefetch(items: Iterator, size: int = 2) -> Iterator:
    """`items`, made in a background thread up to `size` ahead of their use."""
    with ThreadPoolExecutor(1) as pool:
        pending = deque(pool.submit(next, items, None) for _ in range(size))
        while (item := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, items, None))
            yield item


# ---------------------------------------------------------------------------------------------- model, optimizer


def from_hub(loader, flag: str, name: str, model_args, **kwargs):
    """`loader(name)`, its errors as an InputError that names the flag."""
    access = {name: getattr(model_args, name) for name in ("cache_dir", "token", "trust_remote_code")}
    try:
        return loader(name, **access, **kwargs)
    except Exception as error:  # each library raises its own
        raise InputError(f"{flag} {name}: cannot be loaded: {one_line(error)}") from error


def load_config_and_tokenizer(model_args):
    """The configuration, of a masked-language model and large enough for the tokenizer, and the tokenizer."""
    families = {config.model_type for config in FLAX_MODEL_FOR_MASKED_LM_MAPPING}
    known = f"known are {', '.join(sorted(families))}"
    model_type = model_args.model_type
    require(model_type is None or model_type in families, f"--model_type {model_type}: no masked-language model; {known}")
    flag = "--config_name" if model_args.config_name else "--model_name_or_path"
    name = model_args.config_name or model_args.model_name_or_path
    config = from_hub(AutoConfig.from_pretrained, flag, name, model_args) if name else CONFIG_MAPPING[model_type]()
    found = config.model_type
    require(model_type in (None, found), f"--model_type {model_type}: {flag} {name} is of type {found}")
    require(found in families, f"{flag} {name}: type {found} has no masked-language model; {known}", InputError)

    flag = "--tokenizer_name" if model_args.tokenizer_name else "--model_name_or_path"
    name = model_args.tokenizer_name or model_args.model_name_or_path
    require(name, "no tokenizer: give --tokenizer_name or --model_name_or_path")
    tokenizer = from_hub(AutoTokenizer.from_pretrained, flag, name, model_args, use_fast=model_args.use_fast_tokenizer)
    if len(tokenizer) > config.vocab_size:  # JAX would clamp the ids beyond the table without a word
        message = f"{flag} {name} has {len(tokenizer)} tokens, the model's table {config.vocab_size}"
        require(model_args.model_name_or_path is None, f"{message}: they do not belong together", InputError)
        logger.warning(f"{message}: the table is made larger.")
        config.vocab_size = len(tokenizer)
    return config, tokenizer


def sequence_length(wanted: int | None, config, tokenizer) -> int:
    """`wanted` if the model has that many positions, else the smaller of the tokenizer's and the model's limit."""
    positions = config.max_position_embeddings
    if config.model_type in ("roberta", "roberta-prelayernorm", "xlm-roberta"):  # their positions start after the pad id
        positions -= config.pad_token_id + 1
    require((wanted or 0) <= positions, f"--max_seq_length {wanted}: the model has {positions} positions")
    return wanted or min(tokenizer.model_max_length, positions)


def load_model(model_args, config, seed: int):
    """The Flax model without parameters, and its parameters, float32: pretrained, or initialized in one program."""
    dtype = getattr(jnp, model_args.dtype)
    if model_args.model_name_or_path is None:
        model, params = FlaxAutoModelForMaskedLM.from_config(config, dtype=dtype, seed=seed, _do_init=False), {}
    else:
        model, params = from_hub(
            FlaxAutoModelForMaskedLM.from_pretrained, "--model_name_or_path", model_args.model_name_or_path, model_args,
            config=config, dtype=dtype, _do_init=False,
        )  # fmt: skip
    params = flatten_dict(params)
    missing = model.required_params - set(params)
    if missing:
        if params:
            logger.warning(f"Not in the pretrained model, so initialized: {sorted('.'.join(name) for name in missing)}.")
        init = flatten_dict(jax.jit(model.init_weights, static_argnums=1)(jax.random.PRNGKey(seed), model.input_shape))
        params.update({name: init[name] for name in missing})
    return model, unflatten_dict({name: np.asarray(value, np.float32) for name, value in params.items()})


def make_schedule(training_args, num_steps: int):
    """Step to learning rate: linear warm-up to the peak, then the schedule, to zero at `num_steps`."""
    peak, warmup = training_args.learning_rate, training_args.warmup_steps
    decay_steps = max(1, num_steps - warmup)
    after = {
        "linear": optax.linear_schedule(peak, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps),
        "constant": optax.constant_schedule(peak),
        "inverse_sqrt": lambda step: peak * jnp.sqrt(max(1, warmup) / (step + max(1, warmup))),
    }[training_args.lr_scheduler_type]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after


def make_optimizer(training_args, schedule):
    """AdamW, or Adafactor; weight decay on matrices that are not biases, in both at the pace of the learning rate."""

    def decayed(params):
        flat = flatten_dict(params)
        return unflatten_dict({name: x.ndim > 1 and not name[-1].endswith("bias") for name, x in flat.items()})

    decay = training_args.weight_decay
    if training_args.adafactor:
        decay_rate = (lambda step: decay * schedule(step)) if decay else None
        optimizer = optax.adafactor(schedule, weight_decay_rate=decay_rate, weight_decay_mask=decayed)
    else:
        betas = {"b1": training_args.adam_beta1, "b2": training_args.adam_beta2}
        optimizer = optax.adamw(schedule, **betas, eps=training_args.adam_epsilon, weight_decay=decay, mask=decayed)
    if training_args.max_grad_norm > 0:
        return optax.chain(optax.clip_by_global_norm(training_args.max_grad_norm), optimizer)
    return optimizer


def train_step(state, totals, batch, model, num_slots, schedule, seed):
    """One optimizer step on one device of the pmap axis "batch".

    `batch` leaves are [accumulation, batch, length] int32. Gradients of the summed loss are summed over micro-batches
    and devices, then divided once by the predicted tokens of them all. `totals` are sums since the last log line.
    """
    rng = jax.random.fold_in(jax.random.key(seed, impl=DROPOUT_PRNG), state.step)
    rng = jax.random.fold_in(rng, jax.lax.axis_index("batch"))
    grad_fn = jax.grad(loss_sums, has_aux=True)

    def micro_step(carry, inputs):
        micro_batch, index = inputs
        step = grad_fn(state.params, micro_batch, model, num_slots, jax.random.fold_in(rng, index))
        return jax.tree.map(jnp.add, carry, step), None

    zeros = jax.tree.map(jnp.zeros_like, (state.params, {"loss": jnp.float32(0), "predicted": jnp.float32(0)}))
    indices = jnp.arange(batch["labels"].shape[0])
    (grads, sums), _ = jax.lax.scan(micro_step, zeros, (batch, indices))
    grads, sums = jax.lax.psum((grads, sums), "batch")
    grads = jax.tree.map(lambda grad: grad / jnp.maximum(sums["predicted"], 1), grads)
    sums["tokens"] = jax.lax.psum(batch["attention_mask"].sum().astype(jnp.float32), "batch")
    sums["grad_norm"] = optax.global_norm(grads)
    totals = {name: value + sums[name] for name, value in totals.items() if name in sums}
    return state.apply_gradients(grads=grads), {**totals, "learning_rate": schedule(state.step)}


def eval_step(params, batch, model, num_slots):
    """Sums of loss, accuracy and predicted tokens over all devices; `batch` leaves are [batch, length] int32."""
    return jax.lax.psum(loss_sums(params, batch, model, num_slots)[1], "batch")


def evaluate(p_eval_step, params, batches, stopping) -> dict[str, float] | None:
    """Mean loss and accuracy over all predicted tokens, and perplexity; None if `stopping` turned true."""
    sums = []
    for batch in prefetch(map(shard, batches)):
        sums.append(p_eval_step(params, batch))
        if stopping():
            return None
    sums = [jax.tree.map(lambda x: np.float64(local_value(x)), s) for s in sums]
    total = {name: sum(s[name] for s in sums) for name in sums[0]}
    loss = total["loss"] / max(total["predicted"], 1)
    accuracy = total["accuracy"] / max(total["predicted"], 1)
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"eval_loss": loss, "eval_accuracy": accuracy, "eval_perplexity": perplexity}


# ----------------------------------------------------------------------------------------------------- plumbing


def shard(tree):
    """Arrays [local devices, ...] onto the local devices, placed as pmap over "batch" places its own output.

    On a mesh with another axis name, as `flax.jax_utils` makes, pmap of jax 0.8 and later would compile anew when its
    own output comes back.
    """
    sharding = NamedSharding(Mesh(np.array(jax.local_devices()), ("batch",)), PartitionSpec("batch"))
    return jax.device_put(tree, sharding)


def replicate(tree):
    return shard(jax.tree.map(lambda x: np.broadcast_to(x, (jax.local_device_count(), *np.shape(x))), tree))


def local_value(x) -> np.ndarray:
    """The first local device's value of a replicated array, without a program to slice it."""
    return np.asarray(x.addressable_shards[0].data)[0]


def to_host(state) -> dict[str, np.ndarray]:
    """A copy of a replicated `TrainState`, as a flat dict; all transfers run at once."""
    flat = flatten_dict(serialization.to_state_dict(state), sep="/")
    for x in flat.values():
        x.addressable_shards[0].data.copy_to_host_async()
    return {name: np.array(local_value(x)) for name, x in flat.items()}


class StopSignals:
    """Notes SIGTERM and Ctrl-C, for the loop to finish its step and save; the second one ends the process."""

    def __init__(self):
        self.number, self.vote = 0, None
        self.p_max = jax.pmap(lambda number: jax.lax.pmax(number, "batch"), "batch")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number, frame):
        self.number = number
        signal.signal(number, signal.SIG_DFL)

    def agreed(self) -> int:
        """The signal to stop for after this step, or 0: of several processes, what any of them knew a step ago."""
        if jax.process_count() == 1:
            return self.number
        last, self.vote = self.vote, self.p_max(np.full(jax.local_device_count(), self.number, np.int32))
        return 0 if last is None else int(local_value(last))


class TrainingLog:
    """Log lines and TensorBoard scalars; values are fetched a step late, when the device already has the next one."""

    def __init__(self, writer, first_step: int):
        self.writer, self.step, self.pending, self.results = writer, first_step, None, {}
        self.start = self.last = time.perf_counter()

    def scalars(self, values: dict[str, float], step: int):
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()

    def flush(self):
        if self.pending is None:
            return
        (step, totals), self.pending = self.pending, None
        totals = finite(totals, step)
        now = time.perf_counter()
        self.results = {
            "train_loss": totals["loss"] / max(totals["predicted"], 1),
            "train_learning_rate": totals["learning_rate"],
            "train_time": now - self.start,
            "train_tokens_per_second": totals["tokens"] / (now - self.last),
        }
        self.last, self.step = now, step
        self.scalars(self.results, step)
        logger.info(
            "Step {}: loss {train_loss:.4f}, learning rate {train_learning_rate:.3g}, {train_tokens_per_second:,.0f} "
            "tokens/s".format(step, **self.results)
        )


def finite(totals, step: int) -> dict[str, float]:
    """The values of `totals` on the host. Raises InputError if loss or gradients stopped being finite."""
    values = {name: float(local_value(x)) for name, x in totals.items()}
    if not all(map(math.isfinite, values.values())):
        raise InputError(
            f"by step {step} the loss or a gradient is not finite: training stops, the last checkpoint is from before; "
            "a lower --learning_rate, more --warmup_steps, --max_grad_norm=1 or --dtype=float32 may help"
        )
    return values


def write_file(path: str, content: str):
    """Writes beside `path`, then renames: the file is there whole or not at all."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(content)
    os.replace(f"{path}.tmp", path)


def write_results(output_dir: str, split: str, results: dict):
    """SPLIT_results.json, and the same values into all_results.json."""
    path = os.path.join(output_dir, "all_results.json")
    everything = json.loads(open(path).read()) if os.path.exists(path) else {}
    write_file(os.path.join(output_dir, f"{split}_results.json"), json.dumps(results, indent=2, sort_keys=True) + "\n")
    write_file(path, json.dumps({**everything, **results}, indent=2, sort_keys=True) + "\n")


def to_pytorch(params) -> dict[str, np.ndarray]:
    """Flax parameters under the names and in the layout of Transformers' PyTorch classes."""
    names = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    return {
        ".".join((*name[:-1], names.get(name[-1], name[-1]))): np.ascontiguousarray(x.T if name[-1] == "kernel" else x)
        for name, x in flatten_dict(params).items()
    }


def export_model(model, params, tokenizer, output_dir: str):
    """config.json, tokenizer files, flax_model.msgpack and model.safetensors, each written aside and renamed."""
    aside = os.path.join(output_dir, ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside, params=params)
    tokenizer.save_pretrained(aside)
    save_file(to_pytorch(params), os.path.join(aside, "model.safetensors"), metadata={"format": "pt"})
    for name in os.listdir(aside):
        os.replace(os.path.join(aside, name), os.path.join(output_dir, name))
    os.rmdir(aside)


def open_checkpoints(directory: str, keep: int | None = None, read_only: bool = False):
    return ocp.CheckpointManager(
        os.path.abspath(directory),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=False,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=False,  # the whole save runs in a thread already
            multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}),
        ),
    )


def checkpoint_steps(directory: str) -> list[int]:
    return sorted(int(name) for name in os.listdir(directory) if name.isdigit()) if os.path.isdir(directory) else []


def check_output_dir(training_args) -> tuple[str, list[int]] | None:
    """The folder and steps of the checkpoints to resume from, if any. Raises InputError where none can be written."""
    output_dir, wanted = training_args.output_dir, training_args.resume_from_checkpoint
    own = os.path.join(output_dir, "checkpoints")
    require(not os.path.exists(output_dir) or os.path.isdir(output_dir), f"--output_dir {output_dir}: it is a file", InputError)
    ancestor = os.path.abspath(output_dir)
    while not os.path.exists(ancestor):
        ancestor = os.path.dirname(ancestor)
    require(os.access(ancestor, os.W_OK | os.X_OK), f"--output_dir {output_dir}: {ancestor} is not writable", InputError)
    if wanted is None:
        strange = os.path.isdir(output_dir) and os.listdir(output_dir) and not os.path.isdir(own)
        message = f"--output_dir {output_dir}: it is not empty and has no checkpoints; another one, or --overwrite_output_dir?"
        require(training_args.overwrite_output_dir or not strange, message, InputError)
        steps = [] if training_args.overwrite_output_dir else checkpoint_steps(own)
        return (own, steps) if steps else None
    directory = own if wanted == "newest" else os.path.abspath(wanted)
    if os.path.basename(directory).isdigit():
        directory, steps = os.path.split(directory)[0], [int(os.path.basename(directory))]
        steps = [step for step in steps if step in checkpoint_steps(directory)]
    else:
        inside = os.path.join(directory, "checkpoints")
        directory = inside if os.path.isdir(inside) else directory
        steps = checkpoint_steps(directory)
    require(steps, f"--resume_from_checkpoint {wanted}: no checkpoint in {directory}", InputError)
    return directory, steps


def restore(directory: str, steps: list[int], state, run: dict):
    """The newest readable of the checkpoints, as a state like `state` on the host. Raises InputError if it is another
    run's: another model, optimizer or batch size."""
    # Orbax (seen with 0.12.8) leaves reads pending when one fails, and each then prints a traceback of its own.
    excepthook = sys.excepthook
    sys.excepthook = lambda *error: None if "Event loop is closed" in str(error[1]) else excepthook(*error)
    items = ocp.args.Composite(state=ocp.args.StandardRestore(), run=ocp.args.JsonRestore())
    manager = open_checkpoints(directory, read_only=True)
    for step in sorted(steps, reverse=True):
        try:
            restored = manager.restore(step, args=items)
            break
        except Exception as error:  # whatever a damaged file makes of it
            logger.warning(f"{directory}/{step} is skipped, it cannot be read: {one_line(error)}")
    else:
        raise InputError(f"{directory}: no checkpoint can be read; --overwrite_output_dir starts over")
    source, found = f"{directory}/{step}", restored["run"]
    for name in ("optimizer", "batch_size"):
        require(found[name] == run[name], f"{source}: its {name} is {found[name]}, this run's {run[name]}", InputError)
    shapes = {name: x.shape for name, x in flatten_dict(serialization.to_state_dict(state), sep="/").items()}
    config = [key for key in run["config"].keys() & found["config"].keys() if run["config"][key] != found["config"][key]]
    same = not config and shapes == {name: x.shape for name, x in restored["state"].items()}
    require(same, f"{source}: it is of another model{config and f', with another {config[0]}' or ''}", InputError)
    for name in ("seed", "sequences", "max_length"):
        if found[name] != run[name]:
            logger.warning(f"{source} was trained with another {name}: {found[name]}, now {run[name]}.")
    return serialization.from_state_dict(state, unflatten_dict(restored["state"], sep="/")), step


class Saver:
    """Process 0's writer: checkpoint, exported model and upload follow a save in the background, in this order."""

    def __init__(self, model, tokenizer, training_args, run: dict, hub=None):
        self.model, self.tokenizer, self.training_args, self.run, self.hub = model, tokenizer, training_args, run, hub
        self.output_dir = training_args.output_dir
        self.directory = os.path.join(self.output_dir, "checkpoints")
        self.pool, self.saving, self.uploading, self.manager = ThreadPoolExecutor(1), None, None, None

    def start(self, step: int, resumed: bool):
        """Makes the folders; discards checkpoints of what is not this run's past."""
        if self.training_args.overwrite_output_dir and not resumed and os.path.isdir(self.directory):
            discarded = tempfile.mkdtemp(prefix=".tmp", dir=self.output_dir)
            os.rename(self.directory, os.path.join(discarded, "checkpoints"))  # at once, not file by file
            shutil.rmtree(discarded)
        os.makedirs(self.directory, exist_ok=True)
        self.manager = open_checkpoints(self.directory, self.training_args.save_total_limit)
        for later in [s for s in self.manager.all_steps() if s > step]:
            self.manager.delete(later)

    def save(self, state, step: int):
        """Returns once `state` is copied from the device, or once the save before is written."""
        host = to_host(state)
        self.wait()
        self.saving = self.pool.submit(self.write, host, step)

    def write(self, host: dict[str, np.ndarray], step: int):
        if step not in self.manager.all_steps():
            items = {"state": ocp.args.StandardSave(host), "run": ocp.args.JsonSave({**self.run, "step": step})}
            self.manager.save(step, args=ocp.args.Composite(**items))
        params = {name.removeprefix("params/"): x for name, x in host.items() if name.startswith("params/")}
        export_model(self.model, unflatten_dict(params, sep="/"), self.tokenizer, self.output_dir)
        if self.hub:
            self.upload(step)

    def wait(self):
        """Waits for the save under way. Raises InputError if it failed."""
        try:
            if self.saving:
                self.saving.result()
        except Exception as error:  # of Orbax, safetensors or the system, as where the disk is full
            raise InputError(f"{self.output_dir}: a save failed, the one before is kept: {one_line(error)}") from error

    def upload(self, step: int):
        if self.uploading and not self.uploading.done():
            return logger.warning(f"Step {step} is not uploaded: the upload before is still under way.")
        if self.uploading and self.uploading.exception():
            logger.warning(f"An upload failed, this one repairs it: {one_line(self.uploading.exception())}")
        self.uploading = self.hub(f"Step {step}", run_as_future=True)
        return None


def connect_hub(model_args, training_args):
    """Creates the repository; returns a function that uploads output_dir. Raises InputError."""
    api = huggingface_hub.HfApi(token=training_args.hub_token or model_args.token)
    name = training_args.hub_model_id or os.path.basename(os.path.abspath(training_args.output_dir))
    try:
        repo_id = api.create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # of the network, of the server, of a bad name
        raise InputError(f"--push_to_hub: cannot create {name}: {one_line(error)}") from error

    def upload(message: str, run_as_future: bool = False):
        ignore = ["checkpoints/**", ".tmp*/**", "*.tmp"] + (["events.*"] if run_as_future else [])  # events still grow
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=training_args.output_dir,
            commit_message=message,
            ignore_patterns=ignore,
            run_as_future=run_as_future,
        )

    return upload


def model_card(script: str, model, results: dict[str, float]) -> str:
    lines = "\n".join(f"| {name} | {value:.4f} |" for name, value in results.items())
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
tags: [flax, jax, {model.config.model_type}, masked-lm]
---

# {model.config.architectures[0]}

Trained with {script}. `flax_model.msgpack` is for Transformers' Flax classes, `model.safetensors` for PyTorch.

| result | value |
|---|---|
{lines}
"""


def set_up(model_args, training_args):
    """Logging, the process's part in a cluster, and a cache that makes a second start fast."""
    if training_args.distributed:
        numbers = {"num_processes": os.environ.get("JAX_NUM_PROCESSES"), "process_id": os.environ.get("JAX_PROCESS_ID")}
        jax.distributed.initialize(**{name: int(value) for name, value in numbers.items() if value is not None})
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        level=logging.INFO if jax.process_index() == 0 else logging.ERROR,
        force=True,
    )
    for library in ("absl", "jax", "orbax", "httpx", "tensorboard"):
        logging.getLogger(library).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if jax.config.jax_compilation_cache_dir is None:
        home = model_args.cache_dir or huggingface_hub.constants.HF_HOME
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "jax-compilation-cache"))


def main(argv: list[str] | None = None) -> int:
    model_args, data_args, training_args = parse_args(argv)
    do_train = training_args.do_train or not training_args.do_eval
    do_eval = training_args.do_eval or not training_args.do_train
    set_up(model_args, training_args)
    is_writer, output_dir = jax.process_index() == 0, training_args.output_dir
    resume = check_output_dir(training_args) if do_train and is_writer else None
    hub = connect_hub(model_args, training_args) if training_args.push_to_hub and is_writer else None

    # Data
    config, tokenizer = load_config_and_tokenizer(model_args)
    max_length = sequence_length(data_args.max_seq_length, config, tokenizer)
    collator = FlaxDataCollatorForLanguageModeling(
        tokenizer, max_length, data_args.mlm_probability, data_args.whole_word_mask or bool(data_args.train_ref_file)
    )
    train_texts, eval_texts = load_texts(model_args, data_args, do_train, do_eval)
    read = partial(tokenize, tokenizer=tokenizer, max_length=max_length, model_args=model_args, data_args=data_args)
    train_set = read(train_texts, limit=data_args.max_train_samples, what="training") if do_train else None
    eval_set = read(eval_texts, limit=data_args.max_eval_samples, what="evaluation") if do_eval else None

    # Steps
    shape = (training_args.gradient_accumulation_steps, training_args.per_device_train_batch_size)
    batch_size, steps_per_epoch, num_steps = jax.device_count() * math.prod(shape), 0, 0
    if do_train:
        steps_per_epoch = len(train_set) // batch_size
        message = f"too little training data: {len(train_set)} sequences of {max_length} tokens, a batch takes {batch_size}"
        require(steps_per_epoch > 0, message, InputError)
        num_steps = math.ceil(training_args.num_train_epochs * steps_per_epoch)
        num_steps = training_args.max_steps if training_args.max_steps > 0 else num_steps
    schedule = make_schedule(training_args, num_steps)
    if do_train and training_args.warmup_steps >= num_steps:
        logger.warning(f"--warmup_steps {training_args.warmup_steps}: it has not ended after all {num_steps} steps.")

    # Model
    model, params = load_model(model_args, config, training_args.seed)
    if training_args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    tx = make_optimizer(training_args, schedule)
    state = jax.jit(lambda params: TrainState.create(apply_fn=model.module.apply, params=params, tx=tx))(params)
    run = {
        "optimizer": "adafactor" if training_args.adafactor else "adamw",
        "batch_size": batch_size,
        "config": json.loads(config.to_json_string(use_diff=False)),
        "seed": training_args.seed,
        "sequences": len(train_set) if do_train else 0,
        "max_length": max_length,
    }
    step = 0
    if resume:
        state, step = restore(*resume, jax.device_get(state), run)
    if jax.process_count() > 1:
        state, step = multihost_utils.broadcast_one_to_all((jax.device_get(state), step))
    state = replicate(state)
    p_eval_step = jax.pmap(partial(eval_step, model=model, num_slots=collator.num_slots), "batch")

    def run_evaluation(stopping):
        batches = eval_batches(eval_set, collator, training_args.seed, training_args.per_device_eval_batch_size)
        return evaluate(p_eval_step, state.params, batches, stopping)

    saver = Saver(model, tokenizer, training_args, run, hub) if is_writer else None
    writer = Writer(output_dir) if is_writer else None
    log = TrainingLog(writer, step)
    stop = StopSignals()
    if do_train:
        if saver:
            saver.start(step, bool(resume))
        num_params = sum(x.size for x in jax.tree.leaves(params))
        logger.info(
            f"Training a {config.model_type} of {num_params:,} parameters from step {step} to {num_steps}, "
            f"{num_steps / steps_per_epoch:.2f} epochs of {len(train_set):,} sequences of {max_length} tokens; a step takes "
            f"{jax.device_count()} devices x {shape[0]} x {shape[1]} = {batch_size} sequences."
        )
        fixed = {"model": model, "num_slots": collator.num_slots, "schedule": schedule, "seed": training_args.seed}
        p_train_step = jax.pmap(partial(train_step, **fixed), "batch", donate_argnums=(0,))
        names = ("loss", "predicted", "tokens", "grad_norm", "learning_rate")
        no_totals = totals = replicate({name: np.float32(0) for name in names})
        batches = train_batches(train_set, collator, training_args.seed, range(step, num_steps), shape)
        eval_steps = training_args.eval_steps or steps_per_epoch
        for step, batch in enumerate(prefetch(map(shard, batches)), start=step + 1):
            state, totals = p_train_step(state, totals, batch)
            log.flush()
            last, stopping = step == num_steps, stop.agreed()
            if step % training_args.logging_steps == 0 or last or stopping:
                log.pending, totals = (step, totals), no_totals
            if step % training_args.save_steps == 0 or last or stopping:
                finite(totals, step)
                if saver:
                    saver.save(state, step)
            if stopping:
                break
            if do_eval and not last and step % eval_steps == 0:
                results = run_evaluation(lambda: stop.number and jax.process_count() == 1)
                if results:
                    log.scalars(results, step)
                    logger.info(f"Step {step}: {results}")
        log.flush()
        saver.wait()
        write_results(output_dir, "train", log.results)
    if do_eval and not stop.number:
        results = run_evaluation(lambda: stop.number)
        log.scalars(results, step)
        write_results(output_dir, "eval", results)
        logger.info(f"{results}")
    if hub:
        hub("End of training")
    return 128 + stop.number if stop.number else 0


def cli(argv=None) -> int:
    try:
        return main(argv)
    except InputError as error:
        print(f"{os.path.basename(__file__)}: error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(cli())
