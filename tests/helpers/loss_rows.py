"""One packed row with hand-chosen log-probs for the tests of the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_mega.types import Microbatch


def make_row(
    advantages: Tensor,
    *,
    loss_mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    sampler_log_probs: Tensor | None = None,
    cu_seqlens: list[int] | None = None,
) -> Microbatch:
    """Return a microbatch of one segment, or of the segments of `cu_seqlens`; omitted values are zero."""
    length = len(advantages)
    tokens = torch.zeros(length, dtype=torch.int64)
    return Microbatch(
        rollout_ids=(0,),
        token_ids=tokens,
        position_ids=tokens,
        labels=tokens,
        loss_mask=torch.ones(length, dtype=torch.bool) if loss_mask is None else loss_mask,
        cu_seqlens=torch.tensor(cu_seqlens or [0, length], dtype=torch.int32),
        advantages=advantages,
        token_weights=torch.ones(length) if token_weights is None else token_weights,
        sampler_log_probs=torch.zeros(length) if sampler_log_probs is None else sampler_log_probs,
        old_log_probs=old_log_probs,
        ref_log_probs=ref_log_probs,
    )
