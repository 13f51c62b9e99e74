#!/usr/bin/env python
"""Span-masked language modeling (T5, mT5, LongT5) with JAX/Flax on CPU, GPU or TPU.
The objective is T5's (Raffel et al., 2019, https://arxiv.org/abs/1910.10683, section 3.1.4): 15% of the tokens are
left out, in spans of 3 on average. In the input a sentinel stands for each span; the target is the sentinels, each
followed by its span.

    python t5_tokenizer_model.py --train_file corpus.txt --vocab_size 32000 --output_dir my-t5
    python run_t5_mlm_flax.py --output_dir=my-t5/trained --model_type=t5 --tokenizer_name=my-t5 \
        --train_file=corpus.txt --max_seq_length=512 --adafactor --learning_rate=0.005 --warmup_steps=2000
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
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
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
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from safetensors.numpy import save_file
from tensorboard.summary import Writer
from transformers import AutoConfig, AutoTokenizer, FlaxAutoModelForSeq2SeqLM, HfArgumentParser
from transformers.hf_argparser import HfArg

logger = logging.getLogger(__name__)
DROPOUT_PRNG = "rbg"  # the fast generator of jax.random; its bits depend on the key and the kind of device alone
IGNORE = -100  # the label of a token that is not predicted
PIECES = 8  # the logits of a batch are computed in so many, one after the other
FAMILIES = ("longt5", "mt5", "t5")  # of models with sentinels and relative positions
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
    train_ref_file: str | None = HfArg(default=None, help="Refused: spans are of tokens, not of words.")
    validation_ref_file: str | None = HfArg(default=None, help="Refused, too.")
    text_column_name: str | None = HfArg(default=None, help="Text column. Default: text, else the only string column.")
    validation_split_percentage: int = HfArg(default=5, help="Percent of train kept for evaluation, if none is given.")
    max_seq_length: int | None = HfArg(default=None, help="Tokens of an input. Default: the tokenizer's, up to 512.")
    mlm_probability: float = HfArg(default=0.15, help="Part of the tokens to leave out.")
    mean_noise_span_length: float = HfArg(default=3.0, help="Tokens left out in one place, on average.")
    max_train_samples: int | None = HfArg(default=None, help="Train on at most so many sequences; all are tokenized.")
    max_eval_samples: int | None = HfArg(default=None, help="Evaluate on at most so many sequences.")
    preprocessing_num_workers: int | None = HfArg(default=None, help="Processes that tokenize.")
    overwrite_cache: bool = HfArg(default=False, help="Tokenize anew, whatever the cache holds.")

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
    num_train_epochs: float = HfArg(default=3.0, help="Passes over the data; may be fractional.")
    max_steps: int = HfArg(default=-1, help="If positive: optimizer steps, in place of num_train_epochs.")
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
    eval_steps: int | None = HfArg(default=None, help="Steps between two evaluations. Default: those of an epoch.")
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
    require(not rest, f"unknown arguments: {' '.join(unknown) or 'a value without a flag'}")
    args.do_train, args.do_eval = args.do_train or not args.do_eval, args.do_eval or not args.do_train
    args.hub_options = {name: getattr(args, name) for name in ("cache_dir", "token", "trust_remote_code")}
    if not args.do_train and (Path(args.output_dir) / "flax_model.msgpack").is_file():
        args.model_name_or_path = args.model_name_or_path or args.output_dir
    return check_args(args)

def check_args(args):
    """Raises InputError for numbers out of range, and for flags that exclude or need each other."""
    for names, meaning, holds in (
        ("per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps logging_steps eval_steps "
         "save_steps save_total_limit max_train_samples max_eval_samples preprocessing_num_workers",
         "at least 1", lambda x: x >= 1),
        ("max_seq_length", "at least 3", lambda x: x >= 3),  # a token, a sentinel and eos
        ("mean_noise_span_length", "at least 1", lambda x: 1 <= x < math.inf),
        ("max_steps", "at least 1, or -1", lambda x: x >= 1 or x == -1),
        ("warmup_steps learning_rate weight_decay max_grad_norm", "at least 0", lambda x: 0 <= x < math.inf),
        ("num_train_epochs adam_epsilon", "above 0", lambda x: 0 < x < math.inf),
        ("adam_beta1 adam_beta2", "at least 0 and below 1", lambda x: 0 <= x < 1),
        ("mlm_probability", "above 0 and below 1", lambda x: 0 < x < 1),
        ("validation_split_percentage", "between 0 and 99", lambda x: 0 <= x <= 99),
        ("output_dir", "a local folder", lambda x: "://" not in x),
        ("seed", "between 0 and 4294967295", lambda x: 0 <= x < 2**32)):
        for name, value in ((name, getattr(args, name)) for name in names.split()):
            require(value is None or holds(value), f"--{name} {value}: it must be {meaning}")
    model = args.model_name_or_path or (args.do_train and (args.config_name or args.model_type))
    file, name, tokenizer = args.train_file or args.validation_file, args.dataset_name, args.tokenizer_name
    require(model, "no model: give --model_name_or_path, or, to train from scratch, --config_name or --model_type")
    require(tokenizer or args.model_name_or_path, "no tokenizer: give --tokenizer_name or --model_name_or_path")
    require(args.model_type in (None, *FAMILIES), f"--model_type {args.model_type}: not one of {', '.join(FAMILIES)}")
    require(file or name, "no data: give --dataset_name or --train_file")
    require(not (file and name), f"two data sources: --dataset_name {name} and {file}")
    require(args.train_file or name or not args.do_train, "--validation_file needs --train_file, or --do_eval alone")
    for split in ("train", "validation"):
        refs = getattr(args, f"{split}_ref_file")
        require(not refs, f"--{split}_ref_file {refs}: spans are of tokens, words are not marked here; leave it out")
    return args

def noise_counts(length: int, noise_density: float, mean_noise_span_length: float) -> tuple[int, int]:
    """How many of `length` tokens are left out, and in how many spans, each with a token at least before it."""
    num_noise = min(max(round(length * noise_density), 1), length - 1)
    return num_noise, min(max(round(num_noise / mean_noise_span_length), 1), num_noise, length - num_noise)

def compute_input_and_target_lengths(inputs_length: int, noise_density: float, mean_noise_span_length: float):
    """How many tokens fill an input of `inputs_length`, sentinels and eos included, and the length of their target."""
    def lengths(num_tokens):
        num_noise, num_spans = noise_counts(num_tokens, noise_density, mean_noise_span_length)
        return num_tokens - num_noise + num_spans + 1, num_noise + num_spans + 1
    num_tokens = 1 + bisect_right(range(2, 2**40), inputs_length, key=lambda num_tokens: lengths(num_tokens)[0])
    return num_tokens, lengths(num_tokens)[1]

def random_lengths(draws: np.ndarray, num_parts: int) -> np.ndarray:
    """Splits n + 1 tokens of each row into `num_parts`, all ways alike, by n 64-bit `draws`: [rows, parts] int64. The
    gaps with the smallest draws are cut; their numbers, in the lowest bits, tell them apart and which they are."""
    num_gaps, num_cuts = draws.shape[1], num_parts - 1
    bits = num_gaps.bit_length()
    keys = draws << np.uint64(bits) | np.arange(num_gaps, dtype=np.uint64)
    keys = np.partition(keys, num_cuts - 1, axis=1)[:, :num_cuts] if num_cuts else keys[:, :0]
    cuts = np.sort((keys & np.uint64(2**bits - 1)).astype(np.int64), axis=1) + 1
    return np.diff(cuts, axis=1, prepend=0, append=num_gaps + 1)

@dataclass
class FlaxDataCollatorForT5MLM:
    """T5's span corruption of a whole batch at once. Rows of `max_length` tokens become inputs of `inputs_length` (one
    less if that is even and spans are as many as tokens between them) and targets of `targets_length`. What is left
    out and what stays are split at random into spans, which alternate, first one that stays. A token takes one 64-bit
    draw: row r starts at draw r * max_length."""
    tokenizer: transformers.PreTrainedTokenizerBase
    inputs_length: int
    noise_density: float = 0.15
    mean_noise_span_length: float = 3.0
    decoder_start_token_id: int = 0
    def __post_init__(self):
        options = (self.noise_density, self.mean_noise_span_length)
        self.max_length, self.targets_length = compute_input_and_target_lengths(self.inputs_length, *options)
        self.num_noise, self.num_spans = noise_counts(self.max_length, *options)
        name, vocabulary = self.tokenizer.name_or_path, self.tokenizer.get_vocab()
        require(self.tokenizer.eos_token_id is not None, f"{name}: it has no eos token")
        ids = {token.lstrip("▁"): i for token, i in vocabulary.items() if "<extra_id_" in token}  # mT5's have the mark
        sentinels = [ids[token] for i in range(len(ids)) if (token := f"<extra_id_{i}>") in ids]
        message = f"{len(sentinels)} sentinels <extra_id_...>, and {self.inputs_length} tokens have {self.num_spans}"
        message = f"{name}: it has {message} spans; lower --max_seq_length or raise --mean_noise_span_length"
        require(len(sentinels) >= self.num_spans, message)
        self.sentinels, self.eos_token_id = np.array(sentinels[: self.num_spans]), self.tokenizer.eos_token_id
    def with_sentinels(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """`tokens` with sentinels so as to be at `positions`, and with eos: [rows, length + spans + 1] int32."""
        rows = np.arange(len(positions))[:, None]
        result = np.full((len(rows), tokens.size // len(rows) + self.num_spans + 1), -1, np.int32)
        result[rows, positions], result[:, -1] = self.sentinels, self.eos_token_id
        result[result == -1] = tokens
        return result
    def __call__(self, examples: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """`input_ids` [rows, max_length] int32 to those of the encoder, with `attention_mask`, [rows, inputs_length],
        and to `labels` and `decoder_input_ids`, which are the labels one later, [rows, targets_length] int32."""
        input_ids, spans = examples["input_ids"], np.arange(self.num_spans)
        draws = rng.bit_generator.random_raw(input_ids.size).reshape(input_ids.shape)
        noise = random_lengths(draws[:, : self.num_noise - 1], self.num_spans)
        plain = random_lengths(draws[:, self.num_noise : -1], self.num_spans)
        is_noise = np.tile([False, True], plain.size).repeat(np.stack([plain, noise], axis=-1).ravel())
        is_noise = is_noise.reshape(input_ids.shape)
        labels = self.with_sentinels(input_ids[is_noise], noise.cumsum(axis=1) - noise + spans)
        input_ids = self.with_sentinels(input_ids[~is_noise], plain.cumsum(axis=1) + spans)
        decoder_input_ids = np.roll(labels, 1, axis=1)
        decoder_input_ids[:, 0] = self.decoder_start_token_id
        return {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids),
                "labels": labels, "decoder_input_ids": decoder_input_ids}

def mend_clip():
    """Transformers 4.57's Flax T5, whose code mT5 uses, and LongT5 call `jnp.clip(x, a_max=...)`, and jax 0.10 removed
    that argument: they get a `jax.numpy` that has it still. Can go when a Transformers with Flax does without it."""
    for name in ("t5", "longt5"):
        module = import_module(f"transformers.models.{name}.modeling_flax_{name}")
        clip = lambda x, a_min=None, a_max=None: jnp.clip(x, a_min, a_max)  # noqa: E731
        module.jnp = SimpleNamespace(**{**vars(jnp), "clip": clip})

def loss_sums(params, batch, model, dropout_rng=None):
    """Cross-entropy in float32 of the labels other than -100, summed, and the sums that means are of. In `batch` are
    input_ids and attention_mask, [batch, inputs] int32, labels and decoder_input_ids, [batch, targets] int32. The
    logits come in PIECES, one after the other, and again in the backward pass; the model's own are not used."""
    train, inputs = dropout_rng is not None, {name: x for name, x in batch.items() if name != "labels"}
    options = {"params": params, "dropout_rng": dropout_rng, "output_hidden_states": True, "return_dict": True}
    states, labels = model(**inputs, train=train, **options).decoder_hidden_states[-1], batch["labels"].reshape(-1)
    tied, scale = model.config.tie_word_embeddings, model.config.d_model**-0.5
    kernel = params["shared"]["embedding"].T * scale if tied else params["lm_head"]["kernel"]
    @jax.checkpoint
    def of_token(token):
        logits, label = jnp.dot(token[0], kernel.astype(model.dtype), preferred_element_type=jnp.float32), token[1]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(label, 0))
        found = {"loss": jnp.where(label != IGNORE, loss, 0), "predicted": label != IGNORE}
        return found if train else {**found, "accuracy": logits.argmax() == label}
    tokens = (states.reshape(-1, len(kernel)).astype(model.dtype), labels)  # T5's LayerNorm makes them float32
    sums = jax.lax.map(of_token, tokens, batch_size=math.ceil(labels.size / PIECES))
    sums = {name: x.sum(dtype=jnp.float32) for name, x in sums.items()}
    return sums["loss"], sums

