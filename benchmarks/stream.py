#!/usr/bin/env python
"""How fast run_mlm_flax_stream.py delivers tokens, and how much memory it takes for streams of different lengths.

    python benchmarks/stream.py rate [--repetitions 5] [--json FILE]
    python benchmarks/stream.py memory [--millions 1 50] [--json FILE]

Rate: of batches that are ready for the devices (read, tokenized, cut, shuffled, masked) beside that of the tokenizer
alone on texts in memory, a thousand at a time, both on all cores. The texts are Python's documentation, as one
paragraph a line and as documents of 8 paragraphs in Parquet; the tokenizer is a byte-level BPE of 8,000 tokens. Both
take turns, and of the ratios of pairs the median is taken; that of CPU time is free of the other work on the machine.

Memory: the peak of the resident memory of whole runs over so many million tokens, each seen once, a million in a file.
Model and tokenizer are tiny, for the stream to be most of what grows, and steps are not dispatched ahead, for on a CPU
those in flight hold memory as long as the machine has other work.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
LENGTH, BATCH_SIZE = 128, 64
os.environ.update(JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1", JAX_CPU_ENABLE_ASYNC_DISPATCH="false")


# ------------------------------------------------------------------------------------------------------------- rate


def tokenize(tokenizer, texts: list[str]) -> int:
    """Returns the number of tokens."""
    batches = (texts[i : i + 1000] for i in range(0, len(texts), 1000))
    encoded = (
        tokenizer(batch, return_attention_mask=False, verbose=False)["input_ids"]
        for batch in batches
    )
    return sum(len(ids) for rows in encoded for ids in rows)


def deliver(tokenizer, builder: str, path: Path, num_tokens: int) -> int:
    """All batches of one epoch, from the first byte on; returns their tokens."""
    import datasets
    import jax
    import numpy as np

    import run_mlm_flax_stream as stream

    dataset = datasets.load_dataset(builder, data_files=[str(path)], split="train", streaming=True)
    texts = stream.BlockStream(*stream.text_column(dataset, "text", str(path)), tokenizer, LENGTH)
    position = {"epoch": 0, "state": None, "carried": [], "used": 0, "seen": 0}
    batch_size = BATCH_SIZE * jax.local_device_count()
    blocks = texts.blocks(position, batch_size, None, [0], np.zeros(0, np.int32))
    collator = stream.FlaxDataCollatorForLanguageModeling(tokenizer, LENGTH)
    steps = range(num_tokens // LENGTH // batch_size)
    batches = stream.train_batches(
        stream.shuffle(blocks, 1000, 42), collator, 42, steps, (1, BATCH_SIZE), {}
    )
    return sum(batch["input_ids"].size for batch in stream.prefetch(batches))


def rates(function, *args) -> tuple[float, float]:
    """Tokens a second of wall clock, and a second of all processors."""
    start, start_cpu = time.perf_counter(), time.process_time()
    count = function(*args)
    return count / (time.perf_counter() - start), count / (time.process_time() - start_cpu)


def measure_rate(repetitions: int, directory: Path) -> dict:
    import datasets
    import pyarrow
    import pyarrow.parquet
    from transformers import AutoTokenizer

    import quickstart

    datasets.disable_progress_bars()
    train_file, _ = quickstart.build_corpus(directory)
    quickstart.train_tokenizer(
        [train_file], directory / "start", vocab_size=8000, max_length=LENGTH
    )
    tokenizer = AutoTokenizer.from_pretrained(directory / "start")
    lines = (
        3 * train_file.read_text(encoding="utf-8").splitlines()
    )  # the end of an epoch reads some of the next
    documents = ["\n".join(lines[i : i + 8]) for i in range(0, len(lines), 8)]
    (directory / "lines.txt").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    table = pyarrow.table({"text": documents, "number": list(range(len(documents)))})
    pyarrow.parquet.write_table(table, directory / "documents.parquet")
    figures = {"cores": len(os.sched_getaffinity(0)), "datasets": datasets.__version__}
    print(
        f"Tokens a second on {figures['cores']} cores, medians, and the ratio of the two, by wall clock and CPU time"
    )
    print(f"{'':>12}{'tokenizer':>14}{'stream':>14}{'wall':>10}{'CPU':>10}")
    for name, builder, texts in (
        ("lines.txt", "text", lines),
        ("documents.parquet", "parquet", documents),
    ):
        num_tokens = tokenize(tokenizer, texts)  # which warms up, too
        streamed = deliver(tokenizer, builder, directory / name, num_tokens)
        assert num_tokens - streamed < LENGTH * (BATCH_SIZE + 1), "not all was delivered"
        found = {"tokenizer": [], "stream": []}
        for repetition in range(repetitions):
            runs = [("tokenizer", (tokenize, tokenizer, texts))]
            runs += [("stream", (deliver, tokenizer, builder, directory / name, num_tokens))]
            for which, arguments in runs if repetition % 2 else runs[::-1]:
                found[which].append(rates(*arguments))
        ratios = [
            [a / b for a, b in zip(*pair, strict=True)]
            for pair in zip(*reversed(found.values()), strict=True)
        ]
        wall, cpu = (statistics.median(column) for column in zip(*ratios, strict=True))
        alone, delivered = (
            statistics.median(rate for rate, _ in pairs) for pairs in found.values()
        )
        figures[name] = {
            "tokenizer": round(alone),
            "stream": round(delivered),
            "ratio": round(wall, 3),
        }
        figures[name]["ratio_of_cpu"] = round(cpu, 3)
        print(
            f"{name.partition('.')[0]:>12}{alone:>14,.0f}{delivered:>14,.0f}{wall:>10.2f}{cpu:>10.2f}",
            flush=True,
        )
    return figures


# ----------------------------------------------------------------------------------------------------------- memory


def write_stream(directory: Path, millions: int, num_words: int):
    """A file for each million tokens, in lines of 48 words, which with <s> and </s> are 50 tokens."""
    directory.mkdir()
    rng = random.Random(0)
    sample = [
        "".join(f"w{rng.randrange(num_words)} " for _ in range(48)) + "\n" for _ in range(1000)
    ]
    for index in range(millions):
        with (directory / f"train-{index}.txt").open("w") as file:
            for _ in range(20):
                file.writelines(rng.sample(sample, 1000))


def measure_memory(millions: list[int], directory: Path) -> dict:
    from training_scripts import LENGTH as SHORT
    from training_scripts import NUM_WORDS, TEMPLATE

    TEMPLATE.write_model(directory / "start")
    figures = {}
    print(f"{'million tokens':>16}{'peak MB':>10}{'seconds':>10}")
    for count in millions:
        write_stream(directory / f"{count}", count, NUM_WORDS)
        rows = 128
        command = [
            sys.executable,
            str(ROOT / "run_mlm_flax_stream.py"),
            f"--output_dir={directory / f'out-{count}'}",
        ]
        command += [
            f"--config_name={directory / 'start'}",
            f"--tokenizer_name={directory / 'start'}",
            "--do_train",
        ]
        command += [
            f"--dataset_name={directory / str(count)}",
            f"--max_seq_length={SHORT}",
            "--num_eval_samples=100",
        ]
        command += [
            f"--per_device_train_batch_size={rows}",
            f"--num_train_steps={count * 10**6 // (rows * SHORT)}",
        ]
        command += ["--shuffle_buffer_size=10000", "--save_steps=10000", "--logging_steps=100"]
        start = time.perf_counter()
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(errors)
        seconds = time.perf_counter() - start
        figures[f"{count} million tokens"] = {
            "peak_mb": round(usage.ru_maxrss / 1024),
            "seconds": round(seconds),
        }
        print(f"{count:>16}{usage.ru_maxrss / 1024:>10.0f}{seconds:>10.0f}", flush=True)
    return figures


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("rate", "memory"))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 50])
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
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
