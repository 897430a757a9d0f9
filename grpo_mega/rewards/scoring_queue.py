"""The jobs of a reward pool, shared by the caller and the scoring thread, under one lock.

A job is waiting, then in the hands of a worker, then done. `close` and `report_broken` release every waiting caller.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from grpo_mega.rewards.worker_jobs import ScoringJob


class ScoringQueue:
    """Jobs by their state, and the state of the workers that a caller waits for."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards everything below
        self._waiting: deque[ScoringJob] = deque()
        self._unfinished: set[int] = set()
        self._done: dict[int, ScoringJob] = {}
        self._num_ready_workers = 0
        self._broken: BaseException | None = None
        self._is_closed = False

    def add(self, job: ScoringJob) -> bool:
        """Queue a job, and return True when it is the only one that waits. A job without terms is done at once.

        Raises:
            ValueError: the key was added before and is not collected yet.
            RuntimeError: the pool is closed or its workers cannot be restarted.
        """
        with self._changed:
            self._check_open()
            if job.key in self._unfinished or job.key in self._done:
                raise ValueError(f"key={job.key} was submitted twice since the last collect; keys must differ")
            if not job.remaining:
                self._done[job.key] = job
                return False
            self._unfinished.add(job.key)
            self._waiting.append(job)
            return len(self._waiting) == 1

    def take_done(self) -> dict[int, ScoringJob]:
        """Wait until every job is done, and return all jobs since the last call, by key.

        Raises:
            RuntimeError: the pool is closed or its workers cannot be restarted.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._unfinished or self._broken is not None or self._is_closed)
            self._check_open()
            done, self._done = self._done, {}
            return done

    def wait_for_workers(self, num_workers: int) -> BaseException | None:
        """Wait until so many workers are ready, or return the reason why they cannot be started."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_ready_workers >= num_workers or self._broken is not None)
            return self._broken

    def close(self) -> None:
        """Reject further jobs and release the callers that wait."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    # The scoring thread calls the methods below.

    @property
    def is_closed(self) -> bool:
        """True after `close`."""
        return self._is_closed

    def next_job(self) -> ScoringJob | None:
        """Return the job that has waited longest, or None."""
        with self._changed:
            return self._waiting.popleft() if self._waiting else None

    def put_back(self, jobs: Sequence[ScoringJob]) -> None:
        """Return the jobs of a dead worker to the front of the queue, in their order."""
        with self._changed:
            self._waiting.extendleft(reversed(jobs))

    def finish(self, job: ScoringJob) -> None:
        """Mark a job as done."""
        with self._changed:
            self._done[job.key] = job
            self._unfinished.discard(job.key)
            if not self._unfinished:
                self._changed.notify_all()

    def report_ready_worker(self) -> None:
        """Count one more worker that has started."""
        with self._changed:
            self._num_ready_workers += 1
            self._changed.notify_all()

    def report_broken(self, error: BaseException) -> None:
        """Release the callers that wait, with the reason why the workers cannot be restarted."""
        with self._changed:
            self._broken = error
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self._broken is not None:
            raise RuntimeError(f"reward workers cannot be restarted: {self._broken}") from self._broken
        if self._is_closed:
            raise RuntimeError("the reward pool is closed; create a new one")
