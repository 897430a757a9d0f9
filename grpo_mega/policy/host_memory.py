"""Host memory for the content of device storages: copies for CUDA devices, moves for host devices.

On CUDA a copy is pinned, and it is kept: as long as the content does not change, it is not copied again. Without CUDA
the device memory is host memory, so the memory itself changes its owner and nothing is copied. In both cases the
storage has 0 bytes afterwards, and every view of it is unreadable.
Asserted by tests/unit/policy/test_host_memory.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from grpo_mega.formats.host_buffers import HostBuffers


class HostMemory(Protocol):
    """Keeps the content of some storages while they are freed or overwritten."""

    def take(self) -> None:
        """Keep the content. Afterwards the storages have 0 bytes, or an undefined content."""
        ...

    def give(self) -> None:
        """Restore size and content of the storages."""
        ...

    def changed(self) -> None:
        """Note that the content changes: a copy made before is outdated."""
        ...


def host_memory(storages: Sequence[torch.UntypedStorage]) -> HostMemory:
    """Return the host memory for storages of one device."""
    on_host = all(storage.device.type == "cpu" for storage in storages)
    return MovedMemory(storages) if on_host else CopiedMemory(storages)


class MovedMemory:
    """Moves the memory of host storages to storages of its own, and back. Nothing is copied."""

    def __init__(self, storages: Sequence[torch.UntypedStorage]) -> None:
        self._storages = list(storages)
        self._kept = [torch.UntypedStorage(0) for _ in storages]

    def take(self) -> None:
        for storage, kept in zip(self._storages, self._kept, strict=True):
            _swap(kept, storage)

    def give(self) -> None:
        for storage, kept in zip(self._storages, self._kept, strict=True):
            _swap(kept, storage)
            kept.resize_(0)

    def changed(self) -> None:
        """Do nothing: there is never a second copy."""


class CopiedMemory:
    """A copy of storages in host memory, pinned for CUDA devices. It is made again only after `changed`."""

    def __init__(self, storages: Sequence[torch.UntypedStorage]) -> None:
        self._storages, self._sizes = list(storages), [storage.nbytes() for storage in storages]
        self._device = self._storages[0].device if self._storages else torch.device("cpu")
        self._copies: HostBuffers | None = None
        self._is_current = False

    def take(self) -> None:
        if self._is_current:
            return
        if self._copies is None:
            self._copies = HostBuffers(self._sizes, self._device)
        for i, storage in enumerate(self._storages):
            self._copies.write(i, as_bytes(storage))
        _wait_for_copies(self._device)
        self._is_current = True

    def give(self) -> None:
        assert self._copies is not None, "take comes first"
        for i, (storage, size) in enumerate(zip(self._storages, self._sizes, strict=True)):
            storage.resize_(size)
            self._copies.read(i, as_bytes(storage))
        _wait_for_copies(self._device)

    def changed(self) -> None:
        self._is_current = False


def _swap(a: torch.UntypedStorage, b: torch.UntypedStorage) -> None:
    """Exchange the memory of two host storages, with their sizes."""
    a._swap_data_ptr_(b)  # type: ignore[attr-defined]


def as_bytes(storage: torch.UntypedStorage) -> Tensor:
    """Return the content of a storage as a tensor, [bytes] uint8."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _wait_for_copies(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
