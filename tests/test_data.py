"""From files to batches in run_mlm_flax.py, against the tokenizer used line by line."""

import csv
import json
import math
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import run_mlm_flax as mlm

DEVICES = 8  # of tests/conftest.py
LENGTH = 64


@pytest.fixture(scope="module")
def tokenizer(roberta_dir):
    return AutoTokenizer.from_pretrained(roberta_dir)


@pytest.fixture(scope="module")
def lines(corpus) -> list[str]:
    """2,300 lines of the corpus, none blank, two of them odd: more than datasets maps at a time."""
    lines = (corpus / "train.txt").read_text(encoding="utf-8").splitlines()
    found = [line[:200] for line in lines if line[:200].strip()]
    found = [f"{number}: {line}" for number, line in enumerate((3 * found)[:2300])]
    found[3], found[1500] = "She said, \"naïve\", 'twice', 日本語.", "a"
    assert len(found) == 2300
    return found


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def parse(roberta_dir, *flags, do="--do_train"):
    model = [
        f"--config_name={roberta_dir}",
        f"--tokenizer_name={roberta_dir}",
        "--output_dir=not-written",
    ]
    return mlm.parse_args([*model, *([do] if do else []), *map(str, flags)])


def read(
    roberta_dir,
    tokenizer,
    *flags,
    split: int = 0,
    limit=None,
    max_length: int = LENGTH,
    do="--do_train",
):
    """The sequences of the training data (split 0) or of the evaluation data (split 1)."""
    args = parse(roberta_dir, *flags, do=do)
    return mlm.tokenize(mlm.load_texts(args)[split], tokenizer, max_length, args, limit, "tested")


@dataclass
class Recorder(mlm.FlaxDataCollatorForLanguageModeling):
    """Keeps what it is given before it masks it."""

    seen: list = field(default_factory=list)

    def __call__(self, examples, rng, group_size):
        self.seen.append({name: array.copy() for name, array in examples.items()})
        return super().__call__(examples, rng, group_size)


def in_order(sequences, tokenizer, count: int, column: str = "input_ids", max_length: int = LENGTH):
    """The `count` sequences there must be, in their order, without their padding, which is checked."""
    collator = Recorder(tokenizer, max_length, whole_words=column == "continues_word")
    labels = [batch["labels"] for batch in mlm.eval_batches(sequences, collator, 0, 1)]
    assert sum(map(len, labels)) == DEVICES * math.ceil(count / DEVICES)
    rows = []
    for examples in collator.seen:
        mask = examples["attention_mask"]
        lengths = mask.sum(axis=1)
        assert (mask == (np.arange(mask.shape[1]) < lengths[:, None])).all()
        assert (examples["input_ids"][mask == 0] == tokenizer.pad_token_id).all()
        rows += [
            row[:length].tolist() for row, length in zip(examples[column], lengths, strict=True)
        ]
    return rows[:count]


def blocks(tokenizer, texts: list[str], length: int = LENGTH) -> list[list[int]]:
    tokens = []
    for text in texts:
        tokens += tokenizer(text)["input_ids"]
    return [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]


# ----------------------------------------------------------------------------------------------------- sequences


@pytest.mark.parametrize("workers", [None, 2])
def test_blocks_are_all_texts_end_to_end(tmp_path, roberta_dir, tokenizer, lines, workers):
    with_blanks = [blank for line in lines for blank in (line, "", "  \t")][:-1]
    file = write_lines(tmp_path / "train.txt", with_blanks)
    expected = blocks(tokenizer, lines)
    flags = [f"--train_file={file}", "--validation_split_percentage=0"]
    flags += [f"--preprocessing_num_workers={workers}"] if workers else []
    sequences = read(roberta_dir, tokenizer, *flags)
    assert in_order(sequences, tokenizer, len(expected)) == expected
    limited = read(roberta_dir, tokenizer, *flags, limit=13)
    assert in_order(limited, tokenizer, 13) == expected[:13]


@pytest.mark.parametrize(("count", "expected"), [(15, None), (16, 1), (31, 1), (32, 2)])
def test_a_last_block_that_is_full_is_kept(tmp_path, roberta_dir, tokenizer, count, expected):
    file = write_lines(tmp_path / "train.txt", ["a" + (count - 3) * " a"])  # between <s> and </s>
    flags = (f"--train_file={file}", "--validation_split_percentage=0")
    if expected:
        sequences = read(roberta_dir, tokenizer, *flags, max_length=16)
        assert len(in_order(sequences, tokenizer, expected, max_length=16)) == expected
    else:
        with pytest.raises(mlm.InputError, match="15 tokens"):
            read(roberta_dir, tokenizer, *flags, max_length=16)


