"""Clocks and collectives of real ranks, as the trace of a run records them."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from grpo_mega.parallel.clock_offset import ClockOffset, measure_clock_offset
from grpo_mega.parallel.collective_spans import recording_collectives
from tests.parallel.conftest import Laboratory

AHEAD_NS = 5_000_000_000


def measure(rank: int) -> ClockOffset:
    group = dist.group.WORLD
    assert group is not None
    return measure_clock_offset(group, lambda: time.monotonic_ns() + rank * AHEAD_NS)


def test_the_offset_of_a_clock_is_measured_to_half_a_round_trip(laboratory: Laboratory) -> None:
    first, *others = laboratory.pool.call(3, measure)
    assert first == ClockOffset()
    for rank, found in enumerate(others, start=1):
        assert 0 < found.uncertainty_ns < AHEAD_NS // 10
        assert abs(found.offset_ns + rank * AHEAD_NS) <= found.uncertainty_ns + 1  # one clock for all ranks here


def record_collectives(rank: int) -> list[tuple[str, int, dict[str, Any]]]:
    found: list[tuple[str, int, dict[str, Any]]] = []

    def record(name: str, category: str, start_ns: int, end_ns: int, args: dict[str, Any]) -> None:
        assert category == "collective"
        found.append((name, end_ns - start_ns, args))

    values = torch.ones(8)
    with recording_collectives(record):
        if rank == 1:
            time.sleep(0.3)
        dist.all_reduce(values)
        work = dist.all_reduce(values, async_op=True)
        assert work is not None
        waiting = threading.Thread(target=work.wait)
        waiting.start()
        waiting.join()
        if rank == 0:
            dist.send(values, 1)
        else:
            dist.recv(values, 0)
    dist.all_reduce(values)  # not recorded
    return found


def test_collectives_are_recorded_with_the_time_that_a_rank_waits(laboratory: Laboratory) -> None:
    for rank, found in enumerate(laboratory.pool.call(2, record_collectives)):
        message = "send" if rank == 0 else "recv"
        names = [name for name, _, _ in found]
        assert names == ["allreduce", "wait allreduce", "allreduce", "wait allreduce", message, f"wait {message}"]
        assert found[0][2] == {"ranks": 2, "bytes": 32}
        waited = found[0][1] + found[1][1]
        assert (waited > 0.2e9) == (rank == 0)
