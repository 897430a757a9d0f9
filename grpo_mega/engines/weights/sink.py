"""The part of a weight sink that all engines share: checks of slices, versions, and updates.

Asserted by tests/engine/test_engine_contract.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

from grpo_mega.engines.weights.regions import Regions
from grpo_mega.interfaces import SinkRegion
from grpo_mega.models.digest import slice_digest, wrap_int64
from grpo_mega.types import TensorSlice


class SliceSink:
    """`WeightSink` without `load`, `digests` and `probe`; subclasses implement `_put` and `_finish_update`."""

    def __init__(self, regions: Sequence[SinkRegion], streaming_reason: str | None) -> None:
        """Create the sink of this rank.

        Args:
            regions: every region of this rank; empty if the engine needs whole tensors.
            streaming_reason: the reason why it does; None if it takes slices.
        """
        self.supports_slices, self.streaming_reason = streaming_reason is None, streaming_reason or ""
        self._layout = tuple(regions)
        self._by_tensor: dict[str, list[SinkRegion]] = defaultdict(list)
        for region in self._layout:
            self._by_tensor[region.placement.hf.name].append(region)
        self.policy_version = -1
        self.updating = False

    def layout(self) -> Sequence[SinkRegion]:
        return self._layout

    def begin_update(self) -> None:
        self.updating = True

    def write(self, hf: TensorSlice, values: Tensor) -> None:
        """Copy `values` into every region that holds `hf`.

        Raises:
            ValueError: `hf` is not inside a region of the layout, or `values` has another shape or dtype.
            RuntimeError: called outside of begin_update .. end_update.
        """
        self.require_update(hf)
        if tuple(values.shape) != hf.shape:
            raise ValueError(f"{hf}: got values of shape {list(values.shape)} for a slice of {list(hf.shape)}")
        regions = self._around(hf)
        for region in regions:
            if values.dtype != region.dtype:
                raise ValueError(f"{hf}: got values of {values.dtype} for a region of {region.dtype}")
        self._put(regions, hf, values)

    def memory_of(self, hf: TensorSlice) -> Tensor | None:
        """Return None: slices can only be written.

        Raises:
            ValueError, RuntimeError: as `write`.
        """
        self.require_update(hf)
        self._around(hf)
        return None

    def end_update(self, policy_version: int) -> None:
        self._finish_update(policy_version)
        self.policy_version = policy_version
        self.updating = False

    def forget(self) -> None:
        """Reset the version after the engine released its weights; a full sync must come before sampling."""
        self.policy_version = -1

    def require_update(self, what: object) -> None:
        """Check that an update is in progress.

        Raises:
            RuntimeError: it is not.
        """
        if not self.updating:
            raise RuntimeError(f"write of {what} outside of an update; call begin_update first")

    def _put(self, regions: Sequence[SinkRegion], hf: TensorSlice, values: Tensor) -> None:
        """Copy checked values into these regions, which are all that hold `hf`."""
        raise NotImplementedError

    def _finish_update(self, policy_version: int) -> None:
        """Make the engine use the written weights, and discard what it computed with earlier ones."""
        raise NotImplementedError

    def _around(self, hf: TensorSlice) -> list[SinkRegion]:
        inside = [region for region in self._by_tensor[hf.name] if contains(region.placement.hf, hf)]
        if not inside:
            raise ValueError(f"{hf} is not inside a slice that this engine rank holds; its layout() lists them")
        return inside


class RegionSink(SliceSink):
    """A sink over parameters of this process."""

    def __init__(self, regions: Regions, streaming_reason: str | None) -> None:
        super().__init__(regions.regions, streaming_reason)
        self._regions = regions

    def memory_of(self, hf: TensorSlice) -> Tensor | None:
        """Return the memory of `hf`, if exactly one region holds it in checkpoint order; otherwise None.

        Raises:
            ValueError, RuntimeError: as `write`.
        """
        self.require_update(hf)
        first, *others = self._around(hf)
        return None if others else self._regions.memory_of(first, hf)

    def end_update(self, policy_version: int) -> None:
        self._regions.rebuild()
        super().end_update(policy_version)

    def digests(self, slices: Sequence[TensorSlice]) -> list[int]:
        """Return one digest per slice; if regions that hold the same slice differ, a digest that matches neither.

        Raises:
            ValueError: a slice is not inside a region of the layout.
        """
        return [self._digest(hf) for hf in slices]

    def probe(self) -> dict[str, str]:
        return self._regions.probe()

    def _put(self, regions: Sequence[SinkRegion], hf: TensorSlice, values: Tensor) -> None:
        for region in regions:
            self._regions.write(region, hf, values)

    def _digest(self, hf: TensorSlice) -> int:
        first, *others = (slice_digest(self._regions.read(region, hf), hf) for region in self._around(hf))
        return first if all(other == first for other in others) else wrap_int64(first + 1)


def contains(outer: TensorSlice, inner: TensorSlice) -> bool:
    """Return True if `inner` is inside `outer`; both are slices of one tensor."""
    return all(
        o <= i and i + m <= o + n
        for o, n, i, m in zip(outer.offsets, outer.shape, inner.offsets, inner.shape, strict=True)
    )
