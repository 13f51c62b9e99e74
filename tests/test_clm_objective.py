"""The objective of run_clm_flax.py against independent references: loss, gradients, causality, and blocks."""

import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import (
    CONFIG_MAPPING,
    FLAX_MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoTokenizer,
    FlaxAutoModelForCausalLM,
    GPT2Config,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import run_clm_flax as clm

DEVICES = 8  # of tests/conftest.py
VOCAB_SIZE = 101  # a prime, and no other size of the models below
LENGTH, BATCH = 32, 3

# ----------------------------------------------------------------------------------------------- loss and gradients

GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 40}
GPT2 |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 37,
    "max_position_embeddings": 40,
}
ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 37,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
FAMILIES = {
    "bart": {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "max_position_embeddings": 40,
        **DROPOUT,
    },
    "bert": ENCODER,
    "big_bird": ENCODER,
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "electra": {**ENCODER, "embedding_size": 24},
    "gemma": LLAMA,
    "gpt2": GPT2,
    "gpt_neo": {
        "hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 40,
        "attention_types": [[["global", "local"], 1]], "window_size": 8, "embed_dropout": 0.0, "resid_dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "gptj": {**GPT2, "rotary_dim": 8},
    "llama": LLAMA,
    "mistral": LLAMA,
    "opt": {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 37, "word_embed_proj_dim": 32,
        "max_position_embeddings": 40, "dropout": 0.0, "attention_dropout": 0.0,
    },
    "roberta": ENCODER,
    "roberta-prelayernorm": ENCODER,
    "xglm": {
        "d_model": 32, "num_layers": 1, "attention_heads": 2, "ffn_dim": 37, "max_position_embeddings": 40, **DROPOUT,
    },
    "xlm-roberta": ENCODER,
}  # fmt: skip
ALWAYS_UNTIED = (
    "gptj",
    "llama",
    "mistral",
)  # in Flax; a tied GPT-J cannot even be made, its head has a bias
KEY = jax.random.key(0, impl="rbg")  # dropout is zero: the key is used and changes nothing


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model_and_params(family, tmp_path_factory):
    return make_model(family, tmp_path_factory.mktemp("model"))


def make_model(family: str, directory: Path, tied: bool = False):
    """As the script makes it from a configuration, but with every parameter drawn at random. In these tests models run
    without jit: what is compiled then are single operations, most of which the families have in common."""
    from training_scripts import word_tokenizer

    settings = {
        "vocab_size": VOCAB_SIZE,
        "pad_token_id": 1,
        "tie_word_embeddings": tied,
        **FAMILIES[family],
    }
    CONFIG_MAPPING[family](**settings).save_pretrained(directory)
    word_tokenizer(directory)
    flags = [
        f"--config_name={directory}",
        f"--tokenizer_name={directory}",
        "--output_dir=none",
        "--train_file=none",
    ]
    args = clm.parse_args(flags)
    config, _, _ = clm.load_config_and_tokenizer(args)
    model, rng = (
        FlaxAutoModelForCausalLM.from_config(config, _do_init=False),
        np.random.default_rng(0),
    )
    draw = lambda path, x: (
        (path[-1] == "scale") + 0.2 * rng.standard_normal(x.shape).astype(np.float32)
    )  # noqa: E731
    return model, unflatten_dict(
        {path: draw(path, x) for path, x in flatten_dict(model.params_shape_tree).items()}
    )


def apply(model, params, input_ids):
    segments = (
        {"token_type_ids": jnp.zeros_like(input_ids)}
        if model.config.model_type == "electra"
        else {}
    )
    return model(input_ids, params=params, **segments).logits


def full_loss(params, batch, model):
    """Logits of every position, softmax over all of them, the label of a position is the next token."""
    log_probabilities = jax.nn.log_softmax(
        apply(model, params, batch["input_ids"]).astype(jnp.float32)
    )[:, :-1]
    labels = batch["labels"][:, 1:]
    picked = jnp.take_along_axis(log_probabilities, jnp.maximum(labels, 0)[:, :, None], axis=2)[
        :, :, 0
    ]
    return -jnp.where(labels == -100, 0, picked).sum(), (labels != -100).sum()


def make_batch(rows: int = BATCH, length: int = LENGTH, without: int | None = None):
    input_ids = np.random.default_rng(1).integers(2, VOCAB_SIZE, (rows, length), dtype=np.int32)
    input_ids[:, ::7] = 0  # which is a token
    labels = input_ids.copy()
    if without is not None:
        labels[without] = -100
    return {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids), "labels": labels}


