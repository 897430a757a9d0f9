"""The rule for degenerate groups: groups whose rewards differ by no more than the rounding of their computation.

Weighted sums of the same components can differ in the last bit, as 0.1 + 0.2 and 0.3 do. Such a difference is no
training signal, and division by the std of the group would turn it into one. The advantage estimators, the metrics and
dynamic sampling all use the functions of this module.
Asserted by tests/unit/algorithm/test_degenerate.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from grpo_mega.types import Rollout

ROUNDING = 2.0**-40
"""Relative tolerance, about 1e-12: some thousand roundings of float64, and far below one rounding of float32."""


def equal_up_to_rounding(values: Sequence[float]) -> bool:
    """Return True if max(values) - min(values) <= 2^-40 * max(1, max |value|). False if a value is not finite.

    The 1 stands for the size of the summands: a sum that cancels, such as 0.1 + 0.2 - 0.3, is itself no larger than the
    rounding error.

    Args:
        values: at least one.
    """
    if not all(map(math.isfinite, values)):
        return False
    return max(values) - min(values) <= ROUNDING * max(1.0, *map(abs, values))


def rewards_are_equal(rewards: Sequence[float]) -> bool:
    """Return True if outcome rewards of a group are equal up to rounding, or equal as float32.

    Advantages of outcome rewards are computed from float32 (`StepRewards.reward_matrix`): rewards that are equal in
    float32 have advantage 0.

    Args:
        rewards: of the rollouts of one group, at least one.
    """
    return equal_up_to_rounding(rewards) or len(set(torch.tensor(rewards, dtype=torch.float32).tolist())) == 1


def is_degenerate(rollouts: Sequence[Rollout]) -> bool:
    """Return True if the rewards of a group are equal; for a process reward, if the values of all its steps are.

    Rollouts without a reward are left out. A group with fewer than two rewards is degenerate.
    """
    scored = [(rollout, value) for rollout in rollouts if (value := rollout.reward.value) is not None]
    if len(scored) < 2:
        return True
    if any(rollout.steps for rollout, _ in scored):
        return equal_up_to_rounding([step for r, value in scored for _, step in r.steps or ((0, value),)])
    return rewards_are_equal([value for _, value in scored])
