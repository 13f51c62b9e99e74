"""The objective of run_clm_flax.py against independent references: loss, gradients, causality, blocks, their length."""

import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import CONFIG_MAPPING, FLAX_MODEL_FOR_CAUSAL_LM_MAPPING, AutoTokenizer, GPT2Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import run_clm_flax as clm

DEVICES = 8  # of tests/conftest.py
VOCAB_SIZE = 101  # a prime, and no other size of the models below
LENGTH, BATCH = 32, 3

# ----------------------------------------------------------------------------------------------- loss and gradients

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 40}
GPT2 |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 37,
    "max_position_embeddings": 40,
}
ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 37,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
FAMILIES = {
    "bart": {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "max_position_embeddings": 40,
        **DROPOUT,
    },
    "bert": ENCODER,
    "big_bird": ENCODER,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0},
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
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 37, "word_embed_proj_dim": 32,
        "max_position_embeddings": 40, "dropout": 0.0, "attention_dropout": 0.0,
    },
    "roberta": ENCODER,
    "roberta-prelayernorm": ENCODER,
    "xglm": {
        "d_model": 32, "num_layers": 2, "attention_heads": 2, "ffn_dim": 37, "max_position_embeddings": 40, **DROPOUT,
    },
    "xlm-roberta": ENCODER,
}  # fmt: skip
NEVER_TIED = ("llama", "mistral")  # in Flax, whatever the configuration says
KEY = jax.random.key(0, impl="rbg")  # dropout is zero: the key is used and changes nothing


@pytest.fixture(scope="module", params=[f"{family}{untied}" for family in sorted(FAMILIES) for untied in ("", " untied")])
def model_and_params(request, tmp_path_factory):
    """As the script makes them from a configuration, and with every parameter drawn at random."""
    family, _, untied = request.param.partition(" ")
    if untied and family in NEVER_TIED:
        pytest.skip("never tied")
    settings = {"vocab_size": VOCAB_SIZE, "pad_token_id": 1, "tie_word_embeddings": not untied, **FAMILIES[family]}
    return make_model(family, tmp_path_factory.mktemp("model"), **settings)


def make_model(family: str, directory: Path, **settings):
    from training_scripts import word_tokenizer

    CONFIG_MAPPING[family](**settings).save_pretrained(directory)
    word_tokenizer(directory)
    flags = [f"--config_name={directory}", f"--tokenizer_name={directory}", "--output_dir=none", "--train_file=none"]
    args = clm.parse_args(flags)
    config, _, _ = clm.load_config_and_tokenizer(args)
    model, params = clm.load_model(args, config)
    rng = np.random.default_rng(0)
    draw = lambda path, x: (path[-1] == "scale") + 0.2 * rng.standard_normal(x.shape).astype(np.float32)  # noqa: E731
    return model, unflatten_dict({path: draw(path, x) for path, x in flatten_dict(params).items()})


def apply(model, params, input_ids):
    return model(input_ids, params=params).logits


def full_loss(params, batch, model):
    """Logits of every position, softmax over all of them, the label of a position is the next token."""
    log_probabilities = jax.nn.log_softmax(apply(model, params, batch["input_ids"]).astype(jnp.float32))
    total, count = 0.0, 0
    for position in range(batch["input_ids"].shape[1] - 1):
        label = batch["labels"][:, position + 1]
        picked = jnp.take_along_axis(log_probabilities[:, position], jnp.maximum(label, 0)[:, None], axis=1)[:, 0]
        total, count = total - jnp.where(label == -100, 0, picked).sum(), count + (label != -100).sum()
    return total, count


def make_batch(rows: int = BATCH, length: int = LENGTH, without: int | None = None):
    input_ids = np.random.default_rng(1).integers(2, VOCAB_SIZE, (rows, length), dtype=np.int32)
    input_ids[:, ::7] = 0  # which is a token
    labels = input_ids.copy()
    if without is not None:
        labels[without] = -100
    return {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids), "labels": labels}


def test_every_family_is_tested():
    assert set(FAMILIES) == {config.model_type for config in FLAX_MODEL_FOR_CAUSAL_LM_MAPPING}


def test_loss_and_gradients_equal_the_full_computation(model_and_params):
    """With a row that fills up a partial batch, and a length that no number of pieces divides."""
    model, params = model_and_params

    @jax.jit
    def all_of_them(params, batch):
        pieces = [
            jax.value_and_grad(clm.loss_sums, has_aux=True)(params, batch, model, checkpointing, KEY)
            for checkpointing in (False, True)
        ]
        return pieces, jax.value_and_grad(full_loss, has_aux=True)(params, batch, model)

    for batch in (make_batch(), make_batch(length=29, without=1)):
        pieces, ((expected, predicted), expected_grads) = all_of_them(params, batch)
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
                np.testing.assert_allclose(grads[path], value, rtol=1e-5, atol=2e-6 * largest, err_msg=str(path))


def test_no_token_sees_the_next_one(model_and_params):
    """Of the logits, those before a changed token stay as they are: a leak would be a loss of zero before long."""
    model, params = model_and_params
    input_ids = make_batch()["input_ids"]
    changed = input_ids.copy()
    changed[:, 20] = 5 + changed[:, 20] % 7
    logits = jax.jit(lambda params, ids: apply(model, params, ids))
    before, after = logits(params, input_ids), logits(params, changed)
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
    found = set(products(jax.make_jaxpr(grad, static_argnums=(2, 3))(params, batch, model, False, KEY).jaxpr))
    sizes = {math.prod(shape) // VOCAB_SIZE for shape in found - parameters}
    assert max(sizes) == 4 * LENGTH // clm.PIECES, found