def test_every_family_is_tested():
    assert set(FAMILIES) == {config.model_type for config in FLAX_MODEL_FOR_CAUSAL_LM_MAPPING}


def check_loss_and_gradients(model, params, checkpointing: tuple[bool, ...]):
    """With a row that fills up a partial batch, and a length that no number of pieces divides."""
    batch = make_batch(length=29, without=1)
    (expected, predicted), expected_grads = jax.value_and_grad(full_loss, has_aux=True)(
        params, batch, model
    )
    gradients = jax.value_and_grad(clm.loss_sums, has_aux=True)
    pieces = [gradients(params, batch, model, remat, KEY) for remat in checkpointing]
    assert predicted == (batch["labels"][:, 1:] != -100).sum()
    expected_grads = flatten_dict(expected_grads)
    largest = max(float(jnp.abs(x).max()) for x in expected_grads.values())
    assert largest > 0.01
    for (loss, sums), grads in pieces:
        assert set(sums) == {"loss", "predicted"}
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
    check_loss_and_gradients(*model_and_params, checkpointing=(False, True))


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - set(ALWAYS_UNTIED)))
def test_the_same_with_tied_embeddings(family, tmp_path):
    check_loss_and_gradients(*make_model(family, tmp_path, tied=True), checkpointing=(False,))


def test_no_token_sees_the_next_one(model_and_params):
    """Of the logits, those before a changed token stay as they are: a leak would be a loss of zero before long."""
    model, params = model_and_params
    input_ids = make_batch(length=29)["input_ids"]
    changed = input_ids.copy()
    changed[:, 20] = 5 + changed[:, 20] % 7
    before, after = apply(model, params, input_ids), apply(model, params, changed)
    np.testing.assert_allclose(before[:, :20], after[:, :20], rtol=1e-5, atol=1e-5)
    assert (np.abs(before[:, 20:] - after[:, 20:]).max(axis=-1) > 1e-3).any(axis=-1).all()


def products(jaxpr):
    """Shapes of the products in a program that have a side as long as the vocabulary."""
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products(inner)
        for variable in equation.outvars:
            shape = getattr(variable.aval, "shape", ())
            if VOCAB_SIZE in shape and len(shape) > 1:
                yield shape


def test_logits_exist_in_pieces_only(model_and_params):
    model, params = model_and_params
    batch, parameters = make_batch(rows=4), {x.shape for x in jax.tree.leaves(params)}
    parameters |= {shape[::-1] for shape in parameters}
    grad = jax.grad(clm.loss_sums, has_aux=True)
    found = set(
        products(
            jax.make_jaxpr(grad, static_argnums=(2, 3))(params, batch, model, False, KEY).jaxpr
        )
    )
    sizes = {math.prod(shape) // VOCAB_SIZE for shape in found - parameters}
    assert max(sizes) == 4 * LENGTH // clm.PIECES, found


# ----------------------------------------------------------------------------------------------------------- blocks


@pytest.fixture(scope="module")
def gpt2_dir(tmp_path_factory, corpus):
    """A byte-level tokenizer, which tells line breaks, trained with a library's own class; a GPT-2 of 48 positions."""
    from tokenizers import ByteLevelBPETokenizer

    directory = tmp_path_factory.mktemp("gpt2")
    bpe = ByteLevelBPETokenizer()
    bpe.train([str(corpus / "validation.txt")], vocab_size=500, show_progress=False)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>"
    ).save_pretrained(directory)
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
    _, tokenizer, block_size = clm.load_config_and_tokenizer(args)
    train_texts, _ = clm.load_texts(args)
    return clm.tokenize(
        train_texts, tokenizer, block_size, args, args.max_train_samples, "training"
    ), tokenizer


