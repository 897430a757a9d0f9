"""Adaptive KL coefficient. Pure; the only state is the coefficient, which is part of a checkpoint."""

from __future__ import annotations

_GAIN = 0.1
_MAX_ERROR = 0.2  # bound of the relative error, which limits the change per step to 2 %


def adapted_kl_coef(kl_coef: float, *, kl: float, target: float) -> float:
    """Return kl_coef * (1 + 0.1 * clamp((kl - target) / target, -0.2, 0.2)).

    Args:
        kl_coef: coefficient of the completed step.
        kl: mean KL divergence of that step, in nats per token.
        target: target of the KL divergence, > 0, in nats per token.

    Returns:
        The coefficient of the next step.

    Source: Ziegler et al., "Fine-Tuning Language Models from Human Preferences", arXiv:1909.08593, the proportional
        controller of the KL coefficient. Differs: KL per token instead of per completion.
    """
    error = (kl - target) / target
    return kl_coef * (1.0 + _GAIN * min(max(error, -_MAX_ERROR), _MAX_ERROR))
