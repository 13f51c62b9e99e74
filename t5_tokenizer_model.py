#!/usr/bin/env python
"""A lowercase tokenizer for T5 (https://arxiv.org/abs/1910.10683), trained on your own text.

It reads text files and writes a folder that AutoTokenizer loads as T5TokenizerFast, with 100
sentinel tokens above the vocabulary:

    python t5_tokenizer_model.py --train_file corpus.txt --vocab_size 32000 --output_dir my-t5
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenizers>=0.22,<=0.23.0", "transformers>=4.57.1,<5"]
# ///

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.implementations import BaseTokenizer
from tokenizers.models import Unigram


class InputError(Exception):
    """An error the user can fix. `main` prints it as one line, without a traceback."""


class SentencePieceUnigramTokenizer(BaseTokenizer):
    """The Unigram model (Kudo, 2018, https://arxiv.org/abs/1804.10959) with SentencePiece's rules.

    Ids 0, 1 and 2 are pad, eos and unk. Text is lowercased, each digit and punctuation mark is a
    piece of its own, and every text ends with eos. `replacement` stands for a space, and
    `add_prefix_space` puts one before the first word.
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
        # The index in this list is the id.
        self.special_tokens = [pad_token, eos_token, unk_token]
        prepend_scheme = "always" if add_prefix_space else "never"
        metaspace = {"replacement": replacement, "prepend_scheme": prepend_scheme}

        tokenizer = Tokenizer(Unigram())
        tokenizer.normalizer = normalizers.Sequence(
            [
                # Remove control characters, and replace each kind of white space by a space.
                normalizers.Nmt(),
                normalizers.NFKC(),
                normalizers.Replace(Regex(" {2,}"), " "),
                normalizers.Lowercase(),
            ]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(**metaspace),
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.Punctuation(),
            ]
        )
        tokenizer.decoder = decoders.Metaspace(**metaspace)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["$A", eos_token],
            pair=["$A", eos_token, "$B", eos_token],
            special_tokens=[(eos_token, self.special_tokens.index(eos_token))],
        )
        super().__init__(tokenizer, {"model": "SentencePieceUnigram", "replacement": replacement})

    def train(self, files: str | list[str], vocab_size: int = 8000, show_progress: bool = True):
        """Learn the vocabulary from the lines of UTF-8 text files.

        It gets at most `vocab_size` pieces, including the special tokens.
        """
        if isinstance(files, (str, Path)):
            files = [files]
        self.train_from_iterator(read_lines(files), vocab_size, show_progress)

    def train_from_iterator(
        self,
        iterator: Iterable[str] | Iterable[list[str]],
        vocab_size: int = 8000,
        show_progress: bool = True,
    ):
        """Learn the vocabulary from texts or lists of texts.

        It gets at most `vocab_size` pieces, including the special tokens.
        """
        trainer = trainers.UnigramTrainer(
            vocab_size=vocab_size,
            special_tokens=self.special_tokens,
            unk_token=self.unk_token,
            show_progress=show_progress,
        )
        self._tokenizer.train_from_iterator(iterator, trainer=trainer)
        learned = json.loads(self._tokenizer.to_str())["model"]["vocab"]
        self._tokenizer.model = self.reproducible_model(learned)

    def reproducible_model(self, learned: list[tuple[str, float]]) -> Unigram:
        """Make the model that is the same each time the same text is learned.

        tokenizers adds up counts in an arbitrary order, so the last digits of the scores `learned`
        differ from run to run, and with them the order of the pieces. Six digits are kept, as in
        the files of SentencePiece.

        tokenizers also adds the characters that would otherwise be missing. It gives the first the
        lowest score and each of the others 0.0001 more, in an arbitrary order. Here all of them get
        the lowest score.
        """
        scores = {}
        for piece, score in learned:
            if piece not in self.special_tokens:
                scores[piece] = float(f"{score:.6g}")
        lowest = min(scores.values(), default=0.0)
        characters = [piece for piece in scores if len(piece) == 1]
        highest_of_added = lowest + 1e-4 * len(characters)
        for character in characters:
            if scores[character] < highest_of_added:
                scores[character] = lowest

        # The highest score comes first. Pieces of the same score are in alphabetical order.
        ranked = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
        vocabulary = [(token, 0.0) for token in self.special_tokens]
        vocabulary.extend(ranked)
        return Unigram(vocabulary, unk_id=self.special_tokens.index(self.unk_token))


