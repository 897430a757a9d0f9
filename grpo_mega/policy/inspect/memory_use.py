"""What a policy really holds on this rank, in bytes: weights, gradients, optimizer state, and the tensors that autograd
keeps between forward and backward pass. The planner's numbers are held against these (tools/measure_memory.py).
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
from grpo_mega.policy.offload import optimizer_tensors


@dataclass(frozen=True)
class HeldBytes:
    """On one rank; the optimizer's are its master weights (where they are not the parameters) and its moments."""

    weights: int
    gradients: int
    optimizer: int


def held_bytes(parts: MegatronParts) -> HeldBytes:
    """After the first update, when the moments exist."""
    params = {_storage(b.param_data): b.param_data.untyped_storage().nbytes() for b in parts.buffers}
    grads = {_storage(b.grad_data): b.grad_data.untyped_storage().nbytes() for b in parts.buffers}
    # a master weight or a moment may be a part of a larger storage: what counts is its own size, each once
    state = {t.data_ptr(): t.nbytes for t in optimizer_tensors(parts.optimizer) if _storage(t) not in params}
    return HeldBytes(sum(params.values()), sum(grads.values()), sum(state.values()))


@dataclass
class SavedBytes:
    """Bytes of the distinct storages that autograd holds for backward passes: now, and at most."""

    now: int = 0
    peak: int = 0
    at_peak: list[tuple[tuple[int, ...], str, int]] = field(default_factory=list)
    """Shape, dtype and bytes of each storage at the peak."""


@contextmanager
def saved_for_backward(excluded: Iterable[Tensor]) -> Iterator[SavedBytes]:
    """Counts inside the block; the storages of `excluded` (parameters) are not counted."""
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
    """Lives as long as autograd needs the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Any = tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
