"""Digests of the policy's shards and of what the engines' kernels read, and their comparison.

A digest is additive over disjoint slices, so the ranks exchange only one number per tensor. The digests do not depend
on the values that were sent. If a tensor differs, its pieces are compared one by one, to name slice, rank and sender.

Asserted by tests/unit/weight_sync/test_digest_comparison.py, tests/parallel/test_sync_ranks.py and
tests/engine/test_weight_sync.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mega.interfaces import HeldSlice, SinkRegion, WeightSink
from grpo_mega.models.digest import slice_digest, wrap_int64
from grpo_mega.types import TensorSlice
from grpo_mega.weight_sync.executor import values_of
from grpo_mega.weight_sync.plan import ReshardPlan
from grpo_mega.weight_sync.slice_table import split_slice

PART = 1 << 22  # elements of a slice that are converted, or quantized, at a time


def source_digests(
    shards: Sequence[HeldSlice], dtypes: dict[str, torch.dtype], group: dist.ProcessGroup
) -> dict[str, int]:
    """Collective: return tensor -> digest of the policy's weights.

    Args:
        shards: the policy's slices on this rank.
        dtypes: tensor -> dtype in which it is sent.
        group: the ranks that hold one copy of the policy.
    """
    sums = dict.fromkeys(dtypes, 0)
    for held in shards:
        if held.counted:
            name = held.hf.name
            for hf in parts_of(held.hf):
                sums[name] = wrap_int64(sums[name] + slice_digest(held.part(hf).to(dtypes[name]), hf))
    total = torch.tensor(list(sums.values()), dtype=torch.int64)
    if group.size() > 1:
        dist.all_reduce(total, group=group)  # int64 sums wrap, as digests do
    return dict(zip(sums, total.tolist(), strict=True))


def parts_of(hf: TensorSlice) -> Iterator[TensorSlice]:
    """Yield parts of at most PART elements, so that converted or quantized values of a slice never exist whole."""
    if not hf.shape:
        yield hf
        return
    for start, end in split_slice(hf.offsets, [o + n for o, n in zip(hf.offsets, hf.shape, strict=True)], PART):
        yield TensorSlice(hf.name, start, tuple(e - s for s, e in zip(start, end, strict=True)))


def sink_digests(sink: WeightSink, regions: Sequence[SinkRegion]) -> dict[TensorSlice, int]:
    """Return slice -> digest of what this rank's kernels read, for every slice of `regions`."""
    slices = list(dict.fromkeys(region.placement.hf for region in regions))
    return dict(zip(slices, sink.digests(slices), strict=True))


def differing_tensors(expected: dict[str, int], held: Sequence[dict[TensorSlice, int]]) -> list[str]:
    """Return the tensors whose digests differ between the policy and one engine replica, sorted.

    Args:
        expected: tensor -> digest of the policy.
        held: for each rank of the replica, slice -> digest. A slice on several ranks counts once, and all its copies
            must be equal.
    """
    first: dict[TensorSlice, int] = {}
    unequal = set()
    for slices in held:
        for hf, digest in slices.items():
            if first.setdefault(hf, digest) != digest:
                unequal.add(hf.name)
    sums = dict.fromkeys((hf.name for hf in first), 0)
    for hf, digest in first.items():
        sums[hf.name] = wrap_int64(sums[hf.name] + digest)
    return sorted(unequal | {name for name, digest in sums.items() if digest != expected[name]})


@dataclass(frozen=True)
class PieceDigests:
    """Digests of the pieces of differing tensors on one rank, by number of the piece.

    `sent` is computed from the policy's values, `held` from the engine's.
    """

    sent: dict[int, int]
    held: dict[int, int]


def piece_digests(
    plan: ReshardPlan,
    rank: int,
    suspects: Collection[str],
    shards: Sequence[HeldSlice],
    sink: WeightSink,
    dtypes: dict[str, torch.dtype],
) -> PieceDigests:
    """Return the digests of the pieces that this rank sends or receives.

    Args:
        plan: the whole plan.
        rank: this rank.
        suspects: names of the tensors that differ.
        shards: the policy's slices on this rank.
        sink: the engine's end on this rank.
        dtypes: tensor -> dtype in which it is sent.
    """
    by_tensor: dict[str, list[HeldSlice]] = {}
    for each in shards:
        by_tensor.setdefault(each.hf.name, []).append(each)
    sent: dict[int, int] = {}
    here: list[int] = []
    for piece, src, dst in plan.transfers_of(suspects, rank):
        hf = plan.slice_of(piece)
        if src == rank and piece not in sent:
            values: Tensor = values_of(by_tensor, hf).to(dtypes[hf.name])
            sent[piece] = slice_digest(values, hf)
        if dst == rank:
            here.append(piece)
    held = dict(zip(here, sink.digests([plan.slice_of(piece) for piece in here]), strict=True))
    return PieceDigests(sent, held)


def localize_mismatches(plan: ReshardPlan, suspects: Collection[str], everywhere: Sequence[PieceDigests]) -> list[str]:
    """Return one line per piece that differs between engine and sender, or between two senders.

    Args:
        plan: the whole plan.
        suspects: names of the tensors that differ.
        everywhere: `everywhere[r]` is the result of `piece_digests` on rank r.
    """
    faults = []
    first: dict[int, tuple[int, int]] = {}
    for piece, src, dst in plan.transfers_of(suspects):
        digest = everywhere[src].sent[piece]
        owner = first.setdefault(piece, (src, digest))
        if owner[1] != digest:
            faults.append(f"{plan.slice_of(piece)}: rank {owner[0]} and rank {src} of the policy hold different copies")
        if everywhere[dst].held[piece] != digest:
            faults.append(
                f"{plan.slice_of(piece)} on rank {dst}: the engine's bytes differ from those of the policy's rank {src}"
            )
    return faults
