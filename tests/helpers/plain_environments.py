"""Environments that a random model meets sometimes."""

from __future__ import annotations

import time
from collections.abc import Sequence

from grpo_mega.environments import Turn, environment


@environment(stop=("1", "2", "3"))
def asks_on(prompt: str, turns: Sequence[Turn], reference: str, pause: float = 0.0) -> str | None:
    """Asks on after an answer that ends with 1 or 2; takes its time over a 2."""
    if turns[-1].answer.endswith("2"):
        time.sleep(pause)
    return "+" if turns[-1].answer.endswith(("1", "2")) else None
