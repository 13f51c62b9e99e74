"""The benchmarks measure what they say. No test here asserts a time."""

import subprocess
import sys
from pathlib import Path

import pytest
from training_scripts import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import harness
import tables

PARTS = ("imports", "data", "initialization", "compilation")


def test_readme_holds_what_was_measured():
    """Mended by `python benchmarks/tables.py`. Every file of results is shown, and by the benchmark that wrote it."""
    text = tables.README.read_text("utf-8")
    assert tables.fill(text) == text
    assert sorted(name for _, name, _ in tables.BLOCK.findall(text)) == sorted(
        path.stem for path in tables.RESULTS.iterdir()
    )


@pytest.mark.parametrize("length", [16, 32])
def test_operations_of_a_gpt2_step_by_the_formula(length):
    """Six a weight of a matrix and a token, and those of attention: Kaplan et al., 2020, table 1, there with 2 for the
    forward pass alone; causal attention is computed in full here."""
    import jax
    import numpy as np
    from transformers import FlaxGPT2LMHeadModel, GPT2Config

    layers, width, vocab_size, rows = 2, 32, 64, 4
    config = GPT2Config(vocab_size, n_positions=length, n_embd=width, n_layer=layers, n_head=2)
    model = FlaxGPT2LMHeadModel(config)

    def loss(params, ids):
        return model(ids, params=params).logits.sum()

    program = jax.make_jaxpr(jax.grad(loss))(model.params, np.zeros((rows, length), np.int32))
    matrices = layers * 12 * width**2 + width * vocab_size
    attention = layers * 2 * length * width
    assert harness.count_flops(program.jaxpr) == 6 * rows * length * (matrices + attention)


def test_harness_runs_a_script_as_it_is(tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "train.txt").write_text(
        "\n".join(f"the line {i} of a text of lines" for i in range(3000))
    )
    text = harness.write_corpus(tmp_path, 0.05)
    assert 50_000 <= text.stat().st_size < 50_100
    folder = harness.write_model(tmp_path, text, "gpt2", "small", 16, 300)
    steps, segment = harness.WARM_UP + 4, 2
    more = {"max_steps": steps, "logging_steps": 1}
    script, flags = harness.command("causal", folder, text, tmp_path / "out", 2, 16, **more)
    one_device = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    found = harness.run(
        tmp_path, script, flags, one_device, segment=segment, product=("float32", 64)
    )
    assert found["tokens"] == 2 * 16
    assert all(0 < found[name] < found["process"] for name in (*PARTS, "loop", "bare"))
    assert sum(found[name] for name in PARTS) < found["to_first_step"] < found["process"]
    assert found["flops"] == 6 * 2 * 16 * (2 * 12 * 128**2 + 128 * 300 + 2 * 2 * 16 * 128)
    assert (tmp_path / "out" / "checkpoints" / str(steps)).is_dir()


def test_harness_ends_with_the_error_of_the_script(tmp_path):
    with pytest.raises(SystemExit, match="error: --max_steps 0: it must be at least 1"):
        harness.run(tmp_path, "run_mlm_flax.py", ["--output_dir=out", "--max_steps=0"])


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem
)
def test_help_says_the_command(path: Path):
    text = path.read_text("utf-8")
    if "ArgumentParser" not in text:
        return
    done = subprocess.run(
        [sys.executable, path, "--help"], capture_output=True, text=True, timeout=120, check=True
    )
    assert f"python benchmarks/{path.name}" in done.stdout


def test_inference_reads_the_report_of_the_script(tmp_path):
    import inference
    from transformers import BertConfig, FlaxAutoModel

    config = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    FlaxAutoModel.from_config(config).save_pretrained(tmp_path)
    fast = ["--batch_size=2", "--seq_length=16", "--num_warmup=1", "--num_iters=3"]
    found = inference.compare(["run_bert_flax.py"], [f"--model_name_or_path={tmp_path}", *fast])
    assert all(list(found[name]) == list(inference.COLUMNS) for name in inference.PRECISIONS)
    rates = [found[name]["examples/s"] for name in inference.PRECISIONS]
    assert found["ratio"] == pytest.approx(rates[1] / rates[0], rel=0.05)
    assert 0 < found["error"] < 3
    with pytest.raises(SystemExit, match="--num_iters 0: it must be at least 1"):
        inference.compare(["-c", inference.PLAIN], ["--num_iters=0"])
