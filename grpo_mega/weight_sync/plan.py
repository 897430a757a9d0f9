"""The reshard plan: which rank sends which slice of which tensor to which rank, in which bucket.

A plan is a pure function of all source shards and all sink layouts, so every rank computes the same one. Its hash is
compared between the ranks before the first use.

Invariants, asserted by tests/unit/weight_sync/test_plan.py for 26 pairs of layouts:

- Every byte that an engine stores is filled exactly once, from shards that do not overlap. `plan_reshard` checks this.
- A rank receives only what it stores and does not hold. What it holds is copied inside its process.
- Among several holders, one on the receiver's node sends, and among those the least busy one. The busiest link carries
  at most 1.05 times the lower bound under any choice of senders.
- What a rank sends and receives in one bucket never exceeds `bucket_bytes`. At most two buckets are alive.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from grpo_mega.types import TensorSlice, WeightMismatchError
from grpo_mega.weight_sync.coalescing import TransferClasses
from grpo_mega.weight_sync.sender_choice import Link, choose_senders, lower_bounds
from grpo_mega.weight_sync.slice_table import (
    Ints,
    RankSliceTable,
    SentTensor,
    SliceTable,
    as_slice,
    expand_ranges,
    merge_equal_slices,
    num_elements,
    overlaps,
    split_slice,
)
from grpo_mega.weight_sync.traffic import LOCAL, PlanTraffic
from grpo_mega.weight_sync.transfer_order import fill_buckets

TRANSFERS_PER_BUCKET = 8  # a transfer is at most 1/8 of a bucket, so that buckets fill well


@dataclass(frozen=True)
class ReshardPlan:
    """Transfers, ordered by bucket, sender, receiver and transfer group.

    `pieces` are slices of tensors. Pieces `group_starts[g]` to `group_starts[g + 1]` form transfer group g, and are
    always sent together. Transfer t brings group `group[t]` from rank `src[t]` to rank `dst[t]` in bucket `bucket[t]`,
    which is LOCAL if both ranks are the same. `nodes[r]` is the node of rank r.
    """

    tensors: dict[str, SentTensor]
    nodes: tuple[int, ...]
    bucket_bytes: int
    pieces: SliceTable
    group_starts: Ints
    group: Ints
    src: Ints
    dst: Ints
    bucket: Ints
    bounds: dict[Link, int]

    @functools.cached_property
    def piece_bytes(self) -> Ints:
        """Bytes of each piece: [pieces]."""
        return _slice_bytes(self.tensors, self.pieces)

    @functools.cached_property
    def transfer_bytes(self) -> Ints:
        """Bytes of each transfer: [transfers]."""
        return np.add.reduceat(np.append(self.piece_bytes, 0), self.group_starts[:-1])[self.group]

    @functools.cached_property
    def traffic(self) -> PlanTraffic:
        """Bytes that the plan moves over each kind of link."""
        return PlanTraffic(self.src, self.dst, self.bucket, self.transfer_bytes, self.nodes, self.bounds)

    @functools.cached_property
    def hash(self) -> str:
        """Sixteen hexadecimal digits of a hash of everything that a rank acts on."""
        words = hashlib.sha256(repr((self.tensors, self.nodes, self.bucket_bytes)).encode())
        for column in (self.pieces.tensors, self.pieces.starts, self.pieces.ends, self.group_starts):
            words.update(np.ascontiguousarray(column, np.int64).tobytes())
        for column in (self.group, self.src, self.dst, self.bucket):
            words.update(np.ascontiguousarray(column, np.int64).tobytes())
        return words.hexdigest()[:16]

    @property
    def num_transfers(self) -> int:
        """Number of pieces that are sent to a rank; a piece for several ranks counts once for each."""
        return int(np.diff(self.group_starts)[self.group].sum())

    @property
    def num_buckets(self) -> int:
        """Number of buckets, which is the number of rounds of a sync."""
        return int(self.bucket.max(initial=LOCAL)) + 1

    def slice_of(self, piece: int) -> TensorSlice:
        """Return the slice of a piece."""
        row = self.pieces.tensors[piece], self.pieces.starts[piece], self.pieces.ends[piece]
        return as_slice(self._names, self.tensors, int(row[0]), row[1], row[2])

    def pieces_of(self, transfers: Ints) -> tuple[Ints, Ints]:
        """Return (transfer, piece), both [pieces of all transfers], for every piece of `transfers` ([n], numbers)."""
        begin = self.group_starts[self.group[transfers]]
        count = self.group_starts[self.group[transfers] + 1] - begin
        return np.repeat(transfers, count), expand_ranges(begin, count)

    def of_rank(self, rank: int) -> Iterator[tuple[int, TensorSlice, int, int]]:
        """Yield (bucket, slice, src, dst) of the pieces that `rank` sends or receives, in order."""
        rows, pieces = self.pieces_of(np.flatnonzero((self.src == rank) | (self.dst == rank)))
        for t, piece in zip(rows.tolist(), pieces.tolist(), strict=True):
            yield int(self.bucket[t]), self.slice_of(piece), int(self.src[t]), int(self.dst[t])

    def transfers_of(self, names: Collection[str], rank: int | None = None) -> Iterator[tuple[int, int, int]]:
        """Yield (piece, src, dst) of the transfers of the named tensors.

        Args:
            names: of the tensors.
            rank: only transfers that this rank sends or receives; None: all transfers.
        """
        chosen = np.asarray([name in names for name in self.tensors])[self.pieces.tensors]
        groups = np.logical_or.reduceat(np.append(chosen, False), self.group_starts[:-1])
        transfers = groups[self.group]
        if rank is not None:
            transfers &= (self.src == rank) | (self.dst == rank)
        rows, pieces = self.pieces_of(np.flatnonzero(transfers))
        rows, pieces = rows[chosen[pieces]], pieces[chosen[pieces]]
        yield from zip(pieces.tolist(), self.src[rows].tolist(), self.dst[rows].tolist(), strict=True)

    @functools.cached_property
    def _names(self) -> list[str]:
        return list(self.tensors)


def plan_reshard(
    tensors: Mapping[str, SentTensor],
    held: RankSliceTable,
    wanted: RankSliceTable,
    nodes: Sequence[int],
    bucket_bytes: int,
) -> ReshardPlan:
    """Return the plan that brings every slice of `wanted` to its ranks.

    Args:
        tensors: every tensor that is sent, in checkpoint order.
        held: the slices that each rank holds, including copies on several ranks.
        wanted: the slices that each rank needs. A slice that a rank lists twice is sent once.
        nodes: [ranks] node of each rank.
        bucket_bytes: limit of what a rank sends and receives in one bucket.

    Raises:
        WeightMismatchError: shards overlap, or an element of `wanted` is held by no rank (names tensor, slice, rank).
        ValueError: `bucket_bytes` is too small.
    """
    itemsize = max((tensor.itemsize for tensor in tensors.values()), default=1)
    if bucket_bytes < TRANSFERS_PER_BUCKET * itemsize:
        raise ValueError(
            f"weight_sync.bucket_bytes={bucket_bytes} must be at least {TRANSFERS_PER_BUCKET * itemsize}, "
            f"{TRANSFERS_PER_BUCKET} elements; use a larger value"
        )
    sources, sinks = merge_equal_slices(held), merge_equal_slices(wanted)
    _check_disjoint(tensors, sources)
    sink, source, starts, ends = overlaps(sinks, sources)
    _check_covered(tensors, sinks, sink, starts, ends)
    max_bytes = bucket_bytes // TRANSFERS_PER_BUCKET
    starts, ends, parent = _split_large(tensors, sinks.tensors[sink], starts, ends, max_bytes)
    sink, source = sink[parent], source[parent]
    pieces = SliceTable(sinks.tensors[sink], starts, ends)
    sizes = _slice_bytes(tensors, pieces)
    classes = TransferClasses.of(
        sizes, sources.rank_set[source], sinks.rank_set[sink], sources.rank_sets, sinks.rank_sets, tuple(nodes)
    )

    order, group_starts = classes.transfer_groups(sizes, max_bytes)
    pieces = SliceTable(pieces.tensors[order], starts[order], ends[order])
    group_bytes = np.add.reduceat(np.append(sizes[order], 0), group_starts[:-1])
    group, flow = classes.transfers(classes.class_of[order[group_starts[:-1]]])
    dst = classes.flows.dst[flow]
    src = choose_senders(classes.flows, flow, group_bytes[group])
    bucket = fill_buckets(src, dst, group_bytes[group], len(nodes), bucket_bytes)
    order = np.lexsort((group, dst, src, bucket))
    return ReshardPlan(
        dict(tensors),
        tuple(nodes),
        bucket_bytes,
        pieces,
        group_starts,
        group[order],
        src[order],
        dst[order],
        bucket[order],
        lower_bounds(classes.flows),
    )


def _slice_bytes(tensors: Mapping[str, SentTensor], slices: SliceTable) -> Ints:
    itemsizes = np.asarray([t.itemsize for t in tensors.values()], np.int64)
    return num_elements(slices.starts, slices.ends) * itemsizes[slices.tensors]


def _check_disjoint(tensors: Mapping[str, SentTensor], sources: RankSliceTable) -> None:
    i, j, starts, ends = overlaps(sources, sources)
    wrong = np.flatnonzero(i < j)
    if len(wrong):
        at = wrong[0]
        shared = as_slice(list(tensors), tensors, int(sources.tensors[i[at]]), starts[at], ends[at])
        raise WeightMismatchError(
            f"rank {sources.lowest_rank(i[at])} and rank {sources.lowest_rank(j[at])} of the policy hold {shared} "
            "in different shards; shards must be equal or disjoint"
        )


def _check_covered(
    tensors: Mapping[str, SentTensor], sinks: RankSliceTable, sink: Ints, starts: Ints, ends: Ints
) -> None:
    """Raise if an element of a sink slice has no source.

    The pieces of one sink slice are disjoint because the sources are. So equal sums of elements mean that each element
    has exactly one source.
    """
    filled = np.bincount(sink, num_elements(starts, ends), len(sinks)).astype(np.int64)
    missing = np.flatnonzero(filled != num_elements(sinks.starts, sinks.ends))
    if len(missing):
        at = int(missing[0])
        hf = as_slice(list(tensors), tensors, int(sinks.tensors[at]), sinks.starts[at], sinks.ends[at])
        raise WeightMismatchError(
            f"{hf}, needed by rank {sinks.lowest_rank(at)} of the engine: the policy's ranks hold {filled[at]} of its "
            f"{int(np.prod(hf.shape))} elements ({len(missing)} slices are incomplete)"
        )


def _split_large(
    tensors: Mapping[str, SentTensor], numbers: Ints, starts: Ints, ends: Ints, max_bytes: int
) -> tuple[Ints, Ints, Ints]:
    """Return (starts, ends, parent): slices of at most `max_bytes`, and the input row that each is a part of."""
    itemsizes = np.asarray([t.itemsize for t in tensors.values()], np.int64)[numbers]
    large = num_elements(starts, ends) * itemsizes > max_bytes
    parts: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    parents = []
    for row in np.flatnonzero(large).tolist():
        for part in split_slice(starts[row].tolist(), ends[row].tolist(), max_bytes // int(itemsizes[row])):
            parts.append(part)
            parents.append(row)
    if not parts:
        return starts, ends, np.arange(len(starts))
    whole = np.flatnonzero(~large)
    parent = np.concatenate([whole, np.asarray(parents, np.int64)])
    low = np.concatenate([starts[whole], np.asarray([p[0] for p in parts], np.int64)])
    high = np.concatenate([ends[whole], np.asarray([p[1] for p in parts], np.int64)])
    order = np.argsort(parent, kind="stable")
    return low[order], high[order], parent[order]
