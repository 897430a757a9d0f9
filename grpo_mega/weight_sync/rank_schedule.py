"""The schedule of one rank: its part of a reshard plan as rounds of messages, and the pieces in each message.

The round of a transfer, and so what is sent first, comes from `transfer_order.py`.

Pure functions. Asserted by tests/unit/weight_sync/test_rank_schedule.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from grpo_mega.types import TensorSlice
from grpo_mega.weight_sync.plan import ReshardPlan
from grpo_mega.weight_sync.traffic import LOCAL
from grpo_mega.weight_sync.transports.base import ALIGNMENT, BucketMessage, Round, aligned
from grpo_mega.weight_sync.transports.kinds import TRANSPORTS

HEADER_BYTES = 2 * ALIGNMENT  # of a message: five words of 64 bits
_LARGE_BYTES = 1 << 17  # bytes from which a piece is sent in place; for smaller pieces a copy is cheaper

PiecesByMessage = dict[tuple[int, int, int], list["TransferPiece"]]


@dataclass(frozen=True)
class TransferPiece:
    """A piece of a message: `num_bytes` of slice `hf` in dtype `dtype`, from byte `start` of the message on."""

    hf: TensorSlice
    dtype: torch.dtype
    start: int
    num_bytes: int


@dataclass(frozen=True)
class RankSchedule:
    """The messages and local copies of `rank` in a sync.

    `local` lists the slices that are copied inside the process, with their dtypes. `rounds` gives, for each kind of
    transport, the messages of every bucket. `pieces` gives the pieces of each message by (bucket, src, dst).
    """

    rank: int
    local: Sequence[tuple[TensorSlice, torch.dtype]]
    rounds: dict[str, list[Round]]
    pieces: PiecesByMessage


def schedule_of_rank(
    plan: ReshardPlan, rank: int, dtypes: dict[str, torch.dtype], kinds: dict[str, str]
) -> RankSchedule:
    """Return the schedule of `rank`.

    Args:
        plan: the whole plan.
        rank: the rank.
        dtypes: tensor -> dtype in which it is sent.
        kinds: link -> name of its transport.
    """
    pieces: PiecesByMessage = defaultdict(list)
    local = []
    transfers, piece_of = plan.pieces_of(np.flatnonzero((plan.src == rank) | (plan.dst == rank)))
    # Larger elements first, so that every piece of a message is aligned to its element size.
    names = list(plan.tensors)
    itemsizes = np.asarray([plan.tensors[name].itemsize for name in names])
    order = np.lexsort((piece_of, -itemsizes[plan.pieces.tensors[piece_of]]))
    for t, piece in zip(transfers[order].tolist(), piece_of[order].tolist(), strict=True):
        hf = plan.slice_of(piece)
        bucket, src, dst = int(plan.bucket[t]), int(plan.src[t]), int(plan.dst[t])
        if bucket == LOCAL:
            local.append((hf, dtypes[hf.name]))
            continue
        message = pieces[bucket, src, dst]
        start = message[-1].start + message[-1].num_bytes if message else HEADER_BYTES
        message.append(TransferPiece(hf, dtypes[hf.name], start, int(plan.piece_bytes[piece])))
    return RankSchedule(rank, local, _rounds_of_rank(plan, rank, kinds, pieces), dict(pieces))


def _rounds_of_rank(
    plan: ReshardPlan, rank: int, kinds: dict[str, str], pieces: PiecesByMessage
) -> dict[str, list[Round]]:
    """Return the messages of every bucket, with their positions in the senders' buffers."""

    def large_pieces(kind: str, bucket: int, src: int, dst: int) -> tuple[tuple[int, int], ...]:
        if not TRANSPORTS[kind].sends_in_place:
            return ()
        ranges = ((piece.start, piece.num_bytes) for piece in pieces[bucket, src, dst])
        return tuple(each for each in ranges if each[1] >= _LARGE_BYTES)

    remote = np.flatnonzero(plan.bucket != LOCAL)
    keys = np.column_stack([plan.bucket[remote], plan.src[remote], plan.dst[remote]])
    messages, inverse = np.unique(keys, axis=0, return_inverse=True)
    sizes = np.bincount(inverse.ravel(), plan.transfer_bytes[remote], len(messages)).astype(np.int64)
    starts: dict[tuple[str, int, int], int] = defaultdict(int)
    sends: dict[tuple[str, int], list[BucketMessage]] = defaultdict(list)
    receives: dict[tuple[str, int], list[BucketMessage]] = defaultdict(list)
    for (bucket, src, dst), size in zip(messages.tolist(), sizes.tolist(), strict=True):
        kind = kinds["same_node" if plan.nodes[src] == plan.nodes[dst] else "across_nodes"]
        num_bytes = HEADER_BYTES + size
        start = starts[kind, bucket, src]
        starts[kind, bucket, src] += aligned(num_bytes)
        if src == rank:
            sends[kind, bucket].append(BucketMessage(dst, start, num_bytes, large_pieces(kind, bucket, src, dst)))
        if dst == rank:
            receives[kind, bucket].append(BucketMessage(src, start, num_bytes, large_pieces(kind, bucket, src, dst)))
    return {
        kind: [Round(n, sends.get((kind, n), []), receives.get((kind, n), [])) for n in range(plan.num_buckets)]
        for kind in sorted(set(kinds.values()))
    }