def test_a_line_is_a_sequence(tmp_path, roberta_dir, tokenizer, lines):
    with_blanks = [blank for line in lines for blank in (line, "", "  \t")][:-1]
    file = write_lines(tmp_path / "train.txt", with_blanks)
    expected = [tokenizer(line, truncation=True, max_length=LENGTH)["input_ids"] for line in lines]
    assert {len(row) for row in expected} > {3, LENGTH}  # short lines and such that are cut off
    flags = (f"--train_file={file}", "--line_by_line", "--validation_split_percentage=0")
    sequences = read(roberta_dir, tokenizer, *flags)
    assert in_order(sequences, tokenizer, len(lines)) == expected
    assert in_order(read(roberta_dir, tokenizer, *flags, limit=17), tokenizer, 17) == expected[:17]


@pytest.mark.parametrize("pad_to_max_length", [False, True])
def test_padding(tmp_path, roberta_dir, tokenizer, pad_to_max_length):
    """To a multiple of 16 that the longest of the batch needs and max_seq_length allows, or to max_seq_length."""
    max_length = 40
    words = [1, 2, 3, 1, 2, 3, 1, 2] + [25] + 7 * [2] + [39] + 7 * [1] + [80]
    file = write_lines(tmp_path / "train.txt", ["a" + (count - 1) * " a" for count in words])
    flags = [f"--train_file={file}", "--line_by_line", "--validation_split_percentage=0"]
    flags += ["--pad_to_max_length"] if pad_to_max_length else []
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
    assert all((batch["labels"][batch["attention_mask"] == 0] == -100).all() for batch in batches)


def write_format(kind: str, directory: Path, lines: list[str]) -> str:
    """Writes `lines` as a file, or a folder of a dataset, and returns the flag that reads it."""
    records = [{"text": line, "number": number} for number, line in enumerate(lines)]
    path = directory / f"train.{kind.rpartition(' ')[2]}"
    if kind == "txt":
        write_lines(path, lines)
    elif kind in ("jsonl", "lines in json"):
        write_lines(
            path,
            [
                json.dumps(record, ensure_ascii=number % 2 == 0)
                for number, record in enumerate(records)
            ],
        )
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
        pyarrow.parquet.write_table(pyarrow.table({"text": lines}), folder / "train.parquet")
        pyarrow.parquet.write_table(
            pyarrow.table({"text": ["for validation"]}), folder / "validation.parquet"
        )
        return f"--dataset_name={folder}"
    return f"--train_file={path}"


@pytest.mark.parametrize(
    "kind", ["txt", "json", "lines in json", "jsonl", "csv", "parquet", "folder"]
)
def test_every_format_gives_the_same_sequences(tmp_path, roberta_dir, tokenizer, lines, kind):
    flag = write_format(kind, tmp_path, lines[:1200])
    expected = blocks(tokenizer, lines[:1200])
    sequences = read(roberta_dir, tokenizer, flag, "--validation_split_percentage=0")
    assert in_order(sequences, tokenizer, len(expected)) == expected


@pytest.mark.parametrize("line_by_line", [False, True])
def test_texts_of_none_and_of_several_lines(tmp_path, roberta_dir, tokenizer, line_by_line):
    texts = [
        "first line\nsecond line\n\n  \nthird",
        None,
        "",
        " \n ",
        *(f"text {i}" for i in range(40)),
        None,
        "last",
    ]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    flags = [
        f"--train_file={file}",
        "--validation_split_percentage=0",
        *(["--line_by_line"] if line_by_line else []),
    ]
    sequences = read(roberta_dir, tokenizer, *flags, max_length=16)
    texts = [text for text in texts if text and text.strip()]
    lines = [line for text in texts for line in text.split("\n") if line.strip()]
    expected = (
        [tokenizer(line)["input_ids"] for line in lines]
        if line_by_line
        else blocks(tokenizer, texts, 16)
    )
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
    file = tmp_path / "train.jsonl"
    records = [
        {name: i if name == "number" else f"{name} {i}" for name in columns} for i in range(5)
    ]
    write_lines(file, [json.dumps(record) for record in records])
    flags = [f"--train_file={file}", "--validation_split_percentage=0"]
    args = parse(roberta_dir, *flags, *([f"--text_column_name={wanted}"] if wanted else []))
    if found:
        assert list(mlm.load_texts(args)[0]["text"]) == [f"{found} {i}" for i in range(5)]
    else:
        with pytest.raises(mlm.InputError, match="column"):
            mlm.load_texts(args)


