"""Measured bytes of a policy on this rank: weights, gradients, optimizer state and tensors saved for backward.

tools/measure_memory.py compares them with the planner's numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grpo_mega.policy.build import MegatronParts
from grpo_mega.policy.phase_offload import optimizer_tensors


@dataclass(frozen=True)
class HeldBytes:
    """Bytes on one rank. `optimizer` are master weights, unless they are the parameters themselves, and moments."""

    weights: int
    gradients: int
    optimizer: int


def held_bytes(parts: MegatronParts) -> HeldBytes:
    """Return the bytes of a policy. Call it after the first update, when the moments exist."""
    params = {_storage(b.param_data): b.param_data.untyped_storage().nbytes() for b in parts.buffers}
    grads = {_storage(b.grad_data): b.grad_data.untyped_storage().nbytes() for b in parts.buffers}
    # a master weight or a moment may be a part of a larger storage, so its own size is counted, each once
    state = {t.data_ptr(): t.nbytes for t in optimizer_tensors(parts.optimizer) if _storage(t) not in params}
    return HeldBytes(sum(params.values()), sum(grads.values()), sum(state.values()))


@dataclass
class SavedBytes:
    """Bytes of the distinct storages that autograd holds for backward passes: current and peak."""

    now: int = 0
    peak: int = 0
    at_peak: list[tuple[tuple[int, ...], str, int]] = field(default_factory=list)
    """Shape, dtype and bytes of each storage at the peak."""


@contextmanager
def saved_for_backward(excluded: Iterable[Tensor]) -> Iterator[SavedBytes]:
    """Count the bytes that autograd saves inside the block, without the storages of `excluded` (parameters)."""
    found = SavedBytes()
    outside = {_storage(t) for t in excluded}
    held: dict[int, tuple[int, int, tuple[int, ...], str]] = {}  # storage -> uses, bytes, shape, dtype

    def release(key: int) -> None:
        uses, size, *rest = held[key]
        if uses > 1:
            held[key] = (uses - 1, size, *rest)  # type: ignore[assignment]
        else:
            del held[key]
            found.now -= size

    def pack(tensor: Tensor) -> _Saved:
        saved, key = _Saved(tensor), _storage(tensor)
        if key in outside or tensor.numel() == 0:
            return saved
        uses, size, shape, dtype = held.get(key, (0, 0, (), ""))
        if uses == 0:
            size, shape, dtype = tensor.untyped_storage().nbytes(), tuple(tensor.shape), str(tensor.dtype)
            found.now += size
        held[key] = uses + 1, size, shape, dtype
        weakref.finalize(saved, release, key)
        if found.now > found.peak:
            found.peak = found.now
            found.at_peak = [(shape, dtype, size) for _, size, shape, dtype in held.values()]
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        yield found


class _Saved:
    """Wrapper that exists as long as autograd needs the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Any = tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
