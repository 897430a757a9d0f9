"""The form of a rule of an alarm (alarms.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from grpo_mega.observe.history import History


@dataclass(frozen=True)
class Found:
    """The value that passes a limit, and a text with both."""

    value: float
    limit: float
    text: str


@dataclass(frozen=True)
class AlarmRule:
    """One rule: `check` returns what it found at the last step of the history, or None.

    Attributes:
        patience: steps in succession in which the condition must hold.
        look_at: what to look at first.
    """

    name: str
    patience: int
    look_at: str
    check: Callable[[History], Found | None]
