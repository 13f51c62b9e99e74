"""The objective of run_bart_dlm_flax.py against independent references.

Sentence permutation and infilling are compared with a slow reference, the loss with the full
computation. Statistics have to be within 5 standard deviations, see test_mlm_objective.py.
Chi-squared statistics are made normal by the cube root of Wilson and Hilferty: (X / k) ** (1/3)
has the mean 1 - 2 / (9 k) and the variance 2 / (9 k).
"""

import math
import random
import re
from collections import Counter
from functools import cache
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencex
from bart_reference import NUM_WORDS, denoise_row, documents, make_rows
from distributions import assert_distribution, assert_same_distribution
from flax.traverse_util import flatten_dict, unflatten_dict
from gradients import random_params
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from training_scripts import word_tokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    BartConfig,
    FlaxAutoModelForSeq2SeqLM,
    MBartConfig,
    PreTrainedTokenizerFast,
)

import run_bart_dlm_flax as bart

BOS, PAD, EOS, UNK, MASK = range(5)

# The token the decoder starts from. No row starts with it, so a test can tell it apart.
START = 7


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return word_tokenizer(tmp_path_factory.mktemp("words"), num_words=NUM_WORDS)


def one_document(rows: int, length: int, seed: int = 0):
    return make_rows(rows, length, seed, document=1e12)


def make_collator(tokenizer, length: int, *arguments, **named_arguments):
    return bart.FlaxDataCollatorForBartDenoisingLM(
        tokenizer, length, START, *arguments, **named_arguments
    )


def add_noise(collator, examples, seed: int = 0, first_number: int = 0):
    """Collate sequences that are numbered from `first_number`."""
    numbers = range(first_number, first_number + len(examples["input_ids"]))
    return collator(examples, bart.sequence_generators((seed,), numbers))


# ----------------------------------------------------------------------------------- slow reference


# ------------------------------------------------------------------------------------------ helpers


def special_tokens(tokens) -> list[int]:
    """The tokens that bound documents."""
    return [token for token in tokens if token in (BOS, EOS)]


def shown_rows(batch) -> list[list[int]]:
    """What the encoder sees, without the padding. Check the padding and the attention mask."""
    input_ids = batch["input_ids"]
    attention_mask = batch["attention_mask"]
    lengths = attention_mask.sum(axis=1)
    assert (attention_mask == (np.arange(input_ids.shape[1]) < lengths[:, None])).all()
    assert (input_ids[attention_mask == 0] == PAD).all()
    return [row[:length].tolist() for row, length in zip(input_ids, lengths, strict=True)]


def groups(row, shown) -> list[tuple[int, int]]:
    """Hidden tokens and mask tokens in each gap between two tokens of `row` that are shown.

    Each item is (number of hidden tokens, number of mask tokens that stand for them). Sentences
    have to be in their original order.
    """
    places = {token: position for position, token in enumerate(row) if token not in (BOS, EOS, PAD)}
    found = []
    last = -1
    num_masks = 0
    for token in [*shown, None]:
        if token == MASK:
            num_masks += 1
        elif token not in (BOS, EOS):
            position = len(row) if token is None else places[token]
            assert position > last
            hidden = [x for x in row[last + 1 : position] if x not in (BOS, EOS, PAD)]
            found.append((len(hidden), num_masks))
            last = position
            num_masks = 0
    return found


# ------------------------------------------------------------------------------------- every length


def make_any_rows(rng: random.Random, length: int):
    """Nine rows of random sentences and documents, some with padding, one with an unknown word."""
    seed = rng.randrange(10**6)
    sentence = rng.choice([1, 3, 20])
    document = rng.choice([2, 10, 1000])
    examples = make_rows(9, length, seed, sentence, document)
    examples["input_ids"][:3, rng.randrange(length) + 1 :] = PAD
    examples["input_ids"][3, rng.randrange(length)] = UNK
    return examples


def check_row(row: list[int], starts_sentence, shown: list[int], probability: float):
    """Check what the encoder sees of one row."""
    special = special_tokens(row)
    assert special_tokens(shown) == special
    ordinary = [token for token in row if token not in (BOS, EOS, PAD)]
    kept = [token for token in shown if token not in (BOS, EOS, MASK)]
    num_masked = round(probability * len(ordinary))
    assert len(kept) == len(ordinary) - num_masked
    assert not Counter(kept) - Counter(ordinary)
    # No token is pushed out of the row.
    assert len(kept) + len(special) + shown.count(MASK) == len(shown) <= len(row)

    # Each document shows its own tokens only, and a mask token if any of them is hidden.
    seen = [[]]
    for token in shown:
        if token in (BOS, EOS):
            seen.append([])
        else:
            seen[-1].append(token)
    seen = [tokens for tokens in seen if tokens]
    texts = []
    for document in documents(row, starts_sentence):
        texts.append([row[position] for sentence in document for position in sentence])
    assert len(seen) == len(texts)
    for tokens, text in zip(seen, texts, strict=True):
        assert set(tokens) <= {*text, MASK}
        assert MASK in tokens or len(tokens) == len(text)


