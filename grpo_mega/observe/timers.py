"""Where the seconds of a run go. Phases are timed by the wall clock of this rank and never overlap.

A phase inside another one pauses the outer one, so that phases add up to at most the whole. A device that works
asynchronously must be waited for inside the phase that gave it the work; nothing here knows devices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Seconds per phase, per step and in total. For one thread.

    Args:
        on_phase: Told the name of a phase as it begins, or goes on after one inside it (a display shows it).
        clock: Seconds that only grow.
    """

    def __init__(
        self, on_phase: Callable[[str], None] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._on_phase = on_phase
        self._clock = clock
        self._running: list[str] = []
        self._step: dict[str, float] = {}
        self._total: dict[str, float] = {}
        self._created = self._step_start = self._mark = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside towards `name`, also when it ends with an exception."""
        if name in ("step", "total"):
            raise ValueError(f"phase={name} is the name of a sum; name the phase otherwise")
        self._count()
        self._enter(name)
        try:
            yield
        finally:
            self._count()
            self._running.pop()
            if self._running and self._on_phase is not None:
                self._on_phase(self._running[-1])

    def start_step(self) -> None:
        """Forget the seconds of the step before."""
        self._count()
        self._step = {}
        self._step_start = self._mark

    def step_seconds(self) -> dict[str, float]:
        """Phase -> seconds since `start_step`, and `step`, all of them with what lies between the phases."""
        self._count()
        return {**self._step, "step": self._mark - self._step_start}

    def total_seconds(self) -> dict[str, float]:
        """Phase -> seconds since this timer was made, and `total`, all of them with what lies between the phases."""
        self._count()
        return {**self._total, "total": self._mark - self._created}

    def step_metrics(self) -> dict[str, float]:
        """`step_seconds` under the names of the metrics."""
        return {f"time/{name}_seconds": seconds for name, seconds in self.step_seconds().items()}

    def _enter(self, name: str) -> None:
        self._running.append(name)
        if self._on_phase is not None:
            self._on_phase(name)

    def _count(self) -> None:
        """Give the seconds since the last mark to the innermost phase."""
        now = self._clock()
        if self._running:
            name = self._running[-1]
            self._step[name] = self._step.get(name, 0.0) + now - self._mark
            self._total[name] = self._total.get(name, 0.0) + now - self._mark
        self._mark = now
