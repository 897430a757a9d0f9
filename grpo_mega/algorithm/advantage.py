"""Rewards of a group -> advantages. Pure: no process groups, no config."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """Group-relative advantages A = (r - mean_G(r)) / (std_G(r) + eps), std with G - 1 in the denominator.

    Args:
        rewards: [P, G] float32, any range.
        eps: keeps the quotient finite; small against any reward difference that matters.

    Returns:
        [P, G] float32. A group whose rewards are all equal gives exactly 0 everywhere, whatever their mean rounds to.

    Raises:
        ValueError: not [P, G] with G >= 2, or a reward is not finite (names prompt and rollout).

    Source: DeepSeekMath, arXiv:2402.03300, section 4.1.2. The paper does not say which std; n - 1 is what its authors'
        and the common reference codes compute.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards have shape {list(rewards.shape)}; a group needs [P, G] with G >= 2 rollouts per prompt"
        )
    not_finite = (~torch.isfinite(rewards)).nonzero()
    if len(not_finite):
        prompt, rollout = not_finite[0].tolist()
        value = rewards[prompt, rollout].item()
        raise ValueError(f"the reward of prompt {prompt}, rollout {rollout} is {value}; rewards must be finite")
    # float64: the mean of nearly equal rewards must not cancel away what tells them apart
    exact = rewards.double()
    advantages = (exact - exact.mean(dim=1, keepdim=True)) / (exact.std(dim=1, keepdim=True, correction=1) + eps)
    all_equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return torch.where(all_equal, 0.0, advantages).float()
