#!/usr/bin/env python
"""Masked language modeling (BERT, RoBERTa, ALBERT, ELECTRA, ...) with JAX/Flax over a streamed dataset of any size.
The objective is BERT's (Devlin et al., 2018, https://arxiv.org/abs/1810.04805); of the texts nothing is stored.

    python run_mlm_flax_stream.py --output_dir=out --config_name=roberta --tokenizer_name=roberta --dataset_name=corpus
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["datasets>=3.6,<6", "flax>=0.10.7,<0.13", "huggingface_hub>=0.34,<1", "jax>=0.6.2,<0.13",
#     "numpy>=2,<3", "optax>=0.2.5,<0.3", "orbax-checkpoint>=0.11.16,<0.13", "safetensors>=0.5,<1",
#     "tensorboard>=2.19,<3", "transformers>=4.57.1,<5"]
# ///

import json
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Literal

import datasets
import flax.linen as nn
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import transformers
from datasets.distributed import split_dataset_by_node
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from safetensors.numpy import save_file
from tensorboard.summary import Writer
from transformers import AutoConfig, AutoTokenizer, FlaxAutoModelForMaskedLM, HfArgumentParser
from transformers.hf_argparser import HfArg

logger = logging.getLogger(__name__)
DROPOUT_PRNG = "rbg"  # the fast generator of jax.random; its bits depend on the key and the kind of device alone
NOT_OF_A_STREAM = {"--line_by_line", "--pad_to_max_length", "--train_ref_file", "--validation_ref_file",
    "--whole_word_mask", "--num_train_epochs", "--validation_split_percentage"}
IGNORE = -100  # the label of a token that is not predicted
CheckpointOptions = partial(ocp.CheckpointManagerOptions, create=False, enable_async_checkpointing=False,
    multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}))

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
class ModelArguments:
    _argument_group_name = "model"
    model_name_or_path: str | None = HfArg(default=None, help="Hub id or folder of a model to go on from.")
    model_type: str | None = HfArg(default=None, help="Family of a model to train from scratch.")
    config_name: str | None = HfArg(default=None, help="Hub id or folder of a config, if not the model's.")
    tokenizer_name: str | None = HfArg(default=None, help="Hub id or folder of a tokenizer, if not the model's.")
    cache_dir: str | None = HfArg(default=None, help="Folder for downloads, tokenized data and compiled programs.")
    token: str | None = HfArg(default=None, help="Hub token for private models and datasets.", repr=False)
    use_fast_tokenizer: bool = HfArg(default=True, help="Tokenizer of the tokenizers library; with no_: in Python.")
    dtype: Literal["float32", "float16", "bfloat16"] = HfArg(default="float32", help="Activations; weights: float32.")
    trust_remote_code: bool = HfArg(default=False, help="Run code that comes with a model or dataset.")

@dataclass
class DataTrainingArguments:
    _argument_group_name = "data"
    dataset_name: str | None = HfArg(default=None, help="Hub id of a dataset, or a folder of data files.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of the dataset.")
    train_file: str | None = HfArg(default=None, help="Training text: .txt, .json, .jsonl, .csv or .parquet.")
    validation_file: str | None = HfArg(default=None, help="Evaluation text, in one of the same formats.")
    text_column_name: str = HfArg(default="text", help="If there is no column text: the only string column.")
    num_eval_samples: int = HfArg(default=50000, help="Held out of train, its first blocks; or of validation data.")
    shuffle_buffer_size: int = HfArg(default=10000, help="Blocks that are shuffled at a time; at least a batch.")
    max_seq_length: int | None = HfArg(default=None, help="Sequence length. Default: what tokenizer and model allow.")
    mlm_probability: float = HfArg(default=0.15, help="Part of the tokens to predict.")
    max_train_samples: int | None = HfArg(default=None, help="An epoch ends after so many blocks.")
    max_eval_samples: int | None = HfArg(default=None, help="Evaluate on at most so many blocks.")
    preprocessing_num_workers: int | None = HfArg(default=None, help="Threads that tokenize. Default: one a core.")
    overwrite_cache: bool = HfArg(default=False, help="No effect: a stream is always tokenized anew.")

@dataclass
class TrainingArguments:
    _argument_group_name = "training"
    output_dir: str = HfArg(help="Where the model, its checkpoints and logs are written.")
    overwrite_output_dir: bool = HfArg(default=False, help="Start over: discard the checkpoints in output_dir.")
    resume_from_checkpoint: str | None = HfArg(default=None, metadata={"nargs": "?", "const": ""}, help="Checkpoint.")
    do_train: bool = HfArg(default=False, help="Train; alone: without evaluation. With neither of the two: both.")
    do_eval: bool = HfArg(default=False, help="Evaluate; alone: a trained model.")
    per_device_train_batch_size: int = HfArg(default=8, help="Sequences per device and forward pass.")
    per_device_eval_batch_size: int = HfArg(default=8, help="The same in evaluation.")
    gradient_accumulation_steps: int = HfArg(default=1, help="Forward passes per optimizer step.")
    gradient_checkpointing: bool = HfArg(default=False, help="Recompute activations: less memory, more time.")
    num_train_steps: int = HfArg(default=50000, help="Optimizer steps.")
    max_steps: int = HfArg(default=-1, help="If positive: optimizer steps, in place of num_train_steps.")
    learning_rate: float = HfArg(default=5e-5, help="Peak learning rate.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "inverse_sqrt"] = HfArg(default="linear", help="Decay.")
    warmup_steps: int = HfArg(default=0, help="Steps of linear warm-up.")
    weight_decay: float = HfArg(default=0.0, help="Decay of the weights; biases and LayerNorm scales have none.")
    adam_beta1: float = HfArg(default=0.9, help="AdamW's decay of the first moment.")
    adam_beta2: float = HfArg(default=0.999, help="AdamW's decay of the second moment.")
    adam_epsilon: float = HfArg(default=1e-8, help="AdamW's epsilon.")
    adafactor: bool = HfArg(default=False, help="Adafactor in place of AdamW.")
    max_grad_norm: float = HfArg(default=0.0, help="Clip gradients to this global norm; 0: off.")
    logging_steps: int = HfArg(default=500, help="Steps between two log lines.")
    save_steps: int = HfArg(default=500, help="Steps between two checkpoints.")
    save_total_limit: int = HfArg(default=2, help="Checkpoints to keep.")
    eval_steps: int | None = HfArg(default=None, help="Steps between two evaluations. Default: at the end.")
    seed: int = HfArg(default=42, help="Of weights, masks, dropout and the order of the data.")
    distributed: bool = HfArg(default=False, help="One process of several: TPU pod, SLURM, Open MPI, JAX_PROCESS_ID.")
    push_to_hub: bool = HfArg(default=False, help="Upload output_dir at each save.")
    hub_model_id: str | None = HfArg(default=None, help="Repository to upload to. Default: output_dir's name.")
    hub_token: str | None = HfArg(default=None, help="Hub token for uploads. Default: token, or login.", repr=False)

def parse_args(argv: list[str]):
    """All settings, from the command line or from one .json file of them. Raises InputError."""
    if len(argv) == 1 and argv[0].endswith(".json"):
        settings = explain(f"{argv[0]}: no JSON object", lambda: json.loads(Path(argv[0]).read_text("utf-8")).items())
        argv = [f"--{name}={value}" for name, value in settings if value is not None]
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments), allow_abbrev=False,
        description=__doc__.partition("\n\n")[0], usage="%(prog)s --output_dir DIR [--FLAG VALUE ...] | FILE.json")
    parser.error = partial(require, False)  # argparse would print the usage of sixty flags before its line
    for action in parser._actions if {"-h", "--help"} & {*argv} else ():  # shown in one spelling, switches as such
        argv, action.option_strings = ["--help"], action.option_strings[:1]
        action.metavar = None if action.choices else action.dest.split("_")[-1].upper()
        action.nargs = 0 if isinstance(action.const, bool) else action.nargs
        action.help += "%(default).0s" * (str(action.default) in ("None", "False"))  # mentioned here, so not added
    args, rest = parser.parse_known_args(argv)
    unknown = [word.partition("=")[0] for word in rest if word.startswith("--")]  # not values: they may be secrets
    apart = {*unknown} & NOT_OF_A_STREAM and "a stream has no lines and no length, see --num_train_steps"
    require(not rest, f"{apart or 'unknown arguments'}: {' '.join(unknown) or 'a value without a flag'}")
    args.do_train, args.do_eval = args.do_train or not args.do_eval, args.do_eval or not args.do_train
    args.hub_options = {name: getattr(args, name) for name in ("cache_dir", "token", "trust_remote_code")}
    if not args.do_train and (Path(args.output_dir) / "flax_model.msgpack").is_file():
        args.model_name_or_path = args.model_name_or_path or args.output_dir
    return check_args(args)

def check_args(args):
    """Raises InputError for numbers out of range, and for flags that exclude or need each other."""
    for names, meaning, holds in (
        ("per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps logging_steps eval_steps "
         "save_steps save_total_limit max_seq_length max_train_samples max_eval_samples preprocessing_num_workers "
         "num_train_steps shuffle_buffer_size", "at least 1", lambda x: x >= 1),
        ("max_steps", "at least 1, or -1", lambda x: x >= 1 or x == -1),
        ("warmup_steps learning_rate weight_decay max_grad_norm", "at least 0", lambda x: 0 <= x < math.inf),
        ("adam_epsilon", "above 0", lambda x: 0 < x < math.inf),
        ("adam_beta1 adam_beta2", "at least 0 and below 1", lambda x: 0 <= x < 1),
        ("mlm_probability", "above 0 and below 1", lambda x: 0 < x < 1),
        ("num_eval_samples", "at least 0, and with evaluation 1", lambda x: x >= 1 - (not args.do_eval)),
        ("output_dir", "a local folder", lambda x: "://" not in x),
        ("seed", "between 0 and 4294967295", lambda x: 0 <= x < 2**32)):
        for name, value in ((name, getattr(args, name)) for name in names.split()):
            require(value is None or holds(value), f"--{name} {value}: it must be {meaning}")
    families = sorted(transformers.models.auto.modeling_flax_auto.FLAX_MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    model = args.model_name_or_path or (args.do_train and (args.config_name or args.model_type))
    file, name, tokenizer = args.train_file or args.validation_file, args.dataset_name, args.tokenizer_name
    require(model, "no model: give --model_name_or_path, or, to train from scratch, --config_name or --model_type")
    require(tokenizer or args.model_name_or_path, "no tokenizer: give --tokenizer_name or --model_name_or_path")
    require(args.model_type in (None, *families), f"--model_type {args.model_type}: not one of {', '.join(families)}")
    require(file or name, "no data: give --dataset_name or --train_file")
    require(not (file and name), f"two data sources: --dataset_name {name} and {file}")
    require(args.train_file or name or not args.do_train, "--validation_file needs --train_file, or --do_eval alone")
    return args

@dataclass
class FlaxDataCollatorForLanguageModeling:
    """BERT's masking of a whole batch at once. Each token that is not special is predicted with probability
    `mlm_probability`: 80% of them are shown as the mask token, 10% as one of the whole vocabulary, 10% as they are."""
    tokenizer: transformers.PreTrainedTokenizerBase
    max_length: int
    mlm_probability: float = 0.15
    def __post_init__(self):
        require(self.tokenizer.mask_token_id is not None, f"{self.tokenizer.name_or_path}: it has no mask token")
        self.is_special = np.isin(np.arange(len(self.tokenizer)), self.tokenizer.all_special_ids)
    def num_slots(self, num_tokens: int) -> int:
        """How many of `num_tokens` tokens may be predicted: mean plus 4 standard deviations, a multiple of 16."""
        mean = num_tokens * self.mlm_probability
        deviation = math.sqrt(mean * (1 - self.mlm_probability))
        return min(num_tokens, 16 * math.ceil((mean + 4 * deviation) / 16))
    def __call__(self, examples: dict[str, np.ndarray], rng: np.random.Generator, group_size: int):
        """Masks `input_ids` in place and adds `labels`, [rows, length] int32; a forward pass has `group_size` rows."""
        (rows, length), tokens = examples["input_ids"].shape, examples["input_ids"].reshape(-1)
        keys, size = rng.bit_generator.random_raw(tokens.size), group_size * length
        where = np.flatnonzero(keys < np.uint64(self.mlm_probability * 2**64))
        where, slots = where[~self.is_special[tokens[where]]], self.num_slots(size)
        if len(where) > slots and np.bincount(where // size).max() > slots:  # one time in ten thousand
            groups = np.split(where, np.searchsorted(where, range(size, tokens.size, size)))
            groups = [g[keys[g] < np.partition(keys[g], slots)[slots]] if len(g) > slots else g for g in groups]
            where = np.concatenate(groups)
        predicted, labels = tokens[where], np.full((rows, length), IGNORE, np.int32)
        labels.reshape(-1)[where] = predicted
        low, first, last = keys[where] & 0xFFFFFFFF, int(0.8 * 2**32), int(0.9 * 2**32)  # the upper half is the key
        random = (low - first) * len(self.is_special) // (last - first)
        tokens[where] = np.where(low < first, self.tokenizer.mask_token_id, np.where(low < last, random, predicted))
        return {**examples, "labels": labels}

def head_only_at(positions, last_layer: str):
    """Interceptor (`flax.linen.intercept_methods`) that goes on with hidden states [1, positions, width], in place of
    [batch, length, width], once each is on its own: after the last attention or, if it has other names, the base."""
    select, done = lambda x: x.reshape(-1, x.shape[-1]).at[positions].get(mode="clip")[None], []
    def interceptor(next_function, args, kwargs, context):
        path = context.module.path
        if path[2:] == ("layer", last_layer, "attention", "output"):
            return done.append(path) or next_function(*map(select, args), **kwargs)
        outputs = next_function(*args, **kwargs)
        base = len(path) == 1 and isinstance(outputs, tuple)
        return (select(outputs[0]), *outputs[1:]) if base and not done else outputs
    return interceptor

def loss_sums(params, batch, model, num_slots, dropout_rng=None):
    """Cross-entropy in float32 of the tokens with a label other than -100, summed, and the sums that means are of.
    `batch` has input_ids, attention_mask, labels, [batch, length] int32; `num_slots(batch * length)` are predicted."""
    labels, train = batch["labels"].reshape(-1), dropout_rng is not None
    (positions,) = jnp.nonzero(labels != IGNORE, size=num_slots(labels.size), fill_value=labels.size)
    labels = labels.at[positions].get(mode="fill", fill_value=IGNORE)
    with nn.intercept_methods(head_only_at(positions, str(model.config.num_hidden_layers - 1))):
        options = {"params": params, "dropout_rng": dropout_rng, "train": train, "return_dict": False}
        own = {"electra": {"token_type_ids": 0 * batch["input_ids"]}, "big_bird": {"indices_rng": dropout_rng}}
        options |= own.get(model.config.model_type, {})  # in Flax, ELECTRA's default is 1, and BigBird's blocks random
        logits = model(batch["input_ids"], batch["attention_mask"], **options)[0]
    full = logits.shape[:2] != (1, labels.size)  # a model of other anatomy: its head ran on every position
    logits = logits.reshape(-1, logits.shape[-1])[positions] if full else logits[0]
    logits, predicted = logits.astype(jnp.float32), labels != IGNORE
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(predicted, labels, 0))
    sums = {"loss": jnp.where(predicted, losses, 0).sum(), "predicted": predicted.sum(dtype=jnp.float32)}
    if not train:
        sums["accuracy"] = (predicted & (logits.argmax(-1) == labels)).sum(dtype=jnp.float32)
    return sums["loss"], sums

def load_texts(args):
    """Streams of training and evaluation texts, as `text_column` gives them; None where there are none."""
    options = args.hub_options if datasets.__version__ < "4" else {"cache_dir": args.cache_dir, "token": args.token}
    builders = {"txt": "text", "json": "json", "jsonl": "json", "csv": "csv", "parquet": "parquet"}
    load = partial(datasets.load_dataset, streaming=True, **options)
    name, source = args.dataset_name, f"--dataset_name {args.dataset_name}"
    splits = dict(explain(f"{source}: unreadable", load, name, args.dataset_config_name)) if name else {}
    for split, file in (("train", args.train_file), ("validation", args.validation_file)):
        if file:
            source, kind = f"--{split}_file {file}", Path(file).suffix.lower().lstrip(".")
            require(kind in builders, f"{source}: its extension must be one of {', '.join(builders)}")
            splits[split] = explain(f"{source}: unreadable", load, builders[kind], data_files=[file], split="train")
        if split in splits:
            splits[split] = text_column(splits[split], args.text_column_name, source)
    require({"train", args.do_train or "validation"} & {*splits}, f"{source}: no training data, only {list(splits)}")
    return splits.get("train"), splits.get("validation")

def text_column(dataset, wanted: str, source: str):
    """The text column alone, its name, and `source`. Reads a row, for a stream may not know its columns before."""
    kinds = {f.name: f.type for f in explain(f"{source}: no text", next, dataset.with_format("arrow").iter(1)).schema}
    strings = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    name = strings[0] if wanted == "text" and wanted not in kinds and len(strings) == 1 else wanted
    require(name in kinds, f"{source}: no column {name}; --text_column_name of {list(kinds)}?")
    require(name in strings, f"{source}: column {name} holds {kinds[name]}, not text")
    return dataset.select_columns([name]), name, source

@dataclass
class BlockStream:
    """Texts that are read in order, some at a time, as blocks of `length` tokens out of all of them end to end."""
    dataset: datasets.IterableDataset
    column: str
    source: str
    tokenizer: transformers.PreTrainedTokenizerBase
    length: int
    def read(self, dataset, state: dict | None, carried: np.ndarray, skip: int = 0):
        """From `state` on, or else after `skip` texts: state and tokens there, how many texts, [blocks, length] int32,
        tokens after. Row by row: datasets 3.6 to 5.0, if resumed twice within an Arrow table, lose rows of it."""
        dataset.load_state_dict(state)
        rows, backend = islice(dataset, 0 if state else skip, None), getattr(self.tokenizer, "backend_tokenizer", None)
        self.tokenizer("")  # undoes what tokenizer.json may say of truncation and padding
        def encode():
            texts = [row[self.column] for row in islice(rows, 64)]
            filled = [text for text in texts if text and text.strip()]
            one_by_one = map(partial(self.tokenizer.encode, verbose=False), filled)
            encoded = (found.ids for found in backend.encode_batch_fast(filled)) if backend else one_by_one
            return len(texts), np.concatenate([carried, *(np.array(ids, np.int32) for ids in encoded)])
        while (found := explain(f"{self.source}: unreadable", encode))[0] or state is None:
            blocks, after = np.split(found[1], [len(found[1]) // self.length * self.length])
            yield state, carried, found[0], blocks.reshape(-1, self.length), after
            state, carried = dataset.state_dict(), after
    def first(self, limit: int, needed: int):
        """Up to `limit` blocks, how many texts of each shard they take, and the tokens left over of these texts."""
        blocks, rest, taken = [], np.zeros(0, np.int32), [0] * self.dataset.num_shards
        for shard in range(len(taken)):
            parts = self.read(self.dataset.shard(len(taken), shard), None, rest)
            while len(blocks) < limit and (part := next(parts, None)):
                taken[shard], blocks, rest = taken[shard] + part[2], [*blocks, *part[3]], part[4]
        require(len(blocks) >= needed, f"--num_eval_samples {limit}: {self.source} has {len(blocks)} blocks")
        return np.array(blocks[:limit]).reshape(-1, self.length), taken, np.concatenate([*blocks[limit:], rest])
    def blocks(self, position: dict, batch_size: int, limit: int | None, taken: list[int], rest: np.ndarray):
        """This process's blocks, epoch after epoch, each with its position. Texts `taken` for evaluation are skipped,
        the `rest` of their tokens opens the epochs of process 0; tokens after an epoch's last block open the next."""
        rank, count, limit = jax.process_index(), jax.process_count(), (limit or sys.maxsize) // jax.process_count()
        dataset = split_dataset_by_node(self.dataset, rank, count)  # deals out shards, or, if not evenly, texts
        skip = len(range(rank, sum(taken), count)) if len(taken) % count else sum(taken[rank::count])
        while True:
            opening = np.array([*position["carried"], *(() if position["state"] or rank else rest)], np.int32)
            parts = prefetch(self.read(dataset, position["state"], opening, skip), transform=tuple)  # as they are
            for state, carried, _, found, after in parts:  # noqa: B007
                position |= {"state": state, "carried": carried.tolist()} if state else {}
                for index in range(position["used"], min(len(found), limit - position["seen"])):
                    yield {**position, "used": index}, found[index]
                position |= {"used": 0, "seen": min(position["seen"] + len(found), limit)}
                if position["seen"] == limit:
                    break
            found = f"{self.source} has {position['seen']:,} blocks of {self.length} tokens, {len(after)} more"
            require(position["seen"] >= batch_size, f"too little training data: {found}; a batch takes {batch_size}")
            logger.info(f"Epoch {position['epoch'] + 1} is read, {position['seen']:,} blocks; the next is reshuffled.")
            after = [] if position["seen"] == limit else after.tolist()
            position = {"epoch": position["epoch"] + 1, "state": None, "carried": after, "used": 0, "seen": 0}

