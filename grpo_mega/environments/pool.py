"""Answers policies in worker processes while the engine goes on sampling.

Each worker has a thread of the caller's process, which hands it one job at a time and waits no longer than the limit.
Invariants (tests/unit/environments/test_pool.py): every submitted key comes back from `collect`; an environment that
hangs, crashes or raises costs its time limit and that rollout's reward, and nothing else; no worker outlives its
parent.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import socket
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from grpo_mega.environments.base import EnvironmentSpec, Turn, build_environment
from grpo_mega.workers.process import start_worker

logger = logging.getLogger(__name__)

START_SECONDS = 120.0
"""Limit for a worker to start and import its environment."""
_GRACE_SECONDS = 1.0  # past the limit, before the parent does what the child's own alarm should have done
_KILL_SECONDS = 10.0


@dataclass(frozen=True)
class Reply:
    """`result` is None when the rollout is over; with a `failure` it is over too, and earns the floor."""

    result: str | None = None
    failure: str | None = None


@dataclass(frozen=True)
class _Job:
    key: int
    prompt: str
    turns: list[tuple[str, str | None]]
    reference: str


class EnvironmentPool:
    """Worker processes of one environment; use as a context manager, or `close()` it.

    Args:
        spec: checked here, before a worker starts.
        workers: number of processes.
        timeout_seconds: wall-clock limit of one reply; its process is then killed and replaced.

    Raises:
        UserError: the environment is wrong (see `build_environment`).
        RuntimeError: a worker does not start on this machine.
    """

    def __init__(self, spec: EnvironmentSpec, *, workers: int, timeout_seconds: float) -> None:
        build_environment(spec)
        self._setup = {"name": spec.name, "args": dict(spec.args), "timeout_seconds": timeout_seconds}
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._changed = threading.Condition()  # guards the next three
        self._pending: set[int] = set()
        self._replies: dict[int, Reply] = {}
        self._broken: Exception | None = None
        # started here, in parallel, and not by the threads: the kernel would tie their life to those
        processes = [_Process(self._setup) for _ in range(workers)]
        try:
            for process in processes:
                process.wait_until_ready()
        except RuntimeError:
            for process in processes:
                process.kill()
            raise
        self._threads = [threading.Thread(target=self._serve, args=(p,), daemon=True) for p in processes]
        for thread in self._threads:
            thread.start()

    def submit(self, key: int, prompt: str, turns: Sequence[Turn], reference: str) -> None:
        """Ask for the reply to the last of `turns`; returns at once."""
        with self._changed:
            if key in self._pending or key in self._replies:
                raise ValueError(f"key={key} was submitted twice since the last collect; keys must differ")
            self._pending.add(key)
        self._jobs.put(_Job(key, prompt, [(turn.answer, turn.result) for turn in turns], reference))

    def collect(self) -> dict[int, Reply]:
        """Wait for the replies to everything submitted since the last call.

        Raises:
            RuntimeError: a worker that died cannot be restarted.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._pending or self._broken is not None)
            if self._broken is not None:
                raise RuntimeError(f"environment workers cannot be restarted: {self._broken}") from self._broken
            replies, self._replies = self._replies, {}
        failures = [(key, reply.failure) for key, reply in replies.items() if reply.failure is not None]
        if failures:
            logger.warning(
                "environment %s failed in %d of %d turns, whose rollouts score the floor; the first: key %d %s",
                *(self._setup["name"], len(failures), len(replies), *failures[0]),
            )
        return replies

    def close(self) -> None:
        """End the workers. A second call does nothing."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def __enter__(self) -> EnvironmentPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _serve(self, process: _Process) -> None:
        """One thread: one worker, or the one that replaces it."""
        try:
            while (job := self._jobs.get()) is not None:
                reply = process.ask(job)
                if not process.is_alive:
                    process = _Process(self._setup)
                    process.wait_until_ready()
                with self._changed:
                    self._pending.discard(job.key)
                    self._replies[job.key] = reply
                    self._changed.notify_all()
        except (OSError, RuntimeError) as error:  # carried to the caller, who would otherwise wait for ever
            with self._changed:
                self._broken = error
                self._changed.notify_all()
        finally:
            process.kill()


class _Process:
    """The parent's side of one worker."""

    def __init__(self, setup: dict[str, object]) -> None:
        self._timeout_seconds = float(str(setup["timeout_seconds"]))
        self._connection, theirs = socket.socketpair()
        with theirs:
            self._process = start_worker("grpo_mega.environments.worker", theirs)
        self.is_alive = True
        self._incoming = b""
        self._connection.sendall(json.dumps(setup).encode("ascii") + b"\n")

    def wait_until_ready(self) -> None:
        """Raises RuntimeError when the worker does not come up."""
        if self._line(START_SECONDS) is None:
            self.kill()
            raise RuntimeError("an environment worker did not start; its message is above")

    def ask(self, job: _Job) -> Reply:
        """What the environment replies, or how it failed; afterwards the worker may be dead."""
        with contextlib.suppress(OSError):  # then there is no answer either
            message = json.dumps([job.prompt, job.turns, job.reference]).encode("ascii") + b"\n"
            self._connection.settimeout(self._timeout_seconds + _GRACE_SECONDS)
            self._connection.sendall(message)
        line = self._line(self._timeout_seconds + _GRACE_SECONDS)
        if line is not None:
            return Reply(**json.loads(line))
        status = self._process.poll()
        self.kill()
        timed_out = status is None or status == -signal.SIGALRM
        return Reply(failure="timed out" if timed_out else f"crashed, exit status {status}")

    def kill(self) -> None:
        """End it and whatever it started."""
        self.is_alive = False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel; it ends when the kernel lets it
            self._process.wait(_KILL_SECONDS)

    def _line(self, seconds: float) -> bytes | None:
        """The next line; None when the process ended or was silent for so long."""
        while b"\n" not in self._incoming:
            self._connection.settimeout(seconds)
            try:
                piece = self._connection.recv(1 << 16)
            except TimeoutError:
                return None
            except ConnectionResetError:
                piece = b""
            if not piece:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_GRACE_SECONDS)
                return None
            self._incoming += piece
        line, _, self._incoming = self._incoming.partition(b"\n")
        return line
