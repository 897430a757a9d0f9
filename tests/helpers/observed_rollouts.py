"""A rollout for tests of what a run writes and shows."""

from __future__ import annotations

from grpo_mega.types import Completion, Prompt, Reward, Rollout


def make_rollout(reward: float = 1.0, text: str = "46") -> Rollout:
    """Return a rollout of prompt 7 with 3 tokens."""
    return Rollout(
        prompt=Prompt(index=7, text="12+34=", token_ids=(1, 2), answer="46"),
        completion=Completion((4, 6, 0), (-0.5, -0.25, -0.125), "eos", 3, text),
        reward=Reward(reward, {"exact": reward}, ("format",)),
        replica=1,
    )
