"""What run_mlm_flax_stream.py reads, in which order, and where it goes on: against plain lists of the same documents.

Each word occurs once in the data, so that a token tells where it is from.
"""

import csv
import dataclasses
import gzip
import itertools
import json
import random
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from test_hosts import finish_cluster, losses, start_cluster
from training_scripts import SCRIPTS, Place, checkpoints, word_tokenizer, write_text

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import run_mlm_flax as mlm
import run_mlm_flax_stream as stream

(SCRIPT,) = (script for script in SCRIPTS if script.is_stream)
NUM_WORDS = 6000
BLOCK = 16
SAME_BATCH = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 1,
}  # as of two processes, accumulated
START = {"epoch": 0, "state": None, "carried": [], "used": 0, "seen": 0, "offset": 0}


# ------------------------------------------------------------------------------------------- documents, in plain words


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return word_tokenizer(tmp_path_factory.mktemp("tokenizer"), num_words=NUM_WORDS)


def make_documents(sizes: list[int]) -> list[list[str]]:
    """Texts of each shard; a few are blank, one is long."""
    rng, number, shards = random.Random(0), itertools.count(), []
    for size in sizes:
        lengths = [
            0 if rng.random() < 0.05 else 70 if i == 5 else rng.randint(1, 9) for i in range(size)
        ]
        shards.append(
            [" ".join(f"w{next(number)}" for _ in range(length)) or " " for length in lengths]
        )
    assert next(number) < NUM_WORDS
    return shards


def write_shards(directory: Path, kind: str, shards: list[list[str]]) -> list[Path]:
    directory.mkdir(exist_ok=True)
    paths = [directory / f"train-{index}.{kind}" for index in range(len(shards))]
    for path, texts in zip(paths, shards, strict=True):
        if kind in ("txt", "txt.gz"):
            with (gzip.open if kind == "txt.gz" else open)(path, "wt") as file:
                file.write("".join(text + "\n" for text in texts))
        elif kind == "jsonl":
            path.write_text(
                "".join(
                    json.dumps({"number": i, "text": text}) + "\n" for i, text in enumerate(texts)
                )
            )
        elif kind == "csv":
            with path.open("w", newline="") as file:
                csv.writer(file).writerows([("number", "text"), *enumerate(texts)])
        else:
            table = pyarrow.table({"text": texts, "number": list(range(len(texts)))})
            pyarrow.parquet.write_table(table, path, row_group_size=100)
    return paths


def flat(shards: list[list[str]]) -> list[str]:
    return list(itertools.chain.from_iterable(shards))


def tokens_of(tokenizer, texts: list[str]) -> list[int]:
    return [token for text in texts if text.strip() for token in tokenizer(text)["input_ids"]]


def blocks_of(tokens: list[int]) -> tuple[list[tuple], list[int]]:
    """Blocks, and what is left over."""
    end = len(tokens) - len(tokens) % BLOCK
    return [tuple(tokens[i : i + BLOCK]) for i in range(0, end, BLOCK)], tokens[end:]


def epochs_of(tokens: list[int], count: int) -> list[list[tuple]]:
    """The blocks of `count` epochs: what does not fill one opens the next epoch."""
    epochs, rest = [], []
    for _ in range(count):
        blocks, rest = blocks_of(rest + tokens)
        epochs.append(blocks)
    return epochs


def words_of(blocks, tokenizer) -> list[int]:
    return [token for block in blocks for token in block if token not in tokenizer.all_special_ids]


# ------------------------------------------------------------------------------------------------- the same, streamed


def open_stream(paths: list[Path], tokenizer, **options):
    import datasets

    builder = {"txt": "text", "gz": "text", "jsonl": "json", "csv": "csv", "parquet": "parquet"}[
        paths[0].name.split(".")[-1]
    ]
    files = [str(path) for path in paths]
    dataset = datasets.load_dataset(
        builder, data_files=files, split="train", streaming=True, **options
    )
    return stream.BlockStream(*stream.text_column(dataset, "text", "the data"), tokenizer, BLOCK)


