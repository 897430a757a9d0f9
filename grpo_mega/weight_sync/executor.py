"""One rank's part of a plan, carried out: copy what is local, pack, send, take over, with two buffers in turn.

While bucket n is on its way, bucket n + 1 is packed; then n is written into the engine. Each message begins with a
header (plan, version, bucket, bytes), so that a bucket that comes twice, late or not at all is noticed before its bytes
are written. To a rank that can read this one's memory a message says where the bytes are instead: they are copied once,
from the policy's parameters to the engine's, and stay as they are until all turns are over. Gloo reads and fills large
pieces there, too; so one in the wrong place is noticed after it was written, and before anything is sampled from it.
What goes wrong on one rank is kept until all turns are over: the others must not be left waiting.
Asserted by tests/parallel/test_sync_ranks.py, with injected faults.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_mega.interfaces import HeldSlice, WeightSink
from grpo_mega.types import TensorSlice
from grpo_mega.weight_sync.rank_schedule import HEADER_BYTES, RankPlan, TransferPiece
from grpo_mega.weight_sync.transports.base import BucketMessage, Round, Transport, TransportError
from grpo_mega.weight_sync.transports.process_vm_readv import (
    PLACE_BYTES,
    PeerMemory,
    StridedRange,
    fits,
    put_places,
    take_places,
)

_BYTES, _PLACES = 0, 1  # what follows a header, by its last word


class Execution:
    """Carries a plan out, as often as asked."""

    def __init__(
        self, mine: RankPlan, transports: dict[str, Transport], buffer_bytes: int, plan_hash: str, sink: WeightSink
    ) -> None:
        """`buffer_bytes`: what this rank holds for its transports."""
        self._mine, self._transports, self._sink = mine, transports, sink
        self.buffer_bytes = buffer_bytes
        self._plan_word = int(plan_hash, 16) - (1 << 63)
        self._faults: list[str] = []
        self._in_place: set[tuple[int, int, int]] = set()

    def run(self, shards: Sequence[HeldSlice], policy_version: int) -> list[str]:
        """Every rank calls it together. Returns what went wrong on this rank.

        Raises:
            TransportError: bytes did not come or go in time.
        """
        self._faults = []
        self._in_place.clear()
        by_tensor: dict[str, list[HeldSlice]] = defaultdict(list)
        for held in shards:
            by_tensor[held.hf.name].append(held)
        for hf, dtype in self._mine.local:
            self._write(hf, view_of(by_tensor, hf).to(dtype))
        num_turns = max((len(turns) for turns in self._mine.turns.values()), default=0)
        for n in range(num_turns + 1):
            if n < num_turns:
                free = {kind: self._transports[kind].outgoing(turns[n]) for kind, turns in self._mine.turns.items()}
                for kind, turns in self._mine.turns.items():
                    self._pack(kind, free[kind], turns[n], by_tensor, policy_version)
            if n:
                for kind, turns in self._mine.turns.items():
                    self._take_over(kind, turns[n - 1], policy_version)
        return self._faults

    def _pack(
        self, kind: str, buffer: Tensor, turn: Round, by_tensor: dict[str, list[HeldSlice]], version: int
    ) -> None:
        transport = self._transports[kind]
        for message in turn.sends:
            part = buffer[message.start : message.start + message.num_bytes]
            pieces = self._mine.pieces[turn.number, self._mine.rank, message.peer]
            places = _places_of(pieces, by_tensor, message) if _reads(transport.peer_memory, message.peer) else None
            words = [*self._header(turn, message, version), _BYTES if places is None else _PLACES]
            part[:HEADER_BYTES].view(torch.int64)[: len(words)] = torch.tensor(words)
            if places is not None:
                put_places(part[HEADER_BYTES:], places)
                continue
            for piece in pieces:
                memory = holder_of(by_tensor, piece.hf).memory_of(piece.hf) if message.large else None
                memory = memory if memory is not None and memory.dtype == piece.dtype else None
                if memory is None or not transport.send_or_receive_in_place(
                    turn, message, piece.start, memory, sends=True
                ):
                    self._bytes_of(part, piece).copy_(view_of(by_tensor, piece.hf))
        self._receive_in_place(transport, turn)
        transport.start(turn)

    def _receive_in_place(self, transport: Transport, turn: Round) -> None:
        """Its memory, for what is large."""
        for message in turn.receives:
            for piece in self._mine.pieces[turn.number, message.peer, self._mine.rank] if message.large else ():
                memory = self._memory_of(piece)
                if memory is not None and transport.send_or_receive_in_place(
                    turn, message, piece.start, memory, sends=False
                ):
                    self._in_place.add((turn.number, message.peer, piece.start))

    def _take_over(self, kind: str, turn: Round, version: int) -> None:
        transport = self._transports[kind]
        for message in turn.receives:
            part = transport.incoming(turn, message)
            *found, form = part[:HEADER_BYTES].view(torch.int64)[:5].tolist()
            if found != self._header(turn, message, version):
                self._faults.append(
                    f"bucket {turn.number} from rank {message.peer} did not reach rank {self._mine.rank}: in its place "
                    f"is bucket {found[2]} of version {found[1]}, {found[3]} bytes"
                )
                continue
            pieces = self._mine.pieces[turn.number, message.peer, self._mine.rank]
            if form == _PLACES:
                places = take_places(part[HEADER_BYTES:], len(pieces))
                self._fetch(transport, message.peer, list(zip(pieces, places, strict=True)))
            else:
                for piece in pieces:
                    if (turn.number, message.peer, piece.start) not in self._in_place:
                        self._write(piece.hf, self._bytes_of(part, piece))
        transport.finish(turn)

    def _fetch(self, transport: Transport, peer: int, found: Sequence[tuple[TransferPiece, StridedRange]]) -> None:
        """From the memory of `peer` to the engine's; one after another by way of a buffer where only `write` knows."""
        assert transport.peer_memory is not None, "it was told where bytes are"
        pairs: list[tuple[StridedRange, StridedRange]] = []
        try:
            for piece, theirs in found:
                memory = self._memory_of(piece)
                ours = None if memory is None else StridedRange.of(memory)
                if ours is not None and fits(theirs, ours):
                    pairs.append((theirs, ours))
                    continue
                values = torch.empty(piece.hf.shape, dtype=piece.dtype)
                transport.peer_memory.read(peer, [(theirs, StridedRange.whole(values))])
                self._write(piece.hf, values)
            transport.peer_memory.read(peer, pairs)
        except OSError as error:
            names = ", ".join(dict.fromkeys(piece.hf.name for piece, _ in found[:3]))
            raise TransportError(f"{names} from rank {peer} to rank {self._mine.rank}: {error}", peer) from error

    def _memory_of(self, piece: TransferPiece) -> Tensor | None:
        try:
            memory = self._sink.memory_of(piece.hf)
        except (RuntimeError, ValueError):
            return None  # `write` says so
        return memory if memory is not None and memory.dtype == piece.dtype else None

    def _header(self, turn: Round, message: BucketMessage, version: int) -> list[int]:
        return [self._plan_word, version, turn.number, message.num_bytes]

    def _bytes_of(self, message: Tensor, piece: TransferPiece) -> Tensor:
        return message[piece.start : piece.start + piece.num_bytes].view(piece.dtype).view(piece.hf.shape)

    def _write(self, hf: TensorSlice, values: Tensor) -> None:
        try:
            self._sink.write(hf, values)
        except (RuntimeError, ValueError) as error:
            self._faults.append(f"{hf} on rank {self._mine.rank}: the engine refused it ({error})")


