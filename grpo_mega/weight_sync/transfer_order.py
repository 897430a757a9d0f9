"""Order of the transfers of a weight sync: what is sent first, and in which bucket each transfer is.

A bucket is one round of a sync, in which all ranks take part; bucket 0 is sent first. The bytes that a rank sends and
receives in one round must fit its buffer. Transfers are sorted by the progress of their senders, so that all ranks are
busy at the same time. Each transfer goes into the first bucket in which sender and receiver both have room, among the
last WINDOW that they used. `rank_schedule.py` places the transfers of a bucket in messages and does not change the
order.

Pure functions. Asserted by tests/unit/weight_sync/test_plan.py.
"""

from __future__ import annotations

import numpy as np

from grpo_mega.weight_sync.slice_table import Ints

WINDOW = 4
"""Number of buckets, before the last one that a rank used, that are searched for room. A larger window fills buckets
little better, and makes planning slow for a million transfers."""


def fill_buckets(src: Ints, dst: Ints, sizes: Ints, num_ranks: int, bucket_bytes: int) -> Ints:
    """Return the bucket of each transfer, -1 where sender and receiver are the same rank.

    Args:
        src: [transfers] sending rank.
        dst: [transfers] receiving rank.
        sizes: [transfers] bytes, at most `bucket_bytes` each.
        num_ranks: ranks of both ends.
        bucket_bytes: largest sum of bytes that a rank sends and receives in one bucket.
    """
    bucket = np.full(len(src), -1, np.int64)
    remote = np.flatnonzero(src != dst)
    order = remote[np.argsort(_sender_progress(src[remote], dst[remote], sizes[remote], num_ranks), kind="stable")]
    fill: list[list[int]] = []  # bytes by [bucket][rank]
    first_open = [0] * num_ranks  # first bucket to search, by rank
    found = []
    for s, d, size in zip(src[order].tolist(), dst[order].tolist(), sizes[order].tolist(), strict=True):
        at = max(first_open[s], first_open[d])
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
        for rank in (s, d):
            first_open[rank] = max(first_open[rank], at - WINDOW)
    bucket[order] = found
    return bucket


def _sender_progress(src: Ints, dst: Ints, sizes: Ints, num_ranks: int) -> Ints:
    """Return, for each transfer, the part of its sender's bytes that is sent before it, in millionths.

    Rank r sends to rank r + 1 first, so that senders start with different receivers.
    """
    order = np.lexsort((np.arange(len(src)), (dst - src) % num_ranks, src))
    total = np.bincount(src, sizes, num_ranks)
    sent = np.cumsum(sizes[order]) - sizes[order]
    begins = np.searchsorted(src[order], np.arange(num_ranks))
    before = np.concatenate([sent, [0]])[begins]
    progress = np.empty(len(src), np.int64)
    progress[order] = (sent - before[src[order]]) * 1_000_000 // np.maximum(total[src[order]], 1).astype(np.int64)
    return progress
