"""The rank grid of a job: which ranks form each parallel axis, and which ranks form an engine replica. Pure arithmetic.

The order of the axes, fastest first, is Megatron's "tp-cp-ep-dp-pp". Dense layers use the axes tp, cp, dp, pp; experts
use etp, ep, edp, pp over the same ranks. An engine replica is a contiguous block of `engine_tp * engine_dp` ranks, tp
fastest, that step together. Each block of `engine_tp` ranks in it samples its own prompt shard. If engines run as
servers, each server samples for a contiguous block of `engine_ranks` ranks, which is one prompt shard.
Asserted by tests/unit/parallel/test_topology.py, and against Megatron's own groups by tests/parallel.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo_mega.config.rules import require_equal_parts, require_whole_grids
from grpo_mega.config.schema import Config
from grpo_mega.types import UserError


@dataclass(frozen=True)
class Coordinates:
    """Coordinates of one rank in the three grids: dense layers, experts, engines."""

    rank: int
    tp_rank: int
    cp_rank: int
    dp_rank: int
    pp_rank: int
    etp_rank: int
    ep_rank: int
    edp_rank: int
    replica: int
    engine_tp_rank: int
    engine_dp_rank: int
    prompt_shard: int
    """Index of the prompt shard that this rank samples, below `Topology.num_prompt_shards`."""


@dataclass(frozen=True)
class Topology:
    """Sizes of the parallel axes.

    `world_size` equals `tp * cp * dp * pp`, `etp * ep * edp * pp`, and `num_replicas * engine_tp * engine_dp`.
    """

    world_size: int
    tp: int = 1
    pp: int = 1
    engine_tp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    vpp: int = 1
    engine_dp: int = 1
    engine_servers: int = 0
    """Number of engine servers; 0: the engines run on the ranks of the job."""

    def __post_init__(self) -> None:
        """Raise UserError if the layout does not divide the ranks."""
        require_whole_grids(self.world_size, tp=self.tp, cp=self.cp, pp=self.pp, ep=self.ep, etp=self.etp)
        if self.engine_servers:
            require_equal_parts(self.world_size, self.engine_servers)
        elif self.world_size % self.engine_ranks:
            key, got, use = "engine.tp", f"{self.engine_tp}", "a divisor"
            if self.engine_dp > 1:
                key, got, use = f"{key} x engine.dp", f"{got} x {self.engine_dp}", "a product that is a divisor"
            raise UserError(
                f"{key}={got} does not divide the {self.world_size} rank(s) of this job",
                remedy=f"use {use} of {self.world_size}",
            )

    @classmethod
    def of(cls, config: Config, world_size: int) -> Topology:
        """Return the layout of a config on `world_size` ranks."""
        axes = config.parallel
        return cls(
            world_size,
            tp=axes.tp,
            pp=axes.pp,
            engine_tp=config.engine.tp,
            cp=axes.cp,
            ep=axes.ep,
            etp=axes.etp,
            vpp=axes.vpp,
            engine_dp=config.engine.dp,
            engine_servers=len(config.engine.urls) if config.engine.placement == "server" else 0,
        )

    @property
    def dp(self) -> int:
        """Data-parallel size: ranks with the same shard of the dense layers and different rollouts."""
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Data-parallel size of the experts: ranks with the same shard of the experts."""
        return self.world_size // (self.etp * self.ep * self.pp)

    @property
    def engine_size(self) -> int:
        """Number of ranks of one engine replica, in the job or in a server."""
        return self.engine_tp * self.engine_dp

    @property
    def engine_ranks(self) -> int:
        """Number of this job's ranks that run one engine replica, or that one server samples for."""
        return self.world_size // self.engine_servers if self.engine_servers else self.engine_size

    @property
    def num_server_ranks(self) -> int:
        """Number of devices outside of this job: all ranks of all servers."""
        return self.engine_servers * self.engine_size

    @property
    def num_replicas(self) -> int:
        return self.world_size // self.engine_ranks

    @property
    def prompt_shard_size(self) -> int:
        """Number of ranks that sample the same prompt shard."""
        return self.engine_ranks if self.engine_servers else self.engine_tp

    @property
    def num_prompt_shards(self) -> int:
        """Number of prompt shards."""
        return self.world_size // self.prompt_shard_size

    def coordinates(self, rank: int) -> Coordinates:
        """Return the coordinates of a rank.

        Inverse of rank = tp_rank + tp * (cp_rank + cp * (dp_rank + dp * pp_rank))
        = etp_rank + etp * (ep_rank + ep * (edp_rank + edp * pp_rank)).
        """
        return Coordinates(
            rank=rank,
            tp_rank=rank % self.tp,
            cp_rank=rank // self.tp % self.cp,
            dp_rank=rank // (self.tp * self.cp) % self.dp,
            pp_rank=rank // (self.tp * self.cp * self.dp),
            etp_rank=rank % self.etp,
            ep_rank=rank // self.etp % self.ep,
            edp_rank=rank // (self.etp * self.ep) % self.edp,
            replica=rank // self.engine_ranks,
            engine_tp_rank=rank % self.prompt_shard_size,
            engine_dp_rank=rank % self.engine_ranks // self.prompt_shard_size,
            prompt_shard=rank // self.prompt_shard_size,
        )

    def replica_ranks(self, replica: int) -> list[int]:
        """Return the ranks of one replica, tensor-parallel ranks adjacent; with servers, the ranks that it serves."""
        return list(range(replica * self.engine_ranks, (replica + 1) * self.engine_ranks))

    def prompt_shard_ranks(self, index: int) -> list[int]:
        """Return the ranks that sample one prompt shard, in tensor-parallel order."""
        return list(range(index * self.prompt_shard_size, (index + 1) * self.prompt_shard_size))

    def loss_rank(self, dp_rank: int) -> int:
        """Return the first rank of the last pipeline stage of a data-parallel replica: it has the log-probs."""
        return self.tp * self.cp * (dp_rank + self.dp * (self.pp - 1))

    def first_rank(self, dp_rank: int) -> int:
        """Return the first rank of the first pipeline stage of a data-parallel replica."""
        return self.tp * self.cp * dp_rank

    def describe(self, rank: int) -> str:
        """Format a rank for messages: `rank 5 | dp 1/2 pp 0/2 tp 1/2`; with cp and ep if they are above 1."""
        at = self.coordinates(rank)
        axes = [("dp", at.dp_rank, self.dp), ("pp", at.pp_rank, self.pp), ("tp", at.tp_rank, self.tp)]
        more = [("cp", at.cp_rank, self.cp), ("ep", at.ep_rank, self.ep)]
        axes += [axis for axis in more if axis[2] > 1]
        return f"rank {rank} | " + " ".join(f"{name} {place}/{size}" for name, place, size in axes)