def shuffle(blocks, size: int, seed: int):
    """Each `size` blocks of an epoch in random order: the position after, `offset` blocks further, and the block."""
    for epoch, group in groupby(blocks, key=lambda item: item[0]["epoch"]):
        while window := list(islice(group, size)):
            start = window[0][0]
            order = np.random.default_rng((seed, 0, epoch, start["seen"] + start["used"])).permutation(len(window))
            yield from (({**start, "offset": offset}, window[index][1]) for offset, index in enumerate(order, 1))

def make_batch(blocks, collator, seed, first_row: int, shape: tuple[int, ...]):
    """Masks `blocks`, [rows, length] int32, as [local devices, *shape, length]; `first_row` in the draws of `seed`."""
    rng = np.random.Generator(np.random.PCG64(seed).advance(first_row * collator.max_length))
    batch = collator({"input_ids": blocks, "attention_mask": np.ones_like(blocks)}, rng, group_size=shape[-1])
    return {name: array.reshape(jax.local_device_count(), *shape, -1) for name, array in batch.items()}

def train_batches(blocks, collator, seed: int, steps: range, shape: tuple[int, int], after: dict):
    """The batches of `steps`, up to an error of the stream; `after` is told the position after each, and the error."""
    batch_size = jax.local_device_count() * math.prod(shape)
    try:
        for step in steps:
            (*_, after[step + 1]), drawn = zip(*islice(blocks, batch_size), strict=True)
            yield make_batch(np.stack(drawn), collator, (seed, 1, step), jax.process_index() * batch_size, shape)
    except InputError as error:
        after["error"] = error

