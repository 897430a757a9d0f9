"""Failed scorings of a reward pool: they are counted and logged, and score a floor or leave the rollout without reward.

A failed scoring timed out, crashed its worker, raised, returned no number in the declared range, or got no answer from
a server. Each kind has its own line in the log; an exception also has its traceback.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from grpo_mega.rewards.base import RewardComponent
from grpo_mega.rewards.http_client import ServerError
from grpo_mega.rewards.scoring_errors import BadValueError, FailureKind, summary_of, traceback_of
from grpo_mega.rewards.worker_jobs import ScoringJob

logger = logging.getLogger(__name__)


def failure_of(error: Exception) -> tuple[FailureKind, str]:
    """Return the kind of a batched reward's failure, and its details."""
    if isinstance(error, BadValueError):
        return "returned no number in its range", summary_of(error)
    if isinstance(error, ServerError | TimeoutError):
        return "got no answer from its server", summary_of(error)
    return "raised an exception", traceback_of(error)


@dataclass
class _Failures:
    """Failures of one kind of one component since the last log."""

    first: str
    count: int = 0


class FailureLog:
    """Counts failures per component since the start, and collects their details until `log`. Safe between threads."""

    def __init__(self, components: Sequence[RewardComponent]) -> None:
        self._components = components
        self._lock = threading.Lock()  # guards the next two
        self.counts: Counter[str] = Counter()
        self._found: dict[tuple[int, FailureKind], _Failures] = {}

    def fail(self, job: ScoringJob, position: int, kind: FailureKind, detail: str) -> None:
        """Record that the component at `position` failed in this job, and give it its floor unless failures drop."""
        component = self._components[position]
        if component.on_failure == "floor":
            job.components[position] = float(component.low)
        job.failures.add(position)
        if position in job.remaining:
            job.remaining.remove(position)
        with self._lock:
            self.counts[component.name] += 1
            first = f"{job.row.description}\n{detail}".rstrip()
            self._found.setdefault((position, kind), _Failures(first)).count += 1

    def log(self, num_completions: int) -> None:
        """Log one message per component and kind of failure since the last call: its count, first row and details."""
        with self._lock:
            found, self._found = self._found, {}
        for (position, kind), failures in found.items():
            component = self._components[position]
            drops = component.on_failure == "drop"
            effect = "are left out of the loss" if drops else f"score its floor {component.low:g}"
            logger.warning(
                "reward %s %s for %d of %d completions, which %s; the first: %s",
                *(component.name, kind, failures.count, num_completions, effect, failures.first),
            )
