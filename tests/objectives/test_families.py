"""Each script trains every family of models that it supports, and reads both exports back."""

import json
import logging
import re
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from families import CASES, FAMILIES, configure
from flax.traverse_util import flatten_dict
from outputs import losses
from safetensors.numpy import save_file
from training_scripts import SCRIPTS, Place, full_but

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
STEPS = 24


# One family of each script but the streaming one, whose models are those of the template.
OWN = [(script, script.model_type) for script in SCRIPTS if not script.is_stream]
# Names of the parameters of a language modeling head start with one of these.
HEAD = r"(lm_head|cls|generator|predictions|vocab|mlm)"


def mean_loss(losses_by_step: dict[int, float], steps: range) -> float:
    return sum(losses_by_step[step] for step in steps) / len(steps)


@pytest.mark.smoke
@pytest.mark.full
@pytest.mark.parametrize(("script", "family"), CASES, ids=str)
def test_family(tmp_path, script, family):
    """The model learns without warnings, and both exports evaluate as the run itself did."""
    place = Place(script, tmp_path)
    configure(place, family)
    flags = {
        "model_type": family.partition(",")[0],
        "logging_steps": 1,
        "max_steps": STEPS,
        "learning_rate": 0.003,
    }
    run = place.run("trained", **flags)
    assert (run.returncode, run.lines) == (0, [])
    trained = place.directory / "trained"
    found = losses(trained)
    assert len(found) == STEPS
    start = mean_loss(found, range(1, 5))
    end = mean_loss(found, range(STEPS - 3, STEPS + 1))
    assert end < start - 0.05, found
    expected = (trained / "eval_results.json").read_bytes()
    assert json.loads(expected)["eval_loss"] < start

    # Most models on the Hub have the latter alone.
    for weights in ("flax_model.msgpack", "model.safetensors"):
        folder = place.directory / weights.partition(".")[0]
        folder.mkdir()
        for path in trained.iterdir():
            is_config = path.suffix == ".json" and "results" not in path.name
            if path.name == weights or is_config:
                (folder / path.name).write_bytes(path.read_bytes())
        flags = {
            "model_name_or_path": folder,
            "model_type": None,
            "config_name": None,
            "tokenizer_name": None,
            "do_eval": True,
            "train_file": None,
        }
        output_dir = place.directory / f"from_{folder.name}"
        run = place.run(output_dir, **flags)
        assert (run.returncode, run.lines) == (0, [])
        assert (output_dir / "eval_results.json").read_bytes() == expected


@pytest.mark.parametrize(
    ("script", "family"), full_but((case for case in CASES if not case[0].is_stream), *OWN), ids=str
)
def test_a_pytorch_file_without_some_weights(tmp_path, caplog, script, family):
    """A warning names the missing weights, and the others are loaded.

    A weight of another shape is an error, and so is a file that has none of the weights.
    """
    from transformers import AutoConfig

    trainer = import_module(script.name.removesuffix(".py"))
    place = Place(script, tmp_path)
    configure(place, family)
    if hasattr(trainer, "restore_clip_argument"):
        trainer.restore_clip_argument()
    config = AutoConfig.from_pretrained(place.model)
    _, params = trainer.load_model(trainer.parse_args(place.flags("none")), config)
    params = flatten_dict(params)
    rng = np.random.default_rng(0)
    weights = {path: rng.standard_normal(array.shape) for path, array in params.items()}
    tensors = trainer.to_pytorch(trainer.unflatten_dict(weights))

    def load(tensors: dict) -> tuple[dict, str]:
        """Return the parameters that the script loads from PyTorch's tensors, and the log."""
        tensors = {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
        save_file(tensors, place.model / "model.safetensors", metadata={"format": "pt"})
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger=trainer.__name__):
            flags = place.flags(
                "none", model_name_or_path=place.model, config_name=None, tokenizer_name=None
            )
            _, params = trainer.load_model(trainer.parse_args(flags), config)
        return {".".join(path): array for path, array in flatten_dict(params).items()}, caplog.text

    expected, log = load(tensors)
    assert log == ""

    # Without the head, or without the last two parameters of a family that has none.
    tensor_names = {".".join(path): name for path, name in zip(params, tensors, strict=True)}
    head = [name for name in tensor_names if re.match(HEAD, name)]
    missing = sorted(head or list(tensor_names)[-2:])
    missing_tensors = {tensor_names[name] for name in missing}
    found, log = load({name: x for name, x in tensors.items() if name not in missing_tensors})
    assert f"lacks {', '.join(missing)}: initialized at random" in log
    changed = {name for name, array in expected.items() if (found[name] != array).any()}
    assert changed == set(missing)

    name, tensor = max(tensors.items(), key=lambda item: item[1].ndim)
    weight = rf"Weight {re.escape(name)} was expected to be of shape"
    message = rf"start: cannot load a model of type .* {weight}"
    with pytest.raises(trainer.InputError, match=message):
        load({**tensors, name: np.zeros([size + 1 for size in tensor.shape])})
    with pytest.raises(trainer.InputError, match="no weight matches"):
        load({"something.else": np.zeros(3)})


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("gptj", {"rotary_dim": 64}, ["rotary_dim", "16 at most"]),
        ("gptj", {"rotary_dim": 7}, ["rotary_dim", "even"]),
        ("gptj", {"rotary_dim": None}, ["rotary_dim"]),
        ("llama", {"head_dim": 15}, ["head_dim is 15", "has 16"]),
        ("mistral", {"head_dim": 32}, ["head_dim is 32", "has 16"]),
        ("bloom", {"n_head": 3}, ["n_head", "power of two"]),
        ("gpt2", {"n_head": 3}, ["cannot build a model from the config", "32"]),
        ("gemma", {"num_key_value_heads": 3}, ["cannot build a model from the config"]),
        ("gpt_neo", {"attention_types": [[["global"], 3]]}, ["attention_layers", "num_layers"]),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_together(tmp_path, family, settings, words):
    """The error is one line, and names the setting to change if the script knows it."""
    (script,) = [script for script in SCRIPTS if script.name == "run_clm_flax.py"]
    place = Place(script, tmp_path)
    configure(place, family)
    config = json.loads((place.model / "config.json").read_text())
    (place.model / "config.json").write_text(json.dumps({**config, **settings}))
    run = place.run("none", model_type=family, max_steps=1)
    assert run.returncode == 1
    (line,) = run.lines
    assert all(word in line for word in words), line
    assert not (tmp_path / "none").exists()


# ---------------------------------------------------------------------------------------
# Documentation
# ---------------------------------------------------------------------------------------


def test_every_family_of_transformers_is_in_the_table():
    """For masked and causal language modeling, they are those for which it has a Flax class."""
    from transformers.models.auto import modeling_flax_auto as auto

    assert FAMILIES["run_mlm_flax.py"].keys() == auto.FLAX_MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys()
    assert FAMILIES["run_clm_flax.py"].keys() == auto.FLAX_MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
