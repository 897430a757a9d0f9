"""Measures the wall-clock time of phases on this rank. Phases never overlap.

A nested phase pauses the outer phase, so that the sum of all phases is at most the total time. A caller that starts
asynchronous work on a device must wait for it inside the phase; nothing here synchronizes with devices.
Asserted by tests/unit/observe/test_timers.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from grpo_mega.observe.trace.recorder import TraceRecorder
from grpo_mega.parallel.heartbeat import OUTSIDE, RankHeartbeat

_NO_GAP = 1e-6  # seconds; rounding of sums


class PhaseTimer:
    """Seconds per phase, of the current step and in total. Not thread-safe.

    Args:
        on_phase: called with the name of a phase when it starts, or resumes after a nested phase.
        clock: monotonic clock in seconds.
        heartbeat: of this rank, which shows the launcher the phase and the step; None: no launcher watches.
        recorder: records the phases in the trace of the run, where a nested phase does not pause the outer one.
    """

    def __init__(
        self,
        on_phase: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        heartbeat: RankHeartbeat | None = None,
        recorder: TraceRecorder | None = None,
    ) -> None:
        self._recorder = recorder
        self._heartbeat = heartbeat
        self._on_phase = on_phase
        self._clock = clock
        self._running: list[str] = []
        self._step: dict[str, float] = {}
        self._total: dict[str, float] = {}
        self._spans: list[tuple[str, float, float]] = []
        self._created = self._step_start = self._mark = clock()

    @property
    def current(self) -> str | None:
        """Name of the phase that runs, the innermost one."""
        return self._running[-1] if self._running else None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the `with` block to the phase `name`, also after an exception.

        Raises:
            ValueError: the name is `step` or `total`, which are sums.
        """
        if name in ("step", "total"):
            raise ValueError(f"phase={name} is the name of a sum; use another name")
        self._account()
        self._enter(name)
        start = time.monotonic_ns()
        try:
            yield
        finally:
            if self._recorder is not None:
                self._recorder.record(name, "phase", start, time.monotonic_ns(), {})
            self._account()
            self._running.pop()
            if self._running:
                self._show(self._running[-1])
            elif self._heartbeat is not None:
                self._heartbeat.phase(OUTSIDE)

    def count_progress(self, counter: Callable[[], int]) -> None:
        """Add a counter to the heartbeats, which grows while the rank makes progress inside of a phase."""
        if self._heartbeat is not None:
            self._heartbeat.count(counter)

    @contextmanager
    def waiting_for(self, awaited: Callable[[], str]) -> Iterator[None]:
        """Show the launcher, in the `with` block, that this rank waits for threads; see `RankHeartbeat.waiting_for`.

        Args:
            awaited: names these threads, or is `heartbeat.OTHER_RANKS`.
        """
        with nullcontext() if self._heartbeat is None else self._heartbeat.waiting_for(awaited):
            yield

    def start_step(self) -> None:
        """Reset the seconds of the current step."""
        self._account()
        if self._heartbeat is not None:
            self._heartbeat.step()
        self._step, self._spans = {}, []
        self._step_start = self._mark

    def step_seconds(self) -> dict[str, float]:
        """Return {phase: seconds} since `start_step`; `step` is the total, with the time between phases."""
        self._account()
        return {**self._step, "step": self._mark - self._step_start}

    def step_spans(self) -> list[tuple[str, float, float]]:
        """Return (phase, start, seconds) since `start_step`, in order; starts count from there. A phase that a nested
        one pauses has several."""
        self._account()
        return list(self._spans)

    def total_seconds(self) -> dict[str, float]:
        """Return {phase: seconds} since the timer was created; `total` includes the time between phases."""
        self._account()
        return {**self._total, "total": self._mark - self._created}

    def step_metrics(self) -> dict[str, float]:
        """Return `step_seconds` under the names of the metrics."""
        return {f"time/{name}_seconds": seconds for name, seconds in self.step_seconds().items()}

    def _enter(self, name: str) -> None:
        self._running.append(name)
        self._show(name)

    def _show(self, name: str) -> None:
        """Report the phase that starts or resumes."""
        if self._heartbeat is not None:
            self._heartbeat.phase(name)
        if self._on_phase is not None:
            self._on_phase(name)

    def _account(self) -> None:
        """Add the seconds since the last call to the innermost phase."""
        now = self._clock()
        if self._running:
            name = self._running[-1]
            self._step[name] = self._step.get(name, 0.0) + now - self._mark
            self._total[name] = self._total.get(name, 0.0) + now - self._mark
            self._add_span(name, self._mark - self._step_start, now - self._mark)
        self._mark = now

    def _add_span(self, name: str, start: float, seconds: float) -> None:
        """Add a span, or extend the last one if it has the same phase and no gap is between them."""
        if self._spans and self._spans[-1][0] == name:
            _, last_start, last_seconds = self._spans[-1]
            if last_start + last_seconds >= start - _NO_GAP:
                self._spans[-1] = (name, last_start, start + seconds - last_start)
                return
        if seconds > 0:
            self._spans.append((name, start, seconds))
