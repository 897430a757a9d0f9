"""Which of several holders sends a slice, and what the busiest link must carry whatever is chosen. Pure.

A rank sends and receives over two links: one to the other ranks of its node, one to other nodes. A receiver takes from
its own node whatever is held there, so which link a transfer uses is given; who sends is chosen.
Asserted by tests/unit/weight_sync/test_sender_choice.py and tests/unit/weight_sync/test_plan.py.
"""

from __future__ import annotations

import functools
import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from grpo_mega.weight_sync.slice_table import Ints, RankSet

Link = Literal["same_process", "same_node", "across_nodes"]
TRAVELS: tuple[Link, ...] = ("same_node", "across_nodes")


@dataclass(frozen=True)
class Flows:
    """Flow f: `sizes[f]` bytes, which each rank of `holders[source[f]]` (sorted) has, are wanted by rank `dst[f]`."""

    sizes: Ints
    source: Ints
    dst: Ints
    holders: Sequence[RankSet]
    nodes: tuple[int, ...]

    @functools.cached_property
    def choices(self) -> tuple[list[RankSet], Ints]:
        """The sets of ranks that may send, and for each flow the number of its set. (dst,) alone where the receiver
        has it itself."""
        ranks = len(self.nodes)
        cases, case_of = np.unique(self.source * ranks + self.dst, return_inverse=True)
        near: dict[tuple[int, int], RankSet] = {}
        members = [frozenset(each) for each in self.holders]
        numbers: dict[RankSet, int] = {}
        found = []
        for case in cases.tolist():
            source, dst = divmod(case, ranks)
            key = (source, self.nodes[dst])
            if key not in near:
                near[key] = self._near(*key)
            candidates = (dst,) if dst in members[source] else near[key]
            found.append(numbers.setdefault(candidates, len(numbers)))
        return list(numbers), np.asarray(found, np.int64)[case_of.ravel()]

    def _near(self, source: int, node: int) -> RankSet:
        """Who may send to a rank of `node` that does not have it: those of the node, or all."""
        holders = self.holders[source]
        return tuple(rank for rank in holders if self.nodes[rank] == node) or holders

    @functools.cached_property
    def link(self) -> Ints:
        """[flows]: -1 where the receiver has it, else number of the link in TRAVELS."""
        candidates, number = self.choices
        first = np.asarray([each[0] for each in candidates], np.int64)[number]
        nodes = np.asarray(self.nodes, np.int64)
        return np.where(first == self.dst, -1, nodes[first] != nodes[self.dst]).astype(np.int64)


def choose_senders(flows: Flows, flow: Ints, sizes: Ints) -> Ints:
    """The sender of each transfer: large ones first, each to the candidate that has least to send over that link, the
    lowest rank of several.

    Args:
        flows: of which every transfer is a part.
        flow: [transfers] number of its flow.
        sizes: [transfers] bytes.
    """
    candidates, number_of = flows.choices
    number, link = number_of[flow], flows.link[flow]
    src = np.asarray([each[0] for each in candidates], np.int64)[number]
    alone = np.asarray([len(each) == 1 for each in candidates], bool)[number]
    load = [_sums(src, sizes, alone & (link == each), len(flows.nodes)).tolist() for each in range(len(TRAVELS))]
    shared = np.flatnonzero(~alone)
    order = shared[np.argsort(-sizes[shared], kind="stable")]
    heaps: dict[tuple[int, int], list[tuple[int, int]]] = {}
    chosen = []
    for size, over, of in zip(sizes[order].tolist(), link[order].tolist(), number[order].tolist(), strict=True):
        busy = load[over]
        heap = heaps.get((over, of))
        if heap is None:
            heap = heaps[over, of] = [(busy[rank], rank) for rank in candidates[of]]
            heapq.heapify(heap)
        known, sender = heap[0]
        while known != busy[sender]:  # it sends more by now, for another set that it is in; loads only grow
            heapq.heapreplace(heap, (busy[sender], sender))
            known, sender = heap[0]
        busy[sender] += size
        heapq.heapreplace(heap, (busy[sender], sender))
        chosen.append(sender)
    src[order] = chosen
    return src


def lower_bounds(flows: Flows) -> dict[Link, int]:
    """Bytes that the busiest link of each kind carries at least, under any choice of senders.

    No rank receives less than what it wants and does not hold. And for any set S of ranks, the flows that only members
    of S may send are at least demand(S) / |S| for one of them; S is each set of candidates that occurs, counting what
    its subsets must send too, and all ranks together.
    """
    candidates, number = flows.choices
    bounds: dict[Link, int] = {}
    for i, link in enumerate(TRAVELS):
        of = flows.link == i
        arrives = _sums(flows.dst, flows.sizes, of, len(flows.nodes))
        must_send = _sums(number, flows.sizes, of, len(candidates))
        asked = {candidates[g]: int(must_send[g]) for g in np.flatnonzero(must_send).tolist()}
        bounds[link] = max(int(arrives.max(initial=0)), _most_loaded(asked))
    return bounds


def _sums(numbers: Ints, sizes: Ints, rows: NDArray[np.bool_], count: int) -> Ints:
    """[count]: exact sums of the sizes of some rows by their number."""
    total = np.zeros(count, np.int64)
    np.add.at(total, numbers[rows], sizes[rows])
    return total


def _most_loaded(asked: dict[RankSet, int]) -> int:
    """Max over S of ceil(demand(S) / |S|)."""
    if not asked:
        return 0
    asked = dict(asked)
    asked.setdefault(tuple(sorted({rank for ranks in asked for rank in ranks})), 0)
    containing: defaultdict[int, list[frozenset[int]]] = defaultdict(list)
    for ranks in asked:
        for rank in ranks:
            containing[rank].append(frozenset(ranks))
    total: defaultdict[frozenset[int], int] = defaultdict(int)
    for ranks, size in asked.items():
        for other in containing[ranks[0]]:
            if other.issuperset(ranks):
                total[other] += size
    return max(-(-size // len(ranks)) for ranks, size in total.items())
