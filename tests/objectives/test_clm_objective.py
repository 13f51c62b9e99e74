"""The objective of run_clm_flax.py against independent references.

They cover the loss, gradients, causality, blocks, and the configurations that are accepted.
"""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CAUSAL, GPT2, LLAMA
from flax.traverse_util import flatten_dict, unflatten_dict
from training_scripts import full_but
from transformers import (
    CONFIG_MAPPING,
    FLAX_MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoTokenizer,
    FlaxAutoModelForCausalLM,
    GPT2Config,
    PreTrainedTokenizerFast,
)

import run_clm_flax as clm

DEVICES = 8  # of tests/conftest.py
# A prime that is no other size of the models below.
VOCAB_SIZE = 101
LENGTH = 32
BATCH = 3

# ------------------------------------------------------------------------------- loss and gradients

# Flax unties the embeddings of these families. A tied GPT-J cannot be made: its head has a bias.
ALWAYS_UNTIED = ("gptj", "llama", "mistral")
# Dropout is zero, so the key is used and changes nothing.
KEY = jax.random.key(0, impl="rbg")


@pytest.fixture(scope="module", params=full_but(CAUSAL, "gpt2", "llama"))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model_and_params(family, tmp_path_factory):
    return make_model(family, tmp_path_factory.mktemp("model"))


def make_flags(config_dir: Path, tokenizer_dir: Path) -> list[str]:
    return [
        f"--config_name={config_dir}",
        f"--tokenizer_name={tokenizer_dir}",
        "--output_dir=none",
        "--train_file=none",
    ]


def load(flags: list[str]):
    return clm.load_config_and_tokenizer(clm.parse_args(flags))


def make_model(family: str, directory: Path, tied: bool = False):
    """The model that the script makes from a configuration, with random parameters.

    These tests run models without jit. Only single operations are compiled then, and the families
    have most of them in common.
    """
    from training_scripts import word_tokenizer

    settings = {"vocab_size": VOCAB_SIZE, "pad_token_id": 1, "tie_word_embeddings": tied}
    CONFIG_MAPPING[family](**{**settings, **CAUSAL[family]}).save_pretrained(directory)
    word_tokenizer(directory)
    config, _, _ = load(make_flags(directory, directory))
    model = FlaxAutoModelForCausalLM.from_config(config, _do_init=False)
    rng = np.random.default_rng(0)
    params = {}
    for path, x in flatten_dict(model.params_shape_tree).items():
        noise = rng.standard_normal(x.shape).astype(np.float32)
        params[path] = (path[-1] == "scale") + 0.2 * noise
    return model, unflatten_dict(params)


def apply(model, params, input_ids):
    inputs = {}
    if model.config.model_type == "electra":
        inputs["token_type_ids"] = jnp.zeros_like(input_ids)
    return model(input_ids, params=params, **inputs).logits


def full_loss(params, batch, model):
    """The sum over the positions of -log softmax(logits) of the next token, and their number."""
    logits = apply(model, params, batch["input_ids"]).astype(jnp.float32)
    log_probabilities = jax.nn.log_softmax(logits)[:, :-1]
    labels = batch["labels"][:, 1:]
    indices = jnp.maximum(labels, 0)[:, :, None]
    picked = jnp.take_along_axis(log_probabilities, indices, axis=2)[:, :, 0]
    return -jnp.where(labels == -100, 0, picked).sum(), (labels != -100).sum()


def make_batch(rows: int = BATCH, length: int = LENGTH, without: int | None = None):
    input_ids = np.random.default_rng(1).integers(2, VOCAB_SIZE, (rows, length), dtype=np.int32)
    # Token 0 counts like any other token.
    input_ids[:, ::7] = 0
    labels = input_ids.copy()
    if without is not None:
        labels[without] = -100
    return {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids), "labels": labels}


def test_every_family_is_tested():
    assert set(CAUSAL) == {config.model_type for config in FLAX_MODEL_FOR_CAUSAL_LM_MAPPING}


