"""Execution of one rank's schedule: copy local slices, pack, send, receive and write, with two buffers.

While bucket n is in flight, bucket n + 1 is packed; then bucket n is written into the engine. Each message begins with
a header (plan, version, bucket, bytes). So a bucket that is duplicated, outdated or missing is detected before its
bytes are written.

A message to a rank that can read this rank's memory contains addresses instead of values. The receiver copies the
values once, from the policy's parameters to the engine's. The parameters must not change until all rounds are finished.

With gloo, large pieces are sent from and received into parameter memory. A misplaced one of them is therefore detected
after it was written, and before the engine samples.

A failure on one rank is recorded until all rounds are finished, because other ranks wait for this rank's messages.
Asserted by tests/parallel/test_sync_ranks.py, with injected faults.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_mega.interfaces import HeldSlice, WeightSink
from grpo_mega.types import TensorSlice
from grpo_mega.weight_sync.rank_schedule import HEADER_BYTES, RankSchedule, TransferPiece
from grpo_mega.weight_sync.transports.base import BucketMessage, Round, Transport, TransportError
from grpo_mega.weight_sync.transports.process_vm_readv import (
    RANGE_BYTES,
    PeerMemory,
    StridedRange,
    compatible,
    read_range_table,
    write_range_table,
)

ShardsByTensor = dict[str, list[HeldSlice]]
_VALUES, _ADDRESSES = 0, 1  # content of a message, in the last word of its header


class ScheduleExecutor:
    """Executes the schedule of one rank, any number of times."""

    def __init__(
        self,
        schedule: RankSchedule,
        transports: dict[str, Transport],
        buffer_bytes: int,
        plan_hash: str,
        sink: WeightSink,
    ) -> None:
        """Create the executor of this rank.

        Args:
            schedule: of this rank.
            transports: by kind, as in `schedule.rounds`.
            buffer_bytes: bytes that this rank holds for its transports.
            plan_hash: `ReshardPlan.hash`, for the headers.
            sink: the engine's end on this rank.
        """
        self._schedule, self._transports, self._sink = schedule, transports, sink
        self.buffer_bytes = buffer_bytes
        self._plan_word = int(plan_hash, 16) - (1 << 63)
        self._faults: list[str] = []
        self._in_place: set[tuple[int, int, int]] = set()  # (bucket, sender, start) of pieces received in place

    def run(self, shards: Sequence[HeldSlice], policy_version: int) -> list[str]:
        """Collective: move the weights of all ranks, and return the failures on this rank.

        Args:
            shards: the policy's slices on this rank.
            policy_version: of the weights.

        Raises:
            TransportError: a message was not transferred in time.
        """
        self._faults = []
        self._in_place.clear()
        by_tensor: ShardsByTensor = defaultdict(list)
        for held in shards:
            by_tensor[held.hf.name].append(held)
        for hf, dtype in self._schedule.local:
            self._write(hf, values_of(by_tensor, hf).to(dtype))
        rounds_by_kind = self._schedule.rounds
        num_rounds = max((len(rounds) for rounds in rounds_by_kind.values()), default=0)
        for n in range(num_rounds + 1):
            if n < num_rounds:
                buffers = {kind: self._transports[kind].outgoing(rounds[n]) for kind, rounds in rounds_by_kind.items()}
                for kind, rounds in rounds_by_kind.items():
                    self._send(kind, buffers[kind], rounds[n], by_tensor, policy_version)
            if n:
                for kind, rounds in rounds_by_kind.items():
                    self._receive(kind, rounds[n - 1], policy_version)
        return self._faults

    def _send(self, kind: str, buffer: Tensor, round_: Round, by_tensor: ShardsByTensor, version: int) -> None:
        """Fill the send buffer and start the round."""
        transport = self._transports[kind]
        for message in round_.sends:
            part = buffer[message.start : message.start + message.num_bytes]
            pieces = self._schedule.pieces[round_.number, self._schedule.rank, message.peer]
            readable = transport.peer_memory is not None and transport.peer_memory.is_read_by(message.peer)
            addresses = _addresses_of(pieces, by_tensor, message) if readable else None
            words = [*self._header(round_, message, version), _VALUES if addresses is None else _ADDRESSES]
            part[:HEADER_BYTES].view(torch.int64)[: len(words)] = torch.tensor(words)
            if addresses is not None:
                write_range_table(part[HEADER_BYTES:], addresses)
                continue
            for piece in pieces:
                memory = slice_holding(by_tensor, piece.hf).memory_of(piece.hf) if message.large else None
                memory = memory if memory is not None and memory.dtype == piece.dtype else None
                if memory is None or not transport.send_in_place(round_, message, piece.start, memory):
                    self._bytes_of(part, piece).copy_(values_of(by_tensor, piece.hf))
        self._prepare_receiving_in_place(transport, round_)
        transport.start(round_)

    def _prepare_receiving_in_place(self, transport: Transport, round_: Round) -> None:
        """Register the engine's memory for large pieces of this round."""
        for message in round_.receives:
            if not message.large:
                continue
            for piece in self._schedule.pieces[round_.number, message.peer, self._schedule.rank]:
                memory = self._sink_memory(piece)
                if memory is not None and transport.receive_in_place(round_, message, piece.start, memory):
                    self._in_place.add((round_.number, message.peer, piece.start))

    def _receive(self, kind: str, round_: Round, version: int) -> None:
        """Write the received messages of a round into the engine."""
        transport = self._transports[kind]
        for message in round_.receives:
            part = transport.incoming(round_, message)
            *found, content = part[:HEADER_BYTES].view(torch.int64)[:5].tolist()
            if found != self._header(round_, message, version):
                self._faults.append(
                    f"bucket {round_.number} from rank {message.peer} to rank {self._schedule.rank} was expected, but "
                    f"bucket {found[2]} of version {found[1]}, {found[3]} bytes, was received"
                )
                continue
            pieces = self._schedule.pieces[round_.number, message.peer, self._schedule.rank]
            if content == _ADDRESSES:
                addresses = read_range_table(part[HEADER_BYTES:], len(pieces))
                self._read_peer(transport.peer_memory, message.peer, list(zip(pieces, addresses, strict=True)))
            else:
                for piece in pieces:
                    if (round_.number, message.peer, piece.start) not in self._in_place:
                        self._write(piece.hf, self._bytes_of(part, piece))
        transport.finish(round_)

    def _read_peer(
        self, peer_memory: PeerMemory | None, peer: int, found: Sequence[tuple[TransferPiece, StridedRange]]
    ) -> None:
        """Copy pieces from the memory of `peer` to the engine's memory, or through `write` where that is needed."""
        assert peer_memory is not None, "a peer sends addresses only if this rank can read its memory"
        pairs: list[tuple[StridedRange, StridedRange]] = []
        try:
            for piece, theirs in found:
                memory = self._sink_memory(piece)
                ours = None if memory is None else StridedRange.of(memory)
                if ours is not None and compatible(theirs, ours):
                    pairs.append((theirs, ours))
                    continue
                values = torch.empty(piece.hf.shape, dtype=piece.dtype)
                peer_memory.read(peer, [(theirs, StridedRange.whole(values))])
                self._write(piece.hf, values)
            peer_memory.read(peer, pairs)
        except OSError as error:
            names = ", ".join(dict.fromkeys(piece.hf.name for piece, _ in found[:3]))
            raise TransportError(f"{names} from rank {peer} to rank {self._schedule.rank}: {error}", peer) from error

    def _sink_memory(self, piece: TransferPiece) -> Tensor | None:
        """Return the engine's memory of a piece, or None if `write` must store the values."""
        try:
            memory = self._sink.memory_of(piece.hf)
        except (RuntimeError, ValueError):
            return None  # `write` reports the same failure
        return memory if memory is not None and memory.dtype == piece.dtype else None

    def _header(self, round_: Round, message: BucketMessage, version: int) -> list[int]:
        return [self._plan_word, version, round_.number, message.num_bytes]

    def _bytes_of(self, message: Tensor, piece: TransferPiece) -> Tensor:
        return message[piece.start : piece.start + piece.num_bytes].view(piece.dtype).view(piece.hf.shape)

    def _write(self, hf: TensorSlice, values: Tensor) -> None:
        try:
            self._sink.write(hf, values)
        except (RuntimeError, ValueError) as error:
            self._faults.append(f"{hf} on rank {self._schedule.rank}: the engine rejected it ({error})")


