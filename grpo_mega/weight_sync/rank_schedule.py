"""One rank's part of a plan: its turns, messages, and what each of them holds. Pure.

Asserted by tests/unit/weight_sync/test_rank_schedule.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from grpo_mega.types import TensorSlice
from grpo_mega.weight_sync.plan import LOCAL, ReshardPlan
from grpo_mega.weight_sync.transports.base import ALIGNMENT, BucketMessage, Round, aligned

HEADER_BYTES = 2 * ALIGNMENT  # of a message: five words of 64 bits
_LARGE_BYTES = 1 << 17  # a piece that gloo sends out of the policy's memory; smaller ones cost less as a copy


@dataclass(frozen=True)
class TransferPiece:
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
    turns: dict[str, list[Round]]
    pieces: dict[tuple[int, int, int], list[TransferPiece]]


def schedule_of_rank(plan: ReshardPlan, rank: int, dtypes: dict[str, torch.dtype], kinds: dict[str, str]) -> RankPlan:
    """The part of `rank`.

    Args:
        plan: the whole plan.
        rank: whose part.
        dtypes: of each tensor as it travels.
        kinds: link -> name of the transport that serves it.
    """
    pieces: dict[tuple[int, int, int], list[TransferPiece]] = defaultdict(list)
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
        message.append(TransferPiece(hf, dtypes[hf.name], start, int(plan.piece_bytes[piece])))
    return RankPlan(rank, local, _turns(plan, rank, kinds, pieces), dict(pieces))


def _turns(
    plan: ReshardPlan, rank: int, kinds: dict[str, str], pieces: dict[tuple[int, int, int], list[TransferPiece]]
) -> dict[str, list[Round]]:
    """Messages of every bucket, with their places in the senders' buffers."""

    def large(kind: str, bucket: int, src: int, dst: int) -> tuple[tuple[int, int], ...]:
        parts = ((piece.start, piece.num_bytes) for piece in pieces[bucket, src, dst])
        return tuple(part for part in parts if kind == "gloo" and part[1] >= _LARGE_BYTES)

    travels = np.flatnonzero(plan.bucket != LOCAL)
    keys = np.column_stack([plan.bucket[travels], plan.src[travels], plan.dst[travels]])
    groups, inverse = np.unique(keys, axis=0, return_inverse=True)
    sizes = np.bincount(inverse.ravel(), plan.transfer_bytes[travels], len(groups)).astype(np.int64)
    starts: dict[tuple[str, int, int], int] = defaultdict(int)
    sends: dict[tuple[str, int], list[BucketMessage]] = defaultdict(list)
    receives: dict[tuple[str, int], list[BucketMessage]] = defaultdict(list)
    for (bucket, src, dst), size in zip(groups.tolist(), sizes.tolist(), strict=True):
        kind = kinds["same_node" if plan.nodes[src] == plan.nodes[dst] else "across_nodes"]
        num_bytes = HEADER_BYTES + size
        start = starts[kind, bucket, src]
        starts[kind, bucket, src] += aligned(num_bytes)
        if src == rank:
            sends[kind, bucket].append(BucketMessage(dst, start, num_bytes, large(kind, bucket, src, dst)))
        if dst == rank:
            receives[kind, bucket].append(BucketMessage(src, start, num_bytes, large(kind, bucket, src, dst)))
    return {
        kind: [Round(n, sends.get((kind, n), []), receives.get((kind, n), [])) for n in range(plan.num_buckets)]
        for kind in sorted(set(kinds.values()))
    }
