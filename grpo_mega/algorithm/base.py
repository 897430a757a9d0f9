"""Contracts of a surrogate and of an advantage estimator, and the decorators that declare them.

Both are functions. Their keyword-only parameters are keys of the config section `algorithm` and are filled in from
there: a parameter without a default is a key that must be set. A key that no chosen function reads must be null.
Asserted by tests/unit/algorithm/test_extensions.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from grpo_mega.algorithm.degenerate import rewards_are_equal
from grpo_mega.algorithm.rollout_sums import Segments
from grpo_mega.types import Rollout

Advantage = float | list[float]
"""Advantage of one rollout: one number for all of its loss tokens, or one number per loss token."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Surrogate(Protocol):
    """Objective per token, which the loss maximizes. Its keyword-only parameters are bound before it is called.

    Positions without loss are 0 in all arguments. Decisions are made on `log_ratio`, and a token without a gradient
    must not enter exp: if exp overflows, 0 times infinity is nan. The surrogate must be linear in `advantages`.
    """

    def __call__(
        self, log_probs: Tensor, log_ratio: Tensor, advantages: Tensor, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        """Return the surrogate and the tokens that a bound holds.

        Args:
            log_probs: [T] float32, nats, with gradient.
            log_ratio: [T] float32, nats, with gradient: log_probs - old_log_probs.
            advantages: [T] float32, times the factor of the mismatch correction.
            segments: the rollouts of the row, for means over a rollout.

        Returns:
            Surrogate [T] float32 with gradient, and [T] bool: True where a bound of the surrogate holds.
        """
        ...


@dataclass(frozen=True)
class StepRewards:
    """Rewards of a step, from which an advantage estimator computes. Groups follow each other.

    Attributes:
        rollouts: all rollouts of the step.
        rewards: one per rollout, after the overlong penalty. A rollout without a reward has the mean of its group
            here (0 in a group without rewards), so that it does not change the mean of the group.
        group_size: rollouts per group.
        penalties: with `algorithm.kl_in=reward`, kl_coef times the KL divergence of each loss token of each rollout;
            None: no penalties.
        values: with a critic, the value of each loss token of each rollout; None: not known, or no critic.
        is_scored: False for rollouts without a reward (`reward.on_failure=drop`); None: all have one. Whatever
            advantage an estimator returns for such a rollout, it is 0 in training, and so is its weight in the loss.
    """

    rollouts: Sequence[Rollout]
    rewards: Sequence[float]
    group_size: int
    penalties: Sequence[Sequence[float]] | None = None
    values: Sequence[Sequence[float]] | None = None
    is_scored: Sequence[bool] | None = None

    @property
    def scored(self) -> list[bool]:
        """`is_scored`, with True instead of None."""
        return [True] * len(self.rewards) if self.is_scored is None else list(self.is_scored)

    @property
    def scored_matrix(self) -> Tensor:
        """[P, G] bool: False for rollouts without a reward."""
        return torch.tensor(self.scored, dtype=torch.bool).view(-1, self.group_size)

    @property
    def num_loss_tokens(self) -> list[int]:
        """Loss tokens of each rollout."""
        return [rollout.completion.num_loss_tokens for rollout in self.rollouts]

    @property
    def token_penalties(self) -> Sequence[Sequence[float]]:
        """`penalties`, with zeros instead of None."""
        return self.penalties if self.penalties is not None else [[0.0] * n for n in self.num_loss_tokens]

    @property
    def reward_matrix(self) -> Tensor:
        """[P, G] float32: reward of each rollout minus the sum of its penalties.

        The rewards of a group that differ only by rounding (`rewards_are_equal`) are replaced by the first of them.
        """
        rewards = list(self.rewards)
        if self.penalties is not None:
            rewards = [r - sum(row) for r, row in zip(rewards, self.penalties, strict=True)]
        for first in range(0, len(rewards), self.group_size):
            group = slice(first, first + self.group_size)
            if rewards_are_equal(rewards[group]):
                rewards[group] = [rewards[first]] * self.group_size
        return torch.tensor(rewards, dtype=torch.float32).view(-1, self.group_size)


@dataclass(frozen=True)
class Estimates:
    """Result of an advantage estimator: one entry per rollout of the step.

    Attributes:
        advantages: one number per rollout, or one per loss token of each rollout.
        returns: targets of the critic, one per loss token; empty without a critic.
    """

    advantages: Sequence[Advantage]
    returns: list[list[float]] = field(default_factory=list)


class AdvantageEstimator(Protocol):
    """Function from the rewards of a step to advantages. Its keyword-only parameters are bound before it is called."""

    def __call__(self, step: StepRewards) -> Estimates:
        """Return the advantages of all rollouts of the step. Every rank computes the same result."""
        ...


def surrogate(function: _Function) -> _Function:
    """Declare a function as a surrogate (see `Surrogate`), so that `algorithm.surrogate` can name it."""
    function.__algorithm_declaration__ = "surrogate"  # type: ignore[attr-defined]
    return function


def advantage(function: _Function) -> _Function:
    """Declare a function as an advantage estimator (see `AdvantageEstimator`), for `algorithm.advantage`."""
    function.__algorithm_declaration__ = "advantage"  # type: ignore[attr-defined]
    return function
