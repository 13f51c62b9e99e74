"""With --dtype=bfloat16, each training script sums the gradients of embedding tables in float32.

`nn.Embed` rounds its table to bfloat16 before the lookup, so the lookup's gradient is a sum in
bfloat16. That has 8 significant bits, so the sum no longer grows after 256 equal addends, and a
frequent token has thousands. The scripts' interceptor `embed` rounds after the lookup.
"""

import importlib
from argparse import Namespace
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict
from training_scripts import LENGTH, NUM_WORDS, SCRIPTS, TEMPLATE, full_but
from transformers import AutoConfig

NUM_ROWS = 256
FREQUENT_ID = 7
# All scripts have the same interceptor.
template_or_full = pytest.mark.parametrize(
    "script", full_but(SCRIPTS, TEMPLATE), ids=str, indirect=True
)


class Gradients(TrainState):
    """A training state whose update returns the gradients."""

    def apply_gradients(self, grads):
        return grads


class Measured(NamedTuple):
    """The results of a training step."""

    # {path: gradient} of the embedding tables.
    grads: dict[tuple, np.ndarray]
    # The step's sums, such as the loss.
    totals: dict[str, np.ndarray]


def batch_of(script) -> dict:
    """Return a batch of 8,192 tokens, 60% of them the same, in which every token is a label.

    It is for one device and one micro-batch: the arrays are [1, 1, NUM_ROWS, LENGTH] int32.
    """
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 5 + NUM_WORDS, (1, 1, NUM_ROWS, LENGTH), dtype=np.int32)
    ids[rng.random(ids.shape) < 0.6] = FREQUENT_ID
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids}
    if script.model_type in ("t5", "bart"):
        batch["decoder_input_ids"] = np.roll(ids, 1, axis=-1)
    return batch


def round_before_lookup(next_function, args, kwargs, context):
    """Do as Flax does without the interceptor `embed_in_float32`."""
    return next_function(*args, **kwargs)


def train_step_of(script, module, dtype: str, config):
    """Return the script's training step and a state for it, both for one device."""
    args = Namespace(dtype=dtype, model_name_or_path=None, gradient_checkpointing="none", seed=0)
    model, params = module.load_model(args, config)
    options = {
        "roberta": {"num_slots": lambda num_tokens: num_tokens},
        "gpt2": {},
        "bart": {},
        "t5": {},
    }[script.model_type]
    loss_fn = partial(module.loss_sums, model=model, **options)
    step = partial(module.train_step, loss_fn=loss_fn, schedule=lambda step: 0.0, seed=0)
    state = Gradients.create(apply_fn=None, params=params, tx=module.optax.identity())
    state = jax.tree.map(lambda x: np.asarray(x)[None], state)
    return jax.jit(jax.vmap(step, axis_name="batch")), state


@pytest.fixture(scope="module")
def measured(script, tmp_path_factory) -> dict[str, Measured]:
    """One training step in float32, in bfloat16, and in bfloat16 without the interceptor."""
    module = importlib.import_module(script.path.stem)
    if script.model_type == "t5":
        module.restore_clip_argument()
    directory = tmp_path_factory.mktemp("model")
    script.write_model(directory, **dict.fromkeys(script.no_dropout, 0.0))
    config = AutoConfig.from_pretrained(directory)
    batch = batch_of(script)
    names = (*module.TRAINING_SUMS, "tokens", "grad_norm", "learning_rate")
    totals = {name: np.zeros(1, np.float32) for name in names}
    dtypes = {"float32": "float32", "bfloat16": "bfloat16", "rounded before": "bfloat16"}
    found = {}
    for case, dtype in dtypes.items():
        train_step, state = train_step_of(script, module, dtype, config)
        with pytest.MonkeyPatch.context() as patch:
            if case == "rounded before":
                patch.setattr(module, "embed_in_float32", round_before_lookup)
            grads, sums = jax.device_get(train_step(state, totals, batch))
        grads = flatten_dict(grads)
        tables = {path: grad for path, grad in grads.items() if path[-1] == "embedding"}
        found[case] = Measured(tables, sums)
    return found


def largest_error(grads: dict, exact: dict) -> float:
    """Return the largest error of a table's gradient relative to its norm."""
    errors = []
    for path, expected in exact.items():
        errors.append(np.linalg.norm(grads[path] - expected) / np.linalg.norm(expected))
    return max(errors)


@template_or_full
def test_gradients_of_tables_are_summed_in_float32(measured):
    """Without `embed_in_float32` they are far off. If that fails, Flax has fixed it."""
    exact = measured["float32"].grads
    assert largest_error(measured["bfloat16"].grads, exact) < 0.02
    assert largest_error(measured["rounded before"].grads, exact) > 0.1


@template_or_full
def test_embed_does_not_change_the_loss(measured):
    """The sums of a step are equal bit by bit with and without `embed`."""
    totals = measured["bfloat16"].totals
    totals_without = measured["rounded before"].totals
    assert totals["loss"] > 0
    for name in ("loss", "predicted", "tokens"):
        assert totals[name] == totals_without[name], name
