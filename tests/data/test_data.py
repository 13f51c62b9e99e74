"""The batches of run_mlm_flax.py have the tokens that the tokenizer gives line by line."""

import csv
import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

import run_mlm_flax as mlm

# As conftest.py sets it.
DEVICES = 8
LENGTH = 64
NO_VALIDATION = "--validation_split_percentage=0"


@pytest.fixture(scope="module")
def tokenizer(roberta_dir):
    return AutoTokenizer.from_pretrained(roberta_dir)


@pytest.fixture(scope="module")
def lines(corpus) -> list[str]:
    """2,300 lines of the corpus, none of them blank.

    That is more than one of the batches of 1,000 that datasets processes at a time.
    """
    text = (corpus / "train.txt").read_text(encoding="utf-8")
    starts = [line[:200] for line in text.splitlines() if line[:200].strip()]
    lines = [f"{number}: {start}" for number, start in enumerate((3 * starts)[:2300])]
    lines[3] = "She said, \"naïve\", 'twice', 日本語."
    lines[1500] = "a"
    assert len(lines) == 2300
    return lines


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def add_blank_lines(lines: list[str]) -> list[str]:
    """Return the lines with two blank lines after each, but only one after the last."""
    with_blanks = []
    for line in lines:
        with_blanks += [line, "", "  \t"]
    return with_blanks[:-1]


def parse(roberta_dir, *flags, do="--do_train"):
    argv = [
        f"--config_name={roberta_dir}",
        f"--tokenizer_name={roberta_dir}",
        "--output_dir=not-written",
        *map(str, flags),
    ]
    if do:
        argv.append(do)
    return mlm.parse_args(argv)


def read(
    roberta_dir,
    tokenizer,
    *flags,
    split: int = 0,
    limit=None,
    max_length: int = LENGTH,
    do="--do_train",
):
    """Return the sequences of the training data (split 0) or of the evaluation data (split 1)."""
    args = parse(roberta_dir, *flags, do=do)
    return mlm.tokenize(mlm.load_texts(args)[split], tokenizer, max_length, args, limit, "tested")


@dataclass
class Recorder(mlm.FlaxDataCollatorForLanguageModeling):
    """A collator that keeps the examples as they are before it masks them."""

    seen: list = field(default_factory=list)

    def __call__(self, examples, rng, group_size):
        self.seen.append({name: array.copy() for name, array in examples.items()})
        return super().__call__(examples, rng, group_size)


def in_order(sequences, tokenizer, count: int, column: str = "input_ids", max_length: int = LENGTH):
    """Return the values of a column in the order of the sequences, without padding.

    There must be `count` sequences, and the padding must be right.
    """
    collator = Recorder(tokenizer, max_length, whole_words=column == "continues_word")
    labels = [batch["labels"] for batch in mlm.eval_batches(sequences, collator, 0, 1)]
    assert sum(map(len, labels)) == DEVICES * math.ceil(count / DEVICES)
    rows = []
    for examples in collator.seen:
        mask = examples["attention_mask"]
        lengths = mask.sum(axis=1)
        assert (mask == (np.arange(mask.shape[1]) < lengths[:, None])).all()
        assert (examples["input_ids"][mask == 0] == tokenizer.pad_token_id).all()
        for row, length in zip(examples[column], lengths, strict=True):
            rows.append(row[:length].tolist())
    return rows[:count]


def split_into_blocks(values: list[int], length: int = LENGTH) -> list[list[int]]:
    """Return the full blocks of a list."""
    starts = range(0, len(values) - length + 1, length)
    return [values[start : start + length] for start in starts]


def blocks(tokenizer, texts: list[str], length: int = LENGTH) -> list[list[int]]:
    """Return the blocks of the concatenated texts, each of which the tokenizer encodes alone."""
    tokens = []
    for text in texts:
        tokens += tokenizer(text)["input_ids"]
    return split_into_blocks(tokens, length)


