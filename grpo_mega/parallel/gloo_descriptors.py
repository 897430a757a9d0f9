"""File descriptors that gloo needs on one rank: the sizes of its groups, and what a group of that size opens.

Every rank of a gloo group keeps one socket to every other rank, one listening socket, one epoll and two pipes. Groups
of all ranks therefore decide the number: with NCCL, Megatron's own groups have no gloo
(policy/megatron_patches/fixes.py), and two groups of all ranks are left, the default group and vLLM's.
Asserted by tests/parallel/test_gloo_descriptors.py against the descriptors of real ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from grpo_mega.parallel.topology import Topology

_PER_GROUP = 4  # listening socket, epoll, two pipes
_OF_THE_STORE = 16  # the server of the first rank: its socket, epoll and pipes, and connections of other programs
_OTHERS = 256  # files, shared memory, workers of rewards and environments, libraries


def group_descriptors(sizes: Iterable[int]) -> int:
    """Return the descriptors of one rank in gloo groups of these sizes."""
    return sum(size - 1 + _PER_GROUP for size in sizes)


def megatron_groups(topology: Topology) -> list[int]:
    """Return the sizes of the groups of one rank that Megatron's `initialize_model_parallel` creates."""
    t = topology
    dense = [1, t.dp * t.cp, t.dp, t.cp, t.tp * t.pp, t.tp, t.pp, min(2, t.pp), 1]
    dense += [t.tp * t.dp * t.cp, t.tp * t.dp, t.tp * t.cp]
    experts = [1, t.ep, t.etp, t.etp * t.ep, t.etp * t.ep * t.pp, t.etp * t.ep * t.pp, t.edp]
    return [*dense, *experts, t.world_size]


def gloo_groups(topology: Topology, *, on_cuda: bool, with_vllm: bool) -> list[int]:
    """Return the sizes of all gloo groups of one rank.

    Args:
        topology: the layout.
        on_cuda: Megatron's groups and vLLM's device groups use NCCL alone.
        with_vllm: vLLM runs in the processes of the ranks.
    """
    copy = math.lcm(topology.tp, topology.etp * topology.ep) * topology.pp
    replica, shard = topology.engine_ranks, topology.prompt_shard_size
    own = [topology.world_size, copy, replica, replica, shard]  # the last two: several turns
    engine = [topology.world_size, topology.engine_tp, topology.engine_dp, replica, 1, 1, 1] if with_vllm else []
    return [*own, *engine] if on_cuda else [*own, *megatron_groups(topology), *engine, *engine]


def needed_descriptors(topology: Topology, *, on_cuda: bool, with_vllm: bool) -> int:
    """Return the open files that the rank with the most of them may need; the first rank also serves the store."""
    groups = group_descriptors(gloo_groups(topology, on_cuda=on_cuda, with_vllm=with_vllm))
    return groups + topology.world_size + _OF_THE_STORE + _OTHERS
