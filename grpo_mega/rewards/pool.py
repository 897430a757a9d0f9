"""Scores completions in worker processes while the caller goes on sampling.

One thread of the caller's process owns the workers: it hands out jobs, reads answers and replaces workers that died.
Invariants (tests/unit/rewards/test_pool.py): every submitted key comes back from `collect`, whatever its reward did;
`submit` never waits; no worker outlives its parent; the values do not depend on the number of workers.

Batched rewards (batched.py) are scored in this process instead, while the workers score the others; without any other
there are no workers.

A scoring that times out, crashes, raises or returns a non-number scores its declared floor, is named in
`Reward.failures`, counted in `failure_counts` and logged, one line per component and kind in each `collect`.
"""

from __future__ import annotations

import itertools
import logging
import math
import selectors
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from types import TracebackType
from typing import Literal

from grpo_mega.rewards.base import Steps, Term, Value, build_rewards
from grpo_mega.rewards.batched import BatchScorer, ScoringRow
from grpo_mega.rewards.process import RewardProcess, ScoringJob
from grpo_mega.types import Reward

logger = logging.getLogger(__name__)

START_SECONDS = 120.0
"""Limit for a worker to start and import its rewards."""
_START_ATTEMPTS = 3
_TICK_SECONDS = 0.25
_COALESCE_SECONDS = 0.002

FailureKind = Literal["timed out", "crashed", "raised or returned no number"]


