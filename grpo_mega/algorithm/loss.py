"""The loss per token: minus a surrogate, plus KL to the reference, minus an entropy bonus. Pure.

Invariant: a position with `loss_mask` False has loss 0, gradient 0 and metrics 0, whatever its inputs hold, nan and inf
included (`test_masked_garbage_gives_zero_loss_and_zero_gradient`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_mega.algorithm.correction import Correction
from grpo_mega.algorithm.kl import KL_ESTIMATORS, KlEstimator
from grpo_mega.algorithm.segments import Segments
from grpo_mega.algorithm.surrogate import Surrogate
from grpo_mega.types import Microbatch


@dataclass(frozen=True)
class PolicyLoss:
    """L = -w * surrogate + kl_coef * kl(log_probs, ref_log_probs) - entropy_coef * entropy, per token.

    w are the factors of `correction`, 1 without one. Means over tokens and rollouts are not here: they are in
    `token_weights`, for all three terms. With `kl_coef` 0 there is no KL in the loss (it may be in the reward).

    Source: DeepSeekMath, arXiv:2402.03300, section "From PPO to GRPO", with the sign of a loss; surrogates name theirs.
    """

    surrogate: Surrogate
    kl_coef: float = 0.0
    kl_estimator: KlEstimator = "k3"
    entropy_coef: float = 0.0
    correction: Correction | None = None

    @property
    def needs_reference(self) -> bool:
        """Whether microbatches must carry `ref_log_probs`."""
        return self.kl_coef > 0

    def __call__(self, log_probs: Tensor, entropy: Tensor, microbatch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss per token and its metrics.

        Without `old_log_probs` the policy is its own old policy (valid when there is exactly one update): the ratio is
        1 and its gradient that of `log_probs`.

        Args:
            log_probs: [T] float32, nats, with gradient.
            entropy: [T] float32, nats; with gradient if there is a bonus.
            microbatch: labels' mask, advantages, sampler, old and reference log-probs, all [T].

        Returns:
            Loss [T], and detached [T]: `ratio`; `clip_fraction` (1 where a bound of the surrogate holds); `entropy`;
            `kl` if there is a reference; with a correction `correction` (its factor), `masked` and `vetoed`.

        Raises:
            ValueError: kl_coef > 0 without `ref_log_probs`.
        """
        mask = microbatch.loss_mask

        def here(values: Tensor) -> Tensor:
            return torch.where(mask, values, 0.0)

        log_probs, entropy, advantages = here(log_probs), here(entropy), here(microbatch.advantages)
        old_log_probs = log_probs.detach() if microbatch.old_log_probs is None else here(microbatch.old_log_probs)
        segments = Segments.of(microbatch)
        log_ratio = log_probs - old_log_probs
        metrics = {"ratio": torch.where(mask, log_ratio.detach().exp(), 0.0), "entropy": entropy.detach()}
        if self.correction is not None:
            mismatch = old_log_probs - here(microbatch.sampler_log_probs)
            factor, masked, vetoed = (here(v) for v in self.correction.factors(mismatch, segments))
            advantages = advantages * factor  # surrogates are linear in the advantage, and a zero keeps out of exp
            metrics |= {"correction": factor, "masked": masked, "vetoed": vetoed}
        gained, bounded = self.surrogate(log_probs, log_ratio, advantages, segments)
        metrics["clip_fraction"] = (bounded & mask).to(log_ratio.dtype)
        loss = -here(gained)
        if microbatch.ref_log_probs is not None:
            kl = KL_ESTIMATORS[self.kl_estimator](log_probs, here(microbatch.ref_log_probs))
            loss = loss + self.kl_coef * kl if self.kl_coef else loss
            metrics["kl"] = kl.detach()
        elif self.needs_reference:
            raise ValueError(f"kl_coef={self.kl_coef} needs ref_log_probs in the microbatch; got None")
        if self.entropy_coef:
            loss = loss - self.entropy_coef * entropy
        return loss, metrics
