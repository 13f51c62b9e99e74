"""The objective of run_mlm_flax.py against independent references: masking, whole words, and loss.

Statistics have to be within 5 standard deviations. A count of N independent draws of probability p
has the mean N * p and the standard deviation sqrt(N * p * (1 - p)). So a correct program fails such
a check for one seed in 1.7 million. Since the seeds of these tests are fixed, it fails always or
never.
"""

import dataclasses
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distributions import assert_binomial, assert_uniform
from families import MASKED
from flax.traverse_util import flatten_dict
from gradients import check_recomputed_gradients, random_params
from tokenizers import Tokenizer, models, pre_tokenizers
from training_scripts import full_but
from transformers import (
    CONFIG_MAPPING,
    FLAX_MODEL_FOR_MASKED_LM_MAPPING,
    BertConfig,
    FlaxAutoModelForMaskedLM,
    PreTrainedTokenizerFast,
)

import run_mlm_flax as mlm

VOCAB_SIZE = 1000
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(5)


def make_tokenizer(vocab_size: int = VOCAB_SIZE):
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), vocab_size))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    named = dict(zip(names, SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def make_rows(rows: int, length: int, seed: int = 0, low: int = len(SPECIAL)):
    """Rows of [CLS], random words with 2% [UNK], [SEP], and padding of up to a third of the row."""
    rng = np.random.default_rng(seed)
    input_ids = rng.integers(low, VOCAB_SIZE, (rows, length), dtype=np.int32)
    input_ids[rng.random((rows, length)) < 0.02] = UNK
    ends = rng.integers(2 * length // 3, length, rows)
    input_ids[:, 0] = CLS
    input_ids[np.arange(rows), ends] = SEP
    input_ids[np.arange(length) > ends[:, None]] = PAD
    return input_ids


def mask_rows(collator, input_ids, seed: int, group_size, continues_word=None, first_number=0):
    """Mask a copy of `input_ids`, sequences that are numbered from `first_number`.

    Return what the model is shown, and the labels.
    """
    numbers = range(first_number, first_number + len(input_ids))
    rngs = mlm.sequence_generators((seed,), numbers)
    attention_mask = (input_ids != PAD).astype(np.int32)
    examples = {"input_ids": input_ids.copy(), "attention_mask": attention_mask}
    if continues_word is not None:
        examples["continues_word"] = continues_word.copy()
    batch = collator(examples, rngs, group_size)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].dtype == batch["labels"].dtype == np.int32
    assert batch["input_ids"].shape == batch["labels"].shape == input_ids.shape
    assert (batch["attention_mask"] == attention_mask).all()
    return batch["input_ids"], batch["labels"]


# ------------------------------------------------------------------------------------------ masking


@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_masking_statistics(tokenizer, probability):
    length = 512
    input_ids = make_rows(2800, length)
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, length, probability)
    shown, labels = mask_rows(collator, input_ids, seed=1, group_size=8)
    ordinary = input_ids >= len(SPECIAL)
    predicted = labels != -100

    num_ordinary = int(ordinary.sum())
    num_predicted = int(predicted.sum())
    assert num_ordinary > 1_000_000
    assert not (predicted & ~ordinary).any()
    assert (labels[predicted] == input_ids[predicted]).all()
    assert (shown[~predicted] == input_ids[~predicted]).all()
    assert_binomial(num_predicted, num_ordinary, probability)

    # A random token is the mask token, or the token itself, once in VOCAB_SIZE times each.
    chance = 0.1 / VOCAB_SIZE
    masked = predicted & (shown == MASK)
    unchanged = predicted & (shown == input_ids)
    assert_binomial(masked.sum(), num_predicted, 0.8 + chance)
    assert_binomial(unchanged.sum(), num_predicted, 0.1 + chance)

    # Neighbors in a row or in a column are drawn independently of each other.
    assert_independent(
        ordinary[:, 1:], ordinary[:, :-1], predicted[:, 1:], predicted[:, :-1], probability
    )
    assert_independent(ordinary[1:], ordinary[:-1], predicted[1:], predicted[:-1], probability)

    # What replaces a predicted token does not depend on its neighbor either.
    pairs = predicted[:, 1:] & predicted[:, :-1]
    masked_pairs = masked[:, 1:] & masked[:, :-1]
    assert_binomial(masked_pairs.sum(), pairs.sum(), (0.8 + chance) ** 2)

    # Nor does the choice of predicted tokens depend on the place in the row.
    third = length // 3
    assert_binomial(predicted[:, :third].sum(), ordinary[:, :third].sum(), probability)


def assert_independent(ordinary, other_ordinary, predicted, other_predicted, p: float):
    """Check how often both tokens of a pair of neighbors are predicted.

    Pairs overlap in one token each. Of N pairs, the number where both are predicted has the
    variance N p^2 (1 - p^2) + 2 N (p^3 - p^4).
    """
    num_pairs = (ordinary & other_ordinary).sum()
    num_both = (predicted & other_predicted).sum()
    variance = num_pairs * (p**2 * (1 - p**2) + 2 * (p**3 - p**4))
    assert abs(num_both - num_pairs * p**2) < 5 * math.sqrt(variance)


def test_random_tokens_are_uniform_over_the_vocabulary(tokenizer):
    """All tokens of the input are the same, so all others but the mask token are random ones."""
    length = 512
    same = 7
    input_ids = np.full((2100, length), same, np.int32)
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, length, 0.9)
    shown, labels = mask_rows(collator, input_ids, seed=2, group_size=1)
    assert input_ids.size > 1_000_000
    counts = np.bincount(shown[labels != -100], minlength=VOCAB_SIZE)
    assert len(counts) == VOCAB_SIZE
    others = np.delete(counts, [same, MASK])
    assert_binomial(others.sum(), counts.sum(), 0.1 * (1 - 2 / VOCAB_SIZE))
    assert_uniform(others)


