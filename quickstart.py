#!/usr/bin/env python
"""From nothing to a trained masked language model in a few minutes, without a download.

    make quickstart
    python quickstart.py [--directory quickstart] [--max_steps 2500] [--corpus_only]

A language model needs a corpus (here the documentation that is part of every Python), a tokenizer,
a configuration, and one command, `python run_mlm_flax.py`, which this script prints and runs. It
writes everything to one folder:

    corpus/train.txt, validation.txt    one paragraph a line
    start/                              tokenizer and configuration: the model before training
    model/                              the trained model, checkpoints, results, TensorBoard logs
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

# Tokens in a training sequence. A small model learns to use the context sooner if it is short.
LENGTH = 16

# Small enough for a corpus of a million tokens. The output layer is most of the work, so a small
# vocabulary also makes training fast.
VOCAB_SIZE = 4000

# Every twentieth document is for validation.
VALIDATION_INTERVAL = 20

# Syntax nodes that can have a docstring.
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

# In the order of RoBERTa's ids.
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

# Flags of run_mlm_flax.py.
TRAINING = {
    "max_seq_length": LENGTH,
    # Each sequence teaches more than with the usual 0.15.
    "mlm_probability": 0.25,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 128,
    "learning_rate": 4e-3,
    "warmup_steps": 200,
    "weight_decay": 0.01,
    "adam_beta2": 0.98,
    "max_steps": 2500,
    "logging_steps": 100,
    "eval_steps": 500,
    "save_steps": 1000,
}

# The trained model fills the gaps in these sentences.
QUESTIONS = (
    "Return a list<mask> all the names.",
    "This method<mask> called when the connection is lost.",
    "This function is<mask> by the interpreter.",
    "If the file does<mask> exist, raise an error.",
)


# ---------------------------------------------------------------------------------------
# Corpus
# ---------------------------------------------------------------------------------------


def paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of `text`, each as one line with single spaces."""
    for paragraph in re.split(r"\n[ \t]*\n", text):
        line = " ".join(paragraph.split())
        if line:
            yield line


