"""Advantages over the values of a critic: generalized advantage estimation (PPO).

Asserted by tests/unit/algorithm/test_gae.py by hand and against the sum in the paper.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from grpo_mega.algorithm.advantages.whitened import whitened_over_scored
from grpo_mega.algorithm.base import Estimates, OwnTokens, StepRewards, advantage
from grpo_mega.types import TokenValues


@advantage
def gae(step: StepRewards, *, gamma: float, gae_lambda: float) -> Estimates:
    """Return the advantages over the critic's values, whitened over the tokens of the step, and the returns.

    Both have one number per loss token of this rank. Without values the advantages are 0 and there are no returns: the
    values are not known yet. The return is advantage plus value, before the whitening.

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
    if step.own is None or step.own.values is None:
        return Estimates(np.zeros(len(step.rewards)))
    own, values = step.own, step.own.values
    rewards = own.positions.with_values(token_rewards(step, own))
    advantages = generalized_advantages(rewards, values, gamma=gamma, gae_lambda=gae_lambda)
    returns = values.with_values(advantages + values.values.astype(np.float64))
    return Estimates(whitened_over_scored(step, own, advantages), returns)


def token_rewards(step: StepRewards, own: OwnTokens) -> NDArray[np.float64]:
    """Return r_t = -penalty_t + the values of the steps that end at t; the last token also earns the outcome.

    The outcome is the rollout's reward after the overlong penalty; where a process reward scored steps, it is what is
    left of it without them. A rollout without loss tokens has no rewards.

    Args:
        step: rewards and steps of all rollouts.
        own: loss tokens of this rank and their penalties.

    Returns:
        [T] float64, one number per loss token of this rank, in units of the reward.

    Raises:
        ValueError: a step ends before the first loss token of its rollout, or outside of it.

    Source: Ouyang et al., "Training language models to follow instructions", arXiv:2203.02155, equation 2, as the
        reward of each token; steps: Math-Shepherd, arXiv:2312.08935, whose PPO rewards a step where it ends.
    """
    positions = own.positions
    rewards = np.zeros(len(positions.values))
    if own.penalties is not None:
        rewards = -own.penalties.values.astype(np.float64)
    outcomes, judged = step.reward_array[own.ids], step.steps
    if judged is not None:
        has_steps = judged.has_steps[own.ids] & step.scored[own.ids]
        outcomes = np.where(has_steps, outcomes - judged.rewards[own.ids], outcomes)
        for place in np.flatnonzero(has_steps).tolist():
            begin, end = positions.offsets[place], positions.offsets[place + 1]
            sampled, row = positions.values[begin:end], int(own.ids[place])
            for step_end, value in judged.of(row):
                last = int(np.searchsorted(sampled, step_end, side="right")) - 1
                if last < 0 or (step.completion_tokens is not None and step_end >= step.completion_tokens[row]):
                    raise ValueError(
                        f"a step ends at token {step_end} of rollout {row}, which has {end - begin} loss tokens"
                    )
                rewards[begin + last] += value
    whole = positions.counts > 0
    rewards[positions.offsets[1:][whole] - 1] += outcomes[whole]
    return rewards


def generalized_advantages(
    rewards: TokenValues, values: TokenValues, *, gamma: float, gae_lambda: float
) -> NDArray[np.float64]:
    """Return A_t = delta_t + gamma * lambda * A_{t+1}, delta_t = r_t + gamma * V_{t+1} - V_t; V = A = 0 after the end.

    The recursion runs over the tokens from the last to the first, for all rollouts together.

    Args:
        rewards: one per loss token.
        values: V_t, the critic's value before token t is sampled.
        gamma: discount per token, (0, 1].
        gae_lambda: 0 gives the one-step temporal difference, 1 gives return minus value.

    Returns:
        [T] float64, one per token. Every rollout ends with its last token, also a truncated one: its reward is final,
        and no value is bootstrapped after it.

    Source: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
        arXiv:1506.02438, equation 16; PPO, arXiv:1707.06347, equations 11 and 12.
    """
    assert len(rewards.values) == len(values.values), "one value per reward"
    earned, value_of = rewards.values.astype(np.float64), values.values.astype(np.float64)
    advantages = np.empty(len(earned))
    longest_first = np.argsort(-rewards.counts, kind="stable")
    counts, ends = rewards.counts[longest_first], rewards.offsets[1:][longest_first]
    later_advantage, later_value = np.zeros(len(counts)), np.zeros(len(counts))
    for back in range(1, int(counts.max(initial=0)) + 1):  # tokens of all rollouts at this distance from their ends
        active = int(np.searchsorted(-counts, -back, side="right"))
        at = ends[:active] - back
        later_advantage = (
            earned[at] + gamma * later_value[:active] - value_of[at] + gamma * gae_lambda * later_advantage[:active]
        )
        later_value = value_of[at]
        advantages[at] = later_advantage
    return advantages