def check_loss_and_gradients(model, params, parts=("none",)):
    """Compare with the full computation.

    One row fills up a partial batch. No number of chunks divides the length.
    """
    batch = make_batch(length=29, without=1)
    full = jax.value_and_grad(full_loss, has_aux=True)
    (expected, predicted), expected_grads = full(params, batch, model)
    results = []
    for part in parts:
        loss_fn = clm.loss_sums if part == "none" else clm.recompute(clm.loss_sums, part)
        in_chunks = jax.value_and_grad(loss_fn, has_aux=True)
        results.append(in_chunks(params, batch, model, KEY))
    assert predicted == (batch["labels"][:, 1:] != -100).sum()
    expected_grads = flatten_dict(expected_grads)
    largest = max(float(jnp.abs(x).max()) for x in expected_grads.values())
    assert largest > 0.01
    for (loss, sums), grads in results:
        assert set(sums) == {"loss", "z_loss", "predicted"}
        assert sums["z_loss"] == 0
        assert loss == pytest.approx(float(expected), rel=1e-5, abs=0)
        assert sums["loss"] == loss
        assert sums["predicted"] == predicted
        grads = flatten_dict(grads)
        assert grads.keys() == expected_grads.keys()
        for path, value in expected_grads.items():
            np.testing.assert_allclose(
                grads[path], value, rtol=1e-5, atol=2e-6 * largest, err_msg=str(path)
            )


def test_loss_and_gradients_equal_the_full_computation(model_and_params):
    check_loss_and_gradients(*model_and_params, parts=("none", "layers", "attention"))


@pytest.mark.parametrize("family", full_but(sorted(CAUSAL.keys() - set(ALWAYS_UNTIED)), "gpt2"))
def test_loss_and_gradients_with_tied_embeddings(family, tmp_path):
    check_loss_and_gradients(*make_model(family, tmp_path, tied=True))


def test_no_token_sees_the_next_one(model_and_params):
    """A changed token changes no logits before it. With a leak the loss would soon be zero."""
    model, params = model_and_params
    input_ids = make_batch(length=29)["input_ids"]
    changed = input_ids.copy()
    changed[:, 20] = 5 + changed[:, 20] % 7
    before = apply(model, params, input_ids)
    after = apply(model, params, changed)
    np.testing.assert_allclose(before[:, :20], after[:, :20], rtol=1e-5, atol=1e-5)
    differences = np.abs(before[:, 20:] - after[:, 20:]).max(axis=-1)
    assert (differences > 1e-3).any(axis=-1).all()


def shapes_with_vocabulary(jaxpr):
    """Yield the shape of each result in a program that has an axis as long as the vocabulary."""
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from shapes_with_vocabulary(inner)
        for variable in equation.outvars:
            shape = getattr(variable.aval, "shape", ())
            if VOCAB_SIZE in shape and len(shape) > 1:
                yield shape


