"""The changes of run_mlm_flax.py that the README shows, each applied to a copy, do what it says they do."""

import importlib.util
import re
import shutil
import sqlite3
from dataclasses import replace

import numpy as np
import pytest
from test_readme import ROOT, apply, block_of
from training_scripts import LENGTH, TEMPLATE, Place
from transformers import AutoTokenizer

SECTIONS = ("Another masking", "Another schedule", "Another source of text")
RATE = re.compile(r"Step (\d+): .*train_learning_rate ([\d.e+-]+)")


def changed(directory, *sections):
    """A copy of the script with the diffs of these sections, and a folder with all that a run of it needs."""
    shutil.copy(ROOT / TEMPLATE.name, directory / "my_mlm.py")
    for section in sections:
        apply(block_of(section, "diff"), directory)
    return Place(replace(TEMPLATE, name=str(directory / "my_mlm.py")), directory)


@pytest.fixture(scope="module")
def combined(tmp_path_factory) -> Place:
    """All three changes at once."""
    return changed(tmp_path_factory.mktemp("changes"), *SECTIONS)


def database(path, texts):
    with sqlite3.connect(path) as connection:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS articles (id INTEGER PRIMARY KEY, body TEXT)"
        )
        connection.executemany(
            "INSERT INTO articles (body) VALUES (?)", [(text,) for text in texts]
        )
    connection.close()
    return path


def test_masking_hides_spans_of_three(tmp_path):
    place = changed(tmp_path, "Another masking")
    spec = importlib.util.spec_from_file_location("my_mlm", tmp_path / "my_mlm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    collator = module.FlaxDataCollatorForLanguageModeling(tokenizer, LENGTH)
    input_ids = np.random.default_rng(0).integers(5, len(tokenizer), (400, LENGTH), np.int32)
    draw = lambda: collator(
        {"input_ids": input_ids.copy()}, np.random.default_rng(7), group_size=400
    )  # noqa: E731
    batch = draw()
    hidden = batch["labels"] != -100
    spans = hidden[:, : LENGTH // 3 * 3].reshape(400, -1, 3)
    assert (spans.all(2) == spans.any(2)).all()
    assert abs(hidden.mean() - 0.15) < 0.015  # 4 standard deviations of 4,267 spans are 0.022
    assert (
        abs(spans[:, 1:].all(2)[~spans[:, :-1].all(2)].mean() - 0.15) < 0.022
    )  # a span's neighbor is as any other
    np.testing.assert_array_equal(batch["labels"], draw()["labels"])
    assert (batch["labels"][hidden] == input_ids[hidden]).all()
    shown = (batch["input_ids"] == tokenizer.mask_token_id)[hidden].mean()
    assert abs(shown - 0.8) < 0.04


def test_schedule_is_a_trapezoid(combined):
    flags = {
        "lr_scheduler_type": "trapezoid",
        "learning_rate": 0.01,
        "warmup_steps": 5,
        "max_steps": 25,
    }
    path = database(
        combined.directory / "plain.sqlite", [f"w{i % 50} w{i % 7} w{i % 11}" for i in range(200)]
    )
    files = {"train_file": path, "validation_file": path}
    run = combined.run(
        "schedule", **flags, **files, logging_steps=1, do_train=True, line_by_line=True
    )
    assert run.returncode == 0, run.stderr
    rates = {int(step): float(rate) for step, rate in RATE.findall(run.stderr)}
    wanted = (
        [step / 5 for step in range(5)] + [1.0] * 17 + [0.75, 0.5, 0.25]
    )  # 20 steps after the warm-up, 4 of them down
    assert [rates[step] for step in range(1, 26)] == pytest.approx(
        [0.01 * rate for rate in wanted], rel=1e-3, abs=1e-9
    )


def test_texts_are_those_of_the_database(combined):
    path = database(combined.directory / "texts.sqlite", [f"w{i % 50} w{i % 7}" for i in range(45)])
    files = {
        "train_file": path,
        "validation_file": path,
        "do_train": True,
        "line_by_line": True,
        "max_steps": 1,
    }
    for more, count in (
        ((), 45),
        (["w1 w2", "w3"], 47),
    ):  # what is added is seen, whatever the cache holds
        database(path, more)
        run = combined.run("source", **files, overwrite_output_dir=True)
        assert run.returncode == 0, run.stderr
        assert f" parameters on {count} sequences " in run.stderr
    run = combined.run(
        "source", **{**files, "train_file": "none.sqlite"}, overwrite_output_dir=True
    )
    assert run.returncode == 1
    assert "none.sqlite" in run.lines[-1]
    assert "Traceback" not in run.stderr


def test_a_changed_script_resumes_to_the_same_bits(combined):
    path = database(
        combined.directory / "resumed.sqlite", [f"w{i % 50} w{i % 7} w{i % 11}" for i in range(120)]
    )
    flags = {
        "train_file": path,
        "validation_file": path,
        "line_by_line": True,
        "max_steps": 12,
        "save_steps": 6,
    }
    flags |= {"lr_scheduler_type": "trapezoid"}
    undisturbed = combined.run("undisturbed", **flags)
    assert undisturbed.returncode == 0, undisturbed.stderr
    killed = combined.run(
        "killed", **flags, kill_at=[r"^rename .*/checkpoints/6$", r"^rename .*/model\.safetensors$"]
    )
    assert killed.returncode == 137
    resumed = combined.run("killed", **flags)
    assert resumed.returncode == 0, resumed.stderr
    assert "steps 6 to 12" in resumed.stderr
    results = [
        (combined.directory / name / "flax_model.msgpack").read_bytes()
        for name in ("undisturbed", "killed")
    ]
    assert results[0] == results[1]
    losses = [
        (combined.directory / name / "eval_results.json").read_text()
        for name in ("undisturbed", "killed")
    ]
    assert losses[0] == losses[1]