@pytest.mark.parametrize(("percentage", "count"), [(5, 10), (1, 2), (33, 66), (99, 198)])
def test_the_first_percents_of_train_are_for_validation(
    tmp_path, roberta_dir, lines, percentage, count
):
    file = write_lines(tmp_path / "train.txt", lines[:200])
    flags = (f"--train_file={file}", f"--validation_split_percentage={percentage}")
    train, validation = mlm.load_texts(parse(roberta_dir, *flags, do=None))
    assert list(validation["text"]) == lines[:count]
    assert list(train["text"]) == lines[count:200]


def test_a_validation_file_leaves_train_whole(tmp_path, roberta_dir, lines):
    flags = [f"--train_file={write_lines(tmp_path / 'a.txt', lines[:50])}"]
    flags += [f"--validation_file={write_lines(tmp_path / 'b.txt', lines[50:60])}"]
    train, validation = mlm.load_texts(parse(roberta_dir, *flags, do=None))
    assert (list(train["text"]), list(validation["text"])) == (lines[:50], lines[50:60])


# ---------------------------------------------------------------------------------------------------- whole words


@pytest.mark.parametrize("line_by_line", [False, True])
def test_words_are_those_of_the_pre_tokenizer(
    tmp_path, roberta_dir, tokenizer, lines, line_by_line
):
    file = write_lines(tmp_path / "train.txt", lines[:1100])
    flags = [f"--train_file={file}", "--whole_word_mask", "--validation_split_percentage=0"]
    sequences = read(roberta_dir, tokenizer, *flags, *(["--line_by_line"] if line_by_line else []))
    backend, tokens, marks = tokenizer.backend_tokenizer, [], []
    for line in lines[:1100]:
        pieces = [
            backend.model.tokenize(word) for word, _ in backend.pre_tokenizer.pre_tokenize_str(line)
        ]
        inner = [token.id for word in pieces for token in word]
        tokens.append([tokenizer.cls_token_id, *inner, tokenizer.sep_token_id])
        marks.append([0, *(int(i > 0) for word in pieces for i in range(len(word))), 0])
    if line_by_line:
        tokens = [[*row[: LENGTH - 1], row[-1]] if len(row) > LENGTH else row for row in tokens]
        marks = [[*row[: LENGTH - 1], 0] if len(row) > LENGTH else row for row in marks]
    else:
        flat, flat_marks = ([x for row in rows for x in row] for rows in (tokens, marks))
        starts = range(0, len(flat) - LENGTH + 1, LENGTH)
        tokens, marks = (
            [x[start : start + LENGTH] for start in starts] for x in (flat, flat_marks)
        )
    assert in_order(sequences, tokenizer, len(tokens)) == tokens
    assert in_order(sequences, tokenizer, len(tokens), "continues_word") == marks


def test_reference_files(tmp_path, roberta_dir, tokenizer, lines):
    """A position counts the tokens of its line, <s> included; one that was cut off with the line means nothing."""
    rng = np.random.default_rng(0)
    refs = [sorted(rng.integers(1, 90, rng.integers(0, 9)).tolist()) for _ in lines]
    with_blanks = [blank for line in lines for blank in (line, "", " ")]
    flags = [f"--train_file={write_lines(tmp_path / 'train.txt', with_blanks)}", "--line_by_line"]
    flags += [
        f"--train_ref_file={write_lines(tmp_path / 'train.ref', [json.dumps(ref) for ref in refs])}"
    ]
    flags += ["--validation_split_percentage=10"]
    rows = [tokenizer(line, truncation=True, max_length=LENGTH)["input_ids"] for line in lines]
    marks = [[int(i in ref) for i in range(len(row))] for row, ref in zip(rows, refs, strict=True)]
    assert (
        max(max(ref) for ref, row in zip(refs, rows, strict=True) if ref and len(row) == LENGTH)
        > LENGTH
    )
    cut = len(lines) // 10
    for split, part in ((0, slice(cut, None)), (1, slice(0, cut))):
        sequences = read(roberta_dir, tokenizer, *flags, split=split, do=None)
        assert in_order(sequences, tokenizer, len(rows[part])) == rows[part]
        assert in_order(sequences, tokenizer, len(rows[part]), "continues_word") == marks[part]


