"""The steps of all scripts compile for a TPU, by the compiler of a TPU that is not there.

This needs libtpu: `make test-accelerators`.
"""

import importlib.util
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from transformers import CONFIG_MAPPING

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import accelerators
import harness

ROWS = 8
LENGTH = 128
VARIANTS = {
    "as it is": ("float32", ""),
    "accumulation": ("bfloat16", "--gradient_accumulation_steps=2 --max_grad_norm=1 --adafactor"),
    "layers": ("bfloat16", "--gradient_checkpointing --weight_decay=0.01"),
    "attention": ("float32", "--gradient_checkpointing=attention"),
}


@pytest.fixture(scope="module")
def devices():
    return accelerators.target_devices("v5e-8")


def tiny_config(objective: str):
    """The configuration of a model of one layer. Dropout is on."""
    model_type = harness.OBJECTIVES[objective].model_type
    settings = harness.size_settings(model_type, harness.Size(1, 64, 2), LENGTH)
    return CONFIG_MAPPING[model_type](vocab_size=1000, **settings)


def figures(devices, objective: str, dtype: str, flags: str, step: str, rows: int = ROWS) -> dict:
    """Compile a step of a tiny model for the TPU."""
    workload = accelerators.Workload(rows, LENGTH)
    lowered = accelerators.lower_step(
        objective, tiny_config(objective), workload, dtype, flags, step, devices
    )
    return accelerators.compile_step(lowered)[0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("objective", accelerators.WORKLOADS)
def test_train_step_compiles(devices, objective, variant):
    dtype, flags = VARIANTS[variant]
    found = figures(devices, objective, dtype, flags, "train")
    assert found.keys() == {"state", "temporaries", "flops", "bytes"}
    # The temporaries of a step this small may need no memory beside that of the core itself.
    assert found["temporaries"] >= 0
    assert min(found["state"], found["flops"], found["bytes"]) > 0


@pytest.mark.parametrize("objective", accelerators.WORKLOADS)
def test_evaluation_step_compiles(devices, objective):
    found = figures(devices, objective, "bfloat16", "", "evaluation")
    assert min(found["state"], found["flops"], found["bytes"]) > 0


def test_an_operation_without_a_tpu_lowering_is_found(devices, monkeypatch):
    """XLA computes eigenvalues of a general matrix on CPUs and GPUs only."""
    import run_clm_flax

    loss_sums = run_clm_flax.loss_sums

    def loss_with_eigenvalues(params, batch, **options):
        loss, sums = loss_sums(params, batch, **options)
        size = batch["labels"].shape[0]
        eigenvalues = jnp.linalg.eigvals(batch["labels"][:, :size].astype(jnp.float32))
        return loss, {**sums, "loss": sums["loss"] + eigenvalues.real.sum()}

    monkeypatch.setattr(run_clm_flax, "loss_sums", loss_with_eigenvalues)
    with pytest.raises(NotImplementedError, match=r"eig.* tpu"):
        figures(devices, "causal", "float32", "", "train")


def test_a_step_that_does_not_fit_is_found(devices):
    found = figures(devices, "causal", "float32", "", "train", rows=2**17)
    assert found.keys() == {"needed", "limit"}
    assert found["needed"] > found["limit"] > 1e10
