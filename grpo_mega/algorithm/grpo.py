"""The GRPO loss per token: clipped ratio plus k3 KL to the reference. Pure.

Invariant: a position with `loss_mask` False has loss 0, gradient 0 and metrics 0, whatever its inputs hold, nan and inf
included (`test_masked_garbage_gives_zero_loss_and_zero_gradient`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_mega.algorithm.kl import k3
from grpo_mega.types import Microbatch


@dataclass(frozen=True)
class GrpoLoss:
    """L = -min(ratio * A, clamp(ratio, 1 - clip_low, 1 + clip_high) * A) + kl_coef * k3(log_probs, ref_log_probs).

    ratio = exp(log_probs - old_log_probs). The mean over tokens and rollouts is not here: it is in `token_weights`.

    Source: DeepSeekMath, arXiv:2402.03300, equations 3 and 4, with the sign of a loss. Differs: two clip bounds
        (DAPO, arXiv:2503.14476, section 3.1), equal by default.
    """

    clip_low: float
    clip_high: float
    kl_coef: float

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
            entropy: [T] float32, nats; only reported.
            microbatch: labels' mask, advantages, old and reference log-probs, all [T].

        Returns:
            Loss [T], and detached [T]: `ratio`; `clip_fraction` (1 where the minimum takes the clamped term, so that
            the token has no policy gradient); `entropy`; `kl` (k3) if there is a reference.

        Raises:
            ValueError: kl_coef > 0 without `ref_log_probs`.
        """
        mask = microbatch.loss_mask
        old_log_probs = log_probs.detach() if microbatch.old_log_probs is None else microbatch.old_log_probs
        log_ratio = log_probs - old_log_probs
        advantages = torch.where(mask, microbatch.advantages, 0.0)  # keeps masked tokens out of the surrogate's exp
        surrogate, clipped = self._clipped_surrogate(log_ratio, advantages)
        loss = -surrogate
        metrics = {
            "ratio": torch.where(mask, log_ratio.detach().exp(), 0.0),
            "clip_fraction": clipped.to(log_ratio.dtype),
            "entropy": torch.where(mask, entropy.detach(), 0.0),
        }
        if self.needs_reference:
            if microbatch.ref_log_probs is None:
                raise ValueError(f"kl_coef={self.kl_coef} needs ref_log_probs in the microbatch; got None")
            kl = k3(torch.where(mask, log_probs, 0.0), torch.where(mask, microbatch.ref_log_probs, 0.0))
            loss = loss + self.kl_coef * kl
            metrics["kl"] = kl.detach()
        return loss, metrics

    def _clipped_surrogate(self, log_ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """min(ratio * A, clamp(ratio) * A) [T], and where the clamped term is the smaller one [T] bool.

        The choice is made on log_ratio, and a token whose gradient is zero (clipped, or A = 0) never enters exp: where
        exp overflows or is nan, the zero gradient times it would be nan. What is left to overflow (A < 0 and log_ratio
        above 88 in float32) stays infinite, and the update's check for non-finite losses reports it.
        """
        decided = log_ratio.detach()
        too_high = (advantages > 0) & (decided > math.log1p(self.clip_high))
        too_low = (advantages < 0) & (decided < math.log1p(-self.clip_low))
        clipped = too_high | too_low
        ratio = torch.where(clipped | (advantages == 0), 0.0, log_ratio).exp()
        ratio = torch.where(too_high, 1.0 + self.clip_high, torch.where(too_low, 1.0 - self.clip_low, ratio))
        return ratio * advantages, clipped
