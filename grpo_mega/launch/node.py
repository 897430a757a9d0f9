"""The part of a job that runs on one machine: its ranks and their environment variables.

Asserted by tests/unit/launch/test_node.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from grpo_mega.parallel.ports import free_port


@dataclass(frozen=True)
class Node:
    """This machine in the job. Its `num_ranks` ranks start at rank `node_rank * num_ranks`."""

    num_nodes: int
    node_rank: int
    num_ranks: int
    master_addr: str
    master_port: int

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.num_ranks

    def rank_environment(self, local_rank: int) -> dict[str, str]:
        """Return the environment variables of rank `local_rank` of this machine."""
        return {
            "RANK": str(self.node_rank * self.num_ranks + local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(self.num_ranks),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }

    def environments(self, env: Mapping[str, str]) -> list[dict[str, str]]:
        """Return the environment of each rank of this machine: `env` and the variables of the rank."""
        return [{**env, **self.rank_environment(rank)} for rank in range(self.num_ranks)]

    @classmethod
    def of_whole_job(cls, num_ranks: int) -> Node:
        """Return the only machine of a job, with a free port."""
        return cls(1, 0, num_ranks, "127.0.0.1", free_port())
