#!/usr/bin/env python
"""Causal language modeling (GPT-2, GPT-Neo, OPT, Llama, Mistral, ...) with JAX/Flax on CPU, GPU or TPU.
The objective is GPT's (Radford et al., 2018, https://openai.com/index/language-unsupervised): every token is predicted
from those before it.

    python run_clm_flax.py --output_dir=out --config_name=gpt2 --tokenizer_name=gpt2 --train_file=corpus.txt
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
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
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
from transformers import AutoConfig, AutoTokenizer, FlaxAutoModelForCausalLM, HfArgumentParser
from transformers.hf_argparser import HfArg

logger = logging.getLogger(__name__)
DROPOUT_PRNG = "rbg"  # the fast generator of jax.random; its bits depend on the key and the kind of device alone
IGNORE = -100  # the label of a token that is not predicted
PIECES = 8  # the logits of a batch are computed in so many, one after the other
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
    text_column_name: str | None = HfArg(default=None, help="Text column. Default: text, else the only string column.")
    validation_split_percentage: int = HfArg(default=5, help="Percent of train kept for evaluation, if none is given.")
    block_size: int | None = HfArg(default=None, help="Tokens per sequence. Default: the model's limit, up to 1024.")
    keep_linebreaks: bool = HfArg(default=True, help="Lines of .txt files keep their breaks; with no_: they do not.")
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
        ("block_size", "at least 2", lambda x: x >= 2),
        ("max_steps", "at least 1, or -1", lambda x: x >= 1 or x == -1),
        ("warmup_steps learning_rate weight_decay max_grad_norm", "at least 0", lambda x: 0 <= x < math.inf),
        ("num_train_epochs adam_epsilon", "above 0", lambda x: 0 < x < math.inf),
        ("adam_beta1 adam_beta2", "at least 0 and below 1", lambda x: 0 <= x < 1),
        ("validation_split_percentage", "between 0 and 99", lambda x: 0 <= x <= 99),
        ("output_dir", "a local folder", lambda x: "://" not in x),
        ("seed", "between 0 and 4294967295", lambda x: 0 <= x < 2**32)):
        for name, value in ((name, getattr(args, name)) for name in names.split()):
            require(value is None or holds(value), f"--{name} {value}: it must be {meaning}")
    families = sorted(transformers.models.auto.modeling_flax_auto.FLAX_MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    model = args.model_name_or_path or (args.do_train and (args.config_name or args.model_type))
    file, name, tokenizer = args.train_file or args.validation_file, args.dataset_name, args.tokenizer_name
    require(model, "no model: give --model_name_or_path, or, to train from scratch, --config_name or --model_type")
    require(tokenizer or args.model_name_or_path, "no tokenizer: give --tokenizer_name or --model_name_or_path")
    require(args.model_type in (None, *families), f"--model_type {args.model_type}: not one of {', '.join(families)}")
    require(file or name, "no data: give --dataset_name or --train_file")
    require(not (file and name), f"two data sources: --dataset_name {name} and {file}")
    require(args.train_file or name or not args.do_train, "--validation_file needs --train_file, or --do_eval alone")
    return args

def next_token_collator(examples: dict[str, np.ndarray]):
    """Every token is to be predicted: adds `labels`, the tokens themselves, which the loss shifts by one."""
    return {**examples, "labels": examples["input_ids"].copy()}

def recompute_blocks():
    """Interceptor (`flax.linen.intercept_methods`) that keeps the input of each block of layers, no activations, and
    computes those again in the backward pass. In Transformers the modules that are named by a number are the blocks;
    few of these models know gradient checkpointing themselves."""
    inside = set()
    def interceptor(next_function, args, kwargs, context):
        path = context.module.path
        if context.method_name != "__call__" or not path or not path[-1].isdigit() or path in inside:
            return next_function(*args, **kwargs)
        inside.add(path)  # for the call in the next line comes here again
        outputs = nn.remat(lambda block, states: block(states, *args[1:], **kwargs))(context.module, args[0])
        inside.remove(path)
        return outputs
    return interceptor

def split_at_head(params, batch, model, dropout_rng):
    """Hidden states [batch * length, width], and the head, a function from some of them to logits. In Transformers a
    causal language model is a base model that returns a tuple, hidden states first, and a head that works on each
    position by itself. Here the base model runs first, and gives the head no position; when the head is called, the
    base model gives it what is to be worked on, and does not run."""
    options, kept, train = {"params": params, "return_dict": False}, {}, dropout_rng is not None
    own = {"opt": {"deterministic": not train}, "electra": {"train": train, "token_type_ids": 0 * batch["input_ids"]}}
    mode = own.get(model.config.model_type, {"train": train})  # in Flax, OPT knows no `train`, ELECTRA's default is 1
    def keep(next_function, args, kwargs, context):
        outputs, path = next_function(*args, **kwargs), context.module.path
        if len(path) != 1 or not isinstance(outputs, tuple):
            return outputs
        kept[path] = outputs[0]
        return (outputs[0][:, :0], *outputs[1:])
    def head(hidden_states):
        def give(next_function, args, kwargs, context):
            is_base = context.module.path in kept and context.method_name == "__call__"
            return (hidden_states[None],) if is_base else next_function(*args, **kwargs)
        with nn.intercept_methods(give):
            return model(jnp.zeros((1, len(hidden_states)), jnp.int32), **options)[0][0]
    with nn.intercept_methods(keep):
        logits = model(batch["input_ids"], batch["attention_mask"], dropout_rng=dropout_rng, **mode, **options)[0]
    if not kept:  # a model of other anatomy, whose head has run on every position
        return logits.reshape(-1, logits.shape[-1]), lambda logits: logits
    (states,) = kept.values()
    return states.reshape(-1, states.shape[-1]), head

def sum_of_pieces(function, xs):
    """The sum of `function` over the leading axis of `xs`. When it is differentiated, the gradients of a piece are
    computed together with its value, so that nothing of it is kept for the backward pass, or computed again there."""
    function, used = jax.closure_convert(function, *jax.tree.map(lambda x: x[0], xs))  # of the parameters, the head's
    @jax.custom_vjp
    def total(used, states, labels):
        return jax.lax.map(lambda piece: function(*piece, *used), (states, labels)).sum()
    def forward(used, states, labels):
        def add(sums, piece):
            value_and_grads = jax.value_and_grad(lambda used, states: function(states, piece[1], *used), (0, 1))
            value, (of_used, of_states) = value_and_grads(used, piece[0])
            return jax.tree.map(jnp.add, sums, (value, of_used)), of_states
        zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, used))
        (value, of_used), of_states = jax.lax.scan(add, zeros, (states, labels))
        return value, (of_used, of_states)
    total.defvjp(forward, lambda grads, scale: (*jax.tree.map(lambda x: x * scale.astype(x.dtype), grads), None))
    return total(used, *xs)

def loss_sums(params, batch, model, checkpointing, dropout_rng=None):
    """Cross-entropy in float32 of each token given those before it, summed, and the sums that means are of. `batch`
    holds input_ids, attention_mask and labels, [batch, length] int32. The logits never exist all at once: head, loss
    and their gradients are computed for one of PIECES at a time."""
    with nn.intercept_methods(recompute_blocks()) if checkpointing else nullcontext():
        states, head = split_at_head(params, batch, model, dropout_rng)
    labels = jnp.pad(batch["labels"][:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE).reshape(-1)
    predicted, surplus = (labels != IGNORE).sum(dtype=jnp.float32), -len(labels) % PIECES
    states = jnp.pad(states, ((0, surplus), (0, 0))).reshape(PIECES, -1, states.shape[-1])
    labels = jnp.pad(labels, (0, surplus), constant_values=IGNORE).reshape(PIECES, -1)
    def piece_loss(states, labels):
        logits = head(states).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return jnp.where(labels != IGNORE, losses, 0).sum()
    loss = sum_of_pieces(piece_loss, (states, labels))
    return loss, {"loss": loss, "predicted": predicted}

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
            lines = {"keep_linebreaks": args.keep_linebreaks} if kind == "txt" else {}
            load_file = partial(load, builders[kind], data_files=[file], split="train", **lines)
            splits[split] = explain(f"{source}: unreadable", load_file)
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
    """Texts to `input_ids`. Blank ones count, too: they are the blank lines of a text that keeps its line breaks."""
    texts = [text for text in batch["text"] if text]
    return {"input_ids": tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"] if texts else []}

class Sequences(NamedTuple):
    """Tokenized sequences end to end, so that a batch is one NumPy gather."""
    input_ids: np.ndarray  # [tokens] int32
    starts: np.ndarray  # [sequences] int64, as `ends`
    ends: np.ndarray

def tokenize(dataset, tokenizer, max_length: int, args, limit: int | None, what: str) -> Sequences:
    """Blocks of `max_length` tokens out of all texts end to end."""
    filled = any(row["text"] and not row["text"].isspace() for row in dataset)  # the first one ends the search
    require(filled, f"the {what} data has no text: all of its {len(dataset)} rows are blank")
    encoded = dataset.map(
        partial(encode, tokenizer=tokenizer), batched=True, remove_columns=dataset.column_names,
        features=datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))}),
        num_proc=args.preprocessing_num_workers, load_from_cache_file=not args.overwrite_cache, desc=f"{what} data")
    chunks = encoded.data.column("input_ids").chunks
    input_ids = np.concatenate([chunk.flatten().to_numpy() for chunk in chunks])
    ends = np.arange(max_length, len(input_ids) + 1, max_length)[:limit]
    require(len(ends), f"too little {what} data: {len(input_ids)} tokens do not fill a block of {max_length}")
    return Sequences(input_ids, ends - max_length, ends)

def make_batch(sequences, rows, collator, seed, first_row: int, shape: tuple[int, ...]):
    """This process's part of the global batch of `rows`: arrays [local devices, *shape, length] int32. Rows of -1 fill
    up a partial batch and have no labels. Nothing here is random: `seed` and `first_row` are for other objectives."""
    local = np.split(rows, jax.process_count())[jax.process_index()]
    input_ids = sequences.input_ids[sequences.starts[local, None] + np.arange(sequences.ends[0] - sequences.starts[0])]
    batch = collator({"input_ids": input_ids, "attention_mask": np.ones_like(input_ids)})
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

def check_config(config, name: str):
    """Raises InputError for what the Flax classes cannot do, and for what they ignore and PyTorch's obey: with that,
    pretrained weights would be trained as another function than they are, and exported as another than was trained."""
    found, head = config.model_type, config.hidden_size // config.num_attention_heads
    fits = found != "gptj" or config.rotary_dim in range(2, head + 1, 2)
    require(fits, f"{name}: set rotary_dim to an even number, {head} at most")
    require(found != "bloom" or config.n_head.bit_count() == 1, f"{name}: in Flax, n_head must be a power of two")
    rope, untied = {"rope_theta": 10000, "rope_type": "default"}, {"tie_word_embeddings": False, "head_dim": head}
    own = {"gptj": untied, "llama": untied, "mistral": untied, "electra": {"hidden_act": "gelu"},
        "gemma": {"hidden_act": getattr(config, "hidden_activation", None) or "gelu_pytorch_tanh"}}.get(found, {})
    for key, built_in in {  # in every family that has the key, then in this one
        "rope_theta": 10000, "rope_scaling": rope, "rope_parameters": rope, "mlp_bias": False, "enable_bias": True,
        "layer_norm_elementwise_affine": True, "position_embedding_type": "absolute", "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False, "layerdrop": 0, "decoder_layerdrop": 0, **own}.items():
        whole = {**rope, **value} if isinstance(value := getattr(config, key, built_in), dict) else value
        fits = whole == built_in or (value is None and built_in in (rope, head))
        require(fits, f"{name}: {key} is {value}, but Flax's {found} has {built_in} built in")

def load_config_and_tokenizer(args):
    """The config, its vocabulary as large as the tokenizer's at least, the tokenizer, and the sequence length."""
    name, load = args.config_name or args.model_name_or_path, partial(AutoConfig.from_pretrained, **args.hub_options)
    config = explain(f"{name} has no config", load, name) if name else transformers.CONFIG_MAPPING[args.model_type]()
    found, supported = config.model_type, type(config) in transformers.FLAX_MODEL_FOR_CAUSAL_LM_MAPPING
    alike = args.model_type in (None, found) or type(config) is transformers.CONFIG_MAPPING[args.model_type]
    require(alike, f"--model_type {args.model_type}: {name} is of type {found}")
    require(supported, f"{name}: type {found} has no causal language model in Flax")
    check_config(config, name)
    name = args.tokenizer_name or args.model_name_or_path
    load = partial(AutoTokenizer.from_pretrained, use_fast=args.use_fast_tokenizer, **args.hub_options)
    tokenizer = explain(f"{name} has no tokenizer", load, name)
    if len(tokenizer) > config.vocab_size:  # JAX would clamp the ids beyond the table without a word
        message = f"the tokenizer of {name} has {len(tokenizer)} tokens, the model's table {config.vocab_size}"
        require(not args.model_name_or_path, f"{message}: they do not belong together")
        logger.warning(f"{message}: the table is made larger.")
        config.vocab_size = len(tokenizer)
    if "roberta" in found or found in ("bert", "big_bird", "electra"):
        config.is_decoder = True  # or each token would see those that are to be predicted
    found == "big_bird" and config.update({"attention_type": "original_full"})  # the sparse one is never causal
    limit, what = getattr(config, "max_position_embeddings", 2**30), "positions"  # BLOOM's have no end
    limit -= "roberta" in found and config.pad_token_id + 1  # where theirs begin
    if found == "mistral":  # Flax takes no window for one of 0, and sees one token more than PyTorch beyond a window
        config.sliding_window = limit if config.sliding_window is None else config.sliding_window
        limit, what = min((limit, what), (config.sliding_window, "tokens in its sliding_window"))
    length = args.block_size or min(tokenizer.model_max_length, limit, 1024)
    require(1 < length <= limit, f"--block_size {length}: it must be at least 2, and the model has {limit} {what}")
    args.block_size or logger.info(f"--block_size is {length}: what tokenizer and model allow, at most 1024.")
    return config, tokenizer, length

def load_model(args, config):
    """The Flax model, without parameters, and its float32 parameters; those not pretrained come from one program."""
    options, name, params = {"config": config, "dtype": getattr(jnp, args.dtype)}, args.model_name_or_path, {}
    model = explain("the config makes no model", FlaxAutoModelForCausalLM.from_config, **options, _do_init=False)
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
    config, tokenizer, max_length = load_config_and_tokenizer(args)
    collator = next_token_collator
    train_texts, eval_texts = load_texts(args)
    train_set = args.do_train and tokenize(train_texts, tokenizer, max_length, args, args.max_train_samples, "train")
    eval_set = args.do_eval and tokenize(eval_texts, tokenizer, max_length, args, args.max_eval_samples, "evaluation")
    shape = (args.gradient_accumulation_steps, args.per_device_train_batch_size)
    batch_size, num_sequences = jax.device_count() * math.prod(shape), len(train_set.ends) if train_set else 0
    steps_per_epoch, sizes = num_sequences // batch_size, f"{num_sequences:,} sequences of {max_length} tokens"
    require(steps_per_epoch or not args.do_train, f"too little training data: {sizes}, and a batch takes {batch_size}")
    num_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)

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
    fixed = {"model": model, "checkpointing": args.gradient_checkpointing}
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
