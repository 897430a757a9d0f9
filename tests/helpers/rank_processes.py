"""Rank processes and their answers, shared by the pools of ranks (ranks.py, engine_ranks.py)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

_GRACE_SECONDS = 1.0  # after a failure, for answers of other ranks


@dataclass(frozen=True)
class RankProcess:
    """A rank process and the connection on which it answers (failed, result or traceback)."""

    process: BaseProcess
    connection: Connection


@dataclass(frozen=True)
class Answers:
    """Results by rank; tracebacks or exit codes of failed ranks; and the ranks that did not answer in time."""

    results: dict[int, Any]
    failures: dict[int, str]
    silent: list[int]


def collect_answers(ranks: Sequence[RankProcess], timeout_seconds: float) -> Answers:
    """Collect one answer of each rank. After the first failure the others have one more second."""
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


def end_ranks(ranks: Sequence[RankProcess], *, kill: bool) -> None:
    """End the ranks: close their connections, or kill them."""
    for rank in ranks:
        rank.connection.close()
        if kill:
            rank.process.kill()
    for rank in ranks:
        rank.process.join(10)
        if rank.process.is_alive():
            rank.process.kill()
            rank.process.join()
