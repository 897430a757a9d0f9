"""Groups of rollouts with random lengths and rewards, whose tokens say where they come from."""

from __future__ import annotations

import random

from grpo_mega.types import Completion, Prompt, Reward, Rollout
from tests.helpers.recorded_rollouts import RolloutGroups

GROUP = 4
"""Rollouts of a group."""


def random_groups(num_groups: int, seed: int = 0) -> tuple[RolloutGroups, list[float]]:
    """Return rollouts in which the completion of rollout i has the tokens from 100 i on, of 2 to 40 tokens."""
    rng = random.Random(seed)
    rollouts = []
    for i in range(num_groups * GROUP):
        length, completion = rng.randrange(1, 9), rng.randrange(1, 33)
        if i % GROUP == 0:
            prompt = Prompt(i // GROUP, "", tuple(range(length)), "")
        ids = range(100 * i, 100 * i + completion)
        rollouts.append(
            Rollout(
                prompt,
                Completion(tuple(ids), tuple(-0.001 * t for t in ids), "eos", 0, ""),
                Reward(rng.random()),
                replica=0,
            )
        )
    return RolloutGroups(rollouts, GROUP), [r.reward.value for r in rollouts]
