"""The child's side of a reward worker: `python -m grpo_mega.rewards.worker DESCRIPTOR PARENT_PID`.

Setup: `{"terms": [[name, weight, args] or null, ...], "timeout_seconds": s}`; null marks a term that is scored in the
process of the rank.
Job: `[serial, positions of terms, prompt, completion, reference]`. Each position gets a line of its own,
`[serial, position, value or null, problem or null, seconds]`, as soon as its value is known. So the parent can name the
reward that was running when a worker dies. How jobs travel and how a job is ended at its limit: grpo_mega/workers/.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from grpo_mega.rewards.base import build_rewards
from grpo_mega.workers.time_limit import call_with_alarm
from grpo_mega.workers.worker_main import Handler, serve


@dataclass(frozen=True)
class WorkerTerm:
    """A reward term as the worker receives it; pydantic is not imported here."""

    name: str
    weight: float = 1.0
    args: dict[str, Any] = field(default_factory=dict)


def prepare(setup: dict[str, Any]) -> Handler:
    """Build the rewards of the setup and return the function that answers its jobs."""
    positions = [position for position, term in enumerate(setup["terms"]) if term is not None]
    built = build_rewards([WorkerTerm(*setup["terms"][position]) for position in positions])
    components = dict(zip(positions, built, strict=True))

    def handle(job: list[Any]) -> Iterator[object]:
        serial, positions, *texts = job
        for position in positions:
            started = time.monotonic()
            value, problem = call_with_alarm(setup["timeout_seconds"], partial(components[position], *texts))
            yield [serial, position, value, problem, time.monotonic() - started]

    return handle


if __name__ == "__main__":
    serve(prepare)