@pytest.mark.parametrize("seed", range(12))
def test_properties_at_every_length(tokenizer, seed):
    rng = random.Random(seed)
    for _ in range(25):
        length = rng.choice([1, 2, 3, 5, 8, 17, 64, 200])
        probability = rng.choice([0.001, 0.1, 0.3, 0.5, 0.99])
        ratio = rng.choice([0.0, 0.3, 1.0])
        poisson_lambda = rng.choice([1e-9, 0.05, 1.0, 3.0, 50.0, 1e6])
        examples = make_any_rows(rng, length)
        original = {name: array.copy() for name, array in examples.items()}
        max_length = rng.choice([length, length + 10])
        collator = make_collator(tokenizer, max_length, probability, ratio, poisson_lambda)
        batch = add_noise(collator, examples, seed)
        assert set(batch) == {"input_ids", "attention_mask", "decoder_input_ids", "labels"}
        for array in batch.values():
            assert array.shape == (9, length)
            assert array.dtype == np.int32
        for name, array in original.items():
            assert (examples[name] == array).all()
        for i, shown in enumerate(shown_rows(batch)):
            row = original["input_ids"][i].tolist()
            assert batch["labels"][i].tolist() == [-100 if token == PAD else token for token in row]
            assert batch["decoder_input_ids"][i].tolist() == [START, *row[:-1]]
            check_row(row, original["starts_sentence"][i], shown, probability)


def test_noise_is_a_function_of_the_seed_and_of_no_layout(tokenizer):
    """A part of the rows gets the same noise alone."""
    examples = make_rows(48, 96)
    collator = make_collator(tokenizer, 96)
    whole = add_noise(collator, examples, 3)
    again = add_noise(collator, examples, 3)
    other = add_noise(collator, examples, 4)
    assert all((whole[name] == again[name]).all() for name in whole)
    assert (whole["input_ids"] != other["input_ids"]).any(axis=1).all()
    for start in range(0, 48, 16):
        part = {name: array[start : start + 16] for name, array in examples.items()}
        noised = add_noise(collator, part, 3, start)
        for name, array in whole.items():
            assert (noised[name] == array[start : start + 16]).all()


# -------------------------------------------------------------------------------------- permutation


def shown_order(sentences, row, shown) -> tuple[int, ...]:
    """The numbers of a document's sentences in the order in which they are shown."""
    numbers = {row[sentence[0]]: number for number, sentence in enumerate(sentences)}
    place = sentences[0][0]
    end = sentences[-1][-1]
    order = []
    while place <= end:
        # A KeyError means that no sentence of this document starts here.
        number = numbers[shown[place]]
        sentence = sentences[number]
        assert shown[place : place + len(sentence)] == row[sentence].tolist()
        place += len(sentence)
        order.append(number)
    return tuple(order)


def permuted_documents(tokenizer, examples, ratio: float):
    """Yield the sentences of each document and the order in which they are shown, unmasked."""
    length = examples["input_ids"].shape[1]
    collator = make_collator(tokenizer, length, 1e-9, ratio)
    batch = add_noise(collator, examples, 1)
    for row, starts_sentence, shown in zip(*examples.values(), shown_rows(batch), strict=True):
        special = np.isin(row, (BOS, EOS))
        assert (np.array(shown)[special] == row[special]).all()
        for sentences in documents(row.tolist(), starts_sentence):
            yield sentences, shown_order(sentences, row, shown)


def count_moved(order) -> int:
    return sum(number != place for place, number in enumerate(order))


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.5, 0.75, 1.0])
def test_only_whole_sentences_of_a_document_change_places(tokenizer, ratio):
    num_moved = 0
    for sentences, order in permuted_documents(tokenizer, make_rows(200, 128, seed=2), ratio):
        assert sorted(order) == list(range(len(sentences)))
        elsewhere = count_moved(order)
        assert elsewhere <= math.ceil(ratio * len(sentences))
        num_moved += elsewhere
    assert (num_moved > 100) == (ratio >= 0.5)


