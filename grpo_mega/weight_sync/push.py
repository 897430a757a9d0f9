"""Moves the policy's weights into the engines and proves that they arrived.

First form of the sync: the policy streams whole Hugging Face tensors, one bucket at a time, and every engine rank keeps
the slices that its layout names. The proof does not look at what travelled: the source's digests are sums over its
shards, the sink's are made from what it holds after its load, and both must agree for every tensor.
Knows policy and engine only through `WeightSource` and `WeightSink`.
Asserted by tests/engine/test_weight_sync.py, with injected faults.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mega.convert.digest import combined_digest, slice_digest, wrap
from grpo_mega.interfaces import SinkRegion, WeightSink, WeightSource
from grpo_mega.types import TensorSlice, WeightMismatchError

T = TypeVar("T")
FullTensors = Callable[[int], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True)
class SyncReport:
    """One sync as this rank saw it. `policy_digest` is one word for all weights, the same for every layout."""

    seconds: float
    verify_seconds: float
    received_bytes: int
    policy_digest: str


class WeightSync:
    """Built collectively, once, when policy and engines exist."""

    def __init__(
        self,
        source: WeightSource,
        full_tensors: FullTensors,
        sink: WeightSink,
        *,
        source_group: dist.ProcessGroup,
        replica_group: dist.ProcessGroup,
        bucket_bytes: int,
        probe_tolerance: float,
    ) -> None:
        """`source_group`: the ranks that hold one copy of the policy; `replica_group`: those of this engine replica.

        Raises:
            WeightMismatchError: the engine's layout and the policy's tensors do not fit (names them).
        """
        self._source, self._full_tensors, self._sink = source, full_tensors, sink
        self._source_group, self._replica_group = source_group, replica_group
        self._bucket_bytes, self._probe_tolerance = bucket_bytes, probe_tolerance
        self._shapes = source.hf_shapes()
        self._regions: dict[str, list[SinkRegion]] = {}
        for region in sink.layout():
            self._regions.setdefault(region.placement.hf.name, []).append(region)
        self._check_names()
        self.count = 0
        """Pushes that succeeded."""

    def push(self, policy_version: int, *, verify: bool) -> SyncReport:
        """Every rank calls it together.

        Raises:
            WeightMismatchError: on every rank; an engine holds something else than the policy.
        """
        start = time.perf_counter()
        received = 0
        self._sink.begin_update()
        for name, tensor in self._full_tensors(self._bucket_bytes):
            for region in self._regions.get(name, ()):
                values = tensor[region.placement.hf.index]
                self._sink.write(region.placement.hf, values)
                received += values.nbytes
        self._sink.end_update(policy_version)
        loaded = time.perf_counter()
        digests = self._source_digests()
        if verify:
            self._verify(digests)
        end = time.perf_counter()
        self.count += 1
        return SyncReport(end - start, end - loaded, received, combined_digest(digests))

    def _source_digests(self) -> dict[str, int]:
        sums = dict.fromkeys(self._shapes, 0)
        for held in self._source.shards():
            sums[held.hf.name] = wrap(sums[held.hf.name] + slice_digest(held.view, held.hf))
        total = torch.tensor(list(sums.values()), dtype=torch.int64)
        if self._source_group.size() > 1:
            dist.all_reduce(total, group=self._source_group)  # int64 sums wrap, as digests do
        return dict(zip(sums, total.tolist(), strict=True))

    def _verify(self, expected: dict[str, int]) -> None:
        held = {
            region.placement.hf: slice_digest(self._sink.read(region.placement.hf), region.placement.hf)
            for regions in self._regions.values()
            for region in regions
        }
        everywhere: list[dict[TensorSlice, int]] = [{} for _ in range(self._replica_group.size())]
        dist.all_gather_object(everywhere, held, group=self._replica_group)
        suspects = differing_tensors(expected, everywhere)
        faults = [
            f"{self._derived(name)} on rank {dist.get_rank()}: the kernel computes from other weights than it stores "
            f"(relative error of y = W x: {error:.3g}, limit {self._probe_tolerance:g})"
            for name, error in self._sink.probe().items()
            if not error <= self._probe_tolerance
        ]
        findings = _gathered((suspects, faults))
        suspects = sorted({name for names, _ in findings for name in names})
        located = _gathered(self._locate(suspects, held)) if suspects else []
        found = [fault for _, faults in findings for fault in faults] + [
            fault for faults in located for fault in faults
        ]
        if suspects and not any(located):
            found.append(f"{suspects}: what the policy's shards hold is not what travels")
        if found:
            raise WeightMismatchError("weight sync: " + "; ".join(found[:5]) + f" ({len(found)} in all)")

    def _locate(self, suspects: list[str], held: dict[TensorSlice, int]) -> list[str]:
        """Which slices on this rank differ from the policy's tensor, streamed once more."""
        faults = []
        for name, tensor in self._full_tensors(self._bucket_bytes):
            if name in suspects:
                for region in self._regions.get(name, ()):
                    hf = region.placement.hf
                    if slice_digest(tensor[hf.index], hf) != held[hf]:
                        faults.append(f"{hf} on rank {dist.get_rank()}: the engine holds other bytes than the policy")
        return faults

    def _derived(self, parameter: str) -> str:
        """The slices whose repacked copy `probe` looked at under this name."""
        regions = (region for regions in self._regions.values() for region in regions if region.kind == "derived")
        return ", ".join(str(r.placement.hf) for r in regions if r.placement.local.name == parameter)

    def _check_names(self) -> None:
        """Over the whole replica: a rank may hold nothing of a small vocabulary."""
        parts: list[set[str]] = [set() for _ in range(self._replica_group.size())]
        dist.all_gather_object(parts, set(self._regions), group=self._replica_group)
        asked = set().union(*parts)
        missing = sorted(self._shapes.keys() - asked)
        unknown = sorted(asked - self._shapes.keys())
        if missing or unknown:
            raise WeightMismatchError(
                f"the engine has no place for {missing[:3]} and asks for {unknown[:3]}, which the policy does not have"
            )


def differing_tensors(expected: dict[str, int], held: list[dict[TensorSlice, int]]) -> list[str]:
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


def _gathered(value: T) -> list[T]:
    """One object from every rank of the job."""
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return cast("list[T]", values)
