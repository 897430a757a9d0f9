"""Correction of the mismatch between policy and engine: a factor per token of the surrogate, without gradient. Pure.

The engine samples from its own probabilities q; the loss assumes p, those of the policy before the update. The factor
is a bounded form of p / q = exp(mismatch), mismatch = old_log_probs - sampler_log_probs. It does not change KL and
entropy.
Asserted by tests/unit/algorithm/test_mismatch_correction.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from grpo_mega.algorithm.rollout_sums import Segments

TRUNCATED = ("token_truncated", "sequence_truncated")
"""Forms whose factor is a weight everywhere; `ratio_has_mismatch` excludes them."""

CorrectionForm = Literal["token_truncated", "sequence_truncated", "token_masked"]


@dataclass(frozen=True)
class Correction:
    """Factors w_t, from k_t = exp(mismatch_t) and, per rollout, K = exp(sum of mismatch over its loss tokens).

    token_truncated: min(k_t, high). sequence_truncated: min(K, high). token_masked: k_t where low <= k_t <= high, else
    0. With `veto`, all tokens of a rollout with any k_t < veto get 0. Without a form the factor is 1, except for the
    veto.

    Attributes:
        form: one of the forms above, or None.
        low: lower bound of k_t for token_masked.
        high: upper bound.
        veto: see above; None: no veto.
        ratio_has_mismatch: the ratio of the surrogate is p / q already (`algorithm.old_log_probs=sampler`), so the
            factor must not contain it a second time: it is 1 wherever it is not 0.

    Source: truncated importance sampling: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL
        Training", 2025. token_masked: IcePop in "Every Step Evolves", arXiv:2510.18855. The veto is common practice in
        systems that correct the mismatch.
    """

    form: CorrectionForm | None
    low: float
    high: float
    veto: float | None
    ratio_has_mismatch: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for a form that would count the mismatch twice."""
        if self.ratio_has_mismatch and self.form in TRUNCATED:
            raise ValueError(f"form={self.form} multiplies by policy / engine, which the ratio has already")

    def factors(self, mismatch: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
        """Return factor [T], masked [T] and vetoed [T]. The last two are 1 where the mask or the veto gave factor 0.

        Args:
            mismatch: [T] nats, 0 at positions without loss.
            segments: the rollouts of the row.
        """
        mismatch = mismatch.detach()
        masked = torch.zeros_like(mismatch)
        factor = torch.ones_like(mismatch)
        if self.form == "token_truncated":
            factor = mismatch.clamp(max=math.log(self.high)).exp()
        elif self.form == "sequence_truncated":
            factor = segments.spread(segments.sum(mismatch).clamp(max=math.log(self.high)).exp(), mismatch.dtype)
        elif self.form == "token_masked":
            is_outside = (mismatch < math.log(self.low)) | (mismatch > math.log(self.high))
            masked = is_outside.to(mismatch.dtype)
            factor = torch.where(is_outside, 0.0, mismatch).exp() * (1.0 - masked)
        vetoed = torch.zeros_like(mismatch)
        if self.veto is not None:
            hits = segments.sum((mismatch < math.log(self.veto)).to(mismatch.dtype))
            vetoed = segments.spread((hits > 0).double(), mismatch.dtype)
            factor = torch.where(vetoed > 0, 0.0, factor)
        if self.ratio_has_mismatch:
            factor = torch.where(factor == 0, factor, 1.0)
        return factor, masked, vetoed
