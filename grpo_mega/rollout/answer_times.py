"""Measures the sampling of this rank: its seconds, the wait for the longest answers, and the gauges of its engine.

Asserted by tests/unit/rollout/test_answer_times.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from grpo_mega.environments.pool import ReplyErrors
from grpo_mega.observe.engine_gauges import EngineGauges
from grpo_mega.observe.trace.recorder import TraceRecorder
from grpo_mega.rollout.sampler import Generator
from grpo_mega.types import Completion, Prompt, SamplingRequest

LAST_FRACTION = 0.1
"""The rollouts that finish last; sampling waits for them from the moment at which only they are left."""


_MAX_POINTS = 200  # of a curve of one call


@dataclass(frozen=True)
class AnswerSeconds:
    """Seconds of sampling on this rank: in total, and while at most `LAST_FRACTION` of its rollouts were left."""

    sampling: float = 0.0
    last_answers: float = 0.0


class AnswerTimes:
    """Sums over the calls of a rank's generator.

    Args:
        is_counted: returns False during an evaluation, which is not part of the rollouts of a step.
        clock: monotonic clock in seconds.
        recorder: records the calls in the trace of the run.
    """

    def __init__(
        self,
        is_counted: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
        recorder: TraceRecorder | None = None,
    ) -> None:
        self.is_counted, self.clock, self.recorder = is_counted, clock, recorder
        self._sampling = self._last_answers = 0.0
        self._gauges, self._reply_errors = EngineGauges(), ReplyErrors()

    def add(self, start: float, ends: Sequence[float], end: float) -> None:
        """Add one call.

        Args:
            start: time of the call.
            ends: times at which its rollouts finished; empty for a rank without prompts, which waits for the other
                data-parallel ranks of its replica during the whole call.
            end: time at which the call returned.
        """
        left = math.ceil(LAST_FRACTION * len(ends))
        self._sampling += end - start
        self._last_answers += end - (sorted(ends)[-left - 1] if len(ends) > left else start)

    def add_gauges(self, gauges: EngineGauges, errors: ReplyErrors) -> None:
        """Add the readings of the engine and the errors of the environment in one call."""
        self._gauges.add(gauges)
        self._reply_errors.add(errors)

    def take_gauges(self) -> tuple[EngineGauges, ReplyErrors]:
        """Return the sums since the last call."""
        taken = self._gauges, self._reply_errors
        self._gauges, self._reply_errors = EngineGauges(), ReplyErrors()
        return taken

    def take(self) -> AnswerSeconds:
        """Return the seconds since the last call."""
        found = AnswerSeconds(self._sampling, self._last_answers)
        self._sampling = self._last_answers = 0.0
        return found


def record_unfinished(recorder: TraceRecorder, start: float, ends: Sequence[float]) -> None:
    """Record the curve of the rollouts that are not finished, with at most `_MAX_POINTS` points.

    Args:
        recorder: of this rank.
        start: time at which sampling began, in seconds of the monotonic clock.
        ends: times at which the rollouts finished.
    """
    every = math.ceil((len(ends) + 1) / _MAX_POINTS)
    points = [start, *sorted(ends)]
    for i in sorted({*range(0, len(points), every), len(points) - 1}):
        recorder.counter("unfinished rollouts", int(points[i] * 1e9), len(ends) - i)


class ReportsErrors(Protocol):
    """The part of the environment workers that is read here."""

    def take_errors(self) -> ReplyErrors:
        """Return the errors since the last call."""
        ...


@dataclass(frozen=True)
class SamplingMeasurement:
    """Measurement of the calls of a rank's sampler.

    Attributes:
        times: collects the measurements.
        take_gauges: returns the gauges of the engine since the last call.
        environments: environment workers of this rank, if any.
    """

    times: AnswerTimes
    take_gauges: Callable[[], EngineGauges] = EngineGauges
    environments: ReportsErrors | None = None

    def record(self, start: float, ends: Sequence[float]) -> None:
        """Add a call that returns now; the arguments are those of `AnswerTimes.add`."""
        recorder = self.times.recorder
        if recorder is not None:
            recorder.record("sample", "engine", int(start * 1e9), time.monotonic_ns(), {"rollouts": len(ends)})
            record_unfinished(recorder, start, ends)
        gauges = self.take_gauges()
        errors = ReplyErrors() if self.environments is None else self.environments.take_errors()
        if self.times.is_counted():
            self.times.add(start, ends, self.times.clock())
            self.times.add_gauges(gauges, errors)


class MeasuredGenerator:
    """A generator that samples with another one, and records the times of its rollouts.

    Args:
        generator: samples.
        times: collects the measurements.
        take_gauges: see `SamplingMeasurement`.
        environments: see `SamplingMeasurement`.
    """

    def __init__(
        self,
        generator: Generator,
        times: AnswerTimes,
        take_gauges: Callable[[], EngineGauges] = EngineGauges,
        environments: ReportsErrors | None = None,
    ) -> None:
        self._generator, self._times = generator, times
        self.measurement = SamplingMeasurement(times, take_gauges, environments)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingRequest,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample; the contract is `Engine.generate`."""
        ends: list[float] = []

        def measured(prompt: int, member: int, completion: Completion) -> None:
            ends.append(self._times.clock())
            if on_completion is not None:
                on_completion(prompt, member, completion)

        start = self._times.clock()
        groups = self._generator.generate(prompts, sampling, measured)
        self.measurement.record(start, ends)
        return groups
