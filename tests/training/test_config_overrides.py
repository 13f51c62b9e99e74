"""Models that are smaller than their default config, without a config file: --config_overrides.

The config must be the one that the constructor of the family makes from the same settings.
"""

import importlib
import json
import logging

import pytest
import transformers
from training_scripts import (
    LENGTH,
    SCRIPTS,
    T5,
    TEMPLATE,
    Place,
    checkpoints,
    full_but,
    template_alone,
)

# A model of one layer for each family.
TINY = {
    "roberta": "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32",
    "gpt2": f"n_embd=16,n_layer=1,n_head=2,n_positions={LENGTH}",
    "t5": "d_model=16,d_kv=8,d_ff=32,num_layers=1,num_heads=2",
    "bart": "d_model=16,encoder_layers=1,decoder_layers=1,encoder_attention_heads=2,"
    "decoder_attention_heads=2,encoder_ffn_dim=32,decoder_ffn_dim=32",
}


@pytest.fixture(scope="module")
def module():
    return importlib.import_module(TEMPLATE.path.stem)


@pytest.fixture(scope="module")
def place(script, tmp_path_factory) -> Place:
    return Place(script, tmp_path_factory.mktemp("overrides"))


def tiny_flags(place: Place) -> dict:
    model_type = place.script.model_type
    overrides = f"{TINY[model_type]},vocab_size=80"
    return {"config_name": None, "model_type": model_type, "config_overrides": overrides}


@pytest.mark.parametrize("script", full_but(SCRIPTS, T5), ids=str, indirect=True)
def test_a_tiny_model_without_a_config_file(place):
    flags = tiny_flags(place)
    run = place.run("out", max_steps=2, do_train=True, **flags)
    assert (run.returncode, run.lines) == (0, [])
    config = json.loads((place.directory / "out" / "config.json").read_text())
    (line,) = [line for line in run.stderr.splitlines() if "config_overrides" in line]
    for item in flags["config_overrides"].split(","):
        name, value = item.split("=")
        assert config[name] == int(value)
        assert f"{name} is {value}, not " in line


@template_alone
def test_the_same_command_resumes_and_another_model_does_not(place):
    flags = tiny_flags(place)
    for steps in (1, 2):
        run = place.run("resumed", max_steps=steps, do_train=True, **flags)
        assert (run.returncode, run.lines) == (0, [])
    assert checkpoints(place.directory / "resumed") == [1, 2]
    run = place.run("resumed", do_eval=True, **flags)
    assert (run.returncode, run.lines) == (0, [])

    flags["config_overrides"] += f",{place.script.width}=32"
    run = place.run("resumed", max_steps=3, do_train=True, **flags)
    assert run.returncode == 1
    assert place.script.width in run.stderr


@template_alone
def test_overrides_of_a_config_file(place):
    run = place.run("from_file", max_steps=1, config_overrides="num_hidden_layers=2")
    assert (run.returncode, run.lines) == (0, [])
    found = json.loads((place.directory / "from_file" / "config.json").read_text())
    before = json.loads((place.model / "config.json").read_text())
    assert {name for name in before if found[name] != before[name]} <= {
        "num_hidden_layers",
        "architectures",
        "dtype",
    }
    assert found["num_hidden_layers"] == 2


