"""The stand-in for the Hub, checked with the client that it is for: huggingface_hub in a process of its own."""

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from hub_server import HubServer

TOKEN = "hf_tokenOfTheTests"
CARD = "---\nlicense: apache-2.0\n---\n# A model\n"
PRELUDE = """
import json, os, sys
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import *
api, folder = HfApi(token=os.environ.get("TOKEN", False)), os.environ["FOLDER"]
def upload(message="A commit", **arguments):
    return api.upload_folder(repo_id="user/model", folder_path=folder, commit_message=message, **arguments)
def show(value):
    print(json.dumps(value))
"""


@pytest.fixture
def hub():
    with HubServer(valid_tokens={TOKEN}) as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    """A small output directory of a training run."""
    files = {
        "config.json": b'{"model_type": "roberta"}',
        "flax_model.msgpack": os.urandom(300_000),
        "model.safetensors": os.urandom(300_000),
        "events.out.tfevents.1": b"events",
        "README.md": CARD.encode(),
        "empty.txt": b"",
        "checkpoints/5/state": b"state",
    }
    for name, data in files.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(data)
    return tmp_path / "out"


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def client(hub, folder, code, token=TOKEN):
    """Runs code after PRELUDE against the server; returns what it shows, one value for each `show`."""
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))
    }
    env.update(
        HF_ENDPOINT=hub.url, HF_HOME=str(folder.parent / "home"), FOLDER=str(folder), NO_PROXY="*"
    )
    if token:
        env["TOKEN"] = token
    code = PRELUDE + textwrap.dedent(code)
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_create_upload_list_and_download(hub, folder):
    shown = client(
        hub,
        folder,
        """
        show(api.whoami()["name"])
        show(api.create_repo("model", exist_ok=True, private=True).repo_id)
        show(api.create_repo("model", exist_ok=True).repo_id)
        show(upload(ignore_patterns=["checkpoints/*"]).oid)
        show(api.repo_info("user/model").sha)
        show(sorted(api.list_repo_files("user/model")))
        show([api.file_exists("user/model", name) for name in ("config.json", "model.safetensors", "none.json")])
        for name in ("config.json", "model.safetensors"):
            show(hf_hub_download("user/model", name, token=api.token))
        show(snapshot_download("user/model", token=api.token))
        """,
    )
    local = {
        name: data for name, data in contents(folder).items() if not name.startswith("checkpoints")
    }
    user, name, again, oid, sha, listed, exist, config, weights, snapshot = shown
    assert (user, name, again) == ("user", "user/model", "user/model")
    assert oid == sha == hub.commits[0].oid
    assert listed == sorted(local)
    assert exist == [True, True, False]
    for path in map(Path, (config, weights)):
        assert path.read_bytes() == local[path.name]
    assert contents(Path(snapshot)) == local
    assert hub.repos == {"user/model": local}
    assert hub.private == {"user/model"}
    assert [commit[:2] for commit in hub.commits] == [("user/model", "A commit")]
    assert sorted(hub.commits[0].paths) == sorted(local)


def test_large_files_travel_by_git_lfs(hub, folder):
    client(hub, folder, "api.create_repo('model'); upload()")
    log = hub.request_log()
    assert log.count("POST /user/model.git/info/lfs/objects/batch") == 1
    assert (
        sum(line.startswith("PUT /storage/user/model/") for line in log) == 3
    )  # two weight files and the events
    assert log.count("POST /user/model.git/info/lfs/verify") == 3
    assert all("xet" not in line for line in log)
    commit = next(request.body for request in hub.requests if "/commit/" in request.path)
    kinds = {
        line["value"]["path"]: line["key"] for line in map(json.loads, commit.splitlines()[1:])
    }
    lfs_files = {name for name, kind in kinds.items() if kind == "lfsFile"}
    assert lfs_files == {"flax_model.msgpack", "model.safetensors", "events.out.tfevents.1"}


