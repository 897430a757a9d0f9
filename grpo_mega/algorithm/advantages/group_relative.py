"""Advantages relative to the other rollouts of the group: GRPO, Dr. GRPO and RLOO."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from grpo_mega.algorithm.base import Estimates, StepRewards, advantage

GroupScale = Literal["std", "none"]


def group_advantages(rewards: Tensor, *, scale: GroupScale = "std", eps: float = 1e-6) -> Tensor:
    """Return A = r - mean_G(r), with scale "std" divided by std_G(r) + eps. The std divides by G - 1.

    Args:
        rewards: [P, G] float32, any range.
        scale: "std", or "none".
        eps: keeps the quotient finite; it must be small compared with differences of rewards.

    Returns:
        [P, G] float32. A group whose rewards are all equal has advantage exactly 0, independent of rounding.

    Raises:
        ValueError: the shape is not [P, G] with G >= 2, or a reward is not finite (names prompt and rollout).

    Source: DeepSeekMath, arXiv:2402.03300, section "Outcome Supervision RL with GRPO". The paper does not say which
        std; n - 1 is what its authors' code and the common reference implementations compute. "none": Dr. GRPO,
        arXiv:2503.20783.
    """
    exact = _finite_float64(rewards)
    advantages = exact - exact.mean(dim=1, keepdim=True)
    if scale == "std":
        advantages = advantages / (exact.std(dim=1, keepdim=True, correction=1) + eps)
    return _zero_where_equal(rewards, advantages)


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    """Return A_i = r_i - mean of the other G - 1 rewards of the group.

    Args:
        rewards: [P, G] float32, any range.

    Returns:
        [P, G] float32; exactly 0 in a group whose rewards are all equal.

    Raises:
        ValueError: see `group_advantages`.

    Source: RLOO, arXiv:2402.14740, section "REINFORCE Leave-One-Out (RLOO)".
    """
    exact = _finite_float64(rewards)
    size = exact.shape[1]
    return _zero_where_equal(rewards, (exact - exact.mean(dim=1, keepdim=True)) * (size / (size - 1)))


@advantage
def group_std(step: StepRewards) -> Estimates:
    """Return (r - mean) / (std + 1e-6) over the group, one number per rollout.

    Raises:
        ValueError: a group has one rollout, or a reward is not finite.

    Source: see `group_advantages`.
    """
    return Estimates(over_scored(step, partial(group_advantages, scale="std")).flatten().numpy())


@advantage
def group_mean(step: StepRewards) -> Estimates:
    """Return r - mean over the group, one number per rollout.

    Raises:
        ValueError: a group has one rollout, or a reward is not finite.

    Source: see `group_advantages`, scale "none".
    """
    return Estimates(over_scored(step, partial(group_advantages, scale="none")).flatten().numpy())


@advantage
def leave_one_out(step: StepRewards) -> Estimates:
    """Return r - mean of the other rollouts of the group, one number per rollout.

    Raises:
        ValueError: a group has one rollout, or a reward is not finite.

    Source: see `leave_one_out_advantages`.
    """
    return Estimates(over_scored(step, leave_one_out_advantages).flatten().numpy())


def over_scored(step: StepRewards, advantages_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the advantages of each group's rollouts that have a reward, as if the group had no others.

    Args:
        step: rewards of the step.
        advantages_of: maps rewards [P, G] to advantages [P, G], group by group.

    Returns:
        [P, G] float32; 0 for rollouts without a reward, and in groups with fewer than two rewards.

    Source: this project. A group in which n rollouts have a reward is a group of size n.
    """
    rewards, scored = step.reward_matrix, step.scored_matrix
    found = torch.zeros_like(rewards)
    is_whole = scored.all(dim=1)
    if bool(is_whole.any()):
        found[is_whole] = advantages_of(rewards[is_whole])
    for group in (~is_whole & (scored.sum(dim=1) >= 2)).nonzero().flatten().tolist():
        found[group, scored[group]] = advantages_of(rewards[group, scored[group]].unsqueeze(0))[0]
    return found


def _finite_float64(rewards: Tensor) -> Tensor:
    """Return the rewards in float64, because the mean of nearly equal rewards loses their differences in float32."""
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards have shape {list(rewards.shape)}; the shape must be [P, G] with G >= 2 rollouts per prompt"
        )
    not_finite = (~torch.isfinite(rewards)).nonzero()
    if len(not_finite):
        prompt, rollout = not_finite[0].tolist()
        value = rewards[prompt, rollout].item()
        raise ValueError(f"the reward of prompt {prompt}, rollout {rollout} is {value}; rewards must be finite")
    return rewards.double()


def _zero_where_equal(rewards: Tensor, advantages: Tensor) -> Tensor:
    all_equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return torch.where(all_equal, 0.0, advantages).float()
