"""Call `main()` as users of the earlier scripts do: several times in one process, by `sys.argv`."""

import importlib
import json
import logging
import math
import signal
import sys

import datasets
import huggingface_hub
import jax
import pytest
import transformers
from training_scripts import SCRIPTS, write_text


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
    }


def test_main_runs_several_times_in_one_process(tmp_path, monkeypatch):
    """Four scripts run one after the other, and the first one again, with the same result."""
    text = write_text(tmp_path / "text.txt", 60, seed=1)
    before = settings_of_process()
    losses = []
    scripts = [script for script in SCRIPTS if not script.is_stream]
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
    assert len(losses) == 5
    assert losses[0] == losses[-1]


def test_an_error_is_one_line_and_restores_the_process(tmp_path, monkeypatch, capsys):
    before = settings_of_process()
    flags = ["--model_type=roberta", "--tokenizer_name=none", "--train_file=none.txt"]
    monkeypatch.setattr(sys, "argv", ["run_mlm_flax.py", f"--output_dir={tmp_path}", *flags])
    with pytest.raises(SystemExit, match=r"^1$"):
        importlib.import_module("run_mlm_flax").main()
    assert capsys.readouterr().err.count("\n") == 1
    assert settings_of_process() == before
