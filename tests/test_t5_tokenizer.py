"""The tokenizer in the manner of T5's: what it promises, in the words of the T5 paper and of SentencePiece."""

import json
import re
import sys
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
    """What the command line writes."""
    path = tmp_path_factory.mktemp("t5") / "deep" / "er"
    assert (
        main(
            [f"--train_file={corpus / 'train.txt'}", f"--vocab_size={SIZE}", f"--output_dir={path}"]
        )
        == 0
    )
    return path


def pieces(tokenizer, text: str) -> list[str]:
    return tokenizer.encode(text).tokens


def test_ids_of_special_tokens(tokenizer):
    assert [tokenizer.id_to_token(i) for i in range(3)] == ["<pad>", "</s>", "<unk>"]
    assert tokenizer.get_vocab_size() == SIZE
    ids = tokenizer.encode("a \N{SNOWMAN} b").ids
    assert ids.count(2) == 1  # not in the text that it learned from
    assert ids[-1] == 1


def test_other_names_of_special_tokens(corpus):
    tokenizer = SentencePieceUnigramTokenizer(
        "_", False, unk_token="[UNK]", eos_token="[EOS]", pad_token="[PAD]"
    )
    tokenizer.train_from_iterator(texts_of(corpus), vocab_size=SIZE, show_progress=False)
    assert [tokenizer.id_to_token(i) for i in range(3)] == ["[PAD]", "[EOS]", "[UNK]"]
    found = pieces(tokenizer, "the name")
    assert found[-1] == "[EOS]"
    assert "".join(found[:-1]) == "the_name"


def test_text_is_normalized(tokenizer):
    """A program of its own: NMT's white space, NFKC, single spaces, lower case."""
    raw = "The\tNAME \u00a0  of\u3000\ufb01ve \uff21\uff22 \u2075 isn't  here"
    plain = unicodedata.normalize("NFKC", raw.replace("\t", " ")).lower()
    plain = re.sub(" +", " ", plain)
    assert plain == "the name of five ab 5 isn't here"
    assert pieces(tokenizer, raw) == pieces(tokenizer, plain)
    assert "".join(pieces(tokenizer, plain)[:-1]) == "▁" + plain.replace(" ", "▁")


def test_words_digits_and_punctuation_are_apart(tokenizer):
    learned = set(tokenizer.get_vocab()) - {"<pad>", "</s>", "<unk>"}
    assert all("▁" not in piece[1:] for piece in learned)  # no piece spans two words
    alone = re.compile(r"[0-9!-/:-@\[-`{-~]")
    assert all(len(piece) == 1 for piece in learned if alone.search(piece))
    assert max(map(len, learned)) > 4
    found = pieces(tokenizer, "In 2024, x[10]")
    assert [piece for piece in found[:-1] if alone.search(piece)] == [
        "2",
        "0",
        "2",
        "4",
        ",",
        "[",
        "1",
        "0",
        "]",
    ]


def test_eos_ends_every_text_and_each_of_a_pair(tokenizer):
    one, other = pieces(tokenizer, "the name"), pieces(tokenizer, "a value")
    assert (one.count("</s>"), one[-1]) == (1, "</s>")
    assert tokenizer.encode("the name", "a value").tokens == one + other
    assert pieces(tokenizer, "") == ["</s>"]
    assert tokenizer.encode("the name", add_special_tokens=False).tokens == one[:-1]


def test_text_comes_back(tokenizer, corpus):
    for text in texts_of(corpus):
        plain = re.sub(" +", " ", unicodedata.normalize("NFKC", text).lower())
        assert tokenizer.decode(tokenizer.encode(text).ids) == plain


def test_files_are_their_lines(tmp_path, corpus):
    """And the same text gives the same tokenizer, to the last digit of a score."""
    texts = texts_of(corpus)[:60]
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    files[0].write_text("".join(f"{text}\n" for text in texts[:30]), encoding="utf-8")
    files[1].write_bytes(
        "\r\n".join(texts[30:]).encode()
    )  # another system's line ends, none at the end
    trained = [SentencePieceUnigramTokenizer() for _ in range(3)]
    trained[0].train([str(file) for file in files], vocab_size=300, show_progress=False)
    trained[1].train_from_iterator(iter(texts), vocab_size=300, show_progress=False)
    trained[2].train_from_iterator(
        (texts[i : i + 7] for i in range(0, 60, 7)), vocab_size=300, show_progress=False
    )
    assert len({tokenizer.to_str() for tokenizer in trained}) == 1


@pytest.mark.parametrize("show", [True, False])
def test_show_progress_is_obeyed(show, corpus):
    """The bars come from Rust: seen on the file descriptor of a process of its own, which takes it for a terminal."""
    code = (
        "import sys; from t5_tokenizer_model import SentencePieceUnigramTokenizer as T\n"
        f"T().train([sys.argv[1]], vocab_size={SIZE}, show_progress={show})"
    )
    command = [sys.executable, "-c", code, str(corpus / "validation.txt")]
    assert bool(run_at_terminal(command, cwd=Path(__file__).parents[1])) == show


def check_t5(loaded, size: int):
    assert isinstance(loaded, T5TokenizerFast)
    assert len(loaded) == size + 100
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2)
    sentinels = loaded.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(100)])
    assert sorted(sentinels) == list(range(size, size + 100))
    return sentinels


def test_the_documented_recipe(tokenizer, tmp_path):
    """tokenizer.json and a config of the same size, as the examples have always told."""
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    T5Config(vocab_size=tokenizer.get_vocab_size()).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    check_t5(loaded, SIZE)
    assert (
        loaded("the name of 12 values")["input_ids"]
        == tokenizer.encode("the name of 12 values").ids
    )


def test_the_command_line(folder, tokenizer, corpus):
    loaded = AutoTokenizer.from_pretrained(folder)
    assert check_t5(loaded, SIZE) == list(range(SIZE + 99, SIZE - 1, -1))  # as T5's own
    assert loaded.model_max_length == 512
    for text in texts_of(corpus)[:20]:
        assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    ids = loaded("the <extra_id_0> name<extra_id_99>")["input_ids"]
    assert [i for i in ids if i >= SIZE] == [SIZE + 99, SIZE]
    assert {path.name for path in folder.iterdir()} >= {"tokenizer.json", "tokenizer_config.json"}


def test_saved_again_it_is_the_same(folder, tmp_path):
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    first, second = (
        json.loads((path / "tokenizer.json").read_text()) for path in (folder, tmp_path)
    )
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


def test_less_text_than_vocabulary_is_told(tmp_path, capsys, corpus):
    assert main([f"--train_file={corpus / 'validation.txt'}", f"--output_dir={tmp_path}"]) == 0
    assert "fewer than --vocab_size 32000" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--vocab_size=3", "--extra_ids=0", "--max_length=2"])
def test_numbers_out_of_range(flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--train_file=text.txt", "--output_dir=out", flag])
    assert stopped.value.code == 2
    assert flag.replace("=", " ") in capsys.readouterr().err
