"""In which bucket each transfer travels. Pure.

Buckets are turns that all ranks take together; what a rank sends and receives in one must fit its buffer. Transfers
are taken in the order in which their senders would be done with them, so that all ranks are busy at the same time, and
each goes into the first bucket in which sender and receiver both have room, of the last WINDOW that they used.
Asserted by tests/unit/weight_sync/test_plan.py.
"""

from __future__ import annotations

import numpy as np

from grpo_mega.weight_sync.slice_table import Ints

WINDOW = 4
"""Buckets before the last one that a rank used in which room is still looked for: more fill little better, and a plan
of a million transfers would spend its time looking."""


def fill_buckets(src: Ints, dst: Ints, sizes: Ints, num_ranks: int, bucket_bytes: int) -> Ints:
    """[transfers]: bucket of each, -1 where src is dst. A transfer is at most `bucket_bytes`."""
    bucket = np.full(len(src), -1, np.int64)
    travels = np.flatnonzero(src != dst)
    order = travels[np.argsort(_progress(src[travels], dst[travels], sizes[travels], num_ranks), kind="stable")]
    fill: list[list[int]] = []  # [bucket][rank]
    open_from = [0] * num_ranks  # where to look first
    found = []
    for s, d, size in zip(src[order].tolist(), dst[order].tolist(), sizes[order].tolist(), strict=True):
        at = max(open_from[s], open_from[d])
        while True:
            if at == len(fill):
                fill.append([0] * num_ranks)
            row = fill[at]
            if row[s] + size <= bucket_bytes and row[d] + size <= bucket_bytes:
                break
            at += 1
        row[s] += size
        row[d] += size
        found.append(at)
        for end in (s, d):
            open_from[end] = max(open_from[end], at - WINDOW)
    bucket[order] = found
    return bucket


def _progress(src: Ints, dst: Ints, sizes: Ints, num_ranks: int) -> Ints:
    """For each transfer, in millionths: how much of all that its sender sends is sent before it. Senders begin with
    different receivers."""
    order = np.lexsort((np.arange(len(src)), (dst - src) % num_ranks, src))
    total = np.bincount(src, sizes, num_ranks)
    sent = np.cumsum(sizes[order]) - sizes[order]
    begins = np.searchsorted(src[order], np.arange(num_ranks))
    before = np.concatenate([sent, [0]])[begins]
    share = np.empty(len(src), np.int64)
    share[order] = (sent - before[src[order]]) * 1_000_000 // np.maximum(total[src[order]], 1).astype(np.int64)
    return share
