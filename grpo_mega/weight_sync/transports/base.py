"""The interface of a transport, and the messages of one round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from grpo_mega.weight_sync.transports.process_vm_readv import PeerMemory

ALIGNMENT = 32  # bytes; every message in a buffer starts at a multiple of it


@dataclass(frozen=True)
class BucketMessage:
    """`num_bytes` of one bucket between this rank and `peer`, from byte `start` of the sender's send buffer on.

    `large` lists (start in the message, bytes) of the pieces that may be sent in place (`Transport.send_in_place`). It
    is the same at both ends.
    """

    peer: int
    start: int
    num_bytes: int
    large: tuple[tuple[int, int], ...] = ()

    def parts(self) -> Iterator[tuple[int, int]]:
        """Yield (start, bytes) of the parts that are sent separately, in order: large pieces and the gaps between."""
        at = 0
        for start, num_bytes in (*self.large, (self.num_bytes, 0)):
            if start > at:
                yield at, start - at
            if num_bytes:
                yield start, num_bytes
            at = start + num_bytes


@dataclass(frozen=True)
class Round:
    """The messages of bucket `number` that a rank sends and receives, each sorted by peer."""

    number: int
    sends: Sequence[BucketMessage]
    receives: Sequence[BucketMessage]

    @property
    def send_bytes(self) -> int:
        """Bytes of the send buffer."""
        return max((m.start + aligned(m.num_bytes) for m in self.sends), default=0)

    @property
    def receive_bytes(self) -> int:
        """Bytes of the receive buffer, for transports that need one."""
        return sum(aligned(m.num_bytes) for m in self.receives)


class Transport(Protocol):
    """Moves the messages of one rank.

    The calls of a round are: `outgoing`, whose result the caller fills; `start`; `incoming` for each received message;
    `finish`. `outgoing` waits until a buffer is free, so all transports of a rank are asked for their buffers before
    one of them starts.

    `peer_memory` gives access to the memory of other ranks. To such a rank a message may contain addresses instead of
    values. None: the transport does not support it.
    """

    peer_memory: PeerMemory | None

    def outgoing(self, round_: Round) -> Tensor:
        """Return the send buffer, [send_bytes] uint8; wait until the round before the previous one has left it.

        Raises:
            TransportError: a receiver did not read that round in time, or its process exited.
        """
        ...

    def send_in_place(self, round_: Round, message: BucketMessage, start: int, memory: Tensor) -> bool:
        """Send a part of a message from parameter memory instead of the send buffer. Called before `start`.

        Args:
            round_: the round of the message.
            message: the message.
            start: first byte of the part in the message.
            memory: the values of the part, of any shape; its bytes are sent in order.

        Returns:
            False if it is not possible; the caller then fills the buffer.
        """
        ...

    def receive_in_place(self, round_: Round, message: BucketMessage, start: int, memory: Tensor) -> bool:
        """Receive a part of a message into parameter memory instead of the buffer. Called before `start`.

        Args:
            round_: the round of the message.
            message: the message.
            start: first byte of the part in the message.
            memory: target of the part, of any shape.

        Returns:
            False if it is not possible; the part then arrives in the buffer.
        """
        ...

    def start(self, round_: Round) -> None:
        """Start sending and receiving the messages of a round."""
        ...

    def incoming(self, round_: Round, message: BucketMessage) -> Tensor:
        """Return one received message, [num_bytes] uint8, once it has arrived; valid until `finish`.

        Raises:
            TransportError: the message did not arrive in time, or the sender's process exited.
        """
        ...

    def finish(self, round_: Round) -> None:
        """Release the received messages of a round; the caller has copied them.

        Raises:
            TransportError: a message that this rank sent was not received in time.
        """
        ...


class TransportError(RuntimeError):
    """A message between this rank and `peer` was not transferred in time. The text names both ranks."""

    def __init__(self, text: str, peer: int) -> None:
        super().__init__(text)
        self.peer = peer


def failed_wait(round_: Round, message: BucketMessage, rank: int, sends: bool, seconds: float, reason: str) -> str:
    """Return an error message that names both ranks of a message.

    Args:
        round_: the round of the message.
        message: the message.
        rank: this rank.
        sends: True if this rank is the sender.
        seconds: the limit of the wait.
        reason: for the wait's end.
    """
    ranks = f"rank {rank} to rank {message.peer}" if sends else f"rank {message.peer} to rank {rank}"
    return (
        f"bucket {round_.number}: {message.num_bytes} bytes from {ranks} did not arrive within {seconds:g} s ({reason})"
    )


def aligned(num_bytes: int) -> int:
    """Return `num_bytes` rounded up to a multiple of ALIGNMENT."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
