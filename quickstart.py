#!/usr/bin/env python
"""From nothing to a trained masked-language model in a few minutes, without a download: `make quickstart`.

    python quickstart.py [--directory quickstart] [--corpus_only]

A language model takes a corpus (here the documentation that every Python carries), a tokenizer, a configuration, and
one command, `python run_mlm_flax.py`, which this script prints and runs. Everything lands in one folder:

    corpus/train.txt, validation.txt    one paragraph a line
    start/                              tokenizer and configuration: the model before training
    model/                              the trained model, its checkpoints, results and TensorBoard logs
    cache/                              tokenized data and compiled programs
"""

import argparse
import ast
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
LENGTH = 64  # tokens a training sequence: a small model learns sooner to look around in a short one
VOCAB_SIZE = (
    4000  # small enough for a corpus of a million tokens, and the output layer is most of the work
)
VALIDATION_PART = 20  # one document of so many
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # in the order of RoBERTa's ids

TRAINING = {  # flags of run_mlm_flax.py
    "max_seq_length": LENGTH,
    "mlm_probability": 0.25,  # more to learn from each token than at 0.15
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "learning_rate": 2.5e-3,
    "warmup_steps": 300,
    "weight_decay": 0.01,
    "adam_beta2": 0.98,
    "max_steps": 4000,
    "logging_steps": 200,
    "eval_steps": 500,
    "save_steps": 1000,
}

QUESTIONS = (
    "Return a list<mask> all the names.",
    "This method<mask> called when the connection is lost.",
    "This function is<mask> by the interpreter.",
)


# ------------------------------------------------------------------------------------------------------- corpus


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of `text`, each as one line with single spaces."""
    for lines in re.split(r"\n[ \t]*\n", text):
        if line := " ".join(lines.split()):
            yield line


def python_documents() -> Iterator[str]:
    """Help topics, docstrings and block comments of the Python that runs this and its standard library, in one order.

    Modules are parsed, never imported: importing some opens windows, browsers and files.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    topics = ast.parse((stdlib / "pydoc_data" / "topics.py").read_bytes())
    for node in topics.body:
        if isinstance(node, ast.Assign):
            yield from (text for _, text in sorted(ast.literal_eval(node.value).items()))
    for path in sorted(stdlib.rglob("*.py"), key=lambda path: path.relative_to(stdlib).as_posix()):
        if {"site-packages", "dist-packages"} & set(path.parts):
            continue
        try:
            with tokenize.open(path) as file, warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # about old escapes in the tests of Python's own parser
                source = file.read()
                tree = ast.parse(source)
        except (SyntaxError, ValueError):  # more of these tests
            continue
        yield from (
            ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, DOCUMENTED)
        )
        for block in re.findall(r"^(?:[ \t]*#.*\n){2,}", source, re.MULTILINE):
            yield re.sub(r"^[ \t]*#[#:!]*", "", block, flags=re.MULTILINE)


def build_corpus(directory: Path, documents: Iterable[str] | None = None) -> tuple[Path, Path]:
    """Writes train.txt and validation.txt, one paragraph a line, none twice; each twentieth document is validation."""
    seen, texts = set(), ([], [])
    for number, document in enumerate(
        python_documents() if documents is None else documents, start=1
    ):
        for paragraph in paragraphs(document):
            if paragraph not in seen:
                seen.add(paragraph)
                texts[number % VALIDATION_PART == 0].append(paragraph + "\n")
    directory.mkdir(parents=True, exist_ok=True)
    train_file, validation_file = directory / "train.txt", directory / "validation.txt"
    for path, lines in zip((train_file, validation_file), texts, strict=True):
        path.write_bytes("".join(lines).encode("utf-8", "replace"))
    return train_file, validation_file


# ------------------------------------------------------------------------------------- tokenizer, configuration


