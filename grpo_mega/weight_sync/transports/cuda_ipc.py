"""GPU buffers that processes of one machine share through CUDA IPC (cudaIpcMemHandle).

Two processes on one GPU cannot use NCCL, which rejects a GPU that appears twice. Where the GPUs of a machine have peer
access, a receiver reads the sender's buffer and needs no receive buffer. The order of rounds is that of
shared_memory.py. A rank synchronizes with its own copies before it publishes that a round is filled or read.

Asserted by tests/gpu/test_transports_on_gpu.py. Never run on a GPU so far: there is no measured result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_mega.types import UserError


class DeviceSlots:
    """Two buffers of this rank on its GPU, and the handle with which other processes map them."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        """Allocate `num_bytes` for both buffers together."""
        self.own = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        storage: Any = self.own.untyped_storage()
        self.handle: tuple[Any, ...] = tuple(storage._share_cuda_())
        """Plain values: the device, the driver's handle, the position of the buffers in its memory, their lifetime."""

    def map(self, handle: tuple[Any, ...] | None, rank: int) -> Tensor:
        """Return the buffers of `rank`, [num_bytes] uint8. They stay mapped as long as the tensor lives.

        Raises:
            UserError: that GPU is not visible to this process, or has no peer access.
        """
        assert handle is not None, "all ranks of a machine use the same transport"
        try:
            storage = torch.UntypedStorage._new_shared_cuda(*handle)
        except RuntimeError as error:
            raise UserError(
                f"weight_sync.transport=cuda_ipc: GPU {handle[0]} of rank {rank} cannot be mapped ({error})",
                remedy="make all GPUs of the machine visible to each rank, or use weight_sync.transport=auto",
            ) from error
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

    def synchronize(self) -> None:
        """Wait until this rank's copies have completed."""
        torch.cuda.current_stream(self.own.device).synchronize()