def python_documents() -> Iterator[str]:
    """Yield the help topics of this Python, then the documentation in its standard library.

    The order is always the same.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    topics_module = ast.parse((stdlib / "pydoc_data" / "topics.py").read_bytes())
    for node in topics_module.body:
        if isinstance(node, ast.Assign):
            topics = ast.literal_eval(node.value)
            for name in sorted(topics):
                yield topics[name]
    for path in sorted(stdlib.rglob("*.py"), key=lambda path: path.relative_to(stdlib).as_posix()):
        if not {"site-packages", "dist-packages"} & set(path.parts):
            yield from source_documents(path)


def source_documents(path: Path) -> Iterator[str]:
    """Yield the docstrings of a Python file, then its comments of two or more lines.

    The file is parsed and not imported: some modules open windows, browsers or files on import.
    """
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            # Tests of Python's parser contain invalid escape sequences.
            warnings.simplefilter("ignore")
            source = file.read()
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        # Other tests of the parser cannot be parsed at all.
        return
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED):
            yield ast.get_docstring(node) or ""
    for comment in re.findall(r"^(?:[ \t]*#.*\n){2,}", source, re.MULTILINE):
        yield re.sub(r"^[ \t]*#[#:!]*", "", comment, flags=re.MULTILINE)


def build_corpus(directory: Path, documents: Iterable[str] | None = None) -> tuple[Path, Path]:
    """Write train.txt and validation.txt, one paragraph a line, and return their paths.

    Every twentieth document is for validation. A paragraph that occurs again is left out.
    """
    if documents is None:
        documents = python_documents()
    train_lines = []
    validation_lines = []
    seen = set()
    for number, document in enumerate(documents, start=1):
        is_validation = number % VALIDATION_INTERVAL == 0
        lines = validation_lines if is_validation else train_lines
        for paragraph in paragraphs(document):
            if paragraph not in seen:
                seen.add(paragraph)
                lines.append(paragraph + "\n")

    directory.mkdir(parents=True, exist_ok=True)
    train_file = directory / "train.txt"
    validation_file = directory / "validation.txt"
    for path, lines in ((train_file, train_lines), (validation_file, validation_lines)):
        path.write_bytes("".join(lines).encode("utf-8", "replace"))
    return train_file, validation_file


# ---------------------------------------------------------------------------------------
# Tokenizer and configuration
# ---------------------------------------------------------------------------------------


def train_tokenizer(
    files: list[Path], directory: Path, vocab_size: int = VOCAB_SIZE, max_length: int = LENGTH
):
    """Train a byte-level BPE tokenizer and save it as RoBERTa's.

    RoBERTa's tokenizer puts <s> and </s> around every text.
    """
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
    """Write the configuration of a small RoBERTa that fits `tokenizer`."""
    from transformers import RobertaConfig

    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        # RoBERTa numbers its positions from the pad id plus one.
        max_position_embeddings=max_length + tokenizer.pad_token_id + 1,
        # About 1 / sqrt(width). Attention starts less uniform than with the usual 0.02.
        initializer_range=0.08,
        # A few passes over the data do not overfit.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        type_vocab_size=1,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config.save_pretrained(directory)
    return config


# ---------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------


def training_command(
    directory: Path, train_file: Path, validation_file: Path, **changes
) -> list[str]:
    """Make the command that trains and evaluates. `changes` replaces or adds flags."""
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
    command = [sys.executable, str(HERE / "run_mlm_flax.py")]
    for flag, value in flags.items():
        command.append(f"--{flag}" if value is True else f"--{flag}={value}")
    return command


def print_command(command: list[str]) -> None:
    """Print a command of Python as a person would type it, on several lines."""
    _, script, *flags = command
    lines = [f"python {shlex.quote(shown(Path(script)))}"]
    for word in map(shlex.quote, flags):
        # A quoted word is not broken.
        if len(lines[-1]) + len(word) < 74:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    print(" \\\n    ".join(lines), flush=True)


def run(command: list[str]) -> int:
    """Run `command` and return its exit status.

    At a terminal, the command shows progress bars. Otherwise its log is wrapped to 80 columns.
    Ctrl-C is ignored here: the command handles it, and saves a checkpoint before it ends.
    """
    environment = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **os.environ}
    at_terminal = sys.stderr.isatty()
    stderr = None if at_terminal else subprocess.PIPE
    # Not SIG_IGN, which the command would inherit.
    previous = signal.signal(signal.SIGINT, lambda number, frame: None)
    with subprocess.Popen(command, env=environment, stderr=stderr, text=True) as process:
        if not at_terminal:
            for line in process.stderr:
                print(textwrap.fill(line.rstrip(), 80, subsequent_indent=" " * 9), flush=True)
    signal.signal(signal.SIGINT, previous)
    return process.returncode


# ---------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------


def frequency_loss(tokenizer, train_file: Path, validation_file: Path) -> float:
    """Compute the validation loss of a model that only knows the frequency of each token.

    This is the mean cross-entropy in nats. The frequencies are those of the training text.
    """
    import numpy as np

    def token_counts(file):
        lines = file.read_text(encoding="utf-8").splitlines()
        encoded = tokenizer(
            lines, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        token_ids = np.concatenate(encoded["input_ids"]).astype(int)
        return np.bincount(token_ids, minlength=len(tokenizer))

    # A token that is not in the training text is rare, not impossible.
    counts = token_counts(train_file) + 0.1
    log_probabilities = np.log(counts / counts.sum())
    return float(-np.average(log_probabilities, weights=token_counts(validation_file)))


def fill_mask(model_directory: Path, text: str, count: int = 3) -> list[tuple[str, float]]:
    """Find the `count` most likely tokens in place of <mask>, with their probabilities."""
    import jax
    import numpy as np
    import transformers
    from transformers import AutoTokenizer, FlaxAutoModelForMaskedLM

    # Hide the notice that Transformers 5 has no Flax classes.
    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model = FlaxAutoModelForMaskedLM.from_pretrained(model_directory)
    inputs = tokenizer(text, return_tensors="np")
    (position,) = np.flatnonzero(inputs["input_ids"][0] == tokenizer.mask_token_id)
    probabilities = jax.nn.softmax(model(**inputs).logits[0, position])
    best = np.argsort(-probabilities)[:count]
    return [(tokenizer.decode(int(token)), float(probabilities[token])) for token in best]


def read_curve(model_directory: Path, name: str) -> list[tuple[int, float]]:
    """Read the steps and values of a scalar from the TensorBoard logs of this run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # An earlier quickstart may have left its logs in the folder.
    newest = max(model_directory.glob("events.out.tfevents.*"), key=os.path.getmtime)
    events = EventAccumulator(str(newest), size_guidance={"tensors": 0}).Reload()
    return [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors(name)]


