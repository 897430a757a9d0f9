"""Regions of an engine's parameters that hold slices of a checkpoint, and copies that are derived from parameters."""

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
    """A part of a parameter that is zero on this rank and never synchronized, such as a bias that another rank adds."""

    parameter: str
    view: Tensor

    def rebuild(self) -> None:
        """Write zeros again, because the memory may have been released while the engine slept."""
        self.view.zero_()

    def difference(self) -> str | None:
        """Return None if all elements are zero."""
        different = int(self.view.count_nonzero())
        return (
            f"{different} of {self.view.numel()} elements are not zero, although another rank adds them"
            if different
            else None
        )


class DerivedCopy(Protocol):
    """A tensor that kernels read in place of the parameter that it is computed from."""

    parameter: str

    def rebuild(self) -> None:
        """Compute the copy from the present parameter."""
        ...

    def difference(self) -> str | None:
        """Return how the copy differs from one of the present parameter; None if it does not."""
        ...


class Region(Protocol):
    """Access to the elements of one region in the order of the checkpoint."""

    def memory_of(self, inside: tuple[slice, ...]) -> Tensor | None:
        """Return the memory of a part if it has checkpoint order; None if `write` must be used."""
        ...

    def read(self, inside: tuple[slice, ...]) -> Tensor:
        """Return the present values of a part, as the kernels read them."""
        ...

    def write(self, inside: tuple[slice, ...], values: Tensor) -> None:
        """Copy values into a part."""
        ...


@dataclass(frozen=True)
class PlainRegion:
    """A region whose elements have checkpoint order."""

    view: Tensor
    """The parameter's memory in the shape of the checkpoint slice."""

    def memory_of(self, inside: tuple[slice, ...]) -> Tensor | None:
        return self.view[inside]

    def read(self, inside: tuple[slice, ...]) -> Tensor:
        return self.view[inside]

    def write(self, inside: tuple[slice, ...], values: Tensor) -> None:
        self.view[inside].copy_(values)


class Regions:
    """All regions of one model and the copies derived from them."""

    def __init__(self, regions: Sequence[SinkRegion], places: Sequence[Region], derived: Sequence[DerivedCopy]) -> None:
        """Store the regions; `places[i]` gives access to the elements of region i."""
        self.regions = tuple(regions)
        self._places = {id(region): place for region, place in zip(self.regions, places, strict=True)}
        self._derived = tuple(derived)

    def write(self, region: SinkRegion, hf: TensorSlice, values: Tensor) -> None:
        """Copy `values` into the part `hf` of a region."""
        self._places[id(region)].write(inside(region.placement.hf, hf), values)

    def memory_of(self, region: SinkRegion, hf: TensorSlice) -> Tensor | None:
        """Return the memory of the part `hf` of a region; None if `write` must be used."""
        return self._places[id(region)].memory_of(inside(region.placement.hf, hf))

    def read(self, region: SinkRegion, hf: TensorSlice) -> Tensor:
        """Return the present values of the part `hf` of a region, as the kernels read them."""
        return self._places[id(region)].read(inside(region.placement.hf, hf))

    def rebuild(self) -> None:
        """Compute all derived copies from the present weights."""
        for copy in self._derived:
            copy.rebuild()

    def probe(self) -> dict[str, str]:
        """Return parameter -> difference for every derived copy that does not match its present parameter."""
        found = ((copy.parameter, copy.difference()) for copy in self._derived)
        return {name: difference for name, difference in found if difference is not None}


def region_view(owner: Tensor, copy: RecordedCopy) -> Tensor:
    """Return the elements of a region as a view in the shape of its checkpoint slice."""
    start = owner.storage_offset() + sum(o * s for o, s in zip(copy.local.offsets, owner.stride(), strict=True))
    strides = [owner.stride(axis) if axis >= 0 else 1 for axis in copy.along]
    return owner.as_strided(copy.hf.shape, strides, start)


def inside(outer: TensorSlice, inner: TensorSlice) -> tuple[slice, ...]:
    """Return the index of `inner` in values of `outer`; both are slices of one tensor."""
    return tuple(slice(i - o, i - o + n) for o, i, n in zip(outer.offsets, inner.offsets, inner.shape, strict=True))
