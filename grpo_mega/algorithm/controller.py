"""The adaptive KL coefficient. Pure; its only state is the coefficient, which is part of a checkpoint."""

from __future__ import annotations

_GAIN = 0.1
_MOST = 0.2  # error beyond which the coefficient moves no faster


def adapted_kl_coef(kl_coef: float, *, kl: float, target: float) -> float:
    """kl_coef * (1 + 0.1 * clamp((kl - target) / target, -0.2, 0.2)): larger while the policy is too far away.

    Args:
        kl_coef: the coefficient of the step that is over.
        kl: its mean KL, nats per token.
        target: > 0, nats per token.

    Source: Ziegler et al., "Fine-Tuning Language Models from Human Preferences", arXiv:1909.08593, the proportional
        controller of the KL coefficient. Differs: KL per token instead of per answer.
    """
    error = (kl - target) / target
    return kl_coef * (1.0 + _GAIN * min(max(error, -_MOST), _MOST))
