"""The section `algorithm` of a config as mathematics: advantages, token weights and the loss per token.

Everything global is here: a step's rollouts are the same on every rank, so advantages and denominators are too, and are
known before the first microbatch.
Asserted by tests/unit/trainer/test_objective.py and tests/unit/algorithm/test_algorithms.py.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import compress

import torch
from torch import Tensor

from grpo_mega.algorithm.advantage import (
    group_advantages,
    leave_one_out_advantages,
    process_advantages,
    token_returns,
    whitened,
)
from grpo_mega.algorithm.aggregate import (
    group_token_mean_weights,
    rollout_mean_weights,
    rollout_sum_weights,
    token_mean_weights,
)
from grpo_mega.algorithm.controller import adapted_kl_coef
from grpo_mega.algorithm.correction import Correction
from grpo_mega.algorithm.gae import generalized_advantages, token_rewards
from grpo_mega.algorithm.kl import KL_ESTIMATORS
from grpo_mega.algorithm.loss import PolicyLoss
from grpo_mega.algorithm.surrogate import (
    ClippedRatio,
    ClippedSequenceRatio,
    ClippedWeight,
    GeometricMean,
    PolicyGradient,
    SoftGate,
    Surrogate,
)
from grpo_mega.algorithm.value_loss import ValueLoss
from grpo_mega.config.algorithm_section import AlgorithmConfig
from grpo_mega.rollout.sampler import SampledGroups
from grpo_mega.types import Microbatch, Rollout, UpdateStats

Advantage = float | list[float]
"""Of one rollout: the same for all of its loss tokens, or one each."""


@dataclass(frozen=True)
class Credit:
    """Training signal of a step: what every rollout contributes to the updates. Each list has one entry per rollout.

    Attributes:
        advantages: a number for all loss tokens of the rollout, or one number per loss token.
        token_weights: factor of the loss of each token of the rollout, which contains all denominators of its update;
            0 where nothing is trained.
        is_trained: False for filtered rollouts and for rollouts of dropped groups.
        returns: targets of the critic, one number per loss token; empty without `values`.
    """

    advantages: list[Advantage]
    token_weights: list[float]
    is_trained: list[bool]
    returns: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class Objective:
    """`max_tokens` is the most that a completion can have."""

    algorithm: AlgorithmConfig
    max_tokens: int

    def at(self, kl_coef: float | None) -> Objective:
        """With this KL coefficient; None: that of the config."""
        if kl_coef is None:
            return self
        return replace(self, algorithm=self.algorithm.model_copy(update={"kl_coef": kl_coef}))

    def next_kl_coef(self, updates: Sequence[UpdateStats]) -> float | None:
        """The coefficient of the next step, from this step's updates; None: it does not move."""
        target = self.algorithm.kl_target
        if target is None:
            return None
        kl = sum(u.sums["kl"] for u in updates) / len(updates)
        return adapted_kl_coef(self.algorithm.kl_coef, kl=kl, target=target)

    @property
    def kl_in_reward(self) -> bool:
        """Whether advantages need the KL penalty of every token."""
        return self.algorithm.kl_in == "reward" and self.algorithm.needs_reference

    def credit(
        self,
        groups: SampledGroups,
        rewards: Sequence[float],
        kl: Sequence[Sequence[float]] | None = None,
        values: Sequence[Sequence[float]] | None = None,
        *,
        minibatches: Sequence[range] | None = None,
    ) -> Credit:
        """Return the advantages, token weights and returns of a step. Every rank computes the same result.

        The order is: overlong penalty on the rewards, advantages, token weights of each update.

        Args:
            groups: all rollouts of the step.
            rewards: one per rollout, before the overlong penalty.
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
        returns: list[list[float]] = []
        if values is None:
            advantages = self._advantages(groups, shaped, kl)
        else:
            advantages, returns = self._advantages_over_values(groups, shaped, values, kl)
        updates = minibatches if minibatches is not None else [range(len(groups.rollouts))]
        weights = {i: w for ids in updates for i, w in zip(ids, self._token_weights(groups, ids), strict=True)}
        return Credit(
            advantages,
            [weights[i] for i in range(len(groups.rollouts))],
            [
                not self._is_filtered(rollout) and not self._is_dropped(groups, i // groups.group_size)
                for i, rollout in enumerate(groups.rollouts)
            ],
            returns,
        )

    def _shape(self, groups: SampledGroups, rewards: Sequence[float]) -> list[float]:
        """Return the rewards minus the soft overlong penalty.

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
            reward - self.algorithm.overlong_penalty * max(0.0, length - (self.max_tokens - buffer)) / buffer
            for reward, length in zip(rewards, lengths, strict=True)
        ]

    def _advantages(
        self, groups: SampledGroups, rewards: Sequence[float], kl: Sequence[Sequence[float]] | None
    ) -> list[Advantage]:
        penalties = [[self.algorithm.kl_coef * k for k in row] for row in kl] if kl is not None else None
        rule = self.algorithm.advantage
        if rule == "process":
            return self._process_advantages(groups, rewards)
        lengths = [r.completion.num_loss_tokens for r in groups.rollouts]
        if rule == "gae":
            return [0.0] * len(lengths)
        if rule == "batch":
            rows = penalties if penalties is not None else [[0.0] * n for n in lengths]
            return list(whitened([token_returns(r, row) for r, row in zip(rewards, rows, strict=True)]))
        if penalties is not None:
            rewards = [r - sum(row) for r, row in zip(rewards, penalties, strict=True)]
        matrix = torch.tensor(rewards, dtype=torch.float32).view(-1, groups.group_size)
        if rule == "leave_one_out":
            return list(leave_one_out_advantages(matrix).flatten().tolist())
        values = group_advantages(matrix, scale="std" if rule == "group_std" else "none").flatten().tolist()
        if rule == "group_batch":
            return list(whitened([[value] * n for value, n in zip(values, lengths, strict=True)]))
        return list(values)

    def _process_advantages(self, groups: SampledGroups, rewards: Sequence[float]) -> list[Advantage]:
        """A rollout without steps is one step, which ends with its completion."""
        lengths = [len(r.completion.token_ids) for r in groups.rollouts]
        steps = [
            rollout.steps if rollout.steps is not None else ((length - 1, reward),)
            for rollout, length, reward in zip(groups.rollouts, lengths, rewards, strict=True)
        ]
        rows = process_advantages(steps, lengths, groups.group_size)
        masks = [r.completion.loss_mask for r in groups.rollouts]
        return [row if mask is None else list(compress(row, mask)) for row, mask in zip(rows, masks, strict=True)]

    def _advantages_over_values(
        self,
        groups: SampledGroups,
        rewards: Sequence[float],
        values: Sequence[Sequence[float]],
        kl: Sequence[Sequence[float]] | None,
    ) -> tuple[list[Advantage], list[list[float]]]:
        """Return the advantages over the critic's values, whitened over the tokens of the step, and the returns.

        An outcome reward is earned at the last loss token. If a process reward judged the rollout, each step's value is
        earned in full at the token that ends the step, in place of the outcome: `Reward.value` holds the mean of the
        steps, which is not added again. Components without steps are a step that ends with the completion. The overlong
        penalty stays at the last token. A step that ends in a tool's result belongs to the last token that the policy
        sampled before it.

        Source: PPO, arXiv:1707.06347, equations 11 and 12; the return is advantage plus value, before the whitening.
        """
        gamma, gae_lambda, coef = self.algorithm.gamma, self.algorithm.gae_lambda, self.algorithm.kl_coef
        assert gamma is not None, "config/algorithm_rules.py"
        assert gae_lambda is not None, "config/algorithm_rules.py"
        advantages = []
        for i, rollout in enumerate(groups.rollouts):
            penalties = [coef * k for k in kl[i]] if kl is not None else [0.0] * rollout.completion.num_loss_tokens
            row = _token_rewards(rollout, rewards[i], penalties)
            advantages.append(generalized_advantages(row, values[i], gamma=gamma, gae_lambda=gae_lambda))
        returns = [[a + v for a, v in zip(*pair, strict=True)] for pair in zip(advantages, values, strict=True)]
        return list(whitened(advantages)), returns

    def value_loss(self) -> ValueLoss:
        """The critic's loss per token."""
        return ValueLoss(self.algorithm.value_clip)

    def critic_rate(self, learning_rate: float) -> float:
        """The critic's learning rate where the policy's is `learning_rate`."""
        return learning_rate * self.algorithm.critic_lr_factor

    def kl(self, microbatch: Microbatch) -> Tensor | None:
        """KL of the policy before the update to the reference, [T]; None where a stage has no log-probs."""
        if microbatch.old_log_probs is None or microbatch.ref_log_probs is None:
            return None
        return KL_ESTIMATORS[self.algorithm.kl_estimator](microbatch.old_log_probs, microbatch.ref_log_probs)

    def loss(self) -> PolicyLoss:
        """The loss per token."""
        algorithm = self.algorithm
        correction = None
        if algorithm.correction is not None or algorithm.correction_veto is not None:
            correction = Correction(
                algorithm.correction,
                low=algorithm.correction_low or 0.0,
                high=algorithm.correction_high or 1.0,
                veto=algorithm.correction_veto,
            )
        return PolicyLoss(
            _surrogate(algorithm),
            kl_coef=algorithm.kl_coef if algorithm.kl_in == "loss" else 0.0,
            kl_estimator=algorithm.kl_estimator,
            entropy_coef=algorithm.entropy_coef,
            correction=correction,
        )

    def describe(self, num_rollouts: str) -> str:
        """The aggregation in words, with `num_rollouts` of an update."""
        return {
            "rollout_mean": "mean over a rollout's completion tokens, then mean over the update's rollouts "
            f"(denominator: {num_rollouts})",
            "token_mean": "mean over all completion tokens of the update",
            "rollout_sum": "sum over a rollout's completion tokens divided by "
            f"{self.algorithm.aggregation_length or self.max_tokens:g}, then mean over the update's rollouts "
            f"(denominator: {num_rollouts})",
            "group_token_mean": "mean over a group's completion tokens, then mean over the update's groups",
        }[self.algorithm.aggregation]

    def _token_weights(self, groups: SampledGroups, ids: Sequence[int]) -> list[float]:
        """Return one weight per rollout of an update that consists of the rollouts `ids`.

        Dropped groups are not counted by the denominators. Filtered rollouts are counted, with 0 tokens.

        Source: overlong filtering and dynamic sampling: DAPO, arXiv:2503.14476, sections "Hide and Seek: Overlong
            Reward Shaping" and "The More the Merrier: Dynamic Sampling".
        """
        size = groups.group_size
        kept = [i for i in ids if not self._is_dropped(groups, i // size)]
        rollouts = [groups.rollouts[i] for i in kept]
        counts = [0 if self._is_filtered(r) else r.completion.num_loss_tokens for r in rollouts]
        mode = self.algorithm.aggregation
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


def _token_rewards(rollout: Rollout, reward: float, penalties: Sequence[float]) -> list[float]:
    """Of each loss token; `reward` is the rollout's, shaped."""
    if rollout.steps is None:
        return token_rewards(reward, penalties)
    mask = rollout.completion.loss_mask
    sampled = [i for i in range(len(rollout.completion.token_ids)) if mask is None or mask[i]]
    steps = [(bisect_right(sampled, end) - 1, value) for end, value in rollout.steps]
    return token_rewards(reward - rollout.reward.value, penalties, steps)


def _surrogate(algorithm: AlgorithmConfig) -> Surrogate:
    kind, low, high = algorithm.surrogate, algorithm.clip_low, algorithm.clip_high
    if kind == "policy_gradient":
        return PolicyGradient()
    if kind == "soft_gate":
        positive, negative = algorithm.gate_positive, algorithm.gate_negative
        assert positive is not None, "config/algorithm_rules.py"
        assert negative is not None, "config/algorithm_rules.py"
        return SoftGate(positive, negative)
    assert high is not None, "config/algorithm_rules.py"
    if kind == "clipped_weight":
        return ClippedWeight(low, high)
    assert low is not None, "config/algorithm_rules.py"
    if kind == "geometric_mean":
        return GeometricMean(low, high)
    clip = ClippedRatio(low, high, algorithm.dual_clip)
    return clip if kind == "clipped_ratio" else ClippedSequenceRatio(clip)
