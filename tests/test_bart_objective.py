"""The objective of run_bart_dlm_flax.py against independent references: sentence permutation, infilling, and the loss.

Statistics are held to 5 standard deviations, see test_mlm_objective.py; chi-squared statistics are made normal by
Wilson and Hilferty's cube root: (X / k) ** (1/3) has the mean 1 - 2 / (9 k) and the variance 2 / (9 k).
"""

import math
import random
import sys
from collections import Counter
from functools import cache
from itertools import permutations
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencex
from flax.traverse_util import flatten_dict, unflatten_dict
from tokenizers import processors
from training_scripts import word_tokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    BartConfig,
    FlaxAutoModelForSeq2SeqLM,
    MBartConfig,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import run_bart_dlm_flax as bart

DEVICES = 8  # of tests/conftest.py
BOS, PAD, EOS, UNK, MASK = range(5)
NUM_WORDS = 20_000
START = 7  # no id that a row has at its start, so that it is seen


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return word_tokenizer(tmp_path_factory.mktemp("words"), num_words=NUM_WORDS)


def generator(seed: int = 0, skip: int = 0):
    return np.random.Generator(np.random.PCG64(seed).advance(skip))


def make_rows(rows: int, length: int, seed: int = 0, sentence: float = 8, document: float = 40):
    """Blocks out of documents of `document` tokens, with sentences of `sentence`, on average. The tokens of a row are
    all different, so that one tells its place."""
    rng = np.random.default_rng(seed)
    input_ids = np.array([rng.permutation(NUM_WORDS)[:length] + 5 for _ in range(rows)], np.int32)
    starts_sentence = rng.random((rows, length)) < 1 / sentence
    ends = np.flatnonzero(rng.random(input_ids.size - 1) < 1 / document)
    input_ids.reshape(-1)[ends], input_ids.reshape(-1)[ends + 1] = EOS, BOS
    return {"input_ids": input_ids, "starts_sentence": starts_sentence}


def one_document(rows: int, length: int, seed: int = 0):
    return make_rows(rows, length, seed, document=1e12)


def documents(row, starts_sentence) -> list[list[list[int]]]:
    """The sentences of each document of a row, as lists of positions."""
    found, document = [], []
    for position, (token, start) in enumerate(zip(row, starts_sentence, strict=True)):
        if token in (BOS, PAD, EOS):
            document = []
            continue
        if not document:
            found.append(document)
        if start or not document:
            document.append([])
        document[-1].append(position)
    return found


def denoise_row(
    row,
    starts_sentence,
    rng: random.Random,
    probability: float,
    ratio: float,
    poisson_lambda: float,
):
    """The objective in the plainest words, one row and one token after the other: what the encoder sees."""
    row = list(row)
    for sentences in documents(row, starts_sentence):
        chosen = sorted(rng.sample(range(len(sentences)), math.ceil(ratio * len(sentences) - 1e-9)))
        order = list(range(len(sentences)))
        for place, number in zip(chosen, rng.sample(chosen, len(chosen)), strict=True):
            order[place] = number
        places = [position for sentence in sentences for position in sentence]
        tokens = [row[position] for number in order for position in sentences[number]]
        for position, token in zip(places, tokens, strict=True):
            row[position] = token

    text = [position for position, token in enumerate(row) if token not in (BOS, PAD, EOS)]
    left = num_masked = round(probability * len(text))
    lengths, num_zeros = [], 0
    while left:
        length = min(poisson(rng, poisson_lambda), left)
        left -= length
        if length:
            lengths.append(length)
        else:
            num_zeros += 1
    num_kept = len(text) - num_masked
    gaps = sorted((rng.randint(0, num_kept), rng.random(), length) for length in lengths)
    state, at = {}, 0  # of a position: "kept", "hidden", or "span", which is the first of a span
    for kept in range(num_kept + 1):
        while gaps and gaps[0][0] == kept:
            for i in range(gaps.pop(0)[2]):
                state[text[at]] = "hidden" if i and row[text[at] - 1] not in (BOS, EOS) else "span"
                at += 1
        if kept < num_kept:
            state[text[at]] = "kept"
            at += 1
    room = num_masked - list(state.values()).count("span") + row.count(PAD)
    kept = {
        position: i
        for i, position in enumerate(position for position in text if state[position] == "kept")
    }
    inserted = (
        Counter(rng.randrange(num_kept) for _ in range(min(num_zeros, room))) if kept else Counter()
    )
    shown = []
    for position, token in enumerate(row):
        if state.get(position) == "kept":
            shown += inserted[kept[position]] * [MASK]
        if state.get(position, "kept") != "hidden" and token != PAD:
            shown.append(MASK if state.get(position) == "span" else token)
    return shown


