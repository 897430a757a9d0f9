"""A reward whose module makes the gradient of every update with the prompts of one step not a number.

The variable POISONED_STEP says which step of the prompt order. The gradient of one parameter becomes NaN on the last
rank only, after the backward pass; the loss stays finite. The same prompts fail in every attempt.
"""

from __future__ import annotations

import math
import os
from typing import Any

from grpo_mega.policy.learner import MegatronLearner
from grpo_mega.rewards.builtin.exact import exact
from grpo_mega.rollout.dynamic_sampling import GroupSource
from grpo_mega.rollout.sampled_groups import SampledGroups

__all__ = ["exact"]

_sample = GroupSource.sample
_run_schedule = MegatronLearner._run_schedule
_is_poisoned = [False]


def _sample_and_note(source: GroupSource, step: int, prompts_step: int | None = None, *arguments: Any) -> SampledGroups:
    _is_poisoned[0] = (prompts_step or step) == int(os.environ["POISONED_STEP"])
    return _sample(source, step, prompts_step, *arguments)


def _run_and_poison(learner: MegatronLearner, *arguments: Any, forward_only: bool) -> list[Any]:
    outputs = _run_schedule(learner, *arguments, forward_only=forward_only)
    is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    if _is_poisoned[0] and not forward_only and is_last:
        for buffer in learner.parts.buffers:
            buffer.grad_data.fill_(math.nan)
    return outputs


GroupSource.sample = _sample_and_note  # type: ignore[method-assign, assignment]
MegatronLearner._run_schedule = _run_and_poison  # type: ignore[method-assign, assignment]
