"""Moves tensors between device and host memory by their storages, so that every view of them stays valid.

It moves state between the phases of a step. The part of the optimizer that stays on the host is in optimizer_config.py.
Tensors are addressed by storage: parameters and the distributed optimizer's shards are views into a few flat buffers.
Without CUDA, device and host memory are the same, but an offloaded storage has 0 bytes there as well: native code that
reads it ends the process. Therefore every public function of a learner first checks with `PolicyMemory.require` that
what it reads is on the device.
Asserted by tests/unit/policy/test_phase_offload.py and tests/parallel/test_planner.py; tests/gpu checks the freed
memory of a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from grpo_mega.interfaces import LearnerState
from grpo_mega.policy.host_memory import HostMemory, as_bytes, host_memory

Place = Literal["device", "host", "set aside"]
"""Where the content of tensors is. "set aside": on the host, while their device memory holds other values."""


class Movable:
    """The distinct storages of some tensors. With `keep=False` their content is discarded (gradients)."""

    def __init__(self, tensors: Iterable[Tensor], *, keep: bool = True) -> None:
        self._storages = _distinct_storages(tensors)
        self._sizes = [storage.nbytes() for storage in self._storages.values()]
        self._host: HostMemory | None = host_memory(list(self._storages.values())) if keep else None
        self.place: Place = "device"

    @property
    def num_bytes(self) -> int:
        """Bytes of the content, wherever it is."""
        return sum(self._sizes)

    @property
    def resident_bytes(self) -> int:
        """Bytes that the storages occupy on the device now."""
        return sum(storage.nbytes() for storage in self._storages.values())

    def holds(self, tensors: Iterable[Tensor]) -> bool:
        """Return True if the storages are those of `tensors`."""
        return self._storages.keys() == _distinct_storages(tensors).keys()

    def offload(self) -> None:
        """Keep the content on the host, unless it is discarded, and free the device memory.

        Does nothing the second time.
        """
        if self.place == "host":
            return
        assert self.place == "device", "the reference is active"
        if self._host is not None:
            self._host.take()
        for storage in self._storages.values():
            storage.resize_(0)
        self.place = "host"

    def reload(self) -> None:
        """Allocate the device memory again and restore the content, or fill with zeros if it was not kept."""
        if self.place == "device":
            return
        if self._host is not None:
            self._host.give()
        else:
            for storage, size in zip(self._storages.values(), self._sizes, strict=True):
                storage.resize_(size)
                as_bytes(storage).zero_()
        self.place = "device"

    def set_aside(self) -> None:
        """Keep the content on the host and leave the device memory with an undefined content; `reload` restores it."""
        assert self.place == "device", f"the content is not on the device: {self.place}"
        assert self._host is not None, "the content is not kept"
        self._host.take()
        for storage, size in zip(self._storages.values(), self._sizes, strict=True):
            storage.resize_(size)
        self.place = "set aside"

    def changed(self) -> None:
        """Note that the content changes, so that the next offload copies it again."""
        if self._host is not None:
            self._host.changed()


class PolicyMemory:
    """Parameters, gradients and optimizer state of one model, each moved as a whole."""

    def __init__(self, buffers: Sequence[Any], optimizer: Any) -> None:
        """Register Megatron's flat `buffers` and the optimizer, while everything is on the device."""
        params = [b.param_data for b in buffers]
        self._optimizer, self._device = optimizer, params[0].device
        self._param_storages = _distinct_storages(params).keys()
        self._parts: dict[LearnerState, Movable] = {
            "params": Movable(params),
            "grads": Movable((b.grad_data for b in buffers), keep=False),
            "optimizer": Movable(self._optimizer_tensors()),
        }

    def num_bytes(self) -> dict[str, int]:
        """Return the bytes of each part, wherever it is. The moments exist after the first update."""
        self._find_optimizer_state()
        return {part: movable.num_bytes for part, movable in self._parts.items()}

    def resident_bytes(self) -> dict[str, int]:
        """Return the bytes that each part occupies on the device now."""
        self._find_optimizer_state()
        return {part: movable.resident_bytes for part, movable in self._parts.items()}

    def offload(self, *parts: LearnerState) -> None:
        """Move these parts to the host and free their device memory."""
        self._find_optimizer_state()
        for part in parts:
            self._parts[part].offload()

    def reload(self, *parts: LearnerState) -> None:
        """Move these parts back to the device."""
        for part in parts:
            self._parts[part].reload()

    def changed(self) -> None:
        """Note that parameters and optimizer state change: an update or a load begins."""
        for movable in self._parts.values():
            movable.changed()

    @contextmanager
    def params_set_aside(self) -> Iterator[None]:
        """Free the parameters' buffers for other values inside the block; restore them bit for bit afterwards."""
        self._parts["params"].set_aside()
        try:
            yield
        finally:
            self._parts["params"].reload()

    def require(self, reader: str, phase: str, *parts: LearnerState, reference: bool = False) -> None:
        """Check that these parts are on the device.

        Args:
            reader: the function that reads them, for the message.
            phase: the method of `Phases` in which they are on the device.
            parts: what is read.
            reference: True if the reference's weights may be in place of the policy's.

        Raises:
            RuntimeError: a part is not on the device (names it and the phase). Without this check the process would
                read freed memory.
        """
        allowed = ("device", "set aside") if reference else ("device",)
        missing = [f"{part}={self._parts[part].place}" for part in parts if self._parts[part].place not in allowed]
        if missing:
            raise RuntimeError(
                f"{', '.join(missing)}: {reader} needs {', '.join(parts)} on the device; call it inside Phases.{phase}"
            )

    def _find_optimizer_state(self) -> None:
        """Register the optimizer's present tensors: moments exist after the first update."""
        if self._parts["optimizer"].place == "device":
            tensors = self._optimizer_tensors()
            if not self._parts["optimizer"].holds(tensors):
                self._parts["optimizer"] = Movable(tensors)

    def _optimizer_tensors(self) -> list[Tensor]:
        """Return master weights and moments on the device, without master weights that are the parameters (fp32).

        Tensors that are updated on the host (`optimizer.host_fraction`) stay there.
        """
        on_device = [t for t in optimizer_tensors(self._optimizer) if t.device == self._device]
        return [t for t in on_device if t.untyped_storage()._cdata not in self._param_storages]


def optimizer_tensors(optimizer: Any) -> list[Tensor]:
    """Return the master weights and, after the first update, the moments."""
    return [*_masters(optimizer), *_moments(optimizer)]


def _distinct_storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Return the storages by their identity, which also an empty storage has."""
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}


def _masters(optimizer: Any) -> list[Tensor]:
    return [p.data for adam in _adams(optimizer) for group in adam.param_groups for p in group["params"]]


def _moments(optimizer: Any) -> list[Tensor]:
    states = [state for adam in _adams(optimizer) for state in adam.state.values()]
    return [v for state in states for v in state.values() if torch.is_tensor(v) and v.dim() > 0]


def _adams(optimizer: Any) -> list[Any]:
    return [inner.optimizer for inner in getattr(optimizer, "chained_optimizers", [optimizer])]