def poisson(rng: random.Random, poisson_lambda: float) -> int:
    """Knuth's: how many uniform numbers can be multiplied before the product is below exp(-lambda)."""
    count, product = 0, rng.random()
    while product > math.exp(-poisson_lambda):
        count += 1
        product *= rng.random()
    return count


def shown_rows(batch) -> list[list[int]]:
    """What the encoder sees, without the padding, which is checked."""
    lengths = batch["attention_mask"].sum(axis=1)
    assert (
        batch["attention_mask"] == (np.arange(batch["input_ids"].shape[1]) < lengths[:, None])
    ).all()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == PAD).all()
    return [row[:length].tolist() for row, length in zip(batch["input_ids"], lengths, strict=True)]


def groups(row, shown) -> list[tuple[int, int]]:
    """For each stretch between tokens of `row` that are shown, how many tokens are hidden there and how many mask
    tokens stand for them. Only where sentences stay in place."""
    places = {token: position for position, token in enumerate(row) if token not in (BOS, EOS, PAD)}
    found, last, masks = [], -1, 0
    for token in [*shown, None]:
        if token == MASK:
            masks += 1
        elif token not in (BOS, EOS):
            position = places[token] if token is not None else len(row)
            assert position > last
            found.append((sum(x not in (BOS, EOS, PAD) for x in row[last + 1 : position]), masks))
            last, masks = position, 0
    return found


def assert_normal(statistic: float, mean: float, variance: float):
    assert abs(statistic - mean) < 5 * math.sqrt(variance), (statistic, mean, math.sqrt(variance))


def assert_chi_squared(statistic: float, k: int):
    assert_normal((statistic / k) ** (1 / 3), 1 - 2 / (9 * k), 2 / (9 * k))


def assert_distribution(counts, chances):
    """Pearson's chi-squared of `counts`, those with fewer than 20 expected in one."""
    counts, expected = np.array(counts), np.array(chances) * sum(counts)
    rare = expected < 20
    pairs = [
        *zip(counts[~rare], expected[~rare], strict=True),
        (counts[rare].sum(), expected[rare].sum()),
    ]
    pairs = [(count, mean) for count, mean in pairs if mean > 5]
    assert_chi_squared(sum((count - mean) ** 2 / mean for count, mean in pairs), len(pairs) - 1)


def assert_same_distribution(a: Counter, b: Counter):
    """The chi-squared test of homogeneity, rare outcomes as one."""
    if len(a | b) == 1:
        return
    common = [outcome for outcome in a.keys() | b.keys() if a[outcome] + b[outcome] >= 40]
    table = np.array([[counts[outcome] for outcome in common] for counts in (a, b)], float)
    rest = [a.total() - table[0].sum(), b.total() - table[1].sum()]
    table = np.column_stack([table, rest]) if sum(rest) >= 40 else table
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
    assert table.shape[1] > 2
    assert_chi_squared(((table - expected) ** 2 / expected).sum(), table.shape[1] - 1)


# --------------------------------------------------------------------------------------------------- every length


@pytest.mark.parametrize("seed", range(12))
def test_properties_at_every_length(tokenizer, seed):
    rng = random.Random(seed)
    for _ in range(25):
        length = rng.choice([1, 2, 3, 5, 8, 17, 64, 200])
        probability, ratio = rng.choice([0.001, 0.1, 0.3, 0.5, 0.99]), rng.choice([0.0, 0.3, 1.0])
        poisson_lambda = rng.choice([1e-9, 0.05, 1.0, 3.0, 50.0, 1e6])
        examples = make_rows(
            9, length, rng.randrange(10**6), rng.choice([1, 3, 20]), rng.choice([2, 10, 1000])
        )
        examples["input_ids"][:3, rng.randrange(length) + 1 :] = PAD
        examples["input_ids"][3, rng.randrange(length)] = UNK
        original = {name: array.copy() for name, array in examples.items()}
        collator = bart.FlaxDataCollatorForBartDenoisingLM(
            tokenizer, rng.choice([length, length + 10]), START, probability, ratio, poisson_lambda
        )
        batch = collator(examples, generator(seed))
        assert set(batch) == {"input_ids", "attention_mask", "decoder_input_ids", "labels"}
        assert all(
            array.shape == (9, length) and array.dtype == np.int32 for array in batch.values()
        )
        assert all((examples[name] == original[name]).all() for name in original)
        for i, shown in enumerate(shown_rows(batch)):
            row, starts_sentence = original["input_ids"][i].tolist(), original["starts_sentence"][i]
            assert batch["labels"][i].tolist() == [-100 if token == PAD else token for token in row]
            assert batch["decoder_input_ids"][i].tolist() == [START, *row[:-1]]
            special = [token for token in row if token in (BOS, EOS)]
            assert [token for token in shown if token in (BOS, EOS)] == special
            ordinary = [token for token in row if token not in (BOS, EOS, PAD)]
            kept = [token for token in shown if token not in (BOS, EOS, MASK)]
            num_masked = round(probability * len(ordinary))
            assert len(kept) == len(ordinary) - num_masked
            assert not Counter(kept) - Counter(ordinary)
            assert (
                len(kept) + len(special) + shown.count(MASK) == len(shown) <= length
            )  # nothing is pushed out
            # In each document something stands for what is hidden, and all that is seen is its own.
            seen = [[]]
            for token in shown:
                seen.append([]) if token in (BOS, EOS) else seen[-1].append(token)
            seen = [tokens for tokens in seen if tokens]
            texts = [
                [row[i] for sentence in document for i in sentence]
                for document in documents(row, starts_sentence)
            ]
            assert len(seen) == len(texts)
            for tokens, text in zip(seen, texts, strict=True):
                assert set(tokens) <= {*text, MASK}
                assert MASK in tokens or len(tokens) == len(text)


