"""Master weights of the optimizer on the host in pinned memory, so that their copies overlap with Adam.

cpu_offloading/hybrid_optimizer.py:274 pins the host's copy of a parameter, and :278 replaces it by a float32 clone
that is not pinned. A copy from pageable memory blocks the host, so the copy to the device after the update of a
parameter (:124) does not overlap with the update of the next one, although Megatron puts it on a stream of its own.
The copies are pinned by the first step that uses them. Megatron builds this optimizer twice, first for parameters that
are not sharded, and torch's allocator would keep the pinned memory of the first one.
Asserted by tests/unit/policy/megatron_patches/test_host_optimizer.py, and on CUDA by
tests/gpu/test_host_optimizer_on_gpu.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from grpo_mega.formats.host_buffers import MAX_PIECE_BYTES
from grpo_mega.policy.megatron_patches import cpu

cpu.prepare_import()

from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer  # noqa: E402 - only after prepare_import


def install() -> None:
    """Apply the patch. Idempotent."""
    step = HybridDeviceOptimizer.step
    if not getattr(step, "pins_masters", False):
        HybridDeviceOptimizer.step = _pinning(step)


def _pinning(step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(step)
    def pinned_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.pin_cpu_params:
            pin(copy for copy in self.gpu_params_map_cpu_copy.values() if not copy.is_pinned())
        return step(self, *args, **kwargs)

    pinned_step.pins_masters = True  # type: ignore[attr-defined]
    return pinned_step


@torch.no_grad()
def pin(copies: Iterable[Tensor]) -> None:
    """Move the content of host tensors of one dtype to pinned memory. The tensors stay the same objects.

    Tensors share buffers of at most 1 GiB, or of one larger tensor: torch's allocator of pinned memory rounds each
    buffer up to a power of two bytes. At most one buffer exists beside the content that it replaces.
    """
    for group in _groups(copies):
        sizes = [copy.numel() for copy in group]
        buffer = torch.empty(sum(sizes), dtype=group[0].dtype, device="cpu", pin_memory=True)
        for copy, part in zip(group, buffer.split(sizes), strict=True):
            copy.data = part.view(copy.shape).copy_(copy)


def _groups(copies: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield consecutive tensors of at most `MAX_PIECE_BYTES` together, or one that is larger."""
    group: list[Tensor] = []
    num_bytes = 0
    for copy in copies:
        if group and num_bytes + copy.nbytes > MAX_PIECE_BYTES:
            yield group
            group, num_bytes = [], 0
        group.append(copy)
        num_bytes += copy.nbytes
    if group:
        yield group
