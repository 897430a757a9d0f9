"""Claiming an engine server for a job: its own server, or a spare one in its place.

Asserted by tests/parallel/test_servers.py.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from grpo_mega.engines.server.connection import ServerConnection, open_connection
from grpo_mega.engines.server.messages import (
    ClaimAccepted,
    ClaimServer,
    ServerBusy,
    ServerStatus,
    ServingFacts,
    differences,
)
from grpo_mega.engines.server.protocol import (
    HANDSHAKE_SECONDS,
    ConnectionFailedError,
    NamedServer,
    WrongPeerError,
    require_token,
)
from grpo_mega.types import UserError

log = logging.getLogger("grpo_mega.engines")

_RETRY_SECONDS = 0.5  # between two attempts to claim a server
_REMIND_SECONDS = 20.0  # between two log lines that name the server that this job waits for
_RELEASE_SECONDS = 5.0  # a server that looks busy may only not have noticed yet that its last job is gone
_SECONDS_BEFORE_SPARES = 10.0  # less if the job waits for less than twice as long
_LEAST_SECONDS = 0.2  # of an attempt at the end of the wait


def inspect_server(server: NamedServer, token: bytes) -> ServerStatus:
    """Return the settings of a server and the job that it serves.

    Raises:
        UserError: there is no server at this address, or it has another secret or version.
    """
    try:
        connection, status = _connect(server, token)
    except (OSError, ConnectionFailedError) as error:
        raise UserError(f"{server.name} does not answer ({error})", remedy="start launch/serve.sh there") from error
    connection.close()
    return status


def claim_server(
    servers: Sequence[NamedServer], token: bytes, facts: ServingFacts, patience_seconds: float
) -> tuple[Claimed, ServerConnection]:
    """Claim the first server; if it is lost for some seconds, the first of the others that is available.

    A server that still works for the last job is not lost: this waits for it.

    Args:
        servers: the own server and the spare ones, which other clients may claim too.
        token: the shared secret.
        facts: settings that the server must have.
        patience_seconds: limit of the whole wait.

    Raises:
        UserError: no server is available in time, or the own server has other settings and there is no spare one.
    """
    search = _Search(servers, patience_seconds)
    while True:
        for server in search.candidates():
            begin = time.monotonic()
            found = _try_to_claim(server, token, facts, search.attempt_seconds())
            if isinstance(found, ServerConnection):
                return Claimed(server, "" if server == servers[0] else search.reason), found
            search.add(server, found, begin)
        if search.is_over():
            raise search.error()
        time.sleep(_RETRY_SECONDS)


@dataclass(frozen=True)
class Claimed:
    """A server that serves this job. `reason`: why it is not the own one; else empty."""

    server: NamedServer
    reason: str


@dataclass(frozen=True)
class _Unavailable:
    """Why a server cannot be claimed.

    `is_ending`: it still works for a job that is gone. `is_busy`: it serves another job. `error`: it is no server for
    this job, and a wait may not help.
    """

    reason: str
    is_ending: bool = False
    is_busy: bool = False
    error: UserError | None = None


class _Search:
    """The state of one wait for a server."""

    def __init__(self, servers: Sequence[NamedServer], patience_seconds: float) -> None:
        self._own, self._spares = servers[0], servers[1:]
        self._patience = patience_seconds
        self._start = self._reminded = time.monotonic()
        self._lost_since: float | None = None
        self._last: dict[NamedServer, _Unavailable] = {}
        self._own_errors = 0  # in a row

    def candidates(self) -> Sequence[NamedServer]:
        """Return the servers to try now. Once the own one is lost, it is the last, because it may not respond."""
        lost = 0.0 if self._lost_since is None else time.monotonic() - self._lost_since
        tries_spares = lost >= min(_SECONDS_BEFORE_SPARES, self._patience / 2) or self._own_errors > 1
        return [*self._spares, self._own] if tries_spares else [self._own]

    def attempt_seconds(self) -> float:
        """Return the limit of one attempt."""
        share = self._patience / 2 if self._spares else self._patience
        return min(HANDSHAKE_SECONDS, share, max(_LEAST_SECONDS, self._patience - self._waited()))

    def add(self, server: NamedServer, found: _Unavailable, begin: float) -> None:
        """Record a failed attempt, which began at `begin`."""
        self._last[server] = found
        if server != self._own:
            return
        now = time.monotonic()
        self._own_errors = 0 if found.error is None else self._own_errors + 1
        if found.is_ending:
            self._lost_since = None
        elif self._lost_since is None:
            self._lost_since = begin
        if now - self._reminded > _REMIND_SECONDS:
            self._reminded = now
            log.info("waiting for the engine server %s: %s", server.name, found.reason)

    def is_over(self) -> bool:
        """Return True if another attempt is not allowed, or cannot help.

        A server that is killed while this side connects looks like one with another secret, so that counts only twice.
        """
        if self._waited() >= self._patience:
            return True
        found = self._last.values()
        if len(found) <= len(self._spares) or not all(each.is_busy or each.error is not None for each in found):
            return False
        least = _RELEASE_SECONDS if any(each.is_busy for each in found) else 0.0
        return self._waited() > least and self._own_errors != 1

    @property
    def reason(self) -> str:
        """Why the own server is not available."""
        return self._last[self._own].reason

    def error(self) -> UserError:
        """Return the error that names all servers and why they are not available."""
        own = self._last[self._own]
        if own.error is not None and not self._spares:
            return own.error
        others = "".join(f"; {server.name}: {why.reason}" for server, why in self._last.items() if server != self._own)
        return UserError(
            f"{self._own.name}: no engine server was available to this job within {self._waited():.0f} s: "
            f"{own.reason}{others}",
            remedy="start launch/serve.sh there, or name another server",
        )

    def _waited(self) -> float:
        return time.monotonic() - self._start


def log_unavailable_spares(spares: Sequence[NamedServer], facts: ServingFacts, token: bytes) -> threading.Thread:
    """Log which spare servers could not take the place of a lost one, in a thread: they may not respond.

    Args:
        spares: servers that no group of ranks uses.
        facts: settings that they must have.
        token: the shared secret.
    """

    def inspect() -> None:
        for server in spares:
            try:
                status = inspect_server(server, token)
            except UserError as error:
                log.warning("%s", UserError(f"no spare server: {error.message}", remedy=error.remedy))
                continue
            if different := differences(facts, status.facts):
                log.warning(
                    "no spare server: %s has %s; start it with this job's config", server.name, "; ".join(different)
                )
            elif status.job is not None:
                log.warning("no spare server: %s serves another job (%s)", server.name, status.job)

    thread = threading.Thread(target=inspect, name="spare-servers", daemon=True)
    thread.start()
    return thread


def _try_to_claim(
    server: NamedServer, token: bytes, facts: ServingFacts, seconds: float
) -> ServerConnection | _Unavailable:
    """Connect to the server and claim it, in at most about `seconds`."""
    end = time.monotonic() + seconds
    try:
        connection, status = _connect(server, token, seconds)
        if different := differences(facts, status.facts):
            connection.close()
            raise UserError(
                f"{server.name}: that engine server has {'; '.join(different)}",
                remedy="start it with this job's config",
            )
        busy = _send_claim(connection, max(0.0, end - time.monotonic()))
    except (OSError, ConnectionFailedError) as error:
        return _Unavailable(f"it does not answer ({error})")
    except UserError as error:
        return _Unavailable(error.message.removeprefix(f"{server.name}: "), error=error)
    if busy is None:
        return connection
    return _Unavailable(f"it serves another job ({busy.job})", is_ending=busy.is_ending, is_busy=not busy.is_ending)


def _connect(
    server: NamedServer, token: bytes, seconds: float = HANDSHAKE_SECONDS
) -> tuple[ServerConnection, ServerStatus]:
    """Connect and read the server's status.

    Raises:
        UserError: the program there is not an engine server with the same secret and version.
        OSError, ConnectionFailedError: the server does not answer yet.
    """
    require_token(server.address.host, token, server.name)
    try:
        return open_connection(server.address, token, seconds)
    except WrongPeerError as error:
        raise UserError(
            f"{server.name}: the program that listens there {error}",
            remedy="start launch/serve.sh there, with the same secret",
        ) from error


def _send_claim(connection: ServerConnection, seconds: float) -> ServerBusy | None:
    """Claim the server. Return None if it accepted; else close the connection and return the server's answer."""
    try:
        connection.send(ClaimServer(f"process {os.getpid()} of {socket.gethostname()}"))
        answer = connection.receive(seconds)
        if isinstance(answer, ClaimAccepted):
            return None
        if isinstance(answer, ServerBusy):
            connection.close()
            return answer
        raise ConnectionFailedError(f"answered a claim with {type(answer).__name__}")
    except ConnectionFailedError:
        connection.close()
        raise
