"""The rank grid of a job, as arithmetic: who shares an axis with whom, and who forms an engine replica.

Pure: no process group exists here. Order of the axes, fastest first: tp, dp, pp (Megatron's "tp-cp-ep-dp-pp" with one
rank on the axes that are not named). Engine replicas are contiguous runs of `engine_tp` ranks.
Asserted by tests/unit/test_topology.py, and against Megatron's own groups by tests/parallel.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo_mega.types import UserError


@dataclass(frozen=True)
class Coordinates:
    """One rank's place on the grid."""

    rank: int
    tp_rank: int
    dp_rank: int
    pp_rank: int
    replica: int
    engine_tp_rank: int


@dataclass(frozen=True)
class Topology:
    """Sizes of the axes; `world_size == tp * dp * pp == num_replicas * engine_tp`."""

    world_size: int
    tp: int = 1
    pp: int = 1
    engine_tp: int = 1

    def __post_init__(self) -> None:
        """Raises UserError when the layout does not divide the ranks."""
        if self.world_size % (self.tp * self.pp):
            raise UserError(
                f"parallel.tp={self.tp} x parallel.pp={self.pp} = {self.tp * self.pp} does not divide the "
                f"{self.world_size} rank(s) of this job; set run.world_size to a multiple of {self.tp * self.pp}"
            )
        if self.world_size % self.engine_tp:
            raise UserError(
                f"engine.tp={self.engine_tp} does not divide the {self.world_size} rank(s) of this job; "
                f"use a divisor of {self.world_size}"
            )

    @property
    def dp(self) -> int:
        return self.world_size // (self.tp * self.pp)

    @property
    def num_replicas(self) -> int:
        return self.world_size // self.engine_tp

    def coordinates(self, rank: int) -> Coordinates:
        """Inverse of rank = tp_rank + tp * (dp_rank + dp * pp_rank)."""
        return Coordinates(
            rank=rank,
            tp_rank=rank % self.tp,
            dp_rank=rank // self.tp % self.dp,
            pp_rank=rank // (self.tp * self.dp),
            replica=rank // self.engine_tp,
            engine_tp_rank=rank % self.engine_tp,
        )

    def replica_ranks(self, replica: int) -> list[int]:
        """Ranks of one engine, in its tensor-parallel order."""
        return list(range(replica * self.engine_tp, (replica + 1) * self.engine_tp))

    def loss_rank(self, dp_rank: int) -> int:
        """The first rank of the last pipeline stage of one data-parallel replica: it has the log-probs."""
        return self.tp * (dp_rank + self.dp * (self.pp - 1))

    def describe(self, rank: int) -> str:
        """For messages: `rank 5 | dp 1/2 pp 0/2 tp 1/2`."""
        at = self.coordinates(rank)
        return f"rank {rank} | dp {at.dp_rank}/{self.dp} pp {at.pp_rank}/{self.pp} tp {at.tp_rank}/{self.tp}"
