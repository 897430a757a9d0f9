"""One reward worker with the jobs that it has: how many it may get, and its answers in their order.

The worker process itself is a `JsonWorker`; what it runs is grpo_mega/rewards/worker.py.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo_mega.rewards.base import Value
from grpo_mega.rewards.inputs import TEXTS, ScoringRow
from grpo_mega.rewards.scoring_errors import REPORTED, FailureKind
from grpo_mega.workers.json_worker import JsonWorker

_MAX_IN_FLIGHT = 64
_PREFETCH_SECONDS = 0.02


@dataclass
class ScoringJob:
    """One completion to score; `remaining` holds the positions of the terms that have no value yet.

    `repeated`: positions whose scoring was started again, because another program had killed or stopped its worker.
    """

    key: int
    row: ScoringRow
    remaining: list[int]
    components: dict[int, Value] = field(default_factory=dict)
    failures: set[int] = field(default_factory=set)
    repeated: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Answer:
    """The value of one component of one job; None when the scoring failed, for the reason `problem`.

    `problem` is the kind of the failure and its details.
    """

    serial: int
    position: int
    value: Value | None
    problem: tuple[FailureKind, str] | None


class RewardProcess:
    """A reward worker and the jobs that were sent to it, oldest first."""

    def __init__(self, setup: dict[str, object], inputs: Sequence[str] = TEXTS) -> None:
        """Start the worker. `inputs` names the parts of a row that its rewards read."""
        self.worker = JsonWorker("grpo_mega.rewards.worker", setup)
        self._inputs = inputs
        self.in_flight: deque[tuple[int, ScoringJob]] = deque()
        self._mean_seconds = _PREFETCH_SECONDS

    @property
    def free_slots(self) -> int:
        """Number of further jobs to send: about 20 ms of work in all, at most 64 jobs, and none before it is ready."""
        if not self.worker.is_ready:
            return 0
        target = max(1, min(_MAX_IN_FLIGHT, int(_PREFETCH_SECONDS / max(self._mean_seconds, 1e-6))))
        return target - len(self.in_flight)

    def submit(self, serial: int, job: ScoringJob) -> None:
        """Send a job to this worker."""
        self.in_flight.append((serial, job))
        self.worker.send([serial, job.remaining, {name: job.row.input(name) for name in self._inputs}])

    def receive(self) -> tuple[list[Answer], bool]:
        """Return the answers that have arrived, and whether the worker can send more.

        Answers come in the order of `in_flight`; the caller removes a job from it after the job's last answer. A
        message that is not the next answer ends the worker, because the reward must have written it.
        """
        messages, is_open = self.worker.receive()
        expected = ((serial, position) for serial, job in self.in_flight for position in job.remaining)
        answers: list[Answer] = []
        for message in messages:
            if not (_is_answer(message) and tuple(message[:2]) == next(expected, None)):
                self.worker.reject(message)
                return answers, False
            serial, position, value, problem, seconds = message
            self._mean_seconds += 0.1 * (seconds - self._mean_seconds)
            if isinstance(value, list):
                value = tuple((end, of_step) for end, of_step in value)
            answers.append(Answer(serial, position, value, None if problem is None else tuple(problem)))
        return answers, is_open

    def is_overdue(self, timeout_seconds: float) -> bool:
        """Return True when the current scoring has passed its limit and the worker's alarm did not end it."""
        return bool(self.in_flight) and self.worker.is_late(timeout_seconds)


def _is_answer(message: Any) -> bool:
    """Return True for `[serial, position, value or null, problem or null, seconds]` (rewards/worker.py)."""
    if not (isinstance(message, list) and len(message) == 5):
        return False
    serial, position, value, problem, seconds = message
    return (
        type(serial) is int
        and type(position) is int
        and (value is None or _is_number(value) or (isinstance(value, list) and all(map(_is_step, value))))
        and (value is None) == (problem is not None)
        and (problem is None or _is_problem(problem))
        and _is_number(seconds)
    )


def _is_problem(problem: Any) -> bool:
    """Return True for `[kind, details]` with a kind that a worker reports itself."""
    return isinstance(problem, list) and len(problem) == 2 and problem[0] in REPORTED and isinstance(problem[1], str)


def _is_step(step: Any) -> bool:
    return isinstance(step, list) and len(step) == 2 and type(step[0]) is int and _is_number(step[1])


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
