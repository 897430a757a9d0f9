"""Groups whose rewards differ only by rounding have no advantage, and every part of the program counts them alike."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from grpo_mega.algorithm.advantages.group_relative import group_advantages, group_mean, group_std, leave_one_out
from grpo_mega.algorithm.advantages.process import process_gains
from grpo_mega.algorithm.base import StepRewards
from grpo_mega.algorithm.degenerate import ROUNDING, equal_groups, equal_up_to_rounding
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.types import Completion, Prompt, Reward, Rollout

ABOVE = math.nextafter(1 + 2**-24, 2.0)
"""The neighbor of 1 + 2^-24 in float64; float32 rounds 1 + 2^-24 down to 1 and this one up to 1 + 2^-23."""


def rollouts(*rewards: float) -> list[Rollout]:
    prompt = Prompt(0, "", (1,), "")
    return [Rollout(prompt, Completion((1, 2), (0.0, 0.0), "eos", 0, ""), Reward(r), 0) for r in rewards]


@pytest.mark.parametrize(
    "rewards",
    [
        (0.1 + 0.2, 0.3),  # 0.30000000000000004
        (0.0, 0.1 + 0.2 - 0.3),  # 5.6e-17: the sum cancels
        (1 + 2**-24, ABOVE),  # float32 would round them to different numbers
        (1e15, 1e15 + 0.125),  # one rounding of a large number
        (1.0, 1.0 + 1e-9),  # equal in float32
    ],
)
def test_rounding_is_no_reason_for_an_advantage(rewards: tuple[float, float]) -> None:
    group = (*rewards, rewards[0])
    assert equal_groups(np.array([group])).all()
    assert SampledGroups.of(rollouts(*group), 3).degenerate[0]
    step = StepRewards(list(group), 3)
    for estimator in (group_std, group_mean, leave_one_out):
        assert list(estimator(step).advantages) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("rewards", [(0.3, 0.3 + 1e-6), (1e7, 1e7 + 1), (0.0, 1e-11), (-1.0, 1.0)])
def test_a_difference_above_rounding_is_kept_bit_for_bit(rewards: tuple[float, float]) -> None:
    group = (*rewards, rewards[0], rewards[1])
    assert not SampledGroups.of(rollouts(*group), 4).degenerate[0]
    step = StepRewards(list(group), 4)
    matrix = torch.tensor([group], dtype=torch.float32)
    assert torch.equal(step.reward_matrix, matrix)
    assert list(group_std(step).advantages) == group_advantages(matrix, scale="std").flatten().tolist()
    assert any(group_std(step).advantages)


def test_the_tolerance_is_relative_to_the_largest_value_and_at_least_to_one() -> None:
    assert equal_up_to_rounding([8.0, 8.0 + 8 * ROUNDING])
    assert not equal_up_to_rounding([8.0, 8.0 + 9 * ROUNDING])
    assert equal_up_to_rounding([0.0, ROUNDING])
    assert not equal_up_to_rounding([0.0, 2 * ROUNDING])
    assert equal_up_to_rounding([-5.0])


def test_groups_are_judged_one_by_one() -> None:
    rewards = [0.1 + 0.2, 0.3, 0.3, 0.4]
    assert StepRewards(rewards, 2).reward_matrix[0].unique().numel() == 1
    assert StepRewards(rewards, 2).reward_matrix[1].unique().numel() == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_never_equal(value: float) -> None:
    assert not equal_up_to_rounding([1.0, value])
    assert not equal_up_to_rounding([value, value])
    assert not equal_groups(np.array([[1.0, value]])).any()
    step = StepRewards([1.0, value], 2)
    with pytest.raises(ValueError, match="prompt 0, rollout 1"):
        group_std(step)


def test_steps_of_a_process_reward_follow_the_same_rule() -> None:
    assert process_gains([[(0, 0.1 + 0.2), (1, 0.3)], [(1, 0.3)]], [2, 2], 2) == [[(0, 0.0), (1, 0.0)], [(1, 0.0)]]
    judged = [
        Rollout(r.prompt, r.completion, r.reward, 0, steps=((0, value), (1, 0.3)))
        for r, value in zip(rollouts(0.3, 0.3), (0.1 + 0.2, 0.3), strict=True)
    ]
    assert SampledGroups.of(judged, 2).degenerate[0]
