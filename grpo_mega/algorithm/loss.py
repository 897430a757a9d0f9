"""The policy's loss per token: minus a surrogate, plus KL to the reference, minus an entropy bonus. Pure.

Invariant: a position with `loss_mask` False has loss 0, gradient 0 and metrics 0 for all inputs, including nan and inf.
Asserted by tests/unit/algorithm/test_loss.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_mega.algorithm.base import Surrogate
from grpo_mega.algorithm.kl import KL_ESTIMATORS, MAX_REPORTED_LOG_RATIO, KlEstimator
from grpo_mega.algorithm.mismatch_correction import Correction
from grpo_mega.algorithm.rollout_sums import Segments
from grpo_mega.types import Microbatch


@dataclass(frozen=True)
class PolicyLoss:
    """L = -w * surrogate + kl_coef * kl(log_probs, ref_log_probs) - entropy_coef * entropy, per token.

    w is the factor of `correction`, 1 without one. Means over tokens and rollouts are in `token_weights`, for all three
    terms. With `kl_coef` 0 the loss has no KL term (the reward may have one). With `old_is_sampler` the ratio
    is policy / sampler, and the mismatch of the correction is that of the current policy.

    Source: DeepSeekMath, arXiv:2402.03300, section "From PPO to GRPO", with the sign of a loss. The sources of the
        surrogates are in their files.
    """

    surrogate: Surrogate
    kl_coef: float = 0.0
    kl_estimator: KlEstimator = "k3"
    entropy_coef: float = 0.0
    correction: Correction | None = None
    old_is_sampler: bool = False

    @property
    def needs_reference(self) -> bool:
        """True if microbatches must have `ref_log_probs`."""
        return self.kl_coef > 0

    def __call__(self, log_probs: Tensor, entropy: Tensor, microbatch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss per token and its metrics.

        Without `old_log_probs` the current policy is the old policy, which is correct for a single update: the ratio is
        1 and has the gradient of `log_probs`.

        Args:
            log_probs: [T] float32, nats, with gradient.
            entropy: [T] float32, nats; with gradient if `entropy_coef` > 0.
            microbatch: loss mask, advantages, and log-probs of sampler, old policy and reference, all [T].

        Returns:
            Loss [T], and detached tensors [T]: `ratio`; `clip_fraction` (1 where a bound of the surrogate holds);
            `entropy`; `kl` if there are `ref_log_probs`; with a correction `correction` (its factor), `masked` and
            `vetoed`. `clip_positive`, `clip_negative`, `masked_positive` and `masked_negative` are 1 only where the
            advantage has that sign. `ratio` and `kl` are at most exp(40), so that no sum over tokens overflows.

        Raises:
            ValueError: kl_coef > 0 without `ref_log_probs`.
        """
        mask = microbatch.loss_mask

        def masked_to_zero(values: Tensor) -> Tensor:
            return torch.where(mask, values, 0.0)

        log_probs, entropy, advantages = (
            masked_to_zero(log_probs),
            masked_to_zero(entropy),
            masked_to_zero(microbatch.advantages),
        )
        sampler_log_probs = masked_to_zero(microbatch.sampler_log_probs)
        before = log_probs.detach()
        if microbatch.old_log_probs is not None and not self.old_is_sampler:
            before = masked_to_zero(microbatch.old_log_probs)
        old_log_probs = sampler_log_probs if self.old_is_sampler else before
        segments = Segments.of(microbatch)
        signs = {"positive": advantages > 0, "negative": advantages < 0}
        log_ratio = log_probs - old_log_probs
        ratio = log_ratio.detach().clamp(max=MAX_REPORTED_LOG_RATIO).exp()
        metrics = {"ratio": torch.where(mask, ratio, 0.0), "entropy": entropy.detach()}
        if self.correction is not None:
            mismatch = before - sampler_log_probs
            factor, masked, vetoed = (masked_to_zero(v) for v in self.correction.factors(mismatch, segments))
            advantages = advantages * factor  # surrogates are linear in the advantage, and skip exp for 0
            metrics |= {"correction": factor, "masked": masked, "vetoed": vetoed}
            metrics |= {f"masked_{sign}": masked * where for sign, where in signs.items()}
        objective, bounded = self.surrogate(log_probs, log_ratio, advantages, segments)
        metrics["clip_fraction"] = (bounded & mask).to(log_ratio.dtype)
        metrics |= {f"clip_{sign}": metrics["clip_fraction"] * where for sign, where in signs.items()}
        loss = -masked_to_zero(objective)
        if microbatch.ref_log_probs is not None:
            kl = KL_ESTIMATORS[self.kl_estimator](log_probs, masked_to_zero(microbatch.ref_log_probs))
            loss = loss + self.kl_coef * kl if self.kl_coef else loss
            metrics["kl"] = kl.detach().clamp(max=math.exp(MAX_REPORTED_LOG_RATIO))
        elif self.needs_reference:
            raise ValueError(f"kl_coef={self.kl_coef} requires ref_log_probs in the microbatch; got None")
        if self.entropy_coef:
            loss = loss - self.entropy_coef * entropy
        return loss, metrics
