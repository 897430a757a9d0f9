"""The end of a weight sync on one rank of vLLM: writes slices where its kernels read them, and proves what they read.

The layout is the record of vLLM's own loader (vllm_record.py) plus what vLLM makes of the loaded parameters
(vllm_regions.py). Where the loader could not be recorded, tensors are streamed through it, whole.
Asserted by tests/engine/test_vllm_engine.py (a stale packed head) and test_weight_sync.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from grpo_mega.convert.digest import slice_digest, wrap
from grpo_mega.engines.vllm_record import LoaderRecord
from grpo_mega.engines.vllm_regions import Regions, declare_regions
from grpo_mega.interfaces import SinkRegion
from grpo_mega.types import TensorSlice


class VllmSink:
    """`WeightSink` over the parameters of vLLM's model.

    Args:
        model: loaded and processed.
        record: of its loader; or why there is none.
        drop_caches: forgets what was computed with the weights of before.

    Raises:
        RuntimeError: vLLM made something of a parameter that is not known here (names it).
    """

    def __init__(self, model: nn.Module, record: LoaderRecord | str, drop_caches: Callable[[], None]) -> None:
        self._model: Any = model
        self.streams_because = record if isinstance(record, str) else None
        self._regions: Regions = declare_regions(model, None if isinstance(record, str) else record)
        self._by_tensor: dict[str, list[SinkRegion]] = defaultdict(list)
        for region in self._regions.regions:
            self._by_tensor[region.placement.hf.name].append(region)
        self._drop_caches = drop_caches
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
        self._require_update(hf)
        if tuple(values.shape) != hf.shape:
            raise ValueError(f"{hf}: got values of shape {list(values.shape)} for a slice of {list(hf.shape)}")
        for region in self._around(hf):
            if values.dtype != region.dtype:
                raise ValueError(f"{hf}: got values of {values.dtype} for a region of {region.dtype}")
            self._regions.write(region, hf, values)

    def load(self, name: str, tensor: Tensor) -> None:
        """Give a whole tensor to vLLM's loader.

        Raises:
            RuntimeError: outside of begin_update .. end_update.
        """
        self._require_update(name)
        self._model.load_weights(iter([(name, tensor)]))

    def end_update(self, policy_version: int) -> None:
        self._regions.rebuild()
        self._drop_caches()
        self.policy_version = policy_version
        self.updating = False

    def digest(self, hf: TensorSlice) -> int:
        """Where several regions hold that part, their common digest; some other number if they differ.

        Raises:
            ValueError: `hf` is not inside a region of the layout.
        """
        first, *others = (slice_digest(self._regions.read(region, hf), hf) for region in self._around(hf))
        return first if all(other == first for other in others) else wrap(first + 1)

    def probe(self) -> dict[str, str]:
        return self._regions.probe()

    def _around(self, hf: TensorSlice) -> Iterator[SinkRegion]:
        inside = [region for region in self._by_tensor[hf.name] if contains(region.placement.hf, hf)]
        if not inside:
            raise ValueError(f"{hf} is not inside a slice that this engine rank takes; its layout() lists them")
        yield from inside

    def _require_update(self, what: object) -> None:
        if not self.updating:
            raise RuntimeError(f"write of {what} outside of an update; call begin_update first")


def contains(outer: TensorSlice, inner: TensorSlice) -> bool:
    """Is `inner` a part of `outer`? Both are slices of one tensor."""
    return all(
        o <= i and i + m <= o + n
        for o, n, i, m in zip(outer.offsets, outer.shape, inner.offsets, inner.shape, strict=True)
    )
