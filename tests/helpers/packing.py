"""Packing of a few rollouts that are given as objects, with advantages as nested lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from grpo_mega.data import pack as package
from grpo_mega.data.rollout_tokens import RolloutTokens
from grpo_mega.types import Microbatch, Rollout


def pack(
    rollouts: Sequence[tuple[int, Rollout]],
    *,
    advantages: Sequence[float | list[float]],
    token_weights: Sequence[float],
    **more: Any,
) -> Microbatch:
    """Pack rollouts; an advantage is a number for all loss tokens of its rollout, or one per loss token."""
    rows = [
        a if isinstance(a, list) else [a] * r.completion.num_loss_tokens
        for a, (_, r) in zip(advantages, rollouts, strict=True)
    ]
    flat = np.array([value for row in rows for value in row])
    return package.pack(RolloutTokens.of(rollouts), advantages=flat, token_weights=np.array(token_weights), **more)


def unpack(values: Tensor, microbatch: Microbatch) -> dict[int, list[float]]:
    """Return the values of the loss tokens of each rollout."""
    return package.unpack([values], [microbatch]).by_rollout()
