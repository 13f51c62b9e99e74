"""Every family of models that a script trains: short runs that learn, whose export is read back, in both layouts.

python tests/test_families.py    writes the table of the README
"""

import json
import logging
import re
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import test_clm_objective
import test_mlm_objective
import test_t5_objective
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file
from test_hosts import losses
from training_scripts import SCRIPTS, Place, tiny_model

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
README = ROOT / "README.md"
STEPS = 24
FAMILIES = {  # by the name that Transformers has for a configuration; after a comma, which kind of the family
    "run_mlm_flax.py": test_mlm_objective.FAMILIES,
    "run_mlm_flax_stream.py": test_mlm_objective.FAMILIES,
    "run_clm_flax.py": {
        **test_clm_objective.FAMILIES,
        "gpt-sw3": test_clm_objective.FAMILIES["gpt2"],
    },
    "run_t5_mlm_flax.py": test_t5_objective.FAMILIES,
    "run_bart_dlm_flax.py": dict.fromkeys(("bart", "mbart"), test_mlm_objective.SEQ2SEQ),
}
CASES = [(script, family) for script in SCRIPTS for family in FAMILIES[script.name]]
NOTES = {
    "bloom": "`n_head` must be a power of two",
    "gemma": "`rope_theta` 10000, no `rope_scaling`",
    "gptj": "`rotary_dim` must be even, and at most the size of a head; no `tie_word_embeddings`",
    "llama": "as `gemma`; no `tie_word_embeddings`, `mlp_bias`; `head_dim` is `hidden_size / num_attention_heads`",
    "mistral": "as `llama`; sequences no longer than `sliding_window`",
    "roformer": "gets an `embedding_size` of `hidden_size`",
    "bert": "causal: gets `is_decoder`, as all encoders do",
    "big_bird": "causal, with `--line_by_line`, up to 11 blocks or no multiple of a block: gets full attention",
    "gpt-sw3": "its configuration is GPT-2's",
    "mbart": "denoising: the objective of BART, without language codes",
}


def configure(place: Place, family: str):
    """Writes the configuration of a tiny model, its dropout and kind of attention as the family has them."""
    settings = {
        name: value
        for name, value in FAMILIES[place.script.name][family].items()
        if "drop" not in name
    }
    settings.pop("attention_type", None)  # of BigBird: sparse, which is too much for a short text
    tiny_model(family.partition(",")[0], place.script.num_sentinels, **settings)(place.model)


@pytest.mark.smoke
@pytest.mark.parametrize(("script", "family"), CASES, ids=str)
def test_family(tmp_path, script, family):
    """It learns, nothing is said that is not the script's own, and both files evaluate as the run itself did."""
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
    start, end = (
        sum(found[step] for step in steps) / 4
        for steps in (range(1, 5), range(STEPS - 3, STEPS + 1))
    )
    assert end < start - 0.05, found
    expected = (trained / "eval_results.json").read_bytes()
    assert json.loads(expected)["eval_loss"] < start

    for name in (
        "flax_model.msgpack",
        "model.safetensors",
    ):  # most models on the Hub have the latter alone
        folder = place.directory / name.partition(".")[0]
        folder.mkdir()
        for path in trained.iterdir():
            if path.name == name or (path.suffix == ".json" and "results" not in path.name):
                (folder / path.name).write_bytes(path.read_bytes())
        read = {
            "model_name_or_path": folder,
            "model_type": None,
            "config_name": None,
            "tokenizer_name": None,
        }
        run = place.run(f"from_{folder.name}", **read, do_eval=True, train_file=None)
        assert (run.returncode, run.lines) == (0, [])
        assert (
            place.directory / f"from_{folder.name}" / "eval_results.json"
        ).read_bytes() == expected


