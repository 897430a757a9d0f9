"""A local server with the protocol of the Hugging Face hub, for models and data sets that a test makes.

Served are the information about a repository at a revision, and its files. A repository can be gated, and can list a
file that it does not have. Every request is recorded.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_token_of_a_test"


@dataclass
class ServedRepository:
    """Commits of a repository: hash -> name of a file -> its bytes; None: the file is listed, but is not there."""

    commits: dict[str, dict[str, bytes | None]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: Mapping[str, bytes | None], branch: str = "main") -> str:
        """Add a commit, to which the branch moves; return its hash."""
        number = f"{len(self.commits)} {sorted(files)}".encode()
        found = hashlib.sha1(number).hexdigest()
        self.commits[found] = dict(files)
        self.branches[branch] = found
        return found


class HubServer(ThreadingHTTPServer):
    """The server. `repositories`: `models/ORG/NAME` or `datasets/ORG/NAME` -> repository."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, ServedRepository] = {}
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, kind_and_name: str, files: Mapping[str, bytes | None], *, gated: bool = False) -> ServedRepository:
        """Serve a new repository with one commit on `main`."""
        found = ServedRepository(gated=gated)
        found.commit(files)
        self.repositories[kind_and_name] = found
        return found

    def downloads(self) -> list[str]:
        """Return the paths of the files that were sent."""
        return [line.removeprefix("GET ") for line in self.requests if line.startswith("GET ") and "/resolve/" in line]


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        self.server.tokens.add(self.headers.get("Authorization"))
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            self._information("/".join(parts[1:4]), "/".join(parts[5:]) or "main")
        else:
            kind = parts.pop(0) if parts[0] == "datasets" else "models"
            self._file(f"{kind}/{parts[0]}/{parts[1]}", parts[3], "/".join(parts[4:]))

    def _information(self, key: str, revision: str) -> None:
        repository = self.server.repositories.get(key)
        if repository is None:  # the hub answers 401 to a request without a token, so that names stay private
            self._fail(401 if self.headers.get("Authorization") is None else 404, "RepoNotFound")
            return
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            self._fail(404, "RevisionNotFound")
            return
        files = repository.commits[commit]
        siblings = [{"rfilename": name, "size": len(content or b"")} for name, content in files.items()]
        body = json.dumps({"id": key.partition("/")[2], "sha": commit, "siblings": siblings}).encode()
        self._send(body, {"Content-Type": "application/json"})

    def _file(self, key: str, commit: str, name: str) -> None:
        repository = self.server.repositories[key]
        if repository.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._fail(403 if self.headers.get("Authorization") else 401, "GatedRepo")
            return
        commit = repository.branches.get(commit, commit)
        content = repository.commits[commit].get(name)
        if content is None:
            self._fail(404, "EntryNotFound")
            return
        etag = hashlib.sha1(content).hexdigest()
        self._send(content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    def _fail(self, status: int, code: str) -> None:
        self._send(b"{}", {"X-Error-Code": code}, status)

    def _send(self, body: bytes, headers: Mapping[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run a server in a thread."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def environment_of(server: HubServer, home: Path) -> dict[str, str]:
    """Return the environment variables of a client whose cache is below `home`."""
    return {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


def files_of(folder: Path) -> dict[str, bytes | None]:
    """Return the files of a folder, as a repository holds them."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
