"""The objective of run_mlm_flax.py against independent references: masking, whole words, and the loss.

Statistics are held to 5 standard deviations. A count of N independent draws of probability p has the mean N * p and
the standard deviation sqrt(N * p * (1 - p)), so that a right program fails such a check for one seed in 1.7 million,
and with the fixed seeds of these tests always or never.
"""

import dataclasses
import inspect
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    FLAX_MODEL_FOR_MASKED_LM_MAPPING,
    BertConfig,
    FlaxAutoModelForMaskedLM,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import run_mlm_flax as mlm

VOCAB_SIZE = 1000
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(5)


def make_tokenizer(vocab_size: int = VOCAB_SIZE):
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), vocab_size))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **dict(zip(names, SPECIAL, strict=True))
    )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def generator(seed: int = 0, skip: int = 0):
    return np.random.Generator(np.random.PCG64(seed).advance(skip))


def make_rows(rows: int, length: int, seed: int = 0, low: int = len(SPECIAL)):
    """[CLS], random words with an [UNK] here and there, [SEP], padding of every length up to a third."""
    rng = np.random.default_rng(seed)
    input_ids = rng.integers(low, VOCAB_SIZE, (rows, length), dtype=np.int32)
    input_ids[rng.random((rows, length)) < 0.02] = UNK
    ends = rng.integers(2 * length // 3, length, rows)
    input_ids[:, 0] = CLS
    input_ids[np.arange(rows), ends] = SEP
    input_ids[np.arange(length) > ends[:, None]] = PAD
    return input_ids


def mask_rows(collator, input_ids, rng, group_size, continues_word=None):
    """What the model is shown, and the labels; `input_ids` stays as it is."""
    examples = {
        "input_ids": input_ids.copy(),
        "attention_mask": (input_ids != PAD).astype(np.int32),
    }
    if continues_word is not None:
        examples["continues_word"] = continues_word.copy()
    batch = collator(examples, rng, group_size)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].dtype == batch["labels"].dtype == np.int32
    assert batch["input_ids"].shape == batch["labels"].shape == input_ids.shape
    assert (batch["attention_mask"] == (input_ids != PAD)).all()
    return batch["input_ids"], batch["labels"]


def assert_binomial(count: int, trials: int, probability: float):
    deviation = math.sqrt(trials * probability * (1 - probability))
    assert abs(count - trials * probability) < 5 * deviation, (
        count,
        trials * probability,
        deviation,
    )


def assert_uniform(counts: np.ndarray):
    """Pearson's chi-squared, made normal by Wilson and Hilferty's cube root: (X / k) ** (1/3) has the mean
    1 - 2 / (9 k) and the variance 2 / (9 k), for k = categories - 1 degrees of freedom. Too even is wrong, too."""
    expected, k = counts.sum() / len(counts), len(counts) - 1
    assert expected > 20
    statistic = ((counts - expected) ** 2 / expected).sum()
    z = ((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))
    assert abs(z) < 5, (statistic, k)
    assert counts.min() > 0


# ------------------------------------------------------------------------------------------------------ masking


@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_masking_statistics(tokenizer, probability):
    length = 512
    input_ids = make_rows(2800, length)
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, length, probability)
    shown, labels = mask_rows(collator, input_ids, generator(1), group_size=8)
    ordinary, predicted = input_ids >= len(SPECIAL), labels != -100

    num_ordinary, num_predicted = int(ordinary.sum()), int(predicted.sum())
    assert num_ordinary > 1_000_000
    assert not (predicted & ~ordinary).any()
    assert (labels[predicted] == input_ids[predicted]).all()
    assert (shown[~predicted] == input_ids[~predicted]).all()
    assert_binomial(num_predicted, num_ordinary, probability)

    # A random token is the mask token, or the token itself, once in VOCAB_SIZE times each.
    chance = 0.1 / VOCAB_SIZE
    assert_binomial(int((shown[predicted] == MASK).sum()), num_predicted, 0.8 + chance)
    assert_binomial(
        int((shown[predicted] == input_ids[predicted]).sum()), num_predicted, 0.1 + chance
    )

    # Neighbours, in the row and in the column, are drawn independently of each other. Of N pairs that overlap in one
    # token each, both are predicted with variance N p^2 (1 - p^2) + 2 N (p^3 - p^4).
    p = probability
    for a, b in (((..., slice(1, None)), (..., slice(-1))), (slice(1, None), slice(-1))):
        trials, both = (ordinary[a] & ordinary[b]).sum(), (predicted[a] & predicted[b]).sum()
        variance = trials * (p**2 * (1 - p**2) + 2 * (p**3 - p**4))
        assert abs(both - trials * p**2) < 5 * math.sqrt(variance)
    # What a predicted token becomes does not depend on its neighbour's fate either, nor on its place in the row.
    masked = predicted & (shown == MASK)
    pairs = predicted[:, 1:] & predicted[:, :-1]
    assert_binomial(
        int((masked[:, 1:] & masked[:, :-1]).sum()), int(pairs.sum()), (0.8 + chance) ** 2
    )
    half = length // 3
    assert_binomial(int(predicted[:, :half].sum()), int(ordinary[:, :half].sum()), probability)


