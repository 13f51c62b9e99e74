"""Every training script uploads with --push_to_hub to a local stand-in for the Hub.

The code that handles failures is word for word the same in all scripts, so its tests run only for
the template.
"""

import re
from importlib import import_module
from unittest import mock

import pytest
import requests
from flax import serialization
from flax.traverse_util import flatten_dict
from hub_server import HubServer
from outputs import losses
from safetensors import numpy as safetensors
from training_scripts import (
    SCRIPTS,
    TEMPLATE,
    checkpoints,
    full_but,
    template_alone,
    without_alarms,
    write_text,
)

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
    """A folder with a tokenizer and a configuration."""
    directory = tmp_path_factory.mktemp("start")
    script.write_model(directory)
    return directory


@pytest.fixture
def train(run_script, script, start, tmp_path):
    """A function that trains for STEPS steps with 3 saves and returns the finished process."""

    def train(url, *flags, path=script.name):
        env = {
            "HF_ENDPOINT": url,
            # A home of its own has no login, and is searched for the token afterwards.
            "HF_HOME": str(tmp_path / "home"),
            "NO_PROXY": "*",
            "HF_HUB_OFFLINE": None,
            "HF_DATASETS_CACHE": None,
            "HF_TOKEN": None,
            "HUGGING_FACE_HUB_TOKEN": None,
            "HF_TOKEN_PATH": None,
            "HF_HUB_CACHE": None,
            "XLA_FLAGS": None,
        }
        train_file = write_text(tmp_path / "train.txt", 400, seed=1)
        command = [
            path,
            "--push_to_hub",
            f"--output_dir={tmp_path / 'my-model'}",
            f"--config_name={start}",
            f"--tokenizer_name={start}",
            f"--train_file={train_file}",
            f"--{script.length_flag}=32",
            "--per_device_train_batch_size=4",
            "--max_train_samples=64",
            "--max_eval_samples=16",
            *script.flags,
            f"--max_steps={STEPS}",
            f"--save_steps={STEPS // 3}",
            "--logging_steps=1",
            *flags,
        ]
        process = run_script(command, env)
        assert "Traceback" not in process.stderr + process.stdout, process.stderr
        check_no_token(tmp_path, TOKEN, process.stdout, process.stderr)
        return process

    return train


