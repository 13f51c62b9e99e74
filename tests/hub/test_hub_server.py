"""The stand-in for the Hub answers huggingface_hub, in a process of its own, as the Hub does."""

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
from training_scripts import wait_for

TOKEN = "hf_tokenOfTheTests"
CARD = "---\nlicense: apache-2.0\n---\n# A model\n"
# Runs before the code of each test, in the client's process.
PRELUDE = """
import json
import os
import sys

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import *

api = HfApi(token=os.environ.get("TOKEN", False))
folder = os.environ["FOLDER"]


def upload(message="A commit", **arguments):
    arguments = {"repo_id": "user/model", "folder_path": folder, **arguments}
    return api.upload_folder(commit_message=message, **arguments)


def show(value):
    print(json.dumps(value))


"""


@pytest.fixture
def hub():
    with HubServer(valid_tokens={TOKEN}) as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    """A small folder with the kinds of files that a training run writes."""
    files = {
        "config.json": b'{"model_type": "roberta"}',
        "flax_model.msgpack": os.urandom(300_000),
        "model.safetensors": os.urandom(300_000),
        "events.out.tfevents.1": b"events",
        "README.md": CARD.encode(),
        "empty.txt": b"",
        "checkpoints/5/state": b"state",
    }
    directory = tmp_path / "out"
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return directory


def contents(folder):
    """Return {path relative to the folder: bytes} of all files in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def client(hub, folder, code, token=TOKEN):
    """Run code after PRELUDE against the server, and return the values that it passes to `show`."""
    env = dict(os.environ)
    for name in os.environ:
        if name.startswith(("HF_", "HUGGING")):
            del env[name]
    env["HF_ENDPOINT"] = hub.url
    env["HF_HOME"] = str(folder.parent / "home")
    env["FOLDER"] = str(folder)
    env["NO_PROXY"] = "*"
    if token:
        env["TOKEN"] = token
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(code)]
    result = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=600, check=False
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
        names = ("config.json", "model.safetensors", "none.json")
        show([api.file_exists("user/model", name) for name in names])
        for name in ("config.json", "model.safetensors"):
            show(hf_hub_download("user/model", name, token=api.token))
        show(snapshot_download("user/model", token=api.token))
        """,
    )
    local = {
        name: data for name, data in contents(folder).items() if not name.startswith("checkpoints")
    }
    user, repo_id, second_repo_id, oid, sha, listed, exist, config, weights, snapshot = shown
    assert user == "user"
    assert repo_id == second_repo_id == "user/model"
    assert oid == sha == hub.commits[0].oid
    assert listed == sorted(local)
    assert exist == [True, True, False]
    for path in map(Path, (config, weights)):
        assert path.read_bytes() == local[path.name]
    assert contents(Path(snapshot)) == local
    assert hub.repos == {"user/model": local}
    assert hub.private == {"user/model"}
    (commit,) = hub.commits
    assert (commit.repo_id, commit.message) == ("user/model", "A commit")
    assert sorted(commit.paths) == sorted(local)


def test_large_files_travel_by_git_lfs(hub, folder):
    client(hub, folder, "api.create_repo('model'); upload()")
    log = hub.request_log()
    assert log.count("POST /user/model.git/info/lfs/objects/batch") == 1
    # Two files with weights and one with events.
    assert sum(line.startswith("PUT /storage/user/model/") for line in log) == 3
    assert log.count("POST /user/model.git/info/lfs/verify") == 3
    assert all("xet" not in line for line in log)
    commit = next(request.body for request in hub.requests if "/commit/" in request.path)
    lfs_files = set()
    for line in commit.splitlines()[1:]:
        edit = json.loads(line)
        if edit["key"] == "lfsFile":
            lfs_files.add(edit["value"]["path"])
    assert lfs_files == {"flax_model.msgpack", "model.safetensors", "events.out.tfevents.1"}


def test_a_second_commit_has_only_the_changes(hub, folder):
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
    first, second = hub.commits
    changed = {path for path in second.paths if first.files[path] != second.files.get(path)}
    assert changed == {"config.json", "model.safetensors", "empty.txt"}
    assert "empty.txt" not in hub.repos["user/model"]
    uploads = [line for line in hub.request_log() if line.startswith("PUT")]
    assert len(uploads) == len(set(uploads)) == 4


