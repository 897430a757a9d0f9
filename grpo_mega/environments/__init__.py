"""Environments, which answer the policy in rollouts of several turns, and their worker processes.

`base` holds the contract of an environment, `calculator` is the built-in one, and `pool` runs an environment in worker
processes.
"""

from grpo_mega.environments.base import Turn, environment

__all__ = ["Turn", "environment"]
