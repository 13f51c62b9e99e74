"""run_bert_flax.py: what it measures, and that bfloat16 computes the same but for its rounding."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
OWN = {
    "albert": {"embedding_size": 16},
    "big_bird": {"attention_type": "original_full"},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "electra": {"embedding_size": 16},
    "roformer": {"embedding_size": 32},
}


def make_config(family: str):
    return CONFIG_MAPPING[family](**{**SIZES, **OWN.get(family, {})})


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bert")
    FlaxAutoModel.from_config(make_config("bert")).save_pretrained(directory)
    return directory


def products(program) -> list:
    """All matrix products of a program, of those that it calls as well."""
    found = []
    for equation in program.eqns:
        if (
            equation.primitive is jax.lax.dot_general_p
            and equation.params["dimension_numbers"][0][0]
        ):
            found.append(equation)  # others sum up nothing: they scale by a mask of heads
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            found += products(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_close_and_all_its_products_accumulate_in_float32(family):
    config = make_config(family)
    model = FlaxAutoModel.from_config(config, _do_init=False)
    params = model.init_weights(jax.random.key(0), (1, 1))
    ids = np.random.default_rng(0).integers(0, 99, (4, 32))
    exact = model(ids, params=params).last_hidden_state
    for precision, tolerance in (("float32", 1e-5), ("bfloat16", 0.03)):
        encode, weights = bert.make_encoder(config, params, precision)
        found = products(jax.make_jaxpr(encode)(weights, ids).jaxpr)
        assert (
            len(found) >= 12
        )  # queries, keys, values, scores, weighted values, output of each layer, at least
        assert all(str(equation.outvars[0].aval.dtype) == "float32" for equation in found)
        assert all(str(x.aval.dtype) == precision for equation in found for x in equation.invars)
        output = encode(weights, ids).astype(jnp.float32)
        assert np.linalg.norm(output - exact) < tolerance * np.linalg.norm(exact)


def test_accumulation_is_that_of_a_slow_sum():
    """A sum of 4,096 products in bfloat16 would be off by percents, or stop growing."""
    x = jnp.full((1, 4096), 1 / 8, jnp.bfloat16)
    sums = bert.accumulate_in_float32(lambda x: {"sum": jax.jit(jnp.matmul)(x, x.T)})(x)
    assert sums["sum"].dtype == jnp.bfloat16
    assert float(sums["sum"][0, 0]) == 64


def test_flops_are_those_of_the_formula():
    """Per layer, batch x length tokens and width d: 4 products with d x d, 2 with d x 4 d, and 2 of attention."""
    batch, length, width, layers, inner = 3, 16, 32, 2, 64
    config = make_config("bert")
    model = FlaxAutoModel.from_config(config, _do_init=False, add_pooling_layer=False)
    params = model.init_weights(jax.random.key(0), (1, 1))
    ids = jnp.ones((batch, length), jnp.int32)
    program = jax.make_jaxpr(lambda params: model(ids, params=params, return_dict=False)[0])(params)
    tokens = batch * length
    assert bert.count_flops(program.jaxpr) == layers * 2 * tokens * (
        4 * width**2 + 2 * width * inner + 2 * length * width
    )


def test_each_call_is_waited_for_and_functions_take_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) or jnp.zeros(3) for name in ("a", "b")}
    seconds = bert.timed(functions, num_warmup=2, num_iters=3)
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
    assert bert.cli_of_benchmark([f"--model_name_or_path={tiny_bert}", *FAST, *flags]) == 0
    printed = capsys.readouterr().out
    rows = re.findall(
        r"^(float32|bfloat16) +[\d.,]+ +[\d,]+ +[\d.,]+ +[\d.,]+ +[\d,]+ +\d+% of [\d,]+$",
        printed,
        re.M,
    )
    assert rows == (
        ["float32", "bfloat16"]
        if flags == ["--compare"]
        else [flags[-1].removeprefix("--precision=")]
    )
    assert re.search(r"^Relative error .*: 0\.\d+%\.$", printed, re.M)
    assert ("times as fast" in printed) == (flags == ["--compare"])
    assert max(map(len, printed.splitlines())) <= 110


def test_default_model_falls_back_to_random_weights_of_its_size(capsys, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        bert.FlaxAutoModel, "from_config", lambda config, **_: sizes.append(config) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        bert.load(bert.read_args([]))
    assert "random weights" in capsys.readouterr().out
    assert (sizes[0].model_type, sizes[0].hidden_size, sizes[0].num_hidden_layers) == (
        "bert",
        768,
        12,
    )


def test_pytorch_weights_are_read(tiny_bert, tmp_path):
    from safetensors.numpy import save_file

    import run_mlm_flax

    config, params = (
        AutoConfig.from_pretrained(tiny_bert),
        FlaxAutoModel.from_pretrained(tiny_bert).params,
    )
    config.save_pretrained(tmp_path)
    save_file(
        run_mlm_flax.to_pytorch(params), tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    read = bert.load(bert.read_args([f"--model_name_or_path={tmp_path}", *FAST]))[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, params, read))


BAD = {
    "precision": (["--precision=float16"], 2, ["--precision", "float16"]),
    "unknown": (["--batchsize=3"], 2, ["--batchsize"]),
    "no passes": (["--num_iters=0"], 2, ["--num_iters 0", "at least 1"]),
    "missing": (["--model_name_or_path=missing"], 1, ["--model_name_or_path missing"]),
    "too long": (["--seq_length=41"], 1, ["--seq_length 41", "40"]),
    "broken": (["--model_name_or_path=broken"], 1, ["broken"]),
    "no encoder": (["--model_name_or_path=gpt2"], 1, ["gpt2", "no encoder"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(case, tiny_bert, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text((tiny_bert / "config.json").read_text())
    (tmp_path / "broken" / "flax_model.msgpack").write_bytes(b"no weights")
    CONFIG_MAPPING["gpt2"]().save_pretrained(tmp_path / "gpt2")
    flags, status, words = BAD[case]
    assert bert.cli_of_benchmark([f"--model_name_or_path={tiny_bert}", *flags]) == status
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("run_bert_flax.py: error: ")
    assert all(word in line for word in words), line
