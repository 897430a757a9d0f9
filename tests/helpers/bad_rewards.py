"""Rewards that fail for some prompts."""

from __future__ import annotations

import os
import time

from grpo_mega.rewards.base import reward

FLOOR = -1.0


def _first_digit(prompt: str) -> int:
    return int(prompt[0])


def fails_for(prompt: str) -> str | None:
    """Return the name of the reward that fails for this prompt, or None."""
    return {3: "crashes", 5: "sleeps"}.get(_first_digit(prompt))


@reward(low=FLOOR, high=1.0)
def crashes(prompt: str, completion: str, reference: str) -> float:
    """Exit the process for prompts that begin with 3, else return 1."""
    if fails_for(prompt) == "crashes":
        os._exit(7)
    return 1.0


@reward(low=FLOOR, high=1.0)
def sleeps(prompt: str, completion: str, reference: str) -> float:
    """Sleep past every limit for prompts that begin with 5, else return 1."""
    if fails_for(prompt) == "sleeps":
        time.sleep(60.0)
    return 1.0
