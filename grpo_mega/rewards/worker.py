"""The child's side of a reward worker: `python -m grpo_mega.rewards.worker DESCRIPTOR PARENT_PID`.

Setup: `{"terms": [[name, weight, args] or null, ...], "timeout_seconds": s}`; null marks a term that is scored in the
process of the rank.
Job: `[serial, positions of terms, row]`; the row has the inputs (inputs.py) that a term of this worker reads. Each
position gets a line of its own, `[serial, position, value or null, problem or null, seconds]`, as soon as its value is
known. A problem is `[kind, details]`; the details of an exception are its traceback. So the parent can name the reward
that was running when a worker dies. How jobs travel and how a job is ended at its limit: grpo_mega/workers/.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from grpo_mega.rewards.base import RewardComponent, Value, build_rewards
from grpo_mega.rewards.inputs import TEXTS, ScoringRow
from grpo_mega.rewards.scoring_errors import FailureKind, summary_of, traceback_of
from grpo_mega.workers.time_limit import call_with_alarm
from grpo_mega.workers.worker_main import Handler, serve


@dataclass(frozen=True)
class WorkerTerm:
    """A reward term as the worker receives it; pydantic is not imported here."""

    name: str
    weight: float = 1.0
    args: dict[str, Any] = field(default_factory=dict)
    datasets: None = None  # the parent sends only positions that apply


def prepare(setup: dict[str, Any]) -> Handler:
    """Build the rewards of the setup and return the function that answers its jobs."""
    positions = [position for position, term in enumerate(setup["terms"]) if term is not None]
    built = build_rewards([WorkerTerm(*setup["terms"][position]) for position in positions])
    components = dict(zip(positions, built, strict=True))

    def handle(job: list[Any]) -> Iterator[object]:
        serial, positions, texts = job
        row = ScoringRow(**{**dict.fromkeys(TEXTS, ""), **texts})
        for position in positions:
            started = time.monotonic()
            scored, problem = call_with_alarm(setup["timeout_seconds"], partial(_score, components[position], row))
            value, failure = scored if scored is not None else (None, ("raised an exception", problem))
            yield [serial, position, value, failure, time.monotonic() - started]

    return handle


def _score(component: RewardComponent, row: ScoringRow) -> tuple[Value | None, tuple[FailureKind, str] | None]:
    """Return the value of a row, or the kind of the failure with its details."""
    try:
        returned = component.called(row)
    except (Exception, SystemExit) as error:
        return None, ("raised an exception", traceback_of(error))
    try:
        return component.checked(returned), None
    except (Exception, SystemExit) as error:  # conversion to a number runs code of the user's object
        return None, ("returned no number in its range", summary_of(error))


if __name__ == "__main__":
    serve(prepare)
