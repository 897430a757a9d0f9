"""Threads of Adam on the host (`optimizer.host_fraction`): all cores of a node for the time of an optimizer step.

A rank computes with OMP_NUM_THREADS=1 (launch/env.sh). Its device waits while the host updates weights, so each rank
then takes its share of the node's cores. Adam gives the same bits with any number of threads: it is elementwise, and
torch splits a tensor at multiples of 64 bytes (aten/src/ATen/native/cpu/FusedAdamKernel.cpp).
Asserted by tests/unit/policy/test_host_threads.py.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction

import torch
import torch.distributed as dist

from grpo_mega.parallel.ranks import Ranks


def host_threads(ranks: Ranks) -> int:
    """Return the threads of this rank: its share of the cores that the ranks of its node may use. Collective.

    A core is usable if the process may be scheduled on it; the CPU quota of a cgroup is not read.
    """
    world_size = ranks.topology.world_size
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    usable: list[set[int]] = [os.sched_getaffinity(0)] * world_size
    if world_size > 1:
        dist.all_gather_object(usable, os.sched_getaffinity(0))
    node, at = divmod(ranks.rank, per_node)
    return share_of_cores(usable[node * per_node : (node + 1) * per_node], at)


def share_of_cores(usable: Sequence[Collection[int]], at: int) -> int:
    """Return the cores of process number `at`, at least 1: a core that n processes may use counts 1/n.

    Args:
        usable: the cores that each process of a node may use. A launcher may bind each process to cores of its own.
        at: index of the process.
    """
    sharers = Counter(core for cores in usable for core in cores)
    return max(1, int(sum(Fraction(1, sharers[core]) for core in usable[at])))


@contextmanager
def intra_op_threads(number: int | None) -> Iterator[None]:
    """Let operators that this thread calls inside the block use `number` threads. None: as many as before."""
    if number is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
