"""The plain policy gradient (REINFORCE)."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_mega.algorithm.base import surrogate
from grpo_mega.algorithm.rollout_sums import Segments


@surrogate
def policy_gradient(
    log_probs: Tensor, log_ratio: Tensor, advantages: Tensor, segments: Segments
) -> tuple[Tensor, Tensor]:
    """Return A * log_probs, [T], and all False, [T]. The old policy is not used.

    The positional arguments are those of `Surrogate`.

    Source: Back to Basics, arXiv:2402.14740, section "REINFORCE".
    """
    return advantages * log_probs, torch.zeros_like(advantages, dtype=torch.bool)
