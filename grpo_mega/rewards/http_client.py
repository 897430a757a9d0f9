"""JSON requests to a server, with a time limit per request and retries with exponential backoff.

It uses only the standard library. The limit covers the whole exchange: a server that sends one byte now and then is
disconnected like a server that sends nothing. A request is sent again when it may succeed later: no connection, status
408, 429 or 5xx, or an answer of the wrong form. Any other status is an error of the request, which is not sent again.
"""

from __future__ import annotations

import functools
import http.client
import inspect
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar
from urllib.parse import urlsplit

from grpo_mega.types import UserError

_MAX_ANSWER_BYTES = 16 << 20
_MAX_WAIT_SECONDS = 30.0
_CONNECT_SECONDS = 5.0
_Result = TypeVar("_Result")


class ServerError(RuntimeError):
    """A server returned no usable answer; the message says what it did and how many attempts were made."""


class _FinalError(ServerError):
    """An error that a retry cannot solve."""


@dataclass(frozen=True, kw_only=True)
class RewardServer:
    """Address and limits of a server: arguments of every reward that sends requests to one."""

    url: str
    concurrency: int
    """Number of requests at the same time."""
    request_seconds: float = 30.0
    """Limit of one request."""
    retries: int = 3
    """Number of times that a failed request is sent again."""
    backoff_seconds: float = 0.5
    """Wait before the first retry; it doubles each time, up to 30 s."""
    wait_seconds: float = 300.0
    """Limit for the wait of a step after its sampling; completions without a value have failed then."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the API key, if the server requires one."""

    def ask(self, path: str, body: Mapping[str, Any], read: Callable[[Any], _Result]) -> _Result:
        """POST `body` to `url` + `path` and return `read(answer)`. `read` raises ValueError to have it sent again.

        Raises:
            ServerError: no attempt returned a usable answer.
        """
        text = json.dumps(body).encode("ascii")
        for attempt in range(self.retries + 1):
            try:
                return read(json.loads(self._exchange(path, text)))
            except _FinalError:
                raise
            except (OSError, http.client.HTTPException, ServerError, ValueError, RecursionError) as error:
                reason = f"{type(error).__name__}: {error}"[:300]
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                reason = f"the answer has the wrong form ({type(error).__name__}: {error})"[:300]
            if attempt < self.retries:
                time.sleep(min(self.backoff_seconds * 2**attempt, _MAX_WAIT_SECONDS))
        raise ServerError(f"{self.url}{path}: {self.retries + 1} attempts failed; the last: {reason}")

    def _exchange(self, path: str, body: bytes) -> bytes:
        parts = urlsplit(self.url + path)
        assert parts.hostname is not None
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=self.request_seconds)
        timed_out = threading.Event()
        deadline = time.monotonic() + self.request_seconds
        watch = threading.Timer(self.request_seconds, _disconnect, (connection, timed_out))
        watch.daemon = True
        watch.start()
        try:
            headers = {"Content-Type": "application/json", "Accept": "application/json"}
            if self.api_key_env is not None:
                headers["Authorization"] = f"Bearer {os.environ[self.api_key_env]}"
            connection.request("POST", parts.path or "/", body, headers)
            response = connection.getresponse()
            answer = response.read(_MAX_ANSWER_BYTES + 1)
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            if timed_out.is_set() or time.monotonic() >= deadline:  # disconnected by the timer
                raise ServerError(f"no answer within {self.request_seconds:g} s") from error
            raise
        finally:
            watch.cancel()
            connection.close()
        if timed_out.is_set():
            raise ServerError(f"no complete answer within {self.request_seconds:g} s")
        if len(answer) > _MAX_ANSWER_BYTES:
            raise ServerError(f"the answer has more than {_MAX_ANSWER_BYTES} bytes")
        if response.status != 200:
            text = answer[:200].decode("utf-8", "replace")
            is_transient = response.status in (408, 429) or response.status >= 500
            raise (ServerError if is_transient else _FinalError)(f"{self.url}{path}: status {response.status}: {text}")
        return answer


def _disconnect(connection: http.client.HTTPConnection, timed_out: threading.Event) -> None:
    timed_out.set()
    try:
        if connection.sock is not None:
            connection.sock.shutdown(socket.SHUT_RDWR)
    except OSError:  # the connection was closed meanwhile
        return


def asks_server(concurrency: int) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
    """Decorate a function whose first argument is a `RewardServer`.

    Callers pass the fields of the server as keyword arguments among the others, as the config does.

    Args:
        concurrency: default of the field of that name.
    """

    def decorate(function: Callable[..., _Result]) -> Callable[..., _Result]:
        named, own = inspect.Parameter.KEYWORD_ONLY, list(inspect.signature(function).parameters.values())[1:]
        defaults = {
            f.name: inspect.Parameter.empty if f.default is MISSING else f.default for f in fields(RewardServer)
        }
        defaults["concurrency"] = concurrency
        server_fields = [inspect.Parameter(name, named, default=default) for name, default in defaults.items()]
        signature = inspect.Signature([server_fields[0], *(p.replace(kind=named) for p in own), *server_fields[1:]])

        @functools.wraps(function)
        def with_fields(**args: Any) -> _Result:
            found = signature.bind(**args)
            found.apply_defaults()
            values = found.arguments
            return function(RewardServer(**{name: values.pop(name) for name in defaults}), **values)

        with_fields.__signature__ = signature  # type: ignore[attr-defined]
        return with_fields

    return decorate


def check_server(server: RewardServer) -> None:
    """Check the settings of a server, and that it accepts connections.

    Raises:
        UserError: a setting is wrong, or there is no connection; names the argument.
    """
    parts = urlsplit(server.url) if isinstance(server.url, str) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"url={server.url!r} is not a URL", remedy="write for example http://localhost:8000/v1")
    for name, value, least in (("retries", server.retries, 0), ("concurrency", server.concurrency, 1)):
        if type(value) is not int or not least <= value <= 1000:
            raise UserError(f"{name}={value!r} must be a whole number from {least} to 1000", remedy="correct it")
    for name in ("request_seconds", "backoff_seconds", "wait_seconds"):
        seconds = getattr(server, name)
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= 3600:
            raise UserError(f"{name}={seconds!r} must be a number of seconds above 0", remedy="correct it")
    if server.api_key_env is not None and not os.environ.get(server.api_key_env):
        raise UserError(
            f"api_key_env={server.api_key_env!r}: the environment variable is not set",
            remedy="set it, or remove api_key_env",
        )
    port = parts.port or (443 if parts.scheme == "https" else 80)
    problem = _connection_problem(parts.hostname, port)
    if problem is not None:
        raise UserError(
            f"url={server.url!r}: no connection to port {port} of {parts.hostname} ({problem})",
            remedy="start the server",
        )


def _connection_problem(host: str, port: int) -> str | None:
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        return str(error)
    return None


def sendable(text: str, longest: int) -> str:
    """Return the last `longest` characters, with lone surrogates, which servers reject, as question marks."""
    return text[-longest:].encode("utf-8", "replace").decode("utf-8")
