"""The end of a weight sync that every engine shares: writes and digests of parts of regions, versions, updates.

Asserted by tests/engine/test_engine_contract.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from torch import Tensor

from grpo_mega.convert.digest import slice_digest, wrap
from grpo_mega.engines.regions import Regions
from grpo_mega.interfaces import SinkRegion
from grpo_mega.types import TensorSlice


class RegionSink:
    """`WeightSink` but for `load`; an engine says how it adopts them."""

    def __init__(self, regions: Regions, streams_because: str | None) -> None:
        """`streams_because`: why there are no regions."""
        self.streams_because = streams_because
        self._regions = regions
        self._by_tensor: dict[str, list[SinkRegion]] = defaultdict(list)
        for region in regions.regions:
            self._by_tensor[region.placement.hf.name].append(region)
        self.policy_version = -1
        self.updating = False

    def layout(self) -> Sequence[SinkRegion]:
        return self._regions.regions

    def begin_update(self) -> None:
        self.updating = True

    def write(self, hf: TensorSlice, values: Tensor) -> None:
        """Copy `values` to where `hf` lies.

        Raises:
            ValueError: `hf` is not inside a region of the layout; `values` has another shape or dtype.
            RuntimeError: outside of begin_update .. end_update.
        """
        self.require_update(hf)
        if tuple(values.shape) != hf.shape:
            raise ValueError(f"{hf}: got values of shape {list(values.shape)} for a slice of {list(hf.shape)}")
        for region in self._around(hf):
            if values.dtype != region.dtype:
                raise ValueError(f"{hf}: got values of {values.dtype} for a region of {region.dtype}")
            self._regions.write(region, hf, values)

    def memory_of(self, hf: TensorSlice) -> Tensor | None:
        """Where `hf` lies, if it does so once and as it travels.

        Raises:
            ValueError, RuntimeError: as `write`.
        """
        self.require_update(hf)
        first, *others = self._around(hf)
        return None if others else self._regions.memory_of(first, hf)

    def end_update(self, policy_version: int) -> None:
        self._regions.rebuild()
        self._adopt(policy_version)
        self.policy_version = policy_version
        self.updating = False

    def _adopt(self, policy_version: int) -> None:
        """Have the engine compute from what was written, and forget what it computed before."""
        raise NotImplementedError

    def digest(self, hf: TensorSlice) -> int:
        """Where several regions hold that part, their common digest; some other number if they differ.

        Raises:
            ValueError: `hf` is not inside a region of the layout.
        """
        first, *others = (slice_digest(self._regions.read(region, hf), hf) for region in self._around(hf))
        return first if all(other == first for other in others) else wrap(first + 1)

    def probe(self) -> dict[str, str]:
        return self._regions.probe()

    def require_update(self, what: object) -> None:
        """Raises RuntimeError: weights come outside of an update."""
        if not self.updating:
            raise RuntimeError(f"write of {what} outside of an update; call begin_update first")

    def _around(self, hf: TensorSlice) -> Iterator[SinkRegion]:
        inside = [region for region in self._by_tensor[hf.name] if contains(region.placement.hf, hf)]
        if not inside:
            raise ValueError(f"{hf} is not inside a slice that this engine rank takes; its layout() lists them")
        yield from inside


def contains(outer: TensorSlice, inner: TensorSlice) -> bool:
    """Is `inner` a part of `outer`? Both are slices of one tensor."""
    return all(
        o <= i and i + m <= o + n
        for o, n, i, m in zip(outer.offsets, outer.shape, inner.offsets, inner.shape, strict=True)
    )
