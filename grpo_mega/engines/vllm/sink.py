"""The vLLM end of a weight sync on one rank: writes slices where vLLM's kernels read them, and verifies them there.

The layout is the recorded loader of vLLM (vllm/recording_loader.py) plus the derived copies that vLLM makes of loaded
parameters (vllm/regions.py). If the loader cannot be recorded, whole tensors are streamed through it.
Asserted by tests/engine/test_vllm_engine.py (a stale packed head) and test_weight_sync.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from grpo_mega.engines.vllm.regions import declare_regions
from grpo_mega.engines.weights.loader_recording import LoaderRecord
from grpo_mega.engines.weights.sink import RegionSink


class VllmSink(RegionSink):
    """`WeightSink` over the parameters of vLLM's model.

    Args:
        model: loaded and processed.
        record: of its loader, or the reason why it cannot be recorded.
        drop_caches: discards what was computed with the previous weights.

    Raises:
        RuntimeError: vLLM keeps a parameter in a form that is not known here (names it).
    """

    def __init__(self, model: nn.Module, record: LoaderRecord | str, drop_caches: Callable[[], None]) -> None:
        reason = record if isinstance(record, str) else None
        super().__init__(declare_regions(model, None if isinstance(record, str) else record), reason)
        self._model: Any = model
        self._drop_caches = drop_caches

    def load(self, name: str, tensor: Tensor) -> None:
        """Give a whole tensor to vLLM's loader.

        Raises:
            RuntimeError: called outside of begin_update .. end_update.
        """
        self.require_update(name)
        self._model.load_weights(iter([(name, tensor)]))

    def _finish_update(self, policy_version: int) -> None:
        self._drop_caches()