def test_reference_words_are_masked_whole(tmp_path, roberta_dir, tokenizer):
    """Ten tokens a line, told to be words of 2, 3 and 5."""
    count = 512
    flags = [
        f"--train_file={write_lines(tmp_path / 'train.txt', count * ['a' + 9 * ' a'])}",
        "--line_by_line",
    ]
    flags += [
        f"--train_ref_file={write_lines(tmp_path / 'refs', count * ['[2, 4, 5, 7, 8, 9, 10]'])}"
    ]
    sequences = read(roberta_dir, tokenizer, *flags, "--validation_split_percentage=0")
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, LENGTH, whole_words=True)
    batches = mlm.train_batches(sequences, collator, 0, range(8), (1, 8))
    predicted = np.concatenate([batch["labels"].reshape(64, -1) != -100 for batch in batches])
    assert not predicted[:, [0, *range(11, predicted.shape[1])]].any()
    words = [predicted[:, 1:3], predicted[:, 3:6], predicted[:, 6:11]]
    for word in words:
        assert (word.any(axis=1) == word.all(axis=1)).all()
    assert abs(sum(word[:, 0].sum() for word in words) - 0.15 * 3 * count) < 5 * math.sqrt(
        3 * count * 0.15 * 0.85
    )


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
    flags = [f"--train_file={write_lines(tmp_path / 'train.txt', lines[:3])}", "--line_by_line"]
    flags += [f"--train_ref_file={write_lines(tmp_path / 'train.ref', ['[]', bad, '[1]'])}"]
    with pytest.raises(mlm.InputError, match=r"train\.ref"):
        read(roberta_dir, tokenizer, *flags, "--validation_split_percentage=0")


@pytest.mark.parametrize("count", [0, 2, 4])
def test_reference_files_of_another_length(tmp_path, roberta_dir, tokenizer, lines, count):
    flags = [f"--train_file={write_lines(tmp_path / 'train.txt', lines[:3])}", "--line_by_line"]
    flags += [f"--train_ref_file={write_lines(tmp_path / 'train.ref', count * ['[1]'])}"]
    with pytest.raises(mlm.InputError, match=rf"train\.ref.*\b{count}\b.*\b3\b"):
        read(roberta_dir, tokenizer, *flags, "--validation_split_percentage=0")


# -------------------------------------------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def numbered(tmp_path_factory, roberta_dir, tokenizer):
    """150 sequences that tell which they are, and their tokens."""
    lines = [f"{number} and " + "some more words " * (number % 4) for number in range(150)]
    file = write_lines(tmp_path_factory.mktemp("numbered") / "train.txt", lines)
    flags = (f"--train_file={file}", "--line_by_line", "--validation_split_percentage=0")
    sequences = read(roberta_dir, tokenizer, *flags)
    rows = [tuple(tokenizer(line)["input_ids"]) for line in lines]
    assert len(set(rows)) == 150
    return sequences, rows


def restore(batch) -> list[tuple]:
    """The rows of a batch before they were masked, without their padding; the lengths make this a check of labels."""
    tokens = np.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
    length = tokens.shape[-1]
    tokens, lengths = (
        tokens.reshape(-1, length),
        batch["attention_mask"].reshape(-1, length).sum(axis=1),
    )
    return [tuple(row[:n].tolist()) for row, n in zip(tokens, lengths, strict=True)]


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_an_epoch_is_a_permutation(tokenizer, numbered):
    sequences, rows = numbered
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, LENGTH)
    batches = list(
        mlm.train_batches(sequences, collator, 7, range(12), (2, 3))
    )  # 48 rows a step, 3 steps an epoch
    for batch in batches:
        assert batch["input_ids"].shape[:3] == (DEVICES, 2, 3)
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
    epochs = [
        [row for batch in batches[i : i + 3] for row in restore(batch)] for i in range(0, 12, 3)
    ]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == 144
        assert set(epoch) <= set(rows)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert (
        len({row for epoch in epochs for row in epoch}) == 150
    )  # another 6 are left out each time
    positions = [rows.index(row) for row in epochs[0]]
    assert positions != sorted(positions)


def test_batches_are_a_function_of_seed_and_step(tokenizer, numbered):
    sequences, _ = numbered
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, LENGTH)
    whole = list(mlm.train_batches(sequences, collator, 7, range(12), (2, 3)))
    for first in (1, 3, 5, 11):
        rest = list(mlm.train_batches(sequences, collator, 7, range(first, 12), (2, 3)))
        assert len(rest) == 12 - first
        assert all(same(a, b) for a, b in zip(rest, whole[first:], strict=True))
    other = list(mlm.train_batches(sequences, collator, 8, range(12), (2, 3)))
    assert not any(same(a, b) for a, b in zip(other, whole, strict=True))
    assert set(restore(other[0])) != set(restore(whole[0]))
    # Two steps do not share their draws: where one predicts a token, the other does so by chance alone.
    first, second = (batch["labels"].reshape(48, -1)[:, 1:4] != -100 for batch in whole[:2])
    assert (first & second).sum() < 0.5 * first.sum()
    # A sequence is masked anew in every epoch.
    masks = {}
    for batch in whole:
        flat = (batch["labels"] != -100).reshape(-1, batch["labels"].shape[-1])
        for row, mask in zip(restore(batch), flat, strict=True):
            masks.setdefault(row, set()).add(tuple(np.flatnonzero(mask)))
    assert np.mean([len(found) > 1 for row, found in masks.items() if len(row) > 12]) > 0.5


