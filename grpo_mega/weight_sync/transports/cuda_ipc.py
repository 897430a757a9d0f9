"""Buckets between processes that see the same GPU: its driver lets one process map memory of another (cudaIpc).

Two processes on one GPU cannot meet over NCCL, which refuses a GPU that comes twice; and where GPUs of a machine reach
each other, a receiver reads the sender's buffer without a receive buffer of its own. Turns and their order are those
of shared_memory.py; a rank waits for its own copies before it says that a turn is filled or taken over.
Asserted by tests/gpu/test_transports_on_gpu.py. Written, never run: no result of it exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_mega.types import UserError


class DeviceSlots:
    """This rank's two buffers on its GPU, and how other processes find them."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        """`num_bytes`: of both."""
        self.own = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        storage: Any = self.own.untyped_storage()
        self.told: tuple[Any, ...] = tuple(storage._share_cuda_())
        """Plain values: the device, the driver's handle, where in its memory the buffers are, and their life."""

    def map(self, told: tuple[Any, ...] | None, rank: int) -> Tensor:
        """The buffers of `rank`; they live as long as the tensor.

        Raises:
            UserError: this process does not see that GPU, or cannot reach it.
        """
        assert told is not None, "all ranks of a machine use the same transport"
        try:
            storage = torch.UntypedStorage._new_shared_cuda(*told)
        except RuntimeError as error:
            raise UserError(
                f"weight_sync.transport=cuda_ipc: rank {rank}'s GPU {told[0]} cannot be mapped here ({error})",
                remedy="make all GPUs of the machine visible to each rank, or use weight_sync.transport=auto",
            ) from error
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

    def settle(self) -> None:
        """Until what this rank has copied is there."""
        torch.cuda.current_stream(self.own.device).synchronize()
