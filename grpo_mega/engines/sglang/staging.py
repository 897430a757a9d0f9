"""A staging buffer that is shared by two processes on one machine and, with CUDA, on one GPU.

Without CUDA it is an anonymous memory file (memfd), which is freed with its last user. With CUDA it is memory of this
rank's device that the other process maps through cudaIpc.
Asserted by tests/unit/engines/sglang/test_weight_server.py; on a device by tests/gpu/test_sglang_on_gpu.py.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import torch
from torch import Tensor

from grpo_mega.types import TensorSlice

ALIGNMENT = 16  # bytes; keeps the start of every slice aligned to its element size


@dataclass(frozen=True)
class StagingPlace:
    """Description of the buffer, by which the other process maps it."""

    num_bytes: int
    gpu: str | None = None
    """UUID of the GPU; None: the file descriptor follows."""
    shared: tuple[Any, ...] = ()
    """PyTorch's description of shared device memory."""


class Staging:
    """The buffer of the process that owns it; slices are appended from its beginning."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.device, self._descriptor = device, -1
        if device.type == "cpu":
            self._descriptor = os.memfd_create("grpo_mega_staging")
            os.posix_fallocate(self._descriptor, 0, num_bytes)
            self.memory = _map_file(self._descriptor, num_bytes)
            self._place = StagingPlace(num_bytes)
        else:
            self.memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            storage: Any = self.memory.untyped_storage()
            self._place = StagingPlace(num_bytes, gpu_name(device), tuple(storage._share_cuda_()))
        self._filled = 0

    def share(self, connection: Connection, send: Callable[[StagingPlace], None]) -> None:
        """Send the description with `send`, then the file descriptor over `connection`, a Unix socket."""
        send(self._place)
        if self._descriptor >= 0:
            send_handle(connection, self._descriptor, 0)  # the process id is used only on Windows
            os.close(self._descriptor)
            self._descriptor = -1

    def put(self, values: Tensor) -> int | None:
        """Append values and return their offset in bytes, or None if they do not fit."""
        start = -(-self._filled // ALIGNMENT) * ALIGNMENT
        if start + values.nbytes > self.memory.numel():
            return None
        staged_at(self.memory, start, values.shape, values.dtype).copy_(values)
        self._filled = start + values.nbytes
        return start

    def empty(self) -> None:
        """Mark the buffer as empty, after the other process has read it."""
        self._filled = 0

    def synchronize(self) -> None:
        """Wait until all copies into the buffer are complete."""
        synchronize(self.device)


def mapped_staging(place: StagingPlace, connection: Connection, device: torch.device) -> Tensor:
    """Map the buffer of the other process into this one, whose kernels run on `device`.

    Raises:
        RuntimeError: the buffer is on another GPU or cannot be mapped.
    """
    if place.gpu is None:
        descriptor = recv_handle(connection)
        try:
            return _map_file(descriptor, place.num_bytes)
        finally:
            os.close(descriptor)
    if device.type != "cuda" or gpu_name(device) != place.gpu:
        own = gpu_name(device) if device.type == "cuda" else device
        raise RuntimeError(f"the rank writes on GPU {place.gpu}, and this process runs on {own}")
    storage = torch.UntypedStorage._new_shared_cuda(
        device.index, *place.shared[1:]
    )  # device indices differ between processes
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def staged_at(memory: Tensor, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the values at byte `start` of the buffer as a view."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return memory[start : start + num_bytes].view(dtype).view(shape)


def parts_that_fit(hf: TensorSlice, elements: int) -> Iterator[TensorSlice]:
    """Yield parts of at most `elements` elements that together cover a slice."""
    numel = torch.Size(hf.shape).numel()
    axis = next((i for i, n in enumerate(hf.shape) if n > 1), None)
    if numel <= elements or axis is None:
        yield hf
        return
    rows = max(1, elements // (numel // hf.shape[axis]))
    for start in range(0, hf.shape[axis], rows):
        offsets, shape = list(hf.offsets), list(hf.shape)
        offsets[axis], shape[axis] = hf.offsets[axis] + start, min(rows, hf.shape[axis] - start)
        yield from parts_that_fit(TensorSlice(hf.name, tuple(offsets), tuple(shape)), elements)


def synchronize(device: torch.device) -> None:
    """Wait until the copies of this thread on the device are complete."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def gpu_name(device: torch.device) -> str:
    """Return the UUID of a device, which is the same in every process."""
    return str(torch.cuda.get_device_properties(device).uuid)


def _map_file(descriptor: int, num_bytes: int) -> Tensor:
    """Map a file as a byte tensor; the mapping lives as long as the tensor."""
    return torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)
