"""Surrogates: what an algorithm maximises per token, given advantages. Pure; one small class per form.

All are called with [T] tensors in which positions without loss are zero, and return the surrogate [T] and where it has
no gradient because of a bound [T] bool. ratio = exp(log_ratio), log_ratio = log_probs - old_log_probs. Choices are made
on log_ratio, and a token whose gradient is zero never enters exp: where exp overflows, zero times it would be nan.
Infinity that is left (A < 0 and log_ratio above 88 in float32) stays, and the update's check for non-finite losses
reports it.
Asserted by tests/unit/algorithm/test_loss.py by hand and by tests/unit/algorithm/test_algorithms.py against the papers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from grpo_mega.algorithm.segments import Segments


class Surrogate(Protocol):
    """One form."""

    def __call__(
        self, log_probs: Tensor, log_ratio: Tensor, advantages: Tensor, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        """(surrogate [T], bounded [T] bool); `log_probs` and `log_ratio` carry gradient."""
        ...


@dataclass(frozen=True)
class ClippedRatio:
    """min(ratio * A, clamp(ratio, 1 - clip_low, 1 + clip_high) * A); with `dual_clip` c and A < 0: max(that, c * A).

    Source: DeepSeekMath, arXiv:2402.03300, section "From PPO to GRPO". Two bounds: DAPO, arXiv:2503.14476, section
        "Raise the Ceiling: Clip-Higher". Dual clip: Ye et al., arXiv:1912.09729, section "Dual-clip PPO".
    """

    clip_low: float
    clip_high: float
    dual_clip: float | None = None

    def __call__(
        self, log_probs: Tensor, log_ratio: Tensor, advantages: Tensor, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        decided = log_ratio.detach()
        too_high = (advantages > 0) & (decided > math.log1p(self.clip_high))
        too_low = (advantages < 0) & (decided < math.log1p(-self.clip_low))
        bounded = too_high | too_low
        if self.dual_clip is not None:
            bounded = bounded | ((advantages < 0) & (decided > math.log(self.dual_clip)))
        ratio = torch.where(bounded | (advantages == 0), 0.0, log_ratio).exp()
        if self.dual_clip is not None:
            ratio = torch.where(bounded & (advantages < 0), self.dual_clip, ratio)
        ratio = torch.where(too_high, 1.0 + self.clip_high, torch.where(too_low, 1.0 - self.clip_low, ratio))
        return ratio * advantages, bounded


@dataclass(frozen=True)
class ClippedSequenceRatio:
    """The clipped ratio with s_t = sg[s] * ratio_t / sg[ratio_t] in place of the token's, s = exp(mean log_ratio).

    The mean is over the rollout's loss tokens and sg stops the gradient: s_t has the value of the sequence's ratio and
    each token's own gradient. Where a rollout's tokens share one advantage and one weight, value and gradient are those
    of the sequence form min(s * A, clamp(s) * A).

    Source: GSPO, arXiv:2507.18071, section "GSPO-token: A Token-level Objective Variant".
    """

    clip: ClippedRatio

    def __call__(
        self, log_probs: Tensor, log_ratio: Tensor, advantages: Tensor, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        mean = segments.spread(segments.mean(log_ratio), log_ratio.dtype)
        return self.clip(log_probs, mean + (log_ratio - log_ratio.detach()), advantages, segments)


@dataclass(frozen=True)
class GeometricMean:
    """A * exp(mean over the rollout of c_t), c_t = min(log_ratio, clip_high) if A > 0 else max(log_ratio, -clip_low).

    Bounds are of the *log* ratio. As above, each token gets the rollout's value and the gradient of its own c_t, which
    is zero where the bound holds.

    Source: GMPO, arXiv:2507.20673, the objective of section "Geometric-Mean Policy Optimization".
    """

    clip_low: float
    clip_high: float

    def __call__(
        self, log_probs: Tensor, log_ratio: Tensor, advantages: Tensor, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        decided = log_ratio.detach()
        bounded = ((advantages > 0) & (decided > self.clip_high)) | ((advantages < 0) & (decided < -self.clip_low))
        clipped = torch.where(advantages > 0, log_ratio.clamp(max=self.clip_high), log_ratio.clamp(min=-self.clip_low))
        mean = segments.spread(segments.mean(clipped), log_ratio.dtype)
        exponent = mean + torch.where(bounded, 0.0, log_ratio - decided)
        return torch.where(advantages == 0, 0.0, exponent).exp() * advantages, bounded


@dataclass(frozen=True)
class ClippedWeight:
    """sg[clamp(ratio, 1 - clip_low, 1 + clip_high)] * A * log_probs: every token keeps its gradient.

    `clip_low` None: no lower bound. `bounded` marks tokens whose weight was cut.

    Source: CISPO, MiniMax-M1, arXiv:2506.13585, section "Efficient RL Scaling with CISPO".
    """

    clip_low: float | None
    clip_high: float

    def __call__(
        self, log_probs: Tensor, log_ratio: Tensor, advantages: Tensor, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        decided = log_ratio.detach()
        bounded = decided > math.log1p(self.clip_high)
        weight = decided.clamp(max=math.log1p(self.clip_high)).exp()
        if self.clip_low is not None:
            bounded = bounded | (decided < math.log1p(-self.clip_low))
            weight = weight.clamp(min=1.0 - self.clip_low)
        return weight * advantages * log_probs, bounded


@dataclass(frozen=True)
class SoftGate:
    """A * (4 / tau) * sigmoid(tau * (ratio - 1)), tau = `positive` if A > 0 else `negative`. Nothing is bounded.

    Source: SAPO, arXiv:2511.20347, the objective of section "Soft Adaptive Policy Optimization".
    """

    positive: float
    negative: float

    def __call__(
        self, log_probs: Tensor, log_ratio: Tensor, advantages: Tensor, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        tau = torch.where(advantages > 0, self.positive, self.negative).to(log_ratio.dtype)
        # sigmoid is flat far below a ratio of exp(20): cut there, exp cannot overflow into 0 * inf
        ratio = log_ratio.clamp(max=20.0).exp()
        return 4.0 / tau * torch.sigmoid(tau * (ratio - 1.0)) * advantages, torch.zeros_like(
            advantages, dtype=torch.bool
        )


@dataclass(frozen=True)
class PolicyGradient:
    """A * log_probs: REINFORCE. The old policy plays no part.

    Source: Back to Basics, arXiv:2402.14740, section "REINFORCE".
    """

    def __call__(
        self, log_probs: Tensor, log_ratio: Tensor, advantages: Tensor, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        return advantages * log_probs, torch.zeros_like(advantages, dtype=torch.bool)
