"""A rollout for tests of what a run writes and shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from grpo_mega.observe.rollout_files.columns import RolloutColumns
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.trainer.rollout_parts import shard_columns
from grpo_mega.types import Completion, Prompt, Reward, Rollout
from tests.helpers.token_values import token_values


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
    groups = SampledGroups.of(rollouts, group_size)
    known = {i: list(old) for i, old in enumerate(old_log_probs or ()) if old is not None}
    olds = replace(token_values(list(known.values())), ids=np.array(list(known), dtype=np.int64))
    return shard_columns(4, groups, np.array(advantages), olds)
