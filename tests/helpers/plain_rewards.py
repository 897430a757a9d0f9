"""A reward that is not constant for a random model."""

from __future__ import annotations

from grpo_mega.rewards import reward


@reward(low=0.0, high=1.0)
def digits(prompt: str, completion: str, reference: str) -> float:
    """Return the fraction of the characters that are digits."""
    return sum(c.isdigit() for c in completion) / max(1, len(completion))