def rows(sequences, count: int) -> list[list[int]]:
    """All of them, in order, as the evaluation takes them; what fills up the last batch must have no labels."""
    found = []
    for batch in clm.eval_batches(sequences, clm.next_token_collator, 0, 3):
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert all(array.dtype == np.int32 for array in batch.values())
        assert (batch["attention_mask"] == 1).all()
        input_ids, labels = (
            batch[name].reshape(DEVICES * 3, -1) for name in ("input_ids", "labels")
        )
        real = min(count - len(found), DEVICES * 3)
        assert (labels[:real] == input_ids[:real]).all()
        assert (labels[real:] == -100).all()
        found += input_ids[:real].tolist()
    assert len(found) == count
    return found


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
    """Kept line breaks give back the file, as far as blocks are full; without them blank lines are nothing."""
    file = tmp_path / "train.txt"
    file.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    flags = [f"--train_file={file}", "--block_size=16"]
    flags += [] if keep_linebreaks is None else [f"--keep_linebreaks={keep_linebreaks}"]
    flags += [f"--preprocessing_num_workers={workers}"] if workers else []
    sequences, tokenizer = read(parse(gpt2_dir, *flags))
    tokens = []
    for line in LINES:
        tokens += tokenizer(line if keep_linebreaks is False else line + "\n")["input_ids"]
    expected = [tokens[start : start + 16] for start in range(0, len(tokens) - 15, 16)]
    found = rows(sequences, len(expected))
    assert found == expected
    if keep_linebreaks is not False:
        text = tokenizer.decode([token for row in found for token in row])
        assert file.read_text(encoding="utf-8").startswith(text)
        assert len(text) > 20_000
    limited, _ = read(parse(gpt2_dir, *flags, "--max_train_samples=5"))
    assert rows(limited, 5) == expected[:5]


def test_texts_of_other_files_are_taken_as_they_are(tmp_path, gpt2_dir):
    texts = ["first\nsecond\n\n", None, "", " ", *(f"text {i}" for i in range(40))]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    sequences, tokenizer = read(parse(gpt2_dir, f"--train_file={file}", "--block_size=8"))
    tokens = [token for text in texts if text for token in tokenizer(text)["input_ids"]]
    assert rows(sequences, len(tokens) // 8) == [
        tokens[i : i + 8] for i in range(0, len(tokens) - 7, 8)
    ]


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
    flags = [
        f"--config_name={tmp_path}",
        f"--tokenizer_name={tmp_path}",
        "--output_dir=none",
        "--train_file=none",
    ]
    with caplog.at_level("INFO", logger="run_clm_flax"):
        assert clm.load_config_and_tokenizer(clm.parse_args(flags))[2] == expected
    (line,) = (record.getMessage() for record in caplog.records)
    assert "--block_size" in line
    assert str(expected) in line
    assert clm.load_config_and_tokenizer(clm.parse_args([*flags, "--block_size=40"]))[2] == 40
    if family != "bloom":
        limit = 128 if family == "roberta" else settings["n_positions"]
        assert (
            clm.load_config_and_tokenizer(clm.parse_args([*flags, f"--block_size={limit}"]))[2]
            == limit
        )
        with pytest.raises(clm.InputError, match=rf"--block_size {limit + 1}\b.*\b{limit}\b"):
            clm.load_config_and_tokenizer(clm.parse_args([*flags, f"--block_size={limit + 1}"]))


# --------------------------------------------------------------------------------------------------- configurations


