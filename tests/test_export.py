"""What the scripts export, read back by the Flax classes: from flax_model.msgpack, and from model.safetensors.

Of every family that one of them trains by the function that they have in common; of a whole run for the template (and
for each script in test_faults.py).

That PyTorch reads the same is checked by hand where torch is installed: see check_pytorch.py.
"""

import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_clm_objective
import test_mlm_objective
import test_t5_objective
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    FlaxAutoModelForCausalLM,
    FlaxAutoModelForMaskedLM,
    FlaxAutoModelForSeq2SeqLM,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import run_mlm_flax as mlm

FAMILIES = [
    *(
        (FlaxAutoModelForMaskedLM, family, settings)
        for family, settings in test_mlm_objective.FAMILIES.items()
    ),
    *(
        (FlaxAutoModelForCausalLM, family, settings)
        for family, settings in test_clm_objective.FAMILIES.items()
    ),
    *(
        (FlaxAutoModelForSeq2SeqLM, family, settings)
        for family, settings in test_t5_objective.FAMILIES.items()
    ),
    *(
        (FlaxAutoModelForSeq2SeqLM, family, test_mlm_objective.SEQ2SEQ)
        for family in ("bart", "mbart")
    ),
]


def logits_of(model, params):
    input_ids = np.random.default_rng(1).integers(2, 90, (2, 16), dtype=np.int32)
    attention_mask = (np.arange(16) < [[16], [9]]).astype(np.int32)
    return np.asarray(
        jax.jit(lambda params: model(input_ids, attention_mask, params=params).logits)(params)
    )


@pytest.mark.parametrize(
    ("auto_class", "family", "settings"),
    FAMILIES,
    ids=lambda x: x if isinstance(x, str) else getattr(x, "__name__", ""),
)
def test_pytorch_layout_is_read_by_flax(tmp_path, monkeypatch, auto_class, family, settings):
    """Every parameter is drawn at random, so that one that is lost, swapped or transposed is seen."""
    test_t5_objective.t5.mend_clip()
    config = CONFIG_MAPPING[family.partition(",")[0]](vocab_size=101, pad_token_id=1, **settings)
    model = auto_class.from_config(config, _do_init=False)
    rng = np.random.default_rng(0)
    shapes = flatten_dict(model.params_shape_tree)
    flat = {
        k: (k[-1] == "scale") + 0.2 * rng.standard_normal(x.shape).astype(np.float32)
        for k, x in shapes.items()
    }
    params = unflatten_dict(flat)

    config.save_pretrained(tmp_path)
    arrays = mlm.to_pytorch(params)
    assert all(isinstance(x, np.ndarray) and x.dtype == np.float32 for x in arrays.values())
    assert len(arrays) == len(flat)
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), model.params_shape_tree)
    monkeypatch.setattr(
        type(model), "init_weights", lambda *args: zeros
    )  # takes no time, and none may be left
    loaded = auto_class.from_pretrained(tmp_path)
    loaded_flat = flatten_dict(loaded.params)
    assert loaded_flat.keys() == flat.keys()
    for path, x in flat.items():
        np.testing.assert_array_equal(loaded_flat[path], x, err_msg=str(path))
    assert type(loaded) is type(model)


def test_names_and_layout():
    """Those of torch.nn: a Linear's weight is [out, in], an Embedding's [rows, width], a LayerNorm's is its scale."""
    params = {
        "lm": {
            "dense": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)},
            "LayerNorm": {"scale": jnp.full(2, 5.0), "bias": jnp.zeros(2)},
            "embeddings": {"embedding": jnp.arange(8.0).reshape(4, 2)},
            "layer": {"0": {"kernel": jnp.zeros((1, 4))}},
        },
        "bias": jnp.ones(7),
    }
    arrays = mlm.to_pytorch(params)
    assert {name: x.shape for name, x in arrays.items()} == {
        "lm.dense.weight": (3, 2),
        "lm.dense.bias": (3,),
        "lm.LayerNorm.weight": (2,),
        "lm.LayerNorm.bias": (2,),
        "lm.embeddings.weight": (4, 2),
        "lm.layer.0.weight": (4, 1),
        "bias": (7,),
    }
    assert arrays["lm.dense.weight"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert arrays["lm.embeddings.weight"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert all(
        x.flags.c_contiguous for x in arrays.values()
    )  # safetensors writes memory as it lies


@pytest.fixture(scope="module")
def exported(tmp_path_factory, corpus, roberta_dir):
    """The output directory of a run of two steps."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    output_dir = tmp_path_factory.mktemp("exported") / "model"
    argv = [
        f"--output_dir={output_dir}",
        f"--config_name={roberta_dir}",
        f"--tokenizer_name={roberta_dir}",
    ]
    argv += [
        f"--train_file={corpus / 'validation.txt'}",
        "--do_train",
        "--max_steps=2",
        "--max_seq_length=32",
    ]
    argv += ["--per_device_train_batch_size=1", "--learning_rate=0.01"]
    try:
        assert mlm.cli(argv) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return output_dir


def test_both_files_hold_the_trained_model(tmp_path, exported, roberta_dir):
    found = {path.name for path in exported.iterdir()}
    assert found > {"config.json", "flax_model.msgpack", "model.safetensors", "tokenizer.json"}
    from_flax, params = FlaxAutoModelForMaskedLM.from_pretrained(exported, _do_init=False)
    assert from_flax.required_params == set(flatten_dict(params))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    from_safetensors = FlaxAutoModelForMaskedLM.from_pretrained(tmp_path)
    logits = logits_of(from_flax, params)
    np.testing.assert_array_equal(logits_of(from_safetensors, from_safetensors.params), logits)
    assert len(load_file(exported / "model.safetensors")) == len(flatten_dict(params))

    biases = [x for path, x in flatten_dict(params).items() if path[-1] == "bias"]
    assert sum(np.any(x) for x in biases) > len(biases) / 2  # trained: they start from zero

    tokenizer, original = (
        AutoTokenizer.from_pretrained(exported),
        AutoTokenizer.from_pretrained(roberta_dir),
    )
    text = "The naïve tokenizer's <mask> is kept."
    assert tokenizer(text)["input_ids"] == original(text)["input_ids"]


@pytest.mark.parametrize(
    "kept",
    ["flax_model.msgpack", "model.safetensors"],
)
def test_training_goes_on_from_either_file(tmp_path, exported, kept):
    """Most models on the Hub come as model.safetensors alone."""
    for name in ("config.json", kept):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    args = mlm.parse_args(
        [
            f"--output_dir={tmp_path / 'new'}",
            f"--model_name_or_path={tmp_path}",
            "--train_file=x.txt",
        ]
    )
    _, params = mlm.load_model(args, AutoConfig.from_pretrained(tmp_path))
    _, expected = FlaxAutoModelForMaskedLM.from_pretrained(exported, _do_init=False)
    expected, params = flatten_dict(expected), flatten_dict(params)
    assert params.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_array_equal(params[path], x, err_msg=str(path))
