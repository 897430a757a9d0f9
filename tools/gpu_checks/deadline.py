"""Time that is left to tools/gpu_proof.py, on the real clock or on the simulated one of a rehearsal."""

from __future__ import annotations

import time
from typing import Protocol

from tools.gpu_checks.parts import CheckPart

RESERVE_SECONDS = 5.0
"""Kept for stopping the last part and writing its result."""


class DeadlineClock(Protocol):
    """A clock that is told when a part finished."""

    def now(self) -> float:
        """Return seconds since any fixed time."""
        ...

    def after(self, part: CheckPart) -> None:
        """Do what the end of a part changes."""
        ...


class RealClock:
    """The monotonic clock of the machine."""

    def now(self) -> float:
        """See `DeadlineClock`."""
        return time.monotonic()

    def after(self, part: CheckPart) -> None:
        """See `DeadlineClock`."""


class SimulatedClock:
    """A clock on which every part takes its expected seconds and nothing else takes time.

    A rehearsal on a slow CPU therefore selects and skips the same parts as a run on a GPU that needs the expected time.
    """

    def __init__(self) -> None:
        self._seconds = 0.0

    def now(self) -> float:
        """See `DeadlineClock`."""
        return self._seconds

    def after(self, part: CheckPart) -> None:
        """See `DeadlineClock`."""
        self._seconds += part.expected_seconds


class Deadline:
    """The end of the whole check. `minutes=None`: there is none, and parts have only their own limits."""

    def __init__(self, minutes: float | None, clock: DeadlineClock) -> None:
        self._clock, self._minutes = clock, minutes
        self._end = None if minutes is None else clock.now() + 60 * minutes

    def reason_to_skip(self, part: CheckPart) -> str:
        """Return why a part must not start, or an empty string."""
        left = self._left()
        if left is None or left >= part.expected_seconds:
            return ""
        return (
            f"--minutes={self._minutes:g}: {max(left, 0):.0f} s are left, and the part is expected to take "
            f"{part.expected_seconds:.0f} s"
        )

    def limit_of(self, part: CheckPart) -> float:
        """Return the seconds after which a part that starts now is stopped."""
        left = self._left()
        return part.limit_seconds if left is None else min(part.limit_seconds, left)

    def _left(self) -> float | None:
        return None if self._end is None else self._end - self._clock.now() - RESERVE_SECONDS
