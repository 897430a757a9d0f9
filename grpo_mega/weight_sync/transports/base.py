"""The interface of a transport, and the messages of one round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from grpo_mega.weight_sync.transports.process_vm_readv import PeerMemory


@dataclass(frozen=True)
class BucketMessage:
    """`num_bytes` of one bucket between this rank and `peer`, at byte `start` of the sender's send buffer.

    `large`: (start in the message, bytes) of what may be lent (`Transport.send_or_receive_in_place`); the same at both
    ends.
    """

    peer: int
    start: int
    num_bytes: int
    large: tuple[tuple[int, int], ...] = ()

    def parts(self) -> Iterator[tuple[int, int]]:
        """(start, bytes) of all that is sent for itself, in order: what is large, and what lies between."""
        at = 0
        for start, num_bytes in (*self.large, (self.num_bytes, 0)):
            if start > at:
                yield at, start - at
            if num_bytes:
                yield start, num_bytes
            at = start + num_bytes


@dataclass(frozen=True)
class Round:
    """What a rank sends and receives of one bucket, each sorted by peer."""

    number: int
    sends: Sequence[BucketMessage]
    receives: Sequence[BucketMessage]

    @property
    def send_bytes(self) -> int:
        return max((m.start + aligned(m.num_bytes) for m in self.sends), default=0)

    @property
    def receive_bytes(self) -> int:
        return sum(aligned(m.num_bytes) for m in self.receives)


class Transport(Protocol):
    """Moves messages. Per turn: fill `outgoing`, `start`, `incoming` for each message received, `finish`.

    `peer_memory`: ranks that read each other's memory; to them a message may say where bytes are. None: there are none.

    `outgoing` waits until a buffer is free, and all transports of a rank are asked for it before one of them starts.
    """

    peer_memory: PeerMemory | None

    def outgoing(self, turn: Round) -> Tensor:
        """[send_bytes] uint8 to be filled; waits until the turn before last has left it."""
        ...

    def send_or_receive_in_place(
        self, turn: Round, message: BucketMessage, start: int, memory: Tensor, *, sends: bool
    ) -> bool:
        """Before `start`: the bytes from `start` of a message are sent out of this memory, or received into it, and not
        copied through the buffer. False: this transport has no use for it."""
        ...

    def start(self, turn: Round) -> None: ...

    def incoming(self, turn: Round, message: BucketMessage) -> Tensor:
        """[num_bytes] uint8 of one message, once it is there; valid until `finish`.

        Raises:
            TransportError: it did not come in time, or its sender is gone.
        """
        ...

    def finish(self, turn: Round) -> None:
        """Everything of this turn was taken over.

        Raises:
            TransportError: as `incoming`, for what this rank sends.
        """
        ...


ALIGNMENT = 32  # bytes; of a message in a buffer, and the size of its header


class TransportError(RuntimeError):
    """Bytes did not come or go in time, between this rank and `peer`; names both."""

    def __init__(self, text: str, peer: int) -> None:
        super().__init__(text)
        self.peer = peer


def failed_wait(turn: Round, message: BucketMessage, rank: int, sends: bool, seconds: float, why: str) -> str:
    """One sentence with both ranks."""
    ends = f"rank {rank} to rank {message.peer}" if sends else f"rank {message.peer} to rank {rank}"
    return f"bucket {turn.number}: {message.num_bytes} bytes from {ends} did not arrive within {seconds:g} s ({why})"


def aligned(num_bytes: int) -> int:
    """Up to the next multiple of ALIGNMENT."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