def test_no_special_token_is_predicted(tokenizer):
    input_ids = np.tile(np.arange(20, dtype=np.int32), (64, 8))
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, 160, 0.95)
    # Special tokens are not predicted inside a word either.
    continues_word = np.ones(input_ids.shape, np.int8)
    for words in (None, continues_word):
        _, labels = mask_rows(collator, input_ids, 0, 4, words)
        assert (labels[input_ids < len(SPECIAL)] == -100).all()
        assert (labels != -100).any()


def test_masks_are_a_function_of_the_seed(tokenizer):
    input_ids = make_rows(32, 128)
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, 128)
    first = mask_rows(collator, input_ids, 3, 8)
    second = mask_rows(collator, input_ids, 3, 8)
    other = mask_rows(collator, input_ids, 4, 8)
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert (first[1] != other[1]).any()


@pytest.mark.parametrize("whole_words", [False, True])
def test_masks_do_not_depend_on_the_layout(tokenizer, whole_words):
    """Each host masks its own rows alone. The padded length makes no difference."""
    rows = 48
    length = 96
    max_length = 128
    input_ids = make_rows(rows, length)
    words = None
    if whole_words:
        words = (np.random.default_rng(5).random((rows, length)) < 0.4).astype(np.int8)
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, max_length, 0.15, whole_words)
    shown, labels = mask_rows(collator, input_ids, 6, 8, words)
    # Every row has labels, so a difference in any row is found.
    assert (labels != -100).any(axis=1).all()

    for start in range(0, rows, 16):
        part = slice(start, start + 16)
        words_part = words[part] if whole_words else None
        shown_part, labels_part = mask_rows(collator, input_ids[part], 6, 8, words_part, start)
        assert (shown_part == shown[part]).all()
        assert (labels_part == labels[part]).all()

    padding = np.full((rows, max_length - length), PAD, np.int32)
    wider = np.concatenate([input_ids, padding], axis=1)
    if whole_words:
        words = np.concatenate([words, np.ones_like(padding, np.int8)], axis=1)
    shown_wider, labels_wider = mask_rows(collator, wider, 6, 8, words)
    assert (shown_wider[:, :length] == shown).all()
    assert (labels_wider[:, :length] == labels).all()
    assert (labels_wider[:, length:] == -100).all()


