"""Moves a group of tensors between the device and the host by their storages, so that every view of them stays valid.

Tensors are addressed by storage: parameters and the distributed optimizer's shards are views into a few flat buffers.
Asserted by tests/unit/policy/test_offload.py on host tensors; what it frees on a device is in tests/gpu.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Part = Literal["params", "grads", "optimizer"]


class Movable:
    """The distinct storages of some tensors. `keep=False`: their content is not needed again (gradients)."""

    def __init__(self, tensors: Iterable[Tensor], *, keep: bool = True) -> None:
        self._storages = list({t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}.values())
        self._sizes = [s.nbytes() for s in self._storages]
        self._keep = keep
        self._host: list[Tensor] | None = None
        self._away = False

    @property
    def num_bytes(self) -> int:
        """Held on the device when it is there."""
        return sum(self._sizes)

    def offload(self) -> None:
        """Free the device memory; does nothing when it is freed already."""
        if self._away:
            return
        if self._keep:
            if self._host is None:
                pinned = torch.cuda.is_available()
                self._host = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in self._sizes]
            for storage, host in zip(self._storages, self._host, strict=True):
                host.copy_(_as_bytes(storage))
        for storage in self._storages:
            storage.resize_(0)
        self._away = True

    def reload(self) -> None:
        """Take the device memory again and, where content was kept, bring it back."""
        if not self._away:
            return
        for i, (storage, size) in enumerate(zip(self._storages, self._sizes, strict=True)):
            storage.resize_(size)
            if self._host is not None:
                _as_bytes(storage).copy_(self._host[i])
            else:
                _as_bytes(storage).zero_()
        self._away = False


class PolicyMemory:
    """Parameters, gradients and optimizer state of one policy, each moved as a whole."""

    def __init__(self, buffers: Sequence[Any], optimizer: Any) -> None:
        """`buffers`: Megatron's flat ones. Made while everything is on the device."""
        self._optimizer = optimizer
        params = [b.param_data for b in buffers]
        shared = {t.untyped_storage().data_ptr() for t in params}  # fp32 master weights are views of the parameters
        masters = [t for t in _masters(optimizer) if t.untyped_storage().data_ptr() not in shared]
        self._parts: dict[Part, list[Movable]] = {
            "params": [Movable(params)],
            "grads": [Movable((b.grad_data for b in buffers), keep=False)],
            "optimizer": [Movable(masters)],
        }
        self._has_moments = False
        self._device = params[0].device

    def num_bytes(self) -> dict[str, int]:
        """Of each part when it is on the device; the moments appear with the first update."""
        found: dict[str, int] = {part: sum(m.num_bytes for m in movables) for part, movables in self._parts.items()}
        if not self._has_moments:
            found["optimizer"] += Movable(self._moments_here()).num_bytes
        return found

    def offload(self, *parts: Part) -> None:
        """Free these parts on the device."""
        if "optimizer" in parts and not self._has_moments and (moments := self._moments_here()):
            self._parts["optimizer"].append(Movable(moments))  # they appear with the first update
            self._has_moments = True
        for part in parts:
            for movable in self._parts[part]:
                movable.offload()

    def reload(self, *parts: Part) -> None:
        """Bring these parts back."""
        for part in parts:
            for movable in self._parts[part]:
                movable.reload()

    def _moments_here(self) -> list[Tensor]:
        """Without those that live on the host and are updated there (`optimizer.host_fraction`)."""
        return [moment for moment in _moments(self._optimizer) if moment.device == self._device]


def optimizer_tensors(optimizer: Any) -> list[Tensor]:
    """Master weights and, after the first update, moments."""
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
