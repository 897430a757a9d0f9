"""Choice of a transport for each kind of link, and construction of the transports."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from grpo_mega.parallel.peer_group import PeerGroup
from grpo_mega.types import UserError
from grpo_mega.weight_sync.transports.base import Round, Transport
from grpo_mega.weight_sync.transports.cuda_ipc import DeviceSlots
from grpo_mega.weight_sync.transports.kinds import TRANSPORTS, TransportKind
from grpo_mega.weight_sync.transports.process_group import GroupTransport
from grpo_mega.weight_sync.transports.shared_memory import SharedMemoryTransport, machine_id


def transport_kinds(kind: TransportKind) -> dict[str, str]:
    """Return link -> name of its transport.

    `auto` is NCCL with CUDA. Without CUDA it is shared memory inside a machine and gloo between machines.

    Raises:
        UserError: the transport is not available on this machine.
    """
    cuda = torch.cuda.is_available()
    if kind != "auto" and TRANSPORTS[kind].on_device and not cuda:
        raise UserError(f"weight_sync.transport={kind} needs CUDA", remedy="use weight_sync.transport=auto")
    if kind != "auto" and not TRANSPORTS[kind].on_device and cuda:
        raise UserError(
            f"weight_sync.transport={kind} moves host memory, but the weights are on CUDA devices",
            remedy="use weight_sync.transport=auto",
        )
    if kind == "auto":
        kind = "nccl" if cuda else "shared_memory"
    between_nodes = "nccl" if TRANSPORTS[kind].on_device else "gloo"
    return {"same_node": kind, "across_nodes": between_nodes}


def make_transports(
    rounds: dict[str, list[Round]], timeout_seconds: float, world: PeerGroup
) -> tuple[dict[str, Transport], int]:
    """Collective: construct the transports that carry at least one message on some rank.

    Args:
        rounds: the rounds of this rank, by kind of transport. Kinds that are not needed are removed from it.
        timeout_seconds: limit of every wait.
        world: all ranks.

    Returns:
        The transports by kind, and the bytes of the two buffers that they share.
    """
    needed = set().union(*world.gather({kind for kind, each in rounds.items() if any(r.sends for r in each)}))
    for kind in [kind for kind in rounds if kind not in needed]:
        del rounds[kind]
    segments = [kind for kind in rounds if TRANSPORTS[kind].has_segment]
    segment_bytes = [each.send_bytes for kind in segments for each in rounds[kind]]
    others = [each for kind, each in rounds.items() if kind not in segments]
    assert max(len(segments), len(others)) <= 1, f"{sorted(rounds)}: one transport inside a machine, one between them"
    group_bytes = [each.send_bytes + each.receive_bytes for each_kind in others for each in each_kind]
    slot_bytes = max(map(sum, zip_longest(segment_bytes, group_bytes, fillvalue=0)), default=0)
    made: dict[str, Transport] = {}
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    buffers: Sequence[Tensor] = ()
    for kind in segments:
        slots = DeviceSlots(2 * slot_bytes, device) if TRANSPORTS[kind].on_device else None
        segment = SharedMemoryTransport(rounds[kind], slot_bytes, world, timeout_seconds, slots)
        made[kind], buffers = segment, segment.buffers
    if not segments:
        buffers = [torch.empty(slot_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
    if any(not TRANSPORTS[kind].has_segment for kind in needed):
        world.connect(device)
    for kind in rounds.keys() - set(segments):
        starts = segment_bytes or [0] * len(rounds[kind])
        made[kind] = GroupTransport(buffers, starts, world.group, timeout_seconds)
    return made, 2 * slot_bytes


def node_numbers(gather: Callable[[str, str], list[str]]) -> Sequence[int]:
    """Collective: return the node of each rank, [ranks].

    Ranks of one machine have the same number. Numbers are in the order of the first rank of each machine.

    Args:
        gather: `StragglerBarrier.gather`.
    """
    machines = gather(f"{socket.gethostname()} {machine_id()}", "exchanging machine names")
    first = {machine: i for i, machine in enumerate(dict.fromkeys(machines))}
    return [first[machine] for machine in machines]