@pytest.mark.parametrize(
    ("model_type", "overrides", "settings"),
    [
        # The decoder has as many layers as the encoder.
        ("t5", "num_layers=2", {"num_layers": 2}),
        ("t5", "num_hidden_layers=2", {"num_layers": 2}),
        ("t5", "num_layers=2,num_decoder_layers=3", {"num_layers": 2, "num_decoder_layers": 3}),
        # From this the constructor derives three other settings.
        ("t5", "feed_forward_proj=gated-gelu", {"feed_forward_proj": "gated-gelu"}),
        ("gpt2", "hidden_size=64, num_attention_heads=4", {"n_embd": 64, "n_head": 4}),
        (
            "gpt2",
            "resid_pdrop=0,scale_attn_weights=False",
            {"resid_pdrop": 0.0, "scale_attn_weights": False},
        ),
        ("gpt2", "scale_attn_weights=false", {"scale_attn_weights": False}),
        (
            "gpt2",
            "n_inner=512,activation_function=relu",
            {"n_inner": 512, "activation_function": "relu"},
        ),
        ("gpt2", "layer_norm_epsilon=1e-6", {"layer_norm_epsilon": 1e-6}),
        ("bert", "tie_word_embeddings=false", {"tie_word_embeddings": False}),
        (
            "gpt_neo",
            'attention_types=[[["global","local"],1]],num_layers=2',
            {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
        ),
    ],
)
def test_the_config_is_what_the_constructor_makes(module, caplog, model_type, overrides, settings):
    config_class = transformers.CONFIG_MAPPING[model_type]
    with caplog.at_level(logging.INFO):
        found = module.override_config(config_class(), overrides)
    assert found.to_dict() == config_class(**settings).to_dict()
    assert "--config_overrides: " in caplog.text


@pytest.mark.parametrize(
    ("model_type", "loaded", "overrides", "settings"),
    [
        ("t5", {"num_layers": 8}, "num_layers=2", {"num_layers": 2}),
        (
            "t5",
            {"feed_forward_proj": "gated-gelu", "d_model": 64},
            "feed_forward_proj=relu",
            {"d_model": 64},
        ),
        ("bart", {"encoder_layers": 6}, "encoder_layers=2", {"encoder_layers": 2}),
        (
            "gpt_neo",
            {"attention_types": [[["global"], 4]], "num_layers": 4, "hidden_size": 64},
            'attention_types=[[["global","local"],1]],num_layers=2',
            {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "hidden_size": 64},
        ),
    ],
)
def test_what_is_derived_from_a_loaded_config_is_derived_again(
    module, model_type, loaded, overrides, settings
):
    config_class = transformers.CONFIG_MAPPING[model_type]
    config = config_class.from_dict(config_class(**loaded).to_dict())
    found = module.override_config(config, overrides)
    assert found.to_dict() == config_class(**settings).to_dict()


def test_the_version_of_a_config_stays(module):
    """The span-masked script tells the configs of Transformers 5 by it."""
    config = transformers.T5Config.from_dict({"transformers_version": "5.1.0", "num_layers": 3})
    found = module.override_config(config, "num_layers=2")
    assert found.transformers_version == "5.1.0"


@pytest.mark.parametrize(
    ("model_type", "overrides", "words"),
    [
        ("gpt2", "n_layers=2", ["n_layers=2", "n_layer,", "n_embd", "activation_function"]),
        ("gpt2", "n_layer=two", ["n_layer=two", "int", "12"]),
        ("gpt2", "n_layer=2.5", ["n_layer=2.5", "int"]),
        ("gpt2", "n_layer=True", ["n_layer=True", "int"]),
        ("gpt2", "n_layer=", ["n_layer=", "int"]),
        ("gpt2", "n_layer", ["n_layer", "name=value"]),
        ("gpt2", "", ["name=value"]),
        ("gpt2", "n_layer=2,,n_head=2", ["n_layer=2,", "int"]),
        ("gpt2", "n_layer=2;n_head=2", ["n_layer=2;n_head=2", "int"]),
        ("gpt2", "resid_pdrop=nan", ["resid_pdrop=nan", "float", "0.1"]),
        ("gpt2", "resid_pdrop=Infinity", ["resid_pdrop=Infinity", "float"]),
        ("gpt2", "scale_attn_weights=1", ["scale_attn_weights=1", "bool", "true"]),
        ("gpt2", "model_type=bert", ["model_type=bert"]),
        ("gpt2", "transformers_version=5", ["transformers_version=5"]),
        ("gpt2", "to_dict=1", ["to_dict=1"]),
        ("gpt_neo", "num_layers=3", ["num_layers=3", "gpt_neo"]),
        ("t5", "feed_forward_proj=a-b-c", ["feed_forward_proj=a-b-c"]),
    ],
)
def test_wrong_overrides(module, model_type, overrides, words):
    config = transformers.CONFIG_MAPPING[model_type]()
    with pytest.raises(module.InputError) as error:
        module.override_config(config, overrides)
    for word in ["--config_overrides", *words]:
        assert word in str(error.value)
