"""Texts in several files, in patterns of files and in compressed files, read in a known order."""

import bz2
import gzip
import importlib
import json
import lzma
from importlib.util import find_spec
from pathlib import Path

import pytest
from training_scripts import STREAM, TEMPLATE, Place, template_alone, write_text

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
if find_spec("zstandard"):
    import zstandard

    COMPRESS[".zst"] = zstandard.compress


def write_shards(folder: Path, count: int) -> list[str]:
    """Write shards of three lines each, with each compression in turn, and return the lines."""
    folder.mkdir()
    lines = []
    for number in range(count):
        kind = list(COMPRESS)[number % len(COMPRESS)]
        texts = [f"w{number % 60} w{line}" for line in range(3)]
        content = "".join(f"{text}\n" for text in texts).encode()
        (folder / f"part-{number:04}.txt{kind}").write_bytes(COMPRESS[kind](content))
        lines += texts
    return lines


@pytest.fixture(scope="module", params=[TEMPLATE, STREAM], ids=str)
def module(request):
    return importlib.import_module(request.param.path.stem)


def read(module, *argv: str) -> list[str]:
    """Return the training texts."""
    words = ["--output_dir=out", "--model_type=roberta", "--tokenizer_name=x", *argv]
    args = module.parse_args([str(word) for word in words])
    if hasattr(module, "BlockStream"):
        dataset, column, _ = module.load_texts(args)[0]
        return [row[column] for row in dataset]
    return list(module.load_splits(args)["train"]["text"])


def test_a_folder_of_hundreds_of_compressed_shards(module, tmp_path):
    lines = write_shards(tmp_path / "shards", 300)
    assert read(module, f"--dataset_name={tmp_path / 'shards'}") == lines


def test_files_and_patterns(module, tmp_path):
    lines = write_shards(tmp_path / "shards", 12)
    folder = tmp_path / "shards"
    paths = sorted(folder.iterdir())
    assert read(module, f"--train_file={folder}/part-*") == lines
    assert read(module, f"--train_file={tmp_path}/**/part-*") == lines
    assert read(module, "--train_file", *paths) == lines
    # The order is that of the command line; a file that is named twice is read once.
    expected = lines[15:18] + lines[:15] + lines[18:]
    assert read(module, f"--train_file={paths[5]}", f"--train_file={folder}/*") == expected


def test_empty_files_among_others_are_left_out(module, tmp_path, caplog):
    lines = write_shards(tmp_path / "shards", 4)
    for number in range(2):
        (tmp_path / "shards" / f"part-000{number}-empty.txt").write_bytes(b"")
    assert read(module, f"--train_file={tmp_path}/shards/*") == lines
    assert "2 empty files are left out, such as" in caplog.text


@pytest.mark.parametrize("extension", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("kind", [kind for kind in COMPRESS if kind])
def test_each_format_in_each_compression(module, tmp_path, extension, kind):
    import pandas

    frame = pandas.DataFrame({"text": [f"w1 w{number}" for number in range(5)]})
    plain = tmp_path / f"plain.{extension}"
    if extension == "jsonl":
        frame.to_json(plain, orient="records", lines=True)
    elif extension == "json":
        plain.write_text(json.dumps(frame.to_dict("records")))
    else:
        frame.to_csv(plain, index=False)
    path = tmp_path / f"TEXT.{extension}{kind}"
    path.write_bytes(COMPRESS[kind](plain.read_bytes()))
    assert read(module, f"--train_file={path}") == list(frame["text"])


@template_alone
def test_a_run_over_files_in_a_file_of_settings(script, tmp_path):
    """A run over several files, of which its validation file is one, equals one over all text."""
    place = Place(script, tmp_path)
    parts = [write_text(tmp_path / f"part{number}.txt", 50, number) for number in range(3)]
    whole = tmp_path / "whole.txt"
    whole.write_text("".join(part.read_text() for part in parts))
    compressed = parts[2].with_suffix(".txt.xz")
    compressed.write_bytes(lzma.compress(parts[2].read_bytes()))

    options = {"max_steps": 2, "validation_file": [str(parts[0]), str(compressed)]}
    settings = place.settings("several") | options
    settings["train_file"] = [str(tmp_path / "part[01].txt"), str(compressed)]
    (tmp_path / "settings.json").write_text(json.dumps(settings, default=str))
    run = place.start_argv(["settings.json"]).wait()
    assert (run.returncode, run.lines) == (0, [])
    (tmp_path / "validation.txt").write_text(parts[0].read_text() + parts[2].read_text())
    run = place.run("one", max_steps=2, train_file=whole)
    assert (run.returncode, run.lines) == (0, [])
    for name in ("flax_model.msgpack", "eval_results.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "several" / name).read_bytes()

    # A resumed run logs other files.
    run = place.run("one", max_steps=3, train_file=parts[0])
    assert f"--train_file is {parts[0]} now, and was {whole} before" in run.stderr


@pytest.mark.parametrize(
    ("name", "extension"),
    [
        ("corpus.txt", ".txt"),
        ("a.b/corpus.TXT.gz", ".txt"),
        ("corpus.parquet.gz", ".gz"),
        (".", ""),
        ("", ""),
    ],
)
def test_extension_of_a_data_file(name, extension):
    script = importlib.import_module(TEMPLATE.path.stem)
    assert script.data_extension(name) == extension
