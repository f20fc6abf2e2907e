"""A Hub on loopback: an HTTP server that speaks what huggingface_hub needs of the Hub's API for models.

    with FakeHub() as hub:
        connect(monkeypatch, hub, cache)   # this process' huggingface_hub now talks to it
        hub.fail("PUT /lfs/", "cut")       # the next upload of a large file breaks off

Files that match `hub.large` go the way of git LFS (batch, upload, verify), the others into the commit, as on
the real one. Its three tokens are of alice, who is in the organisation lab: one writes, one reads, one may
not write to lab.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
from huggingface_hub import constants

WRITER, READER, FOREIGNER = "hf_writer", "hf_reader", "hf_foreigner"
USERS = {
    WRITER: {"name": "alice", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}},
    READER: {"name": "alice", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "read"}}},
    FOREIGNER: {"name": "bob", "orgs": [], "auth": {"accessToken": {"role": "write"}}},
}


@dataclass
class Entry:
    """A file of a commit."""

    data: bytes
    is_large: bool

    @property
    def sha256(self):
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git_sha1(self):
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def etag(self):
        return self.sha256 if self.is_large else self.git_sha1


@dataclass
class Repo:
    """A repository: its commits with all their files, and what points to them."""

    private: bool = False
    gated: object = False
    commits: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)
    head: str = ""

    def commit(self, files):
        self.head = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[self.head] = files
        return self.head

    def resolve(self, revision):
        revision = {"main": self.head, **self.tags}.get(revision, revision)
        return revision if revision in self.commits else None


class FakeHub:
    """The server; a context manager.

    Attributes:
        repos: By name.
        requests: "METHOD /path" of everything that was asked, in order.
        large: Patterns of files that go by LFS.
    """

    def __init__(self, large=("*.safetensors", "*.bin", "*.onnx")):
        self.repos = {}
        self.objects = {}
        self.requests = []
        self.large = large
        self.lock = threading.Lock()
        self._failures = []

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def fail(self, request, how, times=1):
        """Answer the next requests that match the pattern with a status, or "cut" their connection."""
        self._failures.append([re.compile(request), how, times])

    def failure(self, request):
        for failure in self._failures:
            if failure[2] and failure[0].search(request):
                failure[2] -= 1
                return failure[1]
        return None

    def files(self, name, revision="main"):
        """The files of a repository, name -> bytes."""
        repo = self.repos[name]
        return {path: entry.data for path, entry in repo.commits[repo.resolve(revision)].items()}


def connect(monkeypatch, hub, cache, token=WRITER):
    """Let huggingface_hub and transformers in this process talk to a server, with a cache of its own."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # its own, made on first use
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between retries
    huggingface_hub.close_session()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _serve(self):
        split = urlsplit(self.path)
        path, self.query = unquote(split.path), parse_qs(split.query)
        request = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.requests.append(request)
            failure = self.hub.failure(request)
        length = int(self.headers.get("Content-Length") or 0)
        if failure == "cut":
            self.rfile.read(min(length, 1024))
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.body = self._read_body(length)
        if failure is not None:
            self._answer(failure, {"error": "made to fail"})
            return
        for pattern, method in _ROUTES:
            if match := re.fullmatch(pattern, request):
                with self.hub.lock:
                    method(self, *match.groups())
                return
        self._answer(404, {"error": f"no route for {request}"})

    def _read_body(self, length):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status, content=None, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _user(self):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in USERS:
            self._answer(401, {"error": "Invalid username or password."})
            return None
        return USERS[token]

    def _repo(self, name, writes=False):
        """The repository, or None after the answer that there is none for this token."""
        repo = self.hub.repos.get(name)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        spaces = (
            [USERS[token]["name"], *(org["name"] for org in USERS[token]["orgs"])] if token in USERS else []
        )
        is_member = name.partition("/")[0] in spaces
        if repo is None or (repo.private and not is_member):
            self._answer(
                404 if token in USERS else 401,
                {"error": "Repository not found"},
                {"X-Error-Code": "RepoNotFound"},
            )
            return None
        if writes and not (is_member and USERS[token]["auth"]["accessToken"]["role"] == "write"):
            self._answer(403, {"error": "Forbidden"})
            return None
        return repo

    def whoami(self):
        if user := self._user():
            self._answer(200, {"type": "user", "id": user["name"], "fullname": user["name"], **user})

    def create(self):
        if (user := self._user()) is None:
            return
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or user["name"]
        name = f"{owner}/{wanted['name']}"
        if owner not in [user["name"], *(org["name"] for org in user["orgs"])]:
            self._answer(403, {"error": "You don't have the rights to create a model under this namespace"})
            return
        status = 409 if name in self.hub.repos else 200
        if status == 200:
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self.hub.repos[name] = repo = Repo(private)
            repo.commit({".gitattributes": Entry(b"*.safetensors filter=lfs\n", False)})
        self._answer(status, {"url": f"{self.hub.url}/{name}", "name": name, "id": name, "error": "exists"})

    def info(self, name, revision="main"):
        if (repo := self._repo(name)) is None:
            return
        if (sha := repo.resolve(revision or "main")) is None:
            self._answer(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
            return
        card = repo.commits[sha].get("README.md", Entry(b"", False)).data.decode()
        task = re.search(r"^pipeline_tag: (.+)$", card, re.MULTILINE)
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        self._answer(
            200,
            {
                "_id": name, "id": name, "sha": sha, "private": repo.private, "gated": repo.gated,
                "tags": [], "downloads": 0, "likes": 0, "siblings": siblings, "library_name": "transformers",
                "pipeline_tag": task[1] if task else None,
            },
        )  # fmt: skip

    def tree(self, name, revision, folder=None):
        if (repo := self._repo(name)) is None:
            return
        entries = []
        for path, entry in repo.commits[repo.resolve(revision)].items():
            if folder and not path.startswith(folder):
                continue
            row = {"type": "file", "path": path, "size": len(entry.data), "oid": entry.git_sha1}
            if entry.is_large:
                row |= {"lfs": {"oid": entry.sha256, "size": len(entry.data), "pointerSize": 134}}
            entries.append(row)
        self._answer(200, entries)

    def refs(self, name):
        if (repo := self._repo(name)) is None:
            return
        tags = [{"name": t, "ref": f"refs/tags/{t}", "targetCommit": sha} for t, sha in repo.tags.items()]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.head}
        self._answer(200, {"branches": [main], "tags": tags, "converts": []})

    def preupload(self, name, revision):
        if self._repo(name, writes=True) is None:
            return
        files = json.loads(self.body)["files"]
        modes = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if any(fnmatch(f["path"], p) for p in self.hub.large) else "regular",
                "shouldIgnore": False,
            }
            for f in files
        ]
        self._answer(200, {"files": modes})

    def batch(self, name):
        if self._repo(name, writes=True) is None:
            return
        answers = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs-verify"}}
            answers.append(answer)
        self._answer(200, {"transfer": "basic", "objects": answers})

    def put_object(self, oid):
        is_whole = hashlib.sha256(self.body).hexdigest() == oid
        if is_whole:
            self.hub.objects[oid] = self.body
        self._answer(200 if is_whole else 400, {})

    def verify(self):
        wanted = json.loads(self.body)
        arrived = self.hub.objects.get(wanted["oid"])
        self._answer(200 if arrived is not None and len(arrived) == wanted["size"] else 404, {})

    def commit(self, name, revision):
        if (repo := self._repo(name, writes=True)) is None:
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = dict(repo.commits[repo.head])
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (None, repo.head):
                self._answer(412, {"error": "A commit has happened since."})
                return
            if line["key"] == "file":
                files[value["path"]] = Entry(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                files[value["path"]] = Entry(self.hub.objects[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files)
        self._answer(
            200, {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True}
        )

    def tag(self, name, revision):
        if (repo := self._repo(name, writes=True)) is None:
            return
        tag = json.loads(self.body)["tag"]
        if tag not in repo.tags:
            repo.tags[tag] = repo.resolve(revision)
            self._answer(200, {})
        else:
            self._answer(409, {"error": "Tag exists"})

    def settings(self, name):
        if (repo := self._repo(name, writes=True)) is None:
            return
        repo.gated = json.loads(self.body).get("gated", repo.gated)
        self._answer(200, {})

    def validate(self):
        self._answer(200, {"errors": [], "warnings": []})

    def resolve(self, name, revision, path):
        if (repo := self._repo(name)) is None:
            return
        if (sha := repo.resolve(revision)) is None:
            self._answer(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
            return
        if (entry := repo.commits[sha].get(path)) is None:
            self._answer(
                404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}
            )
            return
        self._answer(200, entry.data, {"X-Repo-Commit": sha, "ETag": f'"{entry.etag}"'})


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"GET /api/models/{_NAME}", _Handler.info),
    (rf"GET /api/models/{_NAME}/revision/(.+)", _Handler.info),
    (rf"GET /api/models/{_NAME}/tree/([^/]+)(?:/(.+))?", _Handler.tree),
    (rf"GET /api/models/{_NAME}/refs", _Handler.refs),
    (rf"POST /api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    (rf"POST /api/models/{_NAME}/commit/(.+)", _Handler.commit),
    (rf"POST /api/models/{_NAME}/tag/(.+)", _Handler.tag),
    (rf"PUT /api/models/{_NAME}/settings", _Handler.settings),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /lfs/(\w+)", _Handler.put_object),
    (r"POST /lfs-verify", _Handler.verify),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
