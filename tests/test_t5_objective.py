"""The objective of run_t5_mlm_flax.py against a slow reference written from the T5 paper, section 3.1.4.

Statistics are held to 5 standard deviations, as in test_mlm_objective.py.
"""

import itertools
import json
import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file
from test_mlm_objective import assert_uniform
from transformers import CONFIG_MAPPING, FlaxAutoModelForSeq2SeqLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import run_t5_mlm_flax as t5

EOS, START, LOWEST, TOP = 1, 0, 10, 32099
SETTINGS = list(itertools.product((8, 33, 128, 512), (0.05, 0.15, 0.5, 0.9), (1.0, 2.5, 3.0, 10.0)))


class Tokenizer:
    """What the collator needs of T5's."""

    eos_token_id = EOS
    name_or_path = "as T5"

    def __init__(self, count: int = 600, mark: str = ""):
        self.vocabulary = {f"{mark}<extra_id_{i}>": TOP - i for i in range(count)} | {
            "▁the": 10,
            "<extra_id": 11,
        }

    def get_vocab(self):
        return self.vocabulary


def generator(seed: int = 0, skip: int = 0):
    return np.random.Generator(np.random.PCG64(seed).advance(skip))


def make_collator(length=512, density=0.15, span=3.0):
    return t5.FlaxDataCollatorForT5MLM(Tokenizer(), length, density, span, START)


