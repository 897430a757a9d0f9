"""A rollout for tests of what a run writes and shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grpo_mega.observe.rollout_files.columns import RolloutColumns
from grpo_mega.trainer.rollout_parts import rollout_columns
from grpo_mega.types import Completion, Prompt, Reward, Rollout


def make_rollout(reward: float = 1.0, text: str = "46") -> Rollout:
    """Return a rollout of prompt 7 with 3 tokens."""
    return Rollout(
        prompt=Prompt(index=7, text="12+34=", token_ids=(1, 2), answer="46"),
        completion=Completion((4, 6, 0), (-0.5, -0.25, -0.125), "eos", 3, text),
        reward=Reward(reward, {"exact": reward}, ("format",)),
        replica=1,
    )


def columns_of_rollouts(
    rollouts: Sequence[Rollout],
    advantages: Sequence[float],
    old_log_probs: Sequence[Sequence[float] | None] | None = None,
    *,
    group_size: int = 1,
) -> RolloutColumns:
    """Return rollouts of step 4 as the columns that a run writes and shows."""
    positions = np.arange(len(rollouts), dtype=np.int32)
    olds = [None] * len(rollouts) if old_log_probs is None else old_log_probs
    return rollout_columns(4, rollouts, positions, group_size, advantages, olds)