def test_a_second_commit_holds_what_changed(hub, folder):
    client(
        hub,
        folder,
        """
        api.create_repo("model")
        upload("One")
        upload("Nothing new")
        with open(folder + "/config.json", "w") as file:
            file.write("{}")
        with open(folder + "/model.safetensors", "ab") as file:
            file.write(b"more")
        upload("Two", delete_patterns=["empty.txt"], ignore_patterns=["empty.txt"])
        """,
    )
    assert [commit.message for commit in hub.commits] == ["One", "Two"]
    changed = {
        path
        for path in hub.commits[1].paths
        if hub.commits[0].files[path] != hub.commits[1].files.get(path)
    }
    assert changed == {"config.json", "model.safetensors", "empty.txt"}
    assert "empty.txt" not in hub.repos["user/model"]
    uploads = [line for line in hub.request_log() if line.startswith("PUT")]
    assert len(uploads) == len(set(uploads)) == 4


def test_requests_carry_the_token_in_one_header_alone(hub, folder):
    client(hub, folder, "api.create_repo('model'); upload(); api.list_repo_files('user/model')")
    assert (
        sum(request.headers.get("authorization") == f"Bearer {TOKEN}" for request in hub.requests)
        > 5
    )
    for request in hub.requests:
        others = {name: value for name, value in request.headers.items() if name != "authorization"}
        assert TOKEN not in request.path + json.dumps(others)
        assert TOKEN.encode() not in request.body
        if request.method == "PUT":  # storage is another host
            assert "authorization" not in request.headers


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_wrong", "Invalid credentials in Authorization header"),
        (None, "Invalid username or password."),
    ],
)
def test_a_wrong_or_missing_token_is_refused(hub, folder, token, message):
    hub.add_repo("user/model", {})
    shown = client(
        hub,
        folder,
        """
        for call in (lambda: api.create_repo("other"), lambda: api.create_repo("model", exist_ok=True), upload):
            try:
                call()
            except HfHubHTTPError as error:
                show([error.response.status_code, error.server_message])
        """,
        token,
    )
    assert shown == [[401, message]] * 3
    assert hub.repos == {"user/model": {}}


def test_a_token_that_may_only_read_writes_nothing(hub, folder):
    """Where it names the namespace, the client takes the refusal to create what exists for "it exists"."""
    hub.read_tokens = {TOKEN}
    hub.add_repo("user/model", {}, private=True)
    shown = client(
        hub,
        folder,
        """
        show(api.whoami()["auth"]["accessToken"]["role"])
        names = ("user/model", "model", "new")
        for call in (*(lambda name=name: api.create_repo(name, exist_ok=True) for name in names), upload):
            try:
                call()
            except HfHubHTTPError as error:
                show(error.response.status_code)
            else:
                show("fine")
        """,
    )
    assert shown == ["read", "fine", 403, 403, 403]
    assert hub.repos == {"user/model": {}}


def test_refusals_have_the_types_that_the_client_knows(hub, folder):
    hub.add_repo("user/model", {"config.json": b"{}"})
    hub.add_repo("user/secret", {"config.json": b"{}"}, private=True)
    shown = client(
        hub,
        folder,
        """
        for call in (
            lambda: api.create_repo("elsewhere/model"),
            lambda: api.model_info("user/none"),
            lambda: hf_hub_download("user/model", "none.json", token=False),
            lambda: hf_hub_download("user/model", "config.json", revision="none", token=False),
            lambda: hf_hub_download("user/secret", "config.json", token=False),
            lambda: api.list_repo_tree("user/model", "none").__next__(),
            lambda: api.create_commit("user/model", [], commit_message="Later", parent_commit="1" * 40),
        ):
            try:
                call()
            except HfHubHTTPError as error:
                show([type(error).__name__, error.response.status_code])
            else:
                show("fine")
        show(os.path.basename(hf_hub_download("user/secret", "config.json", token=api.token)))
        """,
    )
    assert shown == [
        ["HfHubHTTPError", 403],
        ["RepositoryNotFoundError", 404],
        ["EntryNotFoundError", 404],
        ["RevisionNotFoundError", 404],
        ["RepositoryNotFoundError", 401],
        ["EntryNotFoundError", 404],
        "fine",  # an empty commit is never sent
        "config.json",
    ]


