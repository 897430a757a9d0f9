"""Processes of ranks and what they answer: what the pools of ranks (ranks.py, engine_ranks.py) have in common."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

_GRACE_SECONDS = 1.0  # after a failure, for other ranks to say theirs


@dataclass(frozen=True)
class RankProcess:
    """A rank and this end of its connection, on which it answers (failed, result or traceback)."""

    process: BaseProcess
    connection: Connection


@dataclass(frozen=True)
class Answers:
    """By rank: what was returned, and what was raised or how a rank ended; `silent` said nothing in time."""

    results: dict[int, Any]
    failures: dict[int, str]
    silent: list[int]


def collect(ranks: Sequence[RankProcess], timeout_seconds: float) -> Answers:
    """One answer of each rank; after the first failure the others have a second more."""
    waiting = {member.connection: rank for rank, member in enumerate(ranks)}
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    end = time.monotonic() + timeout_seconds
    while waiting and (left := end - time.monotonic()) > 0:
        for ready in wait(list(waiting), left):
            assert isinstance(ready, Connection)
            rank = waiting.pop(ready)
            try:
                failed, answer = ready.recv()
            except EOFError:
                ranks[rank].process.join(5)
                failed, answer = True, f"ended with exit code {ranks[rank].process.exitcode}"
            if failed:
                failures[rank] = answer
                end = min(end, time.monotonic() + _GRACE_SECONDS)
            else:
                results[rank] = answer
    return Answers(results, failures, sorted(waiting.values()))


def end(ranks: Sequence[RankProcess], *, kill: bool) -> None:
    """They leave when their connection closes, or are killed."""
    for rank in ranks:
        rank.connection.close()
        if kill:
            rank.process.kill()
    for rank in ranks:
        rank.process.join(10)
        if rank.process.is_alive():
            rank.process.kill()
            rank.process.join()
