"""A stand-in for the Hugging Face Hub on loopback, for tests of --push_to_hub.

It speaks the endpoints that huggingface_hub calls to name a token's user, create a repository, upload a folder and
download files of model repositories, so that the real client runs against it unchanged:

    with HubServer(valid_tokens={"hf_secret"}) as hub:
        HfApi(endpoint=hub.url, token="hf_secret").create_repo("my-model")   # or HF_ENDPOINT=hub.url in a subprocess
        hub.fail_next(2, where="commit", status=503)

What differs from the Hub: a new repository is empty (no .gitattributes), there is one branch, and what Git LFS stores
is verified by its SHA-256. Xet storage is not on offer: the client proposes it whenever hf_xet is installed, but
follows the server's choice, which here is always the "basic" transfer of Git LFS.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import socket
import sys
import threading
import time
import urllib.parse
from typing import NamedTuple

import yaml

BAD_TOKEN = "Invalid credentials in Authorization header"
NO_TOKEN = "Invalid username or password."
READ_TOKEN = "Forbidden: you must use a write token to do this."
CREATED_AT = "2026-01-01T00:00:00.000Z"

# What the .gitattributes of a new model repository puts in Git LFS, as far as a training script may write it; so does
# any file over 10 MB.
LFS_NAME = re.compile(
    r".*\.(bin|bz2|ckpt|gz|h5|model|msgpack|npy|npz|onnx|parquet|pickle|pkl|pt|pth|safetensors|tar|zip|zst)|.*tfevents.*"
)
LFS_SIZE = 10 * 1024 * 1024


class Request(NamedTuple):
    """A request as it came in; `path` has the query, `headers` has lower-case names, `time` is `time.time()`."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    time: float


class Commit(NamedTuple):
    """A commit: the paths it wrote or deleted, and all files of the repository after it."""

    repo_id: str
    message: str
    paths: list[str]
    oid: str
    files: dict[str, bytes]


class HubError(Exception):
    """Answers a request with an error, shaped as the Hub's errors are."""

    def __init__(self, status, message, code=None, **headers):
        super().__init__(message)
        self.status, self.message, self.headers = (
            status,
            message,
            {"X-Error-Message": message, **headers},
        )
        if code:
            self.headers["X-Error-Code"] = code


class Dropped(Exception):
    """Closes the connection with no answer."""


# (methods, path, names of its faults for `fail_next`, whether it needs a token, method of HubServer that answers it)
ROUTES = (
    ("GET", "/api/whoami-v2", "whoami", True, "_whoami"),
    ("POST", "/api/repos/create", "create", True, "_create"),
    ("POST", "/api/validate-yaml", "yaml", False, "_validate_yaml"),
    ("POST", "/api/models/REPO/preupload/REVISION", "preupload", True, "_preupload"),
    ("POST", "/api/models/REPO/commit/REVISION", "commit", True, "_commit"),
    ("GET", "/api/models/REPO/tree/REVISION(?:/PATH)?", "read", False, "_tree"),
    ("GET", "/api/models/REPO(?:/revision/REVISION)?", "read", False, "_info"),
    ("POST", "/REPO.git/info/lfs/objects/batch", "lfs", True, "_lfs_batch"),
    ("POST", "/REPO.git/info/lfs/verify", "lfs", True, "_lfs_verify"),
    ("PUT", "/storage/REPO/OID", "lfs object", False, "_lfs_put"),
    ("HEAD GET", "/storage/REPO/OID", "read", False, "_lfs_get"),
    ("HEAD GET", "/REPO/resolve/REVISION/PATH", "read", False, "_resolve"),
)
FIELDS = {"REPO": r"[\w.-]+/[\w.-]+?", "REVISION": r"[^/]+", "PATH": r".+", "OID": r"[0-9a-f]{64}"}


def find_route(method, path):
    """Returns the route and the fields of the path, unquoted and named in lower case."""
    for route in ROUTES:
        pattern = re.sub(
            "|".join(FIELDS), lambda field: f"(?P<{field[0].lower()}>{FIELDS[field[0]]})", route[1]
        )
        match = re.fullmatch(pattern, path)
        if match and method in route[0].split():
            return route, {
                name: urllib.parse.unquote(text) for name, text in match.groupdict().items() if text
            }
    raise HubError(404, "Sorry, we can't find the page you are looking for.")