def test_how_many_sentences_move_is_not_off_by_a_rounding_error(tokenizer):
    assert 0.55 * 100 > 55
    examples = one_document(50, 100)
    examples["starts_sentence"][:] = True
    orders = [order for _, order in permuted_documents(tokenizer, examples, 0.55)]
    assert all(len(order) == 100 for order in orders)
    assert max(map(count_moved, orders)) == 55


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_permutations_are_uniform(tokenizer, ratio):
    """Four sentences of three tokens. With a ratio of a half, two of them are swapped or not."""
    examples = one_document(6000, 12)
    examples["starts_sentence"][:] = np.arange(12) % 3 == 0
    orders = Counter(order for _, order in permuted_documents(tokenizer, examples, ratio))
    chances = dict.fromkeys(permutations(range(4)), 1 / 24)
    if ratio == 0.5:
        chance_of_moved = {0: 1 / 2, 2: 1 / 12}
        chances = {order: chance_of_moved.get(count_moved(order), 0) for order in chances}
        chances = {order: chance for order, chance in chances.items() if chance}
    assert set(orders) == set(chances)
    assert_distribution([orders[order] for order in chances], list(chances.values()))


# ---------------------------------------------------------------------------------------- infilling


@pytest.mark.parametrize("poisson_lambda", [0.3, 1.0, 3.0, 20.0])
def test_span_lengths_are_poisson(tokenizer, poisson_lambda):
    """Long spans of time have Poisson draws, but for the last length, which is cut to fit."""
    total = 2000
    collator = make_collator(tokenizer, total, 0.3, 1.0, poisson_lambda)
    rng = np.random.default_rng(17)
    counts = Counter()
    for _ in range(100):
        lengths, num_empty = collator.draw_span_lengths(total, rng)
        assert lengths.sum() == total
        assert lengths.min() > 0
        counts.update(lengths.tolist())
        counts[0] += num_empty

    log_chances = [
        k * math.log(poisson_lambda) - poisson_lambda - math.lgamma(k + 1) for k in range(80)
    ]
    chances = np.exp(log_chances)
    assert_distribution([counts[k] for k in range(80)], chances)


@pytest.mark.parametrize("total", [0, 1, 2])
def test_few_span_lengths_sum_to_the_total(tokenizer, total):
    collator = make_collator(tokenizer, 10)
    lengths, num_empty = collator.draw_span_lengths(total, np.random.default_rng(0))
    assert lengths.sum() == total
    assert total or num_empty == 0


