"""Pieces that always travel together. Pure.

Pieces that the same ranks hold and the same ranks want are put into parcels, and a plan chooses sender and bucket of a
parcel: for 671B on 1,024 ranks these are three million choices where pieces would be forty-five. A parcel is so small a
part of what the busiest link carries anyway that balance hardly suffers.
Asserted by tests/unit/weight_sync/test_plan.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grpo_mega.weight_sync.sender_choice import TRAVELS, Flows, lower_bounds
from grpo_mega.weight_sync.slice_table import Ints, RankSet, expand

SHARE = 128  # a parcel is at most this part of the lower bound of every link that it travels over


@dataclass(frozen=True)
class TransferClasses:
    """Pieces by who holds and who wants them. `class_of`: [pieces]; class c goes to `count[c]` ranks, which are the
    rows of `flows` from `begin[c]` on."""

    class_of: Ints
    begin: Ints
    count: Ints
    flows: Flows

    @classmethod
    def of(
        cls,
        sizes: Ints,
        holder: Ints,
        taker: Ints,
        holders: tuple[RankSet, ...],
        takers: tuple[RankSet, ...],
        nodes: tuple[int, ...],
    ) -> TransferClasses:
        """Of pieces of `sizes` bytes, held by `holders[holder[p]]`, wanted by `takers[taker[p]]`."""
        pairs, class_of = np.unique(holder * len(takers) + taker, return_inverse=True)
        class_of = class_of.ravel().astype(np.int64)
        total = np.zeros(len(pairs), np.int64)
        np.add.at(total, class_of, sizes)
        source, wants = np.divmod(pairs, len(takers))
        dst = [takers[w] for w in wants.tolist()]
        count = np.asarray([len(ranks) for ranks in dst], np.int64)
        flat = np.asarray([rank for ranks in dst for rank in ranks], np.int64)
        flows = Flows(np.repeat(total, count), np.repeat(source, count), flat, holders, nodes)
        return cls(class_of, np.cumsum(count) - count, count, flows)

    def limits(self, max_bytes: int) -> Ints:
        """[classes]: most bytes of a parcel."""
        bounds = lower_bounds(self.flows)
        limit = np.full(len(self.count), 1 << 62, np.int64)  # what stays in its process is never split
        owner = np.repeat(np.arange(len(self.count)), self.count)
        limit[owner[self.flows.link >= 0]] = max_bytes
        for i, link in enumerate(TRAVELS):
            over = owner[self.flows.link == i]
            limit[over] = np.minimum(limit[over], bounds[link] // SHARE)
        return limit

    def parcels(self, sizes: Ints, max_bytes: int) -> tuple[Ints, Ints]:
        """(order of the pieces, first): pieces `order[first[p] : first[p + 1]]` are parcel p, in their own order;
        parcels are in the order of their first pieces. A piece beyond the limit is a parcel of its own."""
        if not len(sizes):
            return np.zeros(0, np.int64), np.zeros(1, np.int64)
        by_class = np.argsort(self.class_of, kind="stable")
        limits = self.limits(max_bytes).tolist()
        parcel, current, filled, number = [], -1, 0, -1
        for each, size in zip(self.class_of[by_class].tolist(), sizes[by_class].tolist(), strict=True):
            if each != current or filled + size > limits[each]:
                current, filled, number = each, 0, number + 1
            filled += size
            parcel.append(number)
        of_piece = np.empty(len(sizes), np.int64)
        of_piece[by_class] = parcel
        _, head = np.unique(of_piece, return_index=True)
        order = np.lexsort((np.arange(len(sizes)), head[of_piece]))
        heads = np.sort(head)
        first = np.searchsorted(head[of_piece][order], heads)
        return order, np.append(first, len(sizes)).astype(np.int64)

    def transfers(self, parcel_class: Ints) -> tuple[Ints, Ints]:
        """(parcel, flow) for every parcel and every rank that wants it, given the class of each parcel."""
        count = self.count[parcel_class]
        return np.repeat(np.arange(len(parcel_class)), count), expand(self.begin[parcel_class], count)
