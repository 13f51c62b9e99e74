"""The benchmarks measure what they say. No test here asserts a time."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from training_scripts import ROOT, full_but
from transformers import CONFIG_MAPPING

sys.path.insert(0, str(ROOT / "benchmarks"))
import accelerators
import buffers
import harness
import operations

PARTS = ("imports", "data", "initialization", "compilation")
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("length", full_but([16, 32], 32))
def test_operations_of_a_gpt2_step_by_the_formula(length):
    """A step takes 6 operations per weight of a matrix and token, and those of attention.

    The formula is that of Kaplan et al., 2020, table 1, which has 2 for the forward pass alone.
    Here causal attention is computed in full.
    """
    import numpy as np
    from transformers import FlaxGPT2LMHeadModel, GPT2Config

    layers = 2
    width = 32
    vocab_size = 64
    rows = 4
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=length,
        n_embd=width,
        n_layer=layers,
        n_head=2,
    )
    model = FlaxGPT2LMHeadModel(config)

    def loss(params, ids):
        return model(ids, params=params).logits.sum()

    ids = np.zeros((rows, length), np.int32)
    traced = jax.make_jaxpr(jax.grad(loss))(model.params, ids)
    matrices = layers * 12 * width**2 + width * vocab_size
    attention = layers * 2 * length * width
    num_tokens = rows * length
    assert harness.count_flops(traced.jaxpr) == 6 * num_tokens * (matrices + attention)


@pytest.mark.full
def test_harness_runs_a_script_as_it_is(tmp_path):
    """The notes of a run of GPT-2 hold what they should, and the run saves its checkpoint."""
    (tmp_path / "all").mkdir()
    lines = [f"the line {i} of a text of lines" for i in range(3000)]
    (tmp_path / "all" / "train.txt").write_text("\n".join(lines))
    text = harness.write_corpus(tmp_path, 0.05)
    assert 50_000 <= text.stat().st_size < 50_100

    rows = 2
    length = 16
    vocab_size = 300
    folder = harness.write_model(tmp_path, text, "gpt2", "small", length, vocab_size)
    segment = 2
    steps = harness.WARM_UP + 2 * segment
    script, flags = harness.command(
        "causal",
        folder,
        text,
        tmp_path / "out",
        rows,
        length,
        max_steps=steps,
        logging_steps=1,
    )
    one_device = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    settings = {"segment": segment, "product": ("float32", 64)}
    found = harness.run(tmp_path, script, flags, one_device, **settings)

    num_tokens = rows * length
    assert found["tokens"] == num_tokens
    for name in (*PARTS, "loop", "bare"):
        assert 0 < found[name] < found["process"]
    sum_of_parts = sum(found[name] for name in PARTS)
    assert sum_of_parts < found["to_first_step"] < found["process"]
    # The formula above, for 2 layers of width 128.
    matrices = 2 * 12 * 128**2 + 128 * vocab_size
    attention = 2 * 2 * length * 128
    assert found["flops"] == 6 * num_tokens * (matrices + attention)
    assert (tmp_path / "out" / "checkpoints" / str(steps)).is_dir()


def test_harness_ends_with_the_error_of_the_script(tmp_path):
    with pytest.raises(SystemExit, match="error: --max_steps 0: it must be between 1 and"):
        harness.run(tmp_path, "run_mlm_flax.py", ["--output_dir=out", "--max_steps=0"])


@pytest.mark.full
@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_help_says_the_command(path: Path):
    text = path.read_text("utf-8")
    if "ArgumentParser" not in text:
        return
    command = [sys.executable, path, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    assert f"python benchmarks/{path.name}" in done.stdout


@pytest.mark.parametrize("objective", harness.OBJECTIVES)
def test_accelerators_lowers_the_step_of_each_script(objective):
    """Here for the CPU. With libtpu, test_accelerators.py compiles the steps for a TPU."""
    model_type = harness.OBJECTIVES[objective].model_type
    sizes = harness.size_settings(model_type, harness.Size(1, 16, 2), length=16)
    config = CONFIG_MAPPING[model_type](vocab_size=100, **sizes)
    workload = accelerators.Workload(2, 16)
    devices = jax.devices()[:1]
    lowered = accelerators.lower_step(objective, config, workload, "float32", "", "train", devices)
    assert "dot_general" in lowered.as_text()


def test_times_of_a_trace_by_kind_of_operation(tmp_path):
    named = {"dot.3": 8, "ynn_fusion": 4, "copy_bitcast_fusion.1": 2, "add_fusion.12": 1}
    events = [{"name": name, "dur": dur, "args": {"hlo_op": name}} for name, dur in named.items()]
    # The other events are those of the host, and names of threads.
    others = [{"name": "train", "dur": 99, "args": {"step_num": 1}}, {"name": "thread_name"}]
    trace = tmp_path / "vm.trace.json.gz"
    trace.write_bytes(gzip.compress(json.dumps({"traceEvents": events * 2 + others}).encode()))
    times = operations.read_times(trace)
    assert times == {name: 2 * dur for name, dur in named.items()}
    kinds = [operations.kind(operation) for operation in named]
    assert kinds == ["products", "products", "copies", "others"]


@pytest.mark.full
def test_inference_reads_the_report_of_the_script(tmp_path):
    import inference
    from transformers import BertConfig, FlaxAutoModel

    config = BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    FlaxAutoModel.from_config(config).save_pretrained(tmp_path)
    flags = [
        f"--model_name_or_path={tmp_path}",
        "--batch_size=2",
        "--seq_length=16",
        "--num_warmup=1",
        "--num_iters=3",
    ]
    found = inference.compare(["run_bert_flax.py"], flags)
    for name in inference.PRECISIONS:
        assert list(found[name]) == list(inference.COLUMNS)
    ratio = found["bfloat16"]["examples/s"] / found["float32"]["examples/s"]
    assert found["ratio"] == pytest.approx(ratio, rel=0.05)
    assert 0 < found["error"] < 3

    # The program of the plain variant reads the same flags and fails with the script's message.
    with pytest.raises(SystemExit, match="--num_iters 0: it must be at least 1"):
        inference.compare(["-c", inference.PLAIN], ["--num_iters=0"])


PROGRAM = """\
HloModule jit_step, is_scheduled=true