def infilling_statistics(rows, all_shown) -> tuple[Counter, Counter, Counter]:
    """Count gaps by hidden tokens and masks, lengths of rows, and mask tokens in each tenth."""
    gaps = Counter()
    lengths = Counter()
    places = Counter()
    num_inserted = 0
    for row, shown in zip(rows, all_shown, strict=True):
        for num_hidden, num_masks in groups(row, shown):
            gaps[num_hidden, num_masks] += 1
            if not num_hidden:
                num_inserted += num_masks
            assert num_masks >= (num_hidden > 0)
        lengths[len(shown)] += 1
        masks = [place for place, token in enumerate(shown) if token == MASK]
        places.update(10 * place // len(shown) for place in masks)
        assert special_tokens(shown) == special_tokens(row)
    assert num_inserted > 50
    return gaps, lengths, places


@pytest.mark.parametrize(
    ("probability", "poisson_lambda", "document"),
    [(0.3, 3.0, 1e12), (0.3, 3.0, 12), (0.15, 1.0, 1e12), (0.6, 0.2, 30)],
    ids=["as the paper", "short documents", "short spans", "more zeros than room"],
)
def test_infilling_is_that_of_the_slow_reference(tokenizer, probability, poisson_lambda, document):
    """The distributions of gaps, of lengths and of the places of mask tokens are the same."""
    length = 60
    examples = make_rows(1500, length, seed=6, document=document)
    arguments = (probability, 0.0, poisson_lambda)
    collator = make_collator(tokenizer, length, *arguments)
    fast = shown_rows(add_noise(collator, examples, 8))
    rng = random.Random(7)
    rows = examples["input_ids"].tolist()
    slow = [
        denoise_row(row, starts_sentence, rng, *arguments)
        for row, starts_sentence in zip(rows, examples["starts_sentence"].tolist(), strict=True)
    ]
    fast_statistics = infilling_statistics(rows, fast)
    slow_statistics = infilling_statistics(rows, slow)
    for first, second in zip(fast_statistics, slow_statistics, strict=True):
        assert_same_distribution(first, second)


def test_one_mask_token_stands_for_a_span(tokenizer):
    """On average lambda tokens are hidden for each mask token, spans of length 0 included."""
    examples = one_document(400, 1024)
    collator = make_collator(tokenizer, 1024, permute_sentence_ratio=0.0)
    shown = shown_rows(add_noise(collator, examples, 9))
    num_masks = sum(row.count(MASK) for row in shown)
    num_hidden = 400 * round(0.3 * 1024)
    assert sum(map(len, shown)) == 400 * 1024 - num_hidden + num_masks
    # The last of about 100 spans of a row is cut, so the mean is a little smaller than lambda.
    assert num_hidden / num_masks == pytest.approx(3.0, rel=0.02)
    num_single = 0
    for row, shown_row in zip(examples["input_ids"], shown, strict=True):
        num_single += sum(masks == 1 for _, masks in groups(row, shown_row))
    # Most mask tokens have no other one beside them.
    assert num_single > 0.6 * num_masks


def test_tokens_are_hidden_equally_often_everywhere(tokenizer):
    """Each tenth of a row is hidden equally often.

    The ends are hidden less often, since no span reaches into them from outside.
    """
    rows = 30_000
    length = 100
    examples = {
        "input_ids": np.tile(np.arange(5, 5 + length, dtype=np.int32), (rows, 1)),
        "starts_sentence": np.zeros((rows, length), bool),
    }
    collator = make_collator(tokenizer, length, 0.3, 0.0)
    input_ids = add_noise(collator, examples, 11)["input_ids"]
    hidden = rows - np.bincount(input_ids.ravel())[5:]
    assert hidden.sum() == rows * 30
    hidden = hidden.reshape(10, 10).sum(axis=1)
    # The standard deviation is 0.0042.
    np.testing.assert_allclose(hidden[1:-1], hidden[1:-1].mean(), rtol=0.022)
    np.testing.assert_allclose(hidden, rows * 3, rtol=0.1)


def test_pieces_of_documents_and_unknown_words(tokenizer):
    """A row may start and end within documents, and unknown words and mask tokens are words."""
    row = [10, 11, UNK, 13, EOS, BOS, 16, MASK, 18, 19]
    examples = {
        "input_ids": np.array([row] * 500, np.int32),
        "starts_sentence": np.zeros((500, 10), bool),
    }
    examples["starts_sentence"][:, [2, 8]] = True
    collator = make_collator(tokenizer, 10, 1e-9)
    orders = {tuple(shown) for shown in shown_rows(add_noise(collator, examples))}
    first = ([10, 11, UNK, 13], [UNK, 13, 10, 11])
    second = ([16, MASK, 18, 19], [18, 19, 16, MASK])
    assert orders == {(*a, EOS, BOS, *b) for a in first for b in second}


# --------------------------------------------------------------------------------------------- data

TEXT = (
    '  The cat sat on the mat. Dr. Smith did not see it!  "Was it there?" she asked.\n\nNobody '
    "knew; the naïve dog slept… Then 3.5 mice came. The end"
)


def split(text: str) -> list[str]:
    """The sentences that sentencex finds, each with the white space before it."""
    rest = text.rstrip()
    sentences = []
    for sentence in sentencex.segment("en", text.rstrip()):
        if sentence.strip():
            end = rest.index(sentence.strip()) + len(sentence.strip())
            sentences.append(rest[:end])
            rest = rest[end:]
    assert rest == ""
    return sentences


def sentences_of(tokenizer, tokens: list[int], starts_sentence: list[int]) -> list[str]:
    """The text of each sentence, decoded."""
    parts = np.split(np.array(tokens), np.flatnonzero(starts_sentence))
    return [tokenizer.decode(part, skip_special_tokens=True) for part in parts]


@pytest.mark.parametrize("use_fast", [True, False])
def test_sentences_are_marked_and_tokens_stay_as_they_are(roberta_dir, use_fast):
    tokenizer = AutoTokenizer.from_pretrained(roberta_dir, use_fast=use_fast)
    assert tokenizer.is_fast == use_fast
    assert len(split(TEXT)) == 5
    texts = [TEXT, None, "", "  \n", "One sentence", "Two. Sentences.", " Space.  And more. \n"]
    found = bart.encode({"text": texts}, tokenizer, "en")
    not_blank = [text for text in texts if text and text.strip()]
    rows = zip(not_blank, found["input_ids"], found["starts_sentence"], strict=True)
    for text, tokens, marks in rows:
        assert tokens == tokenizer(text.rstrip())["input_ids"]
        sentences = [sentence.rstrip() for sentence in sentences_of(tokenizer, tokens, marks)]
        assert sentences == split(text)


@pytest.mark.parametrize("use_fast", [True, False])
def test_a_pad_token_in_the_text_is_left_out(roberta_dir, use_fast):
    tokenizer = AutoTokenizer.from_pretrained(roberta_dir, use_fast=use_fast)
    found = bart.encode({"text": [f"One {tokenizer.pad_token} two. Three."]}, tokenizer, "en")
    (tokens,) = found["input_ids"]
    assert tokenizer.pad_token_id in tokenizer(f"One {tokenizer.pad_token} two.")["input_ids"]
    assert tokenizer.pad_token_id not in tokens
    assert len(found["starts_sentence"][0]) == len(tokens)


def test_sentences_without_white_space_between_them(tmp_path):
    """A tokenizer such as mBART's puts a space before a text. None comes between two sentences."""
    sentences = ["你好。", "再见。", "我们走。"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=40, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator(sentences * 5, trainer)
    names = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{kind}_token": name for kind, name in names.items()}
    )
    text = "".join(sentences)
    found = bart.encode({"text": [text]}, tokenizer, "zh")
    (tokens,) = found["input_ids"]
    assert tokens == [BOS, *tokenizer(text)["input_ids"], EOS]
    (marks,) = found["starts_sentence"]
    found = ["".join(re.findall(r"[^▁ ]", part)) for part in sentences_of(tokenizer, tokens, marks)]
    assert found == sentences


def set_template(tokenizer, single: str, special_tokens=()):
    """Set which special tokens the tokenizer adds to a text."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=list(special_tokens)
    )


def test_special_tokens_where_the_tokenizer_adds_none(tmp_path):
    tokenizer = word_tokenizer(tmp_path)
    batch = {"text": ["w1 w2 w3", "w4"]}
    expected = [tokenizer(text)["input_ids"] for text in batch["text"]]
    assert bart.encode(batch, tokenizer, "en")["input_ids"] == expected
    set_template(tokenizer, "$A")
    assert BOS not in tokenizer("w1")["input_ids"]
    assert bart.encode(batch, tokenizer, "en")["input_ids"] == expected

    # A text may end with another token after eos, as mBART's ends with its language.
    set_template(tokenizer, "$A </s> w5", [("</s>", EOS), ("w5", 10)])
    encoded = bart.encode(batch, tokenizer, "en")["input_ids"]
    assert [ids[-2:] for ids in encoded] == 2 * [[EOS, 10]]

    # A text that holds eos itself says nothing about what the tokenizer adds.
    set_template(tokenizer, "$A")
    encoded = bart.encode({"text": ["w1 </s>", "w4"]}, tokenizer, "en")["input_ids"]
    assert [[ids[0], ids[-1]] for ids in encoded] == 2 * [[BOS, EOS]]

    without_bos = word_tokenizer(tmp_path / "without", without=("bos",))
    set_template(without_bos, "$A")
    encoded = bart.encode(batch, without_bos, "en")["input_ids"]
    assert [[ids[0], ids[-1]] for ids in encoded] == 2 * [[EOS, EOS]]


def test_a_token_for_unknown_words_that_also_ends_a_text_is_no_text(tmp_path):
    """As GPT-2's <|endoftext|>, which is bos, eos and unk."""
    tokenizer = word_tokenizer(tmp_path)
    assert make_collator(tokenizer, 16).is_text_id[tokenizer.unk_token_id]
    tokenizer.unk_token = tokenizer.eos_token
    collator = make_collator(tokenizer, 16)
    assert not collator.is_text_id[tokenizer.eos_token_id]
    assert collator.is_text_id[tokenizer.mask_token_id]


@pytest.mark.parametrize("kind", ["eos", "unk", "mask"])
def test_padding_with_a_token_of_text_is_refused(tmp_path, kind):
    tokenizer = word_tokenizer(tmp_path)
    bart.check_tokenizer(tokenizer)
    tokenizer.pad_token = getattr(tokenizer, f"{kind}_token")
    with pytest.raises(bart.InputError, match=f"its pad token is its {kind} token"):
        bart.check_tokenizer(tokenizer)


def parse(directory, *flags, train_file="none.txt"):
    model = [
        f"--config_name={directory}",
        f"--tokenizer_name={directory}",
        "--output_dir=not-written",
    ]
    return bart.parse_args([*model, f"--train_file={train_file}", *flags])


@pytest.fixture(scope="module")
def sequences(tmp_path_factory, roberta_dir):
    """50 blocks of 16 tokens, all tokens of their documents end to end, and the tokenizer.

    Each document has several sentences.
    """
    tokenizer = AutoTokenizer.from_pretrained(roberta_dir)
    train_file = tmp_path_factory.mktemp("data") / "train.txt"
    texts = [f"Here is text {i}. It has one. " + i % 4 * "And there is more! " for i in range(60)]
    train_file.write_text("".join(text + "\n" for text in texts))
    flags = ["--do_train", "--validation_split_percentage=0"]
    args = parse(roberta_dir, *flags, train_file=train_file)
    train, _ = bart.load_texts(args)
    found = bart.tokenize(train, tokenizer, 16, args, 50, "tested")
    assert len(found) == 50
    tokens = [token for text in texts for token in tokenizer(text.rstrip())["input_ids"]]
    return found, np.array(tokens), tokenizer


def test_blocks_are_all_documents_end_to_end(sequences):
    found, tokens, tokenizer = sequences
    collator = make_collator(tokenizer, 16)
    batches = list(bart.eval_batches(found, collator, 42, 2))
    labels = np.concatenate([batch["labels"].reshape(-1, 16) for batch in batches])
    assert len(batches) == 4
    assert labels.shape == (64, 16)
    assert (labels[:50].reshape(-1) == tokens[: 50 * 16]).all()
    assert (labels[50:] == -100).all()
    assert found.starts_sentence.read(np.array([0]), 100).sum() > 5


def flatten_batches(batches) -> list[dict]:
    """Give each array of each batch the shape [rows, 16]."""
    flat = []
    for batch in batches:
        flat.append({name: array.reshape(-1, 16) for name, array in batch.items()})
    return flat


def test_layouts_share_their_rows_and_noise(monkeypatch, sequences):
    found, _, tokenizer = sequences
    collator = make_collator(tokenizer, 16)

    def training(steps: range, shape: tuple[int, int]):
        return flatten_batches(bart.train_batches(found, collator, 0, steps, shape))

    def evaluation():
        return flatten_batches(bart.eval_batches(found, collator, 0, 1))

    eight_devices = training(range(4), (1, 4))
    accumulated = training(range(4), (2, 2))
    last_step = training(range(3, 4), (1, 4))[0]
    eval_eight_devices = evaluation()
    for name in ("device_count", "local_device_count"):
        monkeypatch.setattr(bart.jax, name, lambda: 1)
    one_device = training(range(4), (1, 32))
    eval_one_device = evaluation()

    for name in ("input_ids", "attention_mask", "decoder_input_ids", "labels"):
        for batch, other in zip(eight_devices, accumulated, strict=True):
            assert (batch[name] == other[name]).all()
        for batch, other in zip(eight_devices, one_device, strict=True):
            assert (batch[name] == other[name]).all()
        assert (last_step[name] == eight_devices[3][name]).all()
        # The rows behind the 50 sequences fill up the last batch.
        rows = np.concatenate([batch[name] for batch in eval_eight_devices])[:50]
        other_rows = np.concatenate([batch[name] for batch in eval_one_device])[:50]
        assert (rows == other_rows).all()
    assert (eight_devices[0]["input_ids"] != eight_devices[1]["input_ids"]).any()


@pytest.mark.parametrize("missing", ["mask", "pad", "eos"])
def test_a_tokenizer_without_a_required_token_is_refused(tmp_path, missing):
    word_tokenizer(tmp_path, without=(missing,))
    BartConfig(vocab_size=100).save_pretrained(tmp_path)
    with pytest.raises(bart.InputError, match=rf"{tmp_path}: .*\b{missing} token"):
        bart.load_config_and_tokenizer(parse(tmp_path))


def test_a_tokenizer_whose_pad_token_is_eos_is_refused(tmp_path):
    tokenizer = word_tokenizer(tmp_path)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    BartConfig(vocab_size=100).save_pretrained(tmp_path)
    with pytest.raises(bart.InputError, match=rf"{tmp_path}: .*pad token.*eos token"):
        bart.load_config_and_tokenizer(parse(tmp_path))


def test_which_token_the_decoder_starts_from(tmp_path):
    word_tokenizer(tmp_path)
    BartConfig(vocab_size=100, decoder_start_token_id=START).save_pretrained(tmp_path)
    config = bart.load_config_and_tokenizer(parse(tmp_path))[0]
    assert config.decoder_start_token_id == START

    # mBART's config names none: the decoder starts from the last token of a text.
    MBartConfig(vocab_size=100).save_pretrained(tmp_path)
    config = bart.load_config_and_tokenizer(parse(tmp_path, "--model_type=mbart"))[0]
    assert config.decoder_start_token_id == EOS

    BartConfig(vocab_size=100, decoder_start_token_id=100).save_pretrained(tmp_path)
    with pytest.raises(bart.InputError, match="decoder_start_token_id"):
        bart.load_config_and_tokenizer(parse(tmp_path))


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_layerdrop_is_refused(tmp_path, side):
    """Flax's BART would choose the layers to drop once, when it is compiled, and then fail."""
    word_tokenizer(tmp_path)
    BartConfig(vocab_size=100, **{f"{side}_layerdrop": 0.1}).save_pretrained(tmp_path)
    with pytest.raises(bart.InputError, match=rf"{tmp_path}: .*layerdrop"):
        bart.load_config_and_tokenizer(parse(tmp_path))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_reference_files_are_refused(tmp_path, split):
    with pytest.raises(bart.InputError, match=rf"--{split}_ref_file refs\.txt"):
        parse(tmp_path, f"--{split}_ref_file=refs.txt")


# --------------------------------------------------------------------------------------------- loss

# A prime that no other size has. The 90 positions of a batch are not a multiple of the chunks.
VOCAB_SIZE = 101
LENGTH = 30
BATCH = 3
SIZES = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 40,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
}


