"""Environments that misbehave, by what the policy says."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from grpo_mega.environments import Turn, environment


@environment(stop=("!",))
def obeys(prompt: str, turns: Sequence[Turn], reference: str, shout: bool = False) -> object:
    """Does what the last answer asks for."""
    answer = turns[-1].answer
    if answer.startswith("hang"):
        time.sleep(60.0)
    if answer.startswith("crash"):
        os._exit(7)
    if answer.startswith("raise"):
        raise LookupError("as asked")
    if answer.startswith("number"):
        return 7
    if answer.startswith("over"):
        return None
    if answer.startswith("slow"):
        time.sleep(0.3)
    said = f"{prompt}|{reference}|{';'.join(f'{turn.answer}>{turn.result}' for turn in turns)}"
    return said.upper() if shout else said


def undeclared(prompt: str, turns: Sequence[Turn], reference: str) -> None:
    """Lacks the declaration."""
