"""BART's objective in its plainest form, token by token, and random documents for it."""

import math
import random
from collections import Counter

import numpy as np

BOS, PAD, EOS, UNK, MASK = range(5)
NUM_WORDS = 20_000


def make_rows(rows: int, length: int, seed: int = 0, sentence: float = 8, document: float = 40):
    """Blocks cut out of documents of `document` tokens and sentences of `sentence`, on average.

    The tokens of a row are all different, so a token tells its position.
    """
    rng = np.random.default_rng(seed)
    input_ids = np.array([rng.permutation(NUM_WORDS)[:length] + 5 for _ in range(rows)], np.int32)
    starts_sentence = rng.random((rows, length)) < 1 / sentence
    ends = np.flatnonzero(rng.random(input_ids.size - 1) < 1 / document)
    tokens = input_ids.reshape(-1)
    tokens[ends] = EOS
    tokens[ends + 1] = BOS
    return {"input_ids": input_ids, "starts_sentence": starts_sentence}


def documents(row, starts_sentence) -> list[list[list[int]]]:
    """The sentences of each document of a row, as lists of positions."""
    found = []
    document = []
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
) -> list[int]:
    """What the encoder sees of a row: the objective in its plainest form, token by token."""
    row = permute_sentences(list(row), starts_sentence, rng, ratio)

    # The lengths of the masked spans, and the number of spans of length 0.
    text = [position for position, token in enumerate(row) if token not in (BOS, PAD, EOS)]
    num_masked = round(probability * len(text))
    num_kept = len(text) - num_masked
    lengths, num_zeros = draw_span_lengths(num_masked, rng, poisson_lambda)

    # The place of each masked span, then of the mask tokens that are inserted for length 0.
    state = place_spans(row, text, lengths, num_kept, rng)
    room = num_masked - list(state.values()).count("span") + row.count(PAD)
    kept = [position for position in text if state[position] == "kept"]
    number_of_kept = {position: number for number, position in enumerate(kept)}
    inserted = Counter()
    if kept:
        inserted = Counter(rng.randrange(num_kept) for _ in range(min(num_zeros, room)))

    shown = []
    for position, token in enumerate(row):
        if state.get(position) == "kept":
            shown += inserted[number_of_kept[position]] * [MASK]
        if state.get(position, "kept") != "hidden" and token != PAD:
            shown.append(MASK if state.get(position) == "span" else token)
    return shown


def permute_sentences(row: list[int], starts_sentence, rng: random.Random, ratio: float):
    """Permute `ratio` of the sentences of each document among themselves."""
    for sentences in documents(row, starts_sentence):
        num_chosen = math.ceil(ratio * len(sentences) - 1e-9)
        chosen = sorted(rng.sample(range(len(sentences)), num_chosen))
        order = list(range(len(sentences)))
        for place, number in zip(chosen, rng.sample(chosen, len(chosen)), strict=True):
            order[place] = number
        places = [position for sentence in sentences for position in sentence]
        tokens = [row[position] for number in order for position in sentences[number]]
        for position, token in zip(places, tokens, strict=True):
            row[position] = token
    return row


def draw_span_lengths(num_masked: int, rng: random.Random, poisson_lambda: float):
    """Draw lengths until they sum to `num_masked`. Return the nonzero ones, and count the zeros."""
    left = num_masked
    lengths = []
    num_zeros = 0
    while left:
        length = min(poisson(rng, poisson_lambda), left)
        left -= length
        if length:
            lengths.append(length)
        else:
            num_zeros += 1
    return lengths, num_zeros


def place_spans(row, text, lengths, num_kept: int, rng: random.Random) -> dict[int, str]:
    """Put each span before a random kept token or at the end.

    Return the state of each position of `text`: "kept", "span" for the first token of a span, or
    "hidden" for the others. A span that goes across a document's end starts again behind it.
    """
    gaps = sorted((rng.randint(0, num_kept), rng.random(), length) for length in lengths)
    state = {}
    at = 0
    for kept in range(num_kept + 1):
        while gaps and gaps[0][0] == kept:
            _, _, length = gaps.pop(0)
            for i in range(length):
                continues_span = i and row[text[at] - 1] not in (BOS, EOS)
                state[text[at]] = "hidden" if continues_span else "span"
                at += 1
        if kept < num_kept:
            state[text[at]] = "kept"
            at += 1
    return state


def poisson(rng: random.Random, poisson_lambda: float) -> int:
    """Draw from a Poisson distribution by Knuth's algorithm.

    It counts how many uniform numbers can be multiplied before the product is below exp(-lambda).
    """
    count = 0
    product = rng.random()
    while product > math.exp(-poisson_lambda):
        count += 1
        product *= rng.random()
    return count
