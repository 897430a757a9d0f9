"""The job's client of an engine server, on the first rank of an engine: claims the server and sends it commands.

Asserted by tests/parallel/test_servers.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

from grpo_mega.engines.server.claim import claim_server
from grpo_mega.engines.server.messages import (
    Command,
    CommandDone,
    CommandFailed,
    EndJob,
    Heartbeat,
    MeetCommand,
    PushCommand,
    RolloutReply,
    SampleCommand,
    ServingFacts,
)
from grpo_mega.engines.server.protocol import ConnectionFailedError, NamedServer
from grpo_mega.observe.engine_gauges import EngineGauges

_SILENT_SECONDS = 45.0  # a server sends a heartbeat every second, also while it computes
_COMMAND_NAMES = {MeetCommand: "meet", PushCommand: "push", SampleCommand: "sample"}


class ServerClient:
    """A server that serves this job until `close`.

    Args:
        servers: one of them is claimed: the first, or if it is not available a later one.
        token: the shared secret; empty: none, for servers of this machine.
        facts: settings that the server must have in common with this job.
        patience_seconds: limit of the wait for servers that do not listen yet.
        timeout_seconds: limit of every other wait.

    Raises:
        UserError: no server is available: it does not answer, serves another job, or has other settings.
    """

    def __init__(
        self,
        servers: Sequence[NamedServer],
        token: bytes,
        facts: ServingFacts,
        *,
        patience_seconds: float,
        timeout_seconds: float,
    ) -> None:
        self.claimed, self._connection = claim_server(servers, token, facts, patience_seconds)
        """The server that serves this job."""
        self._timeout = timeout_seconds
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
                raise RuntimeError(f"engine server {self.claimed.server.name} sent a rollout that was not requested")

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
                    f"engine server {self.claimed.server.name} is not responding: no message for {_SILENT_SECONDS:g} s "
                    f"({command})"
                )
            if left <= 0:
                raise RuntimeError(
                    f"engine server {self.claimed.server.name} is not responding: no answer and no engine step for "
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
                raise RuntimeError(f"engine server {self.claimed.server.name} failed ({command}): {reason}")
            case _:
                raise RuntimeError(
                    f"engine server {self.claimed.server.name} sent {type(message).__name__} during {command}"
                )
        return None

    def _gone(self, command: str, error: Exception) -> RuntimeError:
        self._awaits_answer = False
        return RuntimeError(f"engine server {self.claimed.server.name} {error} ({command})")
