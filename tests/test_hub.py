"""--push_to_hub of every training script, run as a user runs it, against a stand-in for the Hub on loopback.

What goes wrong is in code that the scripts have word for word in common: it runs for the template alone.
"""

import re
import time

import pytest
from flax import serialization
from flax.traverse_util import flatten_dict
from hub_server import HubServer
from safetensors import numpy as safetensors
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from training_scripts import template_alone, write_text

TOKEN = "hf_tokenThatMustNotLeak"
STEPS = 9
MODEL_FILES = {
    "config.json",
    "flax_model.msgpack",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
RESULT_FILES = {"train_results.json", "eval_results.json", "all_results.json", "README.md"}


@pytest.fixture
def hub():
    with HubServer(valid_tokens={TOKEN}) as server:
        yield server


@pytest.fixture(scope="module")
def start(script, tmp_path_factory):
    """A tokenizer and a configuration."""
    directory = tmp_path_factory.mktemp("start")
    script.write_model(directory)
    return directory


@pytest.fixture
def train(run_script, script, start, tmp_path):
    """Returns a function that trains for STEPS steps of 3 saves, and returns the finished process."""

    def train(url, *flags):
        home = str(
            tmp_path / "home"
        )  # of its own: no login from elsewhere, and searched for the token
        env = {
            "HF_ENDPOINT": url,
            "HF_HOME": home,
            "HF_HUB_OFFLINE": None,
            "HF_DATASETS_CACHE": None,
            "NO_PROXY": "*",
        }
        env.update(
            dict.fromkeys(
                ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "XLA_FLAGS")
            )
        )
        command = [
            script.name,
            "--push_to_hub",
            f"--output_dir={tmp_path / 'my-model'}",
            f"--config_name={start}",
        ]
        train_file = write_text(tmp_path / "train.txt", 400, seed=1)
        command += [
            f"--tokenizer_name={start}",
            f"--train_file={train_file}",
            f"--{script.length_flag}=32",
        ]
        command += [
            "--per_device_train_batch_size=4",
            "--max_train_samples=64",
            "--max_eval_samples=16",
            *script.flags,
        ]
        command += [
            f"--max_steps={STEPS}",
            f"--save_steps={STEPS // 3}",
            "--logging_steps=1",
            *flags,
        ]
        process = run_script(command, env, timeout=300)
        assert "Traceback" not in process.stderr + process.stdout, process.stderr
        check_no_token(tmp_path, TOKEN, process.stdout, process.stderr)
        return process

    return train


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def check_no_token(folder, token, *texts):
    """Neither texts nor names or contents of files below `folder`, caches and checkpoints included, have it."""
    for text in texts:
        assert token not in text
    for name, data in contents(folder).items():
        assert token not in name
        assert token.encode() not in data, name


def check_requests(hub):
    """The token travels in the header that it belongs to, and nowhere else; checkpoints do not travel."""
    assert any(
        request.headers.get("authorization") == f"Bearer {TOKEN}" for request in hub.requests
    )
    for request in hub.requests:
        headers = "".join(
            value for name, value in request.headers.items() if name != "authorization"
        )
        assert TOKEN not in request.path + headers
        assert TOKEN.encode() not in request.body
    for commit in hub.commits:
        assert TOKEN not in commit.message
        assert not [path for path in commit.files if "checkpoints" in path or ".tmp" in path]


def check_whole(files):
    """Config and weights are there, and both weight files hold the same weights."""
    assert set(files) >= MODEL_FILES
    params = serialization.msgpack_restore(files["flax_model.msgpack"])
    tensors = safetensors.load(files["model.safetensors"])
    tables = {
        path: table for path, table in flatten_dict(params).items() if path[-1] == "embedding"
    }
    path, table = max(tables.items(), key=lambda item: item[1].size)
    assert (table == tensors[".".join((*path[:-1], "weight"))]).all()
    return table


def check_complete(files, output_dir):
    """The repository is the output directory, byte for byte, but for the checkpoints."""
    local = contents(output_dir)
    assert any(name.startswith("checkpoints/") for name in local)
    local = {name: data for name, data in local.items() if not name.startswith("checkpoints/")}
    assert set(files) == set(local)
    assert [name for name in local if local[name] != files[name]] == []
    assert set(local) >= MODEL_FILES | RESULT_FILES
    assert any(name.startswith("events.out.tfevents.") for name in local)
    check_whole(files)


def warnings(process):
    return [line for line in process.stderr.splitlines() if "WARN" in line.upper()]