def load_texts(args):
    """Training and evaluation texts, rows with one column "text"; None where there are none."""
    options = args.hub_options if datasets.__version__ < "4" else {"cache_dir": args.cache_dir, "token": args.token}
    builders = {"txt": "text", "json": "json", "jsonl": "json", "csv": "csv", "parquet": "parquet"}
    source, splits, load = f"--dataset_name {args.dataset_name}", {}, partial(datasets.load_dataset, **options)
    if args.dataset_name:
        splits = dict(explain(f"{source}: unreadable", load, args.dataset_name, args.dataset_config_name))
    for split in ("train", "validation"):
        file = getattr(args, f"{split}_file")
        if file:
            source, kind = f"--{split}_file {file}", Path(file).suffix.lower().lstrip(".")
            require(kind in builders, f"{source}: its extension must be one of {', '.join(builders)}")
            splits[split] = explain(f"{source}: unreadable", load, builders[kind], data_files=[file], split="train")
        if split in splits:
            splits[split] = text_column(splits[split], args.text_column_name, source)
    train, validation = splits.get("train"), splits.get("validation")
    require(train or (validation and not args.do_train), f"{source}: it has no training data, only {list(splits)}")
    if validation is None:
        count = len(train) * args.validation_split_percentage // 100
        message = f"--validation_split_percentage {args.validation_split_percentage} of {len(train)} texts is {count}"
        require(0 < count < len(train) or not args.do_eval, f"{message}: raise it, or give --validation_file")
        train, validation = train.select(range(count, len(train))), train.select(range(count))
    return train, validation

