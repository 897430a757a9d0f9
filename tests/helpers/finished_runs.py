"""A finished run that several end-to-end tests examine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.helpers.jobs import FinishedCommand

QUICKSTART_STEPS = 15


@dataclass(frozen=True)
class Run:
    """A finished command, its arguments and its folder."""

    arguments: tuple[str, ...]
    folder: Path
    ended: FinishedCommand
