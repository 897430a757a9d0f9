"""Choice of the sender among several holders, and the lower bound of the busiest link under any choice.

A rank sends and receives over two links: one to the other ranks of its node, one to other nodes. A receiver takes from
its own node every slice that is held there. So the link of a transfer is given, and only the sender is chosen.

Pure functions. Asserted by tests/unit/weight_sync/test_sender_choice.py and tests/unit/weight_sync/test_plan.py.
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
REMOTE_LINKS: tuple[Link, ...] = ("same_node", "across_nodes")


@dataclass(frozen=True)
class Flows:
    """Bytes to be sent: rank `dst[f]` needs `sizes[f]` bytes that each rank of `holders[source[f]]` has.

    `sizes`, `source`, `dst`: [flows]. Each set of `holders` is sorted. `nodes[r]` is the node of rank r.
    """

    sizes: Ints
    source: Ints
    dst: Ints
    holders: Sequence[RankSet]
    nodes: tuple[int, ...]

    @functools.cached_property
    def choices(self) -> tuple[list[RankSet], Ints]:
        """Sets of ranks that may send, and the number of the set of each flow: [flows].

        The set is (dst,) where the receiver holds the bytes itself.
        """
        ranks = len(self.nodes)
        cases, case_of = np.unique(self.source * ranks + self.dst, return_inverse=True)
        nearest: dict[tuple[int, int], RankSet] = {}
        members = [frozenset(each) for each in self.holders]
        numbers: dict[RankSet, int] = {}
        found = []
        for case in cases.tolist():
            source, dst = divmod(case, ranks)
            key = (source, self.nodes[dst])
            if key not in nearest:
                nearest[key] = self._nearest_holders(*key)
            candidates = (dst,) if dst in members[source] else nearest[key]
            found.append(numbers.setdefault(candidates, len(numbers)))
        return list(numbers), np.asarray(found, np.int64)[case_of.ravel()]

    def _nearest_holders(self, source: int, node: int) -> RankSet:
        """Return the holders on `node`, or all holders if none is on `node`."""
        holders = self.holders[source]
        return tuple(rank for rank in holders if self.nodes[rank] == node) or holders

    @functools.cached_property
    def link(self) -> Ints:
        """Number of the flow's link in REMOTE_LINKS, or -1 where the receiver holds the bytes itself: [flows]."""
        candidates, number = self.choices
        first = np.asarray([each[0] for each in candidates], np.int64)[number]
        nodes = np.asarray(self.nodes, np.int64)
        return np.where(first == self.dst, -1, nodes[first] != nodes[self.dst]).astype(np.int64)


def choose_senders(flows: Flows, flow: Ints, sizes: Ints) -> Ints:
    """Return the sender of each transfer: [transfers].

    Transfers are taken in order of decreasing size. Each goes to the candidate with the fewest bytes to send over that
    link, and to the lowest rank among equal candidates.

    Args:
        flows: every transfer is a part of one flow.
        flow: [transfers] number of the transfer's flow.
        sizes: [transfers] bytes.
    """
    candidates, number_of = flows.choices
    number, link = number_of[flow], flows.link[flow]
    src = np.asarray([each[0] for each in candidates], np.int64)[number]
    alone = np.asarray([len(each) == 1 for each in candidates], bool)[number]
    links = range(len(REMOTE_LINKS))
    load = [_sum_by_number(src, sizes, alone & (link == each), len(flows.nodes)).tolist() for each in links]
    shared = np.flatnonzero(~alone)
    order = shared[np.argsort(-sizes[shared], kind="stable")]
    heaps: dict[tuple[int, int], list[tuple[int, int]]] = {}
    chosen = []
    rows = zip(sizes[order].tolist(), link[order].tolist(), number[order].tolist(), strict=True)
    for size, over, set_number in rows:
        sent = load[over]
        heap = heaps.get((over, set_number))
        if heap is None:
            heap = heaps[over, set_number] = [(sent[rank], rank) for rank in candidates[set_number]]
            heapq.heapify(heap)
        known, sender = heap[0]
        while known != sent[sender]:  # the entry is outdated: the rank also sends for other sets. Loads only grow.
            heapq.heapreplace(heap, (sent[sender], sender))
            known, sender = heap[0]
        sent[sender] += size
        heapq.heapreplace(heap, (sent[sender], sender))
        chosen.append(sender)
    src[order] = chosen
    return src


def lower_bounds(flows: Flows) -> dict[Link, int]:
    """Return a lower bound of the bytes on the busiest link of each kind, under any choice of senders.

    Two bounds are combined. A rank receives at least the bytes that it needs and does not hold. For a set S of ranks,
    let demand(S) be the bytes that only members of S may send: then one member sends at least demand(S) / |S|. S runs
    over each set of candidates, with the demand of its subsets included, and over the union of all candidates.
    """
    candidates, number = flows.choices
    bounds: dict[Link, int] = {}
    for i, link in enumerate(REMOTE_LINKS):
        rows = flows.link == i
        received = _sum_by_number(flows.dst, flows.sizes, rows, len(flows.nodes))
        must_send = _sum_by_number(number, flows.sizes, rows, len(candidates))
        demand = {candidates[g]: int(must_send[g]) for g in np.flatnonzero(must_send).tolist()}
        bounds[link] = max(int(received.max(initial=0)), _max_average_demand(demand))
    return bounds


def _sum_by_number(numbers: Ints, sizes: Ints, rows: NDArray[np.bool_], count: int) -> Ints:
    """Return the exact sum of the sizes of the selected rows, by their number: [count]."""
    total = np.zeros(count, np.int64)
    np.add.at(total, numbers[rows], sizes[rows])
    return total


def _max_average_demand(demand: dict[RankSet, int]) -> int:
    """Return the maximum over S of ceil(demand(S) / |S|), with the demand of S's subsets added to that of S."""
    if not demand:
        return 0
    demand = dict(demand)
    demand.setdefault(tuple(sorted({rank for ranks in demand for rank in ranks})), 0)
    containing: defaultdict[int, list[frozenset[int]]] = defaultdict(list)
    for ranks in demand:
        for rank in ranks:
            containing[rank].append(frozenset(ranks))
    total: defaultdict[frozenset[int], int] = defaultdict(int)
    for ranks, size in demand.items():
        for other in containing[ranks[0]]:
            if other.issuperset(ranks):
                total[other] += size
    return max(-(-size // len(ranks)) for ranks, size in total.items())