def test_noise_is_a_function_of_the_generator_and_of_no_layout(tokenizer):
    """Row r starts at draw r * draws_per_row: processes and batches that hold a part of the rows noise them alike."""
    examples = make_rows(48, 96)
    collator = bart.FlaxDataCollatorForBartDenoisingLM(tokenizer, 96, START)
    whole, again, other = (collator(examples, generator(seed)) for seed in (3, 3, 4))
    assert all((whole[name] == again[name]).all() for name in whole)
    assert (whole["input_ids"] != other["input_ids"]).any(axis=1).all()
    for start in range(0, 48, 16):
        part = {name: array[start : start + 16] for name, array in examples.items()}
        noised = collator(part, generator(3, start * collator.draws_per_row))
        assert all((noised[name] == whole[name][start : start + 16]).all() for name in whole)


# --------------------------------------------------------------------------------------------------- permutation


def permuted_documents(tokenizer, examples, ratio: float):
    """(sentences of a document, the order in which they are shown), for each; nothing is masked."""
    length = examples["input_ids"].shape[1]
    collator = bart.FlaxDataCollatorForBartDenoisingLM(tokenizer, length, START, 1e-9, ratio)
    batch = collator(examples, generator(1))
    for row, starts_sentence, shown in zip(*examples.values(), shown_rows(batch), strict=True):
        special = np.isin(row, (BOS, EOS))
        assert (np.array(shown)[special] == row[special]).all()
        for sentences in documents(row.tolist(), starts_sentence):
            names = {row[sentence[0]]: number for number, sentence in enumerate(sentences)}
            place, order = sentences[0][0], []
            while place <= sentences[-1][-1]:
                number = names[shown[place]]  # KeyError where no sentence of this document starts
                sentence = sentences[number]
                assert shown[place : place + len(sentence)] == row[sentence].tolist()
                place += len(sentence)
                order.append(number)
            yield sentences, tuple(order)


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.5, 0.75, 1.0])
def test_only_whole_sentences_of_a_document_change_places(tokenizer, ratio):
    moved = 0
    for sentences, order in permuted_documents(tokenizer, make_rows(200, 128, seed=2), ratio):
        assert sorted(order) == list(range(len(sentences)))
        elsewhere = sum(number != place for place, number in enumerate(order))
        assert elsewhere <= math.ceil(ratio * len(sentences))
        moved += elsewhere
    assert (moved > 100) == (ratio >= 0.5)


def test_how_many_sentences_move_is_not_off_by_a_rounding_error(tokenizer):
    assert 0.55 * 100 > 55
    examples = one_document(50, 100)
    examples["starts_sentence"][:] = True
    moved = [
        np.sum(np.array(order) != np.arange(100))
        for _, order in permuted_documents(tokenizer, examples, 0.55)
    ]
    assert max(moved) == 55


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_permutations_are_uniform(tokenizer, ratio):
    """Of four sentences of three tokens; a half of them is two, which change places or do not."""
    examples = one_document(6000, 12)
    examples["starts_sentence"][:] = np.arange(12) % 3 == 0
    orders = Counter(order for _, order in permuted_documents(tokenizer, examples, ratio))
    chances = dict.fromkeys(permutations(range(4)), 1 / 24)
    if ratio == 0.5:
        moved = {
            order: sum(number != place for place, number in enumerate(order)) for order in chances
        }
        chances = {order: {0: 1 / 2, 2: 1 / 12}.get(moved[order], 0) for order in chances}
    assert set(orders) == {order for order in chances if chances[order]}
    assert_distribution(
        [orders[order] for order in chances if chances[order]], [x for x in chances.values() if x]
    )


