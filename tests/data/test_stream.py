"""What run_mlm_flax_stream.py reads, in which order, and where it resumes.

The independent source is plain lists of the same documents. Each word occurs once in the data, so a
token tells where it is from.
"""

import csv
import dataclasses
import gzip
import itertools
import json
import random
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from clusters import EIGHT_DEVICES, finish_cluster, start_cluster
from outputs import losses
from training_scripts import (
    SCRIPTS,
    Place,
    checkpoints,
    full_but,
    word_tokenizer,
    write_text,
)

import run_mlm_flax as mlm
import run_mlm_flax_stream as stream

(SCRIPT,) = (script for script in SCRIPTS if script.is_stream)
NUM_WORDS = 6000
BLOCK = 16
# The same global batch on two devices of one process as on two processes.
SAME_BATCH = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 1}
START = {"epoch": 0, "state": None, "carried": [], "used": 0, "seen": 0, "offset": 0}


# ------------------------------------------------------------------------ documents, in plain words


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return word_tokenizer(tmp_path_factory.mktemp("tokenizer"), num_words=NUM_WORDS)


def make_documents(sizes: list[int]) -> list[list[str]]:
    """The texts of each shard. A few are blank, one of them is long."""
    rng = random.Random(0)
    number = itertools.count()
    shards = []
    for size in sizes:
        texts = []
        lengths = [make_length(rng, index) for index in range(size)]
        for length in lengths:
            words = [f"w{next(number)}" for _ in range(length)]
            texts.append(" ".join(words) or " ")
        shards.append(texts)
    assert next(number) < NUM_WORDS
    return shards


def make_length(rng: random.Random, index: int) -> int:
    """The number of words of the text at `index` of its shard."""
    if rng.random() < 0.05:
        return 0
    return 70 if index == 5 else rng.randint(1, 9)


def write_shards(directory: Path, kind: str, shards: list[list[str]]) -> list[Path]:
    directory.mkdir(exist_ok=True)
    paths = [directory / f"train-{index}.{kind}" for index in range(len(shards))]
    for path, texts in zip(paths, shards, strict=True):
        write_shard(path, kind, texts)
    return paths


def write_shard(path: Path, kind: str, texts: list[str]):
    if kind == "txt":
        path.write_text("".join(text + "\n" for text in texts))
    elif kind == "txt.gz":
        with gzip.open(path, "wt") as file:
            file.write("".join(text + "\n" for text in texts))
    elif kind == "jsonl":
        with path.open("w") as file:
            for number, text in enumerate(texts):
                file.write(json.dumps({"number": number, "text": text}) + "\n")
    elif kind == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("number", "text"), *enumerate(texts)])
    else:
        table = pyarrow.table({"text": texts, "number": list(range(len(texts)))})
        pyarrow.parquet.write_table(table, path, row_group_size=100)


def flat(shards: list[list[str]]) -> list[str]:
    return list(itertools.chain.from_iterable(shards))


def tokens_of(tokenizer, texts: list[str]) -> list[int]:
    return [token for text in texts if text.strip() for token in tokenizer(text)["input_ids"]]


def blocks_of(tokens: list[int]) -> tuple[list[tuple], list[int]]:
    """The full blocks, and the tokens that are left over."""
    end = len(tokens) - len(tokens) % BLOCK
    blocks = [tuple(tokens[start : start + BLOCK]) for start in range(0, end, BLOCK)]
    return blocks, tokens[end:]


def epochs_of(tokens: list[int], count: int) -> list[list[tuple]]:
    """The blocks of `count` epochs. Tokens that do not fill a block start the next epoch."""
    epochs = []
    rest = []
    for _ in range(count):
        blocks, rest = blocks_of(rest + tokens)
        epochs.append(blocks)
    return epochs


def words_of(blocks, tokenizer) -> list[int]:
    tokens = [token for block in blocks for token in block]
    return [token for token in tokens if token not in tokenizer.all_special_ids]


# ------------------------------------------------------------------------------- the same, streamed


BUILDERS = {"txt": "text", "gz": "text", "jsonl": "json", "csv": "csv", "parquet": "parquet"}


def open_stream(paths: list[Path], tokenizer, **options):
    import datasets

    builder = BUILDERS[paths[0].name.split(".")[-1]]
    files = [str(path) for path in paths]
    dataset = datasets.load_dataset(
        builder, data_files=files, split="train", streaming=True, **options
    )
    column = stream.select_text(dataset, "text", "the data")
    return stream.BlockStream(*column, tokenizer, BLOCK)


