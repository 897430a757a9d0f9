"""A reward whose module keeps offloaded state on a host in copies, as on CUDA, instead of moving its memory."""

from __future__ import annotations

from grpo_mega.policy import phase_offload
from grpo_mega.policy.host_memory import CopiedMemory
from grpo_mega.rewards.base import reward

phase_offload.host_memory = CopiedMemory  # type: ignore[assignment]


@reward(low=0.0, high=1.0)
def digits(prompt: str, completion: str, reference: str) -> float:
    """Return the fraction of the characters that are digits."""
    del prompt, reference
    return sum(c.isdigit() for c in completion) / max(1, len(completion))