# ----------------------------------------------------------------------------------------------------- infilling


@pytest.mark.parametrize("poisson_lambda", [0.3, 1.0, 3.0, 20.0])
def test_span_lengths_are_poisson(tokenizer, poisson_lambda):
    """Lengths are drawn from two tables of 65,536 entries, each as likely as another: those other than 0, and how many
    of length 0 come before one of those, which is geometric. Each chance is right to the rounding, half an entry."""
    collator = bart.FlaxDataCollatorForBartDenoisingLM(
        tokenizer, 100, START, 0.3, 1.0, poisson_lambda
    )
    zero = math.exp(-poisson_lambda)
    chances = [
        math.exp(k * math.log(poisson_lambda) - poisson_lambda - math.lgamma(k + 1))
        for k in range(1, 80)
    ]
    for table, first, expected in (
        (collator.lengths, 1, np.array(chances) / (1 - zero)),
        (collator.zeros, 0, (1 - zero) * zero ** np.arange(80.0)),
    ):
        counts = np.bincount(table)[first : first + len(expected)]
        assert len(table) == 65536
        np.testing.assert_allclose(counts, 65536 * expected[: len(counts)], atol=1.01)
        assert counts.sum() == pytest.approx(65536 * expected.sum(), abs=1)
    # Both together are all draws of a Poisson distribution, one in exp(lambda) of length 0.
    num_zeros, num_others, mean = collator.zeros.mean(), 1, collator.lengths.mean()
    assert num_zeros / (num_zeros + num_others) == pytest.approx(zero, abs=1e-4)
    assert mean / (num_zeros + num_others) == pytest.approx(poisson_lambda, rel=1e-3)


@pytest.mark.parametrize(
    ("probability", "poisson_lambda", "document"),
    [(0.3, 3.0, 1e12), (0.3, 3.0, 12), (0.15, 1.0, 1e12), (0.6, 0.2, 30)],
    ids=["as the paper", "short documents", "short spans", "more zeros than room"],
)
def test_infilling_is_that_of_the_slow_reference(tokenizer, probability, poisson_lambda, document):
    """Distributions of what is seen: tokens hidden and masks between neighbours, the length, the places of masks."""
    rows, length = 1500, 60
    examples = make_rows(rows, length, seed=6, document=document)
    arguments = (probability, 0.0, poisson_lambda)
    collator = bart.FlaxDataCollatorForBartDenoisingLM(tokenizer, length, START, *arguments)
    rng, found = random.Random(7), []
    fast = shown_rows(collator(examples, generator(8)))
    plain = zip(*(array.tolist() for array in examples.values()), strict=True)
    slow = [denoise_row(*row, rng, *arguments) for row in plain]
    for all_shown in (fast, slow):
        stretches, lengths, places, inserted = Counter(), Counter(), Counter(), 0
        for row, shown in zip(examples["input_ids"].tolist(), all_shown, strict=True):
            for hidden, masks in groups(row, shown):
                stretches[hidden, masks] += 1
                inserted += masks if not hidden else 0
                assert masks >= (hidden > 0)
            lengths[len(shown)] += 1
            places.update(
                10 * place // len(shown) for place, token in enumerate(shown) if token == MASK
            )
            special = [token for token in row if token in (BOS, EOS)]
            assert [token for token in shown if token in (BOS, EOS)] == special
        assert inserted > 50
        found.append((stretches, lengths, places))
    for a, b in zip(*found, strict=True):
        assert_same_distribution(a, b)


def test_one_mask_token_stands_for_a_span(tokenizer):
    """The mean over all spans: lambda of tokens hidden for each mask token, those of no token counted."""
    examples = one_document(400, 1024)
    collator = bart.FlaxDataCollatorForBartDenoisingLM(
        tokenizer, 1024, START, permute_sentence_ratio=0.0
    )
    shown = shown_rows(collator(examples, generator(9)))
    masks = sum(row.count(MASK) for row in shown)
    hidden = 400 * round(0.3 * 1024)
    assert sum(map(len, shown)) == 400 * 1024 - hidden + masks
    assert hidden / masks == pytest.approx(
        3.0, rel=0.02
    )  # the last of about 100 spans of a row is cut
    stretches = [
        found
        for row, x in zip(examples["input_ids"], shown, strict=True)
        for found in groups(row, x)
    ]
    assert sum(found[1] == 1 for found in stretches) > 0.6 * masks  # most stand by themselves