def eval_batches(blocks, collator, seed: int, per_device_batch_size: int):
    """Every block once, masked alike in every evaluation and on any number of devices."""
    size = jax.local_device_count() * per_device_batch_size
    for first in range(0, len(blocks), jax.process_count() * size):
        rows = np.arange(size) + first + jax.process_index() * size
        batch = make_batch(blocks[rows % len(blocks)], collator, (seed, 2), int(rows[0]), (per_device_batch_size,))
        batch["labels"].reshape(size, -1)[rows >= len(blocks)] = IGNORE
        yield batch

def prefetch(batches, size: int = 2, transform=None):
    """`batches`, on the devices unless `transform` is given, made in a background thread up to `size` ahead of use."""
    batches = map(transform or shard, batches)
    with ThreadPoolExecutor(1) as pool:
        pending = [pool.submit(next, batches, None) for _ in range(size)]
        while (batch := pending.pop(0).result()) is not None:
            pending.append(pool.submit(next, batches, None))
            yield batch

def load_config_and_tokenizer(args):
    """The config, its vocabulary as large as the tokenizer's at least, the tokenizer, and the sequence length."""
    name, load = args.config_name or args.model_name_or_path, partial(AutoConfig.from_pretrained, **args.hub_options)
    config = explain(f"{name} has no config", load, name) if name else transformers.CONFIG_MAPPING[args.model_type]()
    found, supported = config.model_type, type(config) in transformers.FLAX_MODEL_FOR_MASKED_LM_MAPPING
    require(args.model_type in (None, found), f"--model_type {args.model_type}: {name} is of type {found}")
    require(supported, f"{name}: type {found} has no masked-language model in Flax")
    name = args.tokenizer_name or args.model_name_or_path
    load = partial(AutoTokenizer.from_pretrained, use_fast=args.use_fast_tokenizer, **args.hub_options)
    tokenizer = explain(f"{name} has no tokenizer", load, name)
    if len(tokenizer) > config.vocab_size:  # JAX would clamp the ids beyond the table without a word
        message = f"the tokenizer of {name} has {len(tokenizer)} tokens, the model's table {config.vocab_size}"
        require(not args.model_name_or_path, f"{message}: they do not belong together")
        logger.warning(f"{message}: the table is made larger.")
        config.vocab_size = len(tokenizer)
    positions = config.max_position_embeddings - ("roberta" in found and config.pad_token_id + 1)  # after the pad id
    length = args.max_seq_length or min(tokenizer.model_max_length, positions)
    require(length <= positions, f"--max_seq_length {length}: the model has {positions} positions")
    if found == "big_bird" and (length % config.block_size or length <= 11 * config.block_size):
        config.update({"attention_type": "original_full"}) or logger.info("Too short for sparse attention: full.")
    found == "roformer" and config.update({"embedding_size": config.hidden_size})  # the only one that Flax has
    return config, tokenizer, length

