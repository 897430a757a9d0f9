"""Advantages that are normalized over all tokens of the step: REINFORCE++ and its variant with a group baseline."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import compress

import torch

from grpo_mega.algorithm.advantages.group_relative import group_advantages, over_scored
from grpo_mega.algorithm.base import Estimates, StepRewards, advantage


@advantage
def batch(step: StepRewards) -> Estimates:
    """Return the whitened returns of the tokens, one number per loss token.

    Raises:
        ValueError: a reward or a penalty is not finite.

    Source: see `token_returns` and `whitened`.
    """
    pairs = zip(step.rewards, step.token_penalties, strict=True)
    return Estimates(whitened_over_scored(step, [token_returns(reward, row) for reward, row in pairs]))


@advantage
def group_batch(step: StepRewards) -> Estimates:
    """Return r - mean over the group, whitened over the tokens of the step, one number per loss token.

    Raises:
        ValueError: a group has one rollout, or a reward is not finite.

    Source: see `group_advantages`, scale "none", and `whitened`.
    """
    values = over_scored(step, partial(group_advantages, scale="none")).flatten().tolist()
    rows = [[value] * n for value, n in zip(values, step.num_loss_tokens, strict=True)]
    return Estimates(whitened_over_scored(step, rows))


def whitened_over_scored(step: StepRewards, values: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return `whitened` over the tokens of the rollouts that have a reward; 0 for the tokens of the others.

    Args:
        step: says which rollouts have a reward.
        values: one list per rollout, one value per loss token.

    Raises:
        ValueError: a value of a rollout with a reward is not finite.

    Source: this project. The step is whitened as if it had only the rollouts with a reward.
    """
    found = iter(whitened(list(compress(values, step.scored))))
    return [next(found) if has else [0.0] * len(row) for row, has in zip(values, step.scored, strict=True)]


def whitened(values: Sequence[Sequence[float]], eps: float = 1e-8) -> list[list[float]]:
    """Return (v - mean) / (std + eps) over all tokens of all rollouts of the step. The std divides by n.

    Args:
        values: one list per rollout, one value per loss token.
        eps: keeps the quotient finite; it must be small compared with differences of values.

    Returns:
        The same shape; all zero if all values are equal.

    Raises:
        ValueError: a value is not finite.

    Source: REINFORCE++, arXiv:2501.03262, the section on global advantage normalization. The paper does not say which
        std; over thousands of tokens it does not matter.
    """
    flat = torch.tensor([v for row in values for v in row], dtype=torch.float64)
    if not bool(torch.isfinite(flat).all()):
        raise ValueError("an advantage is not finite before the normalization over the tokens of the step")
    if len(flat) == 0 or bool((flat == flat[0]).all()):
        return [[0.0] * len(row) for row in values]
    scaled = iter(((flat - flat.mean()) / (flat.std(correction=0) + eps)).tolist())
    return [[next(scaled) for _ in row] for row in values]


def token_returns(reward: float, penalties: Sequence[float]) -> list[float]:
    """Return A_t = r - sum over i >= t of penalty_i: a penalty at each token, the reward at the end, no discount.

    Args:
        reward: of the rollout.
        penalties: one per loss token, in units of the reward: kl_coef times its KL divergence in nats.

    Returns:
        One number per loss token.

    Source: REINFORCE++, arXiv:2501.03262, the advantage before its normalization.
    """
    returns, rest = [], reward
    for penalty in reversed(penalties):
        rest -= penalty
        returns.append(rest)
    return returns[::-1]