def first_blocks(texts, count: int) -> list[tuple]:
    """The blocks that an evaluation holds out."""
    return [tuple(block) for block in texts.take_first(count, 1)[0].tolist()]


def draw(texts, held_out, position=START, size: int = 50, batch_size: int = 1, limit=None):
    """Yield (position after the block, block) in the order of training, from `position` on."""
    # A checkpoint stores the position as JSON.
    position = json.loads(json.dumps(position))
    blocks = texts.blocks(dict(position), batch_size, limit, held_out)
    shuffled = stream.shuffle(blocks, max(size, batch_size), 42)
    for after, block in itertools.islice(shuffled, position["offset"], None):
        yield after, tuple(block.tolist())


def take(texts, held_out, count: int, **options):
    return list(itertools.islice(draw(texts, held_out, **options), count))


@pytest.fixture
def as_process(monkeypatch):
    """Function that makes this process number `rank` of `count`."""

    def as_process(rank: int, count: int):
        monkeypatch.setattr(jax, "process_index", lambda: rank)
        monkeypatch.setattr(jax, "process_count", lambda: count)

    return as_process


KINDS = ["txt", "txt.gz", "jsonl", "csv", "parquet"]
# The script reads 64 texts at a time, which divides none of these.
SIZES = [310, 40, 290]


@pytest.fixture(scope="module", params=KINDS)
def texts(request, tmp_path_factory, tokenizer):
    directory = tmp_path_factory.mktemp("texts") / "shards"
    paths = write_shards(directory, request.param, make_documents(SIZES))
    return open_stream(paths, tokenizer)


@pytest.mark.parametrize("num_held_out", full_but([0, 1, 30, 150], 1, 150))
@pytest.mark.parametrize("size", [1, 50, 1000])
def test_every_block_of_every_epoch_and_none_held_out(texts, tokenizer, num_held_out, size):
    """In three epochs, each window has the blocks that plain lists have there, in another order."""
    tokens = tokens_of(tokenizer, flat(make_documents(SIZES)))
    eval_blocks, held_out = texts.take_first(num_held_out, num_held_out)
    held_out_blocks = [tuple(block) for block in eval_blocks.tolist()]
    assert held_out_blocks == blocks_of(tokens)[0][:num_held_out]
    epochs = epochs_of(tokens[num_held_out * BLOCK :], 3)
    drawn = [block for _, block in take(texts, held_out, sum(map(len, epochs)), size=size)]
    words = set(words_of(drawn, tokenizer))
    orders = []
    for expected in epochs:
        found = drawn[: len(expected)]
        drawn = drawn[len(expected) :]
        for start in range(0, len(expected), size):
            assert sorted(found[start : start + size]) == sorted(expected[start : start + size])
        orders.append([expected.index(block) for block in found])
    assert not words & set(words_of(eval_blocks.tolist(), tokenizer))
    # Each epoch has another order.
    assert size == 1 or len(set(map(tuple, orders))) == 3


@pytest.mark.parametrize(
    ("num_processes", "sizes"), [(2, [310, 40, 290]), (2, [310, 40, 30, 260]), (3, [640])]
)
@pytest.mark.parametrize("kind", ["txt", "parquet"])
def test_processes_share_out_the_texts(tmp_path, tokenizer, as_process, num_processes, sizes, kind):
    """In each of two epochs the parts are disjoint and complete, without the held-out blocks.

    If the number of processes divides that of shards, each process reads whole shards, otherwise
    every so many texts.
    """
    shards = make_documents(sizes)
    tokens = tokens_of(tokenizer, flat(shards))
    texts = open_stream(write_shards(tmp_path / "shards", kind, shards), tokenizer)
    eval_blocks, held_out = texts.take_first(70, 70)
    assert [tuple(block) for block in eval_blocks.tolist()] == blocks_of(tokens)[0][:70]
    seen = []
    for rank in range(num_processes):
        as_process(rank, num_processes)
        blocks = []
        for after, block in draw(texts, held_out):
            if after["epoch"] == 2:
                break
            blocks.append(block)
        # Tokens that did not fill a block are carried into the third epoch.
        blocks.append(after["carried"])
        seen.append(words_of(blocks, tokenizer))
    for one, other in itertools.combinations(seen, 2):
        assert not set(one) & set(other)
    expected = words_of([tokens[70 * BLOCK :]], tokenizer)
    assert sorted(itertools.chain(*seen)) == sorted(2 * expected)
    assert min(map(len, seen)) > 0.3 * len(expected)