def test_faults_strike_where_and_as_often_as_asked(hub, folder):
    hub.fail_next(1, where="create", status=503)
    hub.fail_next(1, where="preupload")
    hub.fail_next(1, where="lfs", status=502)
    hub.fail_next(1, where="object", status=403)  # storage, repeated by the client for 5xx only
    hub.fail_next(1, where="commit", status=504)
    hub.fail_next(1, where="commit", status=None)
    shown = client(
        hub,
        folder,
        """
        for call in [lambda: api.create_repo("model")] * 2 + [upload] * 6:
            try:
                call()
            except Exception as error:
                error = error.__cause__ if type(error) is RuntimeError else error
                response = getattr(error, "response", None)
                show(response.status_code if response is not None else type(error).__name__)
            else:
                show("fine")
        """,
    )
    assert shown == [503, "fine", 500, 502, 403, 504, "ConnectionError", "fine"]
    assert len(hub.commits) == 1
    assert hub.repos["user/model"] == contents(folder)


def test_a_file_that_changes_while_it_is_uploaded_is_refused(hub, folder):
    """The client hashes first and reads again later: what a running program still writes must not be uploaded."""
    shown = client(
        hub,
        folder,
        """
        from huggingface_hub import CommitOperationAdd
        api.create_repo("model")
        path = folder + "/events.out.tfevents.1"
        operation = CommitOperationAdd("events.out.tfevents.1", path)
        with open(path, "ab") as file:
            file.write(b"more")
        try:
            api.create_commit("user/model", [operation], commit_message="Torn")
        except RuntimeError as error:
            show(error.__cause__.response.status_code)
        """,
    )
    assert shown == [422]
    assert hub.commits == []


def test_a_model_card_is_checked(hub, folder):
    (folder / "README.md").write_text("---\nlicense: [apache\n---\n")
    shown = client(
        hub,
        folder,
        """
        api.create_repo("model")
        try:
            upload()
        except ValueError as error:
            show(str(error).splitlines()[0])
        """,
    )
    assert shown == ["Invalid metadata in README.md."]
    assert hub.commits == []


def test_stop_breaks_connections_off_and_refuses_new_ones(hub, folder):
    hub.delay_next(1, 30)
    code = """
        api.create_repo("model")
        for attempt in range(2):
            try:
                upload()
            except Exception as error:
                show(type(error).__name__)
        """
    shown, started = [], time.monotonic()
    thread = threading.Thread(target=lambda: shown.extend(client(hub, folder, code)))
    thread.start()
    while not any("/commit/" in line for line in hub.request_log()):
        time.sleep(0.02)
        assert time.monotonic() - started < 20
    hub.stop()
    thread.join(20)
    assert shown == ["ConnectionError", "ConnectionError"]
    assert time.monotonic() - started < 20
    assert hub.commits == []


def test_commits_can_be_slow_and_watched(hub, folder):
    hub.delay_next(1, 0.5)
    seen = []
    hub.on_commit = lambda commit: seen.append((commit.message, time.time()))
    client(
        hub,
        folder,
        "api.create_repo('model'); upload('One'); open(folder + '/new', 'w').close(); upload('Two')",
    )
    assert [message for message, _ in seen] == ["One", "Two"]
    asked = [request.time for request in hub.requests if "/commit/" in request.path]
    assert 0.5 <= seen[0][1] - asked[0] < seen[1][1] - asked[0]
    assert "new" in hub.commits[1].paths