def test_masks_are_everywhere_alike(tokenizer):
    """Each tenth of the tokens is hidden as often as another; less at the ends, where no span comes from outside."""
    rows, length = 30_000, 100
    examples = {"input_ids": np.tile(np.arange(5, 5 + length, dtype=np.int32), (rows, 1))}
    examples["starts_sentence"] = np.zeros((rows, length), bool)
    collator = bart.FlaxDataCollatorForBartDenoisingLM(tokenizer, length, START, 0.3, 0.0)
    hidden = rows - np.bincount(collator(examples, generator(11))["input_ids"].ravel())[5:]
    assert hidden.sum() == rows * 30
    hidden = hidden.reshape(10, 10).sum(axis=1)
    np.testing.assert_allclose(
        hidden[1:-1], hidden[1:-1].mean(), rtol=0.022
    )  # the standard deviation: 0.0042
    np.testing.assert_allclose(hidden, rows * 3, rtol=0.1)


def test_pieces_of_documents_and_unknown_words(tokenizer):
    """A row that starts and ends within documents; the unknown word is a word, a mask token in the text as well."""
    row = [10, 11, UNK, 13, EOS, BOS, 16, MASK, 18, 19]
    examples = {
        "input_ids": np.array([row] * 500, np.int32),
        "starts_sentence": np.zeros((500, 10), bool),
    }
    examples["starts_sentence"][:, [2, 8]] = True
    collator = bart.FlaxDataCollatorForBartDenoisingLM(tokenizer, 10, START, 1e-9)
    orders = {tuple(shown) for shown in shown_rows(collator(examples, generator()))}
    first, second = ([10, 11, UNK, 13], [UNK, 13, 10, 11]), ([16, MASK, 18, 19], [18, 19, 16, MASK])
    assert orders == {(*a, EOS, BOS, *b) for a in first for b in second}


# ---------------------------------------------------------------------------------------------------------- data

TEXT = (
    '  The cat sat on the mat. Dr. Smith did not see it!  "Was it there?" she asked.\n\nNobody knew; the naïve dog '
    "slept… Then 3.5 mice came. The end"
)


def split(text: str) -> list[str]:
    """The sentences that sentencex finds, white space at the front."""
    sentences, rest = [], text.rstrip()
    for sentence in sentencex.segment("en", text.rstrip()):
        if sentence.strip():
            end = rest.index(sentence.strip()) + len(sentence.strip())
            sentences.append(rest[:end])
            rest = rest[end:]
    assert rest == ""
    return sentences


def test_sentences_are_marked_and_tokens_stay_as_they_are(roberta_dir):
    tokenizer = AutoTokenizer.from_pretrained(roberta_dir)
    sentences = split(TEXT)
    assert len(sentences) == 5
    assert bart.mark_sentences(TEXT, "en", "|") == "|".join(sentences)
    texts = [TEXT, None, "", "  \n", "One sentence", "Two. Sentences."]
    encoded = bart.encode({"text": texts}, tokenizer, "en")
    texts = [TEXT, "One sentence", "Two. Sentences."]
    for text, ids in zip(texts, encoded["input_ids"], strict=True):
        ids, is_mark = np.array(ids), np.array(ids) == tokenizer.pad_token_id
        assert ids[~is_mark].tolist() == tokenizer(text.rstrip())["input_ids"]
        parts = np.split(ids, np.flatnonzero(is_mark))
        assert [tokenizer.decode(part, skip_special_tokens=True) for part in parts] == split(text)


def test_special_tokens_where_the_tokenizer_adds_none(tmp_path):
    tokenizer = word_tokenizer(tmp_path)
    batch = {"text": ["w1 w2 w3", "w4"]}
    expected = [tokenizer(text)["input_ids"] for text in batch["text"]]
    assert bart.encode(batch, tokenizer, "en")["input_ids"] == expected
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", special_tokens=[]
    )
    assert BOS not in tokenizer("w1")["input_ids"]
    assert bart.encode(batch, tokenizer, "en")["input_ids"] == expected
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s> w5", special_tokens=[("</s>", EOS), ("w5", 10)]
    )  # as mBART's, which ends a text with its language
    assert [ids[-2:] for ids in bart.encode(batch, tokenizer, "en")["input_ids"]] == 2 * [[EOS, 10]]
    without_bos = word_tokenizer(tmp_path / "without", without=("bos",))
    without_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", special_tokens=[]
    )
    assert [
        [ids[0], ids[-1]] for ids in bart.encode(batch, without_bos, "en")["input_ids"]
    ] == 2 * [[EOS, EOS]]


def parse(directory, *flags):
    model = [
        f"--config_name={directory}",
        f"--tokenizer_name={directory}",
        "--output_dir=not-written",
    ]
    return bart.parse_args([*model, "--train_file=none.txt", *flags])


