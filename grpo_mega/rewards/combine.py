"""Combine the values of all terms of one completion into its reward."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from grpo_mega.rewards.base import RewardComponent, Steps, Value
from grpo_mega.rewards.worker_jobs import ScoringJob
from grpo_mega.types import Reward


def combine(components: Sequence[RewardComponent], job: ScoringJob) -> Reward:
    """Return the weighted sum of the components, r = sum_i weight_i * value_i, with each component's own value.

    Only the terms that apply to the row's data set are counted. The value of a process reward is the mean over its
    steps, which is in the declared range. If a failed component has no floor, the reward has no value.
    """
    found = {i: component for i, component in enumerate(components) if i in job.components}
    values = {component.name: _mean(job.components[i]) for i, component in found.items()}
    failures = tuple(component.name for i, component in enumerate(components) if i in job.failures)
    if not job.failures <= found.keys():
        return Reward(value=None, components=values, failures=failures)
    value = sum(component.weight * values[component.name] for component in found.values())
    return Reward(value=value, components=values, failures=failures, steps=_weighted_steps(found, job))


def _weighted_steps(found: Mapping[int, RewardComponent], job: ScoringJob) -> Steps | None:
    """Return the weighted steps of all terms, or None when no term scored steps.

    A term that returned one number counts as one step that ends with the completion.
    """
    if all(isinstance(value, float) for value in job.components.values()):
        return None
    last = max(0, len(job.row.completion) - 1)
    steps: list[tuple[int, float]] = []
    for i, component in found.items():
        value = job.components[i]
        of_term = ((last, value),) if isinstance(value, float) else value
        steps += [(end, component.weight * of_step) for end, of_step in of_term]
    return tuple(steps)


def _mean(value: Value) -> float:
    return value if isinstance(value, float) else math.fsum(of_step for _, of_step in value) / len(value)
