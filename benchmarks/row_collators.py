"""The noise of T5 and BART row by row and token by token, in NumPy alone.

The benchmarks compare the collators of the scripts with these loops, and PyTorch's side of
benchmarks/pytorch.py trains with them: it runs in an environment without JAX.
"""

import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from bart_reference import PAD, denoise_row

IGNORE = -100


def random_composition(total: int, num_parts: int, rng: np.random.Generator) -> list[int]:
    """Draw lengths of at least 1 that add up to `total`."""
    ends = 1 + rng.choice(total - 1, num_parts - 1, replace=False)
    return np.diff(np.sort(ends), prepend=0, append=total).tolist()


def corrupt_by_rows(
    rows: np.ndarray,
    num_noise: int,
    num_spans: int,
    sentinels: Sequence[int],
    eos_token_id: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Corrupt spans as T5 does, one token at a time.

    Each row has `num_noise` noise tokens in `num_spans` spans. In the inputs, a sentinel replaces a
    span. The targets are the spans, each after its sentinel.

    Returns input ids, labels and decoder input ids, each [rows, length] int32.
    """
    inputs = []
    targets = []
    for row in rows.tolist():
        kept_lengths = random_composition(len(row) - num_noise, num_spans, rng)
        noise_lengths = random_composition(num_noise, num_spans, rng)
        input_row = []
        target_row = []
        tokens = iter(row)
        for span in range(num_spans):
            for _ in range(kept_lengths[span]):
                input_row.append(next(tokens))
            input_row.append(sentinels[span])
            target_row.append(sentinels[span])
            for _ in range(noise_lengths[span]):
                target_row.append(next(tokens))
        input_row.append(eos_token_id)
        target_row.append(eos_token_id)
        inputs.append(input_row)
        targets.append(target_row)
    input_ids = np.array(inputs, np.int32)
    labels = np.array(targets, np.int32)
    start_tokens = np.zeros_like(labels[:, :1])
    decoder_input_ids = np.concatenate([start_tokens, labels[:, :-1]], axis=1)
    return input_ids, labels, decoder_input_ids


class SpanCorruption:
    """A collator for PyTorch's T5: blocks of equal length become inputs and targets."""

    def __init__(self, tokenizer, num_noise: int, num_spans: int, seed: int):
        names = [f"<extra_id_{number}>" for number in range(num_spans)]
        self.sentinels = tokenizer.convert_tokens_to_ids(names)
        self.eos_token_id = tokenizer.eos_token_id
        self.num_noise = num_noise
        self.num_spans = num_spans
        self.rng = np.random.default_rng(seed)

    def __call__(self, examples: list[dict]) -> dict[str, np.ndarray]:
        rows = np.array([example["input_ids"] for example in examples])
        input_ids, labels, decoder_input_ids = corrupt_by_rows(
            rows, self.num_noise, self.num_spans, self.sentinels, self.eos_token_id, self.rng
        )
        return {"input_ids": input_ids, "labels": labels, "decoder_input_ids": decoder_input_ids}


class Denoising:
    """A collator for PyTorch's BART: 30% of the tokens masked, all sentences permuted.

    A sentence ends with a token that ends with a full stop, as in fairseq.
    """

    def __init__(self, tokenizer, seed: int):
        self.ends_sentence = set()
        for token, token_id in tokenizer.get_vocab().items():
            if token.endswith("."):
                self.ends_sentence.add(token_id)
        self.start_token = tokenizer.eos_token_id
        self.rng = random.Random(seed)

    def __call__(self, examples: list[dict]) -> dict[str, np.ndarray]:
        originals = [example["input_ids"] for example in examples]
        noised = []
        for row in originals:
            starts_sentence = [False] + [token in self.ends_sentence for token in row[:-1]]
            noised.append(denoise_row(row, starts_sentence, self.rng, 0.3, 1.0, 3.0))
        labels = np.array(originals)
        input_ids = np.full_like(labels, PAD)
        for row, tokens in enumerate(noised):
            input_ids[row, : len(tokens)] = tokens
        start_tokens = np.full_like(labels[:, :1], self.start_token)
        return {
            "input_ids": input_ids,
            "attention_mask": (input_ids != PAD).astype(np.int64),
            "labels": np.where(labels == PAD, IGNORE, labels),
            "decoder_input_ids": np.concatenate([start_tokens, labels[:, :-1]], axis=1),
        }
