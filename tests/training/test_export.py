"""The Flax classes read back what the scripts export: flax_model.msgpack and model.safetensors.

The function that converts weights to PyTorch's layout is the same in all scripts. It is tested with
every family that a script trains. The export of a whole run is tested for the template here, and
for each script in test_faults.py.

To check that PyTorch reads the same, run check_pytorch.py by hand where torch is installed.
"""

import signal

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file
from training_scripts import full_but, word_tokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    FlaxAutoModelForCausalLM,
    FlaxAutoModelForMaskedLM,
    FlaxAutoModelForSeq2SeqLM,
)

import run_mlm_flax as mlm
from run_t5_mlm_flax import restore_clip_argument

FAMILIES = []
for auto_class, settings_by_family in (
    (FlaxAutoModelForMaskedLM, families.MASKED),
    (FlaxAutoModelForCausalLM, families.CAUSAL),
    (FlaxAutoModelForSeq2SeqLM, families.SPAN_MASKED),
    (FlaxAutoModelForSeq2SeqLM, families.DENOISING),
):
    FAMILIES += [(auto_class, family, settings) for family, settings in settings_by_family.items()]
# One family of each script.
OWN = [case for case in FAMILIES if case[1] in ("roberta", "gpt2", "t5", "bart")]


def logits_of(model, params):
    """Return the logits of random tokens, some of which are padding."""
    input_ids = np.random.default_rng(1).integers(2, 90, (2, 16), dtype=np.int32)
    attention_mask = (np.arange(16) < [[16], [9]]).astype(np.int32)

    @jax.jit
    def apply(params):
        return model(input_ids, attention_mask, params=params).logits

    return np.asarray(apply(params))


def random_params(model) -> dict:
    """Return parameters by path, all of them random: LayerNorm scales around 1, others around 0."""
    rng = np.random.default_rng(0)
    params = {}
    for path, array in flatten_dict(model.params_shape_tree).items():
        mean = 1 if path[-1] == "scale" else 0
        params[path] = mean + 0.2 * rng.standard_normal(array.shape).astype(np.float32)
    return params


@pytest.mark.parametrize(
    ("auto_class", "family", "settings"),
    full_but(FAMILIES, *OWN),
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_pytorch_layout_is_read_by_flax(tmp_path, monkeypatch, auto_class, family, settings):
    """All parameters are random, so the test finds those that are lost, swapped or transposed."""
    restore_clip_argument()
    config = CONFIG_MAPPING[family.partition(",")[0]](vocab_size=101, pad_token_id=1, **settings)
    model = auto_class.from_config(config, _do_init=False)
    params = random_params(model)

    config.save_pretrained(tmp_path)
    arrays = mlm.to_pytorch(unflatten_dict(params))
    for array in arrays.values():
        assert isinstance(array, np.ndarray)
        assert array.dtype == np.float32
    assert len(arrays) == len(params)
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    # Parameters that the file lacks would stay zero.
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), model.params_shape_tree)
    monkeypatch.setattr(type(model), "init_weights", lambda *args: zeros)
    loaded = auto_class.from_pretrained(tmp_path)
    loaded_params = flatten_dict(loaded.params)
    assert loaded_params.keys() == params.keys()
    for path, array in params.items():
        np.testing.assert_array_equal(loaded_params[path], array, err_msg=str(path))
    assert type(loaded) is type(model)


def test_names_and_layout():
    """Names and layout are those of torch.nn.

    The weight of a Linear is [out, in] and that of an Embedding [rows, width]. The weight of a
    LayerNorm is its scale.
    """
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
    assert {name: array.shape for name, array in arrays.items()} == {
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
    # safetensors writes the memory of an array as it is.
    assert all(array.flags.c_contiguous for array in arrays.values())


def test_a_second_export_replaces_the_folder_of_chat_templates(tmp_path):
    """Transformers 4.57 saves a tokenizer's templates, but for the default one, in a folder."""
    config = CONFIG_MAPPING["gpt2"](vocab_size=101, **families.CAUSAL["gpt2"])
    # A saver without a run: `export` uses these attributes alone.
    saver = object.__new__(mlm.Saver)
    saver.model = FlaxAutoModelForCausalLM.from_config(config, _do_init=False)
    saver.tokenizer = word_tokenizer(tmp_path / "start")
    saver.output_dir = tmp_path / "out"
    saver.output_dir.mkdir()
    saver.temporary = saver.output_dir / ".tmp"
    params = unflatten_dict(random_params(saver.model))
    for text in ("first", "second"):
        saver.tokenizer.chat_template = {"default": "a", "other": text}
        saver.export(params)
        (template,) = saver.output_dir.glob("additional_chat_templates/*")
        assert template.read_text() == text
    assert not saver.temporary.exists()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, corpus, roberta_dir):
    """The output directory of a run of two steps."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    output_dir = tmp_path_factory.mktemp("exported") / "model"
    argv = [
        f"--output_dir={output_dir}",
        f"--config_name={roberta_dir}",
        f"--tokenizer_name={roberta_dir}",
        f"--train_file={corpus / 'validation.txt'}",
        "--do_train",
        "--max_steps=2",
        "--max_seq_length=32",
        "--per_device_train_batch_size=1",
        "--learning_rate=0.01",
    ]
    try:
        mlm.main(argv)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return output_dir


def test_both_files_hold_the_trained_model(tmp_path, exported, roberta_dir):
    names = {path.name for path in exported.iterdir()}
    assert names > {"config.json", "flax_model.msgpack", "model.safetensors", "tokenizer.json"}
    from_flax, params = FlaxAutoModelForMaskedLM.from_pretrained(exported, _do_init=False)
    assert from_flax.required_params == set(flatten_dict(params))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    from_safetensors = FlaxAutoModelForMaskedLM.from_pretrained(tmp_path)
    logits = logits_of(from_flax, params)
    np.testing.assert_array_equal(logits_of(from_safetensors, from_safetensors.params), logits)
    assert len(load_file(exported / "model.safetensors")) == len(flatten_dict(params))

    # Biases start at zero, so most of those of a trained model are not zero.
    biases = [array for path, array in flatten_dict(params).items() if path[-1] == "bias"]
    assert sum(np.any(bias) for bias in biases) > len(biases) / 2

    tokenizer = AutoTokenizer.from_pretrained(exported)
    original = AutoTokenizer.from_pretrained(roberta_dir)
    text = "The naïve tokenizer's <mask> is kept."
    assert tokenizer(text)["input_ids"] == original(text)["input_ids"]


@pytest.mark.parametrize("weights", ["flax_model.msgpack", "model.safetensors"])
def test_training_can_start_from_either_file(tmp_path, exported, weights):
    """Most models on the Hub have model.safetensors alone."""
    for name in ("config.json", weights):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    argv = [
        f"--output_dir={tmp_path / 'new'}",
        f"--model_name_or_path={tmp_path}",
        "--train_file=x.txt",
    ]
    _, params = mlm.load_model(mlm.parse_args(argv), AutoConfig.from_pretrained(tmp_path))
    _, expected = FlaxAutoModelForMaskedLM.from_pretrained(exported, _do_init=False)
    params = flatten_dict(params)
    expected = flatten_dict(expected)
    assert params.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(params[path], array, err_msg=str(path))
