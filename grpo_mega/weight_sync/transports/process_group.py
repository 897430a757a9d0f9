"""How the bytes of a bucket get from rank to rank: one small interface, three ways.

Same process: the source's view is copied into the engine's (`execute.py`; nothing here). `GroupTransport`: point to
point over a process group, gloo on CPU, NCCL on GPUs. `shared_memory.py`: between processes of one machine, with
buffers of the host, or of a GPU (`cuda_ipc.py`). A rank has two buffers, whatever the number of its transports: each
has its part of them, of a size that changes from turn to turn (`connect.py`). A turn uses one buffer, and a buffer is
used again two turns later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mega.weight_sync.transports.base import BucketMessage, Round, TransportError, aligned, failed_wait
from grpo_mega.weight_sync.transports.process_vm_readv import PeerMemory


class GroupTransport:
    """Point to point over a process group (gloo; NCCL: written, never run)."""

    peer_memory: PeerMemory | None = None

    def __init__(
        self, buffers: Sequence[Tensor], starts: Sequence[int], group: dist.ProcessGroup, timeout: float
    ) -> None:
        """`starts[n]`: where its part of the buffer begins in turn n; its sends come first, then what it receives."""
        self._buffers, self._starts = buffers, starts
        self._group, self._timeout, self._rank = group, timeout, group.rank()
        self._waits: dict[tuple[int, int, bool], list[Any]] = {}
        self._places: dict[tuple[int, int], Tensor] = {}
        self._lent: dict[tuple[int, int, bool, int], Tensor] = {}

    def outgoing(self, turn: Round) -> Tensor:
        return self._part(turn)[: turn.send_bytes]

    def send_or_receive_in_place(
        self, turn: Round, message: BucketMessage, start: int, memory: Tensor, *, sends: bool
    ) -> bool:
        lends = memory.device.type == "cpu" and memory.is_contiguous() and any(start == at for at, _ in message.large)
        if lends:
            self._lent[turn.number, message.peer, sends, start] = memory.view(-1).view(torch.uint8)
        return lends

    def start(self, turn: Round) -> None:
        if not turn.sends and not turn.receives:
            return
        buffer, at = self._part(turn), turn.send_bytes
        operations: list[Callable[[], Any]] = []
        keys = []
        for message in turn.sends:
            place = buffer[message.start : message.start + message.num_bytes]
            for part in self._parts(turn, message, place, sends=True):
                operations.append(partial(dist.isend, part, group=self._group, tag=turn.number, group_dst=message.peer))
                keys.append((turn.number, message.peer, True))
        for message in turn.receives:
            place = buffer[at : at + message.num_bytes]
            self._places[turn.number, message.peer] = place
            for part in self._parts(turn, message, place, sends=False):
                operations.append(partial(dist.irecv, part, group=self._group, tag=turn.number, group_src=message.peer))
                keys.append((turn.number, message.peer, False))
            at += aligned(message.num_bytes)
        for key, work in zip(keys, self._started(operations, buffer.device), strict=True):
            self._waits.setdefault(key, []).append(work)

    def _parts(self, turn: Round, message: BucketMessage, place: Tensor, *, sends: bool) -> Iterator[Tensor]:
        """What is lent, and of the buffer the rest; both ends cut a message alike."""
        for start, num_bytes in message.parts():
            lent = self._lent.pop((turn.number, message.peer, sends, start), None)
            yield place[start : start + num_bytes] if lent is None else lent

    def _started(self, operations: Sequence[Callable[[], Any]], device: torch.device) -> list[Any]:
        if device.type == "cpu":
            return [operation() for operation in operations]
        # NCCL makes one of all; one after the other, two ranks that send to each other would wait forever. P2POp and
        # batch_isend_irecv, which do the same, know registered groups only.
        with dist.distributed_c10d._coalescing_manager(self._group, device, async_ops=True) as manager:
            for operation in operations:
                operation()
        return list(manager.works) * len(operations)

    def incoming(self, turn: Round, message: BucketMessage) -> Tensor:
        self._wait(turn, message, sends=False)
        return self._places.pop((turn.number, message.peer))

    def finish(self, turn: Round) -> None:
        for message in turn.sends:
            self._wait(turn, message, sends=True)

    def _part(self, turn: Round) -> Tensor:
        return self._buffers[turn.number % 2][self._starts[turn.number] :]

    def _wait(self, turn: Round, message: BucketMessage, *, sends: bool) -> None:
        try:
            for work in self._waits.pop((turn.number, message.peer, sends)):
                work.wait(timedelta(seconds=self._timeout))
        except RuntimeError as error:
            why = failed_wait(turn, message, self._rank, sends, self._timeout, str(error))
            raise TransportError(why, message.peer) from error