@pytest.mark.parametrize(("rank", "num_processes"), [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_the_order_is_the_same_after_resuming_anywhere(texts, as_process, rank, num_processes):
    """The order is the same after random points of three epochs, also if resumed twice."""
    as_process(rank, num_processes)
    _, held_out = texts.take_first(30, 30)
    rng = random.Random(rank)
    whole = take(texts, held_out, 900 // num_processes, size=37)
    assert whole[-1][0]["epoch"] >= 1

    def check(position, start: int, count: int):
        """Check `count` blocks after `position`, which is the position after `start` blocks."""
        resumed = take(texts, held_out, min(count, len(whole) - start), position=position, size=37)
        expected = whole[start : start + count]
        assert [block for _, block in resumed] == [block for _, block in expected]
        # The library has several states for the same row.
        for name in START.keys() - {"state"}:
            assert [after[name] for after, _ in resumed] == [after[name] for after, _ in expected]
        return resumed

    points = rng.sample(range(len(whole) - 60), 12)
    for first in points:
        resumed = check(whole[first][0], first + 1, 60)
        second = rng.randrange(20)
        twice = check(resumed[second][0], first + second + 2, 30)
        check(twice[5][0], first + second + 8, 20)
    # These go on for up to two epochs.
    for first in points[:2]:
        check(whole[first][0], first + 1, 900)


def test_what_was_read_is_not_read_again(tmp_path, tokenizer):
    """Shards before the position may be deleted. A state within an epoch is small."""
    paths = write_shards(tmp_path / "shards", "txt", make_documents([300, 300, 300]))
    texts = open_stream(paths, tokenizer)
    held_out = stream.HeldOut([0, 0, 0], np.zeros(0, np.int32))
    whole = take(texts, held_out, 300, size=20)
    assert len(json.dumps(whole[250][0])) < 1000
    paths[0].unlink()
    assert take(texts, held_out, 49, position=whole[250][0], size=20) == whole[251:]


def test_texts_that_are_missing_after_a_checkpoint_are_an_error(tmp_path, tokenizer):
    """The stream ends before the position of the checkpoint."""
    paths = write_shards(tmp_path / "shards", "txt", make_documents([300, 300]))
    held_out = stream.HeldOut([0, 0], np.zeros(0, np.int32))
    whole = take(open_stream(paths, tokenizer), held_out, 300, size=20)
    position = [after for after, _ in whole if after["epoch"] == 0][-1]
    texts = open_stream(paths[:1], tokenizer)
    held_out = stream.HeldOut([0], np.zeros(0, np.int32))
    with pytest.raises(stream.InputError, match="ends before the position of the checkpoint"):
        take(texts, held_out, 1, position=position, size=20)


def test_too_few_train_samples_are_refused(texts):
    message = "--max_train_samples 7: that is 7 blocks for each process, and a batch takes 8 of"
    _, held_out = texts.take_first(10, 10)
    with pytest.raises(stream.InputError, match=message):
        take(texts, held_out, 1, limit=7, batch_size=8)


def test_max_train_samples(texts, tokenizer):
    tokens = tokens_of(tokenizer, flat(make_documents(SIZES)))
    _, held_out = texts.take_first(10, 10)
    expected = sorted(blocks_of(tokens)[0][10:55])
    drawn = [block for _, block in take(texts, held_out, 135, limit=45, size=20)]
    assert [sorted(drawn[i : i + 45]) for i in (0, 45, 90)] == [expected] * 3


@pytest.mark.parametrize(("held", "batch_size"), [(0, 400), (200, 200)])
def test_too_little_data_is_refused(texts, held, batch_size):
    """The message has the counts. One block more than there are cannot be held out."""
    tokens = tokens_of(texts.tokenizer, flat(make_documents(SIZES)))
    count = len(tokens) // BLOCK
    message = f"--num_eval_samples {count + 1}: the data has {count} blocks"
    with pytest.raises(stream.InputError, match=message):
        texts.take_first(count + 1, count + 1)
    _, held_out = texts.take_first(held, held)
    rest = len(tokens) % BLOCK
    message = (
        f"the data has {count - held} blocks of 16 tokens, {rest} more; a batch takes {batch_size}"
    )
    with pytest.raises(stream.InputError, match=message):
        take(texts, held_out, 1, batch_size=batch_size)


def test_a_column_that_stops_being_text_is_refused(tmp_path, tokenizer):
    paths = write_shards(tmp_path / "shards", "parquet", [["w1 w2 w3"] * 300, ["w4"]])
    pyarrow.parquet.write_table(pyarrow.table({"text": [["w4"]], "number": [0]}), paths[1])
    texts = open_stream(paths, tokenizer)
    held_out = stream.HeldOut([0, 0], np.zeros(0, np.int32))
    assert len(take(texts, held_out, 60, size=1)) == 60
    with pytest.raises(stream.InputError, match="the data: cannot be read"):
        take(texts, held_out, 500)


# -------------------------------------------------------------------------------------------- masks


def test_masks_are_those_of_run_mlm_flax(tokenizer):
    rng = np.random.default_rng(0)
    input_ids = rng.integers(0, len(tokenizer), (64, BLOCK), dtype=np.int32)

    def mask(module):
        collator = module.FlaxDataCollatorForLanguageModeling(tokenizer, BLOCK)
        rngs = module.sequence_generators((7,), range(64))
        return collator({"input_ids": input_ids.copy()}, rngs, 8)

    expected = mask(mlm)
    found = mask(stream)
    assert all((expected[name] == found[name]).all() for name in ("input_ids", "labels"))


@pytest.mark.parametrize(("rows", "size"), [(37, 1), (37, 2), (5, 2), (64, 4)])
def test_evaluation_is_that_of_run_mlm_flax(tokenizer, as_process, monkeypatch, rows, size):
    """Batches of one process, and of two processes with half as many devices each, are the same."""
    blocks = np.random.default_rng(0).integers(5, len(tokenizer), (rows, BLOCK), dtype=np.int32)
    continues_word = np.zeros(blocks.size, np.int8)
    columns = (mlm.Tokens([blocks.ravel()]), mlm.Tokens([continues_word]))
    sequences = mlm.Sequences(*columns, rows, BLOCK, BLOCK)
    expected_collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, BLOCK)
    expected = list(mlm.eval_batches(sequences, expected_collator, 42, size))
    collator = stream.FlaxDataCollatorForLanguageModeling(tokenizer, BLOCK)
    found = list(stream.eval_batches(blocks, collator, 42, size))
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    halves = []
    for rank in range(2):
        as_process(rank, 2)
        halves.append(list(stream.eval_batches(blocks, collator, 42, size)))
    assert len(expected) == len(found) == len(halves[0]) == len(halves[1])
    for one, other, *parts in zip(expected, found, *halves, strict=True):
        together = {name: np.concatenate([part[name] for part in parts]) for name in other}
        for labels in (other["labels"], together["labels"]):
            assert (one["labels"] == labels).all()
        # Rows that fill up the last batch have no labels. Their tokens make no difference.
        has_labels = (one["labels"] != -100).any(axis=-1)
        for input_ids in (other["input_ids"], together["input_ids"]):
            assert (one["input_ids"][has_labels] == input_ids[has_labels]).all()


def test_processes_mask_as_one(tokenizer, as_process, monkeypatch):
    """A block's masks depend on the seed and its number. A process has the masks of its blocks."""
    blocks = np.random.default_rng(0).integers(5, len(tokenizer), (64, BLOCK), dtype=np.int32)
    collator = stream.FlaxDataCollatorForLanguageModeling(tokenizer, BLOCK)

    def batch_of(rows):
        stream_of_rows = iter([({}, row) for row in rows])
        steps = range(3, 4)
        progress = stream.StreamProgress({})
        (batch,) = stream.train_batches(stream_of_rows, collator, 42, steps, (1, 8), progress)
        return batch

    whole = batch_of(blocks)
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    for rank, rows in enumerate(np.split(blocks, 2)):
        as_process(rank, 2)
        part = batch_of(rows)
        for name, array in whole.items():
            assert (part[name] == np.split(array, 2)[rank]).all()


# --------------------------------------------------------------------------------------- whole runs

STEPS = 40
TRAINING = {
    "train_file": None,
    "validation_file": None,
    "num_eval_samples": 20,
    "num_train_steps": STEPS,
    "shuffle_buffer_size": 30,
    "save_steps": 3,
    "save_total_limit": 3,
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    place = Place(SCRIPT, tmp_path_factory.mktemp("stream"))
    folder = place.directory / "folder"
    folder.mkdir()
    for index, lines in enumerate((400, 40, 150, 60)):
        text = write_text(place.directory / "text", lines, seed=index).read_bytes()
        (folder / f"train-{index}.txt.gz").write_bytes(gzip.compress(text))
    return place


@pytest.fixture(scope="module")
def undisturbed(place) -> Path:
    run = place.run("undisturbed", **TRAINING, dataset_name="folder")
    assert (run.returncode, run.lines) == (0, [])
    assert "Epoch 1 is read" in run.stderr
    return place.directory / "undisturbed"


EXPORTED = ("flax_model.msgpack", "model.safetensors", "eval_results.json")


def run_file(output_dir: Path, step: int) -> Path:
    return output_dir / "checkpoints" / str(step) / "run.json"


def check_same(a: Path, b: Path, names=EXPORTED):
    """Check that two runs have exported the same and that their last checkpoints are alike."""
    assert [name for name in names if (a / name).read_bytes() != (b / name).read_bytes()] == []
    last_a = json.loads(run_file(a, checkpoints(a)[-1]).read_text())
    last_b = json.loads(run_file(b, checkpoints(b)[-1]).read_text())
    for last in (last_a, last_b):
        # It has times.
        del last["settings"]["results"]
        # One run may read a copy of the other's folder. The checksum covers its name.
        for name in ("--dataset_name", "training data"):
            del last["settings"][name]
        del last["run_sha256"]
    assert last_a == last_b


def test_killed_and_stopped_runs_end_with_the_same_weights(place, undisturbed):
    """Runs end by SIGKILL in the first and second epoch, and by SIGTERM between two saves."""
    output_dir = place.directory / "killed"
    any_checkpoint = r"^rename .*/checkpoints/\d+$"
    log = r"^open .*/events\.out\.tfevents"
    for kill_at, number in (
        ([r"^rename .*/checkpoints/6$"], signal.SIGKILL),
        ([any_checkpoint] * 3 + [r"^rename .*/flax_model\.msgpack$"], signal.SIGKILL),
        ([log] * 6, signal.SIGTERM),
        ([r"^rename .*/checkpoints/36$"], signal.SIGKILL),
    ):
        killing = {"kill_at": kill_at, "kill_with": number}
        run = place.run(output_dir, **TRAINING, **killing, dataset_name="folder")
        assert (run.returncode, run.lines) == (128 + number, [])
    assert checkpoints(output_dir)[-1] < 36
    run = place.run(output_dir, **TRAINING, dataset_name="folder")
    assert (run.returncode, run.lines) == (0, [])
    check_same(output_dir, undisturbed)


def test_a_shard_that_cannot_be_read(place, undisturbed):
    """Training ends with the last batch before the shard.

    After the shard is repaired, training resumes, and its result is that of an undisturbed run.
    """
    folder = place.directory / "broken"
    folder.mkdir()
    for path in (place.directory / "folder").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    third = folder / "train-2.txt.gz"
    whole = third.read_bytes()
    third.write_bytes(whole[: len(whole) // 2])
    run = place.run("broken_run", **{**TRAINING, "save_steps": 1000}, dataset_name="broken")
    output_dir = place.directory / "broken_run"
    assert run.returncode == 1
    (line,) = run.lines
    (step,) = checkpoints(output_dir)
    assert 3 < step < STEPS
    words = ("--dataset_name broken", "cannot be read", f"step {step} ", "without --overwrite")
    assert [word for word in words if word not in line] == []
    assert (output_dir / "model.safetensors").exists()

    # The shard is still broken.
    run = place.run("broken_run", **TRAINING, dataset_name="broken")
    assert (run.returncode, checkpoints(output_dir)) == (1, [step])

    third.write_bytes(whole)
    run = place.run("broken_run", **TRAINING, dataset_name="broken")
    assert (run.returncode, run.lines) == (0, [])
    check_same(output_dir, undisturbed)


def test_resuming_from_the_checkpoint_of_another_run(place, undisturbed):
    """A run resumes from the checkpoint of another run, in a stream at that run's position.

    Run again with the same flags, it resumes from its own checkpoint. If that one is damaged, it
    resumes from the other run's checkpoint again.
    """
    first = checkpoints(undisturbed)[0]
    last = STEPS - 1
    output_dir = place.directory / "another"
    other = undisturbed / "checkpoints" / str(first)
    flags = {**TRAINING, "dataset_name": "folder", "resume_from_checkpoint": other}
    kill_at = [rf"^rename .*/checkpoints/{last}$", r"^rename .*/flax_model\.msgpack$"]
    run = place.run(output_dir, **flags, kill_at=kill_at)
    assert (run.returncode, checkpoints(output_dir)) == (137, [last])
    for start, num_warnings in ((last, 0), (first, 2)):
        run = place.run(output_dir, **flags)
        assert (run.returncode, len(run.lines)) == (0, num_warnings), run.stderr
        assert f"steps {start} to {STEPS}" in run.stderr
        check_same(output_dir, undisturbed)
        for step in checkpoints(output_dir):
            run_file(output_dir, step).write_text("damaged")


def count_batches(script):
    """Change the script to write the largest numbers of waiting batches to the file `counts`.

    The numbers are those on the host and on the devices that wait for a step to take them.
    """
    import json
    import pathlib

    import jax

    made = []
    put = []
    done = []
    waiting = []

    def count(batches, function):
        def counted(*args):
            result = function(*args)
            if isinstance(result, dict) and "labels" in result:
                batches.append(1)
            return result

        return counted

    make_program = jax.pmap

    def pmap(*args, **options):
        program = make_program(*args, **options)

        def dispatch(*args):
            waiting.append((len(made) - len(done), len(put) - len(done)))
            largest = [max(numbers) for numbers in zip(*waiting, strict=True)]
            pathlib.Path("counts").write_text(json.dumps(largest))
            done.append(1)
            return program(*args)

        return dispatch

    script.make_batch = count(made, script.make_batch)
    script.shard = count(put, script.shard)
    jax.pmap = pmap


def test_a_larger_window_puts_no_more_batches_on_the_devices(place):
    """A larger window means more batches on the host, but not on the devices."""
    flags = {
        **TRAINING,
        "dataset_name": "folder",
        "shuffle_buffer_size": 400,
        "num_train_steps": 60,
        "save_steps": 1000,
        "do_train": True,
    }
    run = place.run("waiting", **flags, change=count_batches)
    assert (run.returncode, run.lines) == (0, [])
    on_host, on_devices = json.loads((place.directory / "counts").read_text())
    assert on_devices <= 3
    assert on_host > 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shuffle_buffer_size": 31}, "its shuffle_buffer_size is 30, here 31"),
        ({"num_eval_samples": 120}, "its held-out texts is "),
        ({"seed": 43}, "its seed is 42, here 43"),
        (
            {"dataset_name": None, "train_file": "train.txt"},
            "its training data is ['folder'], here ['train.txt']",
        ),
    ],
    ids=str,
)
def test_another_stream_is_not_resumed(place, undisturbed, changes, message):
    run = place.run("undisturbed", **{**TRAINING, "dataset_name": "folder", **changes})
    assert run.returncode == 1
    (line,) = run.lines
    assert f"checkpoints/40: {message}" in line


def test_the_checkpoint_of_another_script_is_refused(place, undisturbed):
    """It has no position in a stream."""
    output_dir = place.directory / "of_another_script"
    shutil.copytree(undisturbed, output_dir)
    for step in checkpoints(output_dir):
        path = run_file(output_dir, step)
        run = json.loads(path.read_text())
        del run["settings"]["stream"]
        run["run_sha256"] = stream.run_sha256(run)
        path.write_text(json.dumps(run))
    run = place.run(output_dir, **TRAINING, dataset_name="folder")
    assert run.returncode == 1
    (line,) = run.lines
    assert "another script" in line


def break_the_stream_after_a_loss_that_is_not_finite(script):
    """Change the script: the losses are NaN from the start, and the stream ends after 5 batches."""
    import jax
    import numpy as np

    make_program = jax.pmap

    def pmap(function, *args, **options):
        program = make_program(function, *args, **options)

        def run(*inputs):
            outputs = program(*inputs)
            if len(inputs) == 3:
                state, totals = outputs
                nan = script.replicate({"loss": np.float32(np.nan)})["loss"]
                outputs = (state, {**totals, "loss": nan})
            return outputs

        return run

    make_batch = script.make_batch
    made = []

    def make_few(*args):
        made.append(1)
        if len(made) > 5:
            raise script.InputError("the stream is broken")
        return make_batch(*args)

    jax.pmap = pmap
    script.make_batch = make_few


def test_a_broken_stream_saves_no_state_that_is_not_finite(place):
    flags = {**TRAINING, "save_steps": 1000, "logging_steps": 1000, "do_train": True}
    change = break_the_stream_after_a_loss_that_is_not_finite
    run = place.run("not_finite", **flags, dataset_name="folder", change=change)
    assert run.returncode == 1
    (line,) = run.lines
    assert "step 5: the loss or its gradient is not finite" in line
    assert checkpoints(place.directory / "not_finite") == []


def test_two_processes(place):
    """Two processes resume, but one process refuses to.

    The evaluation of two processes is that of one.
    """
    flags = {
        **TRAINING,
        "dataset_name": "folder",
        "num_train_steps": 12,
    }
    of_one_process = {**flags, **SAME_BATCH, "devices": 2}
    of_two_processes = {**flags, **EIGHT_DEVICES, "devices": 1}
    whole = finish_cluster(place, "two", **of_two_processes)
    first = {"kill_at": [r"^rename .*/checkpoints/9$"]}
    of_two_processes["do_train"] = True
    runs = start_cluster(place, "two_killed", first=first, **of_two_processes)
    runs[0].wait()
    runs[1].kill()
    killed = place.directory / "two_killed"
    assert (runs[0].returncode, checkpoints(killed)[-1]) == (137, 6)
    run = place.run("two_killed", **of_one_process)
    assert run.returncode == 1
    (line,) = run.lines
    assert "number of processes is 2, here 1" in line
    assert finish_cluster(place, "two_killed", **of_two_processes) == killed
    check_same(killed, whole, EXPORTED[:2])
    assert losses(killed)[12] == losses(whole)[12]

    before = json.loads((whole / "eval_results.json").read_text())
    run = place.run("two", **of_one_process, do_eval=True)
    assert run.returncode == 0, run.stderr
    after = json.loads((whole / "eval_results.json").read_text())
    assert after == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("flag", sorted(stream.NOT_OF_A_STREAM))
def test_flags_that_a_stream_cannot_honor_are_refused(flag):
    argv = ["--output_dir=x", "--model_type=roberta", "--tokenizer_name=x", "--train_file=x.txt"]
    assert stream.parse_args(argv)
    is_switch = flag.endswith(("line", "pad_to_max_length", "mask"))
    refused = [flag] if is_switch else [flag, "3"]
    message = f"a stream has no lines and no length, see .*: {flag}$"
    with pytest.raises(stream.InputError, match=message):
        stream.parse_args([*argv, *refused])
    data_flags = {field.name for field in dataclasses.fields(mlm.DataTrainingArguments)}
    assert flag.lstrip("-") in data_flags | {"num_train_epochs"}


def test_the_same_text_as_the_template(tmp_path, tokenizer):
    """Files of each format have the blocks of their texts, in order."""
    documents = flat(make_documents([300, 200]))
    expected = blocks_of(tokens_of(tokenizer, documents))[0]
    for kind in KINDS:
        paths = write_shards(tmp_path / kind, kind, make_documents([300, 200]))
        texts = open_stream(paths, tokenizer)
        assert first_blocks(texts, len(expected)) == expected


def test_tokens_are_those_of_the_tokenizer(tmp_path, tokenizer):
    """Tokens are those of calling the tokenizer, whatever its file says of truncation and padding.

    This holds for a slow tokenizer, too.
    """
    from transformers import AutoTokenizer, BertTokenizer

    documents = make_documents([300])
    paths = write_shards(tmp_path / "shards", "txt", documents)
    expected = blocks_of(tokens_of(tokenizer, flat(documents)))[0]
    tokenizer(["w1 w2 w3", "w1"], truncation=True, padding="max_length", max_length=4)
    tokenizer.save_pretrained(tmp_path / "short")
    settings = json.loads((tmp_path / "short" / "tokenizer.json").read_text())
    assert settings["truncation"]
    assert settings["padding"]
    short = AutoTokenizer.from_pretrained(tmp_path / "short")
    assert first_blocks(open_stream(paths, short), len(expected)) == expected

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [f"w{number}" for number in range(NUM_WORDS)]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    slow = BertTokenizer(tmp_path / "vocab.txt")
    expected = blocks_of(tokens_of(slow, flat(documents)))[0]
    assert first_blocks(open_stream(paths, slow), len(expected)) == expected
