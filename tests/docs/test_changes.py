"""The changes to run_mlm_flax.py that docs/customizing.md shows do what it says, each in a copy."""

import importlib.util
import re
import shutil
import sqlite3
from dataclasses import replace

import numpy as np
import pytest
from pages import ROOT, apply, diff_of
from training_scripts import LENGTH, TEMPLATE, Place
from transformers import AutoTokenizer

COMBINED = ("masking", "schedule", "source")
RATE = re.compile(r"Step (\d+): .*train_learning_rate ([\d.e+-]+)")


def changed(directory, *changes):
    """Apply these diffs of the page to a copy of the script."""
    shutil.copy(ROOT / TEMPLATE.name, directory / "my_mlm.py")
    for change in changes:
        apply(diff_of(change), directory)
    return Place(replace(TEMPLATE, name=str(directory / "my_mlm.py")), directory)


@pytest.fixture(scope="module")
def combined(tmp_path_factory) -> Place:
    """Three changes at once."""
    return changed(tmp_path_factory.mktemp("changes"), *COMBINED)


def database(path, texts):
    """Add `texts` to a database, which is created if there is none."""
    with sqlite3.connect(path) as connection:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS articles (id INTEGER PRIMARY KEY, body TEXT)"
        )
        rows = [(text,) for text in texts]
        connection.executemany("INSERT INTO articles (body) VALUES (?)", rows)
    connection.close()
    return path


def make_texts(count: int) -> list[str]:
    return [f"w{i % 50} w{i % 7} w{i % 11}" for i in range(count)]


def import_changed(directory):
    """Import the changed copy."""
    spec = importlib.util.spec_from_file_location("my_mlm", directory / "my_mlm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_nouns_of_the_list_are_predicted(tmp_path, monkeypatch):
    place = changed(tmp_path, "nouns")
    monkeypatch.chdir(tmp_path)
    # The last one is not in the vocabulary.
    (tmp_path / "nouns.txt").write_text("w3\nw5\nw7\nw999\n")
    module = import_changed(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    collator = module.FlaxDataCollatorForLanguageModeling(tokenizer, LENGTH, mlm_probability=0.5)
    input_ids = np.random.default_rng(0).integers(0, len(tokenizer), (400, LENGTH), np.int32)
    rngs = module.sequence_generators((7,), range(400))
    batch = collator({"input_ids": input_ids.copy()}, rngs, group_size=400)
    nouns = np.isin(input_ids, tokenizer.convert_tokens_to_ids(["w3", "w5", "w7"]))
    predicted = batch["labels"] != -100
    assert not (predicted & ~nouns).any()
    # The fraction of about 590 nouns that are predicted has a standard deviation of 0.02.
    assert abs(predicted[nouns].mean() - 0.5) < 0.09
    changes = batch["input_ids"] != input_ids
    assert not (changes & ~predicted).any()


def test_masking_hides_spans_of_three(tmp_path):
    place = changed(tmp_path, "masking")
    module = import_changed(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    collator = module.FlaxDataCollatorForLanguageModeling(tokenizer, LENGTH)
    input_ids = np.random.default_rng(0).integers(5, len(tokenizer), (400, LENGTH), np.int32)

    def draw():
        examples = {"input_ids": input_ids.copy()}
        rngs = module.sequence_generators((7,), range(400))
        return collator(examples, rngs, group_size=400)

    batch = draw()
    hidden = batch["labels"] != -100
    spans = hidden[:, : LENGTH // 3 * 3].reshape(400, -1, 3)
    assert (spans.all(2) == spans.any(2)).all()
    # The fraction of 4,267 spans that are hidden has a standard deviation of 0.0055.
    assert abs(hidden.mean() - 0.15) < 0.015
    # A span behind one that is shown is hidden as often as any other.
    behind_shown = spans[:, 1:].all(2)[~spans[:, :-1].all(2)]
    assert abs(behind_shown.mean() - 0.15) < 0.022
    np.testing.assert_array_equal(batch["labels"], draw()["labels"])
    assert (batch["labels"][hidden] == input_ids[hidden]).all()
    masked = (batch["input_ids"] == tokenizer.mask_token_id)[hidden]
    assert abs(masked.mean() - 0.8) < 0.04


def test_schedule_is_a_trapezoid(combined):
    path = database(combined.directory / "plain.sqlite", make_texts(200))
    flags = {
        "train_file": path,
        "validation_file": path,
        "lr_scheduler_type": "trapezoid",
        "learning_rate": 0.01,
        "warmup_steps": 5,
        "max_steps": 25,
        "logging_steps": 1,
        "do_train": True,
        "line_by_line": True,
    }
    run = combined.run("schedule", **flags)
    assert run.returncode == 0, run.stderr
    rates = {int(step): float(rate) for step, rate in RATE.findall(run.stderr)}
    # Of the 20 steps after the warm-up, the last 4 decay.
    fractions = [step / 5 for step in range(5)] + [1.0] * 17 + [0.75, 0.5, 0.25]
    expected = [0.01 * fraction for fraction in fractions]
    assert [rates[step] for step in range(1, 26)] == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_texts_are_those_of_the_database(combined):
    path = database(combined.directory / "texts.sqlite", [f"w{i % 50} w{i % 7}" for i in range(45)])
    flags = {
        "train_file": path,
        "validation_file": path,
        "do_train": True,
        "line_by_line": True,
        "max_steps": 1,
        "overwrite_output_dir": True,
    }
    # Texts that are added later are found, whatever the cache contains.
    for added, count in (([], 45), (["w1 w2", "w3"], 47)):
        database(path, added)
        run = combined.run("source", **flags)
        assert run.returncode == 0, run.stderr
        assert f" parameters on {count} sequences " in run.stderr
    run = combined.run("source", **{**flags, "train_file": "none.sqlite"})
    assert run.returncode == 1
    assert "none.sqlite" in run.lines[-1]
    assert "Traceback" not in run.stderr


def test_a_changed_script_resumes_to_the_same_bits(combined):
    path = database(combined.directory / "resumed.sqlite", make_texts(120))
    flags = {
        "train_file": path,
        "validation_file": path,
        "line_by_line": True,
        "max_steps": 12,
        "save_steps": 6,
        "lr_scheduler_type": "trapezoid",
    }
    undisturbed = combined.run("undisturbed", **flags)
    assert undisturbed.returncode == 0, undisturbed.stderr
    kill_at = [r"^rename .*/checkpoints/6$", r"^rename .*/model\.safetensors$"]
    killed = combined.run("killed", **flags, kill_at=kill_at)
    assert killed.returncode == 137
    resumed = combined.run("killed", **flags)
    assert resumed.returncode == 0, resumed.stderr
    assert "steps 6 to 12" in resumed.stderr
    for name in ("flax_model.msgpack", "eval_results.json"):
        expected = (combined.directory / "undisturbed" / name).read_bytes()
        assert (combined.directory / "killed" / name).read_bytes() == expected