class RewardPool:
    """Worker processes that score completions; use as a context manager, or `close()` it.

    Args:
        terms: what to score; checked here, before a worker starts.
        workers: number of processes, each one core.
        timeout_seconds: wall-clock limit of one component of one completion; its process is then killed and replaced.

    Raises:
        UserError: a term is wrong (see `build_rewards`).
        RuntimeError: the workers do not start on this machine.
    """

    def __init__(self, terms: Sequence[Term], *, workers: int, timeout_seconds: float) -> None:
        self._components = build_rewards(terms, timeout_seconds)
        self._setup: dict[str, object] = {
            "terms": [
                None if component.is_batched else [term.name, term.weight, dict(term.args)]
                for term, component in zip(terms, self._components, strict=True)
            ],
            "timeout_seconds": timeout_seconds,
        }
        self._positions = [i for i, component in enumerate(self._components) if not component.is_batched]
        self._batched = {i: component.open() for i, component in enumerate(self._components) if component.is_batched}
        workers = workers if self._positions else 0
        self._timeout_seconds = timeout_seconds
        self.failure_counts: Counter[str] = Counter()
        """Failed scorings per component since the start."""
        self._changed = threading.Condition()  # guards the next six
        self._queue: deque[ScoringJob] = deque()
        self._pending: set[int] = set()
        self._done: dict[int, ScoringJob] = {}
        self._problems: dict[tuple[str, FailureKind], list[str]] = {}
        self._broken: BaseException | None = None
        self._closing = False
        self._ready_workers = 0  # written by the thread only, like everything below
        self._processes: list[RewardProcess] = []
        self._serials = itertools.count()
        self._failed_starts = 0
        self._selector = selectors.DefaultSelector()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ)
        # The workers are started by the thread: the kernel ties their life to the thread that started them.
        self._thread = threading.Thread(target=self._serve, args=(workers,), name="rewards", daemon=True)
        self._thread.start()
        self._wait_until_ready(workers)

    def submit(self, key: int, prompt: str, completion: str, reference: str) -> None:
        """Queue one completion for scoring; returns at once.

        Raises:
            ValueError: `key` is already waiting for `collect`.
            RuntimeError: the pool is closed or its workers cannot be restarted.
        """
        with self._changed:
            self._check_alive()
            if key in self._pending or key in self._done:
                raise ValueError(f"key={key} was submitted twice since the last collect; keys must differ")
            job = ScoringJob(key, prompt, completion, reference, list(self._positions))
            if self._positions:
                self._pending.add(key)
                self._queue.append(job)
            else:
                self._done[key] = job
            was_empty = len(self._queue) == 1
        for scorer in self._batched.values():
            scorer.submit(key, ScoringRow(prompt, completion, reference))
        if was_empty:
            self._wake()

    def collect(self) -> dict[int, Reward]:
        """Wait for everything submitted since the last call: at most `timeout_seconds` per component and completion in
        the workers, and as long as the batched rewards take.

        Raises:
            RuntimeError: the pool is closed or its workers cannot be restarted.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._pending or self._broken is not None or self._closing)
            self._check_alive()
            jobs, self._done = self._done, {}
        for position, scorer in self._batched.items():
            self._take(position, scorer, jobs)
        done = {key: self._reward(job) for key, job in jobs.items()}
        with self._changed:
            problems, self._problems = self._problems, {}
        for (name, kind), details in problems.items():
            floor = next(component.low for component in self._components if component.name == name)
            logger.warning(
                "reward %s %s for %d of %d completions, which score its floor %g; the first: %s",
                *(name, kind, len(details), len(done), floor, details[0]),
            )
        return done

    def close(self) -> None:
        """End the workers, whatever they are doing. A second call does nothing."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._wake()
        self._thread.join()
        for scorer in self._batched.values():
            scorer.close()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """The processes that score now."""
        return tuple(process.pid for process in list(self._processes))

    def _take(self, position: int, scorer: BatchScorer, jobs: dict[int, ScoringJob]) -> None:
        """Enter the values of a batched reward into the jobs."""
        component = self._components[position]
        values: dict[int, float | Exception]
        try:
            values = scorer.collect()
        except Exception as error:  # whatever it raises, the run goes on
            values = dict.fromkeys(jobs, error)
        for key, job in jobs.items():
            try:
                job.components[position] = component.checked(values.get(key, KeyError("no value came back")))
            except Exception as error:  # the scorer's, or what is wrong with its value
                self._fail(job, position, "raised or returned no number", f"{type(error).__name__}: {error}"[:500])

    def _reward(self, job: ScoringJob) -> Reward:
        values = {c.name: _outcome(job.components[i]) for i, c in enumerate(self._components)}
        value = sum(c.weight * values[c.name] for c in self._components)
        failures = tuple(c.name for i, c in enumerate(self._components) if i in job.failures)
        return Reward(value=value, components=values, failures=failures, steps=self._steps(job))

    def _steps(self, job: ScoringJob) -> Steps | None:
        """Of all terms, weighted, if one judged steps; a number is a step that ends with the completion."""
        if all(isinstance(found, float) for found in job.components.values()):
            return None
        last = max(0, len(job.completion) - 1)
        steps = []
        for i, component in enumerate(self._components):
            found = job.components[i]
            of_term = ((last, found),) if isinstance(found, float) else found
            steps += [(end, component.weight * value) for end, value in of_term]
        return tuple(steps)

    def _wait_until_ready(self, workers: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._ready_workers >= workers or self._broken is not None)
            broken = self._broken
        if broken is not None:
            self.close()
            raise RuntimeError(f"reward workers do not start: {broken}") from broken

    def _check_alive(self) -> None:
        if self._broken is not None:
            raise RuntimeError(f"reward workers cannot be restarted: {self._broken}") from self._broken
        if self._closing:
            raise RuntimeError("the reward pool is closed; make a new one")

    def _wake(self) -> None:
        try:
            self._wake_sender.send(b"x")
        except OSError:
            return  # full: the thread is awake already; closed: nobody is left to wake

    # What follows runs in the thread.

    def _serve(self, workers: int) -> None:
        try:
            for _ in range(workers):
                self._start()
            while not self._closing:
                self._hand_out()
                self._poll()
        except BaseException as error:  # carried to the caller, who would otherwise wait for ever
            with self._changed:
                self._broken = error
        finally:
            for process in self._processes:
                process.kill()
            self._processes.clear()
            self._selector.close()
            self._wake_receiver.close()
            self._wake_sender.close()
            with self._changed:
                self._changed.notify_all()

    def _start(self) -> None:
        process = RewardProcess(self._setup)
        self._processes.append(process)
        self._selector.register(process.connection, selectors.EVENT_READ, process)

    def _hand_out(self) -> None:
        """Give waiting jobs, one at a time, to the worker with the most room."""
        while self._queue:
            process = max(self._processes, key=lambda candidate: candidate.free_slots)
            if process.free_slots <= 0:
                return
            with self._changed:
                job = self._queue.popleft()
            process.submit(next(self._serials), job)

    def _poll(self) -> None:
        for process in self._processes:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if process.backlog else 0)
            self._selector.modify(process.connection, wanted, process)
        events = self._selector.select(_TICK_SECONDS)
        for key, mask in events:
            if key.data is None:
                self._drain_wake_ups()
                continue
            if mask & selectors.EVENT_WRITE:
                key.data.flush()
            if mask & selectors.EVENT_READ:
                self._read(key.data)
        for process in list(self._processes):
            self._check_limits(process)
        if sum(len(process.in_flight) for process in self._processes) > 2 * len(self._processes):
            time.sleep(_COALESCE_SECONDS)  # fast rewards: read many answers at once, and leave the core to the caller

    def _drain_wake_ups(self) -> None:
        try:
            self._wake_receiver.recv(4096)
        except BlockingIOError:
            return

    def _check_limits(self, process: RewardProcess) -> None:
        if process.is_overdue(self._timeout_seconds):
            process.kill()
            self._bury(process, "timed out", "")
        elif not process.ready and time.monotonic() - process.started > START_SECONDS:
            raise RuntimeError(f"a reward worker was not ready within {START_SECONDS:g} s")

    def _read(self, process: RewardProcess) -> None:
        was_ready = process.ready
        answers, alive = process.receive()
        for answer in answers:
            serial, job = process.in_flight[0]
            assert serial == answer.serial, (serial, answer)
            if answer.value is None:
                self._fail(job, answer.position, "raised or returned no number", answer.problem or "")
            else:
                job.components[answer.position] = answer.value
                job.remaining.remove(answer.position)
            if not job.remaining:
                process.in_flight.popleft()
                self._finish(job)
        if process.setup_error is not None:
            raise RuntimeError(process.setup_error)
        if process.ready and not was_ready:
            self._failed_starts = 0
            with self._changed:
                self._ready_workers += 1
                self._changed.notify_all()
        if not alive:
            status = process.exit_status()
            self._bury(process, "timed out" if status == -signal.SIGALRM else "crashed", f"exit status {status}")

    def _bury(self, process: RewardProcess, kind: FailureKind, detail: str) -> None:
        """Replace a dead worker; the scoring it was at has failed, its other jobs go back to the front of the queue."""
        self._selector.unregister(process.connection)
        self._processes.remove(process)
        if not process.ready:
            self._failed_starts += 1
            if self._failed_starts >= _START_ATTEMPTS:
                raise RuntimeError(f"{_START_ATTEMPTS} reward workers in a row ended while starting, {detail}")
        waiting = [job for _, job in process.in_flight]
        if waiting:
            self._fail(waiting[0], waiting[0].remaining[0], kind, detail)
            if not waiting[0].remaining:
                self._finish(waiting.pop(0))
        with self._changed:
            self._queue.extendleft(reversed(waiting))
        self._start()

    def _fail(self, job: ScoringJob, position: int, kind: FailureKind, detail: str) -> None:
        component = self._components[position]
        job.components[position] = component.low
        job.failures.add(position)
        if position in job.remaining:
            job.remaining.remove(position)
        with self._changed:
            self.failure_counts[component.name] += 1
            self._problems.setdefault((component.name, kind), []).append(f"key {job.key} {detail}".rstrip())

    def _finish(self, job: ScoringJob) -> None:
        with self._changed:
            self._done[job.key] = job
            self._pending.discard(job.key)
            if not self._pending:
                self._changed.notify_all()


def _outcome(value: Value) -> float:
    """One number: of steps their mean, which is in the range of the reward."""
    return value if isinstance(value, float) else math.fsum(of_step for _, of_step in value) / len(value)
