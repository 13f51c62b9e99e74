"""Settings and fixtures of the test suite.

Tests have eight virtual devices, no network, and caches that are deleted when the session ends. The
fixtures make a small corpus, a tokenizer and a configuration.

Beside this file are the modules that several tests import. The tests are in folders:

- objectives: masking, losses and gradients of each script, its families of models; what is learned
- data: files and streams, blocks, batches
- training: schedules, optimizers, steps, exports, progress, several versions of the libraries
- faults: bad input, kills, signals, damage, locks, odd names
- hosts: several processes
- hub: uploads, and the server that stands in for the Hub
- docs: the README, its blocks and pictures, the quickstart
- project: requirements, style, copies, benchmarks
- smoke: one short run of each script
"""

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import pytest
from training_scripts import SCRIPTS, Script

ROOT = Path(__file__).resolve().parent.parent
LONGEST_FIRST = (
    "test_faults.py",
    "test_bad_input.py",
    "test_readme.py",
    "test_reliability.py",
    "test_families.py",
    "test_learning.py",
    "test_mlm_objective.py",
    "test_hosts.py",
    "test_hub.py",
    "test_stream.py",
    "test_t5_objective.py",
    "test_clm_objective.py",
    "test_bart_objective.py",
)
# Tests import quickstart and the scripts.
sys.path.insert(0, str(ROOT))

CACHE = Path(tempfile.mkdtemp(prefix="language-modeling-tests-"))
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
assert "jax" not in sys.modules, (
    "jax was imported before tests/conftest.py, which sets its number of devices"
)
# A shell starts background jobs with SIGINT ignored, nohup a command with SIGHUP ignored. The
# processes that tests start would inherit both.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# jax, transformers and datasets read these variables once, when they are imported. Scripts that
# tests start inherit them.
os.environ.update(
    JAX_PLATFORMS="cpu",
    XLA_FLAGS="--xla_force_host_platform_device_count=8",
    JAX_COMPILATION_CACHE_DIR=str(CACHE / "jax"),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    # Compiling then takes less time. Tests of what optimization may change turn it on again.
    JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    HF_HOME=str(CACHE / "huggingface"),
    HF_DATASETS_CACHE=str(CACHE / "huggingface" / "datasets"),
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)


def is_wanted(item) -> bool:
    """Whether the functions of all `only_where` marks of a test return true for its parameters."""
    for mark in item.iter_markers("only_where"):
        condition = mark.args[0]
        if not condition(**item.callspec.params):
            return False
    return True


def pytest_addoption(parser):
    parser.addoption(
        "--slice",
        metavar="K/N",
        help="of the tests marked full, run only the K-th of N parts, and all other tests",
    )


def is_in_slice(item, wanted: str | None) -> bool:
    """Whether a test is in the slice "K/N" of the tests marked full. All other tests are."""
    if not wanted or not item.get_closest_marker("full"):
        return True
    number, count = map(int, wanted.split("/"))
    # A checksum of the name, so that a new test does not move the others into other slices.
    return zlib.crc32(item.nodeid.encode()) % count == number % count


def place_in_order(item) -> int:
    """The files that take longest come first, lest one of them runs alone at the end."""
    name = item.path.name
    return LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leave out the tests that their `only_where` marks, or --slice, exclude. Sort the files."""
    wanted = config.getoption("--slice")
    items[:] = [item for item in items if is_wanted(item) and is_in_slice(item, wanted)]
    items.sort(key=place_in_order)


@pytest.fixture(scope="module", params=SCRIPTS, ids=str)
def script(request) -> Script:
    """Each of the training scripts."""
    return request.param


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with a train.txt of 300 KB and a validation.txt of 20 KB.

    The text is Python's help topics, one paragraph a line.
    """
    import quickstart

    documents = []
    size = 0
    # The topics come first, so `python_documents` has no module to parse yet.
    for document in quickstart.python_documents():
        documents.append(document)
        size += len(document)
        if size > 340_000:
            break
    directory = tmp_path_factory.mktemp("corpus")
    quickstart.build_corpus(directory, documents)
    return directory


@pytest.fixture(scope="session")
def roberta_dir(tmp_path_factory, corpus) -> Path:
    """A folder with a tokenizer and the configuration of a RoBERTa.

    The tokenizer has 1,000 tokens, the model 2 layers and 128 positions.
    """
    import quickstart

    directory = tmp_path_factory.mktemp("roberta")
    tokenizer = quickstart.train_tokenizer(
        [corpus / "train.txt"], directory, vocab_size=1000, max_length=128
    )
    quickstart.write_config(directory, tokenizer, max_length=128, layers=2, width=32, heads=2)
    return directory


@pytest.fixture(scope="session")
def run_script():
    """A function that runs a script of the project in a new process.

    It returns the `CompletedProcess`. `argv` starts with the script's name, such as
    "run_mlm_flax.py". `env` sets environment variables, and removes those whose value is None.
    """

    def run(argv, env=None, timeout=600, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / argv[0]), *map(str, argv[1:])]
        variables = {**os.environ, **(env or {})}
        variables = {name: value for name, value in variables.items() if value is not None}
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
