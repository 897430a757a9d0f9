"""`ReplicaBroadcast`: all ranks of a replica receive the values, and the failure, of the first rank's iterator."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from grpo_mega.engines.replica_broadcast import ReplicaBroadcast
from grpo_mega.types import UserError
from tests.helpers.ranks import RankPool


def yield_values(rank: int, fails: bool) -> Iterator[str | None]:
    if rank % 2:
        raise AssertionError("only the first rank of a replica reads its iterator")
    yield f"part of {rank}"
    yield None  # a heartbeat
    if fails and rank == 2:
        raise RuntimeError("SGLang exited")
    yield f"end of {rank}"


def receive_values(rank: int, fails: bool) -> tuple[list[str], str, int, bool]:
    ranks = ReplicaBroadcast(2, 60.0)
    received: list[str] = []
    error = ""
    try:
        received.extend(ranks.broadcast_stream(yield_values(rank, fails)))
    except RuntimeError as caught:
        error = str(caught)
    return received, error, ranks.number, ranks.is_first


def test_every_rank_receives_the_values_and_the_failure_of_its_own_replica_only(rank_pool: RankPool) -> None:
    successful = rank_pool.call(4, receive_values, False)
    assert [found[0] for found in successful] == [[f"part of {r}", f"end of {r}"] for r in (0, 0, 2, 2)]
    assert [found[2:] for found in successful] == [(0, True), (1, False)] * 2
    failing = rank_pool.call(4, receive_values, True)
    assert failing[:2] == successful[:2]
    assert [found[:2] for found in failing[2:]] == [(["part of 2"], "SGLang exited")] * 2


def yield_slowly(rank: int, beat_seconds: float) -> Iterator[str | None]:
    for _ in range(5):
        time.sleep(beat_seconds)
        yield None
    yield "sampled"


def iterate_longer_than_the_timeout(_: int) -> tuple[list[str], float]:
    ranks = ReplicaBroadcast(2, 4.0)
    return list(ranks.broadcast_stream(yield_slowly(dist.get_rank(), 0.1))), ranks.beat_seconds


def test_heartbeats_are_shorter_than_the_timeout_and_are_not_returned(rank_pool: RankPool) -> None:
    assert rank_pool.call(2, iterate_longer_than_the_timeout) == [(["sampled"], 1.0)] * 2


def construct_with_wrong_tp(_: int) -> str:
    with pytest.raises(UserError) as caught:
        ReplicaBroadcast(2, 60.0)
    return str(caught.value)


def test_a_world_size_that_engine_tp_does_not_divide_is_rejected(rank_pool: RankPool) -> None:
    message = "engine.tp=2 does not divide the 3 ranks of the job; use a divisor of the number of ranks"
    assert rank_pool.call(3, construct_with_wrong_tp) == [message] * 3


def gather_values(rank: int, tp: int) -> list[str]:
    return ReplicaBroadcast(tp, 60.0).gather(f"of {rank}")


def test_gather_returns_the_values_of_one_replica(rank_pool: RankPool) -> None:
    assert rank_pool.call(4, gather_values, 2) == [["of 0", "of 1"]] * 2 + [["of 2", "of 3"]] * 2
    assert rank_pool.call(2, gather_values, 1) == [["of 0"], ["of 1"]]
