"""Which transport serves which link, and its construction."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Literal

import torch
from torch import Tensor

from grpo_mega.parallel.peer_group import PeerGroup
from grpo_mega.types import UserError
from grpo_mega.weight_sync.transports.base import Round, Transport
from grpo_mega.weight_sync.transports.cuda_ipc import DeviceSlots
from grpo_mega.weight_sync.transports.process_group import GroupTransport
from grpo_mega.weight_sync.transports.shared_memory import SharedMemoryTransport, machine_id

TransportKind = Literal["auto", "gloo", "nccl", "shared_memory", "cuda_ipc"]
_SEGMENTS = ("shared_memory", "cuda_ipc")  # of which a machine has one


def transport_kinds(kind: TransportKind) -> dict[str, str]:
    """Link -> transport. auto: NCCL with CUDA; without it shared memory inside a machine, gloo between machines.

    Raises:
        UserError: the machine has no such transport.
    """
    cuda = torch.cuda.is_available()
    if kind in ("nccl", "cuda_ipc") and not cuda:
        raise UserError(f"weight_sync.transport={kind} needs CUDA", remedy="use auto")
    if kind in ("gloo", "shared_memory") and cuda:
        raise UserError(
            f"weight_sync.transport={kind} moves host memory, the weights are on CUDA devices", remedy="use auto"
        )
    if kind == "nccl" or (kind == "auto" and cuda):
        return {"same_node": "nccl", "across_nodes": "nccl"}
    if kind == "cuda_ipc":
        return {"same_node": "cuda_ipc", "across_nodes": "nccl"}
    return {"same_node": "gloo" if kind == "gloo" else "shared_memory", "across_nodes": "gloo"}


def make_transports(
    turns: dict[str, list[Round]], timeout_seconds: float, world: PeerGroup
) -> tuple[dict[str, Transport], int]:
    """Those with at least one message somewhere, and the bytes of the two buffers that they share. Collective over all
    ranks; kinds that are not needed are taken out of `turns`."""
    needed = world.gather({kind for kind, each in turns.items() if any(t.sends for t in each)})
    for kind in [kind for kind in turns if not any(kind in each for each in needed)]:
        del turns[kind]
    segments = [kind for kind in _SEGMENTS if kind in turns]
    in_segment = [turn.send_bytes for kind in segments for turn in turns[kind]]
    others = [each for kind, each in turns.items() if kind not in segments]
    assert max(len(segments), len(others)) <= 1, f"{sorted(turns)}: one transport inside a machine, one between them"
    grouped = [turn.send_bytes + turn.receive_bytes for each in others for turn in each]
    slot_bytes = max(map(sum, zip_longest(in_segment, grouped, fillvalue=0)), default=0)
    made: dict[str, Transport] = {}
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    buffers: Sequence[Tensor] = ()
    for kind in segments:
        slots = DeviceSlots(2 * slot_bytes, device) if kind == "cuda_ipc" else None
        segment = SharedMemoryTransport(turns[kind], slot_bytes, world, timeout_seconds, slots)
        made[kind], buffers = segment, segment.buffers
    if not segments:
        buffers = [torch.empty(slot_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
    for kind in turns.keys() - set(segments):
        starts = in_segment or [0] * len(turns[kind])
        made[kind] = GroupTransport(buffers, starts, world.group, timeout_seconds)
    return made, 2 * slot_bytes


def node_numbers(gather: Callable[[str, str], list[str]]) -> Sequence[int]:
    """[ranks]: equal for ranks of one machine, in the order of the first rank of each."""
    machines = gather(f"{socket.gethostname()} {machine_id()}", "exchanging machines")
    first = {machine: i for i, machine in enumerate(dict.fromkeys(machines))}
    return [first[machine] for machine in machines]