def test_logits_exist_in_chunks_only(model_and_params):
    model, params = model_and_params
    batch = make_batch(rows=4)
    of_parameters = {x.shape for x in jax.tree.leaves(params)}
    of_parameters |= {shape[::-1] for shape in of_parameters}
    grad = jax.grad(clm.loss_sums, has_aux=True)
    program = jax.make_jaxpr(grad, static_argnums=2)(params, batch, model, KEY)
    found = set(shapes_with_vocabulary(program.jaxpr))
    sizes = {math.prod(shape) // VOCAB_SIZE for shape in found - of_parameters}
    assert max(sizes) == 4 * LENGTH // clm.CHUNKS, found


# ------------------------------------------------------------------------------------------- blocks


@pytest.fixture(scope="module")
def gpt2_dir(tmp_path_factory, corpus):
    """A folder with a byte-level tokenizer and the configuration of a GPT-2 of 48 positions.

    The tokenizer, which has tokens for line breaks, is trained with the library's own class.
    """
    from tokenizers import ByteLevelBPETokenizer

    directory = tmp_path_factory.mktemp("gpt2")
    bpe = ByteLevelBPETokenizer()
    bpe.train([str(corpus / "validation.txt")], vocab_size=500, show_progress=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(directory)
    GPT2Config(**{**GPT2, "n_positions": 48}, vocab_size=501).save_pretrained(directory)
    return directory


def parse(gpt2_dir, *flags):
    model = [
        f"--config_name={gpt2_dir}",
        f"--tokenizer_name={gpt2_dir}",
        "--output_dir=none",
        "--do_train",
    ]
    return clm.parse_args([*model, "--validation_split_percentage=0", *map(str, flags)])


def read(args):
    """The training sequences, and the tokenizer."""
    _, tokenizer, block_size = clm.load_config_and_tokenizer(args)
    train_texts, _ = clm.load_texts(args)
    limit = args.max_train_samples
    sequences = clm.tokenize(train_texts, tokenizer, block_size, args, limit, "training")
    return sequences, tokenizer


def rows(sequences, block_size: int, count: int) -> list[list[int]]:
    """All rows in order, as the evaluation reads them.

    Check that the rows that fill up the last batch have no labels.
    """
    rows_in_batch = DEVICES * 3
    collator = clm.FlaxDataCollatorForCausalLM(block_size)
    found = []
    for batch in clm.eval_batches(sequences, collator, 0, 3):
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert all(array.dtype == np.int32 for array in batch.values())
        assert (batch["attention_mask"] == 1).all()
        input_ids = batch["input_ids"].reshape(rows_in_batch, -1)
        labels = batch["labels"].reshape(rows_in_batch, -1)
        real = min(count - len(found), rows_in_batch)
        assert (labels[:real] == input_ids[:real]).all()
        assert (labels[real:] == -100).all()
        found += input_ids[:real].tolist()
    assert len(found) == count
    return found


def split_into_blocks(tokens: list[int], size: int) -> list[list[int]]:
    """Full blocks only."""
    return [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]


LINES = [
    "first line",
    "",
    "  ",
    "naïve\tline 日本語",
    "",
    "",
    *(f"line {i} of many" for i in range(1500)),
    "",
    "last",
]


@pytest.mark.parametrize("keep_linebreaks", [None, True, False])
@pytest.mark.parametrize("workers", [None, 2])
def test_blocks_equal_the_slow_concatenation(tmp_path, gpt2_dir, keep_linebreaks, workers):
    """With line breaks, the blocks decode to the file. Without them, blank lines have no tokens."""
    file = tmp_path / "train.txt"
    file.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    flags = [f"--train_file={file}", "--block_size=16"]
    if keep_linebreaks is not None:
        flags.append(f"--keep_linebreaks={keep_linebreaks}")
    if workers:
        flags.append(f"--preprocessing_num_workers={workers}")
    sequences, tokenizer = read(parse(gpt2_dir, *flags))
    tokens = []
    for line in LINES:
        text = line if keep_linebreaks is False else line + "\n"
        tokens += tokenizer(text)["input_ids"]
    expected = split_into_blocks(tokens, 16)
    found = rows(sequences, 16, len(expected))
    assert found == expected
    if keep_linebreaks is not False:
        text = tokenizer.decode([token for row in found for token in row])
        assert file.read_text(encoding="utf-8").startswith(text)
        assert len(text) > 20_000
    limited, _ = read(parse(gpt2_dir, *flags, "--max_train_samples=5"))
    assert rows(limited, 16, 5) == expected[:5]


def test_texts_of_other_files_are_taken_as_they_are(tmp_path, gpt2_dir):
    texts = ["first\nsecond\n\n", None, "", " ", *(f"text {i}" for i in range(40))]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    sequences, tokenizer = read(parse(gpt2_dir, f"--train_file={file}", "--block_size=8"))
    tokens = [token for text in texts if text for token in tokenizer(text)["input_ids"]]
    assert rows(sequences, 8, len(tokens) // 8) == split_into_blocks(tokens, 8)


@pytest.mark.parametrize("text", ["\n \n\t\n", "\n" * 2000])
def test_blank_data_is_refused(tmp_path, gpt2_dir, text):
    (tmp_path / "train.txt").write_text(text)
    with pytest.raises(clm.InputError, match="blank"):
        read(parse(gpt2_dir, f"--train_file={tmp_path / 'train.txt'}", "--block_size=8"))


@pytest.mark.parametrize(
    ("family", "settings", "tokenizer_length", "expected"),
    [
        ("gpt2", {"n_positions": 48}, None, 48),
        ("gpt2", {"n_positions": 4096}, None, 1024),
        ("gpt2", {"n_positions": 4096}, 100, 100),
        ("bloom", {}, None, 1024),
        ("roberta", {"max_position_embeddings": 130, "pad_token_id": 1}, None, 128),
    ],
)
def test_block_size_is_what_the_model_allows_and_no_more_than_1024(
    tmp_path, gpt2_dir, caplog, family, settings, tokenizer_length, expected
):
    settings = {"vocab_size": 501, **settings}
    CONFIG_MAPPING[family](**settings).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(gpt2_dir)
    tokenizer.model_max_length = tokenizer_length or 10**30
    tokenizer.save_pretrained(tmp_path)
    flags = make_flags(tmp_path, tmp_path)
    with caplog.at_level("INFO", logger="run_clm_flax"):
        assert load(flags)[2] == expected
    (line,) = (record.getMessage() for record in caplog.records)
    assert "--block_size" in line
    assert str(expected) in line
    assert load([*flags, "--block_size=40"])[2] == 40
    if family != "bloom":
        limit = 128 if family == "roberta" else settings["n_positions"]
        assert load([*flags, f"--block_size={limit}"])[2] == limit
        with pytest.raises(clm.InputError, match=rf"--block_size {limit + 1}\b.*\b{limit}\b"):
            load([*flags, f"--block_size={limit + 1}"])


# ----------------------------------------------------------------------------------- configurations


def written(directory: Path, family: str, **settings) -> list[str]:
    """Write the configuration of a tiny model with `settings`, unchecked, and a tokenizer.

    Return flags of the script that name them.
    """
    from training_scripts import word_tokenizer

    word_tokenizer(directory / "tokenizer")
    config = CONFIG_MAPPING[family](vocab_size=VOCAB_SIZE, pad_token_id=1, **CAUSAL[family])
    config.save_pretrained(directory)
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return make_flags(directory, directory / "tokenizer")


ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
# Settings that the Flax class of a family ignores, while the PyTorch class honors them.
IGNORED = [
    ("gemma", "rope_theta", 1e6),
    ("llama", "rope_theta", 1e6),
    ("mistral", "rope_theta", 1e6),
    ("gemma", "rope_scaling", {"rope_type": "linear", "factor": 4.0}),
    ("llama", "rope_scaling", {"rope_type": "linear", "factor": 4.0}),
    ("mistral", "rope_scaling", {"rope_type": "linear", "factor": 4.0}),
    ("llama", "rope_scaling", {"type": "dynamic", "factor": 2.0}),
    ("gemma", "rope_scaling", "linear"),
    ("gemma", "rope_parameters", {**ROPE, "rope_theta": 5e5}),
    ("llama", "rope_parameters", {**ROPE, "rope_theta": 5e5}),
    ("mistral", "rope_parameters", {**ROPE, "rope_theta": 5e5}),
    ("llama", "rope_parameters", {**ROPE, "rope_type": "linear", "factor": 4.0}),
    ("gptj", "tie_word_embeddings", True),
    ("llama", "tie_word_embeddings", True),
    ("mistral", "tie_word_embeddings", True),
    ("llama", "mlp_bias", True),
    ("gemma", "hidden_act", "gelu"),
    ("gemma", "hidden_activation", "gelu"),
    ("electra", "hidden_act", "relu"),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ("gpt2", "scale_attn_weights", False),
    ("opt", "enable_bias", False),
    ("opt", "layer_norm_elementwise_affine", False),
    ("opt", "layerdrop", 0.1),
    ("xglm", "layerdrop", 0.1),
    ("bart", "decoder_layerdrop", 0.1),
    ("bert", "position_embedding_type", "relative_key"),
    ("electra", "position_embedding_type", "relative_key"),
    ("roberta", "position_embedding_type", "relative_key"),
    ("roberta-prelayernorm", "position_embedding_type", "relative_key"),
    ("xlm-roberta", "position_embedding_type", "relative_key"),
]


@pytest.mark.parametrize(("family", "key", "value"), IGNORED, ids=str)
def test_what_flax_ignores_is_refused(tmp_path, family, key, value):
    """The message names the folder of the config, not of the tokenizer, and the value found."""
    flags = written(tmp_path, family, **{key: value})
    name = key
    found = value
    if key == "hidden_activation":
        name = "hidden_act"
        found = "gelu_pytorch_tanh"
    with pytest.raises(clm.InputError) as caught:
        load(flags)
    message = str(caught.value)
    expected = f"{tmp_path}: {name} is {found}"
    # Transformers adds `rope_type` to a dictionary that has `type`, so its end is left open.
    assert message.startswith(expected.rstrip("}"))
    assert f"Flax's {family} has " in message


@pytest.mark.parametrize("family", CAUSAL)
def test_what_transformers_writes_is_accepted(tmp_path, family):
    """Tiny settings, all default settings of Transformers 4, and those of Transformers 5."""
    assert load(written(tmp_path, family))[2] == 32
    (tmp_path / "all").mkdir()
    everything = CONFIG_MAPPING[family](**CAUSAL[family]).to_dict()
    load(written(tmp_path / "all", family, **everything))
    (tmp_path / "5").mkdir()
    of_version_5 = {"rope_parameters": ROPE} if CAUSAL[family] is LLAMA else {}
    load(written(tmp_path / "5", family, **of_version_5))
    clm.check_config(CONFIG_MAPPING[family](), "the default")


@pytest.mark.parametrize(
    ("family", "settings", "key"),
    [
        ("gptj", {"rotary_dim": 7}, "rotary_dim"),
        ("bloom", {"n_head": 3}, "n_head"),
        ("llama", {"head_dim": 15}, "head_dim"),
    ],
)
def test_a_message_names_the_folder_of_the_config(tmp_path, family, settings, key):
    with pytest.raises(clm.InputError, match=rf"^{tmp_path}: .*{key}"):
        load(written(tmp_path, family, **settings))


def test_mistral_without_a_window_sees_all_tokens(tmp_path):
    """In the model that a run loads, the last position depends on the first token.

    The exported config has a window of all positions.
    """
    args = clm.parse_args(written(tmp_path, "mistral", sliding_window=None))
    config, _, length = clm.load_config_and_tokenizer(args)
    assert config.sliding_window == config.max_position_embeddings == 40
    # This is the tokenizer's limit.
    assert length == 32
    model, params = clm.load_model(args, config)
    input_ids = make_batch(length=40)["input_ids"]
    changed = input_ids.copy()
    changed[:, 0] += 1
    before = apply(model, params, input_ids)
    after = apply(model, params, changed)
    assert (np.abs(before - after).max(axis=-1) > 1e-6).all()


def test_block_size_is_no_longer_than_the_window_of_mistral(tmp_path):
    """In longer blocks Flax would see one token more than PyTorch."""
    flags = written(tmp_path, "mistral", sliding_window=24)
    config, _, length = load(flags)
    assert (config.sliding_window, length) == (24, 24)
    assert load([*flags, "--block_size=24"])[2] == 24
    with pytest.raises(clm.InputError, match=r"--block_size 25\b.*\b24\b.*sliding_window"):
        load([*flags, "--block_size=25"])
    (tmp_path / "0").mkdir()
    with pytest.raises(clm.InputError, match="sliding_window"):
        load(written(tmp_path / "0", "mistral", sliding_window=0))
