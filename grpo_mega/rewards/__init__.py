"""Rewards: functions that score completions.

`base` holds the contract of a reward, and `builtin/` one file per reward. `pool` scores completions in processes.
"""

from __future__ import annotations

from grpo_mega.rewards.base import BUILTIN_REWARDS, RewardComponent, batched_reward, build_rewards, reward

__all__ = ["BUILTIN_REWARDS", "RewardComponent", "batched_reward", "build_rewards", "reward"]