def contents(folder):
    """Return {path relative to the folder: bytes} of all files in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def check_no_token(folder, token, *texts):
    """Check that no text, and no name or content of a file in `folder`, contains the token."""
    for text in texts:
        assert token not in text
    for name, data in contents(folder).items():
        assert token not in name
        assert token.encode() not in data, name


def check_requests(hub):
    """Check that only authorization headers have the token and that no checkpoint is uploaded."""
    authorizations = [request.headers.get("authorization") for request in hub.requests]
    assert f"Bearer {TOKEN}" in authorizations
    for request in hub.requests:
        others = [value for name, value in request.headers.items() if name != "authorization"]
        assert TOKEN not in request.path + "".join(others)
        assert TOKEN.encode() not in request.body
    for commit in hub.commits:
        assert TOKEN not in commit.message
        assert not [path for path in commit.files if "checkpoints" in path or ".tmp" in path]


def check_whole(files):
    """Check that the model is complete and its weight files agree, and return its largest table."""
    assert set(files) >= MODEL_FILES
    params = serialization.msgpack_restore(files["flax_model.msgpack"])
    tensors = safetensors.load(files["model.safetensors"])
    params = flatten_dict(params)
    tables = [path for path in params if path[-1] == "embedding"]
    largest = max(tables, key=lambda path: params[path].size)
    pytorch_name = ".".join([*largest[:-1], "weight"])
    assert (params[largest] == tensors[pytorch_name]).all()
    return params[largest]


def check_complete(files, output_dir):
    """Check that the repository has the files of the output directory, except for checkpoints."""
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


def with_time_limit(script, folder, seconds: str):
    """Write a copy of a script with another time limit of requests, and return its path.

    `seconds` is a Python expression, which may use `request`.
    """
    source = script.path.read_text("utf-8")
    source, count = re.subn(r"or HUB_SECONDS$", f"or ({seconds})", source, flags=re.MULTILINE)
    assert count == 1
    path = folder / script.name
    path.write_text(source, "utf-8")
    return path


@pytest.mark.parametrize("script", full_but(SCRIPTS, TEMPLATE), ids=str, indirect=True)
def test_uploads_in_the_background_and_everything_at_the_end(hub, train, script, tmp_path):
    """While the first upload is delayed, training continues and saves again.

    Each commit must still have the weights of one step.
    """
    output_dir = tmp_path / "my-model"
    seen = []

    def has_trained():
        seen.extend(step for step in checkpoints(output_dir) if step == STEPS)
        return bool(seen)

    # At the first LFS request, the client has hashed the files but not yet read them for the
    # upload.
    hub.delay_next(1, 800, where="lfs", until=has_trained)
    patient = with_time_limit(script, tmp_path, "800")
    process = train(hub.url, f"--hub_token={TOKEN}", path=patient)
    assert process.returncode == 0, process.stderr
    assert seen
    assert warnings(process) == []
    assert set(hub.repos) == {"user/my-model"}
    check_requests(hub)
    check_complete(hub.repos["user/my-model"], output_dir)

    assert len(hub.commits) >= 2
    weights = [check_whole(commit.files) for commit in hub.commits]
    assert (weights[0] != weights[-1]).any()
    assert sorted(losses(output_dir)) == list(range(1, STEPS + 1))


@template_alone
def test_after_a_failed_upload_comes_a_warning_and_a_complete_upload(hub, train, start, tmp_path):
    """Without --hub_token, --token reads a private repository and writes to --hub_model_id."""
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
    """The Hub cannot be reached any more after the first upload."""

    def stop_hub(commit):
        hub.stop()

    hub.on_commit = stop_hub
    process = train(hub.url, f"--hub_token={TOKEN}")
    assert process.returncode == 1
    *others, last = without_alarms(process.stderr).splitlines()
    assert last.startswith(f"{script}: error: --push_to_hub: ")
    assert warnings(process)
    # Every message is one line.
    for line in others:
        assert re.match(r"\d\d:\d\d:\d\d (INFO|WARNING) ", line), line
    check_requests(hub)
    local = contents(tmp_path / "my-model")
    check_whole(local)
    assert set(local) >= MODEL_FILES | RESULT_FILES
    assert any(name.startswith(f"checkpoints/{STEPS}/") for name in local)
    assert [name for name in local if name.startswith(".") or name.endswith(".tmp")] == []


@template_alone
@pytest.mark.parametrize(
    "trouble",
    full_but(["wrong token", "read token", "no token", "no network"], "wrong token", "no network"),
)
def test_a_model_that_cannot_be_uploaded_is_not_trained(hub, train, script, tmp_path, trouble):
    """The error is one line before any training. The output directory of an earlier run is kept."""
    output_dir = tmp_path / "my-model"
    for name in ("config.json", "checkpoints/7/state"):
        path = output_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"an earlier {name}")
    before = contents(output_dir)
    hub.add_repo("user/my-model", {})
    if trouble == "wrong token":
        hub.valid_tokens = {"hf_another"}
    elif trouble == "read token":
        hub.read_tokens = {TOKEN}
    elif trouble == "no network":
        hub.stop()
    flags = [] if trouble == "no token" else [f"--hub_token={TOKEN}"]
    process = train(hub.url, "--overwrite_output_dir", "--hub_model_id=user/my-model", *flags)
    assert process.returncode == 1
    assert len(process.stderr.splitlines()) == 1, process.stderr
    assert process.stderr.startswith(f"{script}: error: --push_to_hub: ")
    assert "my-model" in process.stderr
    if trouble != "no network":
        assert "--hub_token" in process.stderr
    assert contents(output_dir) == before
    assert hub.repos == {"user/my-model": {}}
    assert len(hub.requests) < 5


@template_alone
def test_a_hub_that_never_answers_ends_the_run_before_training(hub, train, script, tmp_path):
    hub.delay_next(1000, 1000, where="any")
    impatient = with_time_limit(script, tmp_path, "3")
    process = train(hub.url, f"--hub_token={TOKEN}", path=impatient)
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"{script}: error: --push_to_hub: ")
    assert "timed out" in line.lower()


@template_alone
def test_an_upload_that_is_never_answered_is_a_warning(hub, train, script, tmp_path):
    """Only requests of this kind have a short time limit: a busy machine may answer slowly."""
    hub.delay_next(1, 1000, where="lfs")
    impatient = with_time_limit(script, tmp_path, '6 if "/info/lfs/" in request.url else 800')
    process = train(hub.url, f"--hub_token={TOKEN}", path=impatient)
    assert process.returncode == 0, process.stderr
    assert [line for line in warnings(process) if "timed out" in line], process.stderr
    check_complete(hub.repos["user/my-model"], tmp_path / "my-model")


@template_alone
def test_every_request_has_a_time_limit(hub, script):
    module = import_module(script.name.removesuffix(".py"))
    assert module.HUB_SECONDS < 60
    hub.delay_next(1, 1000, where="any")
    with (
        mock.patch.object(module, "HUB_SECONDS", 0.5),
        pytest.raises(requests.exceptions.ReadTimeout),
    ):
        module.make_session().get(f"{hub.url}/api/whoami-v2")