def test_random_tokens_are_uniform_over_the_vocabulary(tokenizer):
    """Every token is the same here, so that the random ones are seen: all but that token and the mask token."""
    length, same = 512, 7
    input_ids = np.full((2100, length), same, np.int32)
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, length, 0.9)
    shown, labels = mask_rows(collator, input_ids, generator(2), group_size=1)
    assert input_ids.size > 1_000_000
    counts = np.bincount(shown[labels != -100], minlength=VOCAB_SIZE)
    assert len(counts) == VOCAB_SIZE
    others = np.delete(counts, [same, MASK])
    assert_binomial(int(others.sum()), int(counts.sum()), 0.1 * (1 - 2 / VOCAB_SIZE))
    assert_uniform(others)


def test_no_special_token_is_predicted(tokenizer):
    input_ids = np.tile(np.arange(20, dtype=np.int32), (64, 8))
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, 160, 0.95)
    continues_word = np.ones(input_ids.shape, np.int8)  # not even inside of a word
    for words in (None, continues_word):
        _, labels = mask_rows(collator, input_ids, generator(), 4, words)
        assert (labels[input_ids < len(SPECIAL)] == -100).all()
        assert (labels != -100).any()


def test_masks_are_a_function_of_the_generator(tokenizer):
    input_ids = make_rows(32, 128)
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, 128)
    first, second, other = (
        mask_rows(collator, input_ids, generator(seed), 8) for seed in (3, 3, 4)
    )
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert (first[1] != other[1]).any()


@pytest.mark.parametrize("whole_words", [False, True])
def test_masks_do_not_depend_on_the_layout(tokenizer, whole_words):
    """Row r starts at draw r * max_length, whatever the padded length and the process: hosts mask their rows alone."""
    rows, length, max_length = 48, 96, 128
    input_ids = make_rows(rows, length)
    words = (
        (np.random.default_rng(5).random((rows, length)) < 0.4).astype(np.int8)
        if whole_words
        else None
    )
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, max_length, 0.15, whole_words)
    shown, labels = mask_rows(collator, input_ids, generator(6), 8, words)
    assert (labels != -100).any(axis=1).all()  # differing rows would be seen
    for start in range(0, rows, 16):
        part = slice(start, start + 16)
        rng = generator(6, start * max_length)
        shown_part, labels_part = mask_rows(
            collator, input_ids[part], rng, 8, words[part] if whole_words else None
        )
        assert (shown_part == shown[part]).all()
        assert (labels_part == labels[part]).all()
    padding = np.full((rows, max_length - length), PAD, np.int32)
    wider = np.concatenate([input_ids, padding], axis=1)
    if whole_words:
        words = np.concatenate([words, np.ones_like(padding, np.int8)], axis=1)
    shown_wider, labels_wider = mask_rows(collator, wider, generator(6), 8, words)
    assert (shown_wider[:, :length] == shown).all()
    assert (labels_wider[:, :length] == labels).all()
    assert (labels_wider[:, length:] == -100).all()


def words_of_row(input_ids, continues_word) -> list[list[int]]:
    """The words of a row as lists of positions, special tokens left out. A row starts a word."""
    words = []
    for position in range(len(input_ids)):
        if position == 0 or not continues_word[position]:
            words.append([])
        words[-1].append(position)
    words = [
        [position for position in word if input_ids[position] >= len(SPECIAL)] for word in words
    ]
    return [word for word in words if word]


