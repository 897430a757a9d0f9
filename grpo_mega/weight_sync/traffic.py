"""Bytes that a reshard plan moves over each kind of link.

Pure functions. Asserted by tests/unit/weight_sync/test_plan.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from grpo_mega.weight_sync.sender_choice import REMOTE_LINKS, Link
from grpo_mega.weight_sync.slice_table import Ints

LINKS: tuple[Link, ...] = ("same_process", *REMOTE_LINKS)
LOCAL = -1
"""The bucket of a transfer inside one process, which moves nothing between ranks and needs no buffer."""


@dataclass(frozen=True)
class PlanTraffic:
    """Transfers of a plan with their sizes, and what they add up to.

    `src`, `dst`, `bucket`, `num_bytes`: [transfers]. `nodes[r]` is the node of rank r. `bounds` is the lower bound of
    the bytes on the busiest link of each kind, under any choice of senders.
    """

    src: Ints
    dst: Ints
    bucket: Ints
    num_bytes: Ints
    nodes: tuple[int, ...]
    bounds: dict[Link, int]

    @functools.cached_property
    def links(self) -> Ints:
        """Number of the transfer's link in LINKS: [transfers]."""
        nodes = np.asarray(self.nodes, np.int64)
        across = nodes[self.src] != nodes[self.dst]
        return np.where(self.bucket == LOCAL, 0, 1 + across).astype(np.int64)

    def bytes_by_link(self) -> dict[Link, int]:
        """Return the bytes copied inside processes, sent inside nodes, and sent between nodes."""
        sums = np.bincount(self.links, self.num_bytes, 3)
        return {link: int(sums[i]) for i, link in enumerate(LINKS)}

    def busiest(self) -> dict[Link, int]:
        """Return the most bytes that one rank sends, or receives, over each kind of link."""
        found: dict[Link, int] = {}
        for i, link in enumerate(REMOTE_LINKS, 1):
            rows = self.links == i
            sums = (np.bincount(end[rows], self.num_bytes[rows], len(self.nodes)) for end in (self.src, self.dst))
            found[link] = int(max(each.max() for each in sums))
        return found

    def busiest_link_ratio(self) -> float:
        """Return the largest ratio of busiest link to lower bound, or 1 if no rank sends anything."""
        busiest = self.busiest()
        return max((busiest[link] / bound for link, bound in self.bounds.items() if bound), default=1.0)

    def received_bytes(self) -> Ints:
        """Return the bytes that each rank receives from other ranks: [ranks]."""
        remote = self.bucket != LOCAL
        return np.bincount(self.dst[remote], self.num_bytes[remote], len(self.nodes)).astype(np.int64)

    def peak_buffer_bytes(self) -> int:
        """Return the most bytes of two consecutive buckets on one rank."""
        num_buckets = int(self.bucket.max(initial=LOCAL)) + 1
        if not num_buckets:
            return 0
        fill = np.zeros((num_buckets + 1, len(self.nodes)), np.int64)
        remote = self.bucket != LOCAL
        for end in (self.src, self.dst):
            np.add.at(fill, (self.bucket[remote], end[remote]), self.num_bytes[remote])
        return int((fill[:-1] + fill[1:]).max())
