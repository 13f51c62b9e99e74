"""A local stand-in for the Hugging Face Hub, for tests of --push_to_hub.

It has the endpoints that huggingface_hub calls to identify a token's user, create a repository,
upload a folder and download files of model repositories. So the real client runs against it
unchanged:

    with HubServer(valid_tokens={"hf_secret"}) as hub:
        HfApi(endpoint=hub.url, token="hf_secret").create_repo("my-model")
        hub.fail_next(2, where="commit", status=503)

In a subprocess, set HF_ENDPOINT to `hub.url`.

It differs from the Hub in a few points. A new repository is empty: it has no .gitattributes. There
is one branch. The server verifies the SHA-256 of every Git LFS object. There is no Xet storage: the
client proposes it whenever hf_xet is installed, but follows the server's choice, which here is
always the "basic" transfer of Git LFS.
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
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import yaml

BAD_TOKEN = "Invalid credentials in Authorization header"
NO_TOKEN = "Invalid username or password."
READ_TOKEN = "Forbidden: you must use a write token to do this."
SERVER_ERROR = "Internal Error - We're working hard to fix this as soon as possible!"
CREATED_AT = "2026-01-01T00:00:00.000Z"

# Files that go to Git LFS: those over 10 MB, and those that the .gitattributes of a new model
# repository names. Names that no training script writes are left out.
LFS_EXTENSIONS = (
    "bin|bz2|ckpt|gz|h5|model|msgpack|npy|npz|onnx|parquet|"
    "pickle|pkl|pt|pth|safetensors|tar|zip|zst"
)
LFS_NAME = re.compile(rf".*\.({LFS_EXTENSIONS})|.*tfevents.*")
LFS_SIZE = 10 * 1024 * 1024


class Request(NamedTuple):
    """A request as it was received."""

    method: str
    # With the query.
    path: str
    # The names are in lower case.
    headers: dict[str, str]
    body: bytes
    # From `time.time()`.
    time: float


class Commit(NamedTuple):
    """A commit, with all files of the repository after it."""

    repo_id: str
    message: str
    # Paths that the commit wrote or deleted.
    paths: list[str]
    oid: str
    files: dict[str, bytes]


class HubError(Exception):
    """Answer a request with an error in the Hub's format."""

    def __init__(self, status, message, code=None, **headers):
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = {"X-Error-Message": message, **headers}
        if code:
            self.headers["X-Error-Code"] = code


class Dropped(Exception):
    """Close the connection without an answer."""


@dataclass
class Plan:
    """A fault or a delay for the next requests of a kind."""

    # Number of requests that it still applies to.
    remaining: int
    # The kind of request, as in `HubServer.fail_next`.
    where: str
    # Seconds.
    delay: float
    # A function that ends the delay once it returns true.
    until: Callable
    # 200 for a delay alone. None drops the connection.
    status: int | None


class Route(NamedTuple):
    """A kind of request and the method of HubServer that answers it."""

    http_methods: str
    path: str
    # The names of this kind of request in `HubServer.fail_next`.
    kinds: str
    needs_token: bool
    handler: str


ROUTES = (
    Route("GET", "/api/whoami-v2", "whoami", True, "_whoami"),
    Route("POST", "/api/repos/create", "create", True, "_create"),
    Route("POST", "/api/validate-yaml", "yaml", False, "_validate_yaml"),
    Route("POST", "/api/models/REPO/preupload/REVISION", "preupload", True, "_preupload"),
    Route("POST", "/api/models/REPO/commit/REVISION", "commit", True, "_commit"),
    Route("GET", "/api/models/REPO/tree/REVISION(?:/PATH)?", "read", False, "_tree"),
    Route("GET", "/api/models/REPO(?:/revision/REVISION)?", "read", False, "_info"),
    Route("POST", "/REPO.git/info/lfs/objects/batch", "lfs", True, "_lfs_batch"),
    Route("POST", "/REPO.git/info/lfs/verify", "lfs", True, "_lfs_verify"),
    Route("PUT", "/storage/REPO/OID", "lfs object", False, "_lfs_put"),
    Route("HEAD GET", "/storage/REPO/OID", "read", False, "_lfs_get"),
    Route("HEAD GET", "/REPO/resolve/REVISION/PATH", "read", False, "_resolve"),
)
# Regular expressions for the upper-case words in the paths of the routes.
FIELDS = {"REPO": r"[\w.-]+/[\w.-]+?", "REVISION": r"[^/]+", "PATH": r".+", "OID": r"[0-9a-f]{64}"}


