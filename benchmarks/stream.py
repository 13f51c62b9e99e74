#!/usr/bin/env python
"""Measure how fast run_mlm_flax_stream.py delivers tokens, and its memory on streams of any length.

    python benchmarks/stream.py rate [--repetitions 5] [--json FILE]
    python benchmarks/stream.py memory [--millions 1 50] [--json FILE]

Rate: tokens per second in batches that are ready for the devices (read, tokenized, cut, shuffled,
masked), compared with the tokenizer alone on texts in memory, a thousand at a time. Both use all
cores. The texts are Python's documentation, as a text file with one paragraph a line, and as
documents of 8 paragraphs in Parquet. The tokenizer is a byte-level BPE of 8,000 tokens. Both
alternate, and the result is the median of the ratios of pairs. The ratio of CPU time does not
depend on other work on the machine.

Memory: the peak resident memory of whole runs over some million tokens, each seen once, with a
million in a file. Model and tokenizer are tiny, so that the stream is most of what could grow.
Steps are not dispatched asynchronously: on a CPU, dispatched steps hold memory for as long as the
machine has other work.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.update(JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1", JAX_CPU_ENABLE_ASYNC_DISPATCH="false")

LENGTH = 128
BATCH_SIZE = 64
MEMORY_BATCH_SIZE = 128
LINES_A_DOCUMENT = 8
TEXTS_A_CALL = 1000  # of the tokenizer


# ------------------------------------------------------------------------------------------ rate


class Source(NamedTuple):
    """Texts in memory and in a file, and the builder of `datasets` that reads the file."""

    path: Path
    builder: str
    texts: list[str]


def tokenize(tokenizer, texts: list[str]) -> int:
    """Tokenize texts in memory and return the number of tokens."""
    num_tokens = 0
    for start in range(0, len(texts), TEXTS_A_CALL):
        batch = texts[start : start + TEXTS_A_CALL]
        encoded = tokenizer(batch, return_attention_mask=False, verbose=False)
        num_tokens += sum(len(ids) for ids in encoded["input_ids"])
    return num_tokens


def deliver(tokenizer, source: Source, num_tokens: int) -> int:
    """Make all batches of one epoch from the file and return the number of their tokens."""
    import datasets
    import jax
    import numpy as np

    import run_mlm_flax_stream as stream

    path = str(source.path)
    dataset = datasets.load_dataset(
        source.builder, data_files=[path], split="train", streaming=True
    )
    texts = stream.select_text(dataset, "text", path)
    block_stream = stream.BlockStream(*texts, tokenizer, LENGTH)
    position = stream.start_of_epoch(0, carried=[])
    batch_size = BATCH_SIZE * jax.local_device_count()
    held_out = stream.HeldOut([0], np.zeros(0, np.int32))
    blocks = block_stream.blocks(position, batch_size, None, held_out)
    shuffled = stream.shuffle(blocks, 1000, 42)
    collator = stream.FlaxDataCollatorForLanguageModeling(tokenizer, LENGTH)
    steps = range(num_tokens // LENGTH // batch_size)
    progress = stream.StreamProgress(position)
    batches = stream.train_batches(shuffled, collator, 42, steps, (1, BATCH_SIZE), progress)
    return sum(batch["input_ids"].size for batch in stream.prefetch(map(stream.shard, batches)))


def tokens_per_second(function, *args) -> tuple[float, float]:
    """Measure a function that returns a number of tokens: its rate by wall clock and CPU time."""
    wall_begin = time.perf_counter()
    cpu_begin = time.process_time()
    num_tokens = function(*args)
    wall_seconds = time.perf_counter() - wall_begin
    cpu_seconds = time.process_time() - cpu_begin
    return num_tokens / wall_seconds, num_tokens / cpu_seconds


def write_sources(directory: Path) -> tuple:
    """Write the files, and return the tokenizer and the sources."""
    import pyarrow
    import pyarrow.parquet
    from transformers import AutoTokenizer

    import quickstart

    train_file, _ = quickstart.build_corpus(directory)
    start = directory / "start"
    quickstart.train_tokenizer([train_file], start, vocab_size=8000, max_length=LENGTH)
    tokenizer = AutoTokenizer.from_pretrained(start)

    # Three times the text, because the end of an epoch already reads some of the next one.
    lines = 3 * train_file.read_text(encoding="utf-8").splitlines()
    text_path = directory / "lines.txt"
    text_path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    documents = []
    for first in range(0, len(lines), LINES_A_DOCUMENT):
        documents.append("\n".join(lines[first : first + LINES_A_DOCUMENT]))
    parquet_path = directory / "documents.parquet"
    table = pyarrow.table({"text": documents, "number": list(range(len(documents)))})
    pyarrow.parquet.write_table(table, parquet_path)
    sources = [Source(text_path, "text", lines), Source(parquet_path, "parquet", documents)]
    return tokenizer, sources


def measure_source(tokenizer, source: Source, repetitions: int) -> dict[str, float]:
    """Measure the tokenizer alone and the stream on the same texts."""
    # These calls warm up, too.
    num_tokens = tokenize(tokenizer, source.texts)
    num_delivered = deliver(tokenizer, source, num_tokens)
    assert num_tokens - num_delivered < LENGTH * (BATCH_SIZE + 1), "not all was delivered"

    alone = []
    streamed = []
    for repetition in range(repetitions):
        # Which of the two comes first alternates, and the stream begins.
        if repetition % 2:
            alone.append(tokens_per_second(tokenize, tokenizer, source.texts))
        streamed.append(tokens_per_second(deliver, tokenizer, source, num_tokens))
        if repetition % 2 == 0:
            alone.append(tokens_per_second(tokenize, tokenizer, source.texts))

    wall_ratios = []
    cpu_ratios = []
    for alone_rates, streamed_rates in zip(alone, streamed, strict=True):
        wall_ratios.append(streamed_rates[0] / alone_rates[0])
        cpu_ratios.append(streamed_rates[1] / alone_rates[1])
    return {
        "tokenizer": round(statistics.median(wall for wall, _ in alone)),
        "stream": round(statistics.median(wall for wall, _ in streamed)),
        "ratio": round(statistics.median(wall_ratios), 3),
        "ratio_of_cpu": round(statistics.median(cpu_ratios), 3),
    }


def measure_rate(repetitions: int, directory: Path) -> dict:
    """Measure and print the rates on both files."""
    import datasets

    datasets.disable_progress_bars()
    tokenizer, sources = write_sources(directory)
    cores = len(os.sched_getaffinity(0))
    figures = {"cores": cores, "datasets": datasets.__version__}
    print(
        f"Tokens per second on {cores} cores, medians, and the ratio of the two,"
        " by wall clock and by CPU time"
    )
    print(f"{'':>12}{'tokenizer':>14}{'stream':>14}{'wall':>10}{'CPU':>10}")
    for source in sources:
        found = measure_source(tokenizer, source, repetitions)
        figures[source.path.name] = found
        columns = (
            f"{source.path.stem:>12}",
            f"{found['tokenizer']:>14,}",
            f"{found['stream']:>14,}",
            f"{found['ratio']:>10.2f}",
            f"{found['ratio_of_cpu']:>10.2f}",
        )
        print("".join(columns), flush=True)
    return figures


# ---------------------------------------------------------------------------------------- memory


def write_stream(directory: Path, millions: int, num_words: int):
    """Write a file for each million tokens.

    A line has 48 words, which are 50 tokens with <s> and </s>.
    """
    directory.mkdir()
    rng = random.Random(0)
    sample = []
    for _ in range(1000):
        words = [f"w{rng.randrange(num_words)} " for _ in range(48)]
        sample.append("".join(words) + "\n")
    for index in range(millions):
        with (directory / f"train-{index}.txt").open("w") as file:
            for _ in range(20):
                file.writelines(rng.sample(sample, 1000))


def run_and_measure(command: list[str]) -> tuple[float, float]:
    """Run a command; return its peak memory in MB and its seconds, or exit with its error."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(errors)
    return usage.ru_maxrss / 1024, time.perf_counter() - begin


