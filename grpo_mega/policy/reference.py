"""The reference: a second set of weights for the same modules.

A swap copies whole parameter buffers and never rebinds `param.data`, because the distributed optimizer and pending
gathers hold views of it. Each data-parallel rank keeps 1/dp of every buffer on the host, in the policy's dtype; a swap
gathers the parts. Meanwhile the policy's weights are where they are while the engine samples (phase_offload.py), so a
swap does not copy them to the host again. Asserted by tests/parallel/test_update.py: before and after, digest and every
`data_ptr` are equal, and in fp32 the KL before the first update is exactly 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mega.formats.host_buffers import HostBuffers
from grpo_mega.policy.phase_offload import PolicyMemory


class Reference:
    """A snapshot of the weights in Megatron's flat buffers, and of small tensors outside of them."""

    def __init__(self, buffers: Sequence[Any], memory: PolicyMemory, others: Sequence[Tensor] = ()) -> None:
        """Take the first snapshot.

        Args:
            buffers: Megatron's buffers of parameters.
            memory: keeps the policy's weights while the reference's are in the buffers.
            others: tensors that updates change and that are equal on the ranks that share them: routers' biases.
        """
        # the replicas of an expert are not on the same ranks as the replicas of a dense layer
        self._buffers: list[tuple[Tensor, dist.ProcessGroup]] = [(b.param_data, b.data_parallel_group) for b in buffers]
        self._memory, self._others = memory, tuple(others)
        sizes = [buffer.nbytes // group.size() for buffer, group in self._buffers]
        self._shards = HostBuffers(sizes, self._buffers[0][0].device)
        self.update()

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory on this rank."""
        return self._shards.num_bytes

    def update(self) -> None:
        """Replace the snapshot with the current weights of the buffers."""
        for i, (buffer, group) in enumerate(self._buffers):
            self._shards.write(i, buffer.detach().view(group.size(), -1)[group.rank()].view(torch.uint8))
        self._other_values = [other.detach().clone() for other in self._others]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Set the parameters to the reference inside the block, and restore them bit for bit afterwards."""
        kept = [other.detach().clone() for other in self._others]
        with self._memory.params_set_aside():
            try:
                self._fill_buffers()
                self._fill_others(self._other_values)
                yield
            finally:
                self._fill_others(kept)

    def _fill_others(self, values: Sequence[Tensor]) -> None:
        for other, value in zip(self._others, values, strict=True):
            other.copy_(value)

    def _fill_buffers(self) -> None:
        for i, (buffer, group) in enumerate(self._buffers):
            if group.size() == 1:
                self._shards.read(i, buffer.detach().view(torch.uint8))
                continue
            part = torch.empty_like(buffer.detach().view(group.size(), -1)[0])
            self._shards.read(i, part.view(torch.uint8))
            with torch.no_grad():
                dist.all_gather_into_tensor(buffer, part, group=group)