@pytest.mark.parametrize(
    ("script", "family"), [case for case in CASES if not case[0].is_stream], ids=str
)
def test_what_a_pytorch_file_lacks_is_named(tmp_path, caplog, script, family):
    """The rest is taken over. A weight of another shape is an error, and so is a file with nothing that fits."""
    from transformers import AutoConfig

    trainer, place = import_module(script.name.removesuffix(".py")), Place(script, tmp_path)
    configure(place, family)
    getattr(trainer, "mend_clip", lambda: None)()
    config = AutoConfig.from_pretrained(place.model)
    _, params = trainer.load_model(trainer.parse_args(place.flags("none")), config)
    rng, flat = np.random.default_rng(0), flatten_dict(params)
    whole = trainer.to_pytorch(
        trainer.unflatten_dict({k: rng.standard_normal(x.shape) for k, x in flat.items()})
    )

    def load(changed: dict):
        file = {name: np.ascontiguousarray(x, np.float32) for name, x in changed.items()}
        save_file(file, place.model / "model.safetensors", metadata={"format": "pt"})
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger=trainer.__name__):
            flags = place.flags(
                "none", model_name_or_path=place.model, config_name=None, tokenizer_name=None
            )
            _, params = trainer.load_model(trainer.parse_args(flags), config)
        return {".".join(path): x for path, x in flatten_dict(params).items()}, caplog.text

    expected, said = load(whole)
    assert said == ""
    names = {".".join(path): torch_name for path, torch_name in zip(flat, whole, strict=True)}
    head = [
        name for name in names if re.match(r"(lm_head|cls|generator|predictions|vocab|mlm)", name)
    ]
    lacking = sorted(head or list(names)[-2:])
    gone = {names[name] for name in lacking}
    found, said = load({name: x for name, x in whole.items() if name not in gone})
    assert f"lacks {', '.join(lacking)}: initialized at random" in said
    assert {name for name, x in expected.items() if (found[name] != x).any()} == set(lacking)
    name, x = max(whole.items(), key=lambda item: item[1].ndim)
    message = rf"start has no model of type .* Weight {re.escape(name)} was expected to be of shape"
    with pytest.raises(trainer.InputError, match=message):
        load({**whole, name: np.zeros([size + 1 for size in x.shape])})
    with pytest.raises(trainer.InputError, match="none of its weights"):
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
        ("gpt2", {"n_head": 3}, ["the config makes no model", "32"]),
        ("gemma", {"num_key_value_heads": 3}, ["the config makes no model"]),
        ("gpt_neo", {"attention_types": [[["global"], 3]]}, ["attention_layers", "num_layers"]),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_together(tmp_path, family, settings, words):
    """One line, that names what to set where the script knows it."""
    (script,) = (script for script in SCRIPTS if script.name == "run_clm_flax.py")
    place = Place(script, tmp_path)
    configure(place, family)
    config = json.loads((place.model / "config.json").read_text())
    (place.model / "config.json").write_text(json.dumps(config | settings))
    run = place.run("none", model_type=family, max_steps=1)
    assert run.returncode == 1
    (line,) = run.lines
    assert all(word in line for word in words), line
    assert not (tmp_path / "none").exists()


# ----------------------------------------------------------------------------------------------------------- README

COLUMNS = {  # of the table
    "masked": ("run_mlm_flax.py", "run_mlm_flax_stream.py"),
    "causal": ("run_clm_flax.py",),
    "span-masked": ("run_t5_mlm_flax.py",),
    "denoising": ("run_bart_dlm_flax.py",),
}
MARKED = re.compile(r"(?ms)(?<=^<!-- families -->\n)(.*?)(?=^<!-- end of families -->$)")


def table() -> str:
    """Markdown; what is in it has passed `test_family`."""
    tested = {
        column: {family.partition(",")[0] for name in scripts for family in FAMILIES[name]}
        for column, scripts in COLUMNS.items()
    }
    lines = [
        f"| `--model_type` | {' | '.join(COLUMNS)} | |",
        "|---|" + ":---:|" * len(COLUMNS) + "---|",
    ]
    for family in sorted(set().union(*tested.values())):
        marks = ["✓" if family in families else "" for families in tested.values()]
        lines.append(f"| `{family}` | {' | '.join(marks)} | {NOTES.get(family, '')} |")
    return "\n".join(lines)


def test_readme_has_the_table():
    assert MARKED.search(README.read_text("utf-8"))[1].strip() == table(), (
        "python tests/test_families.py writes it"
    )


def test_every_family_of_transformers_is_in_it():
    """Of the Flax classes that Transformers has for each objective, those that learn from text alone."""
    from transformers.models.auto import modeling_flax_auto as auto

    assert FAMILIES["run_mlm_flax.py"].keys() == auto.FLAX_MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys()
    assert FAMILIES["run_clm_flax.py"].keys() == auto.FLAX_MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()


if __name__ == "__main__":
    text = README.read_text("utf-8")
    README.write_text(MARKED.sub(lambda _: f"\n{table()}\n\n", text), encoding="utf-8")
