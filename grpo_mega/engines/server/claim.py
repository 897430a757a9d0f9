"""Claiming an engine server for a job: its own server, or a spare one in its place.

Asserted by tests/parallel/test_servers.py.
"""

from __future__ import annotations

import logging
import os
import socket
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
from grpo_mega.engines.server.protocol import ConnectionFailedError, NamedServer, WrongPeerError, require_token
from grpo_mega.types import UserError

log = logging.getLogger("grpo_mega.engines")

_RETRY_SECONDS = 0.5  # between two attempts to claim a server
_REMIND_SECONDS = 20.0  # between two log lines that name the server that this job waits for
_RELEASE_SECONDS = 5.0  # a server that looks busy may only not have noticed yet that its last job is gone
_OWN_SECONDS = 10.0  # after which a spare server is claimed; less if the job waits for less than twice as long


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


def claim(
    servers: Sequence[NamedServer], token: bytes, facts: ServingFacts, patience_seconds: float
) -> tuple[NamedServer, ServerConnection]:
    """Claim the first server; if it is not available for some seconds, the first of the others that is.

    Args:
        servers: not empty. Other clients may claim the servers after the first.
        token: the shared secret.
        facts: settings that the server must have.
        patience_seconds: limit of the wait for a server that does not answer.

    Raises:
        UserError: the first server has other settings, or none is available in time.
    """
    start = reminded = time.monotonic()
    own, *spare = servers
    while True:
        waited = time.monotonic() - start
        refusals: list[_Refusal] = []
        for server in servers if waited >= min(_OWN_SECONDS, patience_seconds / 2) else [own]:
            try:
                found = _try_to_claim(server, token, facts, patience_seconds)
            except UserError as error:
                if server is own:
                    raise
                found = _Refusal(error.message.removeprefix(f"{server.name}: "), 0.0)
            if isinstance(found, ServerConnection):
                return server, found
            refusals.append(found)
        if len(refusals) == len(servers) and waited > max(refusal.limit_seconds for refusal in refusals):
            others = "".join(f"; {each.name}: {why.reason}" for each, why in zip(spare, refusals[1:], strict=True))
            raise UserError(
                f"{own.name}: no engine server was available to this job within {waited:.0f} s: "
                f"{refusals[0].reason}{others}",
                remedy="start launch/serve.sh there, or name another server",
            )
        if time.monotonic() - reminded > _REMIND_SECONDS:
            reminded = time.monotonic()
            log.info("waiting for the engine server %s: %s", own.name, refusals[0].reason)
        time.sleep(_RETRY_SECONDS)


def log_spare_servers(
    own: Sequence[NamedServer],
    used: Sequence[NamedServer],
    free: Sequence[NamedServer],
    facts: ServingFacts,
    token: bytes,
) -> None:
    """Log which servers were replaced, and which spare servers could not replace another one.

    Args:
        own: server of each group of ranks by the config.
        used: server of each group.
        free: spare servers that no group uses.
        facts: settings that they must have.
        token: the shared secret.
    """
    for before, now in zip(own, used, strict=True):
        if before != now:
            log.warning("%s takes the place of the engine server %s, which is not available", now.name, before.name)
    for server in free:
        try:
            different = differences(facts, inspect_server(server, token).facts)
        except UserError as error:
            log.warning("no spare engine server: %s", error)
        else:
            if different:
                log.warning("no spare engine server: %s has %s", server.name, "; ".join(different))


@dataclass(frozen=True)
class _Refusal:
    """Why a server is not available, and how long a job waits for it."""

    reason: str
    limit_seconds: float


def _try_to_claim(
    server: NamedServer, token: bytes, facts: ServingFacts, patience_seconds: float
) -> ServerConnection | _Refusal:
    """Connect to the server and claim it.

    Raises:
        UserError: it is another program, or has other settings or another secret.
    """
    try:
        connection, status = _connect(server, token)
        if different := differences(facts, status.facts):
            connection.close()
            raise UserError(
                f"{server.name}: that engine server has {'; '.join(different)}",
                remedy="start it with this job's config",
            )
        busy = _send_claim(connection)
    except (OSError, ConnectionFailedError) as error:
        return _Refusal(f"it does not answer ({error})", patience_seconds)
    if busy is None:
        return connection
    limit = patience_seconds if busy.is_ending else min(_RELEASE_SECONDS, patience_seconds)
    return _Refusal(f"it serves another job ({busy.job})", limit)


def _connect(server: NamedServer, token: bytes) -> tuple[ServerConnection, ServerStatus]:
    """Connect and read the server's status.

    Raises:
        UserError: the program there is not an engine server with the same secret and version.
        OSError, ConnectionFailedError: the server does not answer yet.
    """
    require_token(server.address.host, token, server.name)
    try:
        return open_connection(server.address, token)
    except WrongPeerError as error:
        raise UserError(
            f"{server.name}: the program that listens there {error}",
            remedy="start launch/serve.sh there, with the same secret",
        ) from error


def _send_claim(connection: ServerConnection) -> ServerBusy | None:
    """Claim the server. Return None if it accepted; else close the connection and return the server's answer."""
    try:
        connection.send(ClaimServer(f"process {os.getpid()} of {socket.gethostname()}"))
        answer = connection.receive()
        if isinstance(answer, ClaimAccepted):
            return None
        if isinstance(answer, ServerBusy):
            connection.close()
            return answer
        raise ConnectionFailedError(f"answered a claim with {type(answer).__name__}")
    except ConnectionFailedError:
        connection.close()
        raise
