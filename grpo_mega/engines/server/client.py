"""The job's end of the connection to an engine server, on the first rank of an engine: every wait has a limit.

Asserted by tests/parallel/test_servers.py.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from grpo_mega.engines.server.messages import differences
from grpo_mega.engines.server.protocol import (
    Address,
    Connection,
    ConnectionFailedError,
    ServerMessage,
    WrongPeerError,
    require_token,
)
from grpo_mega.types import UserError

log = logging.getLogger("grpo_mega.engines")

_GREETING_SECONDS = 10.0
_AGAIN_SECONDS = 0.5  # between two tries to reach a server that is not there yet
_TELL_SECONDS = 20.0  # between two lines that say who is waited for
_LEAVING_SECONDS = 5.0  # until a server has noticed that its last job is gone


def inspect_server(name: str, address: Address, token: bytes) -> tuple[dict[str, Any], str | None]:
    """What a server says of itself, and which job it serves.

    Raises:
        UserError: nobody listens there, or it is no engine server that knows the secret.
    """
    try:
        wire, facts, serves = _greeted(name, address, token)
    except (OSError, ConnectionFailedError) as error:
        raise UserError(f"{name} does not answer ({error})", remedy="start launch/serve.sh there") from error
    with suppress(ConnectionFailedError):
        wire.send("look")
    wire.close()
    return facts, serves


class ServerClient:
    """A server that serves this job until `close`."""

    def __init__(
        self,
        name: str,
        address: Address,
        token: bytes,
        facts: Mapping[str, Any],
        *,
        patience_seconds: float,
        timeout_seconds: float,
    ) -> None:
        """Waits until the server is there and free.

        Args:
            name: of the server, for messages: `engine.urls[0]=host:port`.
            address: where it listens.
            token: the secret; empty: none, which is for servers of this machine.
            facts: what it must have in common with this job (serving.py).
            patience_seconds: for a server that is not there yet.
            timeout_seconds: of every other wait.

        Raises:
            UserError: it does not come, serves another job, or has something otherwise.
        """
        self.name = name
        self._timeout = timeout_seconds
        self._wire = _claimed(name, address, token, facts, patience_seconds)
        self._wire.set_timeout(timeout_seconds)
        self._owed = False  # the end of the answer to the last command
        self._steps = -1
        self._progress = time.monotonic()

    def start(self, command: str, fields: Mapping[str, Any] | None = None) -> None:
        """Gives a command; its answer is heard by `check` or before the next one.

        Raises:
            RuntimeError: the last one failed, or the server is gone.
        """
        for _ in self._parts("the rest of the last command", self._timeout):
            pass
        self._progress, self._owed = time.monotonic(), True
        try:
            self._wire.send(command, fields)
        except ConnectionFailedError as error:
            raise self._gone(command, error) from error

    def stream(self, command: str, fields: Mapping[str, Any], beat_seconds: float) -> Iterator[ServerMessage | None]:
        """The parts of its answer as they come, and None at least every `beat_seconds`.

        Raises:
            RuntimeError: it failed, is gone, or makes no step for `timeout_seconds`.
        """
        self.start(command, fields)
        yield from self._parts(command, beat_seconds)

    def check(self) -> None:
        """Raises RuntimeError if the server is gone or has said that the last command failed. Does not wait."""
        while self._waits("sync", 0.0):
            if self._read("sync") is not None:
                raise RuntimeError(f"engine server {self.name} said something that nobody asked for")

    def close(self) -> None:
        """The server is free for other jobs. A second call does nothing."""
        with suppress(ConnectionFailedError):
            self._wire.send("end")
        self._wire.close()

    @property
    def address_here(self) -> str:
        """This machine's address, as the server reaches it."""
        return self._wire.here

    def _parts(self, command: str, beat_seconds: float) -> Iterator[ServerMessage | None]:
        while self._owed:
            left = self._progress + self._timeout - time.monotonic()
            if left <= 0:
                raise RuntimeError(
                    f"engine server {self.name} stands still: no answer and no engine step for {self._timeout:g} s "
                    f"({command})"
                )
            yield self._read(command) if self._waits(command, min(beat_seconds, left)) else None

    def _waits(self, command: str, seconds: float) -> bool:
        try:
            return self._wire.waits(seconds)
        except (OSError, ValueError) as error:  # its socket is closed
            raise self._gone(command, error) from error

    def _read(self, command: str) -> ServerMessage | None:
        """A part; None for what is none."""
        try:
            message = self._wire.receive()
        except ConnectionFailedError as error:
            raise self._gone(command, error) from error
        if message.kind == "beat":
            if message.fields.get("steps") != self._steps:
                self._steps, self._progress = message.fields.get("steps", -1), time.monotonic()
            return None
        self._progress = time.monotonic()
        if message.kind == "done":
            self._owed = False
            return None
        if message.kind == "failed":
            self._owed = False
            raise RuntimeError(f"engine server {self.name} failed ({command}): {message.fields.get('why')}")
        return message

    def _gone(self, command: str, error: Exception) -> RuntimeError:
        self._owed = False
        return RuntimeError(f"engine server {self.name} {error} ({command})")


def _greeted(name: str, address: Address, token: bytes) -> tuple[Connection, dict[str, Any], str | None]:
    """Raises UserError: it is no engine server that knows the secret; OSError, ConnectionFailedError: it is not there
    yet."""
    require_token(address.host, token, name)
    wire = Connection(
        socket.create_connection((address.host, address.port), _GREETING_SECONDS), "job", _GREETING_SECONDS
    )
    try:
        wire.handshake(token)
        told = wire.receive().fields
        return wire, dict(told["facts"]), told["serves"]
    except (WrongPeerError, KeyError, TypeError) as error:
        wire.close()
        raise UserError(
            f"{name}: what listens there {error}", remedy="start launch/serve.sh there, with the same secret"
        ) from (error)
    except ConnectionFailedError:
        wire.close()
        raise


def _claimed(
    name: str, address: Address, token: bytes, facts: Mapping[str, Any], patience_seconds: float
) -> Connection:
    start = told = time.monotonic()
    while True:
        waited = time.monotonic() - start
        try:
            wire, theirs, _ = _greeted(name, address, token)
            if different := differences(dict(facts), theirs):
                wire.close()
                raise UserError(
                    f"{name}: that engine server has {'; '.join(different)}", remedy="start it with this job's config"
                )
            wire.send("claim", {"who": f"process {os.getpid()} of {socket.gethostname()}"})
            answer = wire.receive()
            if answer.kind == "yours":
                return wire
            wire.close()
            why = f"serves another job ({answer.fields.get('who')})"
            limit = patience_seconds if answer.kind == "later" else min(_LEAVING_SECONDS, patience_seconds)
        except (OSError, ConnectionFailedError) as error:
            why, limit = f"does not answer ({error})", patience_seconds
        if waited > limit:
            raise UserError(
                f"{name}: no engine server was there for this job within {waited:.0f} s: it {why}",
                remedy="start launch/serve.sh there, or name another",
            )
        if time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            log.info("waiting for the engine server %s, which %s", name, why)
        time.sleep(_AGAIN_SECONDS)
