"""The rank grid of a job, as arithmetic: who shares an axis with whom, and who forms an engine replica.

Pure: no process group exists here. Order of the axes, fastest first, is Megatron's "tp-cp-ep-dp-pp": the dense layers
lie on tp, cp, dp, pp, the experts on etp, ep, edp, pp over the same ranks. Engine replicas are contiguous runs of
`engine_tp * engine_dp` ranks, tp fastest, that step together; each run of `engine_tp` ranks in it samples prompts of
its own, a share. Where engines are servers elsewhere, each serves a contiguous run of `engine_ranks`, which is a share.
Asserted by tests/unit/parallel/test_topology.py, and against Megatron's own groups by tests/parallel.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo_mega.config.rules import require_equal_parts, require_whole_grids
from grpo_mega.config.schema import Config
from grpo_mega.types import UserError


@dataclass(frozen=True)
class Coordinates:
    """One rank's place on the three grids: dense layers, experts, engines."""

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
    share: int
    """Which part of the prompts this rank samples, of `Topology.num_shares`."""


@dataclass(frozen=True)
class Topology:
    """Sizes of the axes; `world_size` is `tp * cp * dp * pp`, `etp * ep * edp * pp`, and `num_replicas * engine_tp *
    engine_dp`."""

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
    """Engines elsewhere; 0: they are on these ranks."""

    def __post_init__(self) -> None:
        """Raises UserError when the layout does not divide the ranks."""
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
        """The layout of a config on so many ranks."""
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
        """Ranks with the same weights of the dense layers and different rollouts."""
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Ranks with the same experts."""
        return self.world_size // (self.etp * self.ep * self.pp)

    @property
    def engine_size(self) -> int:
        """Ranks of one engine replica, wherever they are."""
        return self.engine_tp * self.engine_dp

    @property
    def engine_ranks(self) -> int:
        """Ranks of this job that run one engine replica, or that one serves."""
        return self.world_size // self.engine_servers if self.engine_servers else self.engine_size

    @property
    def num_server_ranks(self) -> int:
        """Devices beside those of this job: all ranks of all servers."""
        return self.engine_servers * self.engine_size

    @property
    def num_replicas(self) -> int:
        return self.world_size // self.engine_ranks

    @property
    def share_size(self) -> int:
        """Ranks that sample the same prompts."""
        return self.engine_ranks if self.engine_servers else self.engine_tp

    @property
    def num_shares(self) -> int:
        """Parts into which the engines divide the prompts."""
        return self.world_size // self.share_size

    def coordinates(self, rank: int) -> Coordinates:
        """Inverse of rank = tp_rank + tp * (cp_rank + cp * (dp_rank + dp * pp_rank))
        = etp_rank + etp * (ep_rank + ep * (edp_rank + edp * pp_rank))."""
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
            engine_tp_rank=rank % self.share_size,
            engine_dp_rank=rank % self.engine_ranks // self.share_size,
            share=rank // self.share_size,
        )

    def replica_ranks(self, replica: int) -> list[int]:
        """Ranks of one engine, in its own order: tensor-parallel ranks are neighbours; or those that it serves."""
        return list(range(replica * self.engine_ranks, (replica + 1) * self.engine_ranks))

    def share_ranks(self, share: int) -> list[int]:
        """Ranks that sample the same prompts, in their tensor-parallel order."""
        return list(range(share * self.share_size, (share + 1) * self.share_size))

    def loss_rank(self, dp_rank: int) -> int:
        """The first rank of the last pipeline stage of one data-parallel replica: it has the log-probs."""
        return self.tp * self.cp * (dp_rank + self.dp * (self.pp - 1))

    def describe(self, rank: int) -> str:
        """For messages: `rank 5 | dp 1/2 pp 0/2 tp 1/2`; cp and ep where they are more than 1."""
        at = self.coordinates(rank)
        axes = [("dp", at.dp_rank, self.dp), ("pp", at.pp_rank, self.pp), ("tp", at.tp_rank, self.tp)]
        more = [("cp", at.cp_rank, self.cp), ("ep", at.ep_rank, self.ep)]
        axes += [axis for axis in more if axis[2] > 1]
        return f"rank {rank} | " + " ".join(f"{name} {place}/{size}" for name, place, size in axes)
