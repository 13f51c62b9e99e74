"""What a run asks of the devices: one step ahead of them and no more, no memory that it does not need, and one line
where they have none left. Of what the scripts have word for word in common the template shows it."""

import importlib
import json
from argparse import Namespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from training_scripts import Place, template_alone
from transformers import AutoConfig

import run_mlm_flax as mlm


@pytest.fixture(scope="module")
def place(script, tmp_path_factory) -> Place:
    return Place(script, tmp_path_factory.mktemp("devices"))


def slow_steps(script):
    """Steps of some 50 ms; how many of them are not done yet when one is dispatched goes to the file `ahead`."""
    import json
    import pathlib

    import jax
    import jax.numpy as jnp

    sums, ahead, train_step, make_program = [], [], script.train_step, jax.pmap

    def slow_train_step(*args, **fixed):
        state, totals = train_step(*args, **fixed)
        slow = jax.lax.fori_loop(
            0, 60, lambda _, x: jnp.sin(x @ x), jnp.full((300, 300), totals["loss"])
        )
        return state, {**totals, "loss": totals["loss"] + 1e-9 * slow[0, 0]}

    def pmap(function, *args, **options):
        program = make_program(function, *args, **options)
        if getattr(function, "func", None) is not slow_train_step:
            return program

        def dispatch(*args):
            state, totals = program(*args)
            sums.append(totals["loss"])
            ahead.append(sum(not loss.is_ready() for loss in sums))
            pathlib.Path("ahead").write_text(json.dumps(ahead))
            return state, totals

        return dispatch

    script.train_step, jax.pmap = slow_train_step, pmap


@template_alone
def test_a_step_ahead_of_the_devices(place):
    """Where nothing is logged, too: SIGTERM would have to wait for what is dispatched."""
    steps = {"max_steps": 30, "logging_steps": 1000, "save_steps": 1000}
    run = place.run("ahead_of_devices", **steps, devices=1, change=slow_steps)
    assert (run.returncode, run.lines) == (0, [])
    ahead = json.loads((place.directory / "ahead").read_text())
    assert len(ahead) == 30
    assert max(ahead) <= 2


def test_initial_weights_leave_the_device(script, tmp_path):
    """New ones, pretrained ones, and those of which some are missing: the state is the one copy there."""
    module = importlib.import_module(script.path.stem)
    script.model_type == "t5" and module.mend_clip()
    script.write_model(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    args = Namespace(
        dtype="float32",
        model_name_or_path=None,
        hub_options={},
        gradient_checkpointing=False,
        seed=0,
    )
    model, params = module.load_model(args, config)
    flat = flatten_dict(params)
    assert {type(x) for x in flat.values()} == {np.ndarray}
    missing = next(path for path in flat if path[-1] == "kernel")
    for lacking in (None, missing):
        some = {path: x for path, x in flat.items() if path != lacking}
        model.save_pretrained(tmp_path, params=unflatten_dict(some))
        found = flatten_dict(
            module.load_model(Namespace(**{**vars(args), "model_name_or_path": tmp_path}), config)[
                1
            ]
        )
        assert found.keys() == flat.keys()
        assert {type(x) for x in found.values()} == {np.ndarray}


def test_no_memory_left(monkeypatch, capsys):
    """JAX's own error, as of a batch that is too large, is one line."""

    def main(args):
        jnp.zeros(1 << 50, jnp.int8).block_until_ready()

    monkeypatch.setattr(mlm, "main", main)
    argv = ["--output_dir=x", "--model_type=roberta", "--tokenizer_name=x", "--train_file=x.txt"]
    assert mlm.cli(argv) == 1
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.startswith("run_mlm_flax.py: error: RESOURCE_EXHAUSTED")
    assert stderr.count("\n") == 1
