"""Advantages that are normalized over all tokens of the step: REINFORCE++ and its variant with a group baseline."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from grpo_mega.algorithm.advantages.group_relative import group_advantages, over_scored
from grpo_mega.algorithm.base import Estimates, OwnTokens, StepRewards, advantage
from grpo_mega.types import TokenValues


@advantage
def batch(step: StepRewards) -> Estimates:
    """Return the whitened returns of the tokens, one number per loss token.

    Raises:
        ValueError: a reward or a penalty is not finite.

    Source: see `token_returns` and `whitened`.
    """
    if step.own is None:
        return Estimates(np.zeros(len(step.rewards)))
    own = step.own
    returns = own.repeat(step.reward_array)
    if own.penalties is not None:
        returns = token_returns(step.reward_array[own.ids], own.penalties)
    return Estimates(whitened_over_scored(step, own, returns))


@advantage
def group_batch(step: StepRewards) -> Estimates:
    """Return r - mean over the group, whitened over the tokens of the step, one number per loss token.

    Raises:
        ValueError: a group has one rollout, or a reward is not finite.

    Source: see `group_advantages`, scale "none", and `whitened`.
    """
    values = over_scored(step, partial(group_advantages, scale="none")).flatten().double().numpy()
    if step.own is None:
        return Estimates(np.zeros(len(step.rewards)))
    return Estimates(whitened_over_scored(step, step.own, step.own.repeat(values)))


def whitened_over_scored(step: StepRewards, own: OwnTokens, values: NDArray[np.float64]) -> TokenValues:
    """Return `whitened` over the tokens of the rollouts that have a reward; 0 for the tokens of the others.

    Args:
        step: says which rollouts have a reward.
        own: the tokens of this rank.
        values: [T], one per own loss token.

    Raises:
        ValueError: a value of a rollout with a reward is not finite.

    Source: this project. The step is whitened as if it had only the rollouts with a reward.
    """
    scored = own.repeat(step.scored)
    found = np.zeros(len(values))
    found[scored] = whitened(values[scored], own)
    return own.positions.with_values(found)


def whitened(values: NDArray[np.float64], own: OwnTokens, eps: float = 1e-8) -> NDArray[np.float64]:
    """Return (v - mean) / (std + eps) over all tokens of all rollouts of the step. The std divides by n. Collective.

    Args:
        values: [T], one per token of this rank.
        own: gathers sums over the ranks.
        eps: keeps the quotient finite; it must be small compared with differences of values.

    Returns:
        One per token of this rank; all zero if all values of the step are equal.

    Raises:
        ValueError: a value of any rank is not finite.

    Source: REINFORCE++, arXiv:2501.03262, the section on global advantage normalization. The paper does not say which
        std; over thousands of tokens it does not matter.
    """
    finite = bool(np.isfinite(values).all())
    ends = (values.max(), values.min()) if finite and len(values) else (-np.inf, np.inf)
    parts = own.gather(np.array([not finite, len(values), values.sum() if finite else 0.0, *ends]))
    if parts[:, 0].any():
        raise ValueError("an advantage is not finite before the normalization over the tokens of the step")
    count, total = parts[:, 1].sum(), parts[:, 2].sum()
    if count == 0 or parts[:, 3].max() == parts[:, 4].min():
        return np.zeros(len(values))
    deviations = values - total / count
    std = np.sqrt(own.gather(np.array([(deviations * deviations).sum()])).sum() / count)
    return np.asarray(deviations / (std + eps))


def token_returns(rewards: NDArray[np.float64], penalties: TokenValues) -> NDArray[np.float64]:
    """Return A_t = r - sum over i >= t of penalty_i: a penalty at each token, the reward at the end, no discount.

    Args:
        rewards: of each rollout of `penalties`, [N].
        penalties: one per loss token, in units of the reward: kl_coef times its KL divergence in nats.

    Returns:
        One number per loss token, float64.

    Source: REINFORCE++, arXiv:2501.03262, the advantage before its normalization.
    """
    amounts, bounds = penalties.values.astype(np.float64), penalties.offsets.tolist()
    found = np.empty(len(amounts))
    for i, reward in enumerate(rewards.tolist()):
        part = slice(bounds[i], bounds[i + 1])
        found[part] = np.subtract.accumulate(np.concatenate([[reward], amounts[part][::-1]]))[:0:-1]
    return found
