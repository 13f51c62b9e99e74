"""The corpus, tokenizer and configuration of the quickstart, and a short run of all of it."""

import json
import re
import sys

import pytest
from transformers import AutoConfig, AutoTokenizer, RobertaTokenizerFast

import quickstart

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_script):
    """The completed process of a short run, and the folder that it ran in."""
    directory = tmp_path_factory.mktemp("quickstart")
    # The corpus must depend on neither the hash seed nor the locale.
    env = {"XLA_FLAGS": None, "PYTHONHASHSEED": "7", "LC_ALL": "C"}
    done = run_script(["quickstart.py", "--max_steps", "12"], env=env, cwd=directory)
    return done, directory


@pytest.mark.full
def test_corpus_is_always_the_same(tmp_path, finished):
    _, directory = finished
    for file in quickstart.build_corpus(tmp_path):
        same_file = directory / "quickstart" / "corpus" / file.name
        assert file.read_bytes() == same_file.read_bytes()


def test_corpus_is_large_and_has_paragraphs(finished):
    _, directory = finished
    folder = directory / "quickstart" / "corpus"
    train = (folder / "train.txt").read_text(encoding="utf-8").splitlines()
    validation = (folder / "validation.txt").read_text(encoding="utf-8").splitlines()
    lines = train + validation
    assert len("\n".join(lines)) > 2_000_000
    assert 0.03 < len(validation) / len(train) < 0.08
    assert len(set(lines)) == len(lines)
    for line in lines:
        assert line == " ".join(line.split())
        assert line


def test_corpus_splits_documents_into_paragraphs(tmp_path):
    documents = [f"Document {number}\n  continues.\n \nShared." for number in range(1, 41)]
    train, validation = quickstart.build_corpus(tmp_path, documents)
    assert validation.read_text() == "Document 20 continues.\nDocument 40 continues.\n"
    assert train.read_text().splitlines()[:3] == [
        "Document 1 continues.",
        "Shared.",
        "Document 2 continues.",
    ]


def test_saved_tokenizer_loads_as_robertas(corpus, roberta_dir):
    tokenizer = AutoTokenizer.from_pretrained(roberta_dir)
    assert isinstance(tokenizer, RobertaTokenizerFast)
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert tokenizer.model_max_length == 128
    for line in (corpus / "validation.txt").read_text(encoding="utf-8").splitlines():
        ids = tokenizer(line, truncation=False, verbose=False)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[1:-1], clean_up_tokenization_spaces=False) == line
    ids = tokenizer("Return the<mask> of")["input_ids"]
    assert ids.count(tokenizer.mask_token_id) == 1


def test_configuration_fits_the_tokenizer(roberta_dir):
    config = AutoConfig.from_pretrained(roberta_dir)
    tokenizer = AutoTokenizer.from_pretrained(roberta_dir)
    assert config.model_type == "roberta"
    assert config.vocab_size == len(tokenizer) == 1000
    assert config.max_position_embeddings - config.pad_token_id - 1 == tokenizer.model_max_length
    assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (0, 1, 2)


def test_quickstart_trains_and_shows_what_it_learned(finished):
    done, directory = finished
    assert done.returncode == 0, done.stderr
    results = json.loads((directory / "quickstart" / "model" / "eval_results.json").read_text())
    assert f"{results['eval_loss']:.4f}" in done.stdout
    assert re.search(r"^step +12   loss +[\d.]+   accuracy +[\d.]+%", done.stdout, re.MULTILINE)
    assert "Loss of a guess by the frequency of tokens alone: " in done.stdout
    guesses = re.findall(r"^    .* +[\d.]+%$", done.stdout, re.MULTILINE)
    assert len(guesses) == 3 * len(quickstart.QUESTIONS)
    assert "tensorboard --logdir quickstart/model" in done.stdout
    # The paths of the environment and of the checkout may be long.
    long_paths = (sys.prefix, str(quickstart.HERE))
    for line in done.stdout.splitlines():
        assert len(line) <= 80 or any(path in line for path in long_paths)
    assert {path.name for path in directory.iterdir()} == {"quickstart"}


@pytest.mark.full
def test_progress_is_shown_at_a_terminal(tmp_path):
    """The bars of the training script appear."""
    import os

    from training_scripts import run_at_terminal

    command = [sys.executable, str(quickstart.HERE / "quickstart.py"), "--max_steps", "3"]
    shown = run_at_terminal(command, cwd=tmp_path, env=dict(os.environ)).decode()
    assert re.search(r"Training.*3/3", shown)
