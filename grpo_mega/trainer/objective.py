"""The config section `algorithm` as functions: advantages, token weights and the loss per token.

All global quantities are computed here, from the table of the step's rollouts, which is equal on every rank. So token
weights with their denominators are equal too, and they are known before the first microbatch.
Asserted by tests/unit/trainer/test_objective.py and tests/unit/algorithm/test_algorithms.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from grpo_mega.algorithm.adaptive_kl import adapted_kl_coef
from grpo_mega.algorithm.aggregate import (
    group_token_mean_weights,
    rollout_mean_weights,
    rollout_sum_weights,
    token_mean_weights,
)
from grpo_mega.algorithm.base import OwnTokens, StepRewards, StepValues
from grpo_mega.algorithm.kl import KL_ESTIMATORS
from grpo_mega.algorithm.loss import PolicyLoss
from grpo_mega.algorithm.mismatch_correction import Correction
from grpo_mega.algorithm.value_loss import ValueLoss
from grpo_mega.config.algorithm_parts import bound_part
from grpo_mega.config.algorithm_section import AlgorithmConfig
from grpo_mega.data.rollout_values import LossTokenValues, RolloutValues
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.types import Microbatch, TokenValues, UpdateStats


@dataclass(frozen=True)
class TokenWeights:
    """Weights of the rollouts in the updates of a step; equal on every rank.

    Attributes:
        weights: [R] float64, factor of the loss of each token of the rollout, which contains all denominators of its
            update; 0 where nothing is trained.
        is_trained: [R] bool, False for filtered rollouts, rollouts without a reward and rollouts of dropped groups.
    """

    weights: NDArray[np.float64]
    is_trained: NDArray[np.bool_]


@dataclass(frozen=True)
class Credit:
    """Advantages of the rollouts that this rank trains, and the critic's targets, one number per loss token.

    `returns` is None without a critic.
    """

    advantages: LossTokenValues
    returns: TokenValues | None = None


@dataclass(frozen=True)
class Objective:
    """Objective of a run. `max_tokens` is the largest number of tokens of a completion."""

    algorithm: AlgorithmConfig
    max_tokens: int

    def at(self, kl_coef: float | None) -> Objective:
        """Return the objective with this KL coefficient; None: the coefficient of the config."""
        if kl_coef is None:
            return self
        return replace(self, algorithm=self.algorithm.model_copy(update={"kl_coef": kl_coef}))

    def next_kl_coef(self, updates: Sequence[UpdateStats]) -> float | None:
        """Return the KL coefficient of the next step, from this step's updates; None: it is constant.

        Without an update it does not change.
        """
        target = self.algorithm.kl_target
        if target is None:
            return None
        if not updates:
            return self.algorithm.kl_coef
        kl = sum(u.sums["kl"] for u in updates) / len(updates)
        return adapted_kl_coef(self.algorithm.kl_coef, kl=kl, target=target)

    @property
    def kl_in_reward(self) -> bool:
        """True if the advantages include the KL penalty of every token."""
        return self.algorithm.kl_in == "reward" and self.algorithm.needs_reference

    def token_weights(
        self, groups: SampledGroups, rewards: NDArray[np.float64], minibatches: Sequence[range] | None = None
    ) -> TokenWeights:
        """Return the token weights of a step. Every rank computes the same result.

        Dropped groups and rollouts without a reward are not counted by the denominators. Filtered rollouts are counted,
        with 0 tokens.

        Args:
            groups: the rollouts of the step; only their table is read.
            rewards: [R]. NaN: the rollout could not be scored; it has weight 0.
            minibatches: the rollouts of each update, whole groups in order; None: one update of all rollouts.

        Source: overlong filtering and dynamic sampling: DAPO, arXiv:2503.14476, sections "Hide and Seek: Overlong
            Reward Shaping" and "The More the Merrier: Dynamic Sampling".
        """
        table, size = groups.table, groups.group_size
        counted = ~np.isnan(rewards)
        if self.algorithm.degenerate != "keep":
            counted &= ~np.repeat(groups.degenerate, size)
        is_trained = counted & ~(table.is_truncated if self.algorithm.overlong_filter else np.zeros(len(table), bool))
        tokens = np.where(is_trained, table.loss_tokens, 0)
        if self.algorithm.aggregation == "group_token_mean":  # whole groups, whose unscored rollouts have 0 tokens
            counted = np.repeat(counted.reshape(-1, size).any(axis=1), size)
        weights = np.zeros(len(table))
        for ids in minibatches if minibatches is not None else [range(len(table))]:
            kept = np.flatnonzero(counted[ids.start : ids.stop]) + ids.start
            weights[kept] = self._weights(tokens[kept], size)
        return TokenWeights(weights, is_trained)

    def credit(
        self,
        groups: SampledGroups,
        rewards: NDArray[np.float64],
        own: OwnTokens,
        total_penalties: NDArray[np.float64] | None = None,
    ) -> Credit:
        """Return the advantages and returns of the tokens that this rank trains. Collective.

        The order is: overlong penalty on the rewards, then advantages.

        Args:
            groups: the rollouts of the step; only their table is read.
            rewards: [R], before the overlong penalty. NaN: the rollout could not be scored; it has advantage 0, and no
                mean counts it.
            own: loss tokens of this rank. With `kl_in_reward` and once the log-probs are known, it has the penalties:
                kl_coef times the KL divergence of each token, which advantage=batch and advantage=gae subtract token
                by token. With a critic it has its values; until they are known the advantages of advantage=gae are 0.
            total_penalties: [R] sum of the penalties of each rollout, which the other estimators subtract from its
                reward.

        Raises:
            ValueError: a reward, a step value or an advantage is not finite.
        """
        table, scored = groups.table, ~np.isnan(rewards)
        steps = None
        if table.has_steps.any():
            steps = StepValues(table.has_steps, table.step_offsets, table.step_ends, table.step_values, table.reward)
        step = StepRewards(
            _without_gaps(self._shape(groups, rewards), table.group_size),
            table.group_size,
            scored,
            total_penalties,
            table.completion_tokens,
            steps,
            own,
        )
        estimates = bound_part("advantage", self.algorithm)(step)
        advantages = estimates.advantages
        if isinstance(advantages, TokenValues):
            known = np.where(own.repeat(scored), advantages.values, 0.0)
            return Credit(advantages.with_values(known), estimates.returns)
        per_rollout = np.where(scored, np.asarray(advantages, dtype=np.float64), 0.0)[own.ids]
        return Credit(RolloutValues(own.ids, own.positions.offsets, per_rollout), estimates.returns)

    def _shape(self, groups: SampledGroups, rewards: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the rewards minus the soft overlong penalty.

        The penalty is 0 up to max_tokens - buffer tokens. From there it rises linearly to overlong_penalty at
        max_tokens.

        Source: DAPO, arXiv:2503.14476, equation 13. Differs: a completion never exceeds max_tokens, so that the third
            case of the paper does not occur.
        """
        fraction = self.algorithm.overlong_buffer_fraction
        if fraction is None:
            return rewards
        buffer = fraction * self.max_tokens
        beyond = np.maximum(0.0, groups.table.completion_tokens - (self.max_tokens - buffer))
        return np.asarray(rewards - self.algorithm.overlong_penalty * beyond / buffer)

    def value_loss(self) -> ValueLoss:
        """Return the critic's loss per token."""
        return ValueLoss(self.algorithm.value_clip)

    def critic_rate(self, learning_rate: float) -> float:
        """Return the critic's learning rate for the policy's `learning_rate`."""
        return learning_rate * self.algorithm.critic_lr_factor

    def kl(self, microbatch: Microbatch) -> Tensor | None:
        """Return the KL divergence of the policy before the update from the reference, [T], nats.

        None on pipeline stages without log-probs.
        """
        if microbatch.old_log_probs is None or microbatch.ref_log_probs is None:
            return None
        return KL_ESTIMATORS[self.algorithm.kl_estimator](microbatch.old_log_probs, microbatch.ref_log_probs)

    def loss(self) -> PolicyLoss:
        """Return the policy's loss per token."""
        algorithm = self.algorithm
        correction = None
        if algorithm.correction is not None or algorithm.correction_veto is not None:
            correction = Correction(
                algorithm.correction,
                low=algorithm.correction_low or 0.0,
                high=algorithm.correction_high or 1.0,
                veto=algorithm.correction_veto,
                ratio_has_mismatch=algorithm.old_log_probs == "sampler",
            )
        return PolicyLoss(
            bound_part("surrogate", algorithm),
            kl_coef=algorithm.kl_coef if algorithm.kl_in == "loss" else 0.0,
            kl_estimator=algorithm.kl_estimator,
            entropy_coef=algorithm.entropy_coef,
            correction=correction,
            old_is_sampler=algorithm.old_log_probs == "sampler",
        )

    def describe(self, num_rollouts: str) -> str:
        """Describe the aggregation in text; `num_rollouts` is the number of rollouts of an update."""
        return {
            "rollout_mean": "mean over a rollout's completion tokens, then mean over the update's rollouts "
            f"(denominator: {num_rollouts})",
            "token_mean": "mean over all completion tokens of the update",
            "rollout_sum": "sum over a rollout's completion tokens divided by "
            f"{self.algorithm.aggregation_length or self.max_tokens:g}, then mean over the update's rollouts "
            f"(denominator: {num_rollouts})",
            "group_token_mean": "mean over a group's completion tokens, then mean over the update's groups",
        }[self.algorithm.aggregation]

    def _weights(self, counts: NDArray[np.integer[Any]], group_size: int) -> NDArray[np.float64]:
        """Return the weight of each rollout of an update from the numbers of loss tokens."""
        mode = self.algorithm.aggregation
        if mode == "rollout_mean":
            return rollout_mean_weights(counts)
        if mode == "token_mean":
            return token_mean_weights(counts)
        if mode == "group_token_mean":
            return group_token_mean_weights(counts, group_size)
        return rollout_sum_weights(counts, self.algorithm.aggregation_length or self.max_tokens)


def _without_gaps(rewards: NDArray[np.float64], group_size: int) -> NDArray[np.float64]:
    """Return the rewards with the mean of the group in place of NaN; 0 in a group without rewards."""
    matrix = rewards.reshape(-1, group_size)
    counts = (~np.isnan(matrix)).sum(axis=1)
    means = np.nansum(matrix, axis=1) / np.maximum(counts, 1)
    return np.where(np.isnan(matrix), means[:, None], matrix).reshape(-1)