def test_whole_words(tokenizer):
    rows, length = 2600, 512
    input_ids = make_rows(rows, length, seed=7)
    continues_word = (np.random.default_rng(8).random((rows, length)) < 0.3).astype(np.int8)
    assert continues_word[:, 0].any()  # as where a block starts inside of a word
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, length, 0.15, whole_words=True)
    shown, labels = mask_rows(collator, input_ids, generator(9), 8, continues_word)
    num_words = num_predicted = num_tokens = 0
    for row in range(rows):
        for word in words_of_row(input_ids[row], continues_word[row]):
            predicted = {bool(labels[row, position] != -100) for position in word}
            assert len(predicted) == 1, (row, word)
            num_words += 1
            num_predicted += predicted.pop()
            num_tokens += len(word)
    assert num_tokens > 1_000_000
    assert_binomial(num_predicted, num_words, 0.15)
    # The tokens of a predicted word are replaced each for itself, with the same shares.
    predicted = labels != -100
    assert (labels[predicted] == input_ids[predicted]).all()
    assert (shown[~predicted] == input_ids[~predicted]).all()
    assert_binomial(
        int((shown[predicted] == MASK).sum()), int(predicted.sum()), 0.8 + 0.1 / VOCAB_SIZE
    )
    pairs = predicted[:, 1:] & predicted[:, :-1] & (continues_word[:, 1:] == 1)
    masked = predicted & (shown == MASK)
    both_masked = int((pairs & masked[:, 1:] & masked[:, :-1]).sum())
    assert_binomial(both_masked, int(pairs.sum()), (0.8 + 0.1 / VOCAB_SIZE) ** 2)


@dataclasses.dataclass
class FewSlots(mlm.FlaxDataCollatorForLanguageModeling):
    slots: int = 32

    def num_slots(self, num_tokens: int) -> int:
        return self.slots


@pytest.mark.parametrize("whole_words", [False, True])
def test_a_surplus_is_left_unmasked(tokenizer, whole_words):
    rows, length, group_size = 64, 64, 4
    input_ids = make_rows(rows, length, seed=10)
    words = np.zeros((rows, length), np.int8)
    if whole_words:
        words = (np.random.default_rng(11).random((rows, length)) < 0.4).astype(np.int8)
    arguments = (tokenizer, length, 0.15, whole_words)
    plenty = mask_rows(
        FewSlots(*arguments, slots=10**6), input_ids, generator(12), group_size, words
    )
    few = mask_rows(FewSlots(*arguments, slots=32), input_ids, generator(12), group_size, words)
    surplus_seen = fitting_seen = 0
    for start in range(0, rows, group_size):
        group = slice(start, start + group_size)
        wanted, got = plenty[1][group] != -100, few[1][group] != -100
        assert not (got & ~wanted).any()
        assert got.sum() <= 32
        if wanted.sum() <= 32:
            fitting_seen += 1
            assert (got == wanted).all()
        dropped = [0]
        for row in range(start, start + group_size):
            for word in words_of_row(input_ids[row], words[row]):
                assert len({bool(few[1][row, position] != -100) for position in word}) == 1
                if plenty[1][row, word[0]] != -100 and few[1][row, word[0]] == -100:
                    dropped.append(len(word))
        if wanted.sum() > 32:
            surplus_seen += 1
            assert (
                got.sum() + max(dropped) > 32
            )  # the slots are used up to the first word that does not fit
    assert surplus_seen > 3
    assert fitting_seen > 3
    predicted = few[1] != -100
    assert (few[0][predicted] == plenty[0][predicted]).all()
    assert (few[1][predicted] == plenty[1][predicted]).all()
    assert (few[0][~predicted] == input_ids[~predicted]).all()


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 16, 100, 1024, 8192, 65536])
def test_slots_hold_what_is_predicted(tokenizer, num_tokens, whole_words):
    """Room for the mean and 4 standard deviations, a static multiple of 16 that is no more than the tokens."""
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, 128, 0.15, whole_words)
    slots = collator.num_slots(num_tokens)
    assert isinstance(slots, int)
    assert slots == num_tokens or slots % 16 == 0
    assert slots <= num_tokens
    assert slots >= min(num_tokens, num_tokens * 0.15 + 4 * math.sqrt(num_tokens * 0.15 * 0.85))
    if num_tokens >= 8192 and not whole_words:
        assert slots < 0.2 * num_tokens  # or the head would save nothing


# ----------------------------------------------------------------------------------- the head on masked positions

