"""The pool of ranks is started once for many calls and does not hang when a rank fails, exits or stops responding."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import RankPool


def summed_ranks(rank: int, factor: int) -> tuple[int, int]:
    value = torch.tensor(rank * factor)
    dist.all_reduce(value)
    return int(value), os.getpid()


def fail_on_rank_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("one is odd")
    dist.barrier()  # waits for rank 1


def die_on_rank_one(rank: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.barrier()


def sleep_on_rank_zero(rank: int) -> None:
    if rank == 0:
        time.sleep(60)


def groups_left_over(_: int) -> bool:
    from megatron.core import parallel_state

    return parallel_state.model_parallel_is_initialized()


def test_calls_of_any_world_size_reuse_the_same_processes_with_fresh_groups(rank_pool: RankPool) -> None:
    two = rank_pool.call(2, summed_ranks, 10)
    three = rank_pool.call(3, summed_ranks, 10)
    assert [total for total, _ in two] == [10, 10]
    assert [total for total, _ in three] == [30, 30, 30]
    assert [pid for _, pid in three[:2]] == [pid for _, pid in two]
    assert os.getpid() not in {pid for _, pid in three}
    assert rank_pool.call(2, groups_left_over) == [False, False]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fail_on_rank_one, r"rank 1 of 2:(.|\n)*ValueError: one is odd"),
        (die_on_rank_one, "rank 1 of 2:\nended with exit code 7"),
    ],
)
def test_a_failing_or_dying_rank_is_named_and_the_others_do_not_wait_for_it(
    rank_pool: RankPool, function: object, message: str
) -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match=message):
        rank_pool.call(2, function)  # type: ignore[arg-type]
    assert time.monotonic() - start < 20
    assert [total for total, _ in rank_pool.call(2, summed_ranks, 1)] == [1, 1]


def test_a_rank_that_does_not_answer_is_named_after_the_timeout(rank_pool: RankPool) -> None:
    rank_pool.call(2, summed_ranks, 1)
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 2"):
        rank_pool.call(2, sleep_on_rank_zero, timeout_seconds=5.0)


def test_the_process_of_pytest_joins_no_process_group(rank_pool: RankPool) -> None:
    rank_pool.call(1, summed_ranks, 1)
    assert not dist.is_initialized()
