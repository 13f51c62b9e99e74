"""Tokens stay in memory-mapped chunks, and how the chunks are cut changes no batch."""

import importlib
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from datasets import Dataset
from training_scripts import SCRIPTS, TEMPLATE, Place, full_but

import run_mlm_flax as mlm

STORED = [script for script in SCRIPTS if not script.is_stream]


def cut(values: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Cut values into chunks at random, some of which are empty."""
    num_cuts = rng.integers(0, 12)
    return np.split(values, np.sort(rng.integers(0, len(values) + 1, num_cuts)))


@pytest.mark.parametrize("seed", range(40))
def test_reading_across_chunks_is_slicing(seed):
    rng = np.random.default_rng(seed)
    dtype = [np.int32, np.int8][seed % 2]
    values = rng.integers(1, 100, rng.integers(1, 60), dtype=dtype)
    tokens = mlm.Tokens(cut(values, rng))
    assert len(tokens) == len(values)
    length = int(rng.integers(1, 40))
    starts = rng.integers(0, len(values), 20)
    padded = np.append(values, np.zeros(length, values.dtype))
    expected = np.stack([padded[start : start + length] for start in starts])
    found = tokens.read(starts, length)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, expected)
    assert tokens.checksum() == mlm.Tokens([values]).checksum()


@pytest.mark.parametrize("seed", range(20))
def test_bounds_of_lines(seed):
    """The chunks of a table may begin within the values of another one."""
    rng = np.random.default_rng(seed)
    lists = [list(range(size)) for size in rng.integers(0, 5, 30)]
    array = pyarrow.array(lists, pyarrow.list_(pyarrow.int32()))
    cuts = [0, *sorted(rng.integers(0, 31, 5).tolist()), 30]
    chunks = [array[start:end] for start, end in pairwise(cuts)]
    table = pyarrow.table({"input_ids": pyarrow.chunked_array(chunks, array.type)})
    encoded = Dataset(table)
    lines = mlm.Lines(encoded, "input_ids")
    tokens = mlm.open_tokens(encoded, "input_ids")
    ends = np.cumsum([len(values) for values in lists])
    rows = rng.permutation(30)
    found_starts, found_ends = lines.bounds(rows)
    np.testing.assert_array_equal(found_ends, ends[rows])
    np.testing.assert_array_equal(found_ends - found_starts, [len(lists[row]) for row in rows])
    assert len(lines) == 30
    assert len(tokens) == ends[-1]


@pytest.fixture(scope="module", params=STORED, ids=str)
def place(request, tmp_path_factory) -> Place:
    return Place(request.param, tmp_path_factory.mktemp("large_text"))


def prepare(place: Place, **flags):
    """Return the module of a script, the training sequences and the collator."""
    module = importlib.import_module(place.script.path.stem)
    args = module.parse_args([str(word) for word in place.flags("out", **flags)])
    config, tokenizer, max_length = module.load_config_and_tokenizer(args)
    collator = module.make_collator(args, config, tokenizer, max_length)
    train_set, _ = module.load_data(args, tokenizer, collator.max_length)
    return module, train_set, collator


def columns(sequences) -> dict:
    return {
        name: value
        for name, value in vars(sequences).items()
        if isinstance(value, type(sequences.input_ids))
    }


def batches(module, sequences, collator) -> list[dict]:
    found = list(module.train_batches(sequences, collator, 3, range(4), (2, 3)))
    return [*found, *module.eval_batches(sequences, collator, 3, 5)]


@pytest.mark.parametrize("line_by_line", [False, True])
def test_batches_do_not_depend_on_the_chunks(place, line_by_line):
    if line_by_line and place.script is not TEMPLATE:
        pytest.skip("this script has no lines")
    flags = {"line_by_line": True, "whole_word_mask": True} if line_by_line else {}
    module, sequences, collator = prepare(place, **flags)
    whole = {name: np.concatenate(tokens.chunks) for name, tokens in columns(sequences).items()}
    one_chunk = {name: module.Tokens([values]) for name, values in whole.items()}
    expected = batches(module, replace(sequences, **one_chunk), collator)
    rng = np.random.default_rng(0)
    for _ in range(4):
        chunked = {name: module.Tokens(cut(values, rng)) for name, values in whole.items()}
        found = batches(module, replace(sequences, **chunked), collator)
        for batch, other in zip(expected, found, strict=True):
            assert batch.keys() == other.keys()
            for name in batch:
                np.testing.assert_array_equal(batch[name], other[name])


def test_tokens_are_memory_mapped(place):
    """No chunk owns its memory: it is in a file of the cache."""
    _, sequences, _ = prepare(place)
    maps = Path("/proc/self/maps").read_text().splitlines()
    ranges = []
    for line in maps:
        if line.endswith(".arrow"):
            first, last = line.split()[0].split("-")
            ranges.append((int(first, 16), int(last, 16)))
    for tokens in columns(sequences).values():
        for chunk in tokens.chunks:
            address = chunk.__array_interface__["data"][0]
            assert any(first <= address < last for first, last in ranges)


def cache_files(folder: Path) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.arrow")}


@pytest.mark.parametrize("place", full_but(STORED, TEMPLATE), ids=str, indirect=True)
def test_a_second_start_tokenizes_nothing(place):
    """Also with another seed and another batch size."""
    cache = place.directory / "cache"
    run = place.run("first", max_steps=1, cache_dir=cache)
    assert (run.returncode, run.lines) == (0, [])
    before = cache_files(cache)
    assert len(before) >= 2
    changes = {"seed": 7, "per_device_train_batch_size": 2, "max_steps": 2}
    run = place.run("second", cache_dir=cache, **changes)
    assert (run.returncode, run.lines) == (0, [])
    assert cache_files(cache) == before
    # The comparison can fail.
    place.run("third", cache_dir=cache, max_steps=1, overwrite_cache=True)
    assert cache_files(cache) != before


KILLS = {
    "while it writes": [r"^open .*/cache_of_kills.*/tmp"],
    "before the file gets its name": [r"^rename .*/cache_of_kills.*/cache-.*\.arrow$"],
    "between training and evaluation data": 2 * [r"^rename .*/cache_of_kills.*/cache-.*\.arrow$"],
}


@pytest.mark.parametrize("moment", full_but(KILLS, "before the file gets its name"))
def test_killed_while_it_tokenizes(moment, tmp_path):
    place = Place(TEMPLATE, tmp_path)
    cache = tmp_path / "cache_of_kills"
    flags = {"max_steps": 2, "cache_dir": cache}
    run = place.run("out", kill_at=KILLS[moment], **flags)
    assert run.returncode == 137, run.stderr
    run = place.run("out", **flags)
    assert (run.returncode, run.lines) == (0, [])
    shutil.rmtree(cache)
    run = place.run("undisturbed", **flags)
    assert (run.returncode, run.lines) == (0, [])
    for name in ("flax_model.msgpack", "eval_results.json"):
        found = (tmp_path / "out" / name).read_bytes()
        assert found == (tmp_path / "undisturbed" / name).read_bytes()
