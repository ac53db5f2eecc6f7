"""A small Hub on 127.0.0.1: the part of its HTTP protocol that huggingface_hub's downloads use.

Plays models with revisions, tokens and gates, breaks off on demand, and remembers what was asked
of it. Knows nothing of shardmix; no test may reach the real Hub.
"""

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

EXPIRED_TOKEN = "hf_expired"
NARROW_TOKEN = "hf_narrow"  # a fine-grained token that was not given leave to read files
_LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".onnx")
# `org/name` is never quoted; a revision is quoted whole, so that it holds no `/`.
_INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?")
_TREE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)/?")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass(frozen=True, slots=True)
class HubRequest:
    """One request, as it arrived."""

    method: str
    """GET or HEAD."""
    path: str
    """With its quoting, without the query."""
    file: str | None
    """The file that was asked for, within its repository; None for the API."""
    authorization: str | None
    """The Authorization header."""


@dataclass(slots=True)
class _Repo:
    revisions: dict[str, str] = field(default_factory=dict)
    """Branches and tags to commits."""
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Commits to files."""
    token: str | None = None
    """What the files ask for; None: everybody may have them."""
    private: bool = False
    """The API asks for the token too."""


class HubServer:
    """A Hub with the repositories that a test gives it; `url` is its HF_ENDPOINT."""

    def __init__(self) -> None:
        self.requests: list[HubRequest] = []
        """What was asked, in order of arrival."""
        self.is_down = False
        """Answer everything with 503."""
        self.is_silent = False
        """Accept connections and never answer."""
        self.closing = threading.Event()
        """Set at the end, for threads that keep silent."""
        self._repos: dict[str, _Repo] = {}
        self._breaks: dict[str, int] = {}
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.hub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port for good."""
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def push(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        *,
        revision: str = "main",
        token: str | None = None,
        private: bool = False,
    ) -> str:
        """Make a commit of these files alone, point a branch or tag at it, and return its sha.

        With `token` the files are gated; with `private` the repository is hidden, too.
        """
        repo = self._repos.setdefault(repo_id, _Repo())
        content = json.dumps([repo_id, revision, *((name, _sha256(files[name])) for name in files)])
        commit = hashlib.sha1(content.encode()).hexdigest()
        repo.commits[commit] = dict(files)
        repo.revisions[revision] = commit
        repo.token, repo.private = token, private
        return commit

    def break_off(self, file: str, *, after: int | None) -> None:
        """Close the connection at this byte of a file, however often it is tried; None: no more."""
        if after is None:
            self._breaks.pop(file, None)
        else:
            self._breaks[file] = after

    def fetched(self) -> list[str]:
        """Return the files whose content was asked for, in name order."""
        gets = [request for request in self.requests if request.method == "GET"]
        return sorted(request.file for request in gets if request.file)

    def record(self, request: HubRequest) -> None:
        """Remember a request; called by the threads that serve them."""
        with self._lock:
            self.requests.append(request)

    def answer(self, path: str, authorization: str | None) -> "_Answer":
        """Return what the Hub says to a request for a path."""
        if self.is_down:
            return _Answer(503)
        found = _FILE.fullmatch(path) or _TREE.fullmatch(path) or _INFO.fullmatch(path)
        if found is None:
            return _Answer(404)
        if authorization == f"Bearer {EXPIRED_TOKEN}":
            return _refusal(401, None, "Invalid credentials in Authorization header")
        parts = found.groupdict()
        repo_id, is_file = parts["repo"], "file" in parts
        repo = self._repos.get(repo_id)
        has_access = repo is not None and repo.token in (None, _token(authorization))
        if repo is None or (repo.private and not has_access):
            return _refusal(401, "RepoNotFound", "Invalid username or password.")
        if is_file and authorization == f"Bearer {NARROW_TOKEN}":
            return _refusal(403, None, "Please enable access to public gated repositories")
        if is_file and not has_access:
            # As on the Hub: what a gated repository holds may be seen, but not had.
            status = 401 if authorization is None else 403
            return _refusal(status, "GatedRepo", f"Access to model {repo_id} is restricted.")
        revision = unquote(parts["revision"] or "main")
        commit = repo.revisions.get(revision, revision)
        if commit not in repo.commits:
            return _refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repo.commits[commit]
        if is_file:
            return _file_answer(files, unquote(parts["file"]), commit)
        if found.re is _TREE:
            return _json_answer([_tree_entry(name, files[name]) for name in sorted(files)])
        siblings = [{"rfilename": name, "size": len(files[name])} for name in sorted(files)]
        return _json_answer({"id": repo_id, "sha": commit, "siblings": siblings})

    def break_after(self, file: str | None) -> int | None:
        """Return the byte of a file at which to close the connection, if any."""
        return self._breaks.get(file or "")


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


def _refusal(status: int, code: str | None, message: str) -> _Answer:
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return _Answer(status, json.dumps({"error": message}).encode(), headers)


def _json_answer(content: Any) -> _Answer:
    return _Answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})


def _file_answer(files: Mapping[str, bytes], name: str, commit: str) -> _Answer:
    headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
    if name not in files:
        refusal = _refusal(404, "EntryNotFound", "Entry not found")
        return _Answer(404, refusal.body, {**refusal.headers, **headers})
    body = files[name]
    etag = _sha256(body) if name.endswith(_LFS_SUFFIXES) else _git_oid(body)
    headers |= {"ETag": f'"{etag}"', "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(body))}
    return _Answer(200, body, headers)


def _tree_entry(name: str, body: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": name, "size": len(body), "oid": _git_oid(body)}
    if name.endswith(_LFS_SUFFIXES):
        entry["lfs"] = {"oid": _sha256(body), "size": len(body), "pointerSize": 130}
    return entry


def _token(authorization: str | None) -> str | None:
    return authorization.removeprefix("Bearer ") if authorization else None


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _git_oid(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # One segment an answer: without it, delayed acknowledgements cost 40 ms each.
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: object) -> None:
        pass  # the requests are in HubServer.requests

    def _answer(self, *, with_body: bool) -> None:
        hub: HubServer = self.server.hub  # type: ignore[attr-defined]
        path = urlsplit(self.path).path
        authorization = self.headers.get("Authorization")
        found = _FILE.fullmatch(path)
        file = unquote(found["file"]) if found else None
        hub.record(HubRequest(self.command, path, file, authorization))
        if hub.is_silent:
            hub.closing.wait()
            self.close_connection = True
            return
        answer = hub.answer(path, authorization)
        status, headers, start = answer.status, dict(answer.headers), 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and status == 200:
            status, start = 206, int(asked[1])
            size = len(answer.body)
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        body = answer.body[start:]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if not with_body:
            return
        break_after = hub.break_after(file)
        if break_after is None:
            self.wfile.write(body)
        else:
            self.wfile.write(body[: max(break_after - start, 0)])
            self.close_connection = True
