"""Correction of the policy/engine mismatch: a factor per token in front of the surrogate, without gradient. Pure.

The engine sampled from its own probabilities q, the loss assumes those of the policy before the update, p. The factor
is a bounded form of p / q = exp(mismatch), mismatch = old_log_probs - sampler_log_probs. It never touches KL and
entropy.
Asserted by tests/unit/algorithm/test_correction.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from grpo_mega.algorithm.segments import Segments

CorrectionForm = Literal["token_truncated", "sequence_truncated", "token_masked"]


@dataclass(frozen=True)
class Correction:
    """Factors w_t, from k_t = exp(mismatch_t) and, per rollout, K = exp(sum of mismatch over its loss tokens).

    token_truncated: min(k_t, high). sequence_truncated: min(K, high). token_masked: k_t where low <= k_t <= high, else
    0. With `veto`, all tokens of a rollout in which some k_t < veto get 0. Without a form: 1 but for the veto.

    Source: truncated importance sampling: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL
        Training", 2025. token_masked: IcePop in "Every Step Evolves", arXiv:2510.18855. The veto is common practice in
        systems that correct the mismatch.
    """

    form: CorrectionForm | None
    low: float
    high: float
    veto: float | None

    def factors(self, mismatch: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
        """(factor [T], masked [T], vetoed [T]); the last two are 1 where a token was taken out, by which of the two.

        Args:
            mismatch: [T] nats, 0 where there is no loss.
        """
        mismatch = mismatch.detach()
        masked = torch.zeros_like(mismatch)
        factor = torch.ones_like(mismatch)
        if self.form == "token_truncated":
            factor = mismatch.clamp(max=math.log(self.high)).exp()
        elif self.form == "sequence_truncated":
            factor = segments.spread(segments.sum(mismatch).clamp(max=math.log(self.high)).exp(), mismatch.dtype)
        elif self.form == "token_masked":
            outside = (mismatch < math.log(self.low)) | (mismatch > math.log(self.high))
            masked = outside.to(mismatch.dtype)
            factor = torch.where(outside, 0.0, mismatch).exp() * (1.0 - masked)
        vetoed = torch.zeros_like(mismatch)
        if self.veto is not None:
            hits = segments.sum((mismatch < math.log(self.veto)).to(mismatch.dtype))
            vetoed = segments.spread((hits > 0).double(), mismatch.dtype)
            factor = torch.where(vetoed > 0, 0.0, factor)
        return factor, masked, vetoed
