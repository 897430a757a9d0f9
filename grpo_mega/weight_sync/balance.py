"""Which of several holders sends a slice, and what the busiest link must carry whatever is chosen. Pure.

A rank sends and receives over two links: one to the other ranks of its node, one to other nodes. A receiver takes from
its own node whatever is held there, so which link a transfer uses is given; who sends is chosen.
Asserted by tests/unit/test_plan.py.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from grpo_mega.weight_sync.boxes import Ints

Link = Literal["same_process", "same_node", "across_nodes"]


@dataclass(frozen=True)
class Demand:
    """Transfer t brings `sizes[t]` bytes of source box `source[t]` to rank `dst[t]`; `holders[s]` are the sorted ranks
    that have source box s."""

    sizes: Ints
    source: Ints
    dst: Ints
    holders: Sequence[tuple[int, ...]]
    nodes: tuple[int, ...]

    @functools.cached_property
    def choices(self) -> tuple[list[tuple[int, ...]], Ints]:
        """The groups of ranks that may send, and for each transfer the number of its group. (dst,) alone where the
        receiver holds the slice itself."""
        alike: dict[tuple[int, ...], int] = {}
        holder_numbers = np.asarray([alike.setdefault(h, len(alike)) for h in self.holders], np.int64)
        ranks = len(self.nodes)
        cases, case_of = np.unique(holder_numbers[self.source] * ranks + self.dst, return_inverse=True)
        numbers: dict[tuple[int, ...], int] = {}
        distinct_holders, found = list(alike), []
        for case in cases.tolist():
            candidates = self._candidates(distinct_holders[case // ranks], case % ranks)
            found.append(numbers.setdefault(candidates, len(numbers)))
        return list(numbers), np.asarray(found, np.int64)[case_of.ravel()]

    def _candidates(self, holders: tuple[int, ...], dst: int) -> tuple[int, ...]:
        if dst in holders:
            return (dst,)
        near = tuple(rank for rank in holders if self.nodes[rank] == self.nodes[dst])
        return near or holders


def choose_senders(demand: Demand) -> Ints:
    """The sender of each transfer: large ones first, each to the candidate that has least to send over that link."""
    groups, group_of = demand.choices
    src = np.asarray([group[0] for group in groups], np.int64)[group_of]
    nodes = np.asarray(demand.nodes, np.int64)
    across = nodes[src] != nodes[demand.dst]
    alone = np.asarray([len(group) == 1 for group in groups], bool)[group_of]
    sends = alone & (src != demand.dst)
    load = [
        np.bincount(src[sends & of], demand.sizes[sends & of], len(nodes)).astype(np.int64).tolist()
        for of in (~across, across)
    ]
    shared = np.flatnonzero(~alone)
    order = shared[np.argsort(-demand.sizes[shared], kind="stable")]
    columns = (demand.sizes[order].tolist(), across[order].tolist(), group_of[order].tolist())
    chosen = []
    for size, far, group in zip(*columns, strict=True):
        busy = load[far]
        sender = min(groups[group], key=busy.__getitem__)
        busy[sender] += size
        chosen.append(sender)
    src[order] = chosen
    return src


def lower_bounds(demand: Demand) -> dict[Link, int]:
    """Bytes that the busiest link of each kind carries at least, under any choice of senders.

    No rank receives less than what it wants and does not hold. And for any group S of ranks, the transfers that only
    members of S may send are at least demand(S) / |S| for one of them; S is each group of candidates that occurs,
    counting what its subgroups must send too, and all ranks together.
    """
    groups, numbers = demand.choices
    first = np.asarray([g[0] for g in groups], np.int64)[numbers]
    nodes = np.asarray(demand.nodes, np.int64)
    across = nodes[first] != nodes[demand.dst]
    travels = first != demand.dst
    bounds: dict[Link, int] = {}
    kinds: tuple[tuple[Link, Ints], ...] = (("same_node", travels & ~across), ("across_nodes", travels & across))
    for link, of in kinds:
        arrives = np.bincount(demand.dst[of], demand.sizes[of], len(nodes))
        must_send = np.bincount(numbers[of], demand.sizes[of], len(groups))
        asked = {groups[g]: int(must_send[g]) for g in np.flatnonzero(must_send).tolist()}
        bounds[link] = max(int(arrives.max(initial=0)), _most_loaded(asked))
    return bounds


def _most_loaded(asked: dict[tuple[int, ...], int]) -> int:
    """Max over S of ceil(demand(S) / |S|)."""
    if not asked:
        return 0
    asked = dict(asked)
    asked.setdefault(tuple(sorted({rank for group in asked for rank in group})), 0)
    containing: defaultdict[int, list[frozenset[int]]] = defaultdict(list)
    for group in asked:
        for rank in group:
            containing[rank].append(frozenset(group))
    total: defaultdict[frozenset[int], int] = defaultdict(int)
    for group, size in asked.items():
        for other in containing[group[0]]:
            if other.issuperset(group):
                total[other] += size
    return max(-(-size // len(group)) for group, size in total.items())
