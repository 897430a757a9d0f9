"""Releases host memory of vLLM in place while the engine sleeps, as vLLM's own allocator does on CUDA.

Asserted by tests/engine/test_vllm_engine.py.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class ReleasedStorages:
    """The storages of some tensors, released and restored in place, so that all views of them stay valid."""

    def __init__(self, tensors: Iterable[Tensor], *, kept: Iterable[Tensor] = ()) -> None:
        """Register the storages of `tensors`, without those that a tensor of `kept` shares."""
        untouched = {tensor.untyped_storage()._cdata for tensor in kept}
        found = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
        self._storages = {key: storage for key, storage in found.items() if key not in untouched}
        self._sizes = {key: storage.nbytes() for key, storage in self._storages.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes that the storages occupy now."""
        return sum(storage.nbytes() for storage in self._storages.values())

    def release(self) -> None:
        """Free the memory. Native code that reads it now ends the process."""
        for storage in self._storages.values():
            storage.resize_(0)

    def restore(self) -> None:
        """Allocate the memory again, with zeros.

        vLLM allocates its KV cache with zeros: kernels read whole blocks, and 0 * NaN is NaN. The padding of a
        vocabulary, which no sync writes, is multiplied too.
        """
        for key, storage in self._storages.items():
            storage.resize_(self._sizes[key])
            torch.empty(0, dtype=torch.uint8).set_(storage).zero_()
