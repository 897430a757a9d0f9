"""The thread that owns the reward workers: it sends jobs, reads answers, enforces limits and replaces dead workers.

The thread itself starts the workers, because the kernel ties the life of a worker to the thread that started it.
"""

from __future__ import annotations

import itertools
import selectors
import signal
import socket
import threading
import time
from collections.abc import Sequence

from grpo_mega.rewards.failures import FailureLog
from grpo_mega.rewards.scoring_errors import FailureKind
from grpo_mega.rewards.scoring_queue import ScoringQueue
from grpo_mega.rewards.worker_jobs import RewardProcess
from grpo_mega.workers import json_worker

_START_ATTEMPTS = 3
_POLL_SECONDS = 0.25
_SIGNALS_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)  # a reward that fails ends in other ways
_COALESCE_SECONDS = 0.002


class WakeUp:
    """A socket pair by which another thread interrupts a selector."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        selector.register(self._receiver, selectors.EVENT_READ)

    def send(self) -> None:
        """Interrupt the selector; called by another thread."""
        try:
            self._sender.send(b"x")
        except OSError:
            return  # a full buffer: the thread is awake already; a closed socket: the thread returned

    def clear(self) -> None:
        """Read what was sent."""
        try:
            self._receiver.recv(4096)
        except BlockingIOError:
            return

    def close(self) -> None:
        """Close both ends."""
        self._receiver.close()
        self._sender.close()


class ScoringThread:
    """Serves the jobs of a queue with worker processes until the queue is closed.

    Args:
        queue: of the pool.
        failures: where failed scorings are recorded.
        setup: of every worker (worker.py).
        inputs: parts of a row that the rewards of a worker read.
        num_workers: may be 0.
        timeout_seconds: limit of one scoring.
    """

    def __init__(
        self,
        queue: ScoringQueue,
        failures: FailureLog,
        setup: dict[str, object],
        *,
        inputs: Sequence[str],
        num_workers: int,
        timeout_seconds: float,
    ) -> None:
        self._queue, self._failures, self._setup, self._inputs = queue, failures, setup, inputs
        self._timeout_seconds = timeout_seconds
        self._processes: list[RewardProcess] = []
        self._serials = itertools.count()
        self._num_failed_starts = 0
        self._selector = selectors.DefaultSelector()
        self._wake_up = WakeUp(self._selector)
        self._thread = threading.Thread(target=self._serve, args=(num_workers,), name="rewards", daemon=True)
        self._thread.start()

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the current workers."""
        return tuple(process.worker.pid for process in list(self._processes))

    def wake(self) -> None:
        """Make the thread look at the queue now; called by another thread."""
        self._wake_up.send()

    def join(self) -> None:
        """Wait for the end of the thread, which kills its workers; close the queue first."""
        self._wake_up.send()
        self._thread.join()

    def _serve(self, num_workers: int) -> None:
        try:
            for _ in range(num_workers):
                self._start()
            while not self._queue.is_closed:
                self._send_jobs()
                self._poll()
        except BaseException as error:  # reported to the callers, which would otherwise wait forever
            self._queue.report_broken(error)
        finally:
            for process in self._processes:
                process.worker.kill()
            self._processes.clear()
            self._selector.close()
            self._wake_up.close()

    def _start(self) -> None:
        process = RewardProcess(self._setup, self._inputs)
        self._processes.append(process)
        self._selector.register(process.worker.connection, selectors.EVENT_READ, process)

    def _send_jobs(self) -> None:
        """Send waiting jobs, one at a time, to the worker with the most free slots."""
        while self._processes:
            process = max(self._processes, key=lambda candidate: candidate.free_slots)
            if process.free_slots <= 0 or (job := self._queue.next_job()) is None:
                return
            process.submit(next(self._serials), job)

    def _poll(self) -> None:
        """Wait for answers, room in a socket, or a wake-up; then check the limits."""
        for process in self._processes:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if process.worker.backlog else 0)
            self._selector.modify(process.worker.connection, events, process)
        for key, mask in self._selector.select(_POLL_SECONDS):
            if key.data is None:
                self._wake_up.clear()
                continue
            if mask & selectors.EVENT_WRITE:
                key.data.worker.flush()
            if mask & selectors.EVENT_READ:
                self._read(key.data)
        for process in list(self._processes):
            self._check_limits(process)
        if sum(len(process.in_flight) for process in self._processes) > 2 * len(self._processes):
            time.sleep(_COALESCE_SECONDS)  # fast rewards: read many answers at once, and leave the core to the caller

    def _check_limits(self, process: RewardProcess) -> None:
        if process.is_overdue(self._timeout_seconds):
            is_stopped = process.worker.is_stopped()
            process.worker.kill()
            self._replace(process, "timed out", "", from_outside=is_stopped)
        elif not process.worker.is_ready and process.worker.is_stopped():
            process.worker.kill()
            self._replace(process, "timed out", "because they were stopped", from_outside=True)
        elif not process.worker.is_ready and time.monotonic() - process.worker.started > json_worker.START_SECONDS:
            raise RuntimeError(f"a reward worker was not ready within {json_worker.START_SECONDS:g} s")

    def _read(self, process: RewardProcess) -> None:
        was_ready = process.worker.is_ready
        answers, is_open = process.receive()
        for answer in answers:
            _, job = process.in_flight[0]
            if answer.value is None:
                kind, detail = answer.problem or ("raised an exception", "")
                self._failures.fail(job, answer.position, kind, detail)
            else:
                job.components[answer.position] = answer.value
                job.remaining.remove(answer.position)
            if not job.remaining:
                process.in_flight.popleft()
                self._queue.finish(job)
        if process.worker.setup_error is not None:
            raise RuntimeError(process.worker.setup_error)
        if process.worker.is_ready and not was_ready:
            self._num_failed_starts = 0
            self._queue.report_ready_worker()
        if not is_open:
            ended = process.worker.exited()
            reason: FailureKind = "timed out" if ended.status == -signal.SIGALRM else "crashed"
            from_outside = -ended.status in _SIGNALS_FROM_OUTSIDE and process.worker.invalid_message is None
            self._replace(process, reason, ended.reason, from_outside=from_outside)

    def _replace(self, process: RewardProcess, kind: FailureKind, detail: str, *, from_outside: bool) -> None:
        """Replace a dead worker. Its current scoring has failed; its other jobs return to the front of the queue.

        If another program killed or stopped the worker, the scoring is made again, once: its reward may be killed for
        the memory that it takes, each time.
        """
        self._selector.unregister(process.worker.connection)
        self._processes.remove(process)
        if not process.worker.is_ready:
            self._num_failed_starts += 1
            if self._num_failed_starts >= _START_ATTEMPTS:
                raise RuntimeError(f"{_START_ATTEMPTS} reward workers in a row exited during their start, {detail}")
        unfinished = [job for _, job in process.in_flight]
        first = unfinished[0] if unfinished else None
        if first is not None and from_outside and first.remaining[0] not in first.repeated:
            first.repeated.add(first.remaining[0])
        elif first is not None:
            self._failures.fail(unfinished[0], unfinished[0].remaining[0], kind, detail)
            if not unfinished[0].remaining:
                self._queue.finish(unfinished.pop(0))
        self._queue.put_back(unfinished)
        self._start()