def _reads(peer_memory: PeerMemory | None, peer: int) -> bool:
    return peer_memory is not None and peer_memory.is_read_by(peer)


def _places_of(
    pieces: Sequence[TransferPiece], by_tensor: dict[str, list[HeldSlice]], message: BucketMessage
) -> list[StridedRange] | None:
    """Where another process finds all pieces of a message; None where one is computed first, or in too many parts."""
    if PLACE_BYTES * len(pieces) > message.num_bytes - HEADER_BYTES:
        return None
    places = []
    for piece in pieces:
        memory = holder_of(by_tensor, piece.hf).memory_of(piece.hf)
        place = StridedRange.of(memory) if memory is not None and memory.dtype == piece.dtype else None
        if place is None:
            return None
        places.append(place)
    return places


def view_of(by_tensor: dict[str, list[HeldSlice]], hf: TensorSlice) -> Tensor:
    """The policy's values of `hf`, which one of the shards contains."""
    return holder_of(by_tensor, hf).part(hf)


def holder_of(by_tensor: dict[str, list[HeldSlice]], hf: TensorSlice) -> HeldSlice:
    """The shard that contains `hf`."""
    for held in by_tensor[hf.name]:
        if held.contains(hf):
            return held
    raise AssertionError(f"the plan takes {hf} from a rank that does not hold it")