def never() -> bool:
    return False


def path_pattern(route: Route) -> str:
    """Return the regular expression for a route's path, with a named group for each field."""

    def group(match):
        field = match[0]
        return f"(?P<{field.lower()}>{FIELDS[field]})"

    return re.sub("|".join(FIELDS), group, route.path)


def find_route(method: str, path: str) -> tuple[Route, dict[str, str]]:
    """Return the route of a request and the unquoted fields of its path, by name in lower case."""
    for route in ROUTES:
        match = re.fullmatch(path_pattern(route), path)
        if match and method in route.http_methods.split():
            groups = match.groupdict().items()
            return route, {name: urllib.parse.unquote(text) for name, text in groups if text}
    raise HubError(404, "Sorry, we can't find the page you are looking for.")


def token_of(request: Request) -> str:
    """Return the token in a request's header, or an empty string."""
    return request.headers.get("authorization", "").removeprefix("Bearer ")


def edit_files(files: dict[str, bytes], lfs_paths: set[str], objects: dict[str, bytes], edits):
    """Apply the edits of a commit to the files of a repository.

    Args:
        files: {path: content}, changed in place.
        lfs_paths: paths of the files in Git LFS, changed in place.
        objects: {SHA-256: content} of the repository's uploaded Git LFS objects.
        edits: the lines of the commit, each with a "key" and a "value".
    """
    for edit in edits:
        key = edit["key"]
        value = edit["value"]
        path = value["path"]
        lfs_paths.discard(path)
        if key == "file":
            files[path] = base64.b64decode(value["content"], validate=True)
        elif key == "lfsFile":
            if value["oid"] not in objects:
                message = f"Your push was rejected: the LFS object of {path} was not uploaded"
                raise HubError(400, message)
            files[path] = objects[value["oid"]]
            lfs_paths.add(path)
        elif key == "deletedFile" and path in files:
            del files[path]
        elif key == "deletedFolder":
            prefix = path.rstrip("/") + "/"
            for name in [name for name in files if name.startswith(prefix)]:
                del files[name]
        else:
            raise HubError(400, f"cannot apply {key} to {path}")