def make_model(family: str, **settings):
    """A tiny model, and parameters that all have an effect."""
    config = CONFIG_MAPPING[family](**{**SIZES, **settings})
    model = FlaxAutoModelForSeq2SeqLM.from_config(config, _do_init=False)
    return model, random_params(model)


def compiled(function, *args):
    """Compile a function that runs once, in half the time.

    The optimizations that change shapes stay on.
    """
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function).lower(*args).compile(options)


def make_batch():
    rng = np.random.default_rng(1)
    names = ("input_ids", "decoder_input_ids", "labels")
    batch = {name: rng.integers(0, VOCAB_SIZE, (BATCH, LENGTH), dtype=np.int32) for name in names}
    batch["attention_mask"] = (np.arange(LENGTH) < [[30], [21], [4]]).astype(np.int32)
    batch["labels"][1, 20:] = -100
    batch["labels"][2] = -100
    return jax.tree.map(jnp.asarray, batch)


def model_inputs(batch):
    return {name: x for name, x in batch.items() if name != "labels"}


def dropout_key():
    return jax.random.key(0, impl="rbg")


def full_loss(params, batch, model, **mode):
    """The loss from the logits of all positions: the sum of the labels' negative log-softmax.

    Return it and (number of labels, number of right predictions).
    """
    outputs = model(**model_inputs(batch), params=params, return_dict=True, **mode)
    logits = outputs.logits.astype(jnp.float32)
    labels = batch["labels"]
    predicted = labels != -100
    # The one-hot vector of -100 is zero.
    one_hot = jax.nn.one_hot(labels, VOCAB_SIZE)
    num_right = (predicted & (logits.argmax(-1) == labels)).sum()
    return -(jax.nn.log_softmax(logits) * one_hot).sum(), (predicted.sum(), num_right)


