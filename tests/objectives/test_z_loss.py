"""The z-loss is z_loss * log(Z)**2 of each predicted token, in training alone.

It is compared with a slow formula over all logits at once, in float64, and with gradients of it.
"""

import importlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_scripts import SCRIPTS, Place, full_but

HAVE_Z_LOSS = [script for script in SCRIPTS if "z_loss: float = " in script.path.read_text()]


@pytest.fixture(scope="module", params=HAVE_Z_LOSS, ids=str)
def script(request):
    return request.param


@pytest.fixture(scope="module")
def place(script, tmp_path_factory) -> Place:
    return Place(script, tmp_path_factory.mktemp("z_loss"))


def test_three_scripts_have_it():
    assert [script.model_type for script in HAVE_Z_LOSS] == ["gpt2", "t5", "bart"]


def slow_objective(kernel, states, labels, z_loss: float):
    """The loss and the z-loss of each predicted token, from all logits, one token at a time."""
    loss = 0.0
    z = 0.0
    for state, label in zip(states, labels, strict=True):
        if label == -100:
            continue
        logits = kernel.T @ state
        log_z = jnp.log(jnp.sum(jnp.exp(logits)))
        loss += log_z - logits[label]
        z += z_loss * log_z**2
    return loss + z, (loss, z)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_loss_and_gradients_in_chunks_equal_the_slow_formula(z_loss):
    """19 tokens do not fill the 8 chunks."""
    clm = importlib.import_module("run_clm_flax")
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(5, 11)).astype(np.float32)
    states = rng.normal(size=(19, 5)).astype(np.float32)
    labels = rng.integers(0, 11, 19)
    labels[[0, 7, 18]] = -100

    def in_chunks(kernel, states):
        def sums_of_chunk(states, labels):
            logits = states @ kernel
            sums = clm.cross_entropy_sums(logits, labels, with_accuracy=False)
            sums["z_loss"] = z_loss * clm.z_loss_sum(logits, labels)
            return sums["loss"] + sums["z_loss"], sums

        return clm.sum_in_chunks(sums_of_chunk, states, jnp.asarray(labels))

    def slow(kernel, states):
        return slow_objective(kernel, states, labels, z_loss)

    options = {"argnums": (0, 1), "has_aux": True}
    (found, sums), grads = jax.value_and_grad(in_chunks, **options)(kernel, states)
    with jax.enable_x64(True):
        arrays = (np.float64(kernel), np.float64(states))
        (expected, (loss, z)), slow_grads = jax.value_and_grad(slow, **options)(*arrays)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(sums["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(sums["z_loss"], z, rtol=1e-5)
    for grad, slow_grad in zip(grads, slow_grads, strict=True):
        np.testing.assert_allclose(grad, slow_grad, rtol=1e-4, atol=1e-5)
    # Without gradients, as in an evaluation, the sums are the same.
    np.testing.assert_allclose(in_chunks(kernel, states)[0], expected, rtol=1e-5)


def logged(run) -> list[dict[str, float]]:
    """The values of each log line of a training step."""
    lines = re.findall(r"Step \d+: (train_.*)", run.stderr)
    return [
        {key: float(value) for key, value in re.findall(r"(\w+) (\S+?)(?:,|$)", line)}
        for line in lines
    ]


@pytest.mark.parametrize("script", full_but(HAVE_Z_LOSS, HAVE_Z_LOSS[0]), ids=str, indirect=True)
def test_it_is_trained_on_logged_and_not_part_of_the_losses(place):
    flags = {"max_steps": 3, "logging_steps": 1, "max_train_samples": 24, "max_eval_samples": 16}
    runs = {weight: place.start(f"out{weight}", z_loss=weight, **flags) for weight in (0, 0.1, 0.2)}
    found = {weight: logged(run.wait()) for weight, run in runs.items()}
    assert all((run.returncode, run.lines) == (0, []) for run in runs.values())

    # The first step of all has the same weights.
    assert len({steps[0]["train_loss"] for steps in found.values()}) == 1
    assert "train_z_loss" not in found[0][0]
    ratio = found[0.2][0]["train_z_loss"] / found[0.1][0]["train_z_loss"]
    assert ratio == pytest.approx(2, rel=1e-3)
    # At initialization all words are about as likely. Then Z is about the size of the vocabulary,
    # or more, where initial logits are large.
    size = json.loads((place.directory / "out0" / "config.json").read_text())["vocab_size"]
    mean = found[0.1][0]["train_z_loss"] / 0.1
    assert 0.8 < mean / np.log(size) ** 2 < 2
    assert found[0.2][2]["train_loss"] != found[0][2]["train_loss"]

    # An evaluation of the same weights without the flag has the same loss.
    results = json.loads((place.directory / "out0.2" / "eval_results.json").read_text())
    run = place.run("out0.2", do_eval=True, max_eval_samples=16)
    assert run.returncode == 0, run.stderr
    again = json.loads((place.directory / "out0.2" / "eval_results.json").read_text())
    assert results == again
    assert not any("z_loss" in name for name in results)
    stored = json.loads((place.directory / "out0.2" / "train_results.json").read_text())
    assert "train_z_loss" in stored


@pytest.mark.parametrize("script", full_but(HAVE_Z_LOSS, HAVE_Z_LOSS[0]), ids=str, indirect=True)
def test_a_resumed_run_logs_another_weight(place):
    place.run("resumed", z_loss=0.1, max_steps=1, do_train=True)
    run = place.run("resumed", z_loss=0.2, max_steps=2, do_train=True)
    assert (run.returncode, run.lines) == (0, [])
    assert "--z_loss is 0.2 now, and was 0.1 before" in run.stderr
