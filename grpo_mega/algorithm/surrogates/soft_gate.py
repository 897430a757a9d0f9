"""The sigmoid gate on the ratio (SAPO)."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_mega.algorithm.base import surrogate
from grpo_mega.algorithm.rollout_sums import Segments


@surrogate
def soft_gate(
    log_probs: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    gate_positive: float,
    gate_negative: float,
) -> tuple[Tensor, Tensor]:
    """Return A * (4 / tau) * sigmoid(tau * (ratio - 1)), [T], and all False, [T]: no token is bounded.

    tau = gate_positive if A > 0, else gate_negative; both are > 0 and have no unit. The positional
    arguments are those of `Surrogate`.

    Source: SAPO, arXiv:2511.20347, the objective of section "Soft Adaptive Policy Optimization".
    """
    tau = torch.where(advantages > 0, gate_positive, gate_negative).to(log_ratio.dtype)
    # sigmoid is flat far below a ratio of exp(20): with this bound exp cannot overflow into 0 * inf
    ratio = log_ratio.clamp(max=20.0).exp()
    gated = 4.0 / tau * torch.sigmoid(tau * (ratio - 1.0)) * advantages
    return gated, torch.zeros_like(advantages, dtype=torch.bool)
