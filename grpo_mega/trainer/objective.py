"""The config section `algorithm` as functions: advantages, token weights and the loss per token.

All global quantities are computed here. The rollouts of a step are equal on every rank, so advantages and denominators
are equal too, and they are known before the first microbatch.
Asserted by tests/unit/trainer/test_objective.py and tests/unit/algorithm/test_algorithms.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from grpo_mega.algorithm.adaptive_kl import adapted_kl_coef
from grpo_mega.algorithm.aggregate import (
    group_token_mean_weights,
    rollout_mean_weights,
    rollout_sum_weights,
    token_mean_weights,
)
from grpo_mega.algorithm.base import Advantage, StepRewards
from grpo_mega.algorithm.kl import KL_ESTIMATORS
from grpo_mega.algorithm.loss import PolicyLoss
from grpo_mega.algorithm.mismatch_correction import Correction
from grpo_mega.algorithm.value_loss import ValueLoss
from grpo_mega.config.algorithm_parts import bound_part
from grpo_mega.config.algorithm_section import AlgorithmConfig
from grpo_mega.rollout.sampler import SampledGroups
from grpo_mega.types import Microbatch, Rollout, UpdateStats


@dataclass(frozen=True)
class Credit:
    """Training signal of a step: what every rollout contributes to the updates. Each list has one entry per rollout.

    Attributes:
        advantages: a number for all loss tokens of the rollout, or one number per loss token.
        token_weights: factor of the loss of each token of the rollout, which contains all denominators of its update;
            0 where nothing is trained.
        is_trained: False for filtered rollouts, rollouts without a reward and rollouts of dropped groups.
        returns: targets of the critic, one number per loss token; empty without `values`.
    """

    advantages: list[Advantage]
    token_weights: list[float]
    is_trained: list[bool]
    returns: list[list[float]] = field(default_factory=list)


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
        """Return the KL coefficient of the next step, from this step's updates; None: it is constant."""
        target = self.algorithm.kl_target
        if target is None:
            return None
        kl = sum(u.sums["kl"] for u in updates) / len(updates)
        return adapted_kl_coef(self.algorithm.kl_coef, kl=kl, target=target)

    @property
    def kl_in_reward(self) -> bool:
        """True if the advantages include the KL penalty of every token."""
        return self.algorithm.kl_in == "reward" and self.algorithm.needs_reference

    def credit(
        self,
        groups: SampledGroups,
        rewards: Sequence[float | None],
        kl: Sequence[Sequence[float]] | None = None,
        values: Sequence[Sequence[float]] | None = None,
        *,
        minibatches: Sequence[range] | None = None,
    ) -> Credit:
        """Return the advantages, token weights and returns of a step. Every rank computes the same result.

        The order is: overlong penalty on the rewards, advantages, token weights of each update.

        Args:
            groups: all rollouts of the step.
            rewards: one per rollout, before the overlong penalty. None: the rollout could not be scored; it has
                advantage 0 and weight 0, and no mean or denominator counts it.
            kl: with `kl_in_reward`, the KL divergence of each loss token, in nats. kl_coef times their sum is
                subtracted from the reward of the rollout; advantage=batch and advantage=gae subtract it token by token.
                None before the log-probs are known.
            values: with a critic, the value of each loss token before the token was sampled. Until they are known the
                advantages of advantage=gae are 0.
            minibatches: the rollouts of each update, whole groups in order; None: one update of all rollouts.

        Raises:
            ValueError: a reward, a step value or an advantage is not finite.
        """
        shaped = self._shape(groups, rewards)
        scored = [reward is not None for reward in rewards]
        penalties = [[self.algorithm.kl_coef * k for k in row] for row in kl] if kl is not None else None
        step = StepRewards(
            groups.rollouts, _without_gaps(shaped, groups.group_size), groups.group_size, penalties, values, scored
        )
        estimates = bound_part("advantage", self.algorithm)(step)
        updates = minibatches if minibatches is not None else [range(len(groups.rollouts))]
        weights = {i: w for ids in updates for i, w in zip(ids, self._token_weights(groups, scored, ids), strict=True)}
        return Credit(
            [a if has else _zero_like(a) for a, has in zip(estimates.advantages, scored, strict=True)],
            [weights[i] for i in range(len(groups.rollouts))],
            [
                has and not self._is_filtered(rollout) and not self._is_dropped(groups, i // groups.group_size)
                for i, (rollout, has) in enumerate(zip(groups.rollouts, scored, strict=True))
            ],
            estimates.returns,
        )

    def _shape(self, groups: SampledGroups, rewards: Sequence[float | None]) -> list[float | None]:
        """Return the rewards minus the soft overlong penalty; None stays None.

        The penalty is 0 up to max_tokens - buffer tokens. From there it rises linearly to overlong_penalty at
        max_tokens.

        Source: DAPO, arXiv:2503.14476, equation 13. Differs: a completion never exceeds max_tokens, so that the third
            case of the paper does not occur.
        """
        fraction = self.algorithm.overlong_buffer_fraction
        if fraction is None:
            return list(rewards)
        buffer = fraction * self.max_tokens
        lengths = [len(r.completion.token_ids) for r in groups.rollouts]
        return [
            None
            if reward is None
            else reward - self.algorithm.overlong_penalty * max(0.0, length - (self.max_tokens - buffer)) / buffer
            for reward, length in zip(rewards, lengths, strict=True)
        ]

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

    def _token_weights(self, groups: SampledGroups, scored: Sequence[bool], ids: Sequence[int]) -> list[float]:
        """Return one weight per rollout of an update that consists of the rollouts `ids`.

        Dropped groups and rollouts without a reward are not counted by the denominators. Filtered rollouts are counted,
        with 0 tokens.

        Source: overlong filtering and dynamic sampling: DAPO, arXiv:2503.14476, sections "Hide and Seek: Overlong
            Reward Shaping" and "The More the Merrier: Dynamic Sampling".
        """
        size = groups.group_size
        mode = self.algorithm.aggregation
        kept = [i for i in ids if scored[i] and not self._is_dropped(groups, i // size)]
        if mode == "group_token_mean":  # whole groups, in which rollouts without a reward have 0 tokens
            with_reward = {i // size for i in kept}
            kept = [i for i in ids if i // size in with_reward]
        counts = [
            groups.rollouts[i].completion.num_loss_tokens
            if scored[i] and not self._is_filtered(groups.rollouts[i])
            else 0
            for i in kept
        ]
        if mode == "rollout_mean":
            weights = rollout_mean_weights(counts)
        elif mode == "token_mean":
            weights = token_mean_weights(counts)
        elif mode == "group_token_mean":
            weights = group_token_mean_weights(counts, size)
        else:
            weights = rollout_sum_weights(counts, self.algorithm.aggregation_length or self.max_tokens)
        found = dict(zip(kept, weights, strict=True))
        return [found.get(i, 0.0) for i in ids]

    def _is_filtered(self, rollout: Rollout) -> bool:
        return self.algorithm.overlong_filter and rollout.completion.stop_reason == "length"

    def _is_dropped(self, groups: SampledGroups, group: int) -> bool:
        return self.algorithm.degenerate != "keep" and groups.is_degenerate(group)


def _without_gaps(rewards: Sequence[float | None], group_size: int) -> list[float]:
    """Return the rewards with the mean of the group in place of None; 0 in a group without rewards."""
    found: list[float] = []
    for begin in range(0, len(rewards), group_size):
        group = rewards[begin : begin + group_size]
        known = [reward for reward in group if reward is not None]
        mean = math.fsum(known) / len(known) if known else 0.0
        found += [mean if reward is None else reward for reward in group]
    return found


def _zero_like(advantage: Advantage) -> Advantage:
    return [0.0] * len(advantage) if isinstance(advantage, list) else 0.0