def measure_memory(millions: list[int], directory: Path) -> dict:
    """Measure and print the peak memory of a run for each length of the stream."""
    from training_scripts import LENGTH as TINY_LENGTH
    from training_scripts import NUM_WORDS, TEMPLATE

    start = directory / "start"
    TEMPLATE.write_model(start)
    figures = {}
    print(f"{'million tokens':>16}{'peak MB':>10}{'seconds':>10}")
    for count in millions:
        data = directory / str(count)
        write_stream(data, count, NUM_WORDS)
        num_steps = count * 10**6 // (MEMORY_BATCH_SIZE * TINY_LENGTH)
        command = [
            sys.executable,
            str(ROOT / "run_mlm_flax_stream.py"),
            "--do_train",
            f"--output_dir={directory / f'out-{count}'}",
            f"--config_name={start}",
            f"--tokenizer_name={start}",
            f"--dataset_name={data}",
            f"--max_seq_length={TINY_LENGTH}",
            f"--per_device_train_batch_size={MEMORY_BATCH_SIZE}",
            f"--num_train_steps={num_steps}",
            "--num_eval_samples=100",
            "--shuffle_buffer_size=10000",
            "--save_steps=10000",
            "--logging_steps=100",
        ]
        peak_mb, seconds = run_and_measure(command)
        figures[f"{count} million tokens"] = {
            "peak_mb": round(peak_mb),
            "seconds": round(seconds),
        }
        print(f"{count:>16}{peak_mb:>10.0f}{seconds:>10.0f}", flush=True)
    return figures


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("rate", "memory"))
    parser.add_argument("--repetitions", type=int, default=5, help="pairs for `rate`")
    parser.add_argument(
        "--millions", type=int, nargs="+", default=[1, 50], help="million tokens for `memory`"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as directory:
        if args.what == "rate":
            figures = measure_rate(args.repetitions, Path(directory))
        else:
            figures = measure_memory(args.millions, Path(directory))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
