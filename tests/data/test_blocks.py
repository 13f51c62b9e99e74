"""Every script that stores its data cuts all tokens of all texts into blocks, the last one too.

Streams have tests of their own in test_stream.py.
"""

from importlib import import_module

import numpy as np
import pytest
from training_scripts import SCRIPTS, word_tokenizer

LENGTH = 16
STORED = [script for script in SCRIPTS if not script.is_stream]


@pytest.mark.parametrize("script", STORED, ids=str)
@pytest.mark.parametrize(("last_words", "num_blocks"), [(13, 2), (14, 3), (15, 3)])
def test_blocks_are_all_tokens_end_to_end(script, tmp_path, last_words, num_blocks):
    """The tokenizer puts two tokens around the words of a line. A line of 14 words is a block."""
    tokenizer = word_tokenizer(tmp_path, sentinels=script.num_sentinels)
    lines = []
    for number, num_words in enumerate((14, 14, last_words)):
        lines.append(" ".join(f"w{10 * number + word}" for word in range(num_words)))
    file = tmp_path / "train.txt"
    file.write_text("".join(line + "\n" for line in lines))
    module = import_module(script.path.stem)
    flags = [
        f"--output_dir={tmp_path / 'none'}",
        f"--model_type={script.model_type}",
        f"--tokenizer_name={tmp_path}",
        f"--train_file={file}",
        "--do_train",
        "--validation_split_percentage=0",
    ]
    args = module.parse_args(flags)
    texts, _ = module.load_texts(args)
    sequences = module.tokenize(texts, tokenizer, LENGTH, args, None, "tested")
    found = sequences.input_ids.read(LENGTH * np.arange(len(sequences)), LENGTH)
    tokens = [token for line in lines for token in tokenizer(line)["input_ids"]]
    # What is read beyond the last token is zero.
    expected = np.zeros((num_blocks, LENGTH), int)
    expected.flat[: len(tokens)] = tokens
    np.testing.assert_array_equal(found, expected)

    sequences = module.tokenize(texts, tokenizer, LENGTH, args, 1, "tested")
    assert len(sequences) == 1