def read_lines(files: Iterable[str | Path]) -> Iterator[str]:
    """Yield the lines of text files without their line breaks.

    The tokenizer would take the line breaks for spaces. Raises ValueError for a file that is not
    UTF-8.
    """
    for file in files:
        with open(file, encoding="utf-8") as lines:
            try:
                for line in lines:
                    yield line.rstrip("\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}: {error}") from error


def save_for_t5(
    tokenizer: SentencePieceUnigramTokenizer,
    output_dir: str | Path,
    extra_ids: int,
    max_length: int,
):
    """Write the folder that AutoTokenizer loads as T5TokenizerFast.

    As in T5, the `extra_ids` sentinels are above the vocabulary in descending order: <extra_id_0>
    has the last id.
    """
    # Importing Transformers takes seconds, and only this function needs it.
    from transformers import T5TokenizerFast

    with_sentinels = Tokenizer.from_str(tokenizer.to_str())
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(extra_ids))]
    with_sentinels.add_special_tokens(sentinels)
    pad_token, eos_token, unk_token = tokenizer.special_tokens
    fast_tokenizer = T5TokenizerFast(
        tokenizer_object=with_sentinels,
        extra_ids=extra_ids,
        model_max_length=max_length,
        pad_token=pad_token,
        eos_token=eos_token,
        unk_token=unk_token,
    )
    fast_tokenizer.save_pretrained(output_dir)


def parse_args(argv: list[str] | None):
    """Read all settings from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--train_file",
        nargs="+",
        required=True,
        help="One or more UTF-8 text files. Each line is a text.",
    )
    parser.add_argument(
        "--vocab_size",
        type=int,
        default=32000,
        help="Largest number of pieces, with <pad>, </s> and <unk>, without the sentinels. "
        "Default: %(default)s.",
    )
    parser.add_argument("--output_dir", required=True, help="Folder to write the tokenizer to.")
    parser.add_argument(
        "--extra_ids",
        type=int,
        default=100,
        help="Number of sentinel tokens. A training example needs one for each masked span. "
        "Default: %(default)s.",
    )
    parser.add_argument(
        "--max_length",
        type=int,
        default=512,
        help="Maximum sequence length in tokens, stored as model_max_length. Training scripts use "
        "it as the default length, up to the limit of the config (T5: 512). Default: %(default)s.",
    )
    args = parser.parse_args(argv)
    # Adding sentinels takes time that grows with the square of their number.
    limits = (("vocab_size", 4, 2**31 - 1), ("extra_ids", 1, 10_000), ("max_length", 3, 2**31 - 1))
    for name, minimum, maximum in limits:
        value = getattr(args, name)
        if not minimum <= value <= maximum:
            parser.error(f"--{name} {value}: it must be between {minimum} and {maximum}")
    return args


def train_tokenizer(args) -> SentencePieceUnigramTokenizer:
    """Train a tokenizer on the text of `args.train_file`."""
    tokenizer = SentencePieceUnigramTokenizer()
    show_progress = sys.stderr.isatty()
    try:
        tokenizer.train(args.train_file, args.vocab_size, show_progress=show_progress)
    except Exception as error:
        if "not large enough" in str(error):
            raise InputError(f"--vocab_size {args.vocab_size}: {error}") from error
        raise
    if tokenizer.get_vocab_size() <= len(tokenizer.special_tokens):
        raise InputError(f"{' '.join(args.train_file)}: no text to learn from")
    return tokenizer


def main(argv: list[str] | None = None) -> int:
    """Train a tokenizer as `argv`, or else the command line, says. Returns the exit status."""
    args = parse_args(argv)
    output_dir = Path(args.output_dir)
    is_new = not output_dir.exists()
    try:
        # Training can take hours, so find out first whether the files can be read and written.
        for file in args.train_file:
            open(file, encoding="utf-8").close()
        output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
        tokenizer = train_tokenizer(args)
        save_for_t5(tokenizer, args.output_dir, args.extra_ids, args.max_length)
    except Exception as error:
        # Errors of tokenizers have no class of their own.
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        if is_new and output_dir.is_dir() and not any(output_dir.iterdir()):
            output_dir.rmdir()
        return 1

    size = tokenizer.get_vocab_size()
    reason = ""
    if size < args.vocab_size:
        reason = f", fewer than --vocab_size {args.vocab_size}: the text has no more"
    sentinels = f"{args.extra_ids} sentinels from id {size} on"
    print(f"{args.output_dir}: {size} pieces{reason}, and {sentinels}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
