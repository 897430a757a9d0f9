"""Finished runs that several end-to-end tests examine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.helpers.jobs import SMALL, FinishedCommand

QUICKSTART_STEPS = 15
TWO_RANKS_STEPS = 5
TWO_RANKS = (
    *SMALL,
    "run.world_size=2",
    "engine.tp=1",
    f"train.steps={TWO_RANKS_STEPS}",
    "algorithm.kl_coef=0.01",
    "algorithm.kl_target=0.1",
    "checkpoint.every=1",
    "checkpoint.keep=4",
    "guard.timeout_seconds=120",
)
"""Two data-parallel ranks with one engine each, and an adaptive KL coefficient; the first checkpoint is not kept."""


@dataclass(frozen=True)
class Run:
    """A finished command, its arguments and its folder."""

    arguments: tuple[str, ...]
    folder: Path
    ended: FinishedCommand


@dataclass(frozen=True)
class ObservedRun:
    """A finished run with TWO_RANKS: its folder, and (program, address) of all sockets that listened during it."""

    folder: Path
    listeners: frozenset[tuple[str, str]]
