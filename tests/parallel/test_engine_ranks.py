"""The ranks of an engine beside them: all hear what the first one is told, the failure of its engine included."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from grpo_mega.engines.replica_broadcast import ReplicaBroadcast
from grpo_mega.types import UserError
from tests.helpers.ranks import RankPool


def told(rank: int, fails: bool) -> Iterator[str | None]:
    if rank % 2:
        raise AssertionError("only the first rank of an engine is asked")
    yield f"part of {rank}"
    yield None  # a sign of life
    if fails and rank == 2:
        raise RuntimeError("SGLang has ended")
    yield f"end of {rank}"


def hear(rank: int, fails: bool) -> tuple[list[str], str, int, bool]:
    ranks = ReplicaBroadcast(2, 60.0)
    heard: list[str] = []
    error = ""
    try:
        heard.extend(ranks.broadcast_stream(told(rank, fails)))
    except RuntimeError as caught:
        error = str(caught)
    return heard, error, ranks.number, ranks.is_first


def test_every_rank_hears_its_own_engine_and_nobody_else_fails_with_it(rank_pool: RankPool) -> None:
    well = rank_pool.call(4, hear, False)
    assert [found[0] for found in well] == [[f"part of {r}", f"end of {r}"] for r in (0, 0, 2, 2)]
    assert [found[2:] for found in well] == [(0, True), (1, False)] * 2
    ill = rank_pool.call(4, hear, True)
    assert ill[:2] == well[:2]
    assert [found[:2] for found in ill[2:]] == [(["part of 2"], "SGLang has ended")] * 2


def slow(rank: int, beat_seconds: float) -> Iterator[str | None]:
    for _ in range(5):
        time.sleep(beat_seconds)
        yield None
    yield "sampled"


def waits_longer_than_a_collective(_: int) -> tuple[list[str], float]:
    ranks = ReplicaBroadcast(2, 4.0)
    return list(ranks.broadcast_stream(slow(dist.get_rank(), 0.1))), ranks.beat_seconds


def test_beats_are_shorter_than_the_limit_and_are_not_heard(rank_pool: RankPool) -> None:
    assert rank_pool.call(2, waits_longer_than_a_collective) == [(["sampled"], 1.0)] * 2


def not_divided(_: int) -> str:
    with pytest.raises(UserError) as caught:
        ReplicaBroadcast(2, 60.0)
    return str(caught.value)


def test_a_world_that_is_no_multiple_of_engine_tp_is_refused(rank_pool: RankPool) -> None:
    message = "engine.tp=2 does not divide the 3 ranks of the job; use a divisor of the number of ranks"
    assert rank_pool.call(3, not_divided) == [message] * 3


def gathered(rank: int, tp: int) -> list[str]:
    return ReplicaBroadcast(tp, 60.0).gather(f"of {rank}")


def test_ranks_of_an_engine_and_only_they_know_of_each_other(rank_pool: RankPool) -> None:
    assert rank_pool.call(4, gathered, 2) == [["of 0", "of 1"]] * 2 + [["of 2", "of 3"]] * 2
    assert rank_pool.call(2, gathered, 1) == [["of 0"], ["of 1"]]
