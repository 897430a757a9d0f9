"""One rank's part of a plan, carried out: copy what is local, pack, send, take over, with two buffers in turn.

While bucket n is on its way, bucket n + 1 is packed; then n is written into the engine. Each message begins with a
header (plan, version, bucket, bytes), so that a bucket that comes twice, late or not at all is noticed before its bytes
are written. To a rank that can read this one's memory a message says where the bytes are instead: they are copied once,
from the policy's parameters to the engine's, and stay as they are until all turns are over.
What goes wrong on one rank is kept until all turns are over: the others must not be left waiting.
Asserted by tests/parallel/test_sync_ranks.py, with injected faults.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grpo_mega.interfaces import HeldSlice, WeightSink
from grpo_mega.types import TensorSlice
from grpo_mega.weight_sync.plan import LOCAL, Plan
from grpo_mega.weight_sync.remote_memory import PLACE_BYTES, Neighbours, Runs, fits, put_places, take_places
from grpo_mega.weight_sync.transport import ALIGNMENT, Message, Transport, TransportError, Turn, aligned

HEADER_BYTES = 2 * ALIGNMENT  # five words of 64 bits, the last says which of these follow
_BYTES, _PLACES = 0, 1


@dataclass(frozen=True)
class Piece:
    """One transfer as a rank sees it: where in its message the bytes are."""

    hf: TensorSlice
    dtype: torch.dtype
    start: int
    num_bytes: int


@dataclass(frozen=True)
class RankPlan:
    """`turns`: what goes over one kind of link in each bucket; `pieces` of each message by (bucket, src, dst)."""

    rank: int
    local: Sequence[tuple[TensorSlice, torch.dtype]]
    turns: dict[str, list[Turn]]
    pieces: dict[tuple[int, int, int], list[Piece]]


def rank_plan(plan: Plan, rank: int, dtypes: dict[str, torch.dtype], kinds: dict[str, str]) -> RankPlan:
    """The part of `rank`.

    Args:
        plan: the whole plan.
        rank: whose part.
        dtypes: of each tensor as it travels.
        kinds: link -> name of the transport that serves it.
    """
    pieces: dict[tuple[int, int, int], list[Piece]] = defaultdict(list)
    local = []
    mine, piece_of = plan.pieces_of(np.flatnonzero((plan.src == rank) | (plan.dst == rank)))
    # Larger elements first: every piece of a message is aligned to its own elements.
    names = list(plan.tensors)
    itemsizes = np.asarray([plan.tensors[name].itemsize for name in names])
    order = np.lexsort((piece_of, -itemsizes[plan.pieces.tensors[piece_of]]))
    for t, piece in zip(mine[order].tolist(), piece_of[order].tolist(), strict=True):
        hf = plan.slice_of(piece)
        bucket, src, dst = int(plan.bucket[t]), int(plan.src[t]), int(plan.dst[t])
        if bucket == LOCAL:
            local.append((hf, dtypes[hf.name]))
            continue
        message = pieces[bucket, src, dst]
        start = message[-1].start + message[-1].num_bytes if message else HEADER_BYTES
        message.append(Piece(hf, dtypes[hf.name], start, int(plan.piece_bytes[piece])))
    return RankPlan(rank, local, _turns(plan, rank, kinds), dict(pieces))


def _turns(plan: Plan, rank: int, kinds: dict[str, str]) -> dict[str, list[Turn]]:
    """Messages of every bucket, with their places in the senders' buffers."""
    travels = np.flatnonzero(plan.bucket != LOCAL)
    keys = np.column_stack([plan.bucket[travels], plan.src[travels], plan.dst[travels]])
    groups, inverse = np.unique(keys, axis=0, return_inverse=True)
    sizes = np.bincount(inverse.ravel(), plan.transfer_bytes[travels], len(groups)).astype(np.int64)
    starts: dict[tuple[str, int, int], int] = defaultdict(int)
    sends: dict[tuple[str, int], list[Message]] = defaultdict(list)
    receives: dict[tuple[str, int], list[Message]] = defaultdict(list)
    for (bucket, src, dst), size in zip(groups.tolist(), sizes.tolist(), strict=True):
        kind = kinds["same_node" if plan.nodes[src] == plan.nodes[dst] else "across_nodes"]
        num_bytes = HEADER_BYTES + size
        start = starts[kind, bucket, src]
        starts[kind, bucket, src] += aligned(num_bytes)
        if src == rank:
            sends[kind, bucket].append(Message(dst, start, num_bytes))
        if dst == rank:
            receives[kind, bucket].append(Message(src, start, num_bytes))
    return {
        kind: [Turn(n, sends.get((kind, n), []), receives.get((kind, n), [])) for n in range(plan.num_buckets)]
        for kind in sorted(set(kinds.values()))
    }


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

    def run(self, shards: Sequence[HeldSlice], policy_version: int) -> list[str]:
        """Every rank calls it together. Returns what went wrong on this rank.

        Raises:
            TransportError: bytes did not come or go in time.
        """
        self._faults = []
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

    def _pack(self, kind: str, buffer: Tensor, turn: Turn, by_tensor: dict[str, list[HeldSlice]], version: int) -> None:
        transport = self._transports[kind]
        for message in turn.sends:
            part = buffer[message.start : message.start + message.num_bytes]
            pieces = self._mine.pieces[turn.number, self._mine.rank, message.peer]
            places = _places_of(pieces, by_tensor, message) if _reads(transport.neighbours, message.peer) else None
            words = [*self._header(turn, message, version), _BYTES if places is None else _PLACES]
            part[:HEADER_BYTES].view(torch.int64)[: len(words)] = torch.tensor(words)
            if places is not None:
                put_places(part[HEADER_BYTES:], places)
                continue
            for piece in pieces:
                self._bytes_of(part, piece).copy_(view_of(by_tensor, piece.hf))
        transport.start(turn)

    def _take_over(self, kind: str, turn: Turn, version: int) -> None:
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
                for piece, place in zip(pieces, take_places(part[HEADER_BYTES:], len(pieces)), strict=True):
                    self._fetch(transport, message.peer, piece, place)
            else:
                for piece in pieces:
                    self._write(piece.hf, self._bytes_of(part, piece))
        transport.finish(turn)

    def _fetch(self, transport: Transport, peer: int, piece: Piece, theirs: Runs) -> None:
        """From the memory of `peer` to the engine's, or by way of a buffer to where only its `write` knows."""
        assert transport.neighbours is not None, "it was told where bytes are"
        memory = self._memory_of(piece)
        ours = None if memory is None else Runs.of(memory)
        values = None
        if ours is None or not fits(theirs, ours):
            values = torch.empty(piece.hf.shape, dtype=piece.dtype)
            ours = Runs.of(values)
            assert ours is not None, "it has no gaps"
        try:
            transport.neighbours.read(peer, theirs, ours)
        except OSError as error:
            raise TransportError(f"{piece.hf} from rank {peer} to rank {self._mine.rank}: {error}", peer) from error
        if values is not None:
            self._write(piece.hf, values)

    def _memory_of(self, piece: Piece) -> Tensor | None:
        try:
            memory = self._sink.memory_of(piece.hf)
        except (RuntimeError, ValueError):
            return None  # `write` says so
        return memory if memory is not None and memory.dtype == piece.dtype else None

    def _header(self, turn: Turn, message: Message, version: int) -> list[int]:
        return [self._plan_word, version, turn.number, message.num_bytes]

    def _bytes_of(self, message: Tensor, piece: Piece) -> Tensor:
        return message[piece.start : piece.start + piece.num_bytes].view(piece.dtype).view(piece.hf.shape)

    def _write(self, hf: TensorSlice, values: Tensor) -> None:
        try:
            self._sink.write(hf, values)
        except (RuntimeError, ValueError) as error:
            self._faults.append(f"{hf} on rank {self._mine.rank}: the engine refused it ({error})")


def _reads(neighbours: Neighbours | None, peer: int) -> bool:
    return neighbours is not None and neighbours.is_read_by(peer)


def _places_of(pieces: Sequence[Piece], by_tensor: dict[str, list[HeldSlice]], message: Message) -> list[Runs] | None:
    """Where another process finds all pieces of a message; None where one is computed first, or in too many parts."""
    if PLACE_BYTES * len(pieces) > message.num_bytes - HEADER_BYTES:
        return None
    places = []
    for piece in pieces:
        memory = holder_of(by_tensor, piece.hf).memory_of(piece.hf)
        place = Runs.of(memory) if memory is not None and memory.dtype == piece.dtype else None
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
