"""The objective of run_t5_mlm_flax.py against a slow reference from section 3.3.4 of the T5 paper.

Statistics have to be within 5 standard deviations, as in test_mlm_objective.py.
"""

import itertools
import json
import math
import re
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distributions import assert_uniform
from families import SPAN_MASKED, T5
from flax.traverse_util import flatten_dict, unflatten_dict
from gradients import check_recomputed_gradients
from safetensors.numpy import load_file
from training_scripts import full_but
from transformers import CONFIG_MAPPING, FlaxAutoModelForSeq2SeqLM, T5Config

import run_t5_mlm_flax as t5

EOS = 1
START = 0
# Ordinary tokens have ids from LOWEST to TOP - 1001, sentinels from TOP down.
LOWEST = 10
TOP = 32099
LENGTHS = (8, 33, 128, 512)
DENSITIES = (0.05, 0.15, 0.5, 0.9)
SPANS = (1.0, 2.5, 3.0, 10.0)
SETTINGS = list(itertools.product(LENGTHS, DENSITIES, SPANS))


class Tokenizer:
    """The part of T5's tokenizer that the collator uses."""

    eos_token_id = EOS
    name_or_path = "as T5"

    def __init__(self, count: int = 600, mark: str = ""):
        self.vocabulary = {f"{mark}<extra_id_{i}>": TOP - i for i in range(count)}
        self.vocabulary |= {"▁the": 10, "<extra_id": 11}

    def get_vocab(self):
        return self.vocabulary


def make_collator(length=512, density=0.15, span=3.0):
    return t5.FlaxDataCollatorForT5MLM(Tokenizer(), length, density, span, START)


