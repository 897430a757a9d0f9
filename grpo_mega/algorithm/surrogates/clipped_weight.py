"""The clipped importance weight in front of the log-prob (CISPO)."""

from __future__ import annotations

import math

from torch import Tensor

from grpo_mega.algorithm.base import surrogate
from grpo_mega.algorithm.rollout_sums import Segments


@surrogate
def clipped_weight(
    log_probs: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    clip_high: float,
    clip_low: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return sg[clamp(ratio, 1 - clip_low, 1 + clip_high)] * A * log_probs, [T], and the clipped tokens, [T] bool.

    sg stops the gradient, and every token keeps the gradient of its log-prob. The positional arguments are those of
    `Surrogate`. The bounds have no unit; `clip_low` None: no lower bound.

    Source: CISPO, MiniMax-M1, arXiv:2506.13585, section "Efficient RL Scaling with CISPO".
    """
    decided = log_ratio.detach()
    bounded = decided > math.log1p(clip_high)
    weight = decided.clamp(max=math.log1p(clip_high)).exp()
    if clip_low is not None:
        bounded = bounded | (decided < math.log1p(-clip_low))
        weight = weight.clamp(min=1.0 - clip_low)
    return weight * advantages * log_probs, bounded
