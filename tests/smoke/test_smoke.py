"""One short real run of each script, with its result checked: what to run after each edit.

A run is a process of its own, as a user starts it, with one device and a tiny model of one layer. A
test suite of your own can do the same: write a small text, a tokenizer and a configuration, run the
script, and read eval_results.json.
"""

import json
import math
import re

import numpy as np
import pytest
from outputs import losses
from safetensors.numpy import load_file
from training_scripts import SCRIPTS, Place, checkpoints, without_alarms
from transformers import AutoTokenizer, BertConfig, FlaxAutoModel

pytestmark = pytest.mark.smoke
STEPS = 30
ONE_DEVICE = {"XLA_FLAGS": None}


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_training(script, tmp_path, run_script):
    """The model learns more than nothing, and is saved with a checkpoint and its results."""
    place = Place(script, tmp_path)
    flags = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "logging_steps": 10,
        "save_steps": 20,
    }
    run = run_script([script.name, *place.flags("out", **flags)], env=ONE_DEVICE)
    assert run.returncode == 0, run.stderr
    lines = without_alarms(run.stderr).splitlines()
    assert [line for line in lines if " INFO " not in line] == []

    output_dir = tmp_path / "out"
    assert checkpoints(output_dir) == [20, STEPS]
    logged = losses(output_dir)
    assert list(logged) == [10, 20, STEPS]
    assert logged[STEPS] < logged[10]
    results = json.loads((output_dir / "eval_results.json").read_text())
    # A guess that gives each token of the vocabulary the same chance has this loss.
    vocab_size = json.loads((output_dir / "config.json").read_text())["vocab_size"]
    assert 0 < results["eval_loss"] < math.log(vocab_size) - 0.2
    assert results["eval_perplexity"] == pytest.approx(math.exp(results["eval_loss"]))
    weights = load_file(output_dir / "model.safetensors")
    assert all(np.isfinite(array).all() for array in weights.values())


def test_inference(tmp_path, run_script):
    """The report has a row of numbers for each precision, and their ratio."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    FlaxAutoModel.from_config(BertConfig(vocab_size=99, **sizes)).save_pretrained(tmp_path)
    argv = [
        "run_bert_flax.py",
        f"--model_name_or_path={tmp_path}",
        "--compare",
        "--batch_size=2",
        "--seq_length=16",
        "--num_warmup=1",
        "--num_iters=3",
    ]
    run = run_script(argv, env=ONE_DEVICE)
    assert run.returncode == 0, run.stderr
    rows = re.findall(r"(?m)^(float32|bfloat16) +([\d.,]+) ", run.stdout)
    assert [precision for precision, _ in rows] == ["float32", "bfloat16"]
    assert all(float(number.replace(",", "")) > 0 for _, number in rows)
    assert "times as fast" in run.stdout


def test_tokenizer(tmp_path, run_script):
    """A tokenizer that is trained by the command splits a text and restores it."""
    lines = [f"the tokenizer reads line {i} of a small text\n" for i in range(300)]
    (tmp_path / "train.txt").write_text("".join(lines))
    argv = [
        "t5_tokenizer_model.py",
        f"--train_file={tmp_path / 'train.txt'}",
        "--vocab_size=200",
        f"--output_dir={tmp_path / 'out'}",
    ]
    run = run_script(argv)
    assert run.returncode == 0, run.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the small tokenizer reads"
    ids = tokenizer(text)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
