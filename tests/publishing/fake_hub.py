"""A Hub on loopback: the HTTP endpoints that pushing and loading use, in memory, with faults on order."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub
import yaml

TOKEN = "hf_" + "SecretTokenThatNobodyMaySee"
NAME = "pushed-release"
Files = dict[str, tuple[bytes, bool]]  # path: content, whether it is in LFS


def forget_connections() -> None:
    """Make huggingface_hub open new ones: 0.x keeps its offline mode in them."""
    utilities: Any = huggingface_hub.utils._http
    (utilities.reset_sessions if hasattr(utilities, "reset_sessions") else utilities.close_session)()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Fault:
    """What goes wrong: an HTTP status, or (None) a dropped connection; before the request is acted on, or after it."""

    method: str
    path: str  # a regular expression
    status: int | None = None
    times: int = 1
    after: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "the fake Hub fails on order"


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files, parent: str | None) -> str:
        commit = hashlib.sha1(f"{len(self.commits)}{parent}{sorted(files)}".encode()).hexdigest()
        self.commits[commit], self.parents[commit] = files, parent
        return commit

    def resolve(self, revision: str) -> str | None:
        for refs in (self.branches, self.tags, self.pull_requests):
            if revision in refs:
                return refs[revision]
        return revision if revision in self.commits else None

    def contents(self, revision: str) -> dict[str, bytes]:
        """What a test compares: the files at a revision, without .gitattributes."""
        commit = self.resolve(revision)
        assert commit is not None, revision
        return {path: held[0] for path, held in self.commits[commit].items() if path != ".gitattributes"}

    def history(self, branch: str) -> list[str]:
        """The commits of a branch, newest first."""
        found, commit = [], self.branches.get(branch)
        while commit is not None:
            found.append(commit)
            commit = self.parents[commit]
        return found


class Answer(Exception):
    def __init__(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        self.status, self.body, self.headers = status, body, headers or {}


class FakeHub:
    """The server and what it holds.

    Attributes:
        tokens: token: {"name", "role"}; it may write to its own name and to `organisations`.
        log: (method, path) of each request.
        echo: error messages send the token back, as no server should.
        corrupt: paths whose content the server damages at the commit.
        page_size: entries of one page of a tree.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, dict[str, str]] = {}
        self.organisations = {"lab"}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.meanwhile: list[tuple[str, str, Callable[[], object]]] = []
        self.log: list[tuple[str, str]] = []
        self.echo = False
        self.corrupt: set[str] = set()
        self.page_size = 20
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, method: str, path: str, status: int | None = None, **more: Any) -> None:
        self.faults.append(Fault(method, path, status, **more))

    def before(self, method: str, path: str, action: Callable[[], object]) -> None:
        """Let someone else act before each request like this one, as a regular expression tells."""
        self.meanwhile.append((method, path, action))

    def make_repo(self, repo_id: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        start = repo.commit({".gitattributes": (b"*.safetensors filter=lfs\n", False)}, None)
        repo.branches["main"] = start
        if files is not None:
            held = repo.commits[start] | {path: (content, False) for path, content in files.items()}
            repo.branches["main"] = repo.commit(held, start)
        return repo

    def count(self, method: str, path: str) -> int:
        return sum(said == method and re.search(path, where) is not None for said, where in self.log)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one piece: in two, each answer would wait for a delayed acknowledgement
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    # ------------------------------------------------------------------------------------------------ the machinery

    def _serve(self) -> None:
        address = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(address.query))
        self.place = address.path
        self.content = self._read()
        with self.hub.lock:
            self.hub.log.append((self.command, self.place))
            for method, path, action in self.hub.meanwhile:
                if method == self.command and re.search(path, self.place):
                    action()
            fault = self._due()
            if fault is not None and not fault.after:
                return self._break(fault)
            try:
                self._route()
                answer = Answer(404, {"error": f"no such endpoint: {self.place}"})
            except Answer as found:
                answer = found
            if fault is not None:
                return self._break(fault)
        return self._send(answer)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _due(self) -> Fault | None:
        for fault in self.hub.faults:
            if fault.times > 0 and fault.method == self.command and re.search(fault.path, self.place):
                fault.times -= 1
                return fault
        return None

    def _break(self, fault: Fault) -> None:
        if fault.status is None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self._send(Answer(fault.status, {"error": fault.message}, fault.headers))

    def _send(self, answer: Answer) -> None:
        body = answer.body
        if answer.status >= 400 and self.hub.echo:
            said = f"{(body or {}).get('error', '')} (you sent {self.headers.get('Authorization')})"
            body, answer.headers["X-Error-Message"] = {"error": said}, said
            answer.headers["X-HF-Warning"] = f"topic{len(self.hub.log)}; {self.headers.get('Authorization')}"
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/octet-stream" if isinstance(body, bytes) else "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ------------------------------------------------------------------------------------------------- the endpoints

    def _route(self) -> None:
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, self.place)
            if match and self.command in method.split("|"):
                action(self, *map(urllib.parse.unquote, match.groups()))

    def _user(self) -> dict[str, str]:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self.hub.tokens:
            said = "Invalid credentials in Authorization header"
            raise Answer(401, {"error": said}, {"X-Error-Message": said})
        return self.hub.tokens[token]

    def _may_write(self, namespace: str) -> None:
        user = self._user()
        if user["role"] == "read" or namespace not in {user["name"], *self.hub.organisations}:
            raise Answer(403, {"error": f"You don't have the rights to write under the namespace {namespace!r}"})

    def _repo(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.headers.get("Authorization")):
            raise Answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> str:
        commit = repo.resolve(revision)
        if commit is None:
            said = f"Invalid rev id: {revision}"
            raise Answer(404, {"error": said}, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": said})
        return commit

    def whoami(self) -> None:
        user = self._user()
        raise Answer(200, {"name": user["name"], "type": "user", "auth": {"accessToken": {"role": user["role"]}}})

    def create(self) -> None:
        order = json.loads(self.content)
        namespace = order.get("organization") or self._user()["name"]
        repo_id = f"{namespace}/{order['name']}"
        url = f"{self.hub.url}/{repo_id}"
        self._may_write(namespace)
        if repo_id in self.hub.repos:
            raise Answer(409, {"error": "You already created this model repo", "url": url})
        self.hub.make_repo(repo_id, private=order.get("visibility") == "private" or bool(order.get("private")))
        raise Answer(200, {"url": url, "name": repo_id})

    def validate_yaml(self) -> None:
        text = json.loads(self.content)["content"]
        block = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        if not block or not isinstance(yaml.safe_load(block[1]), dict):
            raise Answer(400, {"errors": [{"message": "the metadata is no mapping"}], "warnings": []})
        raise Answer(200, {"errors": [], "warnings": []})

    def info(self, repo_id: str, revision: str = "main") -> None:
        repo = self._repo(repo_id)
        commit = self._commit_of(repo, revision)
        siblings = [{"rfilename": path} for path in repo.commits[commit]]
        fields = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": commit, "private": repo.private}
        raise Answer(200, {**fields, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def refs(self, repo_id: str) -> None:
        repo = self._repo(repo_id)

        def listed(kind: str, refs: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"{kind}{name}", "targetCommit": commit} for name, commit in refs.items()]

        found = {"branches": listed("refs/heads/", repo.branches), "tags": listed("refs/tags/", repo.tags)}
        raise Answer(200, {**found, "converts": [], "pullRequests": listed("", repo.pull_requests)})

    def tree(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id)
        files = repo.commits[self._commit_of(repo, revision)]
        folders = sorted({path.rsplit("/", 1)[0] for path in files if "/" in path})
        entries: list[dict[str, Any]] = [
            {"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders
        ]
        for path, (content, in_lfs) in sorted(files.items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
            if in_lfs:
                pointer = f"oid sha256:{sha256(content)}".encode()
                entry["oid"] = git_sha1(pointer)
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": len(pointer)}
            entries.append(entry)
        start = int(self.query.get("cursor", 0))
        stop = start + self.hub.page_size
        query = urllib.parse.urlencode({**self.query, "cursor": stop})
        more = {"Link": f'<{self.hub.url}{self.place}?{query}>; rel="next"'} if stop < len(entries) else {}
        raise Answer(200, entries[start:stop], more)

    def preupload(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id)
        self._may_write(repo_id.split("/")[0])
        files = repo.commits[self._commit_of(repo, revision)]
        raise Answer(200, {"files": [self._mode(file, files) for file in json.loads(self.content)["files"]]})

    def _mode(self, file: dict[str, Any], files: Files) -> dict[str, Any]:
        path, in_lfs = file["path"], file["path"].endswith(".safetensors")
        content = files[path][0] if path in files else None
        oid = None if content is None else sha256(content) if in_lfs else git_sha1(content)
        return {"path": path, "uploadMode": "lfs" if in_lfs else "regular", "shouldIgnore": False, "oid": oid}

    def commit(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id)
        self._may_write(repo_id.split("/")[0])
        parent = self._commit_of(repo, revision)
        lines = [json.loads(line) for line in self.content.splitlines()]
        wanted = lines[0]["value"].get("parentCommit")
        if wanted is not None and wanted != parent:
            raise Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(repo.commits[parent])
        for line in lines[1:]:
            self._apply(line["key"], line["value"], files)
        commit = repo.commit(files, parent)
        answer = {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit}"}
        if self.query.get("create_pr"):
            number = len(repo.pull_requests) + 1
            repo.pull_requests[f"refs/pr/{number}"] = commit
            raise Answer(200, {**answer, "pullRequestUrl": f"{self.hub.url}/{repo_id}/discussions/{number}"})
        repo.branches[revision] = commit
        raise Answer(200, {**answer, "hookOutput": ""})

    def _apply(self, key: str, value: dict[str, Any], files: Files) -> None:
        path = value["path"]
        if key == "deletedFile":
            if path not in files:
                said = "A file with this name doesn't exist"
                raise Answer(404, {"error": said}, {"X-Error-Code": "EntryNotFound"})
            del files[path]
            return
        if key == "lfsFile" and value["oid"] not in self.hub.lfs:
            raise Answer(400, {"error": f"LFS pointer of {path} points to a file that does not exist"})
        content = self.hub.lfs[value["oid"]] if key == "lfsFile" else base64.b64decode(value["content"])
        if path in self.hub.corrupt:
            content += b"damaged"
        files[path] = (content, key == "lfsFile")

    def branch(self, repo_id: str, branch: str) -> None:
        self._may_write(repo_id.split("/")[0])
        self._new_ref(
            repo_id, self._repo(repo_id).branches, branch, json.loads(self.content).get("startingPoint", "main")
        )

    def tag(self, repo_id: str, revision: str) -> None:
        self._may_write(repo_id.split("/")[0])
        self._new_ref(repo_id, self._repo(repo_id).tags, json.loads(self.content)["tag"], revision)

    def _new_ref(self, repo_id: str, refs: dict[str, str], name: str, revision: str) -> None:
        commit = self._commit_of(self._repo(repo_id), revision)
        if name in refs:
            raise Answer(409, {"error": f"Reference {name} already exists"})
        refs[name] = commit
        raise Answer(200, {})

    def lfs_batch(self, repo_id: str) -> None:
        self._may_write(repo_id.split("/")[0])
        answers = []
        for wanted in json.loads(self.content)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.lfs:
                places = {"upload": "lfs-store", "verify": "lfs-verify"}
                answer["actions"] = {
                    name: {"href": f"{self.hub.url}/{place}/{wanted['oid']}"} for name, place in places.items()
                }
            answers.append(answer)
        raise Answer(200, {"transfer": "basic", "objects": answers})

    def lfs_store(self, oid: str) -> None:
        if sha256(self.content) != oid:
            raise Answer(400, {"error": "the content does not have this hash"})
        self.hub.lfs[oid] = self.content
        raise Answer(200, {})

    def lfs_verify(self, oid: str) -> None:
        raise Answer(200 if len(self.hub.lfs.get(oid, b"")) == json.loads(self.content)["size"] else 422, {})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self._repo(repo_id)
        commit = self._commit_of(repo, revision)
        if path not in repo.commits[commit]:
            raise Answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content, in_lfs = repo.commits[commit][path]
        etag = f'"{sha256(content) if in_lfs else git_sha1(content)}"'
        headers = {"X-Repo-Commit": commit, "ETag": etag, "Content-Length": str(len(content))}
        if in_lfs:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
        raise Answer(200, content, headers)


MODEL = r"/api/models/([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("GET", MODEL, _Handler.info),
    ("GET", MODEL + r"/revision/(.+)", _Handler.info),
    ("GET", MODEL + r"/refs", _Handler.refs),
    ("GET", MODEL + r"/tree/([^/]+)", _Handler.tree),
    ("POST", MODEL + r"/preupload/(.+)", _Handler.preupload),
    ("POST", MODEL + r"/commit/(.+)", _Handler.commit),
    ("POST", MODEL + r"/branch/(.+)", _Handler.branch),
    ("POST", MODEL + r"/tag/(.+)", _Handler.tag),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs-store/(\w+)", _Handler.lfs_store),
    ("POST", r"/lfs-verify/(\w+)", _Handler.lfs_verify),
    ("GET|HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler.resolve),
]
