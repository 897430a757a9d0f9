"""Advantages over the values of a critic: generalized advantage estimation (PPO).

Asserted by tests/unit/algorithm/test_gae.py by hand and against the sum in the paper.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from grpo_mega.algorithm.advantages.whitened import whitened_over_scored
from grpo_mega.algorithm.base import Estimates, StepRewards, advantage
from grpo_mega.types import Rollout


@advantage
def gae(step: StepRewards, *, gamma: float, gae_lambda: float) -> Estimates:
    """Return the advantages over the critic's values, whitened over the tokens of the step, and the returns.

    Both have one number per loss token. Without `step.values` the advantages are 0 and there are no returns: the values
    are not known yet. The return is advantage plus value, before the whitening.

    An outcome reward is earned at the last loss token. If a process reward judged the rollout, each step's value is
    earned in full at the token that ends the step, in place of the outcome: `Reward.value` holds the mean of the steps,
    which is not added again. Components without steps are a step that ends with the completion. The overlong penalty
    stays at the last token. A step that ends in a tool's result belongs to the last token that the policy sampled
    before it. A rollout without a reward is not counted by the whitening, and its advantages are 0.

    Args:
        step: rewards, penalties and values, in units of the reward.
        gamma: discount per token, (0, 1].
        gae_lambda: weight of later temporal differences, [0, 1].

    Raises:
        ValueError: a step does not end within its rollout, or an advantage is not finite.

    Source: PPO, arXiv:1707.06347, equations 11 and 12.
    """
    if step.values is None:
        return Estimates([0.0] * len(step.rollouts))
    advantages = [
        generalized_advantages(
            _rollout_token_rewards(rollout, reward, penalties), values, gamma=gamma, gae_lambda=gae_lambda
        )
        for rollout, reward, penalties, values in zip(
            step.rollouts, step.rewards, step.token_penalties, step.values, strict=True
        )
    ]
    returns = [[a + v for a, v in zip(*pair, strict=True)] for pair in zip(advantages, step.values, strict=True)]
    return Estimates(whitened_over_scored(step, advantages), returns)


def token_rewards(reward: float, penalties: Sequence[float], steps: Sequence[tuple[int, float]] = ()) -> list[float]:
    """Return r_t = -penalty_t + the values of the steps that end at t; the last token also earns `reward`.

    A rollout without tokens has no rewards.

    Args:
        reward: the part of the reward that belongs to the whole rollout: all of an outcome reward; of a process reward
            the part that is not in its steps.
        penalties: one per loss token (kl_coef times its KL).
        steps: (position among the loss tokens, value), in any order; several may end at one token.

    Raises:
        ValueError: a step does not end within the rollout.

    Source: Ouyang et al., "Training language models to follow instructions", arXiv:2203.02155, equation 2, as the
        reward of each token; steps: Math-Shepherd, arXiv:2312.08935, whose PPO rewards a step where it ends.
    """
    rewards = [-penalty for penalty in penalties]
    for end, value in steps:
        if not 0 <= end < len(rewards):
            raise ValueError(f"a step ends at loss token {end}; the rollout has {len(rewards)} loss tokens")
        rewards[end] += value
    if rewards:
        rewards[-1] += reward
    return rewards


def generalized_advantages(
    rewards: Sequence[float], values: Sequence[float], *, gamma: float, gae_lambda: float
) -> list[float]:
    """Return A_t = delta_t + gamma * lambda * A_{t+1}, delta_t = r_t + gamma * V_{t+1} - V_t; V = A = 0 after the end.

    Args:
        rewards: one per loss token.
        values: V_t, the critic's value before token t is sampled.
        gamma: discount per token, (0, 1].
        gae_lambda: 0 gives the one-step temporal difference, 1 gives return minus value.

    Returns:
        One per token. Every rollout ends with its last token, also a truncated one: its reward is final, and no
        value is bootstrapped after it.

    Source: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
        arXiv:1506.02438, equation 16; PPO, arXiv:1707.06347, equations 11 and 12.
    """
    advantages: list[float] = []
    later_advantage = later_value = 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        later_advantage = reward + gamma * later_value - value + gamma * gae_lambda * later_advantage
        later_value = value
        advantages.append(later_advantage)
    return advantages[::-1]


def _rollout_token_rewards(rollout: Rollout, reward: float, penalties: Sequence[float]) -> list[float]:
    """Return the reward of each loss token; `reward` is the rollout's, after the overlong penalty."""
    if rollout.steps is None or rollout.reward.value is None:
        return token_rewards(reward, penalties)
    mask = rollout.completion.loss_mask
    sampled = [i for i in range(len(rollout.completion.token_ids)) if mask is None or mask[i]]
    steps = [(bisect_right(sampled, end) - 1, value) for end, value in rollout.steps]
    return token_rewards(reward - rollout.reward.value, penalties, steps)
