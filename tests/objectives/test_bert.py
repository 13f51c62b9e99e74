"""What run_bert_flax.py measures, and that bfloat16 differs from float32 only by rounding."""

import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_scripts import full_but
from transformers import CONFIG_MAPPING, AutoConfig, FlaxAutoModel

import run_bert_flax as bert

FAMILIES = (
    "albert",
    "bert",
    "big_bird",
    "distilbert",
    "electra",
    "roberta",
    "roberta-prelayernorm",
    "roformer",
)
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
# Settings that some families have in place of, or besides, those of SIZES.
FAMILY_SETTINGS = {
    "albert": {"embedding_size": 16},
    "big_bird": {"attention_type": "original_full"},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "electra": {"embedding_size": 16},
    "roformer": {"embedding_size": 32},
}


def make_config(family: str):
    return CONFIG_MAPPING[family](**{**SIZES, **FAMILY_SETTINGS.get(family, {})})


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bert")
    FlaxAutoModel.from_config(make_config("bert")).save_pretrained(directory)
    return directory


def find_products(jaxpr) -> list:
    """Find all matrix products in a jaxpr and in those that it calls."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive is jax.lax.dot_general_p:
            (contracted, _), _ = equation.params["dimension_numbers"]
            # A product that contracts no dimension adds nothing up: it scales by a head mask.
            if contracted:
                found.append(equation)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += find_products(inner)
    return found


@pytest.mark.parametrize("family", full_but(FAMILIES, "albert", "bert", "distilbert"))
def test_bfloat16_is_close_and_all_its_products_accumulate_in_float32(family):
    config = make_config(family)
    model = FlaxAutoModel.from_config(config, _do_init=False)
    params = model.init_weights(jax.random.key(0), (1, 1))
    input_ids = np.random.default_rng(0).integers(0, 99, (4, 32))
    exact = model(input_ids, params=params).last_hidden_state
    for precision, tolerance in (("float32", 1e-5), ("bfloat16", 0.03)):
        encode, weights = bert.make_encoder(config, params, precision)
        products = find_products(jax.make_jaxpr(encode)(weights, input_ids).jaxpr)
        # Each of the two layers has at least the queries, keys, values, scores, weighted values and
        # the output.
        assert len(products) >= 12
        for product in products:
            assert str(product.outvars[0].aval.dtype) == "float32"
            assert all(str(operand.aval.dtype) == precision for operand in product.invars)
        output = encode(weights, input_ids).astype(jnp.float32)
        assert np.linalg.norm(output - exact) < tolerance * np.linalg.norm(exact)


def test_accumulation_is_that_of_a_slow_sum():
    """A sum of 4,096 products in bfloat16 would be wrong by percents, or stop growing."""
    x = jnp.full((1, 4096), 1 / 8, jnp.bfloat16)
    sums = bert.accumulate_in_float32(lambda x: {"sum": jax.jit(jnp.matmul)(x, x.T)})(x)
    assert sums["sum"].dtype == jnp.bfloat16
    assert float(sums["sum"][0, 0]) == 64


def test_a_product_keeps_the_dtype_that_its_function_asks_for():
    x = jnp.full((1, 3), 1 / 3, jnp.bfloat16)

    def product(x):
        return {"sum": jnp.matmul(x, x.T, preferred_element_type=jnp.float32)}

    found = bert.accumulate_in_float32(product)(x)["sum"]
    assert found.dtype == jnp.float32
    assert float(found[0, 0]) == pytest.approx(3 * float(x[0, 0]) ** 2, rel=1e-6)


def test_flops_are_those_of_the_formula():
    """Each layer has four matrices in attention and two in the feed-forward part.

    It also computes the scores of attention and the weighted values.
    """
    batch = 3
    length = 16
    width = SIZES["hidden_size"]
    layers = SIZES["num_hidden_layers"]
    inner = SIZES["intermediate_size"]
    config = make_config("bert")
    model = FlaxAutoModel.from_config(config, _do_init=False, add_pooling_layer=False)
    params = model.init_weights(jax.random.key(0), (1, 1))
    input_ids = jnp.ones((batch, length), jnp.int32)

    def forward(params):
        return model(input_ids, params=params, return_dict=False)[0]

    found = bert.count_flops(jax.make_jaxpr(forward)(params).jaxpr)
    multiplications_per_token = 4 * width**2 + 2 * width * inner + 2 * length * width
    assert found == layers * 2 * batch * length * multiplications_per_token


def test_functions_take_turns_and_each_call_is_timed():
    calls = []

    def call(name):
        calls.append(name)
        return jnp.zeros(3)

    functions = {name: partial(call, name) for name in ("a", "b")}
    seconds = bert.time_calls(functions, num_warmup=2, num_iters=3)
    assert calls == ["a", "b"] * 5
    assert {name: values.shape for name, values in seconds.items()} == {"a": (3,), "b": (3,)}
    assert all((values > 0).all() for values in seconds.values())


FAST = ["--batch_size=2", "--seq_length=16", "--num_warmup=1", "--num_iters=3"]


@pytest.fixture(autouse=True)
def small_product(monkeypatch):
    monkeypatch.setattr(bert, "PRODUCT_SIZE", 64)


@pytest.mark.parametrize(
    "flags", [["--precision=float32"], ["--precision", "bfloat16"], ["--compare"]]
)
def test_report(tiny_bert, capsys, flags):
    bert.main([f"--model_name_or_path={tiny_bert}", *FAST, *flags])
    printed = capsys.readouterr().out
    compares = flags == ["--compare"]
    chosen = ["float32", "bfloat16"] if compares else [flags[-1].removeprefix("--precision=")]
    row = r"^(float32|bfloat16) +[\d.,]+ +[\d,]+ +[\d.,]+ +[\d.,]+ +[\d,]+ +\d+% of [\d,]+$"
    assert re.findall(row, printed, re.MULTILINE) == chosen
    assert re.search(r"^Relative error .*: 0\.\d+%\.$", printed, re.MULTILINE)
    assert ("times as fast" in printed) == compares
    assert max(map(len, printed.splitlines())) <= 110


def test_command_line_is_read_without_arguments(tiny_bert, capsys, monkeypatch):
    command = ["run_bert_flax.py", f"--model_name_or_path={tiny_bert}", *FAST]
    monkeypatch.setattr(sys, "argv", command)
    bert.main()
    assert "2 x 16 tokens" in capsys.readouterr().out


def test_default_model_falls_back_to_random_weights_of_its_size(capsys, monkeypatch):
    configs = []

    class StopHere(Exception):
        """Raised in place of the initialization, which takes long for a model of this size."""

    def from_config(config, **options):
        configs.append(config)
        raise StopHere

    monkeypatch.setattr(bert.FlaxAutoModel, "from_config", from_config)
    with pytest.raises(StopHere):
        bert.load_encoder(bert.read_args([]))
    assert "random weights" in capsys.readouterr().out
    (config,) = configs
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("bert", 768, 12)


def test_pytorch_weights_are_read(tiny_bert, tmp_path):
    from safetensors.numpy import save_file

    import run_mlm_flax

    AutoConfig.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    params = FlaxAutoModel.from_pretrained(tiny_bert).params
    weights = run_mlm_flax.to_pytorch(params)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, loaded = bert.load_encoder(bert.read_args([f"--model_name_or_path={tmp_path}", *FAST]))
    assert jax.tree.all(jax.tree.map(np.array_equal, params, loaded))


def test_big_bird_is_measured_with_full_attention(tmp_path, capsys):
    """Its default, block_sparse, takes sequences of whole blocks only."""
    config = make_config("big_bird")
    FlaxAutoModel.from_config(config).save_pretrained(tmp_path)
    config.attention_type = "block_sparse"
    config.save_pretrained(tmp_path)
    config, _ = bert.load_encoder(bert.read_args([f"--model_name_or_path={tmp_path}", *FAST]))
    assert config.attention_type == "original_full"
    assert "full attention" in capsys.readouterr().out


# Flags, exit status, and what the message has to name.
BAD_INPUT = {
    "precision": (["--precision=float16"], 2, ["--precision", "float16"]),
    "unknown": (["--batchsize=3"], 2, ["--batchsize"]),
    "unknown with a value": (["--hub_token=hf_secret", "hf_secret"], 2, ["--hub_token"]),
    "no passes": (["--num_iters=0"], 2, ["--num_iters 0", "at least 1"]),
    "missing": (["--model_name_or_path=missing"], 1, ["--model_name_or_path missing"]),
    "too long": (["--seq_length=41"], 1, ["--seq_length 41", "40"]),
    "broken": (["--model_name_or_path=broken"], 1, ["broken"]),
    "no encoder": (["--model_name_or_path=gpt2"], 1, ["gpt2", "no encoder"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_line(case, tiny_bert, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text((tiny_bert / "config.json").read_text())
    (tmp_path / "broken" / "flax_model.msgpack").write_bytes(b"no weights")
    CONFIG_MAPPING["gpt2"]().save_pretrained(tmp_path / "gpt2")
    flags, status, words = BAD_INPUT[case]
    with pytest.raises(SystemExit) as stopped:
        bert.main([f"--model_name_or_path={tiny_bert}", *flags])
    assert stopped.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("run_bert_flax.py: error: ")
    assert all(word in line for word in words), line
    assert "hf_secret" not in line
