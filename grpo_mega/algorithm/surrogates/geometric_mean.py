"""The geometric mean of the clipped ratios of a rollout (GMPO)."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_mega.algorithm.base import surrogate
from grpo_mega.algorithm.rollout_sums import Segments


@surrogate
def geometric_mean(
    log_probs: Tensor, log_ratio: Tensor, advantages: Tensor, segments: Segments, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """Return A * exp(mean over the rollout of c_t), [T], and the bounded tokens, [T] bool.

    c_t = min(log_ratio, clip_high) if A > 0, else max(log_ratio, -clip_low): the bounds apply to the log ratio. Each
    token has the value of its rollout and the gradient of its own c_t, which is 0 where the bound holds. The positional
    arguments are those of `Surrogate`. The bounds are in nats.

    Source: GMPO, arXiv:2507.20673, the objective of section "Geometric-Mean Policy Optimization".
    """
    decided = log_ratio.detach()
    bounded = ((advantages > 0) & (decided > clip_high)) | ((advantages < 0) & (decided < -clip_low))
    clipped = torch.where(advantages > 0, log_ratio.clamp(max=clip_high), log_ratio.clamp(min=-clip_low))
    mean = segments.spread(segments.mean(clipped), log_ratio.dtype)
    exponent = mean + torch.where(bounded, 0.0, log_ratio - decided)
    return torch.where(advantages == 0, 0.0, exponent).exp() * advantages, bounded
