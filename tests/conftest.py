"""Eight virtual devices, no network, caches that end with the session; a small corpus, tokenizer and configuration."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from training_scripts import SCRIPTS, Script

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `import quickstart` and the scripts

# Before jax, transformers and datasets are imported: they read these once. Scripts that tests start inherit them.
CACHE = Path(tempfile.mkdtemp(prefix="language-modeling-tests-"))
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
assert "jax" not in sys.modules, (
    "jax was imported before tests/conftest.py, which sets its number of devices"
)
os.environ.update(
    JAX_PLATFORMS="cpu",
    XLA_FLAGS="--xla_force_host_platform_device_count=8",
    JAX_COMPILATION_CACHE_DIR=str(CACHE / "jax"),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    JAX_DISABLE_MOST_OPTIMIZATIONS="1",  # compiling takes half the time; tests of what optimization may change undo it
    HF_HOME=str(CACHE / "huggingface"),
    HF_DATASETS_CACHE=str(CACHE / "huggingface" / "datasets"),
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)


def pytest_collection_modifyitems(items):
    """Leaves out the tests whose parameters the function that is marked `only_where` does not want."""
    wanted = lambda item, mark: mark.args[0](**item.callspec.params)  # noqa: E731
    items[:] = [
        item
        for item in items
        if all(wanted(item, mark) for mark in item.iter_markers("only_where"))
    ]


@pytest.fixture(scope="module", params=SCRIPTS, ids=str)
def script(request) -> Script:
    """Each of the training scripts."""
    return request.param


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with a train.txt of 300 KB and a validation.txt of 20 KB: help topics, one paragraph a line."""
    import quickstart

    documents, size = [], 0
    for document in quickstart.python_documents():  # the topics come first, so no module is parsed
        documents.append(document)
        size += len(document)
        if size > 340_000:
            break
    directory = tmp_path_factory.mktemp("corpus")
    quickstart.build_corpus(directory, documents)
    return directory


@pytest.fixture(scope="session")
def roberta_dir(tmp_path_factory, corpus) -> Path:
    """A folder with a tokenizer of 1,000 tokens and the configuration of a RoBERTa of 2 layers and 128 positions."""
    import quickstart

    directory = tmp_path_factory.mktemp("roberta")
    tokenizer = quickstart.train_tokenizer(
        [corpus / "train.txt"], directory, vocab_size=1000, max_length=128
    )
    quickstart.write_config(directory, tokenizer, max_length=128, layers=2, width=32, heads=2)
    return directory


@pytest.fixture(scope="session")
def run_script():
    """Function that runs a script of the project in a process of its own and returns its `CompletedProcess`.

    `argv` starts with the script's name, for example "run_mlm_flax.py"; `env` adds variables, None takes one away.
    """

    def run(argv, env=None, timeout=600, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / argv[0]), *map(str, argv[1:])]
        variables = {
            name: value
            for name, value in {**os.environ, **(env or {})}.items()
            if value is not None
        }
        return subprocess.run(
            command,
            env=variables,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            **options,
        )

    return run
