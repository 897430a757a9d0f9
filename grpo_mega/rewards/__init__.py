"""Rewards: what a completion earns. `base` holds the contract, a file each reward, `pool` scores in processes."""

from __future__ import annotations

from grpo_mega.rewards.base import BUILTIN_REWARDS, RewardComponent, batched_reward, build_rewards, reward

__all__ = ["BUILTIN_REWARDS", "RewardComponent", "batched_reward", "build_rewards", "reward"]
