"""Gradients of embedding tables in bfloat16, in each training script, where a frequent token has thousands of addends.

`nn.Embed` rounds its table before the lookup, so that the lookup's gradient is a sum in bfloat16, whose 8 bits stand
still after 256 equal addends. The scripts' interceptor `embed` rounds after the lookup.
"""

import importlib
from argparse import Namespace
from functools import partial

import jax
import numpy as np
import pytest
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict
from training_scripts import LENGTH, NUM_WORDS
from transformers import AutoConfig

ROWS, FREQUENT = 256, 7


class Gradients(TrainState):
    """A state whose update is the gradients alone."""

    def apply_gradients(self, grads):
        return grads


def batch_of(script) -> dict:
    """8,192 tokens, of which 60% are the same, for one device and one micro-batch; every token is a label."""
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 5 + NUM_WORDS, (1, 1, ROWS, LENGTH), dtype=np.int32)
    ids[rng.random(ids.shape) < 0.6] = FREQUENT
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids}
    return batch | (
        {"decoder_input_ids": np.roll(ids, 1, axis=-1)}
        if script.model_type in ("t5", "bart")
        else {}
    )


@pytest.fixture(scope="module")
def measured(script, tmp_path_factory):
    """Gradients of the tables, and sums, of one training step in float32, in bfloat16, and there without `embed`."""
    module, directory = importlib.import_module(script.path.stem), tmp_path_factory.mktemp("model")
    script.write_model(directory, **dict.fromkeys(script.no_dropout, 0.0))
    fixed = {
        "roberta": {"num_slots": lambda num_tokens: num_tokens},
        "gpt2": {"checkpointing": False},
        "bart": {"checkpointing": False},
        "t5": {},
    }[script.model_type]
    batch, found = batch_of(script), {}
    script.model_type == "t5" and module.mend_clip()
    totals = {
        name: np.zeros(1, np.float32) for name in ("loss", "predicted", "tokens", "grad_norm")
    }
    for case, dtype in {
        "float32": "float32",
        "bfloat16": "bfloat16",
        "without embed": "bfloat16",
    }.items():
        args = Namespace(dtype=dtype, model_name_or_path=None, gradient_checkpointing=False, seed=0)
        model, params = module.load_model(args, AutoConfig.from_pretrained(directory))
        state = Gradients.create(apply_fn=None, params=params, tx=module.optax.identity())
        state = jax.tree.map(lambda x: np.asarray(x)[None], state)
        step = jax.vmap(partial(module.train_step, model=model, seed=0, **fixed), axis_name="batch")
        with pytest.MonkeyPatch.context() as patch:
            if case == "without embed":
                patch.setattr(
                    module,
                    "embed",
                    lambda next_function, args, kwargs, _: next_function(*args, **kwargs),
                )
            grads, sums = jax.device_get(jax.jit(step)(state, totals, batch))
        found[case] = (
            {path: x for path, x in flatten_dict(grads).items() if path[-1] == "embedding"},
            sums,
        )
    return found


def test_gradients_of_tables_are_summed_in_float32(measured):
    """Without `embed` they are far off: where that fails, Flax has mended it."""
    exact, errors = measured["float32"][0], {}
    for case in ("bfloat16", "without embed"):
        grads = measured[case][0]
        errors[case] = {
            path: np.linalg.norm(grads[path] - x) / np.linalg.norm(x) for path, x in exact.items()
        }
    assert max(errors["bfloat16"].values()) < 0.02
    assert max(errors["without embed"].values()) > 0.1


def test_values_are_as_without(measured):
    """To the bit."""
    (_, sums), (_, plain) = measured["bfloat16"], measured["without embed"]
    names = ("loss", "predicted", "tokens")
    assert sums["loss"] > 0
    assert [sums[name] for name in names] == [plain[name] for name in names]
