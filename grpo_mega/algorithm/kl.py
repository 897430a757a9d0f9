"""Per-token estimators of the KL divergence between policy and reference, from tokens that the policy sampled. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3"]


def k1(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Unbiased estimate of KL(policy || reference), of either sign: log_probs - ref_log_probs.

    In a loss its gradient does not depend on the reference, and is zero in expectation: k1 belongs into the reward.

    Args:
        log_probs: [T], nats.
        ref_log_probs: [T], nats.

    Returns:
        [T].

    Source: Schulman, "Approximating KL Divergence", 2020, the estimator k1.
    """
    return log_probs - ref_log_probs


def k2(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Biased, non-negative estimate with low variance: (log_probs - ref_log_probs)^2 / 2.

    Its gradient, (log_probs - ref_log_probs) * grad log_probs, is that of the KL divergence in expectation.

    Args:
        log_probs: [T], nats, with gradient.
        ref_log_probs: [T], nats.

    Returns:
        [T], >= 0.

    Source: Schulman, "Approximating KL Divergence", 2020, the estimator k2.
    """
    return (log_probs - ref_log_probs).square() / 2


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


KL_ESTIMATORS: Mapping[KlEstimator, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
