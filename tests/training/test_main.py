"""Call `main()` as users of the earlier scripts do: several times in one process, by `sys.argv`."""

import gc
import importlib
import json
import logging
import math
import os
import signal
import sys
import time

import datasets
import huggingface_hub
import jax
import pytest
import transformers
from training_scripts import SCRIPTS, T5, TEMPLATE, checkpoints, full_but, write_text


def settings_of_process() -> dict:
    """What a call of `main` must leave as it found it."""
    root = logging.getLogger()
    return {
        "signals": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)],
        "handlers": list(root.handlers),
        "level": root.level,
        "verbosity": transformers.logging.get_verbosity(),
        "datasets bars": datasets.are_progress_bars_disabled(),
        "hub bars": huggingface_hub.utils.are_progress_bars_disabled(),
        "cache": jax.config.jax_compilation_cache_dir,
        "kept programs": jax.config.jax_persistent_cache_min_compile_time_secs,
    }


IN_BATCHES = [script for script in SCRIPTS if not script.is_stream]


@pytest.mark.parametrize(
    "scripts", full_but([IN_BATCHES, [TEMPLATE, T5]], [TEMPLATE, T5]), ids=["all", "two"]
)
def test_main_runs_several_times_in_one_process(tmp_path, monkeypatch, scripts):
    """Scripts run one after the other, and the first one again, with the same result."""
    text = write_text(tmp_path / "text.txt", 60, seed=1)
    before = settings_of_process()
    losses = []
    for script in [*scripts, scripts[0]]:
        directory = tmp_path / script.path.stem
        if not directory.exists():
            script.write_model(directory)
        flags = {
            "output_dir": directory / "out",
            "config_name": directory,
            "tokenizer_name": directory,
            "num_train_epochs": 2,
            "logging_steps": 2,
            "eval_steps": 2,
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "train_file": text,
            "validation_file": text,
        }
        argv = [script.name, "--do_train", "--do_eval", "--overwrite_output_dir"]
        argv += [f"--{name}={value}" for name, value in flags.items()]
        argv += script.flags
        monkeypatch.setattr(sys, "argv", argv)
        importlib.import_module(script.path.stem).main()
        results = json.loads((directory / "out" / "eval_results.json").read_text())
        assert math.isfinite(results["eval_loss"])
        assert settings_of_process() == before
        losses.append(results["eval_loss"])
    assert losses[0] == losses[-1]


class SignalInDel:
    """Sends a signal where Python drops exceptions."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)


def signal_in_garbage_collection():
    """Send a signal in a callback of the garbage collector that has the name of JAX's."""

    def _xla_gc_callback(*args):
        gc.callbacks.remove(_xla_gc_callback)
        os.kill(os.getpid(), signal.SIGTERM)

    # Without garbage there is no __del__ or weak reference, whose callbacks drop exceptions too.
    gc.collect()
    gc.callbacks.append(_xla_gc_callback)
    gc.collect()
    time.sleep(60)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("send_signal", "saved"), [(SignalInDel, [1]), (signal_in_garbage_collection, [])]
)
def test_a_signal_where_python_drops_exceptions(tmp_path, monkeypatch, send_signal, saved):
    """The run stops after a step and saves, or, in JAX's callback, ends at once."""
    script = SCRIPTS[0]
    module = importlib.import_module(script.path.stem)
    plan_steps = module.plan_steps

    def plan_steps_after_the_signal(*args):
        send_signal()
        return plan_steps(*args)

    monkeypatch.setattr(module, "plan_steps", plan_steps_after_the_signal)
    text = write_text(tmp_path / "text.txt", 60, seed=1)
    script.write_model(tmp_path / "model")
    flags = {
        "output_dir": tmp_path / "out",
        "config_name": tmp_path / "model",
        "tokenizer_name": tmp_path / "model",
        "max_steps": 5,
        "per_device_train_batch_size": 1,
        "train_file": text,
    }
    argv = [f"--{name}={value}" for name, value in flags.items()]
    with pytest.raises(SystemExit, match=f"^{128 + signal.SIGTERM}$"):
        module.main(["--do_train", *argv, *script.flags])
    assert checkpoints(tmp_path / "out") == saved


def test_an_error_is_one_line_and_restores_the_process(tmp_path, monkeypatch, capsys):
    before = settings_of_process()
    flags = ["--model_type=roberta", "--tokenizer_name=none", "--train_file=none.txt"]
    monkeypatch.setattr(sys, "argv", ["run_mlm_flax.py", f"--output_dir={tmp_path}", *flags])
    with pytest.raises(SystemExit, match=r"^1$"):
        importlib.import_module("run_mlm_flax").main()
    assert capsys.readouterr().err.count("\n") == 1
    assert settings_of_process() == before
