"""Point-to-point transport over a process group: gloo for host memory, NCCL for GPUs.

A rank has two buffers, whatever the number of its transports. Each transport uses a part of them, whose size changes
from round to round (`factory.py`). Consecutive rounds alternate between the two buffers, so a buffer is used again two
rounds later.

With gloo, large pieces are sent from parameter memory and received into it, without a copy through a buffer.

Asserted by tests/parallel/test_sync_ranks.py and, for NCCL, by tests/gpu/test_transports_on_gpu.py.
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
    """`Transport` over a process group. The NCCL path has never been run on GPUs so far."""

    peer_memory: PeerMemory | None = None

    def __init__(
        self, buffers: Sequence[Tensor], starts: Sequence[int], group: dist.ProcessGroup, timeout_seconds: float
    ) -> None:
        """Create the transport of this rank.

        Args:
            buffers: the two buffers of this rank, uint8.
            starts: `starts[n]` is the first byte of this transport's part of the buffer in round n. Sent messages come
                first, then received messages.
            group: all ranks.
            timeout_seconds: limit of every wait.
        """
        self._buffers, self._starts = buffers, starts
        self._group, self._timeout, self._rank = group, timeout_seconds, group.rank()
        self._pending: dict[tuple[int, int, bool], list[Any]] = {}
        self._received: dict[tuple[int, int], Tensor] = {}
        self._in_place: dict[tuple[int, int, bool, int], Tensor] = {}

    def outgoing(self, round_: Round) -> Tensor:
        """See `Transport`. The buffer is free: `finish` has waited for its messages."""
        return self._buffer(round_)[: round_.send_bytes]

    def send_in_place(self, round_: Round, message: BucketMessage, start: int, memory: Tensor) -> bool:
        """See `Transport`. Supported for contiguous host memory of the message's large pieces."""
        return self._use_memory(round_, message, start, memory, sends=True)

    def receive_in_place(self, round_: Round, message: BucketMessage, start: int, memory: Tensor) -> bool:
        """See `Transport`. Supported for contiguous host memory of the message's large pieces."""
        return self._use_memory(round_, message, start, memory, sends=False)

    def start(self, round_: Round) -> None:
        """See `Transport`."""
        if not round_.sends and not round_.receives:
            return
        buffer, at = self._buffer(round_), round_.send_bytes
        operations: list[Callable[[], Any]] = []
        keys = []
        for message in round_.sends:
            place = buffer[message.start : message.start + message.num_bytes]
            for part in self._parts(round_, message, place, sends=True):
                operations.append(
                    partial(dist.isend, part, group=self._group, tag=round_.number, group_dst=message.peer)
                )
                keys.append((round_.number, message.peer, True))
        for message in round_.receives:
            place = buffer[at : at + message.num_bytes]
            self._received[round_.number, message.peer] = place
            for part in self._parts(round_, message, place, sends=False):
                operations.append(
                    partial(dist.irecv, part, group=self._group, tag=round_.number, group_src=message.peer)
                )
                keys.append((round_.number, message.peer, False))
            at += aligned(message.num_bytes)
        for key, work in zip(keys, self._issue(operations, buffer.device), strict=True):
            self._pending.setdefault(key, []).append(work)

    def incoming(self, round_: Round, message: BucketMessage) -> Tensor:
        """See `Transport`."""
        self._wait(round_, message, sends=False)
        return self._received.pop((round_.number, message.peer))

    def finish(self, round_: Round) -> None:
        """See `Transport`."""
        for message in round_.sends:
            self._wait(round_, message, sends=True)

    def _use_memory(self, round_: Round, message: BucketMessage, start: int, memory: Tensor, *, sends: bool) -> bool:
        is_large = any(start == large_start for large_start, _ in message.large)
        usable = memory.device.type == "cpu" and memory.is_contiguous() and is_large
        if usable:
            self._in_place[round_.number, message.peer, sends, start] = memory.view(-1).view(torch.uint8)
        return usable

    def _parts(self, round_: Round, message: BucketMessage, place: Tensor, *, sends: bool) -> Iterator[Tensor]:
        """Yield the memory of each part of a message; both ends split the message in the same way."""
        for start, num_bytes in message.parts():
            memory = self._in_place.pop((round_.number, message.peer, sends, start), None)
            yield place[start : start + num_bytes] if memory is None else memory

    def _issue(self, operations: Sequence[Callable[[], Any]], device: torch.device) -> list[Any]:
        if device.type == "cpu":
            return [operation() for operation in operations]
        # NCCL needs one group of all operations: one after the other, two ranks that send to each other would deadlock.
        # P2POp and batch_isend_irecv, which do the same, support registered process groups only.
        with dist.distributed_c10d._coalescing_manager(self._group, device, async_ops=True) as manager:
            for operation in operations:
                operation()
        return list(manager.works) * len(operations)

    def _buffer(self, round_: Round) -> Tensor:
        return self._buffers[round_.number % 2][self._starts[round_.number] :]

    def _wait(self, round_: Round, message: BucketMessage, *, sends: bool) -> None:
        try:
            for work in self._pending.pop((round_.number, message.peer, sends)):
                work.wait(timedelta(seconds=self._timeout))
        except RuntimeError as error:
            text = failed_wait(round_, message, self._rank, sends, self._timeout, str(error))
            raise TransportError(text, message.peer) from error