def written(directory: Path, family: str, **settings) -> list[str]:
    """A tiny model's configuration as Transformers writes it, `settings` added as they are, in flags of the script."""
    from training_scripts import word_tokenizer

    word_tokenizer(directory / "tokenizer")
    CONFIG_MAPPING[family](
        vocab_size=VOCAB_SIZE, pad_token_id=1, **FAMILIES[family]
    ).save_pretrained(directory)
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    files = [f"--config_name={directory}", f"--tokenizer_name={directory / 'tokenizer'}"]
    return [*files, "--output_dir=none", "--train_file=none"]


def load(flags: list[str]):
    return clm.load_config_and_tokenizer(clm.parse_args(flags))


ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
IGNORED = [  # by the Flax class, while PyTorch's obeys it
    *((family, "rope_theta", 1e6) for family in ("gemma", "llama", "mistral")),
    *(
        (family, "rope_scaling", {"rope_type": "linear", "factor": 4.0})
        for family in ("gemma", "llama", "mistral")
    ),
    ("llama", "rope_scaling", {"type": "dynamic", "factor": 2.0}),
    ("gemma", "rope_scaling", "linear"),
    *(
        (family, "rope_parameters", {**ROPE, "rope_theta": 5e5})
        for family in ("gemma", "llama", "mistral")
    ),
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
    *(
        (family, "position_embedding_type", "relative_key")
        for family in ("bert", "electra", "roberta", "roberta-prelayernorm", "xlm-roberta")
    ),
]


@pytest.mark.parametrize(("family", "key", "value"), IGNORED, ids=str)
def test_what_flax_ignores_is_refused(tmp_path, family, key, value):
    """In one line that names the config, not the tokenizer, and says what is there."""
    flags = written(tmp_path, family, **{key: value})
    name, found = (
        ("hidden_act", "gelu_pytorch_tanh") if key == "hidden_activation" else (key, value)
    )
    with pytest.raises(clm.InputError) as caught:
        load(flags)
    message, expected = str(caught.value), f"{tmp_path}: {name} is {found}"
    assert message.startswith(
        expected.rstrip("}")
    )  # Transformers adds a rope_type where there is a type
    assert f"Flax's {family} has " in message


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_is_accepted(tmp_path, family):
    """With default settings, as Transformers 4 writes them, and as 5 does."""
    assert load(written(tmp_path, family))[2] == 32
    (tmp_path / "all").mkdir()
    everything = CONFIG_MAPPING[family](**FAMILIES[family]).to_dict()
    load(written(tmp_path / "all", family, **everything))
    (tmp_path / "5").mkdir()
    load(
        written(
            tmp_path / "5",
            family,
            **({"rope_parameters": ROPE} if FAMILIES[family] is LLAMA else {}),
        )
    )
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
    """Through what a run loads: the last position depends on the first token, and so the exported config says."""
    args = clm.parse_args(written(tmp_path, "mistral", sliding_window=None))
    config, _, length = clm.load_config_and_tokenizer(args)
    assert config.sliding_window == config.max_position_embeddings == 40
    assert length == 32  # of the tokenizer
    model, params = clm.load_model(args, config)
    input_ids = make_batch(length=40)["input_ids"]
    changed = input_ids.copy()
    changed[:, 0] += 1
    before, after = apply(model, params, input_ids), apply(model, params, changed)
    assert (np.abs(before - after).max(axis=-1) > 1e-6).all()


def test_block_size_is_no_longer_than_the_window_of_mistral(tmp_path):
    """Beyond it Flax sees one token more than PyTorch."""
    flags = written(tmp_path, "mistral", sliding_window=24)
    config, _, length = load(flags)
    assert (config.sliding_window, length) == (24, 24)
    assert load([*flags, "--block_size=24"])[2] == 24
    with pytest.raises(clm.InputError, match=r"--block_size 25\b.*\b24\b.*sliding_window"):
        load([*flags, "--block_size=25"])
    (tmp_path / "0").mkdir()
    with pytest.raises(clm.InputError, match="sliding_window"):
        load(written(tmp_path / "0", "mistral", sliding_window=0))
