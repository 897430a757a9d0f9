"""The clipped ratio of a whole sequence (GSPO), in its form per token."""

from __future__ import annotations

from torch import Tensor

from grpo_mega.algorithm.base import surrogate
from grpo_mega.algorithm.rollout_sums import Segments
from grpo_mega.algorithm.surrogates.clipped_ratio import clipped_ratio


@surrogate
def clipped_sequence_ratio(
    log_probs: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the clipped ratio with s_t = sg[s] * ratio_t / sg[ratio_t] in place of ratio_t, s = exp(mean log_ratio).

    The mean is over the loss tokens of the rollout, and sg stops the gradient: s_t has the value of the sequence's
    ratio and the gradient of the token's own ratio. If the tokens of a rollout share one advantage and one weight,
    value and gradient equal those of the sequence form min(s * A, clamp(s) * A). Shapes and bounds are those of
    `clipped_ratio`, the positional arguments are those of `Surrogate`.

    Source: GSPO, arXiv:2507.18071, section "GSPO-token: A Token-level Objective Variant".
    """
    mean = segments.spread(segments.mean(log_ratio), log_ratio.dtype)
    token_form = mean + (log_ratio - log_ratio.detach())
    return clipped_ratio(
        log_probs, token_form, advantages, segments, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )
