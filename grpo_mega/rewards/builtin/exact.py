"""Reward `exact`: the completion equals the answer, except for white space at both ends."""

from __future__ import annotations

from grpo_mega.rewards.base import reward


@reward(low=0.0, high=1.0)
def exact(prompt: str, completion: str, reference: str) -> float:
    """Return 1 when `completion` and `reference` are equal after stripping white space from both ends, else 0."""
    return float(completion.strip() == reference.strip())
