"""Rollouts of several turns: what answers the policy, and the processes in which it runs."""

from grpo_mega.environments.base import Turn, environment

__all__ = ["Turn", "environment"]
