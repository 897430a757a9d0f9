"""How the bytes of a bucket get from rank to rank: one small interface, three ways.

Same process: the source's view is copied into the engine's (`execute.py`; nothing here). `GroupTransport`: point to
point over a process group, gloo on CPU, NCCL on GPUs. `shared_memory.py`: between processes of one machine, with
buffers of the host, or of a GPU (`cuda_ipc.py`). A rank has two buffers, whatever the number of its transports: each
has its part of them, of a size that changes from turn to turn (`connect.py`). A turn uses one buffer, and a buffer is
used again two turns later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mega.weight_sync.remote_memory import Neighbours

ALIGNMENT = 32  # bytes; of a message in a buffer, and the size of its header


@dataclass(frozen=True)
class Message:
    """`num_bytes` of one bucket between this rank and `peer`, at byte `start` of the sender's send buffer."""

    peer: int
    start: int
    num_bytes: int


@dataclass(frozen=True)
class Turn:
    """What a rank sends and receives of one bucket, each sorted by peer."""

    number: int
    sends: Sequence[Message]
    receives: Sequence[Message]

    @property
    def send_bytes(self) -> int:
        return max((m.start + aligned(m.num_bytes) for m in self.sends), default=0)

    @property
    def receive_bytes(self) -> int:
        return sum(aligned(m.num_bytes) for m in self.receives)


class TransportError(RuntimeError):
    """Bytes did not come or go in time, between this rank and `peer`; names both."""

    def __init__(self, text: str, peer: int) -> None:
        super().__init__(text)
        self.peer = peer


class Transport(Protocol):
    """Moves messages. Per turn: fill `outgoing`, `start`, `incoming` for each message received, `finish`.

    `neighbours`: ranks that read each other's memory; to them a message may say where bytes are. None: there are none.

    `outgoing` waits until a buffer is free, and all transports of a rank are asked for it before one of them starts.
    """

    neighbours: Neighbours | None

    def outgoing(self, turn: Turn) -> Tensor:
        """[send_bytes] uint8 to be filled; waits until the turn before last has left it."""
        ...

    def start(self, turn: Turn) -> None: ...

    def incoming(self, turn: Turn, message: Message) -> Tensor:
        """[num_bytes] uint8 of one message, once it is there; valid until `finish`.

        Raises:
            TransportError: it did not come in time, or its sender is gone.
        """
        ...

    def finish(self, turn: Turn) -> None:
        """Everything of this turn was taken over.

        Raises:
            TransportError: as `incoming`, for what this rank sends.
        """
        ...


class GroupTransport:
    """Point to point over a process group (gloo; NCCL: written, never run)."""

    neighbours: Neighbours | None = None

    def __init__(
        self, buffers: Sequence[Tensor], starts: Sequence[int], group: dist.ProcessGroup, timeout: float
    ) -> None:
        """`starts[n]`: where its part of the buffer begins in turn n; its sends come first, then what it receives."""
        self._buffers, self._starts = buffers, starts
        self._group, self._timeout, self._rank = group, timeout, group.rank()
        self._waits: dict[tuple[int, int, bool], Any] = {}
        self._places: dict[tuple[int, int], Tensor] = {}

    def outgoing(self, turn: Turn) -> Tensor:
        return self._part(turn)[: turn.send_bytes]

    def start(self, turn: Turn) -> None:
        if not turn.sends and not turn.receives:
            return
        buffer, at = self._part(turn), turn.send_bytes
        operations: list[Callable[[], Any]] = []
        keys = []
        for message in turn.sends:
            part = buffer[message.start : message.start + message.num_bytes]
            operations.append(partial(dist.isend, part, group=self._group, tag=turn.number, group_dst=message.peer))
            keys.append((turn.number, message.peer, True))
        for message in turn.receives:
            part = buffer[at : at + message.num_bytes]
            self._places[turn.number, message.peer] = part
            operations.append(partial(dist.irecv, part, group=self._group, tag=turn.number, group_src=message.peer))
            keys.append((turn.number, message.peer, False))
            at += aligned(message.num_bytes)
        self._waits.update(zip(keys, self._started(operations, buffer.device), strict=True))

    def _started(self, operations: Sequence[Callable[[], Any]], device: torch.device) -> list[Any]:
        if device.type == "cpu":
            return [operation() for operation in operations]
        # NCCL makes one of all; one after the other, two ranks that send to each other would wait forever. P2POp and
        # batch_isend_irecv, which do the same, know registered groups only.
        with dist.distributed_c10d._coalescing_manager(self._group, device, async_ops=True) as manager:
            for operation in operations:
                operation()
        return list(manager.works) * len(operations)

    def incoming(self, turn: Turn, message: Message) -> Tensor:
        self._wait(turn, message, sends=False)
        return self._places.pop((turn.number, message.peer))

    def finish(self, turn: Turn) -> None:
        for message in turn.sends:
            self._wait(turn, message, sends=True)

    def _part(self, turn: Turn) -> Tensor:
        return self._buffers[turn.number % 2][self._starts[turn.number] :]

    def _wait(self, turn: Turn, message: Message, *, sends: bool) -> None:
        try:
            self._waits.pop((turn.number, message.peer, sends)).wait(timedelta(seconds=self._timeout))
        except RuntimeError as error:
            why = failed_wait(turn, message, self._rank, sends, self._timeout, str(error))
            raise TransportError(why, message.peer) from error


def failed_wait(turn: Turn, message: Message, rank: int, sends: bool, seconds: float, why: str) -> str:
    """One sentence with both ranks."""
    ends = f"rank {rank} to rank {message.peer}" if sends else f"rank {message.peer} to rank {rank}"
    return f"bucket {turn.number}: {message.num_bytes} bytes from {ends} did not arrive within {seconds:g} s ({why})"


def aligned(num_bytes: int) -> int:
    """Up to the next multiple of ALIGNMENT."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