# ---------------------------------------------------------------------------------------
# Sequences
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [None, 2])
def test_blocks_are_all_texts_end_to_end(tmp_path, roberta_dir, tokenizer, lines, workers):
    file = write_lines(tmp_path / "train.txt", add_blank_lines(lines))
    expected = blocks(tokenizer, lines)
    flags = [f"--train_file={file}", NO_VALIDATION]
    if workers:
        flags.append(f"--preprocessing_num_workers={workers}")
    sequences = read(roberta_dir, tokenizer, *flags)
    assert in_order(sequences, tokenizer, len(expected)) == expected
    limited = read(roberta_dir, tokenizer, *flags, limit=13)
    assert in_order(limited, tokenizer, 13) == expected[:13]


@pytest.mark.parametrize(("count", "expected"), [(15, None), (16, 1), (31, 1), (32, 2)])
def test_a_last_block_that_is_full_is_kept(tmp_path, roberta_dir, tokenizer, count, expected):
    # The line has `count` tokens with <s> and </s>.
    file = write_lines(tmp_path / "train.txt", ["a" + (count - 3) * " a"])
    flags = [f"--train_file={file}", NO_VALIDATION]
    if expected:
        sequences = read(roberta_dir, tokenizer, *flags, max_length=16)
        assert len(in_order(sequences, tokenizer, expected, max_length=16)) == expected
    else:
        with pytest.raises(mlm.InputError, match="15 tokens"):
            read(roberta_dir, tokenizer, *flags, max_length=16)


def test_a_line_is_a_sequence(tmp_path, roberta_dir, tokenizer, lines):
    file = write_lines(tmp_path / "train.txt", add_blank_lines(lines))
    expected = [tokenizer(line, truncation=True, max_length=LENGTH)["input_ids"] for line in lines]
    # Some lines are short and some are truncated.
    assert {len(row) for row in expected} > {3, LENGTH}
    flags = [f"--train_file={file}", "--line_by_line", NO_VALIDATION]
    sequences = read(roberta_dir, tokenizer, *flags)
    assert in_order(sequences, tokenizer, len(lines)) == expected
    limited = read(roberta_dir, tokenizer, *flags, limit=17)
    assert in_order(limited, tokenizer, 17) == expected[:17]


@pytest.mark.parametrize("pad_to_max_length", [False, True])
def test_padding(tmp_path, roberta_dir, tokenizer, pad_to_max_length):
    """A batch is padded to a multiple of 16 that its longest sequence needs, or to max_seq_length.

    The multiple of 16 is at most max_seq_length.
    """
    max_length = 40
    # The number of words in each line, for batches of 8 lines and a last batch of one.
    num_words = [1, 2, 3, 1, 2, 3, 1, 2] + [25] + 7 * [2] + [39] + 7 * [1] + [80]
    file = write_lines(tmp_path / "train.txt", ["a" + (count - 1) * " a" for count in num_words])
    flags = [f"--train_file={file}", "--line_by_line", NO_VALIDATION]
    if pad_to_max_length:
        flags.append("--pad_to_max_length")
    sequences = read(roberta_dir, tokenizer, *flags, max_length=max_length)
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, max_length)
    batches = list(mlm.eval_batches(sequences, collator, 0, 1))
    assert len(tokenizer("a a a")["input_ids"]) == 5
    for batch in batches:
        for name, array in batch.items():
            assert array.dtype == np.int32, name
    lengths = [batch["input_ids"].shape[-1] for batch in batches]
    assert lengths == (4 * [40] if pad_to_max_length else [16, 32, 40, 40])
    assert [batch["attention_mask"].sum(axis=-1).max() for batch in batches[:3]] == [5, 27, 40]
    for batch in batches:
        assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def write_format(kind: str, directory: Path, lines: list[str]) -> str:
    """Write `lines` as a file or as the folder of a dataset, and return the flag that reads it."""
    records = [{"text": line, "number": number} for number, line in enumerate(lines)]
    path = directory / f"train.{kind.rpartition(' ')[2]}"
    if kind == "txt":
        write_lines(path, lines)
    elif kind in ("jsonl", "lines in json"):
        # Every other line escapes its non-ASCII characters.
        dumped = []
        for number, record in enumerate(records):
            dumped.append(json.dumps(record, ensure_ascii=number % 2 == 0))
        write_lines(path, dumped)
    elif kind == "json":
        path.write_text(json.dumps(records), encoding="utf-8")
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["number", "text"])
            writer.writeheader()
            writer.writerows(records)
    elif kind == "parquet":
        table = pyarrow.table({"text": lines, "number": list(range(len(lines)))})
        pyarrow.parquet.write_table(table, path, row_group_size=300)
    elif kind == "folder":
        folder = directory / "dataset"
        folder.mkdir()
        for split, texts in (("train", lines), ("validation", ["for validation"])):
            table = pyarrow.table({"text": texts})
            pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
        return f"--dataset_name={folder}"
    return f"--train_file={path}"


