"""Moves tensors between device and host memory by their storages, so that every view of them stays valid.

It moves state between the phases of a step. The part of the optimizer that stays on the host is in optimizer_config.py.
Tensors are addressed by storage: parameters and the distributed optimizer's shards are views into a few flat buffers.
Asserted by tests/unit/policy/test_phase_offload.py on host tensors; tests/gpu checks the freed device memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_mega.interfaces import LearnerState


class Movable:
    """The distinct storages of some tensors. With `keep=False` their content is discarded (gradients)."""

    def __init__(self, tensors: Iterable[Tensor], *, keep: bool = True) -> None:
        self._storages = list({t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}.values())
        self._sizes = [s.nbytes() for s in self._storages]
        self._keep = keep
        self._host: list[Tensor] | None = None
        self._is_offloaded = False

    @property
    def num_bytes(self) -> int:
        """Bytes on the device when the storages are not offloaded."""
        return sum(self._sizes)

    def offload(self) -> None:
        """Copy the content to the host if it is kept, and free the device memory. Does nothing the second time."""
        if self._is_offloaded:
            return
        if self._keep:
            if self._host is None:
                pinned = torch.cuda.is_available()
                self._host = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in self._sizes]
            for storage, host in zip(self._storages, self._host, strict=True):
                host.copy_(_as_bytes(storage))
        for storage in self._storages:
            storage.resize_(0)
        self._is_offloaded = True

    def reload(self) -> None:
        """Allocate the device memory again and restore the content, or fill with zeros if it was not kept."""
        if not self._is_offloaded:
            return
        for i, (storage, size) in enumerate(zip(self._storages, self._sizes, strict=True)):
            storage.resize_(size)
            if self._host is not None:
                _as_bytes(storage).copy_(self._host[i])
            else:
                _as_bytes(storage).zero_()
        self._is_offloaded = False


class PolicyMemory:
    """Parameters, gradients and optimizer state of one model, each moved as a whole."""

    def __init__(self, buffers: Sequence[Any], optimizer: Any) -> None:
        """Register Megatron's flat `buffers` and the optimizer, while everything is on the device."""
        self._optimizer = optimizer
        params = [b.param_data for b in buffers]
        shared = {t.untyped_storage().data_ptr() for t in params}  # fp32 master weights are views of the parameters
        masters = [t for t in _masters(optimizer) if t.untyped_storage().data_ptr() not in shared]
        self._parts: dict[LearnerState, list[Movable]] = {
            "params": [Movable(params)],
            "grads": [Movable((b.grad_data for b in buffers), keep=False)],
            "optimizer": [Movable(masters)],
        }
        self._has_moments = False
        self._device = params[0].device

    def num_bytes(self) -> dict[str, int]:
        """Return the bytes of each part on the device. The moments exist after the first update."""
        found: dict[str, int] = {part: sum(m.num_bytes for m in movables) for part, movables in self._parts.items()}
        if not self._has_moments:
            found["optimizer"] += Movable(self._device_moments()).num_bytes
        return found

    def offload(self, *parts: LearnerState) -> None:
        """Move these parts to the host and free their device memory."""
        if "optimizer" in parts and not self._has_moments and (moments := self._device_moments()):
            self._parts["optimizer"].append(Movable(moments))  # moments exist after the first update
            self._has_moments = True
        for part in parts:
            for movable in self._parts[part]:
                movable.offload()

    def reload(self, *parts: LearnerState) -> None:
        """Move these parts back to the device."""
        for part in parts:
            for movable in self._parts[part]:
                movable.reload()

    def _device_moments(self) -> list[Tensor]:
        """Return the moments on the device, without those that are updated on the host (`optimizer.host_fraction`)."""
        return [moment for moment in _moments(self._optimizer) if moment.device == self._device]


def optimizer_tensors(optimizer: Any) -> list[Tensor]:
    """Return the master weights and, after the first update, the moments."""
    return [*_masters(optimizer), *_moments(optimizer)]


def _masters(optimizer: Any) -> list[Tensor]:
    return [p.data for adam in _adams(optimizer) for group in adam.param_groups for p in group["params"]]


def _moments(optimizer: Any) -> list[Tensor]:
    states = [state for adam in _adams(optimizer) for state in adam.state.values()]
    return [v for state in states for v in state.values() if torch.is_tensor(v) and v.dim() > 0]


def _adams(optimizer: Any) -> list[Any]:
    return [inner.optimizer for inner in getattr(optimizer, "chained_optimizers", [optimizer])]


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
