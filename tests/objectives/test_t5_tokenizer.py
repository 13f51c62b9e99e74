"""The tokenizer like T5's does what the T5 paper and SentencePiece describe."""

import json
import re
import sys
import tempfile
import unicodedata
from pathlib import Path

import pytest
from training_scripts import run_at_terminal
from transformers import AutoTokenizer, T5Config, T5TokenizerFast

from t5_tokenizer_model import SentencePieceUnigramTokenizer, main

pytestmark = pytest.mark.smoke
SIZE = 500


def texts_of(corpus: Path) -> list[str]:
    return (corpus / "validation.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def tokenizer(corpus) -> SentencePieceUnigramTokenizer:
    tokenizer = SentencePieceUnigramTokenizer()
    tokenizer.train([str(corpus / "train.txt")], vocab_size=SIZE, show_progress=False)
    return tokenizer


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory) -> Path:
    """The folder that the command line writes."""
    path = tmp_path_factory.mktemp("t5") / "deep" / "er"
    status = main(
        [f"--train_file={corpus / 'train.txt'}", f"--vocab_size={SIZE}", f"--output_dir={path}"]
    )
    assert status == 0
    return path


def pieces(tokenizer, text: str) -> list[str]:
    return tokenizer.encode(text).tokens


def test_ids_of_special_tokens(tokenizer):
    assert [tokenizer.id_to_token(token_id) for token_id in range(3)] == ["<pad>", "</s>", "<unk>"]
    assert tokenizer.get_vocab_size() == SIZE
    # The snowman is not in the training text.
    ids = tokenizer.encode("a \N{SNOWMAN} b").ids
    assert ids.count(2) == 1
    assert ids[-1] == 1


def test_other_names_of_special_tokens(corpus):
    tokenizer = SentencePieceUnigramTokenizer(
        "_", False, unk_token="[UNK]", eos_token="[EOS]", pad_token="[PAD]"
    )
    tokenizer.train_from_iterator(texts_of(corpus), vocab_size=SIZE, show_progress=False)
    assert [tokenizer.id_to_token(token_id) for token_id in range(3)] == ["[PAD]", "[EOS]", "[UNK]"]
    found = pieces(tokenizer, "the name")
    assert found[-1] == "[EOS]"
    assert "".join(found[:-1]) == "the_name"


def test_text_is_normalized(tokenizer):
    """White space is replaced as in NMT. NFKC, single spaces and lower case follow."""
    raw = "The\tNAME \u00a0  of\u3000\ufb01ve \uff21\uff22 \u2075 isn't  here"
    plain = unicodedata.normalize("NFKC", raw.replace("\t", " ")).lower()
    plain = re.sub(" +", " ", plain)
    assert plain == "the name of five ab 5 isn't here"
    assert pieces(tokenizer, raw) == pieces(tokenizer, plain)
    assert "".join(pieces(tokenizer, plain)[:-1]) == "▁" + plain.replace(" ", "▁")


def test_words_digits_and_punctuation_are_separate(tokenizer):
    learned = set(tokenizer.get_vocab()) - {"<pad>", "</s>", "<unk>"}
    # No piece spans two words.
    assert all("▁" not in piece[1:] for piece in learned)
    digit_or_punctuation = re.compile(r"[0-9!-/:-@\[-`{-~]")
    assert all(len(piece) == 1 for piece in learned if digit_or_punctuation.search(piece))
    assert max(map(len, learned)) > 4
    found = pieces(tokenizer, "In 2024, x[10]")[:-1]
    assert [piece for piece in found if digit_or_punctuation.search(piece)] == list("2024,[10]")


def test_eos_ends_every_text_and_each_of_a_pair(tokenizer):
    first = pieces(tokenizer, "the name")
    second = pieces(tokenizer, "a value")
    assert first.count("</s>") == 1
    assert first[-1] == "</s>"
    assert tokenizer.encode("the name", "a value").tokens == first + second
    assert pieces(tokenizer, "") == ["</s>"]
    assert tokenizer.encode("the name", add_special_tokens=False).tokens == first[:-1]


def test_decoding_restores_the_text(tokenizer, corpus):
    for text in texts_of(corpus):
        plain = re.sub(" +", " ", unicodedata.normalize("NFKC", text).lower())
        assert tokenizer.decode(tokenizer.encode(text).ids) == plain


