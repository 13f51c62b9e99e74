"""In a minute or two each objective learns to beat the best constant guess on text it has not seen.

The best constant guess of the evaluation's targets is their own distribution, and its cross-entropy
is their entropy. The guess knows the evaluation text, the model does not. Masked language modeling
takes longer: see the quickstart.
"""

import json
import math

import numpy as np
import pytest

import quickstart
import t5_tokenizer_model

pytestmark = pytest.mark.full
LENGTH = 64
FLAGS = {
    "overwrite_output_dir": True,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "learning_rate": 3e-3,
    "warmup_steps": 50,
    "adam_beta2": 0.98,
    "max_steps": 500,
    "max_eval_samples": 512,
    "logging_steps": 100,
    "eval_steps": 1000,
    "save_steps": 1000,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return quickstart.build_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory, files):
    """The quickstart's tokenizer, and its folder."""
    directory = tmp_path_factory.mktemp("tokenizer")
    return quickstart.train_tokenizer(files[:1], directory, max_length=LENGTH), directory


def entropy(tokens: np.ndarray) -> float:
    counts = np.unique(tokens, return_counts=True)[1]
    return float(-np.average(np.log(counts / counts.sum()), weights=counts))


def eval_tokens(tokenizer, file, block: int) -> np.ndarray:
    """The tokens of the first evaluation blocks, all texts end to end."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    lines = [line for line in lines if line.strip()]
    texts = tokenizer(lines, verbose=False)["input_ids"]
    ids = [token for text in texts for token in text]
    return np.array(ids[: FLAGS["max_eval_samples"] * block])


def train(run_script, script: str, directory, files, **flags) -> float:
    """Train on one device. Return the loss of the evaluation."""
    places = {
        "output_dir": directory,
        "config_name": directory,
        "train_file": files[0],
        "validation_file": files[1],
    }
    argv = [script]
    for name, value in {**FLAGS, **places, **flags}.items():
        argv.append(f"--{name}" if value is True else f"--{name}={value}")
    # One device, and programs with all optimizations, which run faster.
    env = {"XLA_FLAGS": None, "JAX_DISABLE_MOST_OPTIMIZATIONS": None}
    done = run_script(argv, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads((directory / "eval_results.json").read_text())["eval_loss"]


def test_causal(run_script, tmp_path, files, byte_level):
    tokenizer, directory = byte_level
    from transformers import GPT2Config

    sizes = {"n_positions": LENGTH, "n_embd": 128, "n_layer": 2, "n_head": 4}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    GPT2Config(vocab_size=len(tokenizer), **sizes, **dropout).save_pretrained(tmp_path)
    loss = train(run_script, "run_clm_flax.py", tmp_path, files, tokenizer_name=directory)
    assert loss < entropy(eval_tokens(tokenizer, files[1], LENGTH)) - 0.5


def test_span_masked(run_script, tmp_path, files):
    """The best guess also knows which sentinel is the next one, but not whether it comes now."""
    from transformers import AutoTokenizer, T5Config

    flags = ["--vocab_size=4000", f"--output_dir={tmp_path}", f"--max_length={LENGTH}"]
    status = t5_tokenizer_model.main(["--train_file", str(files[0]), *flags])
    assert status == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    sizes = {
        "d_model": 128,
        "d_kv": 32,
        "d_ff": 512,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
    }
    settings = {"mlm_probability": 0.5, "adafactor": True, "learning_rate": 3e-2}
    T5Config(vocab_size=len(tokenizer), **sizes).save_pretrained(tmp_path)
    loss = train(
        run_script, "run_t5_mlm_flax.py", tmp_path, files, tokenizer_name=tmp_path, **settings
    )
    # 64 inputs are made of 95 tokens. Half of them are left out, in spans of 3 on average.
    num_noise = 48
    num_spans = 16
    tokens = eval_tokens(tokenizer, files[1], 95)
    # All ways to cut the noise into spans are equally likely.
    entropy_of_spans = math.log(math.comb(num_noise - 1, num_spans - 1))
    num_targets = num_noise + num_spans + 1
    best_guess = (num_noise * entropy(tokens) + entropy_of_spans) / num_targets
    assert loss < best_guess - 0.1


def test_denoising(run_script, tmp_path, files, byte_level):
    tokenizer, directory = byte_level
    from transformers import BartConfig

    sizes = {"d_model": 128, "max_position_embeddings": LENGTH}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 512}
    config = BartConfig(vocab_size=len(tokenizer), **sizes, dropout=0.0, init_std=0.08)
    config.save_pretrained(tmp_path)
    loss = train(run_script, "run_bart_dlm_flax.py", tmp_path, files, tokenizer_name=directory)
    assert loss < entropy(eval_tokens(tokenizer, files[1], LENGTH)) - 0.3
