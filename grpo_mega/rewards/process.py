"""The parent's side of one reward process: starts it clean, talks to it without ever blocking, ends it for good.

The child is a new program (`python -m grpo_mega.rewards.worker`), not a fork: it inherits no torch, no gloo socket, no
engine state and no GPU, and none of the variables that make a process a rank. It leads its own session, so that what
a reward starts is killed with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections import deque
from dataclasses import dataclass, field

from grpo_mega.rewards.base import Value
from grpo_mega.workers.process import start_worker

_GRACE_SECONDS = 1.0  # past the limit, before the parent does what the child's own alarm should have done
_KILL_SECONDS = 10.0
_MAX_IN_FLIGHT = 64
_PREFETCH_SECONDS = 0.02


@dataclass
class ScoringJob:
    """One completion on its way: `remaining` are the positions of the terms that it has no value of yet."""

    key: int
    prompt: str
    completion: str
    reference: str
    remaining: list[int]
    components: dict[int, Value] = field(default_factory=dict)
    failures: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Answer:
    """What a worker says about one component of one job; `value` is None when it failed, for the reason `problem`."""

    serial: int
    position: int
    value: Value | None
    problem: str | None


class RewardProcess:
    """One worker. The caller watches `connection`: for reading always, for writing while there is a `backlog`."""

    def __init__(self, setup: dict[str, object]) -> None:
        self.connection, theirs = socket.socketpair()
        with theirs:
            self._process = start_worker("grpo_mega.rewards.worker", theirs)
        self.connection.setblocking(False)
        self.pid = self._process.pid
        self.ready = False
        self.setup_error: str | None = None
        self.started = self.last_progress = time.monotonic()
        self.in_flight: deque[tuple[int, ScoringJob]] = deque()
        self._mean_seconds = _PREFETCH_SECONDS
        self._incoming = b""
        self.backlog = bytearray()
        self._write(setup)

    @property
    def free_slots(self) -> int:
        """How many more jobs it should get: about 20 ms of work, at most 64, and only once it is ready."""
        if not self.ready:
            return 0
        wanted = max(1, min(_MAX_IN_FLIGHT, int(_PREFETCH_SECONDS / max(self._mean_seconds, 1e-6))))
        return wanted - len(self.in_flight)

    def submit(self, serial: int, job: ScoringJob) -> None:
        """Queue a job on this worker."""
        self.in_flight.append((serial, job))
        self._write([serial, job.remaining, job.prompt, job.completion, job.reference])

    def flush(self) -> None:
        """Write what the socket takes."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while self.backlog:
                del self.backlog[: self.connection.send(self.backlog)]
                self.last_progress = time.monotonic()  # what waits here has not reached the worker's clock yet

    def receive(self) -> tuple[list[Answer], bool]:
        """What has arrived, and whether the process is still there."""
        alive, pieces = True, [self._incoming]
        try:
            while piece := self.connection.recv(1 << 16):
                pieces.append(piece)
            alive = False
        except BlockingIOError:
            pass
        except ConnectionResetError:
            alive = False
        *lines, self._incoming = b"".join(pieces).split(b"\n")
        answers = []
        for line in lines:
            self.last_progress = time.monotonic()
            message = json.loads(line)
            if isinstance(message, dict):
                self.ready, self.setup_error = "ready" in message, message.get("error")
                continue
            serial, position, value, problem, seconds = message
            self._mean_seconds += 0.1 * (seconds - self._mean_seconds)
            if isinstance(value, list):
                value = tuple((end, of_step) for end, of_step in value)
            answers.append(Answer(serial, position, value, problem))
        return answers, alive

    def is_overdue(self, timeout_seconds: float) -> bool:
        """Whether the scoring in progress has outlived the limit and the alarm that should have ended it."""
        return bool(self.in_flight) and time.monotonic() - self.last_progress > timeout_seconds + _GRACE_SECONDS

    def kill(self) -> int:
        """End it and whatever it started; its exit status, negative for a signal."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.connection.close()
        try:
            return self._process.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:  # stuck in the kernel; it ends when the kernel lets it
            return -signal.SIGKILL

    def exit_status(self, grace_seconds: float = 1.0) -> int:
        """After the socket has ended: wait for the process to say how it died, then clean up."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_seconds)
        return self.kill()

    def _write(self, message: object) -> None:
        self.backlog += json.dumps(message).encode("ascii") + b"\n"
        self.flush()