def test_each_line_of_a_file_is_a_text(tmp_path, corpus):
    """Texts from any source give the same tokenizer, to the last digit of a score."""
    texts = texts_of(corpus)[:60]
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    files[0].write_text("".join(f"{text}\n" for text in texts[:30]), encoding="utf-8")
    # Line breaks of Windows, and none at the end.
    files[1].write_bytes("\r\n".join(texts[30:]).encode())
    options = {"vocab_size": 300, "show_progress": False}
    trained = [SentencePieceUnigramTokenizer() for _ in range(3)]
    trained[0].train([str(file) for file in files], **options)
    trained[1].train_from_iterator(iter(texts), **options)
    batches = (texts[start : start + 7] for start in range(0, 60, 7))
    trained[2].train_from_iterator(batches, **options)
    assert len({tokenizer.to_str() for tokenizer in trained}) == 1


@pytest.mark.parametrize("show", [True, False])
def test_show_progress_is_obeyed(show, corpus):
    """Rust writes the bars to the file descriptor, so another process runs at a terminal."""
    code = (
        "import sys\n"
        "from t5_tokenizer_model import SentencePieceUnigramTokenizer\n"
        "tokenizer = SentencePieceUnigramTokenizer()\n"
        f"tokenizer.train([sys.argv[1]], vocab_size={SIZE}, show_progress={show})\n"
    )
    command = [sys.executable, "-c", code, str(corpus / "validation.txt")]
    assert bool(run_at_terminal(command, cwd=Path(__file__).parents[2])) == show


def check_t5(loaded, size: int) -> list[int]:
    """Check a loaded tokenizer with `size` learned pieces and return the ids of its sentinels."""
    assert isinstance(loaded, T5TokenizerFast)
    assert len(loaded) == size + 100
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2)
    sentinels = loaded.convert_tokens_to_ids([f"<extra_id_{number}>" for number in range(100)])
    assert sorted(sentinels) == list(range(size, size + 100))
    return sentinels


def test_the_documented_recipe(tokenizer, tmp_path):
    """Save tokenizer.json, and a config with its size, as earlier examples describe."""
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    T5Config(vocab_size=tokenizer.get_vocab_size()).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    check_t5(loaded, SIZE)
    text = "the name of 12 values"
    assert loaded(text)["input_ids"] == tokenizer.encode(text).ids


def test_the_command_line(folder, tokenizer, corpus):
    loaded = AutoTokenizer.from_pretrained(folder)
    # The sentinels are in descending order, as in T5.
    assert check_t5(loaded, SIZE) == list(range(SIZE + 99, SIZE - 1, -1))
    assert loaded.model_max_length == 512
    for text in texts_of(corpus)[:20]:
        assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    ids = loaded("the <extra_id_0> name<extra_id_99>")["input_ids"]
    assert [token_id for token_id in ids if token_id >= SIZE] == [SIZE + 99, SIZE]
    assert {path.name for path in folder.iterdir()} >= {"tokenizer.json", "tokenizer_config.json"}


def test_saving_it_again_changes_nothing(folder, tmp_path):
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    first = json.loads((folder / "tokenizer.json").read_text())
    second = json.loads((tmp_path / "tokenizer.json").read_text())
    assert first == second


@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        (None, [], ["text.txt"]),
        (b"", [], ["text.txt", "no text"]),
        (b"caf\xe9 au lait\n", [], ["text.txt", "utf-8"]),
        (b"all these many letters\n" * 9, ["--vocab_size=8"], ["--vocab_size 8", "large enough"]),
    ],
)
def test_bad_input_is_one_line(tmp_path, capfd, content, flags, words):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    assert main([f"--train_file={file}", f"--output_dir={tmp_path / 'out'}", *flags]) == 1
    captured = capfd.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("t5_tokenizer_model.py: error: ")
    assert all(word in captured.err for word in words)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_found_before_the_training(
    tmp_path, capfd, corpus, monkeypatch
):
    def refuse(dir):
        raise OSError(f"{dir} is read-only")

    def train(*args, **options):
        raise AssertionError("trained")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(SentencePieceUnigramTokenizer, "train", train)
    assert main([f"--train_file={corpus / 'train.txt'}", f"--output_dir={tmp_path}"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "is read-only" in line


def test_vocabulary_smaller_than_asked_for_is_reported(tmp_path, capsys, corpus):
    assert main([f"--train_file={corpus / 'validation.txt'}", f"--output_dir={tmp_path}"]) == 0
    assert "fewer than --vocab_size 32000" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag", ["--vocab_size=3", "--extra_ids=0", "--extra_ids=2000000", "--max_length=2"]
)
def test_numbers_out_of_range_are_refused(flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--train_file=text.txt", "--output_dir=out", flag])
    assert stopped.value.code == 2
    assert flag.replace("=", " ") in capsys.readouterr().err
