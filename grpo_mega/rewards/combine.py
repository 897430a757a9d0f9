"""Combine the values of all terms of one completion into its reward."""

from __future__ import annotations

import math
from collections.abc import Sequence

from grpo_mega.rewards.base import RewardComponent, Steps, Value
from grpo_mega.rewards.process import ScoringJob
from grpo_mega.types import Reward


def combine(components: Sequence[RewardComponent], job: ScoringJob) -> Reward:
    """Return the weighted sum of the components, r = sum_i weight_i * value_i, with each component's own value.

    The value of a process reward is the mean over its steps, which is in the declared range.
    """
    values = {component.name: _mean(job.components[i]) for i, component in enumerate(components)}
    value = sum(component.weight * values[component.name] for component in components)
    failures = tuple(component.name for i, component in enumerate(components) if i in job.failures)
    return Reward(value=value, components=values, failures=failures, steps=_weighted_steps(components, job))


def _weighted_steps(components: Sequence[RewardComponent], job: ScoringJob) -> Steps | None:
    """Return the weighted steps of all terms, or None when no term scored steps.

    A term that returned one number counts as one step that ends with the completion.
    """
    if all(isinstance(value, float) for value in job.components.values()):
        return None
    last = max(0, len(job.completion) - 1)
    steps: list[tuple[int, float]] = []
    for i, component in enumerate(components):
        value = job.components[i]
        of_term = ((last, value),) if isinstance(value, float) else value
        steps += [(end, component.weight * of_step) for end, of_step in of_term]
    return tuple(steps)


def _mean(value: Value) -> float:
    return value if isinstance(value, float) else math.fsum(of_step for _, of_step in value) / len(value)
