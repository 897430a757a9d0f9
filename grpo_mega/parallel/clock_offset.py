"""Measures the offset between the monotonic clocks of the ranks, which differ from machine to machine.

A rank sends a message to the first rank, which answers with its clock. Half of the round trip bounds the error, so the
shortest of several round trips counts.
Asserted by tests/parallel/test_trace_of_ranks.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

_ROUND_TRIPS = 8


@dataclass(frozen=True)
class ClockOffset:
    """Offset of a rank's clock.

    Attributes:
        offset_ns: nanoseconds to add to the rank's monotonic clock to get that of the first rank.
        uncertainty_ns: largest error, half of the shortest round trip.
    """

    offset_ns: int = 0
    uncertainty_ns: int = 0


def measure_clock_offset(group: dist.ProcessGroup, clock: Callable[[], int] = time.monotonic_ns) -> ClockOffset:
    """Return the offset of this rank's clock from that of the first rank of the group. Collective.

    The ranks are measured one after the other, in about a millisecond each.

    Args:
        group: ranks that can exchange tensors in host memory.
        clock: clock of this rank in nanoseconds.
    """
    rank, message = group.rank(), torch.zeros(1, dtype=torch.int64)
    if rank == 0:
        for other in range(1, group.size()):
            for _ in range(_ROUND_TRIPS):
                dist.recv(message, group=group, group_src=other)
                message[0] = clock()
                dist.send(message, group=group, group_dst=other)
        return ClockOffset()
    found: list[ClockOffset] = []
    for _ in range(_ROUND_TRIPS):
        start = clock()
        dist.send(message, group=group, group_dst=0)
        dist.recv(message, group=group, group_src=0)
        end = clock()
        found.append(ClockOffset(int(message) - (start + end) // 2, (end - start + 1) // 2))
    return min(found, key=lambda each: each.uncertainty_ns)
