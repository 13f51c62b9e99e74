"""A run keeps one step ahead of the devices, saves their memory, and reports when none is left.

Code that is word for word the same in all scripts is tested only in the template.
"""

import importlib
import json
from argparse import Namespace

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from training_scripts import SCRIPTS, T5, TEMPLATE, Place, full_but, template_alone
from transformers import AutoConfig


@pytest.fixture(scope="module")
def place(script, tmp_path_factory) -> Place:
    return Place(script, tmp_path_factory.mktemp("devices"))


def slow_steps(script):
    """Make a step take about 50 ms, and write to the file `ahead` how far ahead the host is.

    There is a number for each step: how many steps, itself included, are not done when it is
    dispatched.
    """
    import json
    import pathlib

    import jax
    import jax.numpy as jnp

    losses = []
    num_ahead = []
    original_train_step = script.train_step
    original_pmap = jax.pmap

    def slow_train_step(*args, **fixed):
        state, totals = original_train_step(*args, **fixed)
        x = jnp.full((300, 300), totals["loss"])
        x = jax.lax.fori_loop(0, 60, lambda _, x: jnp.sin(x @ x), x)
        # The loss depends on the result, so that XLA cannot leave out the work.
        return state, {**totals, "loss": totals["loss"] + 1e-9 * x[0, 0]}

    def pmap(function, *args, **options):
        program = original_pmap(function, *args, **options)
        if getattr(function, "func", None) is not slow_train_step:
            return program

        def dispatch(*args):
            state, totals = program(*args)
            losses.append(totals["loss"])
            num_ahead.append(sum(not loss.is_ready() for loss in losses))
            pathlib.Path("ahead").write_text(json.dumps(num_ahead))
            return state, totals

        return dispatch

    script.train_step = slow_train_step
    jax.pmap = pmap


@template_alone
def test_a_step_ahead_of_the_devices(place):
    """This holds even where nothing is logged: SIGTERM must not wait for many dispatched steps."""
    steps = {"max_steps": 30, "logging_steps": 1000, "save_steps": 1000}
    run = place.run("ahead_of_devices", **steps, devices=1, change=slow_steps)
    assert (run.returncode, run.lines) == (0, [])
    num_ahead = json.loads((place.directory / "ahead").read_text())
    assert len(num_ahead) == 30
    assert max(num_ahead) <= 2


@pytest.mark.parametrize("script", full_but(SCRIPTS, TEMPLATE, T5), ids=str)
def test_initial_weights_leave_the_device(script, tmp_path):
    """The only copy of the weights on the device is in the training state.

    This holds for new weights, pretrained ones, and pretrained ones of which some are missing.
    """
    module = importlib.import_module(script.path.stem)
    if script.model_type == "t5":
        module.restore_clip_argument()
    script.write_model(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    args = Namespace(
        dtype="float32",
        model_name_or_path=None,
        hub_options={},
        gradient_checkpointing="none",
        seed=0,
    )
    model, params = module.load_model(args, config)
    params = flatten_dict(params)
    assert {type(array) for array in params.values()} == {np.ndarray}
    kernel = next(path for path in params if path[-1] == "kernel")
    args.model_name_or_path = tmp_path
    for missing in (None, kernel):
        saved = {path: array for path, array in params.items() if path != missing}
        model.save_pretrained(tmp_path, params=unflatten_dict(saved))
        _, loaded = module.load_model(args, config)
        loaded = flatten_dict(loaded)
        assert loaded.keys() == params.keys()
        assert {type(array) for array in loaded.values()} == {np.ndarray}


def fill_memory(script):
    """Let the first step fail as it does when a device has no memory left."""
    import jax

    def fail(*args):
        jax.numpy.zeros(1 << 50, jax.numpy.int8).block_until_ready()

    def make_steps(*args):
        return fail, fail

    script.make_steps = make_steps


def test_no_memory_left(script, tmp_path):
    """The error of XLA becomes one line with the numbers, and the flags that lower them."""
    place = Place(script, tmp_path)
    flags = {"per_device_train_batch_size": 9, "gradient_accumulation_steps": 2}
    run = place.run("out", change=fill_memory, adafactor=True, **flags)
    assert run.returncode == 1
    (line,) = run.lines
    assert "RESOURCE_EXHAUSTED" in line
    assert "2 devices x 2 x 9 = 36" in line
    flags = [
        "--per_device_train_batch_size=3 with --gradient_accumulation_steps=6",
        "--gradient_checkpointing",
        "--dtype=bfloat16",
        f"--{script.length_flag}",
        "--per_device_eval_batch_size",
    ]
    places = [line.index(flag) for flag in flags]
    assert places == sorted(places)
    # It is in use already.
    assert "--adafactor" not in line


@template_alone
def test_no_memory_left_in_an_evaluation_alone(script, tmp_path):
    """Only what lowers the memory of an evaluation is advised."""
    place = Place(script, tmp_path)
    run = place.run("out", max_steps=1)
    assert run.returncode == 0
    run = place.run("out", change=fill_memory, do_eval=True)
    assert run.returncode == 1
    (line,) = run.lines
    assert "at most 4 sequences at a time" in line
    assert "--per_device_eval_batch_size=2, --dtype=bfloat16" in line
    assert [flag for flag in ("train_batch", "checkpointing", "adafactor") if flag in line] == []
