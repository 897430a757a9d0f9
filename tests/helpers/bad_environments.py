"""Environments whose failure is chosen by the answer of the policy."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from grpo_mega.environments import Turn, environment


@environment(stop=("!",))
def obeys(prompt: str, turns: Sequence[Turn], reference: str, shout: bool = False) -> object:
    """Fail or reply as the last answer requests."""
    answer = turns[-1].answer
    if answer.startswith("hang"):
        time.sleep(60.0)
    if answer.startswith("crash"):
        os._exit(7)
    if answer.startswith("raise"):
        raise LookupError("as asked")
    if answer.startswith("number"):
        return 7
    if answer.startswith("told"):
        return turns[-1].stop_text
    if answer.startswith("write"):
        os.write(int(sys.argv[1]), answer.removeprefix("write ").encode() + b"\n")
    if answer.startswith("over"):
        return None
    if answer.startswith("slow"):
        time.sleep(0.3)
    reply = f"{prompt}|{reference}|{';'.join(f'{turn.answer}>{turn.result}' for turn in turns)}"
    return reply.upper() if shout else reply


def undeclared(prompt: str, turns: Sequence[Turn], reference: str) -> None:
    """Return nothing; the function has no declaration."""
