"""Per-token estimators of the KL divergence of policy and reference, from tokens that the policy sampled. Pure.

Asserted by tests/unit/algorithm/test_kl.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3"]

MAX_REPORTED_LOG_RATIO = 40.0
"""Metrics take the exp of a log-ratio of at most this many nats: exp(40) = 2.4e17, and a float32 holds the sum over
1e21 tokens. A larger ratio says no more than that the two log-probs do not belong together."""


def k1(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Return log_probs - ref_log_probs, an unbiased estimate of KL(policy || reference) that can be negative.

    In a loss its gradient does not depend on the reference and is zero in expectation, so k1 belongs in the reward.

    Args:
        log_probs: [T], nats.
        ref_log_probs: [T], nats.

    Returns:
        [T].

    Source: Schulman, "Approximating KL Divergence", 2020, the estimator k1.
    """
    return log_probs - ref_log_probs


def k2(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Return (log_probs - ref_log_probs)^2 / 2, a biased, non-negative estimate with low variance.

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
    """Return exp(d) - d - 1 with d = ref_log_probs - log_probs, an unbiased, non-negative estimate of the divergence.

    The code is expm1(d) - d, because exp(d) - 1 loses small divergences to rounding and could become negative. The
    gradient with respect to `log_probs` is 1 - exp(d). A d above 88 overflows float32 to inf.

    Args:
        log_probs: [T], nats, with gradient.
        ref_log_probs: [T], nats.

    Returns:
        [T], >= 0, and 0 where both are equal.

    Source: DeepSeekMath, arXiv:2402.03300, equation 4.
    """
    difference = ref_log_probs - log_probs
    return torch.expm1(difference) - difference


KL_ESTIMATORS: Mapping[KlEstimator, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