def make_rows(rows: int, length: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(LOWEST, TOP - 1000, (rows, length), dtype=np.int32)


def is_sentinel(token):
    return token > TOP - 1000


def collate(collator, rows, seed: int = 0, first_number: int = 0):
    """Corrupt `rows`, sequences that are numbered from `first_number`.

    Check that they stay as they are, and the names and types of the batch.
    """
    original = rows.copy()
    numbers = range(first_number, first_number + len(rows))
    batch = collator({"input_ids": rows}, t5.sequence_generators((seed,), numbers))
    assert (rows == original).all()
    assert set(batch) == {"input_ids", "attention_mask", "labels", "decoder_input_ids"}
    assert all(array.dtype == np.int32 for array in batch.values())
    return batch


# ----------------------------------------------------------------------------------- slow reference


def corrupt(tokens: list[int], left_out: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Figure 2 of the paper: each span (start, end) is replaced by a sentinel of its own.

    The target has the sentinels, each followed by the tokens of its span.
    """
    inputs = []
    target = []
    position = 0
    for number, (start, end) in enumerate(left_out):
        sentinel = TOP - number
        inputs += [*tokens[position:start], sentinel]
        target += [sentinel, *tokens[start:end]]
        position = end
    return [*inputs, *tokens[position:], EOS], [*target, EOS]


def spans_of(inputs: list[int], target: list[int]) -> list[tuple[int, int]]:
    """The (start, end) of each span in the original text. Only these are random."""
    lengths = []
    for token in target[:-1]:
        if is_sentinel(token):
            lengths.append(0)
        else:
            lengths[-1] += 1
    spans = []
    position = 0
    remaining = iter(lengths)
    for token in inputs[:-1]:
        if is_sentinel(token):
            length = next(remaining)
            spans.append((position, position + length))
            position += length
        else:
            position += 1
    return spans


def slow_counts(length: int, density: float, span: float) -> tuple[int, int]:
    num_noise = min(max(round(length * density), 1), length - 1)
    num_spans = max(round(num_noise / span), 1)
    # No span and no gap is empty.
    return num_noise, min(num_spans, num_noise, length - num_noise)


def slow_lengths(num_tokens: int, density: float, span: float) -> tuple[int, int, bool]:
    """The lengths of inputs and targets, and whether each token that stays precedes a span."""
    num_noise, num_spans = slow_counts(num_tokens, density, span)
    num_plain = num_tokens - num_noise
    return num_plain + num_spans + 1, num_noise + num_spans + 1, num_spans == num_plain


# ------------------------------------------------------------------------------------------ lengths


def test_lengths_of_the_paper():
    """The lengths that T5's own code computes for its pre-training."""
    assert t5.compute_input_and_target_lengths(512, 0.15, 3.0) == (568, 114)


@pytest.mark.parametrize(("length", "density", "span"), SETTINGS)
def test_lengths(length, density, span):
    """Inputs have the length asked for, and are made of as many tokens as fit.

    They are one shorter where so much is left out that each token that stays is followed by a
    span. The length of inputs is odd then.
    """
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


# --------------------------------------------------------------------------------------- corruption


@pytest.mark.parametrize(("length", "density", "span"), SETTINGS)
def test_corruption_is_that_of_the_paper(length, density, span):
    collator = make_collator(length, density, span)
    rows = make_rows(24, collator.max_length)
    num_noise, num_spans = slow_counts(collator.max_length, density, span)
    batch = collate(collator, rows, seed=1)
    # See test_lengths.
    inputs_length = slow_lengths(collator.max_length, density, span)[0]
    targets_length = num_noise + num_spans + 1
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (24, inputs_length)
    assert batch["labels"].shape == batch["decoder_input_ids"].shape == (24, targets_length)
    assert batch["attention_mask"].all()
    for row, tokens in enumerate(rows.tolist()):
        inputs = batch["input_ids"][row].tolist()
        target = batch["labels"][row].tolist()
        spans = spans_of(inputs, target)
        # This also shows that inputs and target together are the original.
        assert corrupt(tokens, spans) == (inputs, target)
        check_spans(spans, len(tokens), num_noise, num_spans)
        sentinels = [token for token in target if is_sentinel(token)]
        assert sentinels == list(range(TOP, TOP - num_spans, -1))
        assert batch["decoder_input_ids"][row].tolist() == [START, *target[:-1]]


def check_spans(spans, length: int, num_noise: int, num_spans: int):
    """Check the spans' number and sizes. Text and spans alternate, and text comes first."""
    assert len(spans) == num_spans
    assert sum(end - start for start, end in spans) == num_noise
    end_before = 0
    for start, end in spans:
        assert end_before < start < end
        end_before = end
    assert end_before == length


def compositions(total: int, parts: int) -> list[tuple[int, ...]]:
    """All ways to write `total` as a sum of `parts` positive numbers, in their order."""
    if parts == 1:
        return [(total,)]
    found = []
    for first in range(1, total - parts + 2):
        found += [(first, *rest) for rest in compositions(total - first, parts - 1)]
    return found


@pytest.mark.parametrize(
    ("total", "parts"), [(2, 1), (2, 2), (6, 2), (7, 3), (9, 4), (6, 6), (8, 7), (10, 5)]
)
def test_segmentations_are_uniform(total, parts):
    num_rows = 40_000
    rng = np.random.default_rng(total * parts)
    lengths = [t5.random_segmentation(total, parts, rng).tolist() for _ in range(num_rows)]
    numbers = {composition: i for i, composition in enumerate(compositions(total, parts))}
    assert len(numbers) == math.comb(total - 1, parts - 1)
    found = [numbers[tuple(row)] for row in lengths]
    counts = np.bincount(found, minlength=len(numbers))
    if len(numbers) > 1:
        assert_uniform(counts)


def test_corruptions_are_uniform():
    """All pairs of segmentations are equally likely.

    The tokens that stay are segmented independently of those that are left out.
    """
    collator = make_collator(length=9, density=0.4, span=2.0)
    num_noise, num_spans = slow_counts(collator.max_length, 0.4, 2.0)
    assert num_spans > 1
    num_rows = 60_000
    row = np.arange(LOWEST, LOWEST + collator.max_length, dtype=np.int32)
    batch = collate(collator, np.tile(row, (num_rows, 1)), seed=3)

    # The spans (start, end) of each pair of segmentations.
    numbers = {}
    for plain in compositions(collator.max_length - num_noise, num_spans):
        for noise in compositions(num_noise, num_spans):
            lengths = [length for pair in zip(plain, noise, strict=True) for length in pair]
            ends = np.cumsum(lengths).tolist()
            numbers[tuple(zip(ends[0::2], ends[1::2], strict=True))] = len(numbers)

    outputs = np.concatenate([batch["input_ids"], batch["labels"]], axis=1)
    found, times = np.unique(outputs, axis=0, return_counts=True)
    counts = np.zeros(len(numbers), np.int64)
    for output, count in zip(found.tolist(), times, strict=True):
        spans = spans_of(output[:9], output[9:])
        counts[numbers[tuple(spans)]] = count
    assert counts.sum() == num_rows
    assert_uniform(counts)


def test_corruption_is_a_function_of_the_seed():
    collator = make_collator()
    rows = make_rows(16, collator.max_length)
    first = collate(collator, rows, seed=3)
    second = collate(collator, rows, seed=3)
    other = collate(collator, rows, seed=4)
    assert all((first[name] == second[name]).all() for name in first)
    assert (first["labels"] != other["labels"]).any(axis=1).all()
    # No two rows have their spans at the same places.
    assert len(np.unique(is_sentinel(first["input_ids"]), axis=0)) == 16


def test_corruption_does_not_depend_on_the_layout():
    """Each host corrupts its own rows alone."""
    collator = make_collator(length=96)
    rows = make_rows(48, collator.max_length)
    whole = collate(collator, rows, seed=6)
    for start in range(0, 48, 16):
        part = collate(collator, rows[start : start + 16], 6, start)
        for name, array in whole.items():
            assert (part[name] == array[start : start + 16]).all()


# ---------------------------------------------------------------------------------------- sentinels


class AscendingTokenizer(Tokenizer):
    """A tokenizer.json without sentinels gets them in this order when it is loaded."""

    def get_vocab(self):
        return {f"<extra_id_{i}>": 32000 + i for i in range(100)}


@pytest.mark.parametrize(
    ("tokenizer", "ids"),
    [
        (Tokenizer(100), range(TOP, TOP - 28, -1)),
        (Tokenizer(100, mark="▁"), range(TOP, TOP - 28, -1)),
        (AscendingTokenizer(), range(32000, 32028)),
    ],
    ids=["t5", "mt5", "ascending"],
)
def test_sentinels_are_those_of_the_tokenizer(tokenizer, ids):
    batch = collate(t5.FlaxDataCollatorForT5MLM(tokenizer, 512), make_rows(4, 568))
    for name in ("input_ids", "labels"):
        for row in batch[name].tolist():
            assert [token for token in row if token >= 32000] == list(ids)


@pytest.mark.parametrize(("count", "length"), [(0, 512), (27, 512), (100, 4096)])
def test_too_few_sentinels_are_refused(count, length):
    with pytest.raises(t5.InputError, match=rf"as T5: it has {count} sentinels.*--max_seq_length"):
        t5.FlaxDataCollatorForT5MLM(Tokenizer(count), length)


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = Tokenizer()
    tokenizer.eos_token_id = None
    with pytest.raises(t5.InputError, match="eos"):
        t5.FlaxDataCollatorForT5MLM(tokenizer, 512)


# --------------------------------------------------------------------------------------- the models

VOCAB = 101


def make_model(family: str, **settings):
    """A tiny model, and parameters that all have an effect."""
    t5.restore_clip_argument()
    config = CONFIG_MAPPING[family.partition(",")[0]](
        vocab_size=VOCAB, **SPAN_MASKED[family] | settings
    )
    model = FlaxAutoModelForSeq2SeqLM.from_config(config, _do_init=False)
    rng = np.random.default_rng(0)
    params = {}
    for path, x in flatten_dict(model.params_shape_tree).items():
        is_scale = x.ndim == 1
        value = is_scale + 0.2 * rng.standard_normal(x.shape, np.float32)
        params[path] = value.astype(np.float32)
    return config, model, unflatten_dict(params)


def model_batch():
    rng = np.random.default_rng(1)
    input_ids = rng.integers(2, VOCAB, (3, 24), np.int32)
    labels = rng.integers(2, VOCAB, (3, 9), np.int32)
    decoder_input_ids = np.insert(labels[:, :-1], 0, 0, axis=1)
    # Token 0 counts like any other token.
    labels[0, :5] = 0
    # A row that fills up a batch has no labels.
    labels[2] = -100
    batch = {
        "input_ids": input_ids,
        "attention_mask": np.ones_like(input_ids),
        "decoder_input_ids": decoder_input_ids,
        "labels": labels,
    }
    return jax.tree.map(jnp.asarray, batch)


def model_inputs(batch):
    return {name: x for name, x in batch.items() if name != "labels"}


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
    """Configs of Transformers 5 say that embeddings are tied, also where the model's are not.

    Version 1.1 of T5, which sets `scale_decoder_outputs` to false, and mT5 have untied embeddings.
    """
    from training_scripts import NUM_SENTINELS, word_tokenizer

    word_tokenizer(tmp_path, sentinels=NUM_SENTINELS)
    settings = {
        "model_type": "t5",
        "tie_word_embeddings": True,
        "vocab_size": VOCAB,
        "pad_token_id": 1,
        **T5,
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
    assert {family.partition(",")[0] for family in SPAN_MASKED} == set(t5.FAMILIES)


@pytest.mark.parametrize("family", full_but(SPAN_MASKED, "t5", "t5, version 1.1"))
def test_loss_is_the_mean_over_the_targets(family):
    """Compare with float64, one label at a time."""
    _, model, params = make_model(family)
    batch = model_batch()
    # Dropout is zero, so the key is used and changes nothing.
    key = jax.random.key(0, impl="rbg")

    @jax.jit
    def logits_loss_and_gradients(params):
        logits = model(**model_inputs(batch), params=params).logits
        grads, _ = jax.grad(t5.loss_sums, has_aux=True)(params, batch, model, key)
        return logits, t5.loss_sums(params, batch, model), grads

    logits, (loss, sums), grads = logits_loss_and_gradients(params)
    logits = np.asarray(logits, np.float64)
    labels = np.asarray(batch["labels"])
    expected = 0.0
    num_right = 0
    for row in range(2):
        for position, label in enumerate(labels[row]):
            scores = logits[row, position]
            expected += np.log(np.exp(scores).sum()) - scores[label]
            num_right += scores.argmax() == label
    assert loss == sums["loss"] == pytest.approx(expected, rel=1e-5)
    assert (sums["predicted"], sums["accuracy"]) == (18, num_right)
    assert all(np.isfinite(x).all() and np.any(x) for x in jax.tree.leaves(grads))


@pytest.mark.parametrize("part", full_but(["layers", "attention"], "attention"))
@pytest.mark.parametrize("family", full_but(SPAN_MASKED, "t5"))
def test_gradient_checkpointing_changes_no_gradient(family, part):
    _, model, params = make_model(family, dropout_rate=0.1)
    batch = model_batch()
    recomputing = t5.recompute(t5.loss_sums, part)
    check_recomputed_gradients(
        lambda params, key: t5.loss_sums(params, batch, model, key)[0],
        lambda params, key: recomputing(params, batch, model, key)[0],
        params,
        rtol=1e-4,
    )


@pytest.mark.parametrize(("length", "is_recomputed"), [(462, False), (512, True)])
def test_the_length_of_inputs_decides_what_is_recomputed(length, is_recomputed):
    """A text of 512 tokens becomes an input of 462."""
    collator = make_collator(length)
    assert collator.max_length >= 512
    loss_fn = t5.make_loss_fn(Namespace(gradient_checkpointing="auto"), None, collator)
    assert (not isinstance(loss_fn, partial)) is is_recomputed


def test_a_new_model_begins_with_the_loss_of_a_guess():
    """With Transformers' initial head of T5 1.1 and mT5, the loss would be about 40."""
    config = T5Config(
        vocab_size=VOCAB,
        d_model=100,
        d_kv=50,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    args = Namespace(dtype="float32", model_name_or_path=None, seed=0)
    model, params = t5.load_model(args, config)
    _, sums = t5.loss_sums(params, model_batch(), model)
    loss = float(sums["loss"] / sums["predicted"])
    assert abs(loss - math.log(VOCAB)) < 1.5
    params["lm_head"]["kernel"] = params["lm_head"]["kernel"] * config.d_model**0.5
    _, sums = t5.loss_sums(params, model_batch(), model)
    assert float(sums["loss"] / sums["predicted"]) > 20


def test_logits_are_never_whole():
    """No array of the compiled gradients has a value for each token and each id.

    Such an array would be the logits or one-hot labels.
    """
    _, model, params = make_model("t5")
    batch = model_batch()
    key = jax.random.key(0, impl=t5.dropout_prng())

    def loss(params):
        return t5.loss_sums(params, batch, model, dropout_rng=key)[0]

    program = jax.jit(jax.grad(loss)).lower(params).compile().as_text()
    sizes = set()
    for shape in re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", program):
        axes = [int(axis) for axis in shape.split(",")]
        if VOCAB in axes:
            sizes.add(math.prod(axes))
    num_tokens = batch["labels"].size
    chunk = math.ceil(num_tokens / t5.CHUNKS)
    assert chunk * VOCAB in sizes
    # The number of tokens may be padded to a multiple of the chunk.
    num_tokens_or_more = range(num_tokens - num_tokens % chunk, num_tokens + chunk)
    assert not sizes & {count * VOCAB for count in num_tokens_or_more}


@pytest.mark.parametrize("dtype", full_but([jnp.bfloat16, jnp.float16], jnp.bfloat16))
def test_softmax_and_loss_are_float32_in_every_dtype(dtype):
    """Compare with float64, from the half-precision hidden states that the model returns.

    A loss in half precision would be off by more.
    """
    _, model, params = make_model("t5")
    model = type(model)(model.config, dtype=dtype, _do_init=False)
    batch = model_batch()
    outputs = model(**model_inputs(batch), params=params, output_hidden_states=True)
    states = outputs.decoder_hidden_states[-1].astype(dtype)
    kernel = params["shared"]["embedding"].T * model.config.d_model**-0.5
    logits = np.asarray(states, np.float64) @ np.asarray(kernel.astype(dtype), np.float64)
    labels = np.asarray(batch["labels"])
    picked = np.take_along_axis(logits, np.maximum(labels, 0)[..., None], -1)[..., 0]
    losses = np.log(np.exp(logits).sum(-1)) - picked
    loss, sums = t5.loss_sums(params, batch, model)
    assert all(value.dtype == jnp.float32 for value in (loss, *sums.values()))
    assert loss == pytest.approx(losses[labels != -100].sum(), rel=2e-6)


def slow_bucket(distance: int, bidirectional: bool, buckets: int = 32, furthest: int = 128) -> int:
    """The bucket of a relative position, in the steps of the PyTorch code of T5."""
    offset = 0
    if bidirectional:
        buckets //= 2
        offset = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = -min(distance, 0)
    exact = buckets // 2
    if distance < exact:
        return offset + distance
    large = exact + math.log(distance / exact) / math.log(furthest / exact) * (buckets - exact)
    return offset + min(int(large + 1e-9), buckets - 1)


@pytest.mark.parametrize("family", SPAN_MASKED)
def test_clip_is_mended(family):
    """Flax puts relative positions into the same buckets as PyTorch."""
    _, model, _ = make_model(family)
    # The classes of mT5 are derived from those of T5.
    model_class = type(model).__mro__[1] if family == "mt5" else type(model)
    module = sys.modules[model_class.__module__]
    attention = next(value for name, value in vars(module).items() if name.endswith("T5Attention"))
    # At these powers of two float32 may round to another bucket.
    rounded = (16, 32, 64, 128)
    distances = [x for x in range(-300, 301) if abs(x) not in rounded]
    for bidirectional in (True, False):
        found = attention._relative_position_bucket(
            jnp.asarray(np.array(distances)), bidirectional=bidirectional
        )
        assert found.tolist() == [slow_bucket(x, bidirectional) for x in distances]


# --------------------------------------------------------------------------------- the silent clamp


def write_start(directory: Path, corpus: Path, **config):
    """Write what the documented recipe does: a tokenizer.json of 300 pieces, and a config for them.

    The config's vocabulary size does not include the sentinels.
    """
    from t5_tokenizer_model import SentencePieceUnigramTokenizer

    tokenizer = SentencePieceUnigramTokenizer()
    tokenizer.train([str(corpus / "validation.txt")], vocab_size=300, show_progress=False)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {**T5, "vocab_size": tokenizer.get_vocab_size(), **config}
    CONFIG_MAPPING["t5"](**config).save_pretrained(directory)


def flags(start: Path, corpus: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        "run_t5_mlm_flax.py",
        f"--train_file={corpus / 'validation.txt'}",
        f"--tokenizer_name={start}",
        f"--output_dir={output_dir}",
        "--max_seq_length=64",
        "--per_device_train_batch_size=2",
        *more,
    ]


def test_the_documented_recipe_learns_its_sentinels(tmp_path, corpus, run_script):
    """Each sentinel has a row of its own in the embedding table, and training changes it.

    An id beyond the table would be clamped to its last row without an error. All sentinels would
    be that piece then.
    """
    write_start(tmp_path, corpus)
    more = (f"--config_name={tmp_path}", "--do_train", "--max_steps=3")
    argv = flags(tmp_path, corpus, tmp_path / "out", *more)
    run = run_script([*argv, "--learning_rate=0.01"], env={"XLA_FLAGS": None})
    assert run.returncode == 0, run.stderr
    (warning,) = [line for line in run.stderr.splitlines() if "WARNING" in line]
    assert {"400", "300"} <= set(re.findall(r"\d+", warning))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 400
    t5.restore_clip_argument()
    args = t5.parse_args(argv[1:])
    config, tokenizer, _ = t5.load_config_and_tokenizer(args)
    before = np.asarray(t5.load_model(args, config)[1]["shared"]["embedding"])
    after = load_file(tmp_path / "out" / "model.safetensors")["shared.weight"]
    assert after.shape == before.shape == (400, 32)
    assert len(np.unique(after[300:], axis=0)) == 100
    collator = t5.FlaxDataCollatorForT5MLM(tokenizer, 64)
    assert collator.sentinels.min() >= 300
    moved = np.abs(after - before).max(axis=1)
    # The softmax changes each row a little. The rows of sentinels, which are in the inputs and the
    # targets, change as much as those of the most frequent pieces.
    assert moved[collator.sentinels].min() > 0.5 * moved.max()


def test_a_pretrained_model_keeps_its_table(tmp_path, corpus, run_script):
    write_start(tmp_path, corpus)
    _, model, params = make_model("t5")
    model.save_pretrained(tmp_path / "pretrained", params=params)
    pretrained = f"--model_name_or_path={tmp_path / 'pretrained'}"
    argv = flags(tmp_path, corpus, tmp_path / "out", pretrained)
    run = run_script(argv, env={"XLA_FLAGS": None})
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("run_t5_mlm_flax.py: error: ")
    assert {"400", str(VOCAB)} <= set(re.findall(r"\d+", run.stderr))
    assert not (tmp_path / "out").exists()
