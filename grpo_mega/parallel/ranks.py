"""This process among the ranks: its coordinates, its device, and the default process group.

Everything is named and passed on; nothing here is global but torch.distributed's own default group.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from grpo_mega.parallel.ports import port_is_free
from grpo_mega.parallel.topology import Coordinates, Topology
from grpo_mega.types import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This rank on the job's grid."""

    topology: Topology
    at: Coordinates
    device: torch.device

    @property
    def rank(self) -> int:
        return self.at.rank

    @property
    def is_first(self) -> bool:
        """Rank 0 writes what is written once."""
        return self.at.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.at.pp_rank == self.topology.pp - 1


def init_ranks(topology: Topology, timeout_seconds: float) -> Ranks:
    """Join the job that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe (gloo, or NCCL with CUDA).

    Raises:
        UserError: MASTER_PORT is taken by another program.
    """
    rank = int(os.environ["RANK"])
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if not dist.is_initialized():
        if rank == 0 and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun's agent already listens there
            _require_free(int(os.environ["MASTER_PORT"]))
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    return Ranks(topology, topology.coordinates(rank), device)


def _require_free(port: int) -> None:
    if not port_is_free(port):
        raise UserError(f"MASTER_PORT={port} is in use on this machine; choose another")


def agreed(action: Callable[[], T], ranks: Ranks) -> T:
    """The result of `action`, run on rank 0, on every rank; what it raises is raised on every rank.

    A rank that fails alone would leave the others waiting in the next collective.
    """
    outcome: list[T | Exception | None] = [None]
    if ranks.is_first:
        try:
            outcome[0] = action()
        except Exception as error:  # passed on to all ranks
            outcome[0] = error
    if ranks.topology.world_size > 1:
        dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return cast("T", outcome[0])
