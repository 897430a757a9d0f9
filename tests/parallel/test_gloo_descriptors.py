"""Formula of gloo's file descriptors: real ranks open as many for their groups, and Megatron creates those groups."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch.distributed as dist

from grpo_mega.parallel.gloo_descriptors import group_descriptors, megatron_groups
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.topology import Topology
from tests.parallel.conftest import Laboratory


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def descriptors_of_megatron(rank: int, topology: Topology) -> tuple[int, list[int]]:
    """Return how many descriptors Megatron's groups open on this rank, and the sizes of its groups."""
    import torch

    from grpo_mega.policy.build import init_groups

    known = dist.distributed_c10d._world.pg_map
    init_groups(
        Ranks(topology, topology.coordinates(rank), torch.device("cpu")), 60.0
    )  # ends the groups of other tests
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.barrier()
    others, before = set(known), open_descriptors()
    init_groups(Ranks(topology, topology.coordinates(rank), torch.device("cpu")), 60.0)
    dist.barrier()
    return open_descriptors() - before, [group.size() for group in known if group not in others]


@pytest.mark.parametrize(
    "topology", [Topology(4, tp=2, pp=2, engine_tp=2), Topology(4, cp=2, ep=2), Topology(2, tp=2)], ids=str
)
def test_megatron_opens_the_groups_and_the_descriptors_of_the_formula(
    laboratory: Laboratory, topology: Topology
) -> None:
    ranks = laboratory.pool.call(topology.world_size, descriptors_of_megatron, topology)
    assert Counter(ranks[0][1]) == Counter(megatron_groups(topology))
    for found, sizes in ranks:  # later pipeline stages have no group of the position embedding
        assert Counter(sizes) <= Counter(megatron_groups(topology))
        assert found == group_descriptors(sizes)
