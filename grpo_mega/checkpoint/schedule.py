"""Decides after which steps of a run a checkpoint is saved."""

from __future__ import annotations

import time
from collections.abc import Callable


class CheckpointSchedule:
    """A checkpoint is due every `every` steps, `every_minutes` after the last one, and after the last step."""

    def __init__(
        self,
        every: int | None,
        every_minutes: float | None,
        last_step: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start to count the time.

        Args:
            every: number of steps; None: no such rule.
            every_minutes: minutes from one checkpoint to the next; None: no such rule.
            last_step: `train.steps`.
            clock: seconds that never go back.
        """
        self._every, self._last_step, self._clock = every, last_step, clock
        self._seconds = None if every_minutes is None else every_minutes * 60
        self._saved_at = clock()

    def time_is_up(self) -> bool:
        """Return True if `every_minutes` have passed. The clocks of two ranks differ: one rank decides for all."""
        return self._seconds is not None and self._clock() - self._saved_at >= self._seconds

    def is_due(self, step: int, *, time_is_up: bool) -> bool:
        """Return True if the state after `step` is to be saved."""
        return time_is_up or step == self._last_step or (self._every is not None and step % self._every == 0)

    def saved(self) -> None:
        """Start to count the time anew."""
        self._saved_at = self._clock()

    def __str__(self) -> str:
        rules = [] if self._every is None else [f"every {self._every} steps"]
        if self._seconds is not None:
            rules.append(f"after {self._seconds / 60:g} minutes without one")
        return f"checkpoints: {', '.join([*rules, 'at a stop request and after the last step'])}"