def words_of_row(input_ids, continues_word) -> list[list[int]]:
    """The words of a row as lists of positions, without special tokens. A row starts a word."""
    words = []
    for position in range(len(input_ids)):
        if position == 0 or not continues_word[position]:
            words.append([])
        words[-1].append(position)
    words = [
        [position for position in word if input_ids[position] >= len(SPECIAL)] for word in words
    ]
    return [word for word in words if word]


def test_a_vocabulary_with_gaps():
    """As that of a vocab.txt with duplicate lines: the highest id is above the number of tokens."""
    vocabulary = {**{token: i for i, token in enumerate(SPECIAL)}, "high": 50}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, mask_token="[MASK]", pad_token="[PAD]", unk_token="[UNK]"
    )
    assert len(tokenizer) == 6
    assert mlm.count_token_ids(tokenizer) == 51
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, 16, 0.5)
    _, labels = mask_rows(collator, np.full((4, 16), 50, np.int32), 0, 1)
    assert (labels == 50).any()


@pytest.mark.parametrize("whole_words", [True, False])
def test_whole_words_need_a_fast_tokenizer(roberta_dir, whole_words):
    """A tokenizer without a fast class is found out only when it is loaded."""
    model = [f"--tokenizer_name={roberta_dir}", "--model_type=roberta"]
    args = mlm.parse_args([*model, "--output_dir=none", "--train_file=none", "--max_seq_length=8"])
    args.use_fast_tokenizer = False
    args.whole_word_mask = whole_words
    if whole_words:
        with pytest.raises(mlm.InputError, match=r"no fast tokenizer, which --whole_word_mask"):
            mlm.load_config_and_tokenizer(args)
    else:
        mlm.load_config_and_tokenizer(args)


def test_an_activation_that_pytorchs_head_of_electra_ignores_is_refused():
    electra = CONFIG_MAPPING["electra"]
    mlm.check_config(electra(), "electra")
    with pytest.raises(mlm.InputError, match="hidden_act is relu, but Flax's electra has gelu"):
        mlm.check_config(electra(hidden_act="relu"), "electra")


def test_whole_words(tokenizer):
    rows = 2600
    length = 512
    input_ids = make_rows(rows, length, seed=7)
    continues_word = (np.random.default_rng(8).random((rows, length)) < 0.3).astype(np.int8)
    # Some rows start inside a word, as blocks do.
    assert continues_word[:, 0].any()
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, length, 0.15, whole_words=True)
    shown, labels = mask_rows(collator, input_ids, 9, 8, continues_word)
    num_words = 0
    num_predicted = 0
    num_tokens = 0
    for row in range(rows):
        for word in words_of_row(input_ids[row], continues_word[row]):
            predicted = {bool(labels[row, position] != -100) for position in word}
            assert len(predicted) == 1, (row, word)
            num_words += 1
            num_predicted += predicted.pop()
            num_tokens += len(word)
    assert num_tokens > 1_000_000
    assert_binomial(num_predicted, num_words, 0.15)
    # Each token of a predicted word is replaced independently, with the same shares.
    predicted = labels != -100
    masked = predicted & (shown == MASK)
    chance = 0.8 + 0.1 / VOCAB_SIZE
    assert (labels[predicted] == input_ids[predicted]).all()
    assert (shown[~predicted] == input_ids[~predicted]).all()
    assert_binomial(masked.sum(), predicted.sum(), chance)
    pairs = predicted[:, 1:] & predicted[:, :-1] & (continues_word[:, 1:] == 1)
    masked_pairs = pairs & masked[:, 1:] & masked[:, :-1]
    assert_binomial(masked_pairs.sum(), pairs.sum(), chance**2)


@dataclasses.dataclass
class CollatorWithSlots(mlm.FlaxDataCollatorForLanguageModeling):
    """A collator with a given number of slots for predicted tokens."""

    slots: int = 32

    def num_slots(self, num_tokens: int) -> int:
        return self.slots