HEAD_VOCAB = 101  # a prime, and no other size of the models below
LENGTH, BATCH, NUM_SLOTS = 32, 3, 16
NAMES = ("input_ids", "attention_mask", "labels")
ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 37,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37,
    "max_position_embeddings": 40,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}
FAMILIES = {
    "albert": {**ENCODER, "embedding_size": 24, "num_hidden_groups": 1},
    "bart": SEQ2SEQ,
    "bert": ENCODER,
    "big_bird": {**ENCODER, "attention_type": "original_full"},
    "distilbert": {
        "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 37, "max_position_embeddings": 40, "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "electra": {**ENCODER, "embedding_size": 24},
    "mbart": SEQ2SEQ,
    "roberta": ENCODER,
    "roberta-prelayernorm": ENCODER,
    "roformer": {**ENCODER, "embedding_size": 24},
    "xlm-roberta": ENCODER,
}  # fmt: skip


def make_model(family: str, **settings):
    """A tiny model, and parameters that all matter: initialized ones have biases of zero and scales of one."""
    config = CONFIG_MAPPING[family](
        **{"vocab_size": HEAD_VOCAB, "pad_token_id": 1, **FAMILIES[family], **settings}
    )
    model = FlaxAutoModelForMaskedLM.from_config(config, _do_init=False)
    rng = np.random.default_rng(0)
    params = {
        path: np.float32(path[-1] == "scale") + 0.1 * rng.standard_normal(x.shape, np.float32)
        for path, x in flatten_dict(model.params_shape_tree).items()
    }
    return model, jax.tree.map(jnp.asarray, unflatten_dict(params))


def full_loss(params, batch, model):
    """The loss as the papers have it: every position through the head, then the labels that are not -100 in a sum."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if "token_type_ids" in inspect.signature(type(model).__call__).parameters:
        inputs["token_type_ids"] = jnp.zeros_like(
            inputs["input_ids"]
        )  # a single segment is number 0
    logits = model(**inputs, params=params, train=False).logits
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    predicted = batch["labels"] != -100
    labels = jnp.where(predicted, batch["labels"], 0)
    picked = jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]
    return -(picked * predicted).sum(), predicted.sum()


def masked_loss(params, batch, model, dropout_key=None):
    return mlm.loss_sums(params, batch, model, lambda num_tokens: NUM_SLOTS, dropout_key)


def head_batches():
    """Fewer predicted than slots, as many, none, with padding and without; token 0 is among the labels."""
    rng = np.random.default_rng(1)
    counts = {"as many as slots": NUM_SLOTS, "fewer, padding": 11, "none": 0, "one": 1}
    for name, count in counts.items():
        input_ids = rng.integers(2, HEAD_VOCAB, (BATCH, LENGTH), dtype=np.int32)
        attention_mask = np.ones((BATCH, LENGTH), np.int32)
        if name == "fewer, padding":
            for row, length in enumerate((LENGTH, 20, 9)):
                input_ids[row, length:], attention_mask[row, length:] = 1, 0
        labels = np.full((BATCH, LENGTH), -100, np.int32)
        where = rng.permutation(np.flatnonzero(attention_mask))[:count]
        labels.reshape(-1)[where] = rng.integers(0, HEAD_VOCAB, count)
        labels.reshape(-1)[where[::2]] = 0
        yield (
            name,
            {
                k: jnp.asarray(v)
                for k, v in zip(NAMES, (input_ids, attention_mask, labels), strict=True)
            },
        )


def sizes_of_logits(jaxpr) -> set[int]:
    """For how many positions each product with the vocabulary is computed, in all of a program."""
    sizes = set()
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    sizes |= sizes_of_logits(inner)
        shape = equation.outvars[0].aval.shape
        if equation.primitive.name == "dot_general" and HEAD_VOCAB in shape:
            sizes.add(math.prod(shape) // HEAD_VOCAB)
    return sizes


def test_every_family_is_tested():
    assert set(FAMILIES) == {config.model_type for config in FLAX_MODEL_FOR_MASKED_LM_MAPPING}


@pytest.mark.parametrize(
    "family",
    [*sorted(FAMILIES), "bert, checkpointed"],
)
def test_loss_and_gradients_equal_the_full_computation(family):
    model, params = make_model(family.partition(",")[0])
    if family.endswith("checkpointed"):
        model.enable_gradient_checkpointing()
    key = jax.random.key(0, impl="rbg")  # dropout is zero: the key is used and changes nothing
    fast = jax.value_and_grad(masked_loss, has_aux=True)
    full = jax.value_and_grad(full_loss, has_aux=True)
    both = jax.jit(
        lambda params, batch: (fast(params, batch, model, key), full(params, batch, model))
    )
    for name, batch in head_batches():
        ((loss, sums), grads), ((expected, predicted), expected_grads) = both(params, batch)
        assert loss == pytest.approx(float(expected), rel=1e-5, abs=0), name
        assert sums["loss"] == loss
        assert sums["predicted"] == predicted == (batch["labels"] != -100).sum()
        grads, expected_grads = flatten_dict(grads), flatten_dict(expected_grads)
        largest = max(float(jnp.abs(x).max()) for x in expected_grads.values())
        assert (largest > 0.01) == (predicted > 0)
        for path, value in expected_grads.items():
            np.testing.assert_allclose(
                grads[path], value, rtol=1e-5, atol=1e-6 * largest, err_msg=f"{name} {path}"
            )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_head_runs_on_the_slots_only(family):
    """A family whose anatomy the script does not know would silently take the full head."""
    model, params = make_model(family)
    _, batch = next(head_batches())

    full = jax.make_jaxpr(full_loss, static_argnums=2)(params, batch, model)
    assert sizes_of_logits(full.jaxpr) == {BATCH * LENGTH}
    assert sizes_of_logits(
        jax.make_jaxpr(masked_loss, static_argnums=2)(params, batch, model).jaxpr
    ) == {NUM_SLOTS}


def test_big_bird_trains_with_its_sparse_attention():
    """Which is its default, and draws random blocks of keys from a generator of its own."""
    model, params = make_model(
        "big_bird", attention_type="block_sparse", max_position_embeddings=256
    )
    batch = {name: jnp.ones((1, 256), jnp.int32) for name in NAMES}
    jax.eval_shape(
        lambda params: masked_loss(params, batch, model, jax.random.key(0, impl="rbg")), params
    )


class ModelOfLogits:
    """A model of another anatomy than Transformers': the head cannot be reached, and runs on every position."""

    config = BertConfig()

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, *args, **kwargs):
        return (self.logits,)


