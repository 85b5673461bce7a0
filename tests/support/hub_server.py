"""A stand-in for the Hugging Face Hub on this machine: repositories, commits, files, and what it refuses."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

ROUTES = (
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", "info"),
    ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", "branch"),
    ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", "preupload"),
    ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", "commit"),
    ("HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
)


class Refused(Exception):
    """An answer other than 200; ``code`` is what the Hub says in its header."""

    def __init__(self, status: int, code: str = ""):
        super().__init__(status)
        self.status, self.code = status, code


class Hub:
    """Repositories: per branch, its commits, each the files of it.

    Attributes:
        private: whether each repository was made so, by its name.
        gated: names of repositories that ask for access.
        proposals: commits that were proposed.
        before_commit: called before a commit is taken, for commits of others in between.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, list[dict[str, bytes]]]] = {}
        self.private: dict[str, bool] = {}
        self.gated: set[str] = set()
        self.proposals: list[dict[str, bytes]] = []
        self.before_commit: Any = lambda: None
        self.url = ""

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.repos[repo][branch][-1]

    def put(self, repo: str, files: dict[str, bytes]) -> None:
        """A commit of somebody else."""
        commits = self.repos.setdefault(repo, {"main": [{}]})["main"]
        commits.append(commits[-1] | files)

    def _at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        if repo not in self.repos:
            raise Refused(404, "RepoNotFound")
        if repo in self.gated:
            raise Refused(403, "GatedRepo")
        branches = self.repos[repo]
        if revision in branches:
            return commit_id(branches[revision]), branches[revision][-1]
        for commits in branches.values():
            for count in range(1, len(commits) + 1):
                if commit_id(commits[:count]) == revision:
                    return revision, commits[count - 1]
        raise Refused(404, "RevisionNotFound")

    def create(self, body: bytes) -> Any:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        answer = {"url": f"{self.url}/{name}", "id": name, "name": name}
        if name in self.repos:
            raise Refused(409)
        self.repos[name] = {"main": [{}]}
        self.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
        return answer

    def validate(self, body: bytes) -> Any:
        return {"errors": [], "warnings": []}

    def info(self, body: bytes, repo: str, revision: str | None) -> Any:
        commit, files = self._at(repo, revision or "main")
        return {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}

    def branch(self, body: bytes, repo: str, branch: str) -> Any:
        branches = self.repos[repo]
        if branch in branches:
            raise Refused(409)
        branches[branch] = list(branches["main"])
        return {}

    def preupload(self, body: bytes, repo: str, revision: str) -> Any:
        asked = json.loads(body)["files"]
        return {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]}

    def commit(self, body: bytes, repo: str, revision: str) -> Any:
        self.before_commit()
        lines = [json.loads(line) for line in body.splitlines()]
        head = next(line["value"] for line in lines if line["key"] == "header")
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        commits = self.repos[repo][revision]
        answer = {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.url}/{repo}/commit/{'0' * 40}"}
        if head.get("parentCommit") not in (None, commit_id(commits)):
            raise Refused(412)
        if "create_pr" in head or self.proposing:
            self.proposals.append(files)
            return answer | {"pullRequestUrl": f"{self.url}/{repo}/discussions/1"}
        commits.append(commits[-1] | files)
        return answer

    proposing = False

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> tuple[bytes, dict[str, str]]:
        commit, files = self._at(repo, revision)
        if name not in files:
            raise Refused(404, "EntryNotFound")
        content = files[name]
        return content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}


def commit_id(commits: list[dict[str, bytes]]) -> str:
    return hashlib.sha1(repr([sorted(files.items()) for files in commits]).encode()).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            url = urlsplit(self.path)
            hub.proposing = "create_pr=1" in url.query
            headers, status, content = {}, 200, b""
            try:
                for method, route, name in ROUTES:
                    found = re.fullmatch(route, url.path)
                    if method == self.command and found:
                        given = [None if part is None else unquote(part) for part in found.groups()]
                        answer = getattr(hub, name)(body, *given)
                        content, headers = answer if isinstance(answer, tuple) else (json.dumps(answer).encode(), {})
                        break
                else:
                    raise Refused(404)
            except Refused as refused:
                status, headers = refused.status, {"X-Error-Code": refused.code}
                content = json.dumps({"error": refused.code, "url": f"{hub.url}/me/qwen"}).encode()
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = _answer

    return Handler


@contextmanager
def hub_server() -> Iterator[Hub]:
    """The stand-in, at ``hub.url`` for as long as the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