@pytest.mark.parametrize("whole_words", [False, True])
def test_a_surplus_is_left_unmasked(tokenizer, whole_words):
    rows = 64
    length = 64
    group_size = 4
    slots = 32
    input_ids = make_rows(rows, length, seed=10)
    words = np.zeros((rows, length), np.int8)
    if whole_words:
        words = (np.random.default_rng(11).random((rows, length)) < 0.4).astype(np.int8)

    def mask(slots: int):
        collator = CollatorWithSlots(tokenizer, length, 0.15, whole_words, slots=slots)
        return mask_rows(collator, input_ids, 12, group_size, words)

    all_shown, all_labels = mask(slots=10**6)
    shown, labels = mask(slots)
    wanted = all_labels != -100
    predicted = labels != -100
    num_surplus_groups = 0
    num_fitting_groups = 0
    for start in range(0, rows, group_size):
        group = slice(start, start + group_size)
        num_wanted = wanted[group].sum()
        num_predicted = predicted[group].sum()
        assert not (predicted[group] & ~wanted[group]).any()
        assert num_predicted <= slots
        dropped_lengths = [0]
        for row in range(start, start + group_size):
            for word in words_of_row(input_ids[row], words[row]):
                assert len({bool(predicted[row, position]) for position in word}) == 1
                if wanted[row, word[0]] and not predicted[row, word[0]]:
                    dropped_lengths.append(len(word))
        if num_wanted <= slots:
            num_fitting_groups += 1
            assert (predicted[group] == wanted[group]).all()
        else:
            num_surplus_groups += 1
            # The slots are used up to the first word that does not fit.
            assert num_predicted + max(dropped_lengths) > slots
    assert num_surplus_groups > 3
    assert num_fitting_groups > 3
    assert (shown[predicted] == all_shown[predicted]).all()
    assert (labels[predicted] == all_labels[predicted]).all()
    assert (shown[~predicted] == input_ids[~predicted]).all()


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 16, 100, 1024, 8192, 65536])
def test_slots_hold_what_is_predicted(tokenizer, num_tokens, whole_words):
    """There is room for the mean and 4 standard deviations.

    The number is a static multiple of 16 that is at most the number of tokens.
    """
    collator = mlm.FlaxDataCollatorForLanguageModeling(tokenizer, 128, 0.15, whole_words)
    slots = collator.num_slots(num_tokens)
    assert isinstance(slots, int)
    assert slots == num_tokens or slots % 16 == 0
    assert slots <= num_tokens
    deviation = math.sqrt(num_tokens * 0.15 * 0.85)
    assert slots >= min(num_tokens, num_tokens * 0.15 + 4 * deviation)
    if num_tokens >= 8192 and not whole_words:
        # With more slots the head would save little.
        assert slots < 0.2 * num_tokens


# --------------------------------------------------------------------- the head on masked positions

# A prime that is no other size of the models below.
HEAD_VOCAB = 101
LENGTH = 32
BATCH = 3
NUM_SLOTS = 16
NAMES = ("input_ids", "attention_mask", "labels")

# The dropout of each family is on in some tests.
DROPOUT = {}
for family, settings in MASKED.items():
    names = [name for name in settings if "drop" in name]
    DROPOUT[family] = dict.fromkeys(names, 0.1)


def make_model(family: str, **settings):
    """A tiny model, and parameters that all have an effect."""
    sizes = {"vocab_size": HEAD_VOCAB, "pad_token_id": 1}
    config = CONFIG_MAPPING[family](**{**sizes, **MASKED[family], **settings})
    model = FlaxAutoModelForMaskedLM.from_config(config, _do_init=False)
    return model, random_params(model)