class HubServer:
    """The stand-in; a context manager that listens while it is entered.

    url           where it listens, for `endpoint=` or HF_ENDPOINT
    valid_tokens  a request with another token gets 401, a writing one without a token too
    read_tokens   those of the valid tokens that may only read: writing gets 403
    user, orgs    whose tokens these are, and the other namespaces that they may write to
    repos         {repo_id: {path: bytes}}, the files at the head of each repository
    private       the repository ids that need a token to be read
    commits       every `Commit` in order
    requests      every `Request` in order
    on_commit     called with each `Commit` after it was stored and before it is answered
    """

    def __init__(self, valid_tokens=("hf_valid",), user="user", orgs=("org",)):
        self.valid_tokens, self.read_tokens = set(valid_tokens), set()
        self.user, self.orgs = user, tuple(orgs)
        self.repos, self.private, self.commits, self.requests = {}, set(), [], []
        self.on_commit = None
        self._lfs_objects, self._lfs_paths = (
            {},
            {},
        )  # {(repo_id, SHA-256): bytes}, {repo_id: {paths in Git LFS}}
        self._plans, self._crashes = [], []  # plans: [how often, where, seconds, status]
        self._lock, self._stopped = threading.RLock(), threading.Event()

    def __enter__(self):
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, exception_type, exception, traceback):
        self.stop()
        if self._crashes and exception is None:
            raise self._crashes[0]

    def stop(self):
        """Dies at once: open connections break off, new ones are refused."""
        with self._lock:
            if self._stopped.is_set():
                return
            self._stopped.set()
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._server.connections):
            with contextlib.suppress(OSError):  # the peer, or the handler's thread, was faster
                connection.shutdown(socket.SHUT_RDWR)

    def add_repo(self, repo_id, files, private=False):
        """Makes a repository with {path: bytes} in it, none of them in Git LFS."""
        self.repos[repo_id], self._lfs_paths[repo_id] = dict(files), set()
        if private:
            self.private.add(repo_id)

    def fail_next(self, n, where="any", status=500):
        """Fails the next `n` requests of a kind; a status of None drops the connection without an answer.

        where: "create", "preupload", "lfs" (any request of Git LFS: the first is the batch, which the client does not
        repeat), "object" (an upload to Git LFS, which it repeats five times over 23 s for a status from 500, 502, 503
        and 504 or a lost connection), "commit" or "any".
        """
        with self._lock:
            self._plans.append([n, where, 0, status])

    def delay_next(self, n, seconds, where="commit"):
        """Lets the next `n` requests of a kind wait before anything is done with them."""
        with self._lock:
            self._plans.append([n, where, seconds, 200])

    def request_log(self):
        """`METHOD path` of every request so far, without queries."""
        return [f"{request.method} {request.path.partition('?')[0]}" for request in self.requests]

    def _answer(self, request):
        """Returns (status, headers, body as bytes or something for JSON); raises HubError or Dropped."""
        path, _, query = request.path.partition("?")
        (_, _, kinds, needs_token, method), fields = find_route(request.method, path)
        self._follow_plans(["any", *kinds.split()])
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in self.valid_tokens:
            raise HubError(401, BAD_TOKEN)
        if needs_token and not token:
            raise HubError(401, NO_TOKEN)
        if needs_token and token in self.read_tokens and method != "_whoami":
            raise HubError(403, READ_TOKEN)
        repo_id = fields.get("repo")
        hidden = (
            repo_id in self.private and not token and not path.startswith("/storage/")
        )  # whose links are signed
        if repo_id is not None and (repo_id not in self.repos or hidden):
            # Of what it may not know about, a client without a token learns no more than that it needs one. Over https
            # huggingface_hub takes that 401 for "not found"; over http it needs the code to do so.
            raise HubError(
                404 if token else 401, "Repository not found" if token else NO_TOKEN, "RepoNotFound"
            )
        return getattr(self, method)(request, query=dict(urllib.parse.parse_qsl(query)), **fields)

    def _follow_plans(self, kinds):
        """Delays or fails a request as told. Every plan that applies counts it, up to one that fails it."""
        for plan in list(self._plans):
            with self._lock:
                if plan[0] < 1 or plan[1] not in kinds:
                    continue
                plan[0] -= 1
            if self._stopped.wait(plan[2]) or plan[3] is None:
                raise Dropped
            if plan[3] != 200:
                raise HubError(
                    plan[3], "Internal Error - We're working hard to fix this as soon as possible!"
                )

    def _whoami(self, request, query):
        orgs = [
            {"type": "org", "id": org, "name": org, "fullname": org, "roleInOrg": "write"}
            for org in self.orgs
        ]
        role = (
            "read"
            if request.headers["authorization"].removeprefix("Bearer ") in self.read_tokens
            else "write"
        )
        access = {"displayName": "test", "role": role, "createdAt": CREATED_AT}
        answer = {"type": "user", "id": "0", "name": self.user, "fullname": self.user, "orgs": orgs}
        return 200, {}, {**answer, "auth": {"type": "access_token", "accessToken": access}}

    def _create(self, request, query):
        settings = json.loads(request.body)
        namespace = settings.get("organization") or self.user
        repo_id = f"{namespace}/{settings['name']}"
        if settings.get("type", "model") != "model":
            raise HubError(400, "this stand-in has model repositories only")
        if namespace not in (self.user, *self.orgs):
            raise HubError(
                403,
                f'You don\'t have the rights to create a model under the namespace "{namespace}"',
            )
        answer = {
            "url": f"{self.url}/{repo_id}",
            "name": repo_id,
            "id": hashlib.md5(repo_id.encode()).hexdigest(),
        }
        with self._lock:
            if repo_id in self.repos:
                return (
                    409,
                    {},
                    {"error": "You already created this model repo", "url": answer["url"]},
                )
            self.add_repo(repo_id, {}, bool(settings.get("private")))
        return 200, {}, answer

    def _validate_yaml(self, request, query):
        match = re.match(r"---\n(.*?)\n---(\n|$)", json.loads(request.body)["content"], re.DOTALL)
        try:
            metadata = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            return 400, {}, {"errors": [{"message": f"Invalid YAML: {error}"}], "warnings": []}
        if metadata is not None and not isinstance(metadata, dict):
            return (
                400,
                {},
                {"errors": [{"message": "the metadata is not a mapping"}], "warnings": []},
            )
        missing = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return 200, {}, {"errors": [], "warnings": missing}

    def _preupload(self, request, repo, revision, query):
        files = []
        for file in json.loads(request.body)["files"]:
            path, name = file["path"], file["path"].rpartition("/")[2]
            lfs = file["size"] > LFS_SIZE or LFS_NAME.fullmatch(name) is not None
            answer = {
                "path": path,
                "uploadMode": "lfs" if lfs else "regular",
                "shouldIgnore": False,
            }
            if path in self.repos[repo]:  # lets the client leave out what has not changed
                answer["oid"] = self._file_info(repo, path, self.repos[repo][path])["oid"]
            files.append(answer)
        return 200, {}, {"files": files, "commitOid": self._head(repo)}

    def _lfs_batch(self, request, repo, query):
        batch = json.loads(request.body)
        if batch["operation"] != "upload" or "basic" not in batch["transfers"]:
            raise HubError(400, "this stand-in takes uploads by the basic transfer only")
        objects = [{"oid": item["oid"], "size": item["size"]} for item in batch["objects"]]
        for item in objects:
            if (
                repo,
                item["oid"],
            ) not in self._lfs_objects:  # else it is already here, and there is nothing to do
                upload = {"href": f"{self.url}/storage/{repo}/{item['oid']}?X-Amz-Signature=0"}
                item["actions"] = {
                    "upload": upload,
                    "verify": {"href": f"{self.url}/{repo}.git/info/lfs/verify"},
                }
        content_type = {"Content-Type": "application/vnd.git-lfs+json"}
        return 200, content_type, {"transfer": "basic", "objects": objects}

    def _lfs_put(self, request, repo, oid, query):
        """Storage takes what it is sent, under the name given; the Hub asks for the hash when it verifies."""
        if hashlib.sha256(request.body).hexdigest() == oid:
            self._lfs_objects[repo, oid] = request.body
        return 200, {"ETag": '"0"'}, b""

    def _lfs_verify(self, request, repo, query):
        item = json.loads(request.body)
        if len(self._lfs_objects.get((repo, item["oid"]), b"")) != item["size"]:
            raise HubError(
                422,
                f"what was uploaded does not have the size {item['size']} and SHA-256 {item['oid']}",
            )
        return 200, {}, {}

    def _lfs_get(self, request, repo, oid, query):
        return 200, {"ETag": f'"{oid}"'}, self._lfs_objects[repo, oid]

    def _commit(self, request, repo, revision, query):
        """Newline-separated JSON: a header, then one line for each file."""
        lines = [json.loads(line) for line in request.body.splitlines()]
        header = lines.pop(0)["value"]
        with self._lock:
            if revision != "main":
                raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            if header.get("parentCommit", self._head(repo)) != self._head(repo):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files, lfs_paths = dict(self.repos[repo]), set(self._lfs_paths[repo])
            for line in lines:
                key, value = line["key"], line["value"]
                path = value["path"]
                lfs_paths.discard(path)
                if key == "file":
                    files[path] = base64.b64decode(value["content"], validate=True)
                elif key == "lfsFile":
                    if (repo, value["oid"]) not in self._lfs_objects:
                        raise HubError(
                            400,
                            f"Your push was rejected: the LFS object of {path} was not uploaded",
                        )
                    files[path] = self._lfs_objects[repo, value["oid"]]
                    lfs_paths.add(path)
                elif key == "deletedFile" and path in files:
                    del files[path]
                elif key == "deletedFolder":
                    files = {
                        name: data
                        for name, data in files.items()
                        if not name.startswith(path.rstrip("/") + "/")
                    }
                else:
                    raise HubError(400, f"cannot apply {key} to {path}")
            oid = hashlib.sha1(f"{len(self.commits)} {header['summary']}".encode()).hexdigest()
            self.repos[repo], self._lfs_paths[repo] = files, lfs_paths
            commit = Commit(
                repo, header["summary"], [line["value"]["path"] for line in lines], oid, dict(files)
            )
            self.commits.append(commit)
        if self.on_commit:
            self.on_commit(commit)
        answer = {
            "success": True,
            "commitOid": oid,
            "commitUrl": f"{self.url}/{repo}/commit/{oid}",
            "hookOutput": "",
        }
        return 200, {}, answer

    def _head(self, repo):
        own = [commit.oid for commit in self.commits if commit.repo_id == repo]
        return own[-1] if own else "0" * 40

    def _snapshot(self, repo, revision):
        """Returns the commit's id and the files that it has."""
        if revision in ("main", self._head(repo)):
            return self._head(repo), self.repos[repo]
        for commit in self.commits:
            if (commit.repo_id, commit.oid) == (repo, revision):
                return commit.oid, commit.files
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def _file_info(self, repo, path, data):
        """The `oid` is what the client compares its own files with, and what it names its cached files by."""
        if path in self._lfs_paths[repo]:
            oid = hashlib.sha256(data).hexdigest()
            lfs = {"oid": oid, "sha256": oid, "size": len(data), "pointerSize": 134}
            return {"oid": oid, "size": len(data), "lfs": lfs}
        return {"oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), "size": len(data)}

    def _info(self, request, repo, query, revision="main"):
        head, files = self._snapshot(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        if query.get("blobs"):
            for item in siblings:
                info = self._file_info(repo, item["rfilename"], files[item["rfilename"]])
                item.update({**info, "blobId": info["oid"]})
        answer = {
            "_id": "0",
            "id": repo,
            "modelId": repo,
            "author": repo.split("/")[0],
            "sha": head,
            "gated": False,
        }
        answer.update(
            private=repo in self.private,
            disabled=False,
            createdAt=CREATED_AT,
            lastModified=CREATED_AT,
        )
        return 200, {}, {**answer, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings}

    def _tree(self, request, repo, revision, query, path=""):
        _, files = self._snapshot(repo, revision)
        prefix = path.rstrip("/") + "/" if path else ""
        names = [name for name in sorted(files) if name.startswith(prefix)]
        if path and not names:
            raise HubError(404, f'{path} does not exist on "{revision}"', "EntryNotFound")
        folders = {name[: match.start()] for name in names for match in re.finditer("/", name)}
        entries = [
            {"type": "file", "path": name, **self._file_info(repo, name, files[name])}
            for name in names
        ]
        entries += [
            {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
            for name in sorted(folders)
        ]
        entries = [entry for entry in entries if entry["path"].startswith(prefix)]
        if query.get("recursive", "").lower() != "true":
            entries = [entry for entry in entries if "/" not in entry["path"][len(prefix) :]]
        return 200, {}, entries

    def _resolve(self, request, repo, revision, path, query):
        """Files in Git LFS are redirected to where they are stored."""
        head, files = self._snapshot(repo, revision)
        if path not in files:
            raise HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": head})
        info = self._file_info(repo, path, files[path])
        headers = {"X-Repo-Commit": head, "ETag": f'"{info["oid"]}"'}
        if "lfs" not in info:
            return 200, headers, files[path]
        linked = {"X-Linked-ETag": f'"{info["oid"]}"', "X-Linked-Size": str(info["size"])}
        return (
            302,
            {**headers, **linked, "Location": f"{self.url}/storage/{repo}/{info['oid']}"},
            b"",
        )


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *arguments):
        self.connections = set()
        super().__init__(*arguments)

    def process_request(self, request, client_address):
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        """Clients that go away, and connections that `stop` breaks off, are nothing to report; a bug here is."""
        crash = sys.exc_info()[1]
        if not isinstance(crash, OSError) and not self.hub._stopped.is_set():
            self.hub._crashes.append(crash)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open, as the Hub's do
    wbufsize = -1  # an answer leaves in one piece

    def _handle(self):
        hub = self.server.hub
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, body, time.time())
        hub.requests.append(request)
        try:
            status, headers, body = hub._answer(request)
        except HubError as error:
            status, headers, body = error.status, error.headers, {"error": error.message}
        except Dropped:
            self.close_connection = True
            return
        if not isinstance(body, bytes):
            headers, body = (
                {"Content-Type": "application/json; charset=utf-8", **headers},
                json.dumps(body).encode(),
            )
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def log_message(self, *arguments):
        pass
