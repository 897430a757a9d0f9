"""The job's client of an engine server, on the first rank of an engine: claims the server and sends it commands.

Asserted by tests/parallel/test_servers.py.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

from grpo_mega.engines.server.connection import ServerConnection, open_connection
from grpo_mega.engines.server.messages import (
    ClaimAccepted,
    ClaimServer,
    Command,
    CommandDone,
    CommandFailed,
    EndJob,
    Heartbeat,
    MeetCommand,
    PushCommand,
    RolloutReply,
    SampleCommand,
    ServerBusy,
    ServerStatus,
    ServingFacts,
    differences,
)
from grpo_mega.engines.server.protocol import Address, ConnectionFailedError, WrongPeerError, require_token
from grpo_mega.observe.engine_gauges import EngineGauges
from grpo_mega.types import UserError

log = logging.getLogger("grpo_mega.engines")

_RETRY_SECONDS = 0.5  # between two attempts to claim a server
_REMIND_SECONDS = 20.0  # between two log lines that name the server that this job waits for
_RELEASE_SECONDS = 5.0  # a server that looks busy may only not have noticed yet that its last job is gone
_SILENT_SECONDS = 45.0  # a server sends a heartbeat every second, also while it computes
_COMMAND_NAMES = {MeetCommand: "meet", PushCommand: "push", SampleCommand: "sample"}


def inspect_server(name: str, address: Address, token: bytes) -> ServerStatus:
    """Return the settings of a server and the job that it serves.

    Raises:
        UserError: there is no server at this address, or it has another secret or version.
    """
    try:
        connection, status = _connect(name, address, token)
    except (OSError, ConnectionFailedError) as error:
        raise UserError(f"{name} does not answer ({error})", remedy="start launch/serve.sh there") from error
    connection.close()
    return status


class ServerClient:
    """A server that serves this job until `close`.

    Args:
        name: of the server, for messages: `engine.urls[0]=host:port`.
        address: at which the server listens.
        token: the shared secret; empty: none, for servers of this machine.
        facts: settings that the server must have in common with this job.
        patience_seconds: limit of the wait for a server that does not listen yet.
        timeout_seconds: limit of every other wait.

    Raises:
        UserError: the server does not answer, serves another job, or has an incompatible configuration.
    """

    def __init__(
        self,
        name: str,
        address: Address,
        token: bytes,
        facts: ServingFacts,
        *,
        patience_seconds: float,
        timeout_seconds: float,
    ) -> None:
        self.name = name
        self._timeout = timeout_seconds
        self._connection = _claim(name, address, token, facts, patience_seconds)
        self._awaits_answer = False  # the last command's answer is not complete
        self._steps = -1
        self._gauges = EngineGauges()
        self._progress_time = self._message_time = time.monotonic()

    def start(self, command: Command) -> None:
        """Send a command. `check` reads its answer, or the next command does.

        Raises:
            RuntimeError: the previous command failed, or the server is gone.
        """
        for _ in self._replies("the rest of the last command", self._timeout):
            pass
        self.check()
        self._progress_time = self._message_time = time.monotonic()
        self._awaits_answer = True
        try:
            self._connection.send(command)
        except ConnectionFailedError as error:
            raise self._gone(_COMMAND_NAMES[type(command)], error) from error

    def stream(self, command: SampleCommand, heartbeat_seconds: float) -> Iterator[RolloutReply | None]:
        """Send a command and yield the replies as they arrive, and None at least every `heartbeat_seconds`.

        Raises:
            RuntimeError: the command failed, or the server is gone or made no engine step for `timeout_seconds`.
        """
        self.start(command)
        yield from self._replies(_COMMAND_NAMES[type(command)], heartbeat_seconds)

    def check(self) -> None:
        """Raise RuntimeError if the server is gone or reported that the last command failed. Does not wait."""
        while self._wait("sync", 0.0):
            if self._read("sync") is not None:
                raise RuntimeError(f"engine server {self.name} sent a rollout that was not requested")

    def take_gauges(self) -> EngineGauges:
        """Return the gauges of the sampling commands that were complete since the last call."""
        taken, self._gauges = self._gauges, EngineGauges()
        return taken

    def close(self) -> None:
        """Release the server for other jobs. A second call does nothing."""
        with suppress(ConnectionFailedError):
            self._connection.send(EndJob())
        self._connection.close()

    def _replies(self, command: str, heartbeat_seconds: float) -> Iterator[RolloutReply | None]:
        while self._awaits_answer:
            if self._wait(command, 0.0):  # first what arrived since the last call, which may be long ago
                yield self._read(command)
                continue
            now = time.monotonic()
            silence_ends, patience_ends = self._message_time + _SILENT_SECONDS, self._progress_time + self._timeout
            left = min(silence_ends, patience_ends) - now
            if silence_ends <= now:
                raise RuntimeError(
                    f"engine server {self.name} is not responding: no message for {_SILENT_SECONDS:g} s ({command})"
                )
            if left <= 0:
                raise RuntimeError(
                    f"engine server {self.name} is not responding: no answer and no engine step for "
                    f"{self._timeout:g} s ({command})"
                )
            yield self._read(command) if self._wait(command, min(heartbeat_seconds, left)) else None

    def _wait(self, command: str, seconds: float) -> bool:
        try:
            return self._connection.wait(seconds)
        except ConnectionFailedError as error:
            raise self._gone(command, error) from error

    def _read(self, command: str) -> RolloutReply | None:
        """Receive a message. Return a rollout; None for every other message."""
        try:
            message = self._connection.receive()
        except ConnectionFailedError as error:
            raise self._gone(command, error) from error
        self._message_time = time.monotonic()
        if isinstance(message, Heartbeat) and message.steps == self._steps:
            return None
        self._progress_time = time.monotonic()
        match message:
            case RolloutReply():
                return message
            case Heartbeat(steps=steps):
                self._steps = steps
            case CommandDone(gauges=gauges):
                self._awaits_answer = False
                if gauges is not None:
                    self._gauges.add(gauges)
            case CommandFailed(reason=reason):
                self._awaits_answer = False
                raise RuntimeError(f"engine server {self.name} failed ({command}): {reason}")
            case _:
                raise RuntimeError(f"engine server {self.name} sent {type(message).__name__} during {command}")
        return None

    def _gone(self, command: str, error: Exception) -> RuntimeError:
        self._awaits_answer = False
        return RuntimeError(f"engine server {self.name} {error} ({command})")


def _connect(name: str, address: Address, token: bytes) -> tuple[ServerConnection, ServerStatus]:
    """Connect and read the server's status.

    Raises:
        UserError: the program there is not an engine server with the same secret and version.
        OSError, ConnectionFailedError: the server does not answer yet.
    """
    require_token(address.host, token, name)
    try:
        return open_connection(address, token)
    except WrongPeerError as error:
        raise UserError(
            f"{name}: the program that listens there {error}",
            remedy="start launch/serve.sh there, with the same secret",
        ) from error


def _claim(name: str, address: Address, token: bytes, facts: ServingFacts, patience_seconds: float) -> ServerConnection:
    """Connect to the server and claim it; retry until `patience_seconds` are over."""
    start = reminded = time.monotonic()
    while True:
        waited = time.monotonic() - start
        try:
            connection, status = _connect(name, address, token)
            if different := differences(facts, status.facts):
                connection.close()
                raise UserError(
                    f"{name}: that engine server has {'; '.join(different)}", remedy="start it with this job's config"
                )
            busy = _send_claim(connection)
            if busy is None:
                return connection
            reason = f"serves another job ({busy.job})"
            limit = patience_seconds if busy.is_ending else min(_RELEASE_SECONDS, patience_seconds)
        except (OSError, ConnectionFailedError) as error:
            reason, limit = f"does not answer ({error})", patience_seconds
        if waited > limit:
            raise UserError(
                f"{name}: no engine server was available to this job within {waited:.0f} s: it {reason}",
                remedy="start launch/serve.sh there, or name another server",
            )
        if time.monotonic() - reminded > _REMIND_SECONDS:
            reminded = time.monotonic()
            log.info("waiting for the engine server %s: it %s", name, reason)
        time.sleep(_RETRY_SECONDS)


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