def load_model(args, config):
    """The Flax model, without parameters, and its float32 parameters; those not pretrained come from one program."""
    options, name, params = {"config": config, "dtype": getattr(jnp, args.dtype)}, args.model_name_or_path, {}
    model = explain("the config makes no model", FlaxAutoModelForMaskedLM.from_config, **options, _do_init=False)
    checkpointing = args.gradient_checkpointing and model.enable_gradient_checkpointing
    checkpointing and explain(f"--gradient_checkpointing: {type(model).__name__} has none", checkpointing)
    if name:
        class Unread(type(model)):  # PyTorch's files are read into an initialized model only; NaN: not in the file
            def init_weights(self, *_):
                return jax.tree.map(lambda x: np.broadcast_to(np.float32("nan"), x.shape), model.params_shape_tree)
        problem = f"{name} has no model of type {config.model_type} that fits its config"
        pre = explain(problem, Unread.from_pretrained, name, **options, **args.hub_options)
        params = {k: np.asarray(x) for k, x in flatten_dict(pre.to_fp32(pre.params)).items() if not np.isnan(x).all()}
        require(params, f"{problem}: none of its weights")
        model.generation_config = pre.generation_config
    if missing := model.required_params - set(params):
        params and logger.warning(f"{name} lacks {', '.join(sorted(map('.'.join, missing)))}: initialized at random.")
        init = jax.jit(model.init_weights, static_argnums=1)(jax.random.PRNGKey(args.seed), model.input_shape)
        params.update({path: np.asarray(x) for path, x in flatten_dict(init).items() if path in missing})
    return model, unflatten_dict(params)

