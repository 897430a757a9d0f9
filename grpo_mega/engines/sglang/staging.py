"""A buffer of one process that another one on this machine, and this GPU, has mapped: values go through it by address.

Without CUDA it is a memory file without a name, which nothing outlives; with CUDA memory of this rank's device, which
the driver lets another process map (cudaIpc).
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

ALIGNMENT = 16  # bytes: the start of every slice in the buffer is one of its elements


@dataclass(frozen=True)
class StagingPlace:
    """How the other process finds the buffer. `gpu`: which one, whatever number it has there; None: a file follows.
    `shared`: torch's own words for memory of a device."""

    num_bytes: int
    gpu: str | None = None
    shared: tuple[Any, ...] = ()


class Staging:
    """This process's buffer, filled from its beginning."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.device, self._descriptor = device, -1
        if device.type == "cpu":
            self._descriptor = os.memfd_create("grpo_mega_staging")
            os.posix_fallocate(self._descriptor, 0, num_bytes)
            self.memory = _mapped(self._descriptor, num_bytes)
            self._place = StagingPlace(num_bytes)
        else:
            self.memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            storage: Any = self.memory.untyped_storage()
            self._place = StagingPlace(num_bytes, gpu_name(device), tuple(storage._share_cuda_()))
        self._filled = 0

    def tell(self, connection: Connection, send: Callable[[StagingPlace], None]) -> None:
        """`send` brings the place to the other end of `connection`, a Unix socket; the file follows."""
        send(self._place)
        if self._descriptor >= 0:
            send_handle(connection, self._descriptor, 0)  # the process number is for Windows
            os.close(self._descriptor)
            self._descriptor = -1

    def put(self, values: Tensor) -> int | None:
        """Copies them in behind what is there; where they begin, or None if they do not fit any more."""
        start = -(-self._filled // ALIGNMENT) * ALIGNMENT
        if start + values.nbytes > self.memory.numel():
            return None
        staged_at(self.memory, start, values.shape, values.dtype).copy_(values)
        self._filled = start + values.nbytes
        return start

    def empty(self) -> None:
        """The other process has taken everything out."""
        self._filled = 0

    def settle(self) -> None:
        """Until everything is in it."""
        settle(self.device)


def mapped_staging(place: StagingPlace, connection: Connection, device: torch.device) -> Tensor:
    """The other process's buffer, in this one, whose kernels compute on `device`.

    Raises:
        RuntimeError: it is on another GPU, or cannot be mapped.
    """
    if place.gpu is None:
        descriptor = recv_handle(connection)
        try:
            return _mapped(descriptor, place.num_bytes)
        finally:
            os.close(descriptor)
    if device.type != "cuda" or gpu_name(device) != place.gpu:
        here = gpu_name(device) if device.type == "cuda" else device
        raise RuntimeError(f"the rank writes on GPU {place.gpu}, and this process computes on {here}")
    storage = torch.UntypedStorage._new_shared_cuda(device.index, *place.shared[1:])  # numbers differ between processes
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def staged_at(memory: Tensor, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values in the buffer."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return memory[start : start + num_bytes].view(dtype).view(shape)


def parts_that_fit(hf: TensorSlice, elements: int) -> Iterator[TensorSlice]:
    """Cuts of a slice that tile it, of at most so many elements each."""
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


def settle(device: torch.device) -> None:
    """Until what this thread has copied is there."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def gpu_name(device: torch.device) -> str:
    """The same in every process, whatever its numbers."""
    return str(torch.cuda.get_device_properties(device).uuid)


def _mapped(descriptor: int, num_bytes: int) -> Tensor:
    """The mapping lives as long as the tensor."""
    return torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)
