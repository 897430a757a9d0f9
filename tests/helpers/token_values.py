"""Loss tokens of a few rollouts from nested lists."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grpo_mega.algorithm.base import OwnTokens
from grpo_mega.data.rollout_tokens import offsets_of
from grpo_mega.data.rollout_values import LossTokenValues
from grpo_mega.types import TokenValues


def token_values(rows: Sequence[Sequence[float]]) -> TokenValues:
    """Return the numbers of rollouts 0, 1, ... as float64."""
    counts = np.array([len(row) for row in rows], dtype=np.int64)
    return TokenValues(np.arange(len(rows)), offsets_of(counts), np.array([v for row in rows for v in row], np.float64))


def own_tokens(rows: Sequence[Sequence[int]]) -> OwnTokens:
    """Return loss tokens of rollouts 0, 1, ... from their positions in the completions."""
    positions = token_values(rows)
    return OwnTokens(positions.with_values(positions.values.astype(np.int64)))


def as_lists(values: LossTokenValues) -> list[list[float]]:
    """Return the numbers of each rollout."""
    return [part.tolist() for part in np.split(values.values, values.offsets[1:-1])]