def test_evaluation_sums():
    """Accuracy counts what is predicted, token 0 included, and nothing else."""
    for seed, (name, batch) in enumerate(head_batches()):
        logits = np.random.default_rng(seed).standard_normal(
            (BATCH, LENGTH, HEAD_VOCAB), np.float32
        )
        best = logits.argmax(-1)
        labels = np.array(batch["labels"])
        half = (labels != -100) & (
            np.arange(LENGTH) % 2 == 0
        )  # of the labels are what the model says
        labels[half] = best[half]
        batch["labels"] = jnp.asarray(labels)
        loss, right, predicted = 0.0, 0, 0
        for row, position in np.argwhere(labels != -100):
            label, row_logits = labels[row, position], logits[row, position].astype(np.float64)
            loss += np.log(np.exp(row_logits).sum()) - row_logits[label]
            right += best[row, position] == label
            predicted += 1
        value, sums = mlm.loss_sums(
            {}, batch, ModelOfLogits(jnp.asarray(logits)), lambda num_tokens: NUM_SLOTS
        )
        assert set(sums) == {"loss", "predicted", "accuracy"}
        assert value == sums["loss"] == pytest.approx(loss, rel=1e-5), name
        assert (sums["accuracy"], sums["predicted"]) == (right, predicted)
        assert right > 2 or predicted < 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_softmax_and_loss_are_float32_in_every_dtype(dtype):
    """Against float64 on the very logits that the model gives: half precision would be off by a hundredth."""
    _, batch = next(head_batches())
    logits = jnp.asarray(
        8 * np.random.default_rng(0).standard_normal((BATCH, LENGTH, HEAD_VOCAB)), dtype
    )
    exact, labels = np.asarray(logits, np.float64), np.asarray(batch["labels"])
    losses = (
        np.log(np.exp(exact).sum(-1))
        - np.take_along_axis(exact, np.maximum(labels, 0)[..., None], -1)[..., 0]
    )
    loss, sums = mlm.loss_sums({}, batch, ModelOfLogits(logits), lambda num_tokens: NUM_SLOTS)
    assert all(value.dtype == jnp.float32 for value in (loss, *sums.values()))
    assert loss == pytest.approx(losses[labels != -100].sum(), rel=1e-6)