def make_rows(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(LOWEST, TOP - 1000, (rows, length), dtype=np.int32)


def collate(collator, rows, rng):
    kept = rows.copy()
    batch = collator({"input_ids": rows}, rng)
    assert (rows == kept).all()
    assert set(batch) == {"input_ids", "attention_mask", "labels", "decoder_input_ids"}
    assert all(array.dtype == np.int32 for array in batch.values())
    return batch


# -------------------------------------------------------------------------------------------------- slow reference


def corrupt(tokens: list[int], left_out: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Figure 2 of the paper: each span (start, end) becomes a sentinel of its own; the target has what is left out."""
    inputs, target, position = [], [], 0
    for number, (start, end) in enumerate(left_out):
        sentinel = TOP - number
        inputs += [*tokens[position:start], sentinel]
        target += [sentinel, *tokens[start:end]]
        position = end
    return [*inputs, *tokens[position:], EOS], [*target, EOS]


def spans_of(inputs: list[int], target: list[int]) -> list[tuple[int, int]]:
    """Where in the original the spans were: the only thing that is random."""
    lengths, spans, position = [], [], 0
    for token in target[:-1]:
        if token > TOP - 1000:
            lengths.append(0)
        else:
            lengths[-1] += 1
    remaining = iter(lengths)
    for token in inputs[:-1]:
        if token > TOP - 1000:
            length = next(remaining)
            spans.append((position, position + length))
            position += length
        else:
            position += 1
    return spans


def slow_counts(length: int, density: float, span: float) -> tuple[int, int]:
    num_noise = min(max(round(length * density), 1), length - 1)
    num_spans = max(round(num_noise / span), 1)
    return num_noise, min(num_spans, num_noise, length - num_noise)  # no span and no gap is empty


def slow_lengths(num_tokens: int, density: float, span: float) -> tuple[int, int, bool]:
    """Of inputs, of targets, and whether spans are as many as the tokens between them."""
    num_noise, num_spans = slow_counts(num_tokens, density, span)
    num_plain = num_tokens - num_noise
    return num_plain + num_spans + 1, num_noise + num_spans + 1, num_spans == num_plain


# --------------------------------------------------------------------------------------------------------- lengths


def test_lengths_of_the_paper():
    """The figures that T5's own code gives for its pre-training."""
    assert t5.compute_input_and_target_lengths(512, 0.15, 3.0) == (568, 114)


@pytest.mark.parametrize(("length", "density", "span"), SETTINGS)
def test_lengths(length, density, span):
    """Inputs are as long as asked for, of as many tokens as fit; or one shorter where so much is left out that every
    token that stays is followed by a span, which makes the length of inputs odd."""
    num_tokens, targets = t5.compute_input_and_target_lengths(length, density, span)
    inputs, expected_targets, odd = slow_lengths(num_tokens, density, span)
    assert targets == expected_targets
    assert inputs == length or (odd and inputs == length - 1)
    assert slow_lengths(num_tokens + 1, density, span)[0] > length
    collator = make_collator(length, density, span)
    assert (collator.max_length, collator.targets_length) == (num_tokens, targets)


@pytest.mark.parametrize("length", [3, 4, 5])
@pytest.mark.parametrize("density", [0.001, 0.15, 0.5, 0.999])
@pytest.mark.parametrize("span", [1.0, 1.3, 3.0, 1e9])
def test_shortest_lengths(length, density, span):
    test_lengths(length, density, span)
    num_tokens, _ = t5.compute_input_and_target_lengths(length, density, span)
    num_noise, num_spans = slow_counts(num_tokens, density, span)
    assert num_tokens > num_noise >= num_spans >= 1


# ------------------------------------------------------------------------------------------------------ corruption


@pytest.mark.parametrize(("length", "density", "span"), SETTINGS)
def test_corruption_is_that_of_the_paper(length, density, span):
    collator = make_collator(length, density, span)
    rows = make_rows(24, collator.max_length)
    num_noise, num_spans = slow_counts(collator.max_length, density, span)
    batch = collate(collator, rows, generator(1))
    inputs_length = slow_lengths(collator.max_length, density, span)[0]  # see test_lengths
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (24, inputs_length)
    assert (
        batch["labels"].shape == batch["decoder_input_ids"].shape == (24, num_noise + num_spans + 1)
    )
    assert batch["attention_mask"].all()
    for tokens, inputs, target, shown in zip(
        rows.tolist(), batch["input_ids"].tolist(), batch["labels"].tolist(), batch["decoder_input_ids"].tolist(),
        strict=True,
    ):  # fmt: skip
        spans = spans_of(inputs, target)
        assert corrupt(tokens, spans) == (
            inputs,
            target,
        )  # with it, that the two interleave to the original
        assert len(spans) == num_spans
        assert sum(end - start for start, end in spans) == num_noise
        assert all(start < end for start, end in spans)
        ends = [0, *(end for _, end in spans)]
        assert all(
            start > end for (start, _), end in zip(spans, ends, strict=False)
        )  # text is before each span
        assert ends[-1] == len(tokens)  # parts alternate, text first: the last one is a span
        assert [token for token in target if token > TOP - 1000] == list(
            range(TOP, TOP - num_spans, -1)
        )
        assert shown == [START, *target[:-1]]


def compositions(total: int, parts: int) -> list[tuple[int, ...]]:
    """All ways to write `total` as a sum of `parts` positive numbers, in their order."""
    if parts == 1:
        return [(total,)]
    return [
        (n, *rest)
        for n in range(1, total - parts + 2)
        for rest in compositions(total - n, parts - 1)
    ]


@pytest.mark.parametrize(
    ("total", "parts"), [(2, 1), (2, 2), (6, 2), (7, 3), (9, 4), (6, 6), (8, 7), (10, 5)]
)
def test_segmentations_are_uniform(total, parts):
    draws = (
        generator(total * parts).bit_generator.random_raw(40_000 * (total - 1)).reshape(40_000, -1)
    )
    lengths = t5.random_lengths(draws, parts)
    every = {composition: i for i, composition in enumerate(compositions(total, parts))}
    assert len(every) == math.comb(total - 1, parts - 1)
    counts = np.bincount([every[tuple(row)] for row in lengths.tolist()], minlength=len(every))
    if len(every) > 1:
        assert_uniform(counts)


def test_corruptions_are_uniform():
    """All pairs of segmentations: of the tokens that stay and of those left out, independently of each other."""
    collator = make_collator(length=9, density=0.4, span=2.0)
    num_noise, num_spans = slow_counts(collator.max_length, 0.4, 2.0)
    assert num_spans > 1
    rows = np.tile(np.arange(LOWEST, LOWEST + collator.max_length, dtype=np.int32), (60_000, 1))
    batch = collate(collator, rows, generator(3))
    pairs = list(
        itertools.product(
            compositions(collator.max_length - num_noise, num_spans),
            compositions(num_noise, num_spans),
        )
    )
    every = {}
    for plain, noise in pairs:
        ends = np.cumsum([n for pair in zip(plain, noise, strict=True) for n in pair]).tolist()
        every[tuple(zip(ends[0::2], ends[1::2], strict=True))] = len(every)
    found, times = np.unique(
        np.concatenate([batch["input_ids"], batch["labels"]], axis=1), axis=0, return_counts=True
    )
    counts = np.zeros(len(every), np.int64)
    for row, count in zip(found.tolist(), times, strict=True):
        counts[every[tuple(spans_of(row[:9], row[9:]))]] = count
    assert counts.sum() == 60_000
    assert_uniform(counts)


def test_equal_draws_are_told_apart():
    """Counts are fixed whatever the draws, or shapes would not be."""
    for value in (0, 2**64 - 1):
        lengths = t5.random_lengths(np.full((3, 9), value, np.uint64), 4)
        assert (lengths >= 1).all()
        assert (lengths.sum(axis=1) == 10).all()


def test_corruption_is_a_function_of_the_generator():
    collator = make_collator()
    rows = make_rows(16, collator.max_length)
    first, second, other = (collate(collator, rows, generator(seed)) for seed in (3, 3, 4))
    assert all((first[name] == second[name]).all() for name in first)
    assert (first["labels"] != other["labels"]).any(axis=1).all()
    assert len(np.unique(first["input_ids"] > TOP - 1000, axis=0)) == 16


def test_corruption_does_not_depend_on_the_layout():
    """Row r starts at draw r * max_length: hosts corrupt their rows alone."""
    collator = make_collator(length=96)
    rows = make_rows(48, collator.max_length)
    whole = collate(collator, rows, generator(6))
    for start in range(0, 48, 16):
        part = collate(
            collator, rows[start : start + 16], generator(6, start * collator.max_length)
        )
        assert all((part[name] == whole[name][start : start + 16]).all() for name in whole)


# ------------------------------------------------------------------------------------------------------- sentinels


def test_sentinels_are_those_of_the_tokenizer():
    class Ascending(Tokenizer):
        def get_vocab(self):
            return {f"<extra_id_{i}>": 32000 + i for i in range(100)}

    rows = make_rows(4, 568)
    for tokenizer, ids in (
        (Tokenizer(100), range(TOP, TOP - 28, -1)),
        (Tokenizer(100, mark="▁"), range(TOP, TOP - 28, -1)),  # as mT5's
        (
            Ascending(),
            range(32000, 32028),
        ),  # as a tokenizer.json without sentinels gets them on loading
    ):
        batch = collate(t5.FlaxDataCollatorForT5MLM(tokenizer, 512), rows, generator())
        for name in ("input_ids", "labels"):
            assert all(
                [token for token in row if token >= 32000] == list(ids)
                for row in batch[name].tolist()
            )


@pytest.mark.parametrize(("count", "length"), [(0, 512), (27, 512), (100, 4096)])
def test_too_few_sentinels(count, length):
    with pytest.raises(t5.InputError, match=rf"as T5: it has {count} sentinels.*--max_seq_length"):
        t5.FlaxDataCollatorForT5MLM(Tokenizer(count), length)


def test_no_eos():
    tokenizer = Tokenizer()
    tokenizer.eos_token_id = None
    with pytest.raises(t5.InputError, match="eos"):
        t5.FlaxDataCollatorForT5MLM(tokenizer, 512)


# ------------------------------------------------------------------------------------------------------ the models

VOCAB = 101
TINY = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
FAMILIES = {
    "t5": TINY,
    "t5, version 1.1": {**TINY, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": TINY,
    "longt5, local": {**TINY, "encoder_attention_type": "local", "local_radius": 4},
    "longt5, transient-global": {
        **TINY, "encoder_attention_type": "transient-global", "local_radius": 4, "global_block_size": 4,
    },
}  # fmt: skip


def make_model(family: str):
    """A tiny model, and parameters that all matter."""
    t5.mend_clip()
    config = CONFIG_MAPPING[family.partition(",")[0]](vocab_size=VOCAB, **FAMILIES[family])
    model = FlaxAutoModelForSeq2SeqLM.from_config(config, _do_init=False)
    rng = np.random.default_rng(0)
    shapes = flatten_dict(model.params_shape_tree)
    flat = {
        path: (x.ndim == 1) + 0.2 * rng.standard_normal(x.shape, np.float32)
        for path, x in shapes.items()
    }
    return config, model, unflatten_dict({path: x.astype(np.float32) for path, x in flat.items()})


def model_batch():
    rng = np.random.default_rng(1)
    batch = {
        name: rng.integers(2, VOCAB, (3, n), np.int32)
        for name, n in (("input_ids", 24), ("labels", 9))
    }
    batch["decoder_input_ids"] = np.insert(batch["labels"][:, :-1], 0, 0, axis=1)
    batch["attention_mask"] = np.ones_like(batch["input_ids"])
    batch["labels"][0, :5] = 0  # token 0 is a token
    batch["labels"][2] = -100  # as of a row that fills up a batch
    return jax.tree.map(jnp.asarray, batch)


@pytest.mark.parametrize(
    ("tied", "said"),
    [
        (True, {}),
        (True, {"transformers_version": "5.1.0"}),
        (True, {"scale_decoder_outputs": True, "transformers_version": "5.1.0"}),
        (False, {"scale_decoder_outputs": False, "transformers_version": "5.1.0"}),
        (True, {"model_type": "mt5"}),
        (True, {"model_type": "mt5", "transformers_version": "4.57.6"}),
        (False, {"model_type": "mt5", "transformers_version": "5.1.0"}),
    ],
)
def test_a_configuration_of_transformers_5(tmp_path, tied, said):
    """It says of version 1.1 and mT5 that the embeddings are tied, and elsewhere that they are not."""
    from training_scripts import NUM_SENTINELS, word_tokenizer

    word_tokenizer(tmp_path, sentinels=NUM_SENTINELS)
    settings = {
        "model_type": "t5",
        "tie_word_embeddings": True,
        "vocab_size": VOCAB,
        "pad_token_id": 1,
        **TINY,
        **said,
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    flags = [
        f"--config_name={tmp_path}",
        f"--tokenizer_name={tmp_path}",
        "--output_dir=none",
        "--train_file=none",
    ]
    config, *_ = t5.load_config_and_tokenizer(t5.parse_args(flags))
    assert config.tie_word_embeddings is tied


def test_every_family_is_tested():
    assert {family.partition(",")[0] for family in FAMILIES} == set(t5.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_the_mean_over_the_targets(family):
    """In float64, one label after the other."""
    _, model, params = make_model(family)
    batch = model_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}
    key = jax.random.key(0, impl="rbg")  # dropout is zero: the key is used and changes nothing

    @jax.jit
    def all_of_them(params):
        grads, _ = jax.grad(t5.loss_sums, has_aux=True)(params, batch, model, key)
        return model(**inputs, params=params).logits, t5.loss_sums(params, batch, model), grads

    logits, (loss, sums), grads = all_of_them(params)
    logits = np.asarray(logits, np.float64)
    expected, right = 0.0, 0
    for row in range(2):
        for position, label in enumerate(np.asarray(batch["labels"])[row]):
            expected += np.log(np.exp(logits[row, position]).sum()) - logits[row, position, label]
            right += logits[row, position].argmax() == label
    assert loss == sums["loss"] == pytest.approx(expected, rel=1e-5)
    assert (sums["predicted"], sums["accuracy"]) == (18, right)
    assert all(np.isfinite(x).all() and np.any(x) for x in jax.tree.leaves(grads))


def test_logits_are_never_whole():
    """In the compiled gradients nothing has a value for each token and each id, neither logits nor one-hot labels."""
    _, model, params = make_model("t5")
    batch = model_batch()
    key = jax.random.key(0, impl=t5.DROPOUT_PRNG)
    step = jax.jit(jax.grad(lambda params: t5.loss_sums(params, batch, model, dropout_rng=key)[0]))
    shapes = set(re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", step.lower(params).compile().as_text()))
    sizes = {
        math.prod(map(int, shape.split(","))) for shape in shapes if str(VOCAB) in shape.split(",")
    }
    tokens = batch["labels"].size
    piece = math.ceil(tokens / t5.PIECES)
    assert piece * VOCAB in sizes
    assert not sizes & {count * VOCAB for count in range(tokens - tokens % piece, tokens + piece)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_softmax_and_loss_are_float32_in_every_dtype(dtype):
    """From the hidden states that the model gives in half precision, against float64: that would be off by more."""
    _, model, params = make_model("t5")
    model = type(model)(model.config, dtype=dtype, _do_init=False)
    batch = model_batch()
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    states = (
        model(**inputs, params=params, output_hidden_states=True)
        .decoder_hidden_states[-1]
        .astype(dtype)
    )
    kernel = params["shared"]["embedding"].T * model.config.d_model**-0.5
    exact = np.asarray(states, np.float64) @ np.asarray(kernel.astype(dtype), np.float64)
    labels = np.asarray(batch["labels"])
    losses = (
        np.log(np.exp(exact).sum(-1))
        - np.take_along_axis(exact, np.maximum(labels, 0)[..., None], -1)[..., 0]
    )
    loss, sums = t5.loss_sums(params, batch, model)
    assert all(value.dtype == jnp.float32 for value in (loss, *sums.values()))
    assert loss == pytest.approx(losses[labels != -100].sum(), rel=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_clip_is_mended(family):
    """Relative positions are put in buckets as the T5 code of PyTorch has it, in whose words this is written."""
    _, model, _ = make_model(family)
    module = sys.modules[
        type(model).__mro__[1].__module__ if family == "mt5" else type(model).__module__
    ]
    attention = next(value for name, value in vars(module).items() if name.endswith("T5Attention"))

    def bucket(distance: int, bidirectional: bool, buckets: int = 32, furthest: int = 128) -> int:
        offset = 0
        if bidirectional:
            buckets //= 2
            offset, distance = (buckets if distance > 0 else 0), abs(distance)
        else:
            distance = -min(distance, 0)
        exact = buckets // 2
        if distance < exact:
            return offset + distance
        large = exact + math.log(distance / exact) / math.log(furthest / exact) * (buckets - exact)
        return offset + min(int(large + 1e-9), buckets - 1)

    distances = np.array(
        [x for x in range(-300, 301) if abs(x) not in (16, 32, 64, 128)]
    )  # float32 may round there
    for both in (True, False):
        found = attention._relative_position_bucket(jnp.asarray(distances), bidirectional=both)
        assert found.tolist() == [bucket(x, both) for x in distances.tolist()]


# ----------------------------------------------------------------------------------------------- the silent clamp


def write_start(directory: Path, corpus: Path, **config):
    """The documented recipe: tokenizer.json of 300 pieces, and a config whose vocabulary are those."""
    from t5_tokenizer_model import SentencePieceUnigramTokenizer

    tokenizer = SentencePieceUnigramTokenizer()
    tokenizer.train([str(corpus / "validation.txt")], vocab_size=300, show_progress=False)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {**TINY, "vocab_size": tokenizer.get_vocab_size(), **config}
    CONFIG_MAPPING["t5"](**config).save_pretrained(directory)


def flags(start: Path, corpus: Path, output_dir: Path, *more: str) -> list[str]:
    files = [
        f"--train_file={corpus / 'validation.txt'}",
        f"--tokenizer_name={start}",
        f"--output_dir={output_dir}",
    ]
    return [
        "run_t5_mlm_flax.py",
        *files,
        "--max_seq_length=64",
        "--per_device_train_batch_size=2",
        *more,
    ]


def test_the_documented_recipe_learns_its_sentinels(tmp_path, corpus, run_script):
    """Ids beyond the table would be clamped to its last row without a word: sentinels would be that piece, and every
    one of them the same. Here each has a row, and training moves it."""
    write_start(tmp_path, corpus)
    argv = flags(
        tmp_path,
        corpus,
        tmp_path / "out",
        f"--config_name={tmp_path}",
        "--do_train",
        "--max_steps=3",
    )
    run = run_script([*argv, "--learning_rate=0.01"], env={"XLA_FLAGS": None})
    assert run.returncode == 0, run.stderr
    (warning,) = [line for line in run.stderr.splitlines() if "WARNING" in line]
    assert {"400", "300"} <= set(re.findall(r"\d+", warning))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 400
    t5.mend_clip()
    args = t5.parse_args(argv[1:])
    config, tokenizer, _ = t5.load_config_and_tokenizer(args)
    before = np.asarray(t5.load_model(args, config)[1]["shared"]["embedding"])
    after = load_file(tmp_path / "out" / "model.safetensors")["shared.weight"]
    assert after.shape == before.shape == (400, 32)
    assert len(np.unique(after[300:], axis=0)) == 100
    collator = t5.FlaxDataCollatorForT5MLM(tokenizer, 64)
    assert collator.sentinels.min() >= 300
    moved = np.abs(after - before).max(axis=1)
    used = collator.sentinels
    # The softmax moves each row a little; those of sentinels in the inputs and targets as the most frequent pieces.
    assert moved[used].min() > 0.5 * moved.max()


def test_a_pretrained_model_keeps_its_table(tmp_path, corpus, run_script):
    write_start(tmp_path, corpus)
    _, model, params = make_model("t5")
    model.save_pretrained(tmp_path / "pretrained", params=params)
    argv = flags(
        tmp_path, corpus, tmp_path / "out", f"--model_name_or_path={tmp_path / 'pretrained'}"
    )
    run = run_script(argv, env={"XLA_FLAGS": None})
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("run_t5_mlm_flax.py: error: ")
    assert {"400", str(VOCAB)} <= set(re.findall(r"\d+", run.stderr))
    assert not (tmp_path / "out").exists()
