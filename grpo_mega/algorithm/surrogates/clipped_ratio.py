"""The clipped ratio of PPO and GRPO, optionally with a second bound for negative advantages."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grpo_mega.algorithm.base import surrogate
from grpo_mega.algorithm.rollout_sums import Segments


@surrogate
def clipped_ratio(
    log_probs: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return min(ratio * A, clamp(ratio, 1 - clip_low, 1 + clip_high) * A), [T], and the bounded tokens, [T] bool.

    With `dual_clip` c and A < 0 the surrogate is the maximum of that and c * A. The positional arguments are those of
    `Surrogate`. The bounds have no unit: `clip_low` is in (0, 1), `clip_high` > 0, `dual_clip` > 1 or None.

    Source: DeepSeekMath, arXiv:2402.03300, section "From PPO to GRPO". Two bounds: DAPO, arXiv:2503.14476, section
        "Raise the Ceiling: Clip-Higher". Dual clip: Ye et al., arXiv:1912.09729, section "Dual-clip PPO".
    """
    decided = log_ratio.detach()
    too_high = (advantages > 0) & (decided > math.log1p(clip_high))
    too_low = (advantages < 0) & (decided < math.log1p(-clip_low))
    bounded = too_high | too_low
    if dual_clip is not None:
        bounded = bounded | ((advantages < 0) & (decided > math.log(dual_clip)))
    ratio = torch.where(bounded | (advantages == 0), 0.0, log_ratio).exp()
    if dual_clip is not None:
        ratio = torch.where(bounded & (advantages < 0), dual_clip, ratio)
    ratio = torch.where(too_high, 1.0 + clip_high, torch.where(too_low, 1.0 - clip_low, ratio))
    return ratio * advantages, bounded