@pytest.mark.parametrize(
    "kind", ["txt", "json", "lines in json", "jsonl", "csv", "parquet", "folder"]
)
def test_every_format_gives_the_same_sequences(tmp_path, roberta_dir, tokenizer, lines, kind):
    flag = write_format(kind, tmp_path, lines[:1200])
    expected = blocks(tokenizer, lines[:1200])
    sequences = read(roberta_dir, tokenizer, flag, NO_VALIDATION)
    assert in_order(sequences, tokenizer, len(expected)) == expected


@pytest.mark.parametrize("line_by_line", [False, True])
def test_null_texts_and_texts_of_several_lines(tmp_path, roberta_dir, tokenizer, line_by_line):
    texts = [
        "first line\nsecond line\n\n  \nthird",
        None,
        "",
        " \n ",
        *(f"text {number}" for number in range(40)),
        None,
        "last",
    ]
    records = [json.dumps({"text": text}) for text in texts]
    file = write_lines(tmp_path / "train.jsonl", records)
    flags = [f"--train_file={file}", NO_VALIDATION]
    texts = [text for text in texts if text and text.strip()]
    if line_by_line:
        flags.append("--line_by_line")
        lines = [line for text in texts for line in text.split("\n") if line.strip()]
        expected = [tokenizer(line)["input_ids"] for line in lines]
    else:
        expected = blocks(tokenizer, texts, 16)
    sequences = read(roberta_dir, tokenizer, *flags, max_length=16)
    assert in_order(sequences, tokenizer, len(expected), max_length=16) == expected


@pytest.mark.parametrize(
    ("columns", "wanted", "found"),
    [
        (("title", "text"), None, "text"),
        (("body", "number"), None, "body"),
        (("title", "text"), "title", "title"),
        (("title", "body"), "body", "body"),
        (("title", "body"), None, None),
        (("title", "text"), "body", None),
        (("number", "text"), "number", None),
        (("number",), None, None),
    ],
)
def test_which_column_is_the_text(tmp_path, roberta_dir, columns, wanted, found):
    records = []
    for row in range(5):
        record = {name: f"{name} {row}" for name in columns}
        if "number" in columns:
            record["number"] = row
        records.append(json.dumps(record))
    file = write_lines(tmp_path / "train.jsonl", records)
    flags = [f"--train_file={file}", NO_VALIDATION]
    if wanted:
        flags.append(f"--text_column_name={wanted}")
    args = parse(roberta_dir, *flags)
    if found:
        assert list(mlm.load_texts(args)[0]["text"]) == [f"{found} {i}" for i in range(5)]
    else:
        with pytest.raises(mlm.InputError, match="column"):
            mlm.load_texts(args)