def text_column(dataset, wanted: str | None, source: str):
    """The text column alone, as "text"."""
    kinds = {name: str(getattr(feature, "dtype", feature)) for name, feature in dataset.features.items()}
    strings = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    name = wanted or ("text" if "text" in kinds else strings[0] if len(strings) == 1 else None)
    require(name in kinds, f"{source}: no column {name or 'that must be text'}; --text_column_name of {list(kinds)}?")
    require(name in strings, f"{source}: column {name} holds {kinds[name]}, not text")
    return dataset.select_columns([name]).rename_columns({name: "text"})

def encode(batch, tokenizer):
    """Texts to `input_ids`, each as the tokenizer ends it; blank ones are left out."""
    texts = [text for text in batch["text"] if text and not text.isspace()]
    return {"input_ids": tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"] if texts else []}

class Sequences(NamedTuple):
    """Tokenized sequences end to end, so that a batch is one NumPy gather."""
    input_ids: np.ndarray  # [tokens] int32
    starts: np.ndarray  # [sequences] int64, as `ends`
    ends: np.ndarray

def tokenize(dataset, tokenizer, max_length: int, args, limit: int | None, what: str) -> Sequences:
    """Blocks of `max_length` tokens out of all texts end to end."""
    encoded = dataset.map(
        partial(encode, tokenizer=tokenizer), batched=True, remove_columns=dataset.column_names,
        features=datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))}),
        num_proc=args.preprocessing_num_workers, load_from_cache_file=not args.overwrite_cache, desc=f"{what} data")
    require(len(encoded), f"the {what} data has no text: all of its {len(dataset)} rows are blank")
    chunks = encoded.data.column("input_ids").chunks
    input_ids = np.concatenate([chunk.flatten().to_numpy() for chunk in chunks])
    ends = np.arange(max_length, len(input_ids) + 1, max_length)[:limit]
    require(len(ends), f"too little {what} data: {len(input_ids)} tokens do not fill a block of {max_length}")
    return Sequences(input_ids, ends - max_length, ends)

