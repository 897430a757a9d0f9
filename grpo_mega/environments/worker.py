"""The child's side of an environment worker: `python -m grpo_mega.environments.worker DESCRIPTOR PARENT_PID`.

Setup: `{"name": ..., "args": {...}, "timeout_seconds": s}`.
Job: `[prompt, [[answer, result or null, stop text or null], ...], reference]`; its answer: `{"result": text or null}`
or `{"failure": reason}`. How jobs travel and how a job is ended at its limit: grpo_mega/workers/.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from grpo_mega.environments.base import Turn, build_environment
from grpo_mega.workers.time_limit import call_with_alarm
from grpo_mega.workers.worker_main import Handler, serve


@dataclass(frozen=True)
class WorkerSpec:
    """The environment's section of the config as the worker receives it; pydantic is not imported here."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)


def prepare(setup: dict[str, Any]) -> Handler:
    """Build the environment of the setup and return the function that answers its jobs."""
    respond = build_environment(WorkerSpec(setup["name"], setup["args"]))

    def handle(job: list[Any]) -> Iterator[object]:
        prompt, turns, reference = job
        result, problem = call_with_alarm(
            setup["timeout_seconds"], lambda: respond(prompt, [Turn(*turn) for turn in turns], reference)
        )
        yield {"result": result} if problem is None else {"failure": f"raised {problem}"}

    return handle


if __name__ == "__main__":
    serve(prepare)
