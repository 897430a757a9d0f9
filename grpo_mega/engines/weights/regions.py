"""Where the slices of a checkpoint lie in an engine's parameters, and what its kernels compute from in their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from grpo_mega.engines.weights.loader_recording import RecordedCopy
from grpo_mega.interfaces import SinkRegion
from grpo_mega.types import TensorSlice


@dataclass
class Zeros:
    """A part that is zero on this rank, as a bias that is added once for all ranks. No sync brings it."""

    parameter: str
    view: Tensor

    def rebuild(self) -> None:
        """The engine may have slept since, and its memory with it."""
        self.view.zero_()

    def difference(self) -> str | None:
        """Is it still zero?"""
        different = int(self.view.count_nonzero())
        return (
            f"{different} of {self.view.numel()} elements that this rank must not add are not zero"
            if different
            else None
        )


class DerivedCopy(Protocol):
    """Something that kernels read in place of a parameter."""

    parameter: str

    def rebuild(self) -> None:
        """Make it of the present parameter."""
        ...

    def difference(self) -> str | None:
        """In what it differs from the one of the present parameter; None: in nothing."""
        ...


class Region(Protocol):
    """The elements of one region, wherever they lie."""

    def memory_of(self, inside: tuple[slice, ...]) -> Tensor | None:
        """A part, where values can be put; None where they must be written."""
        ...

    def read(self, inside: tuple[slice, ...]) -> Tensor:
        """A part, as the kernels see it now."""
        ...

    def write(self, inside: tuple[slice, ...], values: Tensor) -> None:
        """Copy into a part."""
        ...


@dataclass(frozen=True)
class PlainRegion:
    """`view`: shaped as the slice of the checkpoint, aliasing the parameter."""

    view: Tensor

    def memory_of(self, inside: tuple[slice, ...]) -> Tensor | None:
        return self.view[inside]

    def read(self, inside: tuple[slice, ...]) -> Tensor:
        return self.view[inside]

    def write(self, inside: tuple[slice, ...], values: Tensor) -> None:
        self.view[inside].copy_(values)


class Regions:
    """The regions of one model, with what writes, reads, rebuilds and probes them."""

    def __init__(self, regions: Sequence[SinkRegion], places: Sequence[Region], derived: Sequence[DerivedCopy]) -> None:
        """`places[i]`: where the elements of region i lie."""
        self.regions = tuple(regions)
        self._places = {id(region): place for region, place in zip(self.regions, places, strict=True)}
        self._derived = tuple(derived)

    def write(self, region: SinkRegion, hf: TensorSlice, values: Tensor) -> None:
        """Copy `values` into the part `hf` of a region."""
        self._places[id(region)].write(inside(region.placement.hf, hf), values)

    def memory_of(self, region: SinkRegion, hf: TensorSlice) -> Tensor | None:
        """Where the part `hf` of a region can be put, if it needs no `write`."""
        return self._places[id(region)].memory_of(inside(region.placement.hf, hf))

    def read(self, region: SinkRegion, hf: TensorSlice) -> Tensor:
        """The part `hf` of a region, as the kernels see it now."""
        return self._places[id(region)].read(inside(region.placement.hf, hf))

    def rebuild(self) -> None:
        """Make what is derived of the present weights."""
        for copy in self._derived:
            copy.rebuild()

    def probe(self) -> dict[str, str]:
        """Parameter -> in what its derived copy differs from the one of its present bytes."""
        found = ((copy.parameter, copy.difference()) for copy in self._derived)
        return {name: difference for name, difference in found if difference is not None}


def region_view(owner: Tensor, copy: RecordedCopy) -> Tensor:
    """The elements of a region, shaped as its slice of the checkpoint."""
    start = owner.storage_offset() + sum(o * s for o, s in zip(copy.local.offsets, owner.stride(), strict=True))
    strides = [owner.stride(axis) if axis >= 0 else 1 for axis in copy.along]
    return owner.as_strided(copy.hf.shape, strides, start)


def inside(outer: TensorSlice, inner: TensorSlice) -> tuple[slice, ...]:
    """Where `inner` lies in values of `outer`, a slice of the same tensor."""
    return tuple(slice(i - o, i - o + n) for o, i, n in zip(outer.offsets, inner.offsets, inner.shape, strict=True))