def full_loss(params, batch, model):
    """The loss of the papers: the head runs on every position, and the labels are summed."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if "token_type_ids" in inspect.signature(type(model).__call__).parameters:
        # A text in one segment has the type 0.
        inputs["token_type_ids"] = jnp.zeros_like(inputs["input_ids"])
    logits = model(**inputs, params=params, train=False).logits
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    predicted = batch["labels"] != -100
    labels = jnp.where(predicted, batch["labels"], 0)
    picked = jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]
    return -(picked * predicted).sum(), predicted.sum()


def num_slots(num_tokens: int) -> int:
    return NUM_SLOTS


def masked_loss(params, batch, model, dropout_key=None):
    return mlm.loss_sums(params, batch, model, num_slots, dropout_key)


def head_batches():
    """Yield (name, batch) for several numbers of predicted tokens. Token 0 is among the labels."""
    rng = np.random.default_rng(1)
    counts = {"as many as slots": NUM_SLOTS, "fewer, padding": 11, "none": 0, "one": 1}
    for name, count in counts.items():
        input_ids = rng.integers(2, HEAD_VOCAB, (BATCH, LENGTH), dtype=np.int32)
        attention_mask = np.ones((BATCH, LENGTH), np.int32)
        if name == "fewer, padding":
            for row, length in enumerate((LENGTH, 20, 9)):
                input_ids[row, length:] = 1
                attention_mask[row, length:] = 0
        labels = np.full((BATCH, LENGTH), -100, np.int32)
        where = rng.permutation(np.flatnonzero(attention_mask))[:count]
        labels.reshape(-1)[where] = rng.integers(0, HEAD_VOCAB, count)
        labels.reshape(-1)[where[::2]] = 0
        arrays = zip(NAMES, (input_ids, attention_mask, labels), strict=True)
        yield name, {key: jnp.asarray(value) for key, value in arrays}


def sizes_of_logits(jaxpr) -> set[int]:
    """The numbers of positions that products with the vocabulary have, anywhere in a program."""
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
    assert set(MASKED) == {config.model_type for config in FLAX_MODEL_FOR_MASKED_LM_MAPPING}


@pytest.mark.parametrize("family", full_but(sorted(MASKED), "albert", "distilbert", "roberta"))
def test_loss_and_gradients_equal_the_full_computation(family):
    model, params = make_model(family)
    # Dropout is zero, so the key is used and changes nothing.
    key = jax.random.key(0, impl="rbg")
    fast = jax.value_and_grad(masked_loss, has_aux=True)
    full = jax.value_and_grad(full_loss, has_aux=True)

    @jax.jit
    def both(params, batch):
        return fast(params, batch, model, key), full(params, batch, model)

    for name, batch in head_batches():
        ((loss, sums), grads), ((expected, predicted), expected_grads) = both(params, batch)
        assert loss == pytest.approx(float(expected), rel=1e-5, abs=0), name
        assert sums["loss"] == loss
        assert sums["predicted"] == predicted == (batch["labels"] != -100).sum()
        grads = flatten_dict(grads)
        expected_grads = flatten_dict(expected_grads)
        largest = max(float(jnp.abs(x).max()) for x in expected_grads.values())
        assert (largest > 0.01) == (predicted > 0)
        for path, value in expected_grads.items():
            np.testing.assert_allclose(
                grads[path], value, rtol=1e-5, atol=1e-6 * largest, err_msg=f"{name} {path}"
            )


@pytest.mark.parametrize("part", ["layers", "attention"])
@pytest.mark.parametrize("family", full_but(sorted(MASKED), "roberta"))
def test_gradient_checkpointing_changes_no_gradient(family, part):
    model, params = make_model(family, **DROPOUT[family])
    _, batch = next(head_batches())
    recomputing = mlm.recompute(masked_loss, part)
    check_recomputed_gradients(
        lambda params, key: masked_loss(params, batch, model, key)[0],
        lambda params, key: recomputing(params, batch, model, key)[0],
        params,
        rtol=1e-5,
    )


@pytest.mark.parametrize("part", ["layers", "attention"])
@pytest.mark.parametrize("family", full_but(sorted(MASKED), "albert", "distilbert", "roberta"))
def test_gradient_checkpointing_keeps_less(family, part):
    """Of a layer, the input is kept, and not the many arrays of its activations.

    Of attention, no array of [batch, heads, length, length] is kept.
    """
    model, params = make_model(family, **DROPOUT[family])
    _, batch = next(head_batches())
    key = jax.random.key(0, impl="rbg")

    def num_saved(loss_fn) -> int:
        def loss(params):
            return loss_fn(params, batch, model, key)[0]

        backward = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
        shapes = [x.shape for x in jax.tree.leaves(backward)]
        if part == "attention":
            weights = (BATCH, model.config.num_attention_heads, LENGTH, LENGTH)
            return sum(math.prod(shape) for shape in shapes if shape == weights)
        # Parameters do not have the batch's size on their first axis.
        return sum(math.prod(shape) for shape in shapes if shape[:1] == (BATCH,))

    before = num_saved(masked_loss)
    assert before > 0
    assert num_saved(mlm.recompute(masked_loss, part)) < (0.3 * before if part == "layers" else 1)


@pytest.mark.parametrize("family", sorted(MASKED))
def test_the_head_runs_on_the_slots_only(family):
    """The script would run the full head on a family whose modules it does not know."""
    model, params = make_model(family)
    _, batch = next(head_batches())
    full = jax.make_jaxpr(full_loss, static_argnums=2)(params, batch, model)
    assert sizes_of_logits(full.jaxpr) == {BATCH * LENGTH}
    masked = jax.make_jaxpr(masked_loss, static_argnums=2)(params, batch, model)
    assert sizes_of_logits(masked.jaxpr) == {NUM_SLOTS}


def test_big_bird_trains_with_its_sparse_attention():
    """Sparse attention is BigBird's default. It draws random blocks of keys."""
    settings = {"attention_type": "block_sparse", "max_position_embeddings": 256}
    model, params = make_model("big_bird", **settings)
    batch = {name: jnp.ones((1, 256), jnp.int32) for name in NAMES}
    key = jax.random.key(0, impl="rbg")
    jax.eval_shape(lambda params: masked_loss(params, batch, model, key), params)