def test_requests_have_the_token_in_one_header_only(hub, folder):
    client(hub, folder, "api.create_repo('model'); upload(); api.list_repo_files('user/model')")
    authorizations = [request.headers.get("authorization") for request in hub.requests]
    assert authorizations.count(f"Bearer {TOKEN}") > 5
    for request in hub.requests:
        others = {name: value for name, value in request.headers.items() if name != "authorization"}
        assert TOKEN not in request.path + json.dumps(others)
        assert TOKEN.encode() not in request.body
        # On the real Hub, storage is another host.
        if request.method == "PUT":
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
        calls = (
            lambda: api.create_repo("other"),
            lambda: api.create_repo("model", exist_ok=True),
            upload,
        )
        for call in calls:
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
    """A refused `create_repo` of an existing "user/model" is fine for the client, with exist_ok."""
    hub.read_tokens = {TOKEN}
    hub.add_repo("user/model", {}, private=True)
    shown = client(
        hub,
        folder,
        """
        show(api.whoami()["auth"]["accessToken"]["role"])
        calls = (
            lambda: api.create_repo("user/model", exist_ok=True),
            lambda: api.create_repo("model", exist_ok=True),
            lambda: api.create_repo("new", exist_ok=True),
            upload,
        )
        for call in calls:
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


def test_refusals_raise_the_exceptions_of_the_client(hub, folder):
    hub.add_repo("user/model", {"config.json": b"{}"})
    hub.add_repo("user/secret", {"config.json": b"{}"}, private=True)
    shown = client(
        hub,
        folder,
        """
        calls = (
            lambda: api.create_repo("elsewhere/model"),
            lambda: api.model_info("user/none"),
            lambda: hf_hub_download("user/model", "none.json", token=False),
            lambda: hf_hub_download("user/model", "config.json", revision="none", token=False),
            lambda: hf_hub_download("user/secret", "config.json", token=False),
            lambda: api.list_repo_tree("user/model", "none").__next__(),
            lambda: api.create_commit(
                "user/model", [], commit_message="Later", parent_commit="1" * 40
            ),
        )
        for call in calls:
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
        # The client never sends an empty commit.
        "fine",
        "config.json",
    ]


def test_faults_hit_the_given_requests_the_given_number_of_times(hub, folder):
    hub.fail_next(1, where="create", status=503)
    hub.fail_next(1, where="preupload")
    hub.fail_next(1, where="lfs", status=502)
    # The client repeats an upload to storage only for a status of 5xx.
    hub.fail_next(1, where="object", status=403)
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
    """The client hashes a file and reads it again later. It may have changed in between."""
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


def test_stop_breaks_off_connections_and_refuses_new_ones(hub, folder):
    hub.delay_next(1, 30)
    code = """
        api.create_repo("model")
        for attempt in range(2):
            try:
                upload()
            except Exception as error:
                show(type(error).__name__)
        """
    shown = []

    def run_client():
        shown.extend(client(hub, folder, code))

    thread = threading.Thread(target=run_client)
    thread.start()
    wait_for(lambda: any("/commit/" in line for line in hub.request_log()))
    hub.stop()
    thread.join(300)
    assert shown == ["ConnectionError", "ConnectionError"]
    assert hub.commits == []


def test_commits_can_be_slow_and_watched(hub, folder):
    hub.delay_next(1, 0.5)
    seen = []

    def record(commit):
        seen.append((commit.message, time.time()))

    hub.on_commit = record
    client(
        hub,
        folder,
        """
        api.create_repo("model")
        upload("One")
        open(folder + "/new", "w").close()
        upload("Two")
        """,
    )
    assert [message for message, _ in seen] == ["One", "Two"]
    first_request = next(request.time for request in hub.requests if "/commit/" in request.path)
    delays = [seen_at - first_request for _, seen_at in seen]
    assert 0.5 <= delays[0] < delays[1]
    assert "new" in hub.commits[1].paths
