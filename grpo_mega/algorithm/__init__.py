"""What is optimised: advantages, loss per token, KL, aggregation. Imports only torch, `types` and `interfaces`."""

from __future__ import annotations

from grpo_mega.algorithm.grpo import GrpoLoss
from grpo_mega.interfaces import TokenLoss
from grpo_mega.types import UserError


def make_loss(name: str, *, kl_coef: float, clip_low: float, clip_high: float) -> TokenLoss:
    """The loss of `algorithm.name`.

    Raises:
        UserError: unknown name.
    """
    if name == "grpo":
        return GrpoLoss(clip_low=clip_low, clip_high=clip_high, kl_coef=kl_coef)
    raise UserError(f"algorithm.name={name!r} is not a known algorithm; use 'grpo'")