def make_optimizer(args, num_steps: int):
    """AdamW or Adafactor, decay times learning rate on matrices that are no biases; a table of the rate, by step."""
    peak, warmup, decay_steps = args.learning_rate, args.warmup_steps, max(1, num_steps - args.warmup_steps)
    after = {"linear": optax.linear_schedule(peak, 0.0, decay_steps),
             "cosine": optax.cosine_decay_schedule(peak, decay_steps),
             "constant": optax.constant_schedule(peak),
             "inverse_sqrt": lambda step: peak / jnp.sqrt(1 + step / (warmup or 10_000))}[args.lr_scheduler_type]
    schedule = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after
    matrices = partial(jax.tree_util.tree_map_with_path, lambda path, x: x.ndim > 1 and "bias" not in path[-1].key)
    adam = partial(optax.adamw, b1=args.adam_beta1, b2=args.adam_beta2, eps=args.adam_epsilon)
    optimizer = adam(schedule, weight_decay=args.weight_decay, mask=matrices)
    if args.adafactor:
        decay = lambda step: args.weight_decay * schedule(step)  # noqa: E731
        optimizer = optax.adafactor(schedule, weight_decay_rate=decay, weight_decay_mask=matrices)
    clip = optax.clip_by_global_norm(args.max_grad_norm) if args.max_grad_norm else optax.identity()
    return optax.chain(clip, optimizer), np.asarray(jax.vmap(schedule)(jnp.arange(num_steps + 1))).__getitem__

def embed(next_function, args, kwargs, context):
    """Interceptor: rounds embeddings after the lookup, so that the gradients of equal tokens are summed in float32."""
    module, here = context.module, type(context.module) is nn.Embed and context.method_name == "__call__"
    return jnp.take(module.embedding, *args, axis=0).astype(module.dtype) if here else next_function(*args, **kwargs)

def train_step(state, totals, batch, seed, **fixed):
    """One optimizer step on one device; leaves of `batch` are [accumulation, batch, length] int32, `totals` sums since
    the last log line. Gradients of `loss_sums(**fixed)` are summed over micro-batches and devices, divided once."""
    rng = jax.random.fold_in(jax.random.key(seed, impl=DROPOUT_PRNG), state.step)
    rng = jax.random.fold_in(rng, jax.lax.axis_index("batch"))
    def micro_step(sums, inputs):
        micro_batch, index = inputs
        grad_fn, key = nn.intercept_methods(embed)(jax.grad(loss_sums, has_aux=True)), jax.random.fold_in(rng, index)
        return jax.tree.map(jnp.add, sums, grad_fn(state.params, micro_batch, dropout_rng=key, **fixed)), None
    zeros = jax.tree.map(jnp.zeros_like, (state.params, {"loss": 0.0, "predicted": 0.0}))
    (grads, sums), _ = jax.lax.scan(micro_step, zeros, (batch, jnp.arange(len(batch["labels"]))))
    sums["tokens"] = batch["attention_mask"].sum(dtype=jnp.float32)
    grads, sums = jax.lax.psum((grads, sums), "batch")
    grads = jax.tree.map(lambda grad: grad / jnp.maximum(sums["predicted"], 1), grads)
    sums["grad_norm"] = optax.global_norm(grads)
    return state.apply_gradients(grads=grads), jax.tree.map(jnp.add, totals, sums)

