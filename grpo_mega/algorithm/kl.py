"""Per-token estimators of the KL divergence between policy and reference. Pure."""

from __future__ import annotations

import torch
from torch import Tensor


def k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Unbiased, non-negative estimate of KL(policy || reference): exp(d) - d - 1 with d = ref_log_probs - log_probs.

    Written as expm1(d) - d, because exp(d) - 1 would round away small divergences and could turn negative. The gradient
    with respect to `log_probs` is 1 - exp(d). d above 88 overflows float32 to inf, as the formula does.

    Args:
        log_probs: [T], nats, with gradient.
        ref_log_probs: [T], nats.

    Returns:
        [T], >= 0, and 0 where both agree.

    Source: DeepSeekMath, arXiv:2402.03300, equation 4.
    """
    difference = ref_log_probs - log_probs
    return torch.expm1(difference) - difference
