"""This rank's coordinates and device, and the creation of the default process group.

The only global state is torch.distributed's own default group.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore  # torch.distributed has the name, and its type hints do not

from grpo_mega.parallel.loopback import keep_gloo_on_loopback, open_store
from grpo_mega.parallel.peer_group import find_store
from grpo_mega.parallel.ports import is_loopback, port_is_free
from grpo_mega.parallel.topology import Coordinates, Topology
from grpo_mega.types import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This rank's place in the job's grid of ranks, and its device."""

    topology: Topology
    at: Coordinates
    device: torch.device

    @property
    def rank(self) -> int:
        return self.at.rank

    @property
    def is_first(self) -> bool:
        """True on rank 0, which writes the files of the whole job."""
        return self.at.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.at.pp_rank == self.topology.pp - 1


def init_ranks(topology: Topology, timeout_seconds: float, *, peers_elsewhere: bool = False) -> Ranks:
    """Join the job that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe (gloo, or NCCL with CUDA).

    If MASTER_ADDR is loopback, the job's store and gloo listen on loopback only.

    Args:
        topology: layout of the job's ranks.
        timeout_seconds: limit of each wait for other ranks.
        peers_elsewhere: ranks of another program on other machines join process groups of this job later.

    Raises:
        UserError: MASTER_PORT is in use, MASTER_ADDR cannot be reached, or the machines hold different numbers of
            ranks.
    """
    rank = int(os.environ["RANK"])
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", device_index(local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if not dist.is_initialized():
        if rank == 0 and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun's agent already listens there
            _require_free(int(os.environ["MASTER_PORT"]))
        if is_loopback(os.environ["MASTER_ADDR"]) and not peers_elsewhere:
            keep_gloo_on_loopback()
        _join(backend, rank, topology.world_size, timeout_seconds)
    _require_even_machines(topology.world_size)
    return Ranks(topology, topology.coordinates(rank), device)


def device_index(local_rank: int, num_devices: int) -> int:
    """Return the device index of a rank. Slurm may show each task only its own device, which then has index 0.

    Raises:
        UserError: this machine has fewer devices than ranks.
    """
    if num_devices == 1:
        return 0
    if local_rank >= num_devices:
        raise UserError(
            f"LOCAL_RANK={local_rank} must be below the number of visible GPUs, {num_devices}",
            remedy="start one rank per GPU, or change CUDA_VISIBLE_DEVICES",
        )
    return local_rank


def _join(backend: str, rank: int, world_size: int, timeout_seconds: float) -> None:
    address, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=timeout_seconds)
    if is_loopback(address) and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun's agent has the store
        store = _store_of_machine(address, int(os.environ["MASTER_PORT"]), rank, world_size, timeout_seconds)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        return
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = str(error).split(" - ")[0].splitlines()[0]
        raise UserError(
            f"MASTER_ADDR={address}, MASTER_PORT={os.environ.get('MASTER_PORT')}: not all "
            f"ranks connected within {timeout_seconds:g} s ({reason})",
            remedy="set MASTER_ADDR to the address of the machine of rank 0 and start all ranks",
        ) from error


def _store_of_machine(address: str, port: int, rank: int, world_size: int, timeout_seconds: float) -> TCPStore:
    """Return the store of a job on one machine after all ranks have connected to it.

    Raises:
        UserError: another program uses the port.
        RuntimeError: a rank did not connect in time (names it): it exited, or its process is stopped.
    """
    keys = [f"connected/{each}" for each in range(world_size)]
    missing = "0"  # unless its store can say more
    try:
        is_host = rank == 0
        store = open_store(address, port, timeout_seconds) if is_host else find_store(address, port, timeout_seconds)
        store.set(keys[rank], "")
        try:
            store.wait(keys, timedelta(seconds=timeout_seconds))
            return store
        except dist.DistStoreError:
            missing = ", ".join(str(each) for each, key in enumerate(keys) if not store.check([key]))
    except OSError as error:  # of the socket of rank 0
        raise _port_in_use(port) from error
    except (dist.DistNetworkError, dist.DistStoreError):
        pass
    raise RuntimeError(
        f"rank {missing} of {world_size} did not connect within {timeout_seconds:g} s (guard.timeout_seconds): it "
        "exited, its process is stopped, or this machine is overloaded"
    )


def _require_even_machines(world_size: int) -> None:
    """Raise UserError if machines hold different numbers of ranks: groups of ranks must not cross machines unevenly."""
    if world_size == 1 or "LOCAL_WORLD_SIZE" not in os.environ:
        return
    mine = int(os.environ["LOCAL_WORLD_SIZE"])
    counts = [0] * world_size
    dist.all_gather_object(counts, mine)
    if len(set(counts)) > 1:
        raise UserError(
            f"the machines of this job hold different numbers of ranks ({', '.join(map(str, sorted(set(counts))))}): "
            "every machine must have the same number",
            remedy="use machines with the same number of GPUs, or set run.world_size to what all can hold",
        )


def _require_free(port: int) -> None:
    if not port_is_free(port):
        raise _port_in_use(port)


def _port_in_use(port: int) -> UserError:
    return UserError(f"MASTER_PORT={port} is in use on this machine", remedy="choose another port")


def agreed(action: Callable[[], T], ranks: Ranks) -> T:
    """Run `action` on rank 0 and return its result, or raise its exception, on every rank. Collective.

    A rank that fails alone would leave the others waiting in the next collective.
    """
    outcome: list[T | Exception | None] = [None]
    if ranks.is_first:
        try:
            outcome[0] = action()
        except Exception as error:  # raised on all ranks
            outcome[0] = error
    if ranks.topology.world_size > 1:
        dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return cast("T", outcome[0])


def first_error(mine: str) -> str:
    """Return the text of the first rank that has one, with the rank; an empty string if none has. Collective."""
    any_has_one = torch.tensor([int(bool(mine))])
    if dist.get_world_size() > 1:
        dist.all_reduce(any_has_one, op=dist.ReduceOp.MAX)
    if not any_has_one.item():
        return ""
    found: list[str | None] = [mine]
    if dist.get_world_size() > 1:
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
    return next(f"rank {rank}: {error}" for rank, error in enumerate(found) if error)