def evaluate(p_eval_step, sequences, collator, seed: int, batch_size: int, params) -> dict[str, float]:
    """Mean loss of all predicted tokens, perplexity, and accuracy if `loss_sums` counts it."""
    sums = [p_eval_step(params, batch) for batch in prefetch(eval_batches(sequences, collator, seed, batch_size))]
    sums = {name: sum(float(np.asarray(batch[name])[0]) for batch in sums) for name in sums[0]}
    means = {f"eval_{name}": sums[name] / max(sums["predicted"], 1) for name in ("loss", "accuracy") if name in sums}
    return {**means, "eval_perplexity": math.exp(min(means["eval_loss"], 700))}

def shard(tree):
    """Arrays [local devices, ...] onto the local devices, on the mesh where pmap over "batch" puts its own output; on
    another, as of `flax.jax_utils.replicate`, pmap of jax 0.8 and later compiles anew when that comes back."""
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("batch",))
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch")))

class TrainingLog:
    """Log lines and TensorBoard scalars; values are fetched a step late, when the devices have the next one to do."""
    def __init__(self, output_dir: Path):
        self.writer, self.due, self.results = Writer(str(output_dir)) if jax.process_index() == 0 else None, None, {}
        self.start = self.last = time.perf_counter()
    def scalars(self, values: dict[str, float], step: int):
        [self.writer.add_scalar(name, value, step) for name, value in values.items() if self.writer]
        self.writer and self.writer.flush()
        logger.info(f"Step {step}: {', '.join(f'{name} {value:.5g}' for name, value in values.items())}")
    def flush(self, schedule):
        """Writes the means that are due. Raises InputError if loss or gradients are not finite."""
        if self.due:
            (step, totals), self.due = self.due, None
            sums, now = {name: float(np.asarray(x)[0]) for name, x in totals.items()}, time.perf_counter()
            require(all(map(math.isfinite, sums.values())), f"step {step}: loss not finite; lower --learning_rate?")
            means = {"loss": sums["loss"] / max(sums["predicted"], 1), "learning_rate": float(schedule(step - 1))}
            means |= {"time": now - self.start, "tokens_per_second": sums["tokens"] / (now - self.last)}
            self.results, self.last = {f"train_{name}": value for name, value in means.items()}, now
            self.scalars(self.results, step)

def write_results(output_dir: Path, results: dict[str, float], split: str):
    """SPLIT_results.json, and the same values among those of all_results.json, each written aside and renamed."""
    path = output_dir / "all_results.json"
    every = {**(json.loads(path.read_text()) if path.exists() else {}), **results}
    for name, content in ((path.name, every), (f"{split}_results.json", results)):
        (output_dir / f"{name}.tmp").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        (output_dir / f"{name}.tmp").replace(output_dir / name)

def to_pytorch(params) -> dict[str, np.ndarray]:
    """Flax parameters under the names and in the layout of Transformers' PyTorch classes."""
    names, flat = {"kernel": "weight", "scale": "weight", "embedding": "weight"}, flatten_dict(params)
    named = {(*path, names.get(name, name)): x.T if name == "kernel" else x for (*path, name), x in flat.items()}
    return {".".join(path): np.ascontiguousarray(x) for path, x in named.items()}

class Saver(ThreadPoolExecutor):
    """Writes what a run leaves, in the background: a checkpoint, then the model, then the upload."""
    def __init__(self, args, model, tokenizer, run: dict, step: int, upload):
        super().__init__(2)
        self.model, self.tokenizer, self.run, self.upload = model, tokenizer, run, upload
        self.output_dir, self.aside = Path(args.output_dir), Path(args.output_dir) / ".tmp"
        self.saving, self.uploading, checkpoints = None, None, self.output_dir.absolute() / "checkpoints"
        shutil.rmtree(self.aside, ignore_errors=True)
        if args.overwrite_output_dir and args.resume_from_checkpoint is None and checkpoints.exists():
            shutil.rmtree(checkpoints.rename(self.aside))  # gone at once, not bit by bit
        checkpoints.mkdir(parents=True, exist_ok=True)
        options = CheckpointOptions(max_to_keep=args.save_total_limit, cleanup_tmp_directories=True)
        self.manager = ocp.CheckpointManager(checkpoints, options=options)
        [self.manager.delete(later) for later in self.manager.all_steps() if later > step]
    def save(self, state, step: int, last: bool, **more):
        """Returns as soon as `state` is copied from the device and the save before is written; `more` goes along."""
        state = jax.tree.map(lambda x: x.addressable_shards[0].data, state)  # without the program that x[0] runs
        state = jax.tree.map(lambda x: np.array(x)[0, ...], jax.device_get(state))  # all transfers at once
        self.saving and explain(f"{self.output_dir}: a save failed, those before are whole", self.saving.result)
        self.saving = self.submit(self.write, state, step, last, {**self.run, **more})
    def write(self, state, step: int, last: bool, run: dict):
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
        step in self.manager.all_steps() or self.manager.save(step, args=items)
        if self.uploading and not self.uploading.done() and not last:
            return  # no file may change during an upload; a later save exports
        self.uploading and self.uploading.result()
        self.model.save_pretrained(self.aside, params=state.params, max_shard_size="1000GB")  # one file
        self.tokenizer.save_pretrained(self.aside)
        save_file(to_pytorch(state.params), self.aside / "model.safetensors", metadata={"format": "pt"})
        (self.aside / "model.safetensors").chmod((self.aside / "config.json").stat().st_mode)  # else the owner's alone
        [file.replace(self.output_dir / file.name) for file in self.aside.iterdir()]
        self.aside.rmdir()
        self.uploading = self.upload and not last and self.submit(self.try_upload, step)
    def try_upload(self, step: int):
        try:
            self.upload(f"Step {step}", "events.*")  # which still grow
        except Exception as error:  # of the network or the server
            logger.warning(f"The upload of step {step} failed, the next repairs it: {' '.join(str(error).split())}")

