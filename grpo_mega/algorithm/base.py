"""Contracts of a surrogate and of an advantage estimator, and the decorators that declare them.

Both are functions. Their keyword-only parameters are keys of the config section `algorithm` and are filled in from
there: a parameter without a default is a key that must be set. A key that no chosen function reads must be null.
Asserted by tests/unit/algorithm/test_extensions.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grpo_mega.algorithm.degenerate import equal_groups
from grpo_mega.algorithm.rollout_sums import Segments
from grpo_mega.types import TokenValues

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
class StepValues:
    """Steps that a process reward scored, as columns over the R rollouts of a step.

    Attributes:
        has_steps: [R] bool; False: the rollout has no steps but an outcome.
        offsets: [R + 1]; the steps of rollout i are `offsets[i]` to `offsets[i + 1]`.
        ends: [S] position in the completion of the token that ends the step.
        values: [S] value of the step, in units of the reward.
        rewards: [R] reward of the rollout, which contains the mean of its steps, before any penalty.
    """

    has_steps: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    ends: NDArray[np.int64]
    values: NDArray[np.float64]
    rewards: NDArray[np.float64]

    def of(self, rollout: int) -> list[tuple[int, float]]:
        """Return (end, value) of each step of a rollout."""
        part = slice(self.offsets[rollout], self.offsets[rollout + 1])
        return list(zip(self.ends[part].tolist(), self.values[part].tolist(), strict=True))


@dataclass(frozen=True)
class OwnTokens:
    """Loss tokens of the rollouts that this data-parallel rank trains.

    Attributes:
        positions: of each loss token in the completion of its rollout.
        penalties: with `algorithm.kl_in=reward`, kl_coef times the KL divergence of each token; None: no penalties.
        values: with a critic, its value of each token; None: not known, or no critic.
        gather: returns [dp, ...], the arrays of one shape that the data-parallel ranks give. Collective.
    """

    positions: TokenValues
    penalties: TokenValues | None = None
    values: TokenValues | None = None
    gather: Callable[[NDArray[np.float64]], NDArray[np.float64]] = lambda array: array[None]

    @property
    def ids(self) -> NDArray[np.int64]:
        """Rows of the rollouts in the step, ascending, [N]."""
        return self.positions.ids

    def repeat(self, per_rollout: NDArray[Any]) -> NDArray[Any]:
        """Return a number per rollout of the step, [R], as one number per own loss token, [T]."""
        return np.repeat(per_rollout[self.ids], self.positions.counts)


@dataclass(frozen=True)
class StepRewards:
    """Rewards of a step, from which an advantage estimator computes. Groups follow each other.

    Everything but `own` covers all R rollouts of the step and is equal on every rank.

    Attributes:
        rewards: one per rollout, after the overlong penalty. A rollout without a reward has the mean of its group
            here (0 in a group without rewards), so that it does not change the mean of the group.
        group_size: rollouts per group.
        is_scored: False for rollouts without a reward (`reward.on_failure=drop`); None: all have one. Whatever
            advantage an estimator returns for such a rollout, it is 0 in training, and so is its weight in the loss.
        total_penalties: with `algorithm.kl_in=reward`, kl_coef times the KL divergence of the rollout, [R]; None: no
            penalties.
        completion_tokens: tokens of each completion, [R]; None where no estimator needs them.
        steps: of a process reward; None: no rollout has steps.
        own: tokens that this rank trains; None: not known yet, then estimates per token are 0.
    """

    rewards: Sequence[float] | NDArray[np.float64]
    group_size: int
    is_scored: Sequence[bool] | NDArray[np.bool_] | None = None
    total_penalties: NDArray[np.float64] | None = None
    completion_tokens: NDArray[np.integer[Any]] | None = None
    steps: StepValues | None = None
    own: OwnTokens | None = None

    @property
    def reward_array(self) -> NDArray[np.float64]:
        """`rewards` as [R] float64."""
        return np.asarray(self.rewards, dtype=np.float64)

    @property
    def scored(self) -> NDArray[np.bool_]:
        """`is_scored` as an array [R], with True instead of None."""
        return np.ones(len(self.rewards), np.bool_) if self.is_scored is None else np.asarray(self.is_scored, np.bool_)

    @property
    def scored_matrix(self) -> Tensor:
        """[P, G] bool: False for rollouts without a reward."""
        return torch.from_numpy(self.scored.copy()).view(-1, self.group_size)

    @property
    def reward_matrix(self) -> Tensor:
        """[P, G] float32: reward of each rollout minus the sum of its penalties.

        The rewards of a group that differ only by rounding (`equal_groups`) are replaced by the first of them.
        """
        rewards = self.reward_array
        if self.total_penalties is not None:
            rewards = rewards - self.total_penalties
        groups = rewards.reshape(-1, self.group_size)
        return torch.from_numpy(np.where(equal_groups(groups)[:, None], groups[:, :1], groups).astype(np.float32))


@dataclass(frozen=True)
class Estimates:
    """Result of an advantage estimator.

    Attributes:
        advantages: one number per rollout of the step, [R]; or one per loss token of `StepRewards.own`.
        returns: targets of the critic, one per loss token of `StepRewards.own`; None without a critic.
    """

    advantages: Sequence[float] | NDArray[np.float64] | TokenValues
    returns: TokenValues | None = None


class AdvantageEstimator(Protocol):
    """Function from the rewards of a step to advantages. Its keyword-only parameters are bound before it is called."""

    def __call__(self, step: StepRewards) -> Estimates:
        """Return the advantages of all rollouts of the step, or of the tokens that this rank trains."""
        ...


def surrogate(function: _Function) -> _Function:
    """Declare a function as a surrogate (see `Surrogate`), so that `algorithm.surrogate` can name it."""
    function.__algorithm_declaration__ = "surrogate"  # type: ignore[attr-defined]
    return function


def advantage(function: _Function) -> _Function:
    """Declare a function as an advantage estimator (see `AdvantageEstimator`), for `algorithm.advantage`."""
    function.__algorithm_declaration__ = "advantage"  # type: ignore[attr-defined]
    return function