def print_curve(model_directory: Path) -> None:
    """Print the evaluations of the run, with a bar for the accuracy of each."""
    losses = dict(read_curve(model_directory, "eval_loss"))
    for step, accuracy in read_curve(model_directory, "eval_accuracy"):
        bar = "#" * round(150 * accuracy)
        line = f"step {step:5,}   loss {losses[step]:5.2f}   accuracy {accuracy:5.1%}   {bar}"
        print(line[:80].rstrip())


def print_results(model_directory: Path, baseline_loss: float) -> None:
    """Print the evaluation of the trained model, and how it fills the gaps of QUESTIONS."""
    results = json.loads((model_directory / "eval_results.json").read_text())
    print_curve(model_directory)
    print(f"\nLoss of a guess by the frequency of tokens alone: {baseline_loss:.4f}")
    print(f"Loss of this model:                               {results['eval_loss']:.4f}")
    for question in QUESTIONS:
        print(f"\n{question.replace('<mask>', ' ____')}")
        for token, probability in fill_mask(model_directory, question):
            print(f"    {token:20}{probability:6.1%}")


def print_heading(text: str) -> None:
    """Print an underlined heading."""
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def shown(path: Path) -> str:
    """Return `path` as a person would type it: relative, if it is below the current folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


# ---------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Build the corpus, train the model and show what it learned. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Train a small masked language model on Python's own documentation."
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path("quickstart"),
        help="Folder to write everything to. Default: %(default)s.",
    )
    parser.add_argument(
        "--corpus_only",
        action="store_true",
        help="Stop before the training, after the corpus, the tokenizer and the configuration.",
    )
    parser.add_argument(
        "--max_steps",
        type=int,
        default=TRAINING["max_steps"],
        help="Number of training steps. Default: %(default)s.",
    )
    args = parser.parse_args(argv)
    start_time = time.monotonic()

    print_heading("1. Corpus, tokenizer, configuration")
    train_file, validation_file = build_corpus(args.directory / "corpus")
    train_megabytes = train_file.stat().st_size / 1e6
    validation_megabytes = validation_file.stat().st_size / 1e6
    print(f"{train_megabytes:.1f} MB of Python's documentation to train on: {shown(train_file)}")
    print(f"{validation_megabytes:.1f} MB to evaluate on: {shown(validation_file)}")
    start_directory = args.directory / "start"
    tokenizer = train_tokenizer([train_file], start_directory)
    config = write_config(start_directory, tokenizer)
    baseline_loss = frequency_loss(tokenizer, train_file, validation_file)
    print(
        f"Byte-level BPE of {len(tokenizer)} tokens and a RoBERTa of "
        f"{config.num_hidden_layers} layers of\n"
        f"width {config.hidden_size}: {shown(start_directory)}"
    )
    if args.corpus_only:
        return 0

    print_heading("2. Training")
    command = training_command(
        args.directory, train_file, validation_file, max_steps=args.max_steps
    )
    print_command(command)
    status = run(command)
    if status:
        return status

    print_heading("3. What it learned")
    model_directory = args.directory / "model"
    print_results(model_directory, baseline_loss)

    print_heading("4. Next")
    tensorboard = shown(Path(sys.executable).parent / "tensorboard")
    print(f"Look at the curves:   {tensorboard} --logdir {shown(model_directory)}")
    print("Train on your text:   README.md, 'Train a RoBERTa on your text'")
    print("Train it for longer:  the command above with a larger --max_steps")
    print(f"This took {time.monotonic() - start_time:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
