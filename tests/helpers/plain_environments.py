"""An environment whose stop texts a random model samples often."""

from __future__ import annotations

import time
from collections.abc import Sequence

from grpo_mega.environments import Turn, environment


@environment(stop=("1", "2", "3"))
def asks_on(prompt: str, turns: Sequence[Turn], reference: str, pause: float = 0.0) -> str | None:
    """Reply `+` to an answer that ends with 1 or 2, after `pause` seconds for a 2; else end the rollout."""
    if turns[-1].answer.endswith("2"):
        time.sleep(pause)
    return "+" if turns[-1].answer.endswith(("1", "2")) else None