@pytest.fixture(scope="module")
def sequences(tmp_path_factory, roberta_dir):
    """50 blocks of 16 tokens, out of documents of several sentences, and these tokens one after the other."""
    tokenizer, directory = (
        AutoTokenizer.from_pretrained(roberta_dir),
        tmp_path_factory.mktemp("data"),
    )
    texts = [f"Here is text {i}. It has one. " + i % 4 * "And there is more! " for i in range(60)]
    (directory / "train.txt").write_text("".join(text + "\n" for text in texts))
    args = parse(
        roberta_dir,
        f"--train_file={directory / 'train.txt'}",
        "--do_train",
        "--validation_split_percentage=0",
    )
    train, _ = bart.load_texts(args)
    found = bart.tokenize(train, tokenizer, 16, args, 50, "tested")
    assert len(found.ends) == 50
    return (
        found,
        np.array([token for text in texts for token in tokenizer(text.rstrip())["input_ids"]]),
        tokenizer,
    )


def test_blocks_are_all_documents_end_to_end(sequences):
    found, tokens, tokenizer = sequences
    collator = bart.FlaxDataCollatorForBartDenoisingLM(tokenizer, 16, START)
    batches = list(bart.eval_batches(found, collator, 42, 2))
    labels = np.concatenate([batch["labels"].reshape(-1, 16) for batch in batches])
    assert len(batches) == 4
    assert labels.shape == (64, 16)
    assert (labels[:50].reshape(-1) == tokens[: 50 * 16]).all()
    assert (labels[50:] == -100).all()
    assert found.starts_sentence[:100].sum() > 5


def test_layouts_share_their_rows_and_noise(monkeypatch, sequences):
    found, _, tokenizer = sequences
    collator = bart.FlaxDataCollatorForBartDenoisingLM(tokenizer, 16, START)
    flat = lambda batch: {name: array.reshape(-1, 16) for name, array in batch.items()}  # noqa: E731
    eight = [flat(batch) for batch in bart.train_batches(found, collator, 0, range(4), (1, 4))]
    folded = [flat(batch) for batch in bart.train_batches(found, collator, 0, range(4), (2, 2))]
    evaluated = [flat(batch) for batch in bart.eval_batches(found, collator, 0, 1)]
    rest = flat(next(bart.train_batches(found, collator, 0, range(3, 4), (1, 4))))
    for name in ("device_count", "local_device_count"):
        monkeypatch.setattr(bart.jax, name, lambda: 1)
    one = [flat(batch) for batch in bart.train_batches(found, collator, 0, range(4), (1, 32))]
    alone = [flat(batch) for batch in bart.eval_batches(found, collator, 0, 1)]
    for name in ("input_ids", "attention_mask", "decoder_input_ids", "labels"):
        assert all((a[name] == b[name]).all() for a, b in zip(eight, folded, strict=True))
        assert all((a[name] == b[name]).all() for a, b in zip(eight, one, strict=True))
        assert (rest[name] == eight[3][name]).all()
        several, single = (
            np.concatenate([batch[name] for batch in x])[:50] for x in (evaluated, alone)
        )
        assert (several == single).all()
    assert (eight[0]["input_ids"] != eight[1]["input_ids"]).any()


@pytest.mark.parametrize("missing", ["mask", "pad", "eos"])
def test_a_tokenizer_without_a_token_that_is_needed(tmp_path, missing):
    word_tokenizer(tmp_path, without=(missing,))
    BartConfig(vocab_size=100).save_pretrained(tmp_path)
    with pytest.raises(bart.InputError, match=rf"{tmp_path}: .*\b{missing} token"):
        bart.load_config_and_tokenizer(parse(tmp_path))


def test_a_tokenizer_whose_pad_token_is_eos(tmp_path):
    tokenizer = word_tokenizer(tmp_path)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    BartConfig(vocab_size=100).save_pretrained(tmp_path)
    with pytest.raises(bart.InputError, match=rf"{tmp_path}: .*pad token.*eos token"):
        bart.load_config_and_tokenizer(parse(tmp_path))


def test_which_token_the_decoder_starts_from(tmp_path):
    word_tokenizer(tmp_path)
    BartConfig(vocab_size=100, decoder_start_token_id=START).save_pretrained(tmp_path)
    assert bart.load_config_and_tokenizer(parse(tmp_path))[0].decoder_start_token_id == START
    MBartConfig(vocab_size=100).save_pretrained(
        tmp_path
    )  # which has none: the last token of a text
    assert (
        bart.load_config_and_tokenizer(parse(tmp_path, "--model_type=mbart"))[
            0
        ].decoder_start_token_id
        == EOS
    )
    BartConfig(vocab_size=100, decoder_start_token_id=100).save_pretrained(tmp_path)
    with pytest.raises(bart.InputError, match="decoder_start_token_id"):
        bart.load_config_and_tokenizer(parse(tmp_path))


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_layerdrop_is_refused(tmp_path, side):
    """Flax's BART would draw the layers to drop once, while it is compiled, and fail if there was one."""
    word_tokenizer(tmp_path)
    BartConfig(vocab_size=100, **{f"{side}_layerdrop": 0.1}).save_pretrained(tmp_path)
    with pytest.raises(bart.InputError, match=rf"{tmp_path}: .*layerdrop"):
        bart.load_config_and_tokenizer(parse(tmp_path))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_reference_files_are_refused(tmp_path, split):
    with pytest.raises(bart.InputError, match=rf"--{split}_ref_file refs\.txt"):
        parse(tmp_path, f"--{split}_ref_file=refs.txt")


