#!/usr/bin/env python
"""A tokenizer in the manner of T5's (https://arxiv.org/abs/1910.10683), trained on one's own text.

From files of text to a folder that AutoTokenizer loads as T5TokenizerFast, with 100 sentinels above the vocabulary:

    python t5_tokenizer_model.py --train_file corpus.txt --vocab_size 32000 --output_dir my-t5
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenizers>=0.22,<=0.23.0", "transformers>=4.57.1,<5"]
# ///

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.implementations import BaseTokenizer
from tokenizers.models import Unigram


class SentencePieceUnigramTokenizer(BaseTokenizer):
    """The Unigram model (Kudo, 2018, https://arxiv.org/abs/1804.10959) with the text processing of SentencePiece.

    Ids 0, 1 and 2 are pad, eos and unk. Text is lower-cased, digits and punctuation marks are pieces of their own, and
    every text ends with eos. `replacement` stands for a space, `add_prefix_space` puts one before the first word.
    """

    def __init__(
        self,
        replacement: str = "▁",
        add_prefix_space: bool = True,
        unk_token: str = "<unk>",
        eos_token: str = "</s>",
        pad_token: str = "<pad>",
    ):
        self.unk_token = unk_token
        self.special_tokens = [pad_token, eos_token, unk_token]
        scheme = "always" if add_prefix_space else "never"
        tokenizer = Tokenizer(Unigram())
        tokenizer.normalizer = normalizers.Sequence(
            [
                normalizers.Nmt(),  # control characters go, all kinds of white space become a space
                normalizers.NFKC(),
                normalizers.Replace(Regex(" {2,}"), " "),
                normalizers.Lowercase(),
            ]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(replacement=replacement, prepend_scheme=scheme),
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.Punctuation(),
            ]
        )
        tokenizer.decoder = decoders.Metaspace(replacement=replacement, prepend_scheme=scheme)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["$A", eos_token],
            pair=["$A", eos_token, "$B", eos_token],
            special_tokens=[(eos_token, self.special_tokens.index(eos_token))],
        )
        super().__init__(tokenizer, {"model": "SentencePieceUnigram", "replacement": replacement})

    def train(self, files: str | list[str], vocab_size: int = 8000, show_progress: bool = True):
        """Learns at most `vocab_size` pieces, special tokens included, from the lines of UTF-8 text files."""
        files = [files] if isinstance(files, (str, Path)) else files
        self.train_from_iterator(read_lines(files), vocab_size, show_progress)

    def train_from_iterator(
        self,
        iterator: Iterable[str] | Iterable[list[str]],
        vocab_size: int = 8000,
        show_progress: bool = True,
    ):
        """Learns at most `vocab_size` pieces, special tokens included, from texts or lists of texts."""
        trainer = trainers.UnigramTrainer(
            vocab_size=vocab_size,
            special_tokens=self.special_tokens,
            unk_token=self.unk_token,
            show_progress=show_progress,
        )
        self._tokenizer.train_from_iterator(iterator, trainer=trainer)
        self._tokenizer.model = self.reproducible(
            json.loads(self._tokenizer.to_str())["model"]["vocab"]
        )

    def reproducible(self, learned: list[tuple[str, float]]) -> Unigram:
        """The model that the same text always gives.

        tokenizers sums in any order, so that the last digits of scores differ from run to run, and with them the order
        of pieces: six digits are kept, as SentencePiece writes them. It also gives characters that would else be
        missing the lowest score, in any order a ten-thousandth more each: they all get the lowest.
        """
        pieces = {
            piece: float(f"{score:.6g}")
            for piece, score in learned
            if piece not in self.special_tokens
        }
        lowest, characters = (
            min(pieces.values(), default=0.0),
            [piece for piece in pieces if len(piece) == 1],
        )
        rare = {piece for piece in characters if pieces[piece] < lowest + 1e-4 * len(characters)}
        ranked = sorted(
            (-lowest if piece in rare else -score, piece) for piece, score in pieces.items()
        )
        vocabulary = [(token, 0.0) for token in self.special_tokens] + [
            (piece, -score) for score, piece in ranked
        ]
        return Unigram(vocabulary, unk_id=self.special_tokens.index(self.unk_token))


def read_lines(files: Iterable[str | Path]) -> Iterator[str]:
    """Lines without their ends, which the tokenizer would take for spaces. Raises ValueError for what is not UTF-8."""
    for file in files:
        with open(file, encoding="utf-8") as lines:
            try:
                yield from (line.rstrip("\n") for line in lines)
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}: {error}") from error


def save_for_t5(
    tokenizer: SentencePieceUnigramTokenizer,
    output_dir: str | Path,
    extra_ids: int,
    max_length: int,
):
    """Writes the folder that AutoTokenizer loads. <extra_id_0> has the last id, the other sentinels those below."""
    from transformers import T5TokenizerFast

    with_sentinels = Tokenizer.from_str(tokenizer.to_str())
    with_sentinels.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(extra_ids))])
    pad, eos, unk = tokenizer.special_tokens
    names = {"pad_token": pad, "eos_token": eos, "unk_token": unk}
    fast = T5TokenizerFast(
        tokenizer_object=with_sentinels, extra_ids=extra_ids, model_max_length=max_length, **names
    )
    fast.save_pretrained(output_dir)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--train_file", nargs="+", required=True, help="Files of UTF-8 text, each line a text."
    )
    parser.add_argument(
        "--vocab_size", type=int, default=32000, help="Pieces to learn; the sentinels come on top."
    )
    parser.add_argument("--output_dir", required=True, help="Folder to write.")
    parser.add_argument(
        "--extra_ids", type=int, default=100, help="Sentinels, one for each masked span."
    )
    parser.add_argument(
        "--max_length", type=int, default=512, help="Default length of a sequence in training."
    )
    args = parser.parse_args(argv)
    for name, least in (("vocab_size", 4), ("extra_ids", 1), ("max_length", 3)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: it must be at least {least}")
    tokenizer = SentencePieceUnigramTokenizer()
    try:
        for file in args.train_file:  # before hours of training, not after
            open(file, encoding="utf-8").close()
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        tokenizer.train(args.train_file, args.vocab_size, show_progress=sys.stderr.isatty())
        size = tokenizer.get_vocab_size()
        if size <= len(tokenizer.special_tokens):
            raise ValueError(f"{' '.join(args.train_file)}: no text to learn from")
        save_for_t5(tokenizer, args.output_dir, args.extra_ids, args.max_length)
    except Exception as error:  # tokenizers raises nothing more precise
        problem = (
            f"--vocab_size {args.vocab_size}: {error}"
            if "not large enough" in str(error)
            else error
        )
        print(f"{Path(__file__).name}: error: {problem}", file=sys.stderr)
        return 1
    fewer = (
        f", fewer than --vocab_size {args.vocab_size}: the text has no more"
        if size < args.vocab_size
        else ""
    )
    print(
        f"{args.output_dir}: {size} pieces{fewer}, and {args.extra_ids} sentinels from id {size} on."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