def test_layouts_share_their_rows_and_masks(monkeypatch, tokenizer, numbered):
    """64 rows a step on 8 devices, with accumulation, and on one: equal batches, differently folded."""
    sequences, _ = numbered
    collator = mlm.FlaxDataCollatorForLanguageModeling(
        tokenizer, LENGTH, 0.05
    )  # so few that no slot is missing
    flat = lambda batch: {name: array.reshape(64, -1) for name, array in batch.items()}  # noqa: E731
    eight = [flat(batch) for batch in mlm.train_batches(sequences, collator, 0, range(4), (1, 8))]
    folded = [flat(batch) for batch in mlm.train_batches(sequences, collator, 0, range(4), (4, 2))]
    for name in ("device_count", "local_device_count"):
        monkeypatch.setattr(mlm.jax, name, lambda: 1)
    one = [flat(batch) for batch in mlm.train_batches(sequences, collator, 0, range(4), (1, 64))]
    for a, b, c in zip(eight, folded, one, strict=True):
        assert same(a, b)
        assert same(a, c)


@pytest.mark.parametrize("per_device", [1, 3, 19, 32])
def test_evaluation_takes_every_row_once(tokenizer, numbered, per_device):
    sequences, rows = numbered
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, LENGTH)
    batches = list(mlm.eval_batches(sequences, collator, 7, per_device))
    assert all(batch["labels"].shape[:2] == (DEVICES, per_device) for batch in batches)
    assert len(batches) == math.ceil(150 / DEVICES / per_device)
    restored = [row for batch in batches for row in restore(batch)]
    assert restored[:150] == rows
    labels = [
        row.tolist()
        for batch in batches
        for row in batch["labels"].reshape(-1, batch["labels"].shape[-1])
    ]
    assert all(set(row) == {-100} for row in labels[150:])
    assert all(
        same(a, b)
        for a, b in zip(batches, mlm.eval_batches(sequences, collator, 7, per_device), strict=True)
    )
    # Masked alike on any number of devices, which is on any batch size.
    single = mlm.eval_batches(sequences, collator, 7, 1)
    single = [
        row.tolist()
        for batch in single
        for row in batch["labels"].reshape(-1, batch["labels"].shape[-1])
    ]
    trimmed = [
        [row[: len(tokens)] for row, tokens in zip(x[:150], rows, strict=True)]
        for x in (labels, single)
    ]
    assert trimmed[0] == trimmed[1]
    assert sum(label != -100 for row in trimmed[0] for label in row) > 150


# ------------------------------------------------------------------------------------------------------- prefetch


def numbered_batches(count: int, log=None, fail_at=None):
    for number in range(count):
        if log is not None:
            log.append(number)
        if number == fail_at:
            raise FileNotFoundError(f"at {number}")
        yield {"x": np.full((DEVICES, 2), number)}


def test_prefetch_keeps_the_order():
    assert [int(batch["x"][0, 0]) for batch in mlm.prefetch(numbered_batches(50))] == list(
        range(50)
    )
    assert list(mlm.prefetch(numbered_batches(0))) == []


def test_prefetch_works_ahead_but_not_far():
    log = []
    batches = mlm.prefetch(numbered_batches(100, log))
    next(batches)
    deadline = time.monotonic() + 10
    while len(log) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert 2 <= len(log) <= 4
    batches.close()


def test_prefetch_passes_errors_on():
    batches, found = mlm.prefetch(numbered_batches(10, fail_at=5)), []
    with pytest.raises(FileNotFoundError, match="at 5"):
        found.extend(int(batch["x"][0, 0]) for batch in batches)
    assert found == list(range(5))
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.parametrize("how", ["close", "delete", "error"])
def test_prefetch_stops_its_thread_when_abandoned(how):
    before, log = threading.active_count(), []
    batches = mlm.prefetch(numbered_batches(1000, log, fail_at=2 if how == "error" else None))
    next(batches)
    if how == "close":
        batches.close()
    elif how == "error":
        with pytest.raises(FileNotFoundError):
            list(batches)
    del batches
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
    assert len(log) < 10