class HubServer:
    """The stand-in. It is a context manager, and listens until the context ends.

    Attributes:
        url: where it listens, for `endpoint=` or HF_ENDPOINT.
        valid_tokens: a request with any other token gets 401. So does a request that writes and has
            no token.
        read_tokens: the valid tokens that may only read. A request that writes gets 403.
        user: the user whose tokens these are.
        orgs: the other namespaces that the user may write to.
        repos: {repo_id: {path: bytes}}, the files at the head of each repository.
        private: the ids of the repositories that can be read only with a token.
        commits: every `Commit`, in order.
        requests: every `Request`, in order.
        on_commit: function that is called with each `Commit` after it is stored and before it is
            answered, or None.
    """

    def __init__(self, valid_tokens=("hf_valid",), user="user", orgs=("org",)):
        self.valid_tokens = set(valid_tokens)
        self.read_tokens = set()
        self.user = user
        self.orgs = tuple(orgs)
        self.repos = {}
        self.private = set()
        self.commits = []
        self.requests = []
        self.on_commit = None
        # {repo_id: {SHA-256: content}} of the uploaded Git LFS objects.
        self._lfs_objects = {}
        # {repo_id: set of the paths in Git LFS}.
        self._lfs_paths = {}
        self._plans = []
        # Exceptions of handlers, which are bugs of this server.
        self._crashes = []
        self._lock = threading.RLock()
        self._stopped = threading.Event()

    def __enter__(self):
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        options = {"poll_interval": 0.02}
        thread = threading.Thread(target=self._server.serve_forever, kwargs=options, daemon=True)
        thread.start()
        return self

    def __exit__(self, exception_type, exception, traceback):
        self.stop()
        if self._crashes and exception is None:
            raise self._crashes[0]

    def stop(self):
        """Stop at once: break off open connections and refuse new ones."""
        with self._lock:
            if self._stopped.is_set():
                return
            self._stopped.set()
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._server.connections):
            # The peer or the handler's thread may have closed it already.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def add_repo(self, repo_id, files, private=False):
        """Create a repository from {path: bytes}. None of the files is in Git LFS."""
        self.repos[repo_id] = dict(files)
        self._lfs_paths[repo_id] = set()
        if private:
            self.private.add(repo_id)

    def fail_next(self, n, where="any", status=500):
        """Fail the next `n` requests of a kind.

        Args:
            n: number of requests.
            where: "create", "preupload", "commit", "any", "lfs" or "object". "lfs" is any request
                of Git LFS. The first of them is the batch request, which the client does not
                repeat. "object" is an upload to Git LFS. The client repeats it five times within 23
                s if the status is 500, 502, 503 or 504 or the connection was lost.
            status: the HTTP status of the answer. None drops the connection without an answer.
        """
        with self._lock:
            self._plans.append(Plan(n, where, 0, never, status))

    def delay_next(self, n, seconds, where="commit", until=never):
        """Delay the next `n` requests of a kind before they are processed.

        The delay ends early once `until()` is true.
        """
        with self._lock:
            self._plans.append(Plan(n, where, seconds, until, 200))

    def request_log(self):
        """Return `METHOD path` of every request so far, without queries."""
        return [f"{request.method} {request.path.partition('?')[0]}" for request in self.requests]

    def _answer(self, request):
        """Answer a request.

        Returns the status, the headers and the body, which is bytes or a value for JSON. Raises
        HubError or Dropped.
        """
        path, _, query = request.path.partition("?")
        route, fields = find_route(request.method, path)
        self._follow_plans(["any", *route.kinds.split()])
        token = token_of(request)
        if token and token not in self.valid_tokens:
            raise HubError(401, BAD_TOKEN)
        if route.needs_token and not token:
            raise HubError(401, NO_TOKEN)
        if route.needs_token and token in self.read_tokens and route.handler != "_whoami":
            raise HubError(403, READ_TOKEN)
        # Links to storage are signed and need no token.
        if "repo" in fields:
            self._check_visible(fields["repo"], token, is_signed=path.startswith("/storage/"))
        handler = getattr(self, route.handler)
        return handler(request, query=dict(urllib.parse.parse_qsl(query)), **fields)

    def _check_visible(self, repo_id, token, is_signed):
        """Raise HubError if a repository does not exist or a request may not know that it does.

        Without a token the answer is 401 in both cases. Over https huggingface_hub takes that 401
        for "not found"; over http it needs the error code to do so.
        """
        is_hidden = repo_id in self.private and not token and not is_signed
        if repo_id in self.repos and not is_hidden:
            return
        if token:
            raise HubError(404, "Repository not found", "RepoNotFound")
        raise HubError(401, NO_TOKEN, "RepoNotFound")

    def _follow_plans(self, kinds):
        """Delay or fail a request as planned.

        Every plan for one of these kinds counts the request, up to the first plan that fails it.
        """
        for plan in list(self._plans):
            with self._lock:
                if plan.remaining < 1 or plan.where not in kinds:
                    continue
                plan.remaining -= 1
            end = time.monotonic() + plan.delay
            while time.monotonic() < end and not plan.until():
                if self._stopped.wait(0.02):
                    raise Dropped
            if plan.status is None:
                raise Dropped
            if plan.status != 200:
                raise HubError(plan.status, SERVER_ERROR)

    def _whoami(self, request, query):
        orgs = [
            {"type": "org", "id": org, "name": org, "fullname": org, "roleInOrg": "write"}
            for org in self.orgs
        ]
        role = "read" if token_of(request) in self.read_tokens else "write"
        access = {"displayName": "test", "role": role, "createdAt": CREATED_AT}
        answer = {
            "type": "user",
            "id": "0",
            "name": self.user,
            "fullname": self.user,
            "orgs": orgs,
            "auth": {"type": "access_token", "accessToken": access},
        }
        return 200, {}, answer

    def _create(self, request, query):
        settings = json.loads(request.body)
        namespace = settings.get("organization") or self.user
        repo_id = f"{namespace}/{settings['name']}"
        if settings.get("type", "model") != "model":
            raise HubError(400, "this stand-in has model repositories only")
        if namespace not in (self.user, *self.orgs):
            message = "You don't have the rights to create a model under the namespace"
            raise HubError(403, f'{message} "{namespace}"')
        url = f"{self.url}/{repo_id}"
        with self._lock:
            if repo_id in self.repos:
                return 409, {}, {"error": "You already created this model repo", "url": url}
            self.add_repo(repo_id, {}, bool(settings.get("private")))
        answer = {"url": url, "name": repo_id, "id": hashlib.md5(repo_id.encode()).hexdigest()}
        return 200, {}, answer

    def _validate_yaml(self, request, query):
        card = json.loads(request.body)["content"]
        match = re.match(r"---\n(.*?)\n---(\n|$)", card, re.DOTALL)
        errors = []
        warnings = []
        try:
            metadata = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            errors.append({"message": f"Invalid YAML: {error}"})
        else:
            if metadata is not None and not isinstance(metadata, dict):
                errors.append({"message": "the metadata is not a mapping"})
            elif not metadata:
                warnings.append({"message": "empty or missing yaml metadata in repo card"})
        return 400 if errors else 200, {}, {"errors": errors, "warnings": warnings}

    def _preupload(self, request, repo, revision, query):
        answers = []
        for file in json.loads(request.body)["files"]:
            path = file["path"]
            name = path.rpartition("/")[2]
            is_lfs = file["size"] > LFS_SIZE or LFS_NAME.fullmatch(name) is not None
            answer = {
                "path": path,
                "uploadMode": "lfs" if is_lfs else "regular",
                "shouldIgnore": False,
            }
            # With the id, the client leaves out a file that has not changed.
            if path in self.repos[repo]:
                answer["oid"] = self._file_info(repo, path, self.repos[repo][path])["oid"]
            answers.append(answer)
        return 200, {}, {"files": answers, "commitOid": self._head(repo)}

    def _lfs_batch(self, request, repo, query):
        batch = json.loads(request.body)
        if batch["operation"] != "upload" or "basic" not in batch["transfers"]:
            raise HubError(400, "this stand-in takes uploads by the basic transfer only")
        stored = self._lfs_objects.get(repo, {})
        objects = []
        for item in batch["objects"]:
            oid = item["oid"]
            answer = {"oid": oid, "size": item["size"]}
            # Without actions, the client does not upload the object.
            if oid not in stored:
                upload_url = f"{self.url}/storage/{repo}/{oid}?X-Amz-Signature=0"
                verify_url = f"{self.url}/{repo}.git/info/lfs/verify"
                answer["actions"] = {"upload": {"href": upload_url}, "verify": {"href": verify_url}}
            objects.append(answer)
        content_type = {"Content-Type": "application/vnd.git-lfs+json"}
        return 200, content_type, {"transfer": "basic", "objects": objects}

    def _lfs_put(self, request, repo, oid, query):
        """Accept any content, as storage does: the Hub checks the hash later, in `verify`."""
        if hashlib.sha256(request.body).hexdigest() == oid:
            self._lfs_objects.setdefault(repo, {})[oid] = request.body
        return 200, {"ETag": '"0"'}, b""

    def _lfs_verify(self, request, repo, query):
        item = json.loads(request.body)
        content = self._lfs_objects.get(repo, {}).get(item["oid"], b"")
        if len(content) != item["size"]:
            expected = f"the size {item['size']} and SHA-256 {item['oid']}"
            raise HubError(422, f"what was uploaded does not have {expected}")
        return 200, {}, {}

    def _lfs_get(self, request, repo, oid, query):
        return 200, {"ETag": f'"{oid}"'}, self._lfs_objects[repo][oid]

    def _commit(self, request, repo, revision, query):
        """Apply a commit: lines of JSON, first a header, then one line for each file."""
        header, *edits = [json.loads(line) for line in request.body.splitlines()]
        message = header["value"]["summary"]
        with self._lock:
            head = self._head(repo)
            if revision != "main":
                raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            if header["value"].get("parentCommit", head) != head:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            # The repository changes only if all edits can be applied.
            files = dict(self.repos[repo])
            lfs_paths = set(self._lfs_paths[repo])
            edit_files(files, lfs_paths, self._lfs_objects.get(repo, {}), edits)
            self.repos[repo] = files
            self._lfs_paths[repo] = lfs_paths
            paths = [edit["value"]["path"] for edit in edits]
            oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
            commit = Commit(repo, message, paths, oid, dict(files))
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
        oids = [commit.oid for commit in self.commits if commit.repo_id == repo]
        return oids[-1] if oids else "0" * 40

    def _snapshot(self, repo, revision):
        """Return the id of a commit and its files."""
        if revision in ("main", self._head(repo)):
            return self._head(repo), self.repos[repo]
        for commit in self.commits:
            if (commit.repo_id, commit.oid) == (repo, revision):
                return commit.oid, commit.files
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def _file_info(self, repo, path, data):
        """Return the ids and the size of a file.

        The client compares its own files with the `oid`, and names its cached files by it.
        """
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
            "private": repo in self.private,
            "disabled": False,
            "createdAt": CREATED_AT,
            "lastModified": CREATED_AT,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }
        return 200, {}, answer

    def _tree(self, request, repo, revision, query, path=""):
        _, files = self._snapshot(repo, revision)
        prefix = path.rstrip("/") + "/" if path else ""
        names = [name for name in sorted(files) if name.startswith(prefix)]
        if path and not names:
            raise HubError(404, f'{path} does not exist on "{revision}"', "EntryNotFound")
        entries = []
        for name in names:
            entries.append(
                {"type": "file", "path": name, **self._file_info(repo, name, files[name])}
            )
        folders = {name[: match.start()] for name in names for match in re.finditer("/", name)}
        for name in sorted(folders):
            entries.append({"type": "directory", "path": name, "oid": "0" * 40, "size": 0})
        entries = [entry for entry in entries if entry["path"].startswith(prefix)]
        if query.get("recursive", "").lower() != "true":
            entries = [entry for entry in entries if "/" not in entry["path"][len(prefix) :]]
        return 200, {}, entries

    def _resolve(self, request, repo, revision, path, query):
        """Return a file, or redirect to storage if the file is in Git LFS."""
        head, files = self._snapshot(repo, revision)
        if path not in files:
            raise HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": head})
        info = self._file_info(repo, path, files[path])
        etag = f'"{info["oid"]}"'
        headers = {"X-Repo-Commit": head, "ETag": etag}
        if "lfs" not in info:
            return 200, headers, files[path]
        headers["X-Linked-ETag"] = etag
        headers["X-Linked-Size"] = str(info["size"])
        headers["Location"] = f"{self.url}/storage/{repo}/{info['oid']}"
        return 302, headers, b""


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
        """Record bugs of this server, but not lost connections or those that `stop` breaks off."""
        crash = sys.exc_info()[1]
        if not isinstance(crash, OSError) and not self.hub._stopped.is_set():
            self.hub._crashes.append(crash)


class _Handler(http.server.BaseHTTPRequestHandler):
    # Connections stay open, as the Hub's do.
    protocol_version = "HTTP/1.1"
    # Writes are buffered, so that an answer is sent in one piece.
    wbufsize = -1

    def _handle(self):
        hub = self.server.hub
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, body, time.time())
        hub.requests.append(request)
        try:
            status, headers, body = hub._answer(request)
        except HubError as error:
            status = error.status
            headers = error.headers
            body = {"error": error.message}
        except Dropped:
            self.close_connection = True
            return
        if not isinstance(body, bytes):
            headers = {"Content-Type": "application/json; charset=utf-8", **headers}
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = _handle
    do_HEAD = _handle
    do_POST = _handle
    do_PUT = _handle

    def log_message(self, *arguments):
        """Log nothing."""
