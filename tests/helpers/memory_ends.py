"""Both ends of a weight sync in plain memory: a source that holds slices of tensors, and a sink that needs slices."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from grpo_mega.interfaces import HeldSlice, SinkRegion
from grpo_mega.models.digest import slice_digest
from grpo_mega.types import Placement, TensorSlice
from grpo_mega.weight_sync.slice_table import RankSliceTable, SentTensor, as_slice
from tests.helpers.weight_layouts import TENSORS


def dtype_of(name: str, tensors: Mapping[str, SentTensor] = TENSORS) -> torch.dtype:
    return {2: torch.bfloat16, 4: torch.float32}[tensors[name].itemsize]


def values(name: str, version: int, tensors: Mapping[str, SentTensor] = TENSORS) -> Tensor:
    """Return the whole tensor at a version, the same in every process."""
    seed = int.from_bytes(hashlib.sha256(f"{name} {version}".encode()).digest()[:4], "big")
    random = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(seed))
    return random.to(dtype_of(name, tensors))


def tensor_slices(table: RankSliceTable, rank: int, tensors: Mapping[str, SentTensor] = TENSORS) -> list[TensorSlice]:
    mine, names = table.rows_on([rank]), list(tensors)
    return [as_slice(names, tensors, int(mine.tensors[i]), mine.starts[i], mine.ends[i]) for i in range(len(mine))]


class MemorySource:
    """A `WeightSource`. `table` covers all ranks; among equal slices, the slice on the lowest rank is counted."""

    def __init__(self, table: RankSliceTable, rank: int, tensors: Mapping[str, SentTensor] = TENSORS) -> None:
        self._tensors = tensors
        self._slices = tensor_slices(table, rank, tensors)
        lower = {hf for other in range(rank) for hf in tensor_slices(table, other, tensors)}
        self._held = [
            HeldSlice(
                hf, tensors[hf.name].shape, torch.empty(hf.shape, dtype=dtype_of(hf.name, tensors)), hf not in lower
            )
            for hf in self._slices
        ]

    def set_version(self, version: int) -> None:
        for held in self._held:
            held.view.copy_(values(held.hf.name, version, self._tensors)[held.hf.index])

    def shards(self) -> Sequence[HeldSlice]:
        return self._held

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}


class MemorySink:
    """A `WeightSink`. Each region is a separate tensor; `packed` is computed from the one derived tensor."""

    supports_slices: bool = True
    streaming_reason: str = ""

    def __init__(self, table: RankSliceTable, rank: int, tensors: Mapping[str, SentTensor] = TENSORS) -> None:
        self.memory = {
            hf: torch.zeros(hf.shape, dtype=dtype_of(hf.name, tensors)) for hf in tensor_slices(table, rank, tensors)
        }
        self.policy_version = -1
        self.packed: dict[TensorSlice, Tensor] = {}

    def layout(self) -> list[SinkRegion]:
        return [
            SinkRegion(Placement(hf, hf), "derived" if hf.name == "head" else "plain", memory.dtype)
            for hf, memory in self.memory.items()
        ]

    def begin_update(self) -> None: ...

    def part(self, hf: TensorSlice) -> Tensor:
        for outer, memory in self.memory.items():
            inside = [i - o for i, o in zip(hf.offsets, outer.offsets, strict=True)] if outer.name == hf.name else [-1]
            if all(i >= 0 and i + n <= m for i, n, m in zip(inside, hf.shape, outer.shape, strict=False)):
                return memory[tuple(slice(i, i + n) for i, n in zip(inside, hf.shape, strict=True))]
        raise ValueError(f"{hf} is not inside a slice that this engine rank takes")

    def write(self, hf: TensorSlice, values: Tensor) -> None:
        part = self.part(hf)
        assert part.shape == values.shape
        assert part.dtype == values.dtype
        part.copy_(values)

    def memory_of(self, hf: TensorSlice) -> Tensor | None:
        return self.part(hf)

    def load(self, name: str, tensor: Tensor) -> None:
        for hf, memory in self.memory.items():
            if hf.name == name:
                memory.copy_(tensor[hf.index])

    def end_update(self, policy_version: int) -> None:
        self.packed = {hf: memory.clone() for hf, memory in self.memory.items() if hf.name == "head"}
        self.policy_version = policy_version

    def digests(self, slices: Sequence[TensorSlice]) -> list[int]:
        return [slice_digest(self.part(hf), hf) for hf in slices]

    def probe(self) -> dict[str, str]:
        return {
            hf.name: "its packed copy is older"
            for hf, copy in self.packed.items()
            if not torch.equal(copy, self.memory[hf])
        }