def find_checkpoints(args) -> list[Path]:
    """Checkpoints to resume from, newest first, own before another run's. Raises InputError if it may not write."""
    output_dir, wanted, anew = Path(args.output_dir).absolute(), args.resume_from_checkpoint, args.overwrite_output_dir
    parent = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    explain(f"--output_dir {output_dir}: {parent} is not writable", tempfile.TemporaryFile, dir=parent)
    ours = anew or not args.do_train or wanted or (output_dir / "checkpoints").is_dir()
    ours = ours or output_dir in {Path(name).absolute() for name in (args.config_name, args.tokenizer_name) if name}
    empty = parent != output_dir or not any(output_dir.iterdir())
    require(ours or empty, f"--output_dir {output_dir}: it has files but no checkpoints; --overwrite_output_dir?")
    path, below = Path(wanted or output_dir).absolute(), "checkpoints/*"
    found = [p for p in (path, *path.glob(below)) if p.match(below) and p.name.isdigit() and p.exists()]
    require(found or wanted is None, f"--resume_from_checkpoint {path}: it has no checkpoint")
    found += [p for p in output_dir.glob(below) if p.name.isdigit() and not (anew or path.is_relative_to(output_dir))]
    return [] if anew and wanted is None else sorted(found, key=lambda p: (output_dir not in p.parents, -int(p.name)))

def restore(checkpoints: list[Path], state, run: dict):
    """The first readable checkpoint, as a host copy of `state`, and its step. Raises InputError if of another run."""
    for path in checkpoints:
        manager, step = ocp.CheckpointManager(path.parent, options=CheckpointOptions(read_only=True)), int(path.name)
        try:
            found = manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
            for name, value in run.items():
                require(found.get(name, value) == value, f"{path}: its {name} is {found.get(name)}, here {value}")
            return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(state))).state, step
        except InputError:
            raise
        except Exception as error:  # whatever a damaged file makes of it
            logger.warning(f"{path} cannot be read and is skipped: {str(error).splitlines()[0][:200]}")
            time.sleep(0.5)  # for the reads that Orbax leaves pending
    raise InputError(f"{checkpoints[0].parent}: no checkpoint can be read; --overwrite_output_dir starts over")

def share(value) -> list:
    """The values of all processes, of anything that JSON can hold."""
    text = json.dumps(value)
    size = int(multihost_utils.process_allgather(len(text)).max())
    texts = multihost_utils.process_allgather(np.frombuffer(text.ljust(size).encode(), np.uint8))
    return [json.loads(bytes(text)) for text in texts.reshape(-1, size)]

def connect_hub(args):
    """Creates the repository and returns a function that uploads output_dir to it. Raises InputError."""
    api, output_dir = huggingface_hub.HfApi(token=args.hub_token or args.token), Path(args.output_dir)
    name = args.hub_model_id or output_dir.absolute().name
    problem = f"--push_to_hub: no access to {name}, may --hub_token write there?"
    repo_id = explain(problem, api.create_repo, name, exist_ok=True).repo_id
    explain(problem, api.preupload_lfs_files, repo_id, [huggingface_hub.CommitOperationAdd("a", b"-")])  # writes?
    upload, ignored = partial(api.upload_folder, repo_id=repo_id, folder_path=output_dir), ["checkpoints/**", "*.tmp*"]
    return lambda message, *more: upload(commit_message=message, ignore_patterns=[*ignored, *more])

def set_up(args):
    """This process's part in the cluster, logging, and a compilation cache that makes the second start fast."""
    if args.distributed:
        found = {key: os.environ.get(f"JAX_{key.upper()}") for key in ("num_processes", "process_id")}
        explain("--distributed", jax.distributed.initialize, **{key: int(x) for key, x in found.items() if x})
    for number in (signal.SIGTERM, signal.SIGINT):  # until training starts; JAX has taken the first
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level="ERROR", force=True)
    logger.setLevel("ERROR" if args.distributed and jax.process_index() else "INFO")
    [logging.getLogger(name).setLevel("CRITICAL") for name in ("absl", "datasets", "asyncio")]  # Orbax leaves tasks:
    sys.unraisablehook = lambda error: "loop is closed" in str(error.exc_value) or sys.__unraisablehook__(error)
    transformers.logging.set_verbosity_error()
    huggingface_hub.utils.disable_progress_bars()  # of uploads in the background
    sys.stderr.isatty() or datasets.disable_progress_bars()
    cache = Path(args.cache_dir or huggingface_hub.constants.HF_HOME, "jax-compilation-cache")
    jax.config.jax_compilation_cache_dir or jax.config.update("jax_compilation_cache_dir", str(cache))