def is_near_the_head(path) -> bool:
    """Whether a parameter is in the head or in the layer norm before it."""
    return "lm_head" in path or {"decoder", "final_layer_norm"} <= {*path}


@cache
def programs(tied: bool):
    """Parameters as a flat dictionary, and two compiled functions of them.

    The first function is the script's loss, the second one the full computation. Both return
    ((loss, sums in training), gradients, loss in evaluation). The key is the same, so they have
    the same dropout. If `tied` is false, the parameters are only those near the head, since this
    compiles faster.
    """
    model, params = make_model("bart", tie_word_embeddings=tied, return_dict=tied)
    batch = make_batch()
    key = dropout_key()
    all_params = flatten_dict(params)
    chosen = {path: x for path, x in all_params.items() if tied or is_near_the_head(path)}

    def run(train_loss, eval_loss, chosen):
        def train_loss_of_chosen(chosen):
            return train_loss(unflatten_dict(all_params | chosen))

        loss_and_sums, grads = jax.value_and_grad(train_loss_of_chosen, has_aux=True)(chosen)
        return loss_and_sums, grads, eval_loss(unflatten_dict(all_params | chosen))

    def in_chunks(chosen):
        def train_loss(params):
            return bart.loss_sums(params, batch, model, key)

        def eval_loss(params):
            return bart.loss_sums(params, batch, model)[1]

        return run(train_loss, eval_loss, chosen)

    def full(chosen):
        def train_loss(params):
            return full_loss(params, batch, model, train=True, dropout_rng=key)

        def eval_loss(params):
            return full_loss(params, batch, model)

        return run(train_loss, eval_loss, chosen)

    return chosen, compiled(in_chunks, chosen), compiled(full, chosen)


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_equal_the_full_computation(tied):
    params, in_chunks, full = programs(tied)
    (loss, sums), grads, eval_sums = in_chunks(params)
    (expected, (predicted, _)), expected_grads, (expected_eval, (_, num_right)) = full(params)
    assert set(sums) == {"loss", "z_loss", "predicted"}
    assert sums["z_loss"] == 0
    assert loss == sums["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert sums["predicted"] == predicted == 50
    assert_equal_gradients(grads, expected_grads)
    # Dropout makes the difference.
    assert expected != expected_eval
    assert eval_sums["loss"] == pytest.approx(float(expected_eval), rel=1e-5)
    assert (eval_sums["predicted"], eval_sums["accuracy"]) == (predicted, num_right)
    assert all(x.dtype == jnp.float32 for x in (*sums.values(), *eval_sums.values()))


def test_loss_of_mbart_equals_the_full_computation():
    """The encoder and decoder of mBART have a layer norm after the last layer."""
    model, params = make_model("mbart")
    batch = make_batch()

    def both(params):
        _, sums = bart.loss_sums(params, batch, model)
        return sums, full_loss(params, batch, model)

    sums, (expected, (predicted, num_right)) = compiled(both, params)(params)
    assert sums["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert (sums["predicted"], sums["accuracy"]) == (predicted, num_right)


def assert_equal_gradients(grads, expected):
    assert grads.keys() == expected.keys()
    largest = max(float(jnp.abs(x).max()) for x in expected.values())
    for path, value in expected.items():
        np.testing.assert_allclose(
            grads[path], value, rtol=1e-4, atol=1e-6 * largest, err_msg=str(path)
        )


def test_the_logits_of_a_batch_never_exist_at_once():
    """No array of the compiled program has the shape of all logits.

    An array of the full computation has it, so the search can fail.
    """
    _, in_chunks, full = programs(True)
    shapes = (f"[{BATCH},{LENGTH},{VOCAB_SIZE}]", f"[{BATCH * LENGTH},{VOCAB_SIZE}]")
    assert any(shape in full.as_text() for shape in shapes)
    assert not any(shape in in_chunks.as_text() for shape in shapes)
    chunk = math.ceil(BATCH * LENGTH / bart.CHUNKS)
    assert f"[{chunk},{VOCAB_SIZE}]" in in_chunks.as_text()


@pytest.mark.parametrize("part", ["layers", "attention"])
def test_gradient_checkpointing_changes_no_gradient(part):
    """Recomputation draws the same dropout masks. Other masks would give other gradients."""
    model, _ = make_model("bart")
    params, plain, _ = programs(True)
    batch = make_batch()
    key = dropout_key()

    def checkpointed_loss(params):
        loss_fn = bart.recompute(bart.loss_sums, part)
        return loss_fn(unflatten_dict(params), batch, model, key)

    grads, sums = compiled(jax.grad(checkpointed_loss, has_aux=True), params)(params)
    (loss, _), expected_grads, _ = plain(params)
    assert sums["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert_equal_gradients(grads, expected_grads)


def count_saved_values(family: str, checkpointing: bool, layers: int) -> int:
    """The number of activations that the forward pass keeps for the backward pass."""
    model, params = make_model(family, encoder_layers=layers, decoder_layers=layers)
    batch = make_batch()
    key = dropout_key()

    def loss(params):
        loss_fn = bart.recompute(bart.loss_sums, "layers") if checkpointing else bart.loss_sums
        return loss_fn(params, batch, model, key)[0]

    backward = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
    shapes = [x.shape for x in jax.tree.leaves(backward)]
    # Parameters do not have the batch's size on their first axis.
    return sum(math.prod(shape) for shape in shapes if shape[:1] == (BATCH,))


@pytest.mark.parametrize("family", ["bart", "mbart"])
def test_gradient_checkpointing_keeps_only_the_input_of_a_layer(family):
    """Measured as the difference that one more layer on each side makes."""
    added = {}
    for checkpointing in (False, True):
        two = count_saved_values(family, checkpointing, layers=2)
        one = count_saved_values(family, checkpointing, layers=1)
        added[checkpointing] = two - one
    inputs = 2 * BATCH * LENGTH * SIZES["d_model"]
    assert added[False] > 10 * inputs
    assert inputs <= added[True] <= 1.1 * inputs


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_softmax_and_loss_are_float32_in_every_dtype(dtype):
    """Compare with float64, from the half-precision hidden states that the model returns.

    A loss in half precision would be off by more.
    """
    model, params = make_model("bart")
    model = FlaxAutoModelForSeq2SeqLM.from_config(model.config, dtype=dtype, _do_init=False)
    batch = make_batch()

    def states_and_loss(params):
        outputs = model(**model_inputs(batch), params=params, output_hidden_states=True)
        return outputs.decoder_hidden_states[-1], bart.loss_sums(params, batch, model)

    states, (loss, sums) = compiled(states_and_loss, params)(params)
    assert states.dtype == dtype
    kernel = np.asarray(params["model"]["shared"]["embedding"].astype(dtype), np.float64).T
    bias = np.asarray(params["final_logits_bias"], np.float64)
    logits = np.asarray(states, np.float64) @ kernel + bias
    labels = np.asarray(batch["labels"])
    predicted = labels != -100
    picked = np.take_along_axis(logits, np.maximum(labels, 0)[..., None], -1)[..., 0]
    losses = np.log(np.exp(logits).sum(-1)) - picked
    assert loss.dtype == jnp.float32
    assert loss == pytest.approx(losses[predicted].sum(), rel=2e-6)
    assert sums["predicted"] == predicted.sum()