def train_tokenizer(
    files: list[Path], directory: Path, vocab_size: int = VOCAB_SIZE, max_length: int = LENGTH
):
    """Trains a byte-level BPE tokenizer and saves it as RoBERTa's, which puts <s> and </s> around every text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train(
        [str(file) for file in files],
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    directory.mkdir(parents=True, exist_ok=True)
    bpe.save_model(str(directory))
    tokenizer = RobertaTokenizerFast(
        vocab_file=str(directory / "vocab.json"),
        merges_file=str(directory / "merges.txt"),
        model_max_length=max_length,
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


def write_config(
    directory: Path, tokenizer, max_length: int = LENGTH, layers=2, width=128, heads=4
):
    """Writes the configuration of a small RoBERTa that fits `tokenizer`."""
    from transformers import RobertaConfig

    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=max_length
        + tokenizer.pad_token_id
        + 1,  # RoBERTa counts from the pad id on
        initializer_range=0.08,  # 1 / sqrt(width) or so: attention starts less uniform than with 0.02
        hidden_dropout_prob=0.0,  # a few passes over the data do not overfit
        attention_probs_dropout_prob=0.0,
        type_vocab_size=1,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config.save_pretrained(directory)
    return config


# ------------------------------------------------------------------------------------------- training and after


def training_command(
    directory: Path, train_file: Path, validation_file: Path, **changes
) -> list[str]:
    flags = {
        "output_dir": directory / "model",
        "overwrite_output_dir": True,
        "do_train": True,
        "do_eval": True,
        "model_type": "roberta",
        "config_name": directory / "start",
        "tokenizer_name": directory / "start",
        "cache_dir": directory / "cache",
        "train_file": train_file,
        "validation_file": validation_file,
        **TRAINING,
        **changes,
    }
    arguments = [
        f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in flags.items()
    ]
    return [sys.executable, str(HERE / "run_mlm_flax.py"), *arguments]


def frequency_loss(tokenizer, train_file: Path, validation_file: Path) -> float:
    """Mean cross-entropy of the validation tokens, in nats, if each is guessed by its frequency in training alone."""
    import numpy as np

    def counts(file):
        lines = file.read_text(encoding="utf-8").splitlines()
        encoded = tokenizer(
            lines, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return np.bincount(np.concatenate(encoded).astype(int), minlength=len(tokenizer))

    frequencies = counts(train_file) + 0.1  # a token not seen in training is rare, not impossible
    return float(
        -np.average(np.log(frequencies / frequencies.sum()), weights=counts(validation_file))
    )


def fill_mask(model_directory: Path, text: str, count: int = 3) -> list[tuple[str, float]]:
    """The `count` likeliest tokens in place of <mask>, with their probabilities."""
    import jax
    import numpy as np
    import transformers
    from transformers import AutoTokenizer, FlaxAutoModelForMaskedLM

    transformers.logging.set_verbosity_error()  # a notice that Transformers 5 has no Flax classes
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model = FlaxAutoModelForMaskedLM.from_pretrained(model_directory)
    inputs = tokenizer(text, return_tensors="np")
    (position,) = np.flatnonzero(inputs["input_ids"][0] == tokenizer.mask_token_id)
    probabilities = jax.nn.softmax(model(**inputs).logits[0, position])
    best = np.argsort(-probabilities)[:count]
    return [(tokenizer.decode(int(token)), float(probabilities[token])) for token in best]


def run(command: list[str]) -> int:
    """Runs `command` with its log folded to 80 columns. Ctrl-C is left to the command, which saves before it ends."""
    environment = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **os.environ}
    previous = signal.signal(signal.SIGINT, lambda number, frame: None)
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            print(textwrap.fill(line.rstrip(), 80, subsequent_indent=" " * 9), flush=True)
    signal.signal(signal.SIGINT, previous)
    return process.returncode


def heading(text: str):
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def shown(path: Path) -> str:
    """`path` as a person would type it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Train a small masked-language model on Python's own documentation."
    )
    parser.add_argument(
        "--directory", type=Path, default=Path("quickstart"), help="where all goes (%(default)s)"
    )
    parser.add_argument("--corpus_only", action="store_true", help="stop before the training")
    parser.add_argument(
        "--max_steps", type=int, default=TRAINING["max_steps"], help="of training (%(default)s)"
    )
    args = parser.parse_args(argv)
    start = time.monotonic()

    heading("1. Corpus, tokenizer, configuration")
    train_file, validation_file = build_corpus(args.directory / "corpus")
    sizes = [path.stat().st_size / 1e6 for path in (train_file, validation_file)]
    print(f"{sizes[0]:.1f} MB of Python's documentation to train on: {shown(train_file)}")
    print(f"{sizes[1]:.1f} MB to evaluate on: {shown(validation_file)}")
    tokenizer = train_tokenizer([train_file], args.directory / "start")
    config = write_config(args.directory / "start", tokenizer)
    guess = frequency_loss(tokenizer, train_file, validation_file)
    print(
        f"Byte-level BPE of {len(tokenizer)} tokens and a RoBERTa of {config.num_hidden_layers} layers of"
    )
    print(f"width {config.hidden_size}: {shown(args.directory / 'start')}")
    if args.corpus_only:
        return 0

    heading("2. Training")
    command = training_command(
        args.directory, train_file, validation_file, max_steps=args.max_steps
    )
    name, *flags = (
        shlex.quote(shown(Path(word)) if word.endswith(".py") else word) for word in command[1:]
    )
    lines = textwrap.wrap(
        f"python {name} {' '.join(flags)}", 74, break_long_words=False, break_on_hyphens=False
    )
    print(" \\\n    ".join(lines), flush=True)
    status = run(command)
    if status:
        return status

    heading("3. What it learned")
    model = args.directory / "model"
    for name, value in json.loads((model / "eval_results.json").read_text()).items():
        print(f"{name:20}{value:10.4f}")
    print(f"A guess by the frequency of tokens alone has a loss of {guess:.4f}.")
    for question in QUESTIONS:
        print(f"\n{question.replace('<mask>', ' ____')}")
        for token, probability in fill_mask(model, question):
            print(f"    {token:20}{probability:6.1%}")

    heading("4. Next")
    print(
        f"Look at the curves:   {shown(Path(sys.executable).parent / 'tensorboard')} --logdir {shown(model)}"
    )
    print("Train on your text:   the command above with --train_file=YOURS.txt")
    print(f"This took {time.monotonic() - start:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