def main(args) -> int:
    args.preprocessing_num_workers and os.environ.update(RAYON_NUM_THREADS=str(args.preprocessing_num_workers))
    set_up(args)
    is_writer = not args.distributed or jax.process_index() == 0
    output_dir, stopping, last, caught, after = Path(args.output_dir), 0, False, [], {}  # caught: signals
    checkpoints = find_checkpoints(args) if is_writer else []
    upload = connect_hub(args) if args.push_to_hub and is_writer else None
    config, tokenizer, max_length = load_config_and_tokenizer(args)
    collator = FlaxDataCollatorForLanguageModeling(tokenizer, max_length, args.mlm_probability)
    train, validation = (texts and BlockStream(*texts, tokenizer, max_length) for texts in load_texts(args))
    limit = args.num_eval_samples if args.do_eval or not validation else 0
    eval_set, *left = (validation or train).first(limit, min(limit, 1) if validation else limit)
    eval_set, left = eval_set[: args.max_eval_samples], ([], left[1][:0]) if validation else left
    shape = (args.gradient_accumulation_steps, args.per_device_train_batch_size)
    batch_size, where = jax.device_count() * math.prod(shape), f"{jax.device_count()} {jax.default_backend()}"
    num_steps, rank = args.max_steps if args.max_steps > 0 else args.num_train_steps, jax.process_index()
    model, params = load_model(args, config)
    optimizer, schedule = make_optimizer(args, num_steps) if args.do_train else (optax.identity(), None)
    state = jax.device_get(jax.jit(partial(TrainState.create, apply_fn=None, tx=optimizer))(params=params))
    run = json.loads(config.to_json_string()) | {"transformers_version": None, "architectures": None}
    run |= {"batch_size": batch_size, "optimizer": "Adafactor" if args.adafactor else "AdamW"}
    run |= {"number of processes": jax.process_count(), "max_seq_length": max_length, "held-out texts": left[0]}
    run |= {name: getattr(args, name) for name in ("seed", "shuffle_buffer_size", "max_train_samples")}
    places = [{"epoch": 0, "state": None, "carried": [], "used": 0, "seen": 0, "offset": 0}] * jax.process_count()
    state, step = restore(checkpoints, state, run) if checkpoints and args.do_train else (state, 0)
    for path in [path for path in checkpoints if step and path.name == str(step)][:1]:
        places = json.loads((path / "run" / "metadata").read_text()).get("stream", places)
    (state, step), places = jax.tree.map(multihost_utils.broadcast_one_to_all, (state, step)), share(places)[0]
    copies = lambda x: np.broadcast_to(x, (jax.local_device_count(), *np.shape(x)))  # noqa: E731
    state, step, place = shard(jax.tree.map(copies, state)), (first_step := int(step)), places[rank]
    if args.do_train:
        blocks = train.blocks(place.copy(), batch_size // jax.process_count(), args.max_train_samples, *left)
        blocks = islice(shuffle(blocks, max(args.shuffle_buffer_size, batch_size), args.seed), place["offset"], None)
        blocks = chain([next(blocks)], blocks)  # too little data ends the run here, before anything is written
    saver = Saver(args, model, tokenizer, run, first_step, upload) if args.do_train and is_writer else None
    log, fixed = TrainingLog(output_dir), {"model": model, "num_slots": collator.num_slots}
    p_train_step = jax.pmap(partial(train_step, **fixed, seed=args.seed), "batch", donate_argnums=0)
    p_eval_step = jax.pmap(lambda *x: jax.lax.psum(loss_sums(*x, **fixed)[1], "batch"), "batch")
    evaluation = partial(evaluate, p_eval_step, eval_set, collator, args.seed, args.per_device_eval_batch_size)
    if args.do_train:
        logger.info(f"Training {sum(x.size for x in jax.tree.leaves(params)):,} parameters, steps {first_step} to "
                    f"{num_steps} of {where} devices x {shape[0]} x {shape[1]} blocks of {max_length} tokens.")
        zeros = totals = shard(dict.fromkeys(("loss", "predicted", "tokens", "grad_norm"), copies(np.float32(0))))
        for number in (signal.SIGTERM, signal.SIGINT):  # noted, for the loop to save and stop; a second one kills
            signal.signal(number, lambda number, _: (caught.append(number), signal.signal(number, signal.SIG_DFL)))
        batches = train_batches(blocks, collator, args.seed, range(first_step, num_steps), shape, after)
        batches = prefetch(prefetch(batches, 2 + args.shuffle_buffer_size // batch_size, dict))  # a window ahead
        with saver or ThreadPoolExecutor(1):  # whose end, also by an error, waits for what is being written
            for step, batch in enumerate(batches, first_step + 1):
                state, totals, _ = *p_train_step(state, totals, batch), jax.block_until_ready(totals)  # a step ahead
                log.flush(schedule)
                stopping = max(caught, default=0)
                if jax.process_count() > 1:  # what any process was told; they ask each other every tenth step
                    stopping = int(multihost_utils.process_allgather(stopping).max()) if step % 10 == 0 else 0
                last, place = stopping or step == num_steps, after.pop(step)
                if step % args.logging_steps == 0 or step % args.save_steps == 0 or last:
                    log.due, totals = (step, totals), zeros
                if step % args.save_steps == 0 or last:
                    log.flush(schedule)
                    places = share(place)
                    saver and saver.save(state, step, last, stream=places)
                if stopping:
                    break
                if args.do_eval and args.eval_steps and step % args.eval_steps == 0 and not last:
                    log.scalars(evaluation(state.params), step)
            require(not (error := after.get("error")) or jax.process_count() == 1, error)  # the others end with it
            last or (log.flush(schedule), saver and saver.save(state, step, True, stream=[place] if error else places))
            saver and explain(f"{output_dir}: the last save failed, those before are whole", saver.saving.result)
            require(not error, f"{error}; step {step} is saved, and the same command goes on from there")
        saver and log.results and write_results(output_dir, log.results, "train")
    if args.do_eval and not (stopping or (caught and not args.distributed)):
        log.scalars(results := evaluation(state.params), step)
        is_writer and write_results(output_dir, results, "eval")
    if upload and not (stopping or caught):
        card, tags = output_dir / "README.md", ["flax", config.model_type]
        card.exists() or huggingface_hub.metadata_save(card, {"library_name": "transformers", "tags": tags})
        explain("--push_to_hub: the last upload failed, output_dir has it all", upload, "End of training")
    args.distributed and multihost_utils.sync_global_devices("end")  # for JAX ends those that are 5 minutes late
    return 128 + max([stopping, *caught]) if stopping or caught else 0

def cli(argv: list[str]) -> int:
    """Runs `main`. What a user can mend is one line: status 2 for the command line, 1 for data or environment."""
    args = None
    try:
        args = parse_args(argv)
        return main(args)
    except (InputError, OSError, jax.errors.JaxRuntimeError) as error:  # the last as when memory is out
        print(" ".join(f"{Path(__file__).name}: error: {error}"[:2000].split()), file=sys.stderr, flush=True)
        args and args.distributed and os._exit(1)  # the other processes wait for this one, and it would for them
        return 1 if args else 2

if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