def draw(texts, held_out, position=START, size: int = 50, batch_size: int = 1, limit=None):
    """Blocks in the order of training, each with the position after it; the stream starts at `position`."""
    position = json.loads(json.dumps(position))
    blocks = stream.shuffle(
        texts.blocks(dict(position), batch_size, limit, *held_out), max(size, batch_size), 42
    )
    for after, block in itertools.islice(blocks, position["offset"], None):
        yield after, tuple(block.tolist())


def take(texts, held_out, count: int, **options):
    return list(itertools.islice(draw(texts, held_out, **options), count))


@pytest.fixture
def as_process(monkeypatch):
    def as_process(rank: int, count: int):
        monkeypatch.setattr(jax, "process_index", lambda: rank)
        monkeypatch.setattr(jax, "process_count", lambda: count)

    return as_process


KINDS = ["txt", "txt.gz", "jsonl", "csv", "parquet"]
SIZES = [310, 40, 290]  # 64 texts are read at a time


@pytest.fixture(scope="module", params=KINDS)
def texts(request, tmp_path_factory, tokenizer):
    paths = write_shards(
        tmp_path_factory.mktemp("texts") / "shards", request.param, make_documents(SIZES)
    )
    return open_stream(paths, tokenizer)


@pytest.mark.parametrize("num_held_out", [0, 1, 30, 150])
@pytest.mark.parametrize("size", [1, 50, 1000])
def test_every_block_of_every_epoch_and_none_held_out(texts, tokenizer, num_held_out, size):
    """Three epochs: in each window the blocks that plain lists have there, in an order of its own."""
    tokens = tokens_of(tokenizer, flat(make_documents(SIZES)))
    eval_blocks, *held_out = texts.first(num_held_out, num_held_out)
    assert [tuple(block) for block in eval_blocks.tolist()] == blocks_of(tokens)[0][:num_held_out]
    epochs = epochs_of(tokens[num_held_out * BLOCK :], 3)
    drawn = [block for _, block in take(texts, held_out, sum(map(len, epochs)), size=size)]
    kept, orders = set(words_of(drawn, tokenizer)), []
    for expected in epochs:
        found, drawn = drawn[: len(expected)], drawn[len(expected) :]
        for start in range(0, len(expected), size):
            assert sorted(found[start : start + size]) == sorted(expected[start : start + size])
        orders.append([expected.index(block) for block in found])
    assert not kept & set(words_of(eval_blocks.tolist(), tokenizer))
    assert size == 1 or len(set(map(tuple, orders))) == 3  # each epoch in another order


@pytest.mark.parametrize(
    ("num_processes", "sizes"), [(2, [310, 40, 290]), (2, [310, 40, 30, 260]), (3, [640])]
)
@pytest.mark.parametrize("kind", ["txt", "parquet"])
def test_processes_share_out_the_texts(tmp_path, tokenizer, as_process, num_processes, sizes, kind):
    """Shard by shard or text by text: disjoint, complete, without what is held out, in each of two epochs."""
    shards = make_documents(sizes)
    tokens = tokens_of(tokenizer, flat(shards))
    texts = open_stream(write_shards(tmp_path / "shards", kind, shards), tokenizer)
    eval_blocks, *held_out = texts.first(70, 70)
    assert [tuple(block) for block in eval_blocks.tolist()] == blocks_of(tokens)[0][:70]
    seen = []
    for rank in range(num_processes):
        as_process(rank, num_processes)
        drawn = list(itertools.takewhile(lambda item: item[0]["epoch"] < 2, draw(texts, held_out)))
        last = next(after for after, _ in draw(texts, held_out) if after["epoch"] == 2)
        seen.append(
            words_of([block for _, block in drawn], tokenizer)
            + words_of([last["carried"]], tokenizer)
        )
    for one, other in itertools.combinations(seen, 2):
        assert not set(one) & set(other)
    expected = words_of([tokens[70 * BLOCK :]], tokenizer)
    assert sorted(itertools.chain(*seen)) == sorted(2 * expected)
    assert min(map(len, seen)) > 0.3 * len(expected)