# ---------------------------------------------------------------------------------------------------------- loss

VOCAB_SIZE, LENGTH, BATCH = 101, 30, 3  # a prime; 90 positions are not a multiple of the pieces
SIZES = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 40, "dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1,
}  # fmt: skip


def make_model(family: str, **settings):
    """A tiny model, and parameters that all matter: initialized ones have biases of zero and scales of one."""
    config = CONFIG_MAPPING[family](**{**SIZES, **settings})
    model = FlaxAutoModelForSeq2SeqLM.from_config(config, _do_init=False)
    rng = np.random.default_rng(0)
    params = {
        path: np.float32(path[-1] == "scale") + 0.1 * rng.standard_normal(x.shape, np.float32)
        for path, x in flatten_dict(model.params_shape_tree).items()
    }
    return model, jax.tree.map(jnp.asarray, unflatten_dict(params))


def compiled(function, *args):
    """In half the time, for programs that run once; with the optimizations that change shapes."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function).lower(*args).compile(options)


def make_batch():
    rng = np.random.default_rng(1)
    names = ("input_ids", "decoder_input_ids", "labels")
    batch = {name: rng.integers(0, VOCAB_SIZE, (BATCH, LENGTH), dtype=np.int32) for name in names}
    batch["attention_mask"] = (np.arange(LENGTH) < [[30], [21], [4]]).astype(np.int32)
    batch["labels"][1, 20:], batch["labels"][2] = -100, -100
    return jax.tree.map(jnp.asarray, batch)


def full_loss(params, batch, model, **mode):
    """Logits of all positions, log-softmax, and the labels' part of it."""
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    logits = model(**inputs, params=params, return_dict=True, **mode).logits.astype(jnp.float32)
    predicted = batch["labels"] != -100
    one_hot = jax.nn.one_hot(batch["labels"], VOCAB_SIZE)  # of zeros for -100
    accuracy = (predicted & (logits.argmax(-1) == batch["labels"])).sum()
    return -(jax.nn.log_softmax(logits) * one_hot).sum(), (predicted.sum(), accuracy)


