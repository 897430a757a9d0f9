"""Generalized advantage estimation: hand-computed numbers, lambda 0 and 1, and the sum of the paper."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from grpo_mega.algorithm.advantages import gae
from grpo_mega.algorithm.base import StepRewards, StepValues
from tests.helpers.token_values import own_tokens, token_values


def generalized_advantages(
    rewards: list[float], values: list[float], *, gamma: float, gae_lambda: float
) -> list[float]:
    """Return the advantages of one rollout, computed between two others."""
    every = [token_values([[5.0] * 3, row, [7.0] * 30]) for row in (rewards, values)]
    found = gae.generalized_advantages(*every, gamma=gamma, gae_lambda=gae_lambda)
    return found[3 : 3 + len(rewards)].tolist()


def token_rewards(reward: float, penalties: list[float], steps: list[tuple[int, float]] | None = None) -> list[float]:
    """Return the rewards of one rollout whose `reward` is the part that is not in its steps."""
    ends, values = np.array([end for end, _ in steps or []]), np.array([value for _, value in steps or []])
    judged = StepValues(np.array([steps is not None]), np.array([0, len(ends)]), ends, values, np.zeros(1))
    own = replace(own_tokens([range(len(penalties))]), penalties=token_values([penalties]))
    step = StepRewards([reward], 1, completion_tokens=np.array([len(penalties)]), steps=judged)
    return gae.token_rewards(step, own).tolist()


def test_three_tokens_by_hand() -> None:
    # deltas with gamma 1/2: 0 + 4/2 - 1 = 1, 2 + 8/2 - 4 = 2, 10 - 8 = 2; gamma * lambda = 1/4
    found = generalized_advantages([0.0, 2.0, 10.0], [1.0, 4.0, 8.0], gamma=0.5, gae_lambda=0.5)
    assert found == [1 + 0.25 * (2 + 0.25 * 2), 2 + 0.25 * 2, 2.0]


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (1.0, 0.0)])
def test_it_is_the_sum_of_the_paper(gamma: float, gae_lambda: float) -> None:
    rng = random.Random(0)
    for length in (1, 2, 17):
        rewards, values = ([rng.gauss(0, 1) for _ in range(length)] for _ in range(2))
        deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < length else 0.0) - values[t] for t in range(length)]
        wanted = [
            sum((gamma * gae_lambda) ** (later - t) * deltas[later] for later in range(t, length))
            for t in range(length)
        ]
        found = generalized_advantages(rewards, values, gamma=gamma, gae_lambda=gae_lambda)
        assert found == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def test_with_lambda_1_it_is_the_return_minus_the_value_and_with_0_one_step() -> None:
    rewards, values = [0.5, -0.25, 1.0], [0.1, 0.2, 0.3]
    assert generalized_advantages(rewards, values, gamma=1.0, gae_lambda=1.0) == pytest.approx([1.15, 0.55, 0.7])
    assert generalized_advantages(rewards, values, gamma=1.0, gae_lambda=0.0) == pytest.approx([0.6, -0.15, 0.7])


def test_a_rollout_without_tokens_has_no_advantages_and_lengths_must_agree() -> None:
    assert generalized_advantages([], [], gamma=1.0, gae_lambda=0.95) == []
    with pytest.raises(AssertionError, match="one value per reward"):
        generalized_advantages([1.0], [1.0, 2.0], gamma=1.0, gae_lambda=0.95)


def test_the_reward_belongs_to_the_last_token_and_each_token_pays_its_penalty() -> None:
    assert token_rewards(1.0, [0.25, -0.5]) == [-0.25, 1.5]
    assert token_rewards(1.0, [0.0]) == [1.0]
    assert token_rewards(1.0, []) == []


def test_a_step_is_earned_at_its_token_and_the_rest_at_the_end() -> None:
    assert token_rewards(0.0, [0.5, 0.0, 0.0], [(2, 1.0), (0, 2.0), (2, 4.0)]) == [1.5, 0.0, 5.0]
    assert token_rewards(-0.5, [0.0, 0.0], [(0, 1.0)]) == [1.0, -0.5]
    for end in (-1, 2):
        with pytest.raises(ValueError, match=f"a step ends at token {end} of rollout 0, which has 2 loss tokens"):
            token_rewards(0.0, [0.0, 0.0], [(end, 1.0)])