def _addresses_of(
    pieces: Sequence[TransferPiece], by_tensor: ShardsByTensor, message: BucketMessage
) -> list[StridedRange] | None:
    """Return the addresses of all pieces of a message in this process.

    Return None if the table does not fit the message, if values must be computed or converted first, or if a piece is
    not evenly spaced.
    """
    if RANGE_BYTES * len(pieces) > message.num_bytes - HEADER_BYTES:
        return None
    addresses = []
    for piece in pieces:
        memory = slice_holding(by_tensor, piece.hf).memory_of(piece.hf)
        address = StridedRange.of(memory) if memory is not None and memory.dtype == piece.dtype else None
        if address is None:
            return None
        addresses.append(address)
    return addresses


def values_of(by_tensor: ShardsByTensor, hf: TensorSlice) -> Tensor:
    """Return the policy's values of `hf`, shaped `hf.shape`; one of the shards must contain the slice."""
    return slice_holding(by_tensor, hf).part(hf)


def slice_holding(by_tensor: ShardsByTensor, hf: TensorSlice) -> HeldSlice:
    """Return the shard that contains `hf`."""
    for held in by_tensor[hf.name]:
        if held.contains(hf):
            return held
    raise AssertionError(f"the plan sends {hf} from a rank that does not hold it")
