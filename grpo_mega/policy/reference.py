"""The reference: a second set of weights for the same modules.

A swap copies whole parameter buffers and never rebinds `param.data`, because the distributed optimizer and pending
gathers hold views of it. Each data-parallel rank keeps 1/dp of every buffer on the host, in the policy's dtype; a swap
gathers the parts. Asserted by tests/parallel/test_update.py: before and after, digest and every `data_ptr` are equal,
and in fp32 the KL before the first update is exactly 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Reference:
    """A snapshot of the weights in Megatron's flat buffers, and of small tensors outside of them."""

    def __init__(self, buffers: Sequence[Any], others: Sequence[Tensor] = ()) -> None:
        """Take the first snapshot.

        Args:
            buffers: Megatron's buffers of parameters.
            others: tensors that updates change and that are equal on the ranks that share them: routers' biases.
        """
        # the replicas of an expert are not on the same ranks as the replicas of a dense layer
        self._buffers: list[tuple[Tensor, dist.ProcessGroup]] = [(b.param_data, b.data_parallel_group) for b in buffers]
        self._others = tuple(others)
        self._reference = self._copy_own_shards()

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory on this rank between swaps."""
        return sum(part.nbytes for part in self._reference)

    def update(self) -> None:
        """Replace the snapshot with the current weights of the buffers."""
        self._reference = self._copy_own_shards()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Set the parameters to the reference inside the block, and restore them bit for bit afterwards."""
        policy = self._copy_own_shards()
        self._fill(self._reference)
        try:
            yield
        finally:
            self._fill(policy)

    def _copy_own_shards(self) -> list[Tensor]:
        shards = [b.detach().view(g.size(), -1)[g.rank()] for b, g in self._buffers]
        return [values.to("cpu", copy=True) for values in (*shards, *(other.detach() for other in self._others))]

    def _fill(self, parts: list[Tensor]) -> None:
        for other, part in zip(self._others, parts[len(self._buffers) :], strict=True):
            other.copy_(part)
        for (buffer, group), part in zip(self._buffers, parts[: len(self._buffers)], strict=True):
            if group.size() == 1:
                buffer.copy_(part)
            else:
                with torch.no_grad():
                    dist.all_gather_into_tensor(buffer, part.to(buffer.device), group=group)
