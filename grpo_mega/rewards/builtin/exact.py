"""Reward `exact`: the completion is the answer, character by character, but for white space at its ends."""

from __future__ import annotations

from grpo_mega.rewards.base import reward


@reward(low=0.0, high=1.0)
def exact(prompt: str, completion: str, reference: str) -> float:
    """1 when `completion` and `reference` are equal after stripping white space from both ends, else 0."""
    return float(completion.strip() == reference.strip())
