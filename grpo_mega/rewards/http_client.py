"""One JSON request to a server, with a limit on all of it, and again with longer and longer waits when it fails.

Uses the standard library alone. The limit holds for the whole exchange: a server that sends a byte now and then is cut
off like one that sends nothing. What may go well the next time is tried again (no connection, 408, 429, 5xx, an answer
that is not what was asked for); any other status is the request's fault and is not.
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

_LARGEST_ANSWER = 16 << 20
_LONGEST_WAIT = 30.0
_CONNECT_SECONDS = 5.0
_Result = TypeVar("_Result")


class ServerError(RuntimeError):
    """A server gave no usable answer; says what it did, and how often it was asked."""


class _FinalError(ServerError):
    """Asking again would not help."""


@dataclass(frozen=True, kw_only=True)
class RewardServer:
    """Where to send requests, how many at a time, and for how long: arguments of every reward that asks a server."""

    url: str
    concurrency: int
    """Requests under way at the same time."""
    request_seconds: float = 30.0
    """Limit of one request."""
    retries: int = 3
    """How often a failed request is sent again."""
    backoff_seconds: float = 0.5
    """Wait before the first retry; it doubles each time, up to 30 s."""
    wait_seconds: float = 300.0
    """How long a step waits after its sampling; completions without a value then have failed."""
    api_key_env: str | None = None
    """The environment variable that holds the key, if the server wants one."""

    def ask(self, path: str, body: Mapping[str, Any], read: Callable[[Any], _Result]) -> _Result:
        """POST `body` to `url` + `path`; what `read` makes of the answer. `read` raises ValueError to ask again.

        Raises:
            ServerError: no attempt gave an answer.
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
                reason = f"the answer has another form ({type(error).__name__}: {error})"[:300]
            if attempt < self.retries:
                time.sleep(min(self.backoff_seconds * 2**attempt, _LONGEST_WAIT))
        raise ServerError(f"{self.url}{path}: {self.retries + 1} attempts failed; the last: {reason}")

    def _exchange(self, path: str, body: bytes) -> bytes:
        parts = urlsplit(self.url + path)
        assert parts.hostname is not None
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=self.request_seconds)
        cut = threading.Event()
        deadline = time.monotonic() + self.request_seconds
        watch = threading.Timer(self.request_seconds, _cut_off, (connection, cut))
        watch.daemon = True
        watch.start()
        try:
            headers = {"Content-Type": "application/json", "Accept": "application/json"}
            if self.api_key_env is not None:
                headers["Authorization"] = f"Bearer {os.environ[self.api_key_env]}"
            connection.request("POST", parts.path or "/", body, headers)
            response = connection.getresponse()
            answer = response.read(_LARGEST_ANSWER + 1)
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            if cut.is_set() or time.monotonic() >= deadline:  # cut off by us, at whatever it was doing
                raise ServerError(f"no answer within {self.request_seconds:g} s") from error
            raise
        finally:
            watch.cancel()
            connection.close()
        if cut.is_set():
            raise ServerError(f"no complete answer within {self.request_seconds:g} s")
        if len(answer) > _LARGEST_ANSWER:
            raise ServerError(f"an answer of more than {_LARGEST_ANSWER} bytes")
        if response.status != 200:
            said = answer[:200].decode("utf-8", "replace")
            again = response.status in (408, 429) or response.status >= 500
            raise (ServerError if again else _FinalError)(f"{self.url}{path}: status {response.status}: {said}")
        return answer


def _cut_off(connection: http.client.HTTPConnection, cut: threading.Event) -> None:
    cut.set()
    try:
        if connection.sock is not None:
            connection.sock.shutdown(socket.SHUT_RDWR)
    except OSError:  # it has ended meanwhile
        return


def asks_server(concurrency: int) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
    """The decorated function gets a `RewardServer` first; who calls it names the server's fields one by one among the
    other arguments, as a config does. `concurrency` is the default of that field."""

    def decorate(function: Callable[..., _Result]) -> Callable[..., _Result]:
        named, own = inspect.Parameter.KEYWORD_ONLY, list(inspect.signature(function).parameters.values())[1:]
        defaults = {
            f.name: inspect.Parameter.empty if f.default is MISSING else f.default for f in fields(RewardServer)
        }
        defaults["concurrency"] = concurrency
        of_server = [inspect.Parameter(name, named, default=default) for name, default in defaults.items()]
        signature = inspect.Signature([of_server[0], *(p.replace(kind=named) for p in own), *of_server[1:]])

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
    """Refuse settings that cannot work, and a server that is not there.

    Raises:
        UserError: names the argument.
    """
    parts = urlsplit(server.url) if isinstance(server.url, str) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"url={server.url!r} is no address", remedy="write for example http://localhost:8000/v1")
    for name, value, least in (("retries", server.retries, 0), ("concurrency", server.concurrency, 1)):
        if type(value) is not int or not least <= value <= 1000:
            raise UserError(f"{name}={value!r} is no whole number from {least} to 1000", remedy="correct it")
    for name in ("request_seconds", "backoff_seconds", "wait_seconds"):
        seconds = getattr(server, name)
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= 3600:
            raise UserError(f"{name}={seconds!r} is no number of seconds above 0", remedy="correct it")
    if server.api_key_env is not None and not os.environ.get(server.api_key_env):
        raise UserError(
            f"api_key_env={server.api_key_env!r}: this variable is not set", remedy="set it, or leave the key out"
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
    """The last `longest` characters; lone surrogates, which servers refuse, become question marks."""
    return text[-longest:].encode("utf-8", "replace").decode("utf-8")