@pytest.mark.parametrize(("percentage", "count"), [(5, 10), (1, 2), (33, 66), (99, 198)])
def test_validation_data_is_the_start_of_train(tmp_path, roberta_dir, lines, percentage, count):
    file = write_lines(tmp_path / "train.txt", lines[:200])
    flags = [f"--train_file={file}", f"--validation_split_percentage={percentage}"]
    train, validation = mlm.load_texts(parse(roberta_dir, *flags, do=None))
    assert list(validation["text"]) == lines[:count]
    assert list(train["text"]) == lines[count:200]


def test_a_validation_file_leaves_train_whole(tmp_path, roberta_dir, lines):
    train_file = write_lines(tmp_path / "a.txt", lines[:50])
    validation_file = write_lines(tmp_path / "b.txt", lines[50:60])
    flags = [f"--train_file={train_file}", f"--validation_file={validation_file}"]
    train, validation = mlm.load_texts(parse(roberta_dir, *flags, do=None))
    assert list(train["text"]) == lines[:50]
    assert list(validation["text"]) == lines[50:60]


# ---------------------------------------------------------------------------------------
# Whole words
# ---------------------------------------------------------------------------------------


def encode_words(tokenizer, line: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a line, and for each token 1 if it continues a word and else 0.

    The words are those of the tokenizer's pre-tokenizer.
    """
    backend = tokenizer.backend_tokenizer
    tokens = [tokenizer.cls_token_id]
    continues_word = [0]
    for word, _ in backend.pre_tokenizer.pre_tokenize_str(line):
        pieces = backend.model.tokenize(word)
        tokens += [piece.id for piece in pieces]
        continues_word += [0] + [1] * (len(pieces) - 1)
    return [*tokens, tokenizer.sep_token_id], [*continues_word, 0]


def truncate(row: list[int]) -> list[int]:
    """Return at most LENGTH values. The last one, which belongs to </s>, is kept."""
    return [*row[: LENGTH - 1], row[-1]] if len(row) > LENGTH else row


@pytest.mark.parametrize("line_by_line", [False, True])
def test_words_are_those_of_the_pre_tokenizer(
    tmp_path, roberta_dir, tokenizer, lines, line_by_line
):
    file = write_lines(tmp_path / "train.txt", lines[:1100])
    flags = [f"--train_file={file}", "--whole_word_mask", NO_VALIDATION]
    if line_by_line:
        flags.append("--line_by_line")
    sequences = read(roberta_dir, tokenizer, *flags)
    tokens = []
    continues_word = []
    for line in lines[:1100]:
        line_tokens, line_continues_word = encode_words(tokenizer, line)
        tokens.append(line_tokens)
        continues_word.append(line_continues_word)
    if line_by_line:
        tokens = [truncate(row) for row in tokens]
        continues_word = [truncate(row) for row in continues_word]
    else:
        tokens = split_into_blocks([value for row in tokens for value in row])
        continues_word = split_into_blocks([value for row in continues_word for value in row])
    assert in_order(sequences, tokenizer, len(tokens)) == tokens
    assert in_order(sequences, tokenizer, len(tokens), "continues_word") == continues_word


def test_reference_files(tmp_path, roberta_dir, tokenizer, lines):
    """A position counts the tokens of its line, <s> included.

    A position in the part of a line that is truncated has no effect.
    """
    rng = np.random.default_rng(0)
    refs = [sorted(rng.integers(1, 90, rng.integers(0, 9)).tolist()) for _ in lines]
    train_file = write_lines(tmp_path / "train.txt", add_blank_lines(lines))
    ref_file = write_lines(tmp_path / "train.ref", [json.dumps(ref) for ref in refs])
    flags = [f"--train_file={train_file}", f"--train_ref_file={ref_file}"]
    flags += ["--line_by_line", "--validation_split_percentage=10"]
    rows = []
    marks = []
    truncated_refs = []
    for line, ref in zip(lines, refs, strict=True):
        row = tokenizer(line, truncation=True, max_length=LENGTH)["input_ids"]
        rows.append(row)
        marks.append([int(position in ref) for position in range(len(row))])
        if len(row) == LENGTH:
            truncated_refs += ref
    assert max(truncated_refs) > LENGTH
    cut = len(lines) // 10
    for split, part in ((0, slice(cut, None)), (1, slice(0, cut))):
        sequences = read(roberta_dir, tokenizer, *flags, split=split, do=None)
        assert in_order(sequences, tokenizer, len(rows[part])) == rows[part]
        assert in_order(sequences, tokenizer, len(rows[part]), "continues_word") == marks[part]


def test_reference_words_are_masked_whole(tmp_path, roberta_dir, tokenizer):
    """By their references, the ten tokens of each line are words of 2, 3 and 5 tokens."""
    count = 512
    train_file = write_lines(tmp_path / "train.txt", count * ["a" + 9 * " a"])
    ref_file = write_lines(tmp_path / "refs", count * ["[2, 4, 5, 7, 8, 9, 10]"])
    flags = [f"--train_file={train_file}", f"--train_ref_file={ref_file}", "--line_by_line"]
    sequences = read(roberta_dir, tokenizer, *flags, NO_VALIDATION)
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, LENGTH, whole_words=True)
    batches = mlm.train_batches(sequences, collator, 0, range(8), (1, 8))
    predicted = np.concatenate([batch["labels"].reshape(64, -1) != -100 for batch in batches])
    # Neither <s> nor anything after the line's ten tokens is predicted.
    assert not predicted[:, 0].any()
    assert not predicted[:, 11:].any()
    words = [predicted[:, 1:3], predicted[:, 3:6], predicted[:, 6:11]]
    for word in words:
        assert (word.any(axis=1) == word.all(axis=1)).all()
    # The number of predicted words is within five standard deviations of its mean.
    num_words = 3 * count
    num_predicted = sum(word[:, 0].sum() for word in words)
    deviation = math.sqrt(num_words * 0.15 * 0.85)
    assert abs(num_predicted - 0.15 * num_words) < 5 * deviation


@pytest.mark.parametrize(
    "bad",
    [
        "x",
        "[1, 2",
        "5",
        "null",
        "[null]",
        '["a"]',
        "[[1]]",
        '{"a": 1}',
        "[-1]",
        "[1.5]",
        '"12"',
        '{"1": 2}',
    ],
)
def test_malformed_reference_files(tmp_path, roberta_dir, tokenizer, lines, bad):
    train_file = write_lines(tmp_path / "train.txt", lines[:3])
    ref_file = write_lines(tmp_path / "train.ref", ["[]", bad, "[1]"])
    flags = [f"--train_file={train_file}", f"--train_ref_file={ref_file}", "--line_by_line"]
    with pytest.raises(mlm.InputError, match=r"train\.ref"):
        read(roberta_dir, tokenizer, *flags, NO_VALIDATION)


@pytest.mark.parametrize("count", [0, 2, 4])
def test_reference_files_of_another_length(tmp_path, roberta_dir, tokenizer, lines, count):
    train_file = write_lines(tmp_path / "train.txt", lines[:3])
    ref_file = write_lines(tmp_path / "train.ref", count * ["[1]"])
    flags = [f"--train_file={train_file}", f"--train_ref_file={ref_file}", "--line_by_line"]
    with pytest.raises(mlm.InputError, match=rf"train\.ref.*\b{count}\b.*\b3\b"):
        read(roberta_dir, tokenizer, *flags, NO_VALIDATION)


def test_reference_files_of_texts_with_several_lines(tmp_path, roberta_dir, tokenizer):
    records = [json.dumps({"text": text}) for text in ("one line", "two\nlines")]
    train_file = write_lines(tmp_path / "train.jsonl", records)
    ref_file = write_lines(tmp_path / "train.ref", ["[1]", "[1]"])
    flags = [f"--train_file={train_file}", f"--train_ref_file={ref_file}", "--line_by_line"]
    with pytest.raises(mlm.InputError, match=r"train\.ref: .* several lines"):
        read(roberta_dir, tokenizer, *flags, NO_VALIDATION)


# ---------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def numbered(tmp_path_factory, roberta_dir, tokenizer):
    """150 sequences, all different, and their tokens."""
    lines = [f"{number} and " + "some more words " * (number % 4) for number in range(150)]
    file = write_lines(tmp_path_factory.mktemp("numbered") / "train.txt", lines)
    flags = [f"--train_file={file}", "--line_by_line", NO_VALIDATION]
    sequences = read(roberta_dir, tokenizer, *flags)
    rows = [tuple(tokenizer(line)["input_ids"]) for line in lines]
    assert len(set(rows)) == 150
    return sequences, rows


def restore(batch) -> list[tuple]:
    """Return the rows of a batch as they were before masking, without padding.

    They are right only if the labels are.
    """
    tokens = np.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
    lengths = batch["attention_mask"].sum(axis=-1).reshape(-1)
    rows = tokens.reshape(-1, tokens.shape[-1])
    return [tuple(row[:length].tolist()) for row, length in zip(rows, lengths, strict=True)]


def flatten(array: np.ndarray) -> np.ndarray:
    """Return [rows, length] for an array of [devices, ..., length]."""
    return array.reshape(-1, array.shape[-1])


def same(a, b) -> bool:
    """Whether two batches are equal."""
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def all_same(batches, others) -> bool:
    """Whether two lists of batches are equal."""
    return all(same(a, b) for a, b in zip(batches, others, strict=True))


def test_an_epoch_is_a_permutation(tokenizer, numbered):
    sequences, rows = numbered
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, LENGTH)
    # A step has 48 rows and an epoch 3 steps.
    batches = list(mlm.train_batches(sequences, collator, 7, range(12), (2, 3)))
    for batch in batches:
        assert batch["input_ids"].shape[:3] == (DEVICES, 2, 3)
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
    restored = [row for batch in batches for row in restore(batch)]
    epochs = [restored[start : start + 144] for start in range(0, 4 * 144, 144)]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == 144
        assert set(epoch) <= set(rows)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    # Each epoch leaves out another 6 rows.
    assert len(set(restored)) == 150
    positions = [rows.index(row) for row in epochs[0]]
    assert positions != sorted(positions)


def test_batches_are_a_function_of_seed_and_step(tokenizer, numbered):
    sequences, _ = numbered
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, LENGTH)
    whole = list(mlm.train_batches(sequences, collator, 7, range(12), (2, 3)))
    for first in (1, 3, 5, 11):
        rest = list(mlm.train_batches(sequences, collator, 7, range(first, 12), (2, 3)))
        assert len(rest) == 12 - first
        assert all_same(rest, whole[first:])
    other = list(mlm.train_batches(sequences, collator, 8, range(12), (2, 3)))
    assert not any(same(a, b) for a, b in zip(other, whole, strict=True))
    assert set(restore(other[0])) != set(restore(whole[0]))


def test_steps_and_epochs_draw_different_masks(tokenizer, numbered):
    sequences, _ = numbered
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, LENGTH)
    batches = list(mlm.train_batches(sequences, collator, 7, range(12), (2, 3)))
    # If one step predicts a token, another step predicts the same position only by chance.
    first, second = (flatten(batch["labels"])[:, 1:4] != -100 for batch in batches[:2])
    assert (first & second).sum() < 0.5 * first.sum()
    # A sequence gets a new mask in every epoch.
    masks = {}
    for batch in batches:
        for row, labels in zip(restore(batch), flatten(batch["labels"]), strict=True):
            predicted = tuple(np.flatnonzero(labels != -100))
            masks.setdefault(row, set()).add(predicted)
    have_several = [len(found) > 1 for row, found in masks.items() if len(row) > 12]
    assert np.mean(have_several) > 0.5


def test_layouts_share_their_rows_and_masks(monkeypatch, tokenizer, numbered):
    """The 64 rows of a step are the same on eight devices, with accumulation, and on one device."""
    sequences, _ = numbered
    # So few tokens are masked that the number of predictions never reaches its limit.
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, LENGTH, 0.05)

    def flat_batches(accumulation: int, per_device: int) -> list[dict]:
        shape = (accumulation, per_device)
        batches = mlm.train_batches(sequences, collator, 0, range(4), shape)
        flat = []
        for batch in batches:
            flat.append({name: array.reshape(64, -1) for name, array in batch.items()})
        return flat

    eight_devices = flat_batches(1, 8)
    with_accumulation = flat_batches(4, 2)
    for name in ("device_count", "local_device_count"):
        monkeypatch.setattr(mlm.jax, name, lambda: 1)
    one_device = flat_batches(1, 64)
    assert len(eight_devices) == 4
    assert all_same(eight_devices, with_accumulation)
    assert all_same(eight_devices, one_device)


def flat_labels(batches) -> list[list[int]]:
    """Return the labels of each row."""
    return [row.tolist() for batch in batches for row in flatten(batch["labels"])]


def test_rows_that_fill_up_a_batch_take_no_slots(tokenizer, numbered):
    """The only row of a batch keeps its labels if there are just enough slots for them."""
    sequences, _ = numbered
    first = replace(sequences, count=1)
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, LENGTH, 0.5)
    (expected,) = mlm.eval_batches(first, collator, 7, 1)
    labels = expected["labels"][0, 0]
    num_predicted = (labels != -100).sum()
    assert num_predicted > 0
    with mock.patch.object(collator, "num_slots", return_value=num_predicted):
        (batch,) = mlm.eval_batches(first, collator, 7, 16)
    assert (batch["labels"][0, 0] == labels).all()
    assert (batch["labels"] != -100).sum() == num_predicted


@pytest.mark.parametrize("per_device", [2, 3])
def test_masks_of_an_epoch_do_not_depend_on_the_batch_size(tokenizer, numbered, per_device):
    """A sequence keeps its mask in an epoch if the batch size changes, and so do its neighbors."""
    sequences, _ = numbered
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, LENGTH, 0.05)

    def masks(per_device: int):
        steps = range(150 // (DEVICES * per_device))
        batches = list(mlm.train_batches(sequences, collator, 7, steps, (1, per_device)))
        rows = [row for batch in batches for row in restore(batch)]
        labels = flat_labels(batches)
        return [(row, mask[: len(row)]) for row, mask in zip(rows, labels, strict=True)]

    expected = masks(1)
    found = masks(per_device)
    assert len(found) == 144
    assert found == expected[:144]


def test_the_generator_of_a_sequence_depends_on_its_seed_and_number_alone():
    def draws(seed, numbers):
        return [rng.random(5).tolist() for rng in mlm.sequence_generators(seed, numbers)]

    expected = draws((42, 1, 0), [0, 1, 2, 3])
    assert draws((42, 1, 0), [3]) == expected[3:]
    assert draws((42, 1, 0), [2, 0]) == [expected[2], expected[0]]
    # A large number of draws from a generator does not run into those of the next number.
    for rng in mlm.sequence_generators((42, 1, 0), [1]):
        assert expected[2][0] not in rng.random(100_000)
    others = draws((42, 1, 1), range(4)) + draws((42, 2), range(4)) + draws((43, 1, 0), range(4))
    assert len({number for row in expected + others for number in row}) == 5 * 16

    # An independent implementation: a Philox with this key and counter.
    key = np.random.Philox(np.random.SeedSequence((42, 1, 0))).state["state"]["key"]
    for number in range(4):
        bits = np.random.Philox(key=key, counter=[0, 0, 0, number])
        assert np.random.Generator(bits).random(5).tolist() == expected[number]


@pytest.mark.parametrize("per_device", [1, 3, 19, 32])
def test_evaluation_takes_every_row_once(tokenizer, numbered, per_device):
    sequences, rows = numbered
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, LENGTH)
    batches = list(mlm.eval_batches(sequences, collator, 7, per_device))
    assert all(batch["labels"].shape[:2] == (DEVICES, per_device) for batch in batches)
    assert len(batches) == math.ceil(150 / DEVICES / per_device)
    restored = [row for batch in batches for row in restore(batch)]
    assert restored[:150] == rows
    labels = flat_labels(batches)
    assert all(set(row) == {-100} for row in labels[150:])
    assert all_same(batches, mlm.eval_batches(sequences, collator, 7, per_device))

    # The masks do not depend on the batch size, and so not on the number of devices.
    labels_of_ones = flat_labels(mlm.eval_batches(sequences, collator, 7, 1))
    num_predicted = 0
    for row, a, b in zip(rows, labels[:150], labels_of_ones[:150], strict=True):
        length = len(row)
        assert a[:length] == b[:length]
        num_predicted += length - a[:length].count(-100)
    assert num_predicted > 150


# ---------------------------------------------------------------------------------------
# Prefetch
# ---------------------------------------------------------------------------------------


def numbered_batches(count: int, log=None, fail_at=None):
    """Yield batches of their own number, and append the number to `log` first.

    Raises FileNotFoundError in place of the batch `fail_at`.
    """
    for number in range(count):
        if log is not None:
            log.append(number)
        if number == fail_at:
            raise FileNotFoundError(f"at {number}")
        yield {"x": np.full((DEVICES, 2), number)}


def test_prefetch_keeps_the_order():
    numbers = [int(batch["x"][0, 0]) for batch in mlm.prefetch(numbered_batches(50))]
    assert numbers == list(range(50))
    batches = mlm.prefetch(map(mlm.shard, numbered_batches(50)))
    assert [int(batch["x"][0, 0]) for batch in batches] == numbers
    assert list(mlm.prefetch(numbered_batches(0))) == []


def test_prefetch_reads_ahead_but_not_far(monkeypatch):
    log = []
    orders = []

    class Pool(ThreadPoolExecutor):
        def submit(self, *args):
            orders.append(args)
            return super().submit(*args)

    monkeypatch.setattr(mlm, "ThreadPoolExecutor", Pool)
    batches = mlm.prefetch(numbered_batches(100, log))
    next(batches)
    # Two are ordered at first, and one for each that is taken.
    assert len(orders) == 3
    deadline = time.monotonic() + 300
    while len(log) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(log) == 3
    batches.close()


def test_prefetch_passes_errors_on():
    batches = mlm.prefetch(numbered_batches(10, fail_at=5))
    found = []
    with pytest.raises(FileNotFoundError, match="at 5"):
        found.extend(int(batch["x"][0, 0]) for batch in batches)
    assert found == list(range(5))
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.parametrize("how", ["close", "delete", "error"])
def test_prefetch_stops_its_thread_when_abandoned(how):
    num_threads = threading.active_count()
    log = []
    batches = mlm.prefetch(numbered_batches(1000, log, fail_at=2 if how == "error" else None))
    next(batches)
    if how == "close":
        batches.close()
    elif how == "error":
        with pytest.raises(FileNotFoundError):
            list(batches)
    del batches
    deadline = time.monotonic() + 300
    while threading.active_count() > num_threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= num_threads
    assert len(log) < 10


def test_prefetch_that_is_closed_makes_no_more(monkeypatch):
    """A stream of a large window has hundreds of batches on order when a signal stops the run."""
    made = []
    second_begins = threading.Event()
    orders_are_withdrawn = threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            orders_are_withdrawn.set()
            super().shutdown(wait=wait)

    def numbers():
        for number in range(1000):
            if number == 1:
                second_begins.set()
                assert orders_are_withdrawn.wait(300)
            yield number
            made.append(number)

    monkeypatch.setattr(mlm, "ThreadPoolExecutor", Pool)
    items = mlm.prefetch(numbers(), size=500)
    assert next(items) == 0
    assert second_begins.wait(300)
    items.close()
    assert len(made) <= 2