@cache
def programs(tied: bool):
    """Parameters, as a flat dictionary, and two compiled functions of some of them: losses and gradients in training
    and losses in evaluation, those of the script and those of the full computation, which are of the same dropout as
    the key is the same. If `tied` is false, of the head and what comes before it alone, as that compiles faster."""
    model, params = make_model("bart", tie_word_embeddings=tied, return_dict=tied)
    batch, key, params = make_batch(), jax.random.key(0, impl="rbg"), flatten_dict(params)
    last = lambda path: "lm_head" in path or {"decoder", "final_layer_norm"} <= {*path}  # noqa: E731
    some = {path: x for path, x in params.items() if tied or last(path)}

    def both(function, evaluation, some):
        whole = lambda some: unflatten_dict(params | some)  # noqa: E731
        train = jax.value_and_grad(lambda some: function(whole(some)), has_aux=True)
        return *train(some), evaluation(whole(some))

    def pieces(some):
        train = lambda params: bart.loss_sums(params, batch, model, False, key)  # noqa: E731
        return both(train, lambda params: bart.loss_sums(params, batch, model, False)[1], some)

    def full(some):
        train = lambda params: full_loss(params, batch, model, train=True, dropout_rng=key)  # noqa: E731
        return both(train, lambda params: full_loss(params, batch, model), some)

    return some, compiled(pieces, some), compiled(full, some)


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_equal_the_full_computation(tied):
    params, pieces, full = programs(tied)
    (loss, sums), grads, eval_sums = pieces(params)
    (expected, (predicted, _)), expected_grads, (expected_eval, (_, accuracy)) = full(params)
    assert set(sums) == {"loss", "predicted"}
    assert loss == sums["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert sums["predicted"] == predicted == 50
    assert_equal_gradients(grads, expected_grads)
    assert expected != expected_eval  # by dropout
    assert eval_sums["loss"] == pytest.approx(float(expected_eval), rel=1e-5)
    assert (eval_sums["predicted"], eval_sums["accuracy"]) == (predicted, accuracy)
    assert all(x.dtype == jnp.float32 for x in (*sums.values(), *eval_sums.values()))


def test_loss_of_mbart_equals_the_full_computation():
    """It normalizes the hidden states once more, after the last layer."""
    model, params = make_model("mbart")
    batch = make_batch()
    both = compiled(
        lambda x: (bart.loss_sums(x, batch, model, False)[1], full_loss(x, batch, model)), params
    )
    sums, (expected, (predicted, accuracy)) = both(params)
    assert sums["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert (sums["predicted"], sums["accuracy"]) == (predicted, accuracy)


def assert_equal_gradients(grads, expected):
    assert grads.keys() == expected.keys()
    largest = max(float(jnp.abs(x).max()) for x in expected.values())
    for path, value in expected.items():
        np.testing.assert_allclose(
            grads[path], value, rtol=1e-4, atol=1e-6 * largest, err_msg=str(path)
        )


def test_the_logits_of_a_batch_never_exist_at_once():
    """Shapes in the compiled program; that of the full computation has them, so that the search can fail."""
    _, pieces, full = programs(True)
    whole = (f"[{BATCH},{LENGTH},{VOCAB_SIZE}]", f"[{BATCH * LENGTH},{VOCAB_SIZE}]")
    assert any(shape in full.as_text() for shape in whole)
    assert not any(shape in pieces.as_text() for shape in whole)
    assert f"[{math.ceil(BATCH * LENGTH / bart.PIECES)},{VOCAB_SIZE}]" in pieces.as_text()


def test_gradient_checkpointing_changes_no_gradient():
    """The dropout of what is computed again is the same: another would give other gradients."""
    model, _ = make_model("bart")
    params, plain, _ = programs(True)
    batch, key = make_batch(), jax.random.key(0, impl="rbg")
    recomputed = jax.grad(
        lambda x: bart.loss_sums(unflatten_dict(x), batch, model, True, key), has_aux=True
    )
    grads, sums = compiled(recomputed, params)(params)
    (loss, _), expected_grads, _ = plain(params)
    assert sums["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert_equal_gradients(grads, expected_grads)


@pytest.mark.parametrize("family", ["bart", "mbart"])
def test_gradient_checkpointing_keeps_the_input_of_a_layer_alone(family):
    """Of what one layer more on each side adds to what the forward pass leaves to the backward pass."""

    def kept(checkpointing: bool, layers: int) -> int:
        model, params = make_model(family, encoder_layers=layers, decoder_layers=layers)
        batch, key = make_batch(), jax.random.key(0, impl="rbg")
        function = lambda params: bart.loss_sums(params, batch, model, checkpointing, key)[0]  # noqa: E731
        backward = jax.eval_shape(lambda params: jax.vjp(function, params)[1], params)
        shapes = [x.shape for x in jax.tree.leaves(backward)]
        return sum(
            math.prod(shape) for shape in shapes if shape[:1] == (BATCH,)
        )  # not those of the parameters

    inputs = 2 * BATCH * LENGTH * SIZES["d_model"]
    plain, recomputed = (kept(x, layers=2) - kept(x, layers=1) for x in (False, True))
    assert plain > 10 * inputs
    assert inputs <= recomputed <= 1.1 * inputs


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_softmax_and_loss_are_float32_in_every_dtype(dtype):
    """From the hidden states that the model gives in half precision, against float64: that would be off by more."""
    model, params = make_model("bart")
    model = FlaxAutoModelForSeq2SeqLM.from_config(model.config, dtype=dtype, _do_init=False)
    batch = make_batch()
    inputs = {name: x for name, x in batch.items() if name != "labels"}

    def states_and_loss(params):
        states = model(**inputs, params=params, output_hidden_states=True).decoder_hidden_states[-1]
        return states, bart.loss_sums(params, batch, model, False)

    states, (loss, sums) = compiled(states_and_loss, params)(params)
    assert states.dtype == dtype
    kernel = np.asarray(params["model"]["shared"]["embedding"].astype(dtype), np.float64).T
    exact = np.asarray(states, np.float64) @ kernel + np.asarray(
        params["final_logits_bias"], np.float64
    )
    labels = np.asarray(batch["labels"])
    picked = np.take_along_axis(exact, np.maximum(labels, 0)[..., None], -1)[..., 0]
    losses = np.log(np.exp(exact).sum(-1)) - picked
    assert loss.dtype == jnp.float32
    assert loss == pytest.approx(losses[labels != -100].sum(), rel=2e-6)
    assert sums["predicted"] == (labels != -100).sum()
