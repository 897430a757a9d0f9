"""Failed scorings of a reward pool: they score the floor of their component, are counted, and are logged.

A failed scoring timed out, crashed its worker, raised, or returned no number in the declared range.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from grpo_mega.rewards.base import RewardComponent
from grpo_mega.rewards.process import ScoringJob

logger = logging.getLogger(__name__)

FailureKind = Literal["timed out", "crashed", "raised or returned no number"]


class FailureLog:
    """Counts failures per component since the start, and collects their details until `log`. Safe between threads."""

    def __init__(self, components: Sequence[RewardComponent]) -> None:
        self._components = components
        self._lock = threading.Lock()  # guards the next two
        self.counts: Counter[str] = Counter()
        self._details: dict[tuple[int, FailureKind], list[str]] = {}

    def fail(self, job: ScoringJob, position: int, kind: FailureKind, detail: str) -> None:
        """Give the component at `position` its floor in this job, and record the failure."""
        component = self._components[position]
        job.components[position] = component.low
        job.failures.add(position)
        if position in job.remaining:
            job.remaining.remove(position)
        with self._lock:
            self.counts[component.name] += 1
            self._details.setdefault((position, kind), []).append(f"key {job.key} {detail}".rstrip())

    def log(self, num_completions: int) -> None:
        """Log one line per component and kind of failure since the last call."""
        with self._lock:
            details, self._details = self._details, {}
        for (position, kind), texts in details.items():
            component = self._components[position]
            logger.warning(
                "reward %s %s for %d of %d completions, which score its floor %g; the first: %s",
                *(component.name, kind, len(texts), num_completions, component.low, texts[0]),
            )
