"""A local HTTP server whose answers a test chooses: correct, late, missing, or malformed."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Request:
    path: str
    body: Any
    headers: dict[str, str]


@dataclass
class RewardServer:
    """A running server. `answer(request)` returns (status, body): bytes are sent unchanged, None is never sent."""

    url: str
    answer: Callable[[Request], tuple[int, Any]]
    requests: list[Request] = field(default_factory=list)
    num_concurrent: int = 0
    max_concurrent: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


def judged(text: str) -> dict[str, Any]:
    """Return the answer of an OpenAI-compatible server."""
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


@contextmanager
def serving(answer: Callable[[Request], tuple[int, Any]]) -> Iterator[RewardServer]:
    """Run a server on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = Request(
                self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))), dict(self.headers)
            )
            with server.lock:
                server.requests.append(request)
                server.num_concurrent += 1
                server.max_concurrent = max(server.max_concurrent, server.num_concurrent)
            try:
                status, body = server.answer(request)
            finally:  # before the answer is written: a client may send its next request as soon as it has the answer
                with server.lock:
                    server.num_concurrent -= 1
            try:
                self.respond(status, body)
            except (BrokenPipeError, ConnectionResetError):
                return

        def respond(self, status: int, body: Any) -> None:
            if body is None:  # the client gets no answer
                server.stop.wait(60.0)
                return
            if body == "drip":
                self.wfile.write(b"HTTP/1.0 200 OK\r\n")
                while not server.stop.wait(0.05):
                    self.wfile.write(b"X-Still: there\r\n")
                return
            data = body if isinstance(body, bytes) else json.dumps(body).encode("ascii")
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            return

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server = RewardServer(f"http://127.0.0.1:{http.server_address[1]}", answer)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop.set()
        http.shutdown()
        http.server_close()
        thread.join()
