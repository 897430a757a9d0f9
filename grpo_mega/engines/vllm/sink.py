"""The end of a weight sync on one rank of vLLM: writes slices where its kernels read them, and proves what they read.

The layout is the record of vLLM's own loader (vllm/record.py) plus what vLLM makes of the loaded parameters
(vllm/regions.py). Where the loader could not be recorded, tensors are streamed through it, whole.
Asserted by tests/engine/test_vllm_engine.py (a stale packed head) and test_weight_sync.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from grpo_mega.engines.vllm.fp8 import Requantisation
from grpo_mega.engines.vllm.regions import declare_regions
from grpo_mega.engines.weights.loader_recording import LoaderRecord
from grpo_mega.engines.weights.sink import RegionSink


class VllmSink(RegionSink):
    """`WeightSink` over the parameters of vLLM's model.

    Args:
        model: loaded and processed.
        record: of its loader; or why there is none.
        drop_caches: forgets what was computed with the weights of before.
        requantisation: of a model that quantises what it loads.

    Raises:
        RuntimeError: vLLM made something of a parameter that is not known here (names it).
    """

    def __init__(
        self,
        model: nn.Module,
        record: LoaderRecord | str,
        drop_caches: Callable[[], None],
        requantisation: Requantisation | None = None,
    ) -> None:
        because = record if isinstance(record, str) else None
        super().__init__(declare_regions(model, None if isinstance(record, str) else record), because)
        self._model: Any = model
        self._drop_caches, self._requantisation = drop_caches, requantisation

    def begin_update(self) -> None:
        super().begin_update()
        if self._requantisation is not None:
            self._requantisation.begin()

    def end_update(self, policy_version: int) -> None:
        if self._requantisation is not None:
            self._requantisation.end()
        super().end_update(policy_version)

    def load(self, name: str, tensor: Tensor) -> None:
        """Give a whole tensor to vLLM's loader.

        Raises:
            RuntimeError: outside of begin_update .. end_update.
        """
        self.require_update(name)
        self._model.load_weights(iter([(name, tensor)]))

    def _adopt(self, policy_version: int) -> None:
        self._drop_caches()