@pytest.mark.parametrize(("rank", "num_processes"), [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_resumed_anywhere_the_order_goes_on(texts, as_process, rank, num_processes):
    """At random points of three epochs, and again from a stream that was itself resumed."""
    as_process(rank, num_processes)
    _, *held_out = texts.first(30, 30)
    rng = random.Random(rank)
    whole = take(texts, held_out, 900 // num_processes, size=37)
    assert whole[-1][0]["epoch"] >= 1

    def check(position, start: int, count: int):
        """What comes after `position`, which is that after `start` blocks."""
        resumed = take(texts, held_out, min(count, len(whole) - start), position=position, size=37)
        expected = whole[start : start + count]
        assert [block for _, block in resumed] == [block for _, block in expected]
        for name in START.keys() - {"state"}:  # of which datasets has several for the same row
            assert [after[name] for after, _ in resumed] == [after[name] for after, _ in expected]
        return resumed

    points = rng.sample(range(len(whole) - 60), 12)
    for first in points:
        resumed = check(whole[first][0], first + 1, 60)
        second = rng.randrange(20)
        twice = check(resumed[second][0], first + second + 2, 30)
        check(twice[5][0], first + second + 8, 20)
    for first in points[:2]:  # as far as two epochs on
        check(whole[first][0], first + 1, 900)


def test_what_was_read_is_not_read_again(tmp_path, tokenizer):
    """Shards before that of the position may be gone; a state within an epoch is small."""
    paths = write_shards(tmp_path / "shards", "txt", make_documents([300, 300, 300]))
    texts = open_stream(paths, tokenizer)
    held_out = ([0, 0, 0], np.zeros(0, np.int32))
    whole = take(texts, held_out, 300, size=20)
    assert len(json.dumps(whole[250][0])) < 1000
    paths[0].unlink()
    assert take(texts, held_out, 49, position=whole[250][0], size=20) == whole[251:]


def test_max_train_samples(texts, tokenizer):
    tokens = tokens_of(tokenizer, flat(make_documents(SIZES)))
    _, *held_out = texts.first(10, 10)
    expected = sorted(blocks_of(tokens)[0][10:55])
    drawn = [block for _, block in take(texts, held_out, 135, limit=45, size=20)]
    assert [sorted(drawn[i : i + 45]) for i in (0, 45, 90)] == [expected] * 3


@pytest.mark.parametrize(("held", "batch_size"), [(0, 400), (200, 200)])
def test_too_short(texts, held, batch_size):
    """The counts are in the message. One more block is too many to hold out."""
    tokens = tokens_of(texts.tokenizer, flat(make_documents(SIZES)))
    count = len(tokens) // BLOCK
    with pytest.raises(
        stream.InputError, match=f"--num_eval_samples {count + 1}: the data has {count} blocks"
    ):
        texts.first(count + 1, count + 1)
    _, *held_out = texts.first(held, held)
    message = rf"the data has {count - held} blocks of 16 tokens, {len(tokens) % BLOCK} more; a batch takes {batch_size}"
    with pytest.raises(stream.InputError, match=message):
        take(texts, held_out, 1, batch_size=batch_size)


def test_a_column_that_stops_being_text(tmp_path, tokenizer):
    paths = write_shards(tmp_path / "shards", "parquet", [["w1 w2 w3"] * 300, ["w4"]])
    pyarrow.parquet.write_table(pyarrow.table({"text": [["w4"]], "number": [0]}), paths[1])
    texts = open_stream(paths, tokenizer)
    held_out = ([0, 0], np.zeros(0, np.int32))
    assert len(take(texts, held_out, 60, size=1)) == 60
    with pytest.raises(stream.InputError, match="the data: unreadable"):
        take(texts, held_out, 500)


# --------------------------------------------------------------------------------------------------------------- masks


def test_masks_are_the_template_s(tokenizer):
    rng = np.random.default_rng(0)
    input_ids = rng.integers(0, len(tokenizer), (64, BLOCK), dtype=np.int32)
    mask = lambda module: module.FlaxDataCollatorForLanguageModeling(tokenizer, BLOCK)(  # noqa: E731
        {"input_ids": input_ids.copy()}, np.random.Generator(np.random.PCG64(7)), 8
    )
    expected, found = mask(mlm), mask(stream)
    assert all((expected[name] == found[name]).all() for name in ("input_ids", "labels"))


@pytest.mark.parametrize(("rows", "size"), [(37, 1), (37, 2), (5, 2), (64, 4)])
def test_evaluation_is_the_template_s(tokenizer, as_process, monkeypatch, rows, size):
    """Batches of one process, and those of two of half as many devices side by side."""
    blocks = np.random.default_rng(0).integers(5, len(tokenizer), (rows, BLOCK), dtype=np.int32)
    ends = np.arange(1, rows + 1) * BLOCK
    sequences = mlm.Sequences(
        blocks.ravel(), np.zeros(blocks.size, np.int8), ends - BLOCK, ends, BLOCK, BLOCK
    )
    collators = [
        module.FlaxDataCollatorForLanguageModeling(tokenizer, BLOCK) for module in (mlm, stream)
    ]
    expected = list(mlm.eval_batches(sequences, collators[0], 42, size))
    found = list(stream.eval_batches(blocks, collators[1], 42, size))
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    halves = []
    for rank in range(2):
        as_process(rank, 2)
        halves.append(list(stream.eval_batches(blocks, collators[1], 42, size)))
    assert len(expected) == len(found) == len(halves[0]) == len(halves[1])
    for one, other, *parts in zip(expected, found, *halves, strict=True):
        together = {name: np.concatenate([part[name] for part in parts]) for name in other}
        for labels in (other["labels"], together["labels"]):
            assert (one["labels"] == labels).all()
        shown = (one["labels"] != -100).any(
            axis=-1
        )  # a row that fills up the last batch may be any
        for input_ids in (other["input_ids"], together["input_ids"]):
            assert (one["input_ids"][shown] == input_ids[shown]).all()


def test_processes_mask_as_one(tokenizer, as_process, monkeypatch):
    """A step's masks are a function of seed and step: those of a process are its rows of those of all."""
    blocks = np.random.default_rng(0).integers(5, len(tokenizer), (64, BLOCK), dtype=np.int32)
    collator = stream.FlaxDataCollatorForLanguageModeling(tokenizer, BLOCK)
    batches = lambda rows: list(  # noqa: E731
        stream.train_batches(
            iter([({}, row) for row in rows]), collator, 42, range(3, 4), (1, 8), {}
        )
    )
    (whole,) = batches(blocks)
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    for rank, rows in enumerate(np.split(blocks, 2)):
        as_process(rank, 2)
        (part,) = batches(rows)
        assert all((part[name] == np.split(whole[name], 2)[rank]).all() for name in whole)


# ---------------------------------------------------------------------------------------------------------- whole runs

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


def check_same(a: Path, b: Path, names=EXPORTED):
    assert [name for name in names if (a / name).read_bytes() != (b / name).read_bytes()] == []
    last = [
        json.loads((x / "checkpoints" / str(checkpoints(x)[-1]) / "run" / "metadata").read_text())
        for x in (a, b)
    ]
    assert last[0] == last[1]


def test_killed_and_stopped_it_ends_with_the_same_weights(place, undisturbed):
    """By SIGKILL in the first epoch and in the second, by SIGTERM between two saves."""
    output_dir = place.directory / "killed"
    log = r"^open .*/events\.out\.tfevents"
    for kill_at, number in (
        ([r"^rename .*/checkpoints/6$"], signal.SIGKILL),
        (
            [r"^rename .*/checkpoints/\d+$"] * 3 + [r"^rename .*/flax_model\.msgpack$"],
            signal.SIGKILL,
        ),
        ([log] * 6, signal.SIGTERM),
        ([r"^rename .*/checkpoints/36$"], signal.SIGKILL),
    ):
        run = place.run(
            output_dir, **TRAINING, dataset_name="folder", kill_at=kill_at, kill_with=number
        )
        assert (run.returncode, run.lines) == (128 + number, [])
    assert checkpoints(output_dir)[-1] < 36
    run = place.run(output_dir, **TRAINING, dataset_name="folder")
    assert (run.returncode, run.lines) == (0, [])
    check_same(output_dir, undisturbed)


def test_a_shard_that_cannot_be_read(place, undisturbed):
    """Training ends with the last batch before it; when the shard is mended, it goes on as if nothing had been."""
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
    assert all(word in line for word in ("--dataset_name broken", "unreadable", f"step {step} "))
    assert (output_dir / "model.safetensors").exists()
    run = place.run("broken_run", **TRAINING, dataset_name="broken")  # nothing has changed
    assert (run.returncode, checkpoints(output_dir)) == (1, [step])
    third.write_bytes(whole)
    run = place.run("broken_run", **TRAINING, dataset_name="broken")
    assert (run.returncode, run.lines) == (0, [])
    check_same(output_dir, undisturbed)


def test_another_run_s_checkpoint(place, undisturbed):
    """It goes on from where the other run stood; given again, from where it stood itself, or, if that is damaged, from
    the other's place again."""
    first, last = checkpoints(undisturbed)[0], STEPS - 1
    output_dir, other = place.directory / "another", undisturbed / "checkpoints" / str(first)
    flags = {**TRAINING, "dataset_name": "folder", "resume_from_checkpoint": other}
    kill_at = [rf"^rename .*/checkpoints/{last}$", r"^rename .*/flax_model\.msgpack$"]
    run = place.run(output_dir, **flags, kill_at=kill_at)
    assert (run.returncode, checkpoints(output_dir)) == (137, [last])
    for start in (last, first):
        run = place.run(output_dir, **flags)
        assert (run.returncode, len(run.lines)) == (0, 0 if start == last else 2), run.stderr
        assert f"steps {start} to {STEPS}" in run.stderr
        check_same(output_dir, undisturbed)
        for step in checkpoints(output_dir):
            (output_dir / "checkpoints" / str(step) / "run" / "metadata").write_text("damaged")


def count_batches(script):
    """The most batches that wait on the host, and on the devices, for a step to take them: to the file `counts`."""
    import json
    import pathlib

    import jax

    made, put, done, waiting = [], [], [], []
    make_batch, shard, make_program = script.make_batch, script.shard, jax.pmap

    def count(batches, function):
        def counted(*args):
            result = function(*args)
            batches.extend([1] if isinstance(result, dict) and "labels" in result else [])
            return result

        return counted

    def pmap(*args, **options):
        program = make_program(*args, **options)

        def dispatch(*args):
            waiting.append((len(made) - len(done), len(put) - len(done)))
            pathlib.Path("counts").write_text(
                json.dumps([max(x) for x in zip(*waiting, strict=True)])
            )
            done.append(1)
            return program(*args)

        return dispatch

    script.make_batch, script.shard, jax.pmap = count(made, make_batch), count(put, shard), pmap


def test_what_waits_on_the_devices(place):
    """Is not more for a larger window, which is prepared on the host."""
    changes = {
        "shuffle_buffer_size": 400,
        "num_train_steps": 60,
        "save_steps": 1000,
        "do_train": True,
    }
    run = place.run(
        "waiting", **{**TRAINING, **changes}, dataset_name="folder", change=count_batches
    )
    assert (run.returncode, run.lines) == (0, [])
    on_host, on_devices = json.loads((place.directory / "counts").read_text())
    assert on_devices <= 3
    assert on_host > 20


@pytest.mark.parametrize(
    "changes", [{"shuffle_buffer_size": 31}, {"num_eval_samples": 120}, {"seed": 43}], ids=str
)
def test_another_stream_is_not_resumed(place, undisturbed, changes):
    run = place.run("undisturbed", **{**TRAINING, **changes}, dataset_name="folder")
    assert run.returncode == 1
    (line,) = run.lines
    assert "checkpoints/40" in line


def test_two_processes(place):
    """Each goes on where it stood, but one alone does not; they evaluate as one does."""
    changes = {
        "dataset_name": "folder",
        "num_train_steps": 12,
        "max_steps": -1,
        "eval_steps": None,
        "devices": 1,
    }
    flags = {**TRAINING, **changes}
    whole = finish_cluster(place, "two", **flags)
    runs = start_cluster(
        place,
        "two_killed",
        first={"kill_at": [r"^rename .*/checkpoints/9$"]}.items(),
        **flags,
        do_train=True,
    )
    runs[0].wait()
    runs[1].kill()
    killed = place.directory / "two_killed"
    assert (runs[0].returncode, checkpoints(killed)[-1]) == (137, 6)
    run = place.run("two_killed", **{**flags, **SAME_BATCH, "devices": 2})
    assert run.returncode == 1
    (line,) = run.lines
    assert "number of processes is 2, here 1" in line
    assert finish_cluster(place, "two_killed", **flags, do_train=True) == killed
    check_same(killed, whole, EXPORTED[:2])
    assert losses(killed)[12] == losses(whole)[12]

    before = json.loads((whole / "eval_results.json").read_text())
    run = place.run("two", **{**flags, **SAME_BATCH, "devices": 2}, do_eval=True)
    assert run.returncode == 0, run.stderr
    assert json.loads((whole / "eval_results.json").read_text()) == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("flag", sorted(stream.NOT_OF_A_STREAM))
def test_flags_that_a_stream_cannot_honour_are_refused(flag):
    argv = ["--output_dir=x", "--model_type=roberta", "--tokenizer_name=x", "--train_file=x.txt"]
    assert stream.parse_args(argv)
    with pytest.raises(
        stream.InputError, match=f"a stream has no lines and no length, see .*: {flag}$"
    ):
        stream.parse_args(
            [*argv, flag, *([] if flag.endswith(("line", "pad_to_max_length", "mask")) else ["3"])]
        )
    assert flag.lstrip("-") in {
        field.name for field in dataclasses.fields(mlm.DataTrainingArguments)
    } | {"num_train_epochs"}


def test_the_same_text_as_the_template(tmp_path, tokenizer):
    """Blocks, in order, from the same files: a folder, and each format, of which columns may be unknown."""
    documents = flat(make_documents([300, 200]))
    expected = blocks_of(tokens_of(tokenizer, documents))[0]
    for kind in KINDS:
        paths = write_shards(tmp_path / kind, kind, make_documents([300, 200]))
        texts = open_stream(paths, tokenizer)
        assert [tuple(block) for block in texts.first(len(expected), 1)[0].tolist()] == expected


def test_tokens_are_the_tokenizer_s(tmp_path, tokenizer):
    """Those of its own call, whatever its file says of truncation and padding, and those of a slow one."""
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
    texts = open_stream(paths, short)
    assert [tuple(block) for block in texts.first(len(expected), 1)[0].tolist()] == expected

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *(f"w{number}" for number in range(NUM_WORDS)),
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    slow = BertTokenizer(tmp_path / "vocab.txt")
    expected = blocks_of(tokens_of(slow, flat(documents)))[0]
    found = open_stream(paths, slow).first(len(expected), 1)[0]
    assert [tuple(block) for block in found.tolist()] == expected