%body.1 (state.1: (s32[], f32[100])) -> (s32[], f32[100]) {
  %state.1 = (s32[]{:T(128)}, f32[100]{0:T(128)}) parameter(0)
  %index.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %sum.1 = f32[100]{0:T(128)} get-tuple-element(%state.1), index=1
  %inner.1 = f32[3,100]{1,0:T(8,128)} fusion(%sum.1), kind=kLoop, metadata={op_name="scan/inner"}
  %next.1 = f32[100]{0:T(128)} fusion(%inner.1), kind=kLoop
  ROOT %result.1 = (s32[]{:T(128)}, f32[100]{0:T(128)}) tuple(%index.1, %next.1)
}

ENTRY %main.1 (x.1: f32[16,128]) -> (f32[16,128], f32[100]) {
  %x.1 = f32[16,128]{1,0:T(8,128)} parameter(0)
  %a.1 = f32[16,128]{1,0:T(8,128)} fusion(%x.1), kind=kLoop, metadata={op_name="layer_0/mul"}
  %pair.1 = (bf16[16,100]{1,0:T(8,128)(2,1)}, f32[100]{0:T(128)}) fusion(%a.1), kind=kLoop
  %b.1 = bf16[16,100]{1,0:T(8,128)(2,1)} get-tuple-element(%pair.1), index=0
  %start.1 = f32[100]{0:T(128)} get-tuple-element(%pair.1), index=1
  %fast.1 = f32[16,128]{1,0:T(8,128)S(1)} fusion(%b.1), kind=kLoop
  %zero.1 = s32[]{:T(128)} constant(0)
  %first.1 = (s32[]{:T(128)}, f32[100]{0:T(128)}) tuple(%zero.1, %start.1)
  %loop.1 = (s32[]{:T(128)}, f32[100]{0:T(128)}) while(%first.1), condition=%end.1, body=%body.1
  %sum.2 = f32[100]{0:T(128)} get-tuple-element(%loop.1), index=1
  ROOT %out.1 = (f32[16,128]{1,0:T(8,128)}, f32[100]{0:T(128)}) tuple(%a.1, %sum.2)
}
"""


def test_the_peak_of_a_program_by_hand():
    """Padding to tiles, memory of the chip, elements of tuples, loops and results."""
    peak = buffers.find_peak(PROGRAM)
    # In the loop: `a`, which is a result, 16 x 128 x 4 bytes; `start`, 128 x 4 bytes; inside,
    # `inner`, 3 rows in a tile of 8, 8 x 128 x 4 bytes, and `next`, 128 x 4 bytes. `b` is no longer
    # read, and `fast` is on the chip.
    assert sorted(one.num_bytes for one in peak.buffers) == [512, 512, 4096, 8192]
    assert (peak.num_bytes, peak.instruction) == (13312, "next.1")
    assert "scan/inner" in buffers.report(peak)


def test_the_peak_is_that_of_the_compilers_plan():
    """A program of layers whose results the backward pass reads, compiled for this CPU."""

    def loss(weights, x):
        for weight in weights:
            x = jnp.tanh(x @ weight)
        return x.sum()

    weights = [jnp.ones((256, 256)) for _ in range(6)]
    compiled = jax.jit(jax.grad(loss)).lower(weights, jnp.ones((2048, 256))).compile()
    planned = compiled.memory_analysis().temp_size_in_bytes
    # The gradients are results, which the plan does not count.
    gradients = 6 * 256 * 256 * 4
    peak = buffers.find_peak(compiled.as_text()).num_bytes
    assert planned > 6 * 2048 * 256 * 4
    assert planned - gradients <= peak <= planned + gradients
