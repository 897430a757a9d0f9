"""Transfer groups: pieces that are always sent together.

Pieces with the same holders and the same receivers are put into transfer groups. A plan chooses sender and bucket for a
group instead of a piece: for 671B parameters on 1,024 ranks this makes three million choices instead of forty-five
million. A group is so small a part of the busiest link's bytes that the balance between links hardly changes.

Pure functions. Asserted by tests/unit/weight_sync/test_plan.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grpo_mega.weight_sync.sender_choice import REMOTE_LINKS, Flows, lower_bounds
from grpo_mega.weight_sync.slice_table import Ints, RankSet, expand_ranges

MAX_LINK_FRACTION = 128  # a group is at most 1/128 of the lower bound of each link that it uses


@dataclass(frozen=True)
class TransferClasses:
    """Classes of pieces with the same holders and the same receivers.

    `class_of`: [pieces]. Class c is sent to `count[c]` ranks: the rows of `flows` from `begin[c]` on.
    """

    class_of: Ints
    begin: Ints
    count: Ints
    flows: Flows

    @classmethod
    def of(
        cls,
        sizes: Ints,
        holder: Ints,
        receiver: Ints,
        holders: tuple[RankSet, ...],
        receivers: tuple[RankSet, ...],
        nodes: tuple[int, ...],
    ) -> TransferClasses:
        """Group pieces into classes.

        Args:
            sizes: [pieces] bytes.
            holder: [pieces] number of the set in `holders` that holds the piece.
            receiver: [pieces] number of the set in `receivers` that needs the piece.
            holders: sets of ranks.
            receivers: sets of ranks.
            nodes: node of each rank.
        """
        pairs, class_of = np.unique(holder * len(receivers) + receiver, return_inverse=True)
        class_of = class_of.ravel().astype(np.int64)
        total = np.zeros(len(pairs), np.int64)
        np.add.at(total, class_of, sizes)
        source, needs = np.divmod(pairs, len(receivers))
        dst = [receivers[each] for each in needs.tolist()]
        count = np.asarray([len(ranks) for ranks in dst], np.int64)
        flat = np.asarray([rank for ranks in dst for rank in ranks], np.int64)
        flows = Flows(np.repeat(total, count), np.repeat(source, count), flat, holders, nodes)
        return cls(class_of, np.cumsum(count) - count, count, flows)

    def max_group_bytes(self, max_bytes: int) -> Ints:
        """Return the largest allowed bytes of a transfer group, by class: [classes]."""
        bounds = lower_bounds(self.flows)
        limit = np.full(len(self.count), 1 << 62, np.int64)  # a copy inside a process is never split
        owner = np.repeat(np.arange(len(self.count)), self.count)
        limit[owner[self.flows.link >= 0]] = max_bytes
        for i, link in enumerate(REMOTE_LINKS):
            users = owner[self.flows.link == i]
            limit[users] = np.minimum(limit[users], bounds[link] // MAX_LINK_FRACTION)
        return limit

    def transfer_groups(self, sizes: Ints, max_bytes: int) -> tuple[Ints, Ints]:
        """Return (order of the pieces, group_starts).

        Pieces `order[group_starts[g] : group_starts[g + 1]]` form group g, in their own order. Groups are in the order
        of their first pieces. A piece that exceeds the limit forms a group of its own.
        """
        if not len(sizes):
            return np.zeros(0, np.int64), np.zeros(1, np.int64)
        by_class = np.argsort(self.class_of, kind="stable")
        limits = self.max_group_bytes(max_bytes).tolist()
        numbers, current, filled, number = [], -1, 0, -1
        for each, size in zip(self.class_of[by_class].tolist(), sizes[by_class].tolist(), strict=True):
            if each != current or filled + size > limits[each]:
                current, filled, number = each, 0, number + 1
            filled += size
            numbers.append(number)
        group_of_piece = np.empty(len(sizes), np.int64)
        group_of_piece[by_class] = numbers
        _, head = np.unique(group_of_piece, return_index=True)
        order = np.lexsort((np.arange(len(sizes)), head[group_of_piece]))
        heads = np.sort(head)
        group_starts = np.searchsorted(head[group_of_piece][order], heads)
        return order, np.append(group_starts, len(sizes)).astype(np.int64)

    def transfers(self, group_class: Ints) -> tuple[Ints, Ints]:
        """Return (group, flow), both [transfers], for every group and every rank that receives it.

        `group_class` is [groups], the class of each group.
        """
        count = self.count[group_class]
        return np.repeat(np.arange(len(group_class)), count), expand_ranges(self.begin[group_class], count)