def logged_times(output_dir):
    """{step: wall time at which its loss was written}"""
    return {
        event.step: event.wall_time
        for path in output_dir.glob("events.out.tfevents.*")
        for event in EventFileLoader(str(path)).Load()
        if any(value.tag == "train_loss" for value in event.summary.value)
    }


def test_uploads_in_the_background_and_all_of_it_in_the_end(hub, train, tmp_path):
    """While the first upload waits, training goes on and saves again: still the Hub gets the weights of one step."""
    hub.delay_next(
        1, 5, where="lfs"
    )  # the client has hashed the files, and not yet read what it will send
    process = train(hub.url, f"--hub_token={TOKEN}")
    assert process.returncode == 0, process.stderr
    assert warnings(process) == [line for line in warnings(process) if "is not uploaded" in line]
    assert set(hub.repos) == {"user/my-model"}
    check_requests(hub)
    check_complete(hub.repos["user/my-model"], tmp_path / "my-model")

    assert len(hub.commits) >= 2
    weights = [check_whole(commit.files) for commit in hub.commits]
    assert (weights[0] != weights[-1]).any()
    (asked, *_) = [
        request.time for request in hub.requests if request.path.endswith("/objects/batch")
    ]
    times = logged_times(tmp_path / "my-model")
    assert sorted(times) == list(range(1, STEPS + 1))
    assert times[2 * STEPS // 3 + 1] < asked + 5  # the step after the second save


@template_alone
def test_a_failed_upload_is_a_warning_that_the_next_one_repairs(hub, train, start, tmp_path):
    """Also: --token alone reads a private repository and writes to that of --hub_model_id."""
    hub.add_repo("user/base", contents(start), private=True)
    hub.fail_next(1, where="commit", status=500)
    flags = [
        "--config_name=user/base",
        "--tokenizer_name=user/base",
        "--hub_model_id=org/renamed",
        f"--token={TOKEN}",
    ]
    process = train(hub.url, *flags)
    assert process.returncode == 0, process.stderr
    assert [line for line in warnings(process) if "500" in line], process.stderr
    assert set(hub.repos) == {"user/base", "org/renamed"}
    check_requests(hub)
    check_complete(hub.repos["org/renamed"], tmp_path / "my-model")


@template_alone
def test_a_failed_last_upload_is_an_error_that_keeps_the_files(hub, train, script, tmp_path):
    """The Hub dies after the first upload, for good."""
    hub.on_commit = lambda commit: hub.stop()
    process = train(hub.url, f"--hub_token={TOKEN}")
    assert process.returncode == 1
    *others, last = process.stderr.splitlines()
    assert last.startswith(f"{script}: error: --push_to_hub: ")
    assert warnings(process)
    assert [
        line for line in others if not re.match(r"\d\d:\d\d:\d\d (INFO|WARNING) ", line)
    ] == []  # one line each
    check_requests(hub)
    local = contents(tmp_path / "my-model")
    check_whole(local)
    assert set(local) >= MODEL_FILES | RESULT_FILES
    assert any(name.startswith(f"checkpoints/{STEPS}/") for name in local)
    assert [name for name in local if name.startswith(".") or name.endswith(".tmp")] == []


@template_alone
@pytest.mark.parametrize("trouble", ["wrong token", "read token", "no token", "no network"])
def test_what_cannot_be_uploaded_is_not_trained(hub, train, script, tmp_path, trouble):
    """One line within seconds, and a directory of earlier work stays as it was."""
    old = tmp_path / "my-model"
    for name in ("config.json", "checkpoints/7/state"):
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (old / name).write_text(f"an earlier {name}")
    before = contents(old)
    hub.add_repo("user/my-model", {})
    if trouble == "wrong token":
        hub.valid_tokens = {"hf_another"}
    elif trouble == "read token":
        hub.read_tokens = {TOKEN}
    elif trouble == "no network":
        hub.stop()
    flags = [] if trouble == "no token" else [f"--hub_token={TOKEN}"]
    started = time.monotonic()
    process = train(hub.url, "--overwrite_output_dir", "--hub_model_id=user/my-model", *flags)
    assert time.monotonic() - started < 30
    assert process.returncode == 1
    assert len(process.stderr.splitlines()) == 1, process.stderr
    assert process.stderr.startswith(f"{script}: error: --push_to_hub: ")
    assert "my-model" in process.stderr
    assert trouble == "no network" or "--hub_token" in process.stderr
    assert contents(old) == before
    assert hub.repos == {"user/my-model": {}}
    assert len(hub.requests) < 5
