"""The reshard plan: which rank sends which slice of which tensor to which rank, in which bucket. Pure.

A plan is made of all source shards and all sink layouts, so every rank makes the same one (its hash is exchanged before
the first use). What each line promises, and the test in tests/unit/weight_sync/test_plan.py that asserts it for 24
pairs of layouts:

- every byte that an engine stores is filled exactly once, from shards that do not overlap: checked while it is made;
- a rank receives only what it stores and does not hold; what it holds is copied inside its process;
- what several ranks hold is sent by the one on the receiver's node, and among equals by the least busy one: the
  busiest link carries at most 1.05 times what it must under any choice of senders;
- a bucket of a rank (what it sends and receives in one turn) never exceeds `bucket_bytes`, and two are alive.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from grpo_mega.types import TensorSlice, WeightMismatchError
from grpo_mega.weight_sync.bucketing import fill_buckets
from grpo_mega.weight_sync.coalescing import TransferClasses
from grpo_mega.weight_sync.sender_choice import TRAVELS, Link, choose_senders, lower_bounds
from grpo_mega.weight_sync.slice_table import (
    Boxes,
    Holdings,
    Ints,
    WireTensor,
    as_slice,
    cut,
    expand,
    merged,
    overlaps,
    volumes,
)

LOCAL = -1
"""The bucket of a transfer inside one process: it moves nothing between ranks and needs no buffer."""
CUT = 8  # a transfer is at most this part of a bucket, so that buckets fill well


@dataclass(frozen=True)
class ReshardPlan:
    """Transfers, ordered by bucket, sender, receiver, parcel.

    `pieces` are slices of tensors; those from `first[p]` to `first[p + 1]` are parcel p and always travel together.
    Transfer t brings parcel `parcel[t]` from rank `src[t]` to `dst[t]` in bucket `bucket[t]`, LOCAL when both are the
    same process. `nodes[r]` is rank r's node.
    """

    tensors: dict[str, WireTensor]
    nodes: tuple[int, ...]
    bucket_bytes: int
    pieces: Boxes
    first: Ints
    parcel: Ints
    src: Ints
    dst: Ints
    bucket: Ints
    bounds: dict[Link, int]

    @functools.cached_property
    def piece_bytes(self) -> Ints:
        """[pieces]."""
        return _bytes_of(self.tensors, self.pieces)

    @functools.cached_property
    def transfer_bytes(self) -> Ints:
        """[transfers]."""
        return np.add.reduceat(np.append(self.piece_bytes, 0), self.first[:-1])[self.parcel]

    @functools.cached_property
    def hash(self) -> str:
        """Sixteen hexadecimal digits of everything that a rank acts on."""
        words = hashlib.sha256(repr((self.tensors, self.nodes, self.bucket_bytes)).encode())
        for column in (self.pieces.tensors, self.pieces.starts, self.pieces.ends, self.first):
            words.update(np.ascontiguousarray(column, np.int64).tobytes())
        for column in (self.parcel, self.src, self.dst, self.bucket):
            words.update(np.ascontiguousarray(column, np.int64).tobytes())
        return words.hexdigest()[:16]

    @property
    def num_transfers(self) -> int:
        """Pieces that are brought to a rank."""
        return int(np.diff(self.first)[self.parcel].sum())

    @property
    def num_buckets(self) -> int:
        return int(self.bucket.max(initial=LOCAL)) + 1

    def links(self) -> Ints:
        """[transfers]: number of `Link` of each."""
        nodes = np.asarray(self.nodes, np.int64)
        across = nodes[self.src] != nodes[self.dst]
        return np.where(self.bucket == LOCAL, 0, 1 + across).astype(np.int64)

    def bytes_by_link(self) -> dict[Link, int]:
        """Bytes inside processes, between processes of a node, between nodes."""
        sums = np.bincount(self.links(), self.transfer_bytes, 3)
        return {link: int(sums[i]) for i, link in enumerate(LINKS)}

    def busiest(self) -> dict[Link, int]:
        """Most bytes that one rank sends, or receives, over each kind of link."""
        found: dict[Link, int] = {}
        for i, link in enumerate(LINKS[1:], 1):
            of = self.links() == i
            ends = (np.bincount(e[of], self.transfer_bytes[of], len(self.nodes)) for e in (self.src, self.dst))
            found[link] = int(max(e.max() for e in ends))
        return found

    def busiest_link_ratio(self) -> float:
        """The larger ratio of busiest link to lower bound; 1 where nothing travels."""
        busiest = self.busiest()
        return max((busiest[link] / bound for link, bound in self.bounds.items() if bound), default=1.0)

    def received_bytes(self) -> Ints:
        """[ranks]: from other ranks."""
        travels = self.bucket != LOCAL
        return np.bincount(self.dst[travels], self.transfer_bytes[travels], len(self.nodes)).astype(np.int64)

    def peak_buffer_bytes(self) -> int:
        """Most bytes of two buckets in a row on one rank."""
        if not self.num_buckets:
            return 0
        fill = np.zeros((self.num_buckets + 1, len(self.nodes)), np.int64)
        travels = self.bucket != LOCAL
        for end in (self.src, self.dst):
            np.add.at(fill, (self.bucket[travels], end[travels]), self.transfer_bytes[travels])
        return int((fill[:-1] + fill[1:]).max())

    def slice_of(self, piece: int) -> TensorSlice:
        return as_slice(self._names, self.tensors, *self._piece(piece))

    def pieces_of(self, transfers: Ints) -> tuple[Ints, Ints]:
        """(transfer, piece) for every piece of some transfers."""
        begin = self.first[self.parcel[transfers]]
        count = self.first[self.parcel[transfers] + 1] - begin
        return np.repeat(transfers, count), expand(begin, count)

    def of_rank(self, rank: int) -> Iterator[tuple[int, TensorSlice, int, int]]:
        """(bucket, slice, src, dst) of the pieces that `rank` sends or receives, in order."""
        rows, pieces = self.pieces_of(np.flatnonzero((self.src == rank) | (self.dst == rank)))
        for t, piece in zip(rows.tolist(), pieces.tolist(), strict=True):
            yield int(self.bucket[t]), self.slice_of(piece), int(self.src[t]), int(self.dst[t])

    def transfers_of(self, names: set[str], rank: int | None = None) -> Iterator[tuple[int, int, int]]:
        """(piece, src, dst) of the pieces of some tensors that travel; those that `rank` takes part in, or all."""
        chosen = np.asarray([name in names for name in self.tensors])[self.pieces.tensors]
        parcels = np.logical_or.reduceat(np.append(chosen, False), self.first[:-1])
        taken = parcels[self.parcel]
        if rank is not None:
            taken &= (self.src == rank) | (self.dst == rank)
        rows, pieces = self.pieces_of(np.flatnonzero(taken))
        rows, pieces = rows[chosen[pieces]], pieces[chosen[pieces]]
        yield from zip(pieces.tolist(), self.src[rows].tolist(), self.dst[rows].tolist(), strict=True)

    def _piece(self, piece: int) -> tuple[int, Ints, Ints]:
        return int(self.pieces.tensors[piece]), self.pieces.starts[piece], self.pieces.ends[piece]

    @functools.cached_property
    def _names(self) -> list[str]:
        return list(self.tensors)


LINKS: tuple[Link, ...] = ("same_process", *TRAVELS)


def plan_reshard(
    tensors: Mapping[str, WireTensor], held: Holdings, wanted: Holdings, nodes: Sequence[int], bucket_bytes: int
) -> ReshardPlan:
    """The plan that brings every box of `wanted` to its rank.

    Args:
        tensors: every tensor that travels, in checkpoint order.
        held: what each rank has, copies on several ranks included.
        wanted: what each rank needs; a box that a rank wants twice travels once.
        nodes: [ranks] node of each.
        bucket_bytes: see `ReshardPlan`.

    Raises:
        WeightMismatchError: shards overlap, or some wanted element is held nowhere (names tensor, slice and rank).
        ValueError: a bucket cannot hold one element.
    """
    itemsize = max((tensor.itemsize for tensor in tensors.values()), default=1)
    if bucket_bytes < CUT * itemsize:
        raise ValueError(f"weight_sync.bucket_bytes={bucket_bytes} is less than {CUT} elements; use more")
    sources, sinks = merged(held), merged(wanted)
    _check_disjoint(tensors, sources)
    sink, source, starts, ends = overlaps(sinks, sources)
    _check_covered(tensors, sinks, sink, starts, ends)
    starts, ends, parent = _cut(tensors, sinks.tensors[sink], starts, ends, bucket_bytes // CUT)
    sink, source = sink[parent], source[parent]
    pieces = Boxes(sinks.tensors[sink], starts, ends)
    sizes = _bytes_of(tensors, pieces)
    takers = sinks.rank_set[sink]
    classes = TransferClasses.of(
        sizes, sources.rank_set[source], takers, sources.rank_sets, sinks.rank_sets, tuple(nodes)
    )

    order, first = classes.parcels(sizes, bucket_bytes // CUT)
    pieces = Boxes(pieces.tensors[order], starts[order], ends[order])
    parcel_bytes = np.add.reduceat(np.append(sizes[order], 0), first[:-1])
    parcel, flow = classes.transfers(classes.class_of[order[first[:-1]]])
    dst = classes.flows.dst[flow]
    src = choose_senders(classes.flows, flow, parcel_bytes[parcel])
    bucket = fill_buckets(src, dst, parcel_bytes[parcel], len(nodes), bucket_bytes)
    order = np.lexsort((parcel, dst, src, bucket))
    return ReshardPlan(
        dict(tensors),
        tuple(nodes),
        bucket_bytes,
        pieces,
        first,
        parcel[order],
        src[order],
        dst[order],
        bucket[order],
        lower_bounds(classes.flows),
    )


def _bytes_of(tensors: Mapping[str, WireTensor], boxes: Boxes) -> Ints:
    itemsizes = np.asarray([t.itemsize for t in tensors.values()], np.int64)
    return volumes(boxes.starts, boxes.ends) * itemsizes[boxes.tensors]


def _check_disjoint(tensors: Mapping[str, WireTensor], sources: Holdings) -> None:
    i, j, starts, ends = overlaps(sources, sources)
    wrong = np.flatnonzero(i < j)
    if len(wrong):
        at = wrong[0]
        twice = as_slice(list(tensors), tensors, int(sources.tensors[i[at]]), starts[at], ends[at])
        raise WeightMismatchError(
            f"rank {sources.a_rank_of(i[at])} and rank {sources.a_rank_of(j[at])} of the policy hold {twice} in shards "
            "that differ; shards must be equal or disjoint"
        )


def _check_covered(tensors: Mapping[str, WireTensor], sinks: Holdings, sink: Ints, starts: Ints, ends: Ints) -> None:
    """Pieces of one sink box are disjoint because sources are: equal volumes mean that each element has one source."""
    filled = np.bincount(sink, volumes(starts, ends), len(sinks)).astype(np.int64)
    missing = np.flatnonzero(filled != volumes(sinks.starts, sinks.ends))
    if len(missing):
        at = int(missing[0])
        box = as_slice(list(tensors), tensors, int(sinks.tensors[at]), sinks.starts[at], sinks.ends[at])
        raise WeightMismatchError(
            f"{box}, wanted by rank {sinks.a_rank_of(at)} of the engine: the policy's ranks hold {filled[at]} of its "
            f"{int(np.prod(box.shape))} elements ({len(missing)} slices are incomplete)"
        )


def _cut(
    tensors: Mapping[str, WireTensor], numbers: Ints, starts: Ints, ends: Ints, max_bytes: int
) -> tuple[Ints, Ints, Ints]:
    """Boxes of at most `max_bytes`, and for each the row that it is a part of."""
    itemsizes = np.asarray([t.itemsize for t in tensors.values()], np.int64)[numbers]
    large = volumes(starts, ends) * itemsizes > max_bytes
    parts: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    parents = []
    for row in np.flatnonzero(large).tolist():
        for part in cut(starts[row].tolist(), ends[row].tolist(), max_bytes // int(itemsizes[row])):
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
