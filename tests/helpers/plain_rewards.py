"""Rewards that a random model earns sometimes."""

from __future__ import annotations

from grpo_mega.rewards import reward


@reward(low=0.0, high=1.0)
def digits(prompt: str, completion: str, reference: str) -> float:
    """Share of the characters that are digits."""
    return sum(c.isdigit() for c in completion) / max(1, len(completion))
