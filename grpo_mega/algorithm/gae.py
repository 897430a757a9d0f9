"""Advantages over what a critic expects: generalised advantage estimation, one rollout at a time. Pure.

Asserted by tests/unit/algorithm/test_gae.py by hand and against the paper's sum.
"""

from __future__ import annotations

from collections.abc import Sequence


def token_rewards(reward: float, penalties: Sequence[float], steps: Sequence[tuple[int, float]] = ()) -> list[float]:
    """r_t = -penalty_t + the values of the steps that end at t, and `reward` at the last token. Empty for a rollout
    without tokens.

    Args:
        reward: what the rollout as a whole earns: all of it for an outcome reward, the rest for a process reward.
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
            raise ValueError(f"a step ends at loss token {end} of {len(rewards)}")
        rewards[end] += value
    if rewards:
        rewards[-1] += reward
    return rewards


def generalized_advantages(
    rewards: Sequence[float], values: Sequence[float], *, gamma: float, gae_lambda: float
) -> list[float]:
    """A_t = delta_t + gamma * lambda * A_{t+1}, delta_t = r_t + gamma * V_{t+1} - V_t; V and A are 0 after the end.

    Args:
        rewards: one per completion token.
        values: V_t, what the critic expects before token t is sampled.
        gamma: discount per token, (0, 1].
        gae_lambda: 0: one step of bootstrapping; 1: the return minus the value.

    Returns:
        One per token. A rollout ends with its last token, also a truncated one: its reward is final, nothing is
        bootstrapped behind it.

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
