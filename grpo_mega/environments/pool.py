"""Answers the policy in worker processes while the engine continues to sample.

Each worker has a thread of the caller's process, which sends it one job at a time and waits no longer than the limit.
Invariants (tests/unit/environments/test_pool.py): every submitted key is returned by `collect`; an environment that
hangs, crashes or raises costs its time limit and the reward of that rollout, and nothing else; no worker outlives its
parent.
"""

from __future__ import annotations

import logging
import queue
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from grpo_mega.environments.base import EnvironmentSpec, Turn, build_environment
from grpo_mega.workers.json_worker import JsonWorker, WorkerExitedError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reply:
    """The next result; None ends the rollout. A `failure` ends it too, and the rollout scores the floor."""

    result: str | None = None
    failure: str | None = None


@dataclass
class ReplyErrors:
    """Number of replies that went wrong.

    Attributes:
        failures: environments that timed out, crashed or raised.
        tool_errors: results that begin with the environment's `error` text.
    """

    failures: int = 0
    tool_errors: int = 0

    def add(self, other: ReplyErrors) -> None:
        """Add other numbers."""
        self.failures += other.failures
        self.tool_errors += other.tool_errors


@dataclass(frozen=True)
class _Job:
    key: int
    prompt: str
    turns: list[tuple[str, str | None, str | None]]
    reference: str


class EnvironmentPool:
    """Worker processes of one environment; use as a context manager, or `close()` it.

    Args:
        spec: the environment's section of the config, checked here, before a worker starts.
        workers: number of processes.
        timeout_seconds: wall-clock limit of one reply; the process that passes it is killed and replaced.

    Raises:
        UserError: the environment is wrong (see `build_environment`).
        RuntimeError: a worker does not start on this machine.
    """

    def __init__(self, spec: EnvironmentSpec, *, workers: int, timeout_seconds: float) -> None:
        self._error = build_environment(spec).error
        self._errors = ReplyErrors()
        self._name, self._timeout_seconds = spec.name, timeout_seconds
        self._setup = {"name": spec.name, "args": dict(spec.args), "timeout_seconds": timeout_seconds}
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._changed = threading.Condition()  # guards the next three
        self._pending: set[int] = set()
        self._replies: dict[int, Reply] = {}
        self._broken: Exception | None = None
        # The caller's thread starts the first workers, all at once: the kernel ties the life of a worker to the thread
        # that started it.
        started = [self._start() for _ in range(workers)]
        try:
            for worker in started:
                worker.wait_until_ready()
        except RuntimeError as error:
            for worker in started:
                worker.kill()
            raise RuntimeError(f"environment workers do not start: {error}") from error
        self._threads = [threading.Thread(target=self._serve, args=(worker,), daemon=True) for worker in started]
        for thread in self._threads:
            thread.start()

    def submit(self, key: int, prompt: str, turns: Sequence[Turn], reference: str) -> None:
        """Queue the last of `turns` for a reply; return at once.

        Raises:
            ValueError: `key` was submitted before and is not collected yet.
        """
        with self._changed:
            if key in self._pending or key in self._replies:
                raise ValueError(f"key={key} was submitted twice since the last collect; keys must differ")
            self._pending.add(key)
        self._jobs.put(_Job(key, prompt, [(turn.answer, turn.result, turn.stop_text) for turn in turns], reference))

    def collect(self) -> dict[int, Reply]:
        """Wait for the replies to everything that was submitted since the last call, and return them by key.

        Raises:
            RuntimeError: a worker that died cannot be restarted.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._pending or self._broken is not None)
            if self._broken is not None:
                raise RuntimeError(f"environment workers cannot be restarted: {self._broken}") from self._broken
            replies, self._replies = self._replies, {}
        failures = [(key, reply.failure) for key, reply in replies.items() if reply.failure is not None]
        self._errors.failures += len(failures)
        if self._error is not None:
            self._errors.tool_errors += sum((reply.result or "").startswith(self._error) for reply in replies.values())
        if failures:
            logger.warning(
                "environment %s failed in %d of %d turns, whose rollouts score the floor; the first: key %d %s",
                *(self._name, len(failures), len(replies), *failures[0]),
            )
        return replies

    def take_errors(self) -> ReplyErrors:
        """Return the errors of the replies that were collected since the last call."""
        taken, self._errors = self._errors, ReplyErrors()
        return taken

    def close(self) -> None:
        """Finish the queued jobs and end the workers. A second call does nothing."""
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

    def _serve(self, worker: JsonWorker) -> None:
        """Run one thread: it serves jobs with one worker, and replaces the worker when it has died."""
        try:
            while (job := self._jobs.get()) is not None:
                reply = self._ask(worker, job)
                if not worker.is_alive:
                    worker = self._start()
                    worker.wait_until_ready()
                with self._changed:
                    self._pending.discard(job.key)
                    self._replies[job.key] = reply
                    self._changed.notify_all()
        except Exception as error:  # reported to the caller, which would otherwise wait forever
            with self._changed:
                self._broken = error
                self._changed.notify_all()
        finally:
            worker.kill()

    def _start(self) -> JsonWorker:
        return JsonWorker("grpo_mega.environments.worker", self._setup)

    def _ask(self, worker: JsonWorker, job: _Job) -> Reply:
        """Return the reply of the environment, or how it failed; after a timeout or a crash the worker is dead."""
        worker.send([job.prompt, job.turns, job.reference])
        try:
            return _reply(worker, worker.wait_for_message(self._timeout_seconds))
        except TimeoutError:
            worker.kill()
            return Reply(failure="timed out")
        except WorkerExitedError as error:
            timed_out = error.status == -signal.SIGALRM
            return Reply(failure="timed out" if timed_out else f"crashed, {error.reason}")


def _reply(worker: JsonWorker, message: Any) -> Reply:
    """Return the reply that a message holds (environments/worker.py).

    Raises:
        WorkerExitedError: the message is something else, which the environment must have written; the worker is killed.
    """
    match message:
        case {"result": str() | None as text, **others} if not others:
            return Reply(result=text)
        case {"failure": str() as reason, **others} if not others:
            return Reply(failure=reason)
    worker.reject(message)
    raise worker.exited()