class ModelOfLogits:
    """A model of unknown modules, so that the head runs on every position."""

    config = BertConfig()

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, *args, **kwargs):
        return (self.logits,)


def test_evaluation_sums():
    """Accuracy counts the predicted tokens, token 0 included, and no others."""
    for seed, (name, batch) in enumerate(head_batches()):
        rng = np.random.default_rng(seed)
        logits = rng.standard_normal((BATCH, LENGTH, HEAD_VOCAB), np.float32)
        best = logits.argmax(-1)
        labels = np.array(batch["labels"])
        # The labels at even positions are what the model predicts.
        right = (labels != -100) & (np.arange(LENGTH) % 2 == 0)
        labels[right] = best[right]
        batch["labels"] = jnp.asarray(labels)

        loss = 0.0
        num_right = 0
        num_predicted = 0
        for row, position in np.argwhere(labels != -100):
            label = labels[row, position]
            scores = logits[row, position].astype(np.float64)
            loss += np.log(np.exp(scores).sum()) - scores[label]
            num_right += best[row, position] == label
            num_predicted += 1
        value, sums = masked_loss({}, batch, ModelOfLogits(jnp.asarray(logits)))
        assert set(sums) == {"loss", "predicted", "accuracy"}
        assert value == sums["loss"] == pytest.approx(loss, rel=1e-5), name
        assert (sums["accuracy"], sums["predicted"]) == (num_right, num_predicted)
        assert num_right > 2 or num_predicted < 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_softmax_and_loss_are_float32_in_every_dtype(dtype):
    """Compare with float64 on the model's own logits. Half precision would be off by 1%."""
    _, batch = next(head_batches())
    rng = np.random.default_rng(0)
    logits = jnp.asarray(8 * rng.standard_normal((BATCH, LENGTH, HEAD_VOCAB)), dtype)
    exact = np.asarray(logits, np.float64)
    labels = np.asarray(batch["labels"])
    picked = np.take_along_axis(exact, np.maximum(labels, 0)[..., None], -1)[..., 0]
    losses = np.log(np.exp(exact).sum(-1)) - picked
    loss, sums = masked_loss({}, batch, ModelOfLogits(logits))
    assert all(value.dtype == jnp.float32 for value in (loss, *sums.values()))
    assert loss == pytest.approx(losses[labels != -100].sum(), rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "length", "part"),
    [
        ([], 511, "none"),
        ([], 512, "attention"),
        (["--gradient_checkpointing"], 128, "layers"),
        (["--gradient_checkpointing=attention"], 128, "attention"),
        (["--gradient_checkpointing=none"], 1024, "none"),
    ],
)
def test_what_is_recomputed(flags, length, part):
    required = ["--output_dir=o", "--config_name=c", "--tokenizer_name=t", "--train_file=f.txt"]
    args = mlm.parse_args([*required, *flags])
    assert mlm.part_to_recompute(args, length) == part
