"""Which transport serves which link, and its construction."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Literal

import torch

from grpo_mega.parallel.world import World
from grpo_mega.types import UserError
from grpo_mega.weight_sync.shared_memory import SharedMemoryTransport, machine_id
from grpo_mega.weight_sync.transport import GroupTransport, Transport, Turn

TransportKind = Literal["auto", "gloo", "nccl", "shared_memory"]


def transport_kinds(kind: TransportKind) -> dict[str, str]:
    """Link -> transport. auto: NCCL with CUDA; without it shared memory inside a machine, gloo between machines.

    Raises:
        UserError: the machine has no such transport.
    """
    cuda = torch.cuda.is_available()
    if kind == "nccl" and not cuda:
        raise UserError("weight_sync.transport=nccl needs CUDA; use auto")
    if kind in ("gloo", "shared_memory") and cuda:
        raise UserError(f"weight_sync.transport={kind} moves host memory, the weights are on CUDA devices; use auto")
    if kind == "nccl" or (kind == "auto" and cuda):
        return {"same_node": "nccl", "across_nodes": "nccl"}
    return {"same_node": "gloo" if kind == "gloo" else "shared_memory", "across_nodes": "gloo"}


def make_transports(
    turns: dict[str, list[Turn]], timeout_seconds: float, world: World
) -> tuple[dict[str, Transport], int]:
    """Those with at least one message somewhere, and the bytes of the two buffers that they share. Collective over all
    ranks; kinds that are not needed are taken out of `turns`."""
    needed = world.gather({kind for kind, each in turns.items() if any(t.sends for t in each)})
    for kind in [kind for kind in turns if not any(kind in each for each in needed)]:
        del turns[kind]
    in_segment = [turn.send_bytes for turn in turns.get("shared_memory", ())]
    others = [each for kind, each in turns.items() if kind != "shared_memory"]
    assert len(others) <= 1, f"{sorted(turns)}: one transport beside shared memory"
    grouped = [turn.send_bytes + turn.receive_bytes for each in others for turn in each]
    slot_bytes = max(map(sum, zip_longest(in_segment, grouped, fillvalue=0)), default=0)
    made: dict[str, Transport] = {}
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if "shared_memory" in turns:
        segment = SharedMemoryTransport(turns["shared_memory"], slot_bytes, world, timeout_seconds)
        made["shared_memory"], buffers = segment, segment.buffers
    else:
        buffers = [torch.empty(slot_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
    for kind in turns.keys() - {"shared_memory"}:
        starts = in_segment or [0] * len(turns[kind])
        made[kind] = GroupTransport(buffers, starts, world.group, timeout_seconds)
    return made, 2 * slot_bytes


def node_numbers(gather: Callable[[str, str], list[str]]) -> Sequence[int]:
    """[ranks]: equal for ranks of one machine, in the order of the first rank of each."""
    machines = gather(f"{socket.gethostname()} {machine_id()}", "exchanging machines")
    first = {machine: i for i, machine in enumerate(dict.fromkeys(machines))}
    return [first[machine] for machine in machines]