def make_batch(sequences, rows, collator, seed, first_row: int, shape: tuple[int, ...]):
    """This process's part of the global batch of `rows`: arrays [local devices, *shape, length] int32. Rows of -1 fill
    up a partial batch and have no labels. `first_row` counts the rows before in the draws of `seed`."""
    local = np.split(rows, jax.process_count())[jax.process_index()]
    first_row += jax.process_index() * len(local)
    input_ids = sequences.input_ids[sequences.starts[local, None] + np.arange(collator.max_length)]
    rng = np.random.Generator(np.random.PCG64(seed).advance(first_row * collator.max_length))
    batch = collator({"input_ids": input_ids}, rng)
    batch["labels"][local < 0] = IGNORE
    return {name: array.reshape(jax.local_device_count(), *shape, -1) for name, array in batch.items()}

def train_batches(sequences, collator, seed: int, steps: range, shape: tuple[int, int]):
    """The batches of `steps`, each a function of the seed and its number; an epoch is a permutation of all rows."""
    num_rows, batch_size = len(sequences.ends), jax.device_count() * math.prod(shape)
    permutation = lru_cache(1)(lambda epoch: np.random.default_rng((seed, 0, epoch)).permutation(num_rows))
    for step in steps:
        epoch, index = divmod(step, num_rows // batch_size)
        rows = permutation(epoch)[index * batch_size : (index + 1) * batch_size]
        yield make_batch(sequences, rows, collator, (seed, 1, step), 0, shape)

def eval_batches(sequences, collator, seed: int, per_device_batch_size: int):
    """Every row once, masked alike in every evaluation and on any number of devices."""
    num_rows, batch_size = len(sequences.ends), jax.device_count() * per_device_batch_size
    for start in range(0, num_rows, batch_size):
        rows = np.where((rows := np.arange(start, start + batch_size)) < num_rows, rows, -1)
        yield make_batch(sequences, rows, collator, (seed, 2), start, (per_device_batch_size,))

def prefetch(batches, size: int = 2, transform=None):
    """`batches`, on the devices unless `transform` is given, made in a background thread up to `size` ahead of use."""
    batches = map(transform or shard, batches)
    with ThreadPoolExecutor(1) as pool:
        pending = [pool.submit(next, batches, None) for _ in range(size)]
        while (batch := pending.pop(0).result()) is not None:
            pending.append(pool.submit(next, batches, None))
            yield batch

def load_config_and_tokenizer(args):
    """The config, its vocabulary as large as the tokenizer's at least, the tokenizer, and the length of inputs."""
    name, load = args.config_name or args.model_name_or_path, partial(AutoConfig.from_pretrained, **args.hub_options)
    config = explain(f"{name} has no config", load, name) if name else transformers.CONFIG_MAPPING[args.model_type]()
    found = config.model_type
    require(args.model_type in (None, found), f"--model_type {args.model_type}: {name} is of type {found}")
    require(found in FAMILIES, f"{name}: it is of type {found}, not one of {', '.join(FAMILIES)}")
    name = args.tokenizer_name or args.model_name_or_path
    load = partial(AutoTokenizer.from_pretrained, use_fast=args.use_fast_tokenizer, **args.hub_options)
    tokenizer = explain(f"{name} has no tokenizer", load, name)
    if len(tokenizer) > config.vocab_size:  # JAX would clamp the ids beyond the table without a word
        message = f"the tokenizer of {name} has {len(tokenizer)} tokens, the model's table {config.vocab_size}"
        require(not args.model_name_or_path, f"{message}: they do not belong together")
        logger.warning(f"{message}: the table is made larger.")
        config.vocab_size = len(tokenizer)
    if not getattr(config, "scale_decoder_outputs", found != "mt5" or (config.transformers_version or "4") < "5"):
        config.tie_word_embeddings = False  # of version 1.1 and mT5, which Transformers 5 does not say any more
    if config.decoder_start_token_id is None:
        config.decoder_start_token_id = config.pad_token_id  # as T5's own configs have it
    chosen = min(tokenizer.model_max_length, getattr(config, "n_positions", 512))
    args.max_seq_length or logger.info(f"--max_seq_length is {chosen}, for positions are relative and set no limit.")
    return config, tokenizer, args.max_seq_length or chosen

def load_model(args, config):
    """The Flax model, without parameters, and its float32 parameters; those not pretrained come from one program."""
    options, name, params = {"config": config, "dtype": getattr(jnp, args.dtype)}, args.model_name_or_path, {}
    model = explain("the config makes no model", FlaxAutoModelForSeq2SeqLM.from_config, **options, _do_init=False)
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
    set_up(args)
    is_writer = not args.distributed or jax.process_index() == 0  # no devices yet: data is read by forked processes
    output_dir, stopping, caught = Path(args.output_dir), 0, []  # caught: signals, for the loop to stop at
    checkpoints = find_checkpoints(args) if is_writer else []
    upload = connect_hub(args) if args.push_to_hub and is_writer else None
    config, tokenizer, inputs_length = load_config_and_tokenizer(args)
    options = (args.mlm_probability, args.mean_noise_span_length, config.decoder_start_token_id)
    collator = FlaxDataCollatorForT5MLM(tokenizer, inputs_length, *options)
    max_length = collator.max_length
    train_texts, eval_texts = load_texts(args)
    train_set = args.do_train and tokenize(train_texts, tokenizer, max_length, args, args.max_train_samples, "train")
    eval_set = args.do_eval and tokenize(eval_texts, tokenizer, max_length, args, args.max_eval_samples, "evaluation")
    shape = (args.gradient_accumulation_steps, args.per_device_train_batch_size)
    batch_size, num_sequences = jax.device_count() * math.prod(shape), len(train_set.ends) if train_set else 0
    steps_per_epoch, sizes = num_sequences // batch_size, f"{num_sequences:,} sequences of {max_length} tokens"
    sizes += f" (inputs of {inputs_length}, targets of {collator.targets_length})"
    require(steps_per_epoch or not args.do_train, f"too little training data: {sizes}, and a batch takes {batch_size}")
    num_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)

    mend_clip()
    model, params = load_model(args, config)
    optimizer, schedule = make_optimizer(args, num_steps) if args.do_train else (optax.identity(), None)
    state = jax.device_get(jax.jit(partial(TrainState.create, apply_fn=None, tx=optimizer))(params=params))
    run = json.loads(config.to_json_string()) | {"transformers_version": None, "architectures": None}
    run |= {"batch_size": batch_size, "optimizer": "Adafactor" if args.adafactor else "AdamW"}
    state, step = restore(checkpoints, state, run) if checkpoints and args.do_train else (state, 0)
    state, step = jax.tree.map(multihost_utils.broadcast_one_to_all, (state, step))  # one by one: for less memory
    copies = lambda x: np.broadcast_to(x, (jax.local_device_count(), *np.shape(x)))  # noqa: E731
    state, step = shard(jax.tree.map(copies, state)), (first_step := int(step))
    saver = Saver(args, model, tokenizer, run, first_step, upload) if args.do_train and is_writer else None
    log = TrainingLog(output_dir)
    fixed = {"model": model}
    p_train_step = jax.pmap(partial(train_step, **fixed, seed=args.seed), "batch", donate_argnums=0)
    p_eval_step = jax.pmap(lambda *x: jax.lax.psum(loss_sums(*x, **fixed)[1], "batch"), "batch")
    evaluation = partial(evaluate, p_eval_step, eval_set, collator, args.seed, args.per_device_eval_batch_size)
    if args.do_train:
        count, where = sum(x.size for x in jax.tree.leaves(params)), f"{jax.device_count()} {jax.default_backend()}"
        logger.info(f"Training {count:,} parameters on {sizes}, steps {first_step} to {num_steps}; a step takes "
                    f"{where} devices x {shape[0]} x {shape[1]} = {batch_size}, an epoch {steps_per_epoch} steps.")
        zeros = totals = shard(dict.fromkeys(("loss", "predicted", "tokens", "grad_norm"), copies(np.float32(0))))
        for number in (signal.SIGTERM, signal.SIGINT):  # noted, for the loop to save and stop; a second one kills
            signal.signal(number, lambda number, _: (caught.append(number), signal.signal(number, signal.SIG_DFL)))
        batches = prefetch(train_batches(train_set, collator, args.seed, range(first_step, num_steps), shape))
        with saver or ThreadPoolExecutor(1):  # whose end, also by an error, waits for what is being written
            for step, batch in enumerate(batches, first_step + 1):
                state, totals, _ = *p_train_step(state, totals, batch), jax.block_until_ready(totals)  # a step ahead
                log.flush(schedule)
                stopping = max(caught, default=0)
                if jax.process_count() > 1:  # what any process was told; they ask each other every tenth step
                    stopping = int(multihost_utils.process_allgather(stopping).max()) if step % 10 == 0 else 0
                last = stopping or step == num_steps
                if step % args.logging_steps == 0 or step % args.save_steps == 0 or last:
                    log.due, totals = (step, totals), zeros
                if step % args.save_steps == 0 or last:
                    log.flush(schedule)
                    saver and saver.save(state, step, last)
                if stopping:
                    break
                if args.do_eval and step % (args.eval_steps or steps_per_epoch) == 0 and not last:
                    log.scalars(evaluation(state.params), step)
            step == first_step and saver and saver.save(state, step, last=True)  # the export may have been killed
            saver and explain(f"{output_dir}: the last save failed, those before are whole", saver.saving.result)
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
