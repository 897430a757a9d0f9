"""The proof of a sync: digests of the policy's shards against digests of what the engine's kernels read.

A digest adds up over disjoint slices, so nothing is gathered but one number per tensor; and nothing here looks at what
travelled. Only when a tensor differs are its pieces compared one by one, to name the slice, its rank and its sender.
Asserted by tests/unit/weight_sync/test_verify.py, tests/parallel/test_sync_ranks.py and
tests/engine/test_weight_sync.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mega.interfaces import HeldSlice, SinkRegion, WeightSink
from grpo_mega.models.digest import slice_digest, wrap
from grpo_mega.types import TensorSlice
from grpo_mega.weight_sync.executor import view_of
from grpo_mega.weight_sync.plan import ReshardPlan
from grpo_mega.weight_sync.slice_table import cut

PART = 1 << 22  # elements


def source_digests(
    shards: Sequence[HeldSlice], dtypes: dict[str, torch.dtype], group: dist.ProcessGroup
) -> dict[str, int]:
    """Tensor -> digest, in the dtype in which it travels. `group`: the ranks that hold one copy of the policy."""
    sums = dict.fromkeys(dtypes, 0)
    for held in shards:
        if held.counted:
            name = held.hf.name
            for hf in parts_of(held.hf):
                sums[name] = wrap(sums[name] + slice_digest(held.part(hf).to(dtypes[name]), hf))
    total = torch.tensor(list(sums.values()), dtype=torch.int64)
    if group.size() > 1:
        dist.all_reduce(total, group=group)  # int64 sums wrap, as digests do
    return dict(zip(sums, total.tolist(), strict=True))


def parts_of(hf: TensorSlice) -> Iterator[TensorSlice]:
    """In parts, so that one that has to be converted or quantised first never exists whole."""
    if not hf.shape:
        yield hf
        return
    for start, end in cut(hf.offsets, [o + n for o, n in zip(hf.offsets, hf.shape, strict=True)], PART):
        yield TensorSlice(hf.name, start, tuple(e - s for s, e in zip(start, end, strict=True)))


def sink_digests(sink: WeightSink, regions: Sequence[SinkRegion]) -> dict[TensorSlice, int]:
    """Slice -> digest of what this rank's kernels read."""
    slices = list(dict.fromkeys(region.placement.hf for region in regions))
    return dict(zip(slices, sink.digests(slices), strict=True))


def differing_tensors(expected: dict[str, int], held: Sequence[dict[TensorSlice, int]]) -> list[str]:
    """Tensors whose digest differs between the policy and one engine replica.

    Args:
        expected: tensor -> digest on the policy's side.
        held: for each rank of the replica, slice -> digest of what it holds. A slice that several ranks hold counts
            once, and all its copies must be equal.
    """
    first: dict[TensorSlice, int] = {}
    unequal = set()
    for slices in held:
        for hf, digest in slices.items():
            if first.setdefault(hf, digest) != digest:
                unequal.add(hf.name)
    sums = dict.fromkeys((hf.name for hf in first), 0)
    for hf, digest in first.items():
        sums[hf.name] = wrap(sums[hf.name] + digest)
    return sorted(unequal | {name for name, digest in sums.items() if digest != expected[name]})


@dataclass(frozen=True)
class PieceDigests:
    """Of the pieces of suspect tensors: what a rank sends, and what its engine holds; keys are (piece, rank)."""

    sent: dict[int, int]
    held: dict[int, int]


def piece_digests(
    plan: ReshardPlan,
    rank: int,
    suspects: set[str],
    shards: Sequence[HeldSlice],
    sink: WeightSink,
    dtypes: dict[str, torch.dtype],
) -> PieceDigests:
    """Of this rank's transfers of `suspects`, piece by piece."""
    by_tensor: dict[str, list[HeldSlice]] = {}
    for each in shards:
        by_tensor.setdefault(each.hf.name, []).append(each)
    sent: dict[int, int] = {}
    here: list[int] = []
    for piece, src, dst in plan.transfers_of(suspects, rank):
        hf = plan.slice_of(piece)
        if src == rank and piece not in sent:
            values: Tensor = view_of(by_tensor, hf).to(dtypes[hf.name])
            sent[piece] = slice_digest(values, hf)
        if dst == rank:
            here.append(piece)
    held = dict(zip(here, sink.digests([plan.slice_of(piece) for piece in here]), strict=True))
    return PieceDigests(sent, held)


def localize_mismatches(plan: ReshardPlan, suspects: set[str], everywhere: Sequence[PieceDigests]) -> list[str]:
    """One line per piece that an engine holds otherwise than its sender, or that senders hold differently."""
    faults = []
    first: dict[int, tuple[int, int]] = {}
    for piece, src, dst in plan.transfers_of(suspects):
        digest = everywhere[src].sent[piece]
        owner = first.setdefault(piece, (src, digest))
        if owner[1] != digest:
            faults.append(f"{plan.slice_of(piece)}: rank {owner[0]} and rank {src} of the policy hold different copies")
        if everywhere[dst].held[piece] != digest:
            faults.append(
                f"{plan.slice_of(piece)} on rank {dst}: the engine holds other bytes than the policy's rank {src}"
            )
    return faults
