"""Master weights and gradients of the optimizer on the host in shared buffers of pinned memory.

cpu_offloading/hybrid_optimizer.py:274 pins the host's copy of a parameter, and :278 replaces it by a float32 clone
that is not pinned. A copy from pageable memory blocks the host, so the copy to the device after the update of a
parameter (:124) does not overlap with the update of the next one, although Megatron puts it on a stream of its own.
The copies are pinned by the first step that uses them. Megatron builds this optimizer twice, first for parameters that
are not sharded, and torch's allocator would keep the pinned memory of the first one.

:129 pins a buffer for the gradient of each parameter, and torch's allocator rounds each up to a power of two bytes. The
matrices of an expert of DeepSeek-V3 would take 14% more than they hold. Gradients get parts of buffers of 1 GiB.
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
        if self.pin_cpu_grads:
            _pin_gradients(self)
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
        for copy, part in zip(group, _pinned_parts(group), strict=True):
            copy.data = part.copy_(copy)


def _pin_gradients(optimizer: Any) -> None:
    """Give each master weight on the host, whose parameter has a gradient, a part of a buffer for its gradient."""
    found = optimizer.cpu_copy_map_grad
    missing = (
        copy
        for copy, parameter in optimizer.cpu_copys_map_gpu_param.items()
        if copy not in found and getattr(parameter, "decoupled_grad", parameter.grad) is not None
    )
    for group in _groups(missing):
        for copy, part in zip(group, _pinned_parts(group), strict=True):
            found[copy] = copy.grad = part


def _pinned_parts(group: list[Tensor]) -> list[Tensor]:
    """Return parts of one pinned buffer, with the shapes and the dtype of these tensors and an undefined content."""
    sizes = [tensor.numel() for tensor in group]
    buffer = torch.empty(sum(sizes), dtype=group[0].dtype, device="cpu", pin_memory=True)
    return [part.view(tensor.shape) for tensor, part in zip(group, buffer.split(sizes), strict=True)]


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
