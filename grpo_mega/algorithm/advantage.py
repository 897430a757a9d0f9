"""Rewards of a step -> advantages. Pure: no process groups, no config."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

GroupScale = Literal["std", "none"]


def group_advantages(rewards: Tensor, *, scale: GroupScale = "std", eps: float = 1e-6) -> Tensor:
    """Group-relative advantages A = r - mean_G(r), with scale "std" divided by std_G(r) + eps (G - 1 in the std).

    Args:
        rewards: [P, G] float32, any range.
        scale: "std", or "none".
        eps: keeps the quotient finite; small against any reward difference that matters.

    Returns:
        [P, G] float32. A group whose rewards are all equal gives exactly 0 everywhere, whatever their mean rounds to.

    Raises:
        ValueError: not [P, G] with G >= 2, or a reward is not finite (names prompt and rollout).

    Source: DeepSeekMath, arXiv:2402.03300, section "Outcome Supervision RL with GRPO". The paper does not say which
        std; n - 1 is what its authors' and the common reference codes compute. "none": Dr. GRPO, arXiv:2503.20783.
    """
    exact = _checked(rewards)
    advantages = exact - exact.mean(dim=1, keepdim=True)
    if scale == "std":
        advantages = advantages / (exact.std(dim=1, keepdim=True, correction=1) + eps)
    return _zero_where_equal(rewards, advantages)


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    """A_i = r_i - mean of the other G - 1 rewards of its group.

    Args:
        rewards: [P, G] float32, any range.

    Returns:
        [P, G] float32; exactly 0 in a group whose rewards are all equal.

    Raises:
        ValueError: as `group_advantages`.

    Source: RLOO, arXiv:2402.14740, section "REINFORCE Leave-One-Out (RLOO)".
    """
    exact = _checked(rewards)
    size = exact.shape[1]
    return _zero_where_equal(rewards, (exact - exact.mean(dim=1, keepdim=True)) * (size / (size - 1)))


def process_advantages(
    steps: Sequence[Sequence[tuple[int, float]]], lengths: Sequence[int], group_size: int, eps: float = 1e-6
) -> list[list[float]]:
    """A_t = sum over the steps j of the rollout with index(j) >= t of (r_j - mean(R)) / (std(R) + eps).

    R are the values of all steps of all rollouts of the group; std with n - 1, as in `group_advantages`.

    Args:
        steps: (end_token, value) of each rollout's steps, in any order, the groups one after the other.
        lengths: completion tokens of each rollout.
        group_size: rollouts of a group.

    Returns:
        One list per rollout, one number per completion token; all zero in a group whose values are all equal.

    Raises:
        ValueError: a step does not end within its rollout, or a value is not finite.

    Source: DeepSeekMath, arXiv:2402.03300, section "Process Supervision RL with GRPO".
    """
    found: list[list[float]] = []
    for begin in range(0, len(steps), group_size):
        group = steps[begin : begin + group_size]
        values = torch.tensor([value for row in group for _, value in row], dtype=torch.float64)
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"the value of a step of rollouts {begin} to {begin + group_size - 1} is not finite")
        mean, std = float(values.mean()) if len(values) else 0.0, 0.0
        if len(values) > 1 and not bool((values == values[0]).all()):
            std = float(values.std(correction=1))
        for row, length in zip(group, lengths[begin : begin + group_size], strict=True):
            gains = [0.0] * length
            for end, value in row:
                if not 0 <= end < length:
                    raise ValueError(f"a step ends at token {end} of a completion of {length} tokens")
                gains[end] += (value - mean) / (std + eps) if std else 0.0
            found.append(list(accumulate(reversed(gains)))[::-1])
    return found


def whitened(values: Sequence[Sequence[float]], eps: float = 1e-8) -> list[list[float]]:
    """(v - mean) / (std + eps) of token values over all tokens of all rollouts of the step, std with n.

    Args:
        values: one list per rollout, one value per completion token.

    Returns:
        The same shape; all zero where every value is the same.

    Raises:
        ValueError: a value is not finite.

    Source: REINFORCE++, arXiv:2501.03262, the section on global advantage normalisation. The paper does not say which
        std; over thousands of tokens it does not matter.
    """
    flat = torch.tensor([v for row in values for v in row], dtype=torch.float64)
    if not bool(torch.isfinite(flat).all()):
        raise ValueError("an advantage is not finite before it is normalised over the batch")
    if len(flat) == 0 or bool((flat == flat[0]).all()):
        return [[0.0] * len(row) for row in values]
    scaled = iter(((flat - flat.mean()) / (flat.std(correction=0) + eps)).tolist())
    return [[next(scaled) for _ in row] for row in values]


def token_returns(reward: float, penalties: Sequence[float]) -> list[float]:
    """A_t = r - sum over i >= t of penalty_i: the reward at the end, a penalty at each token, no discount.

    Source: REINFORCE++, arXiv:2501.03262, the advantage before its normalisation.
    """
    returns, rest = [], reward
    for penalty in reversed(penalties):
        rest -= penalty
        returns.append(rest)
    return returns[::-1]


def _checked(rewards: Tensor) -> Tensor:
    """In float64: the mean of nearly equal rewards must not cancel away what tells them apart."""
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards have shape {list(rewards.shape)}; a group needs [P, G] with G >= 2 rollouts per prompt"
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
