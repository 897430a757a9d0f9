"""The reference: a second set of weights for the same modules.

A swap copies whole parameter buffers and never rebinds `param.data`, which the distributed optimizer's views and
pending gathers look at. Each data-parallel rank keeps 1/dp of every buffer on the host, in the policy's dtype; a swap
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
    """A snapshot of the weights that `buffers`, Megatron's flat ones, hold now."""

    def __init__(self, buffers: Sequence[Any], dp_group: dist.ProcessGroup) -> None:
        self._buffers: list[Tensor] = [b.param_data for b in buffers]
        self._group = dp_group
        self._reference = self._own_parts()

    @property
    def host_bytes(self) -> int:
        """Held by this rank between swaps."""
        return sum(part.nbytes for part in self._reference)

    def update(self) -> None:
        """The weights that the buffers hold now take the place of the snapshot."""
        self._reference = self._own_parts()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the parameters hold the reference's values; afterwards, bit for bit what they held before."""
        policy = self._own_parts()
        self._fill(self._reference)
        try:
            yield
        finally:
            self._fill(policy)

    def _own_parts(self) -> list[Tensor]:
        rank, size = self._group.rank(), self._group.size()
        return [b.detach().view(size, -1)[rank].to("cpu", copy=True) for b in self._buffers]

    def _fill(self, parts: list[Tensor]) -> None:
        for buffer, part in zip(self._buffers, parts, strict=True):
            if self._group.size() == 1:
                buffer.copy_(part)
            else:
                with torch.no_grad():
                    dist.all_gather_into_tensor(buffer, part.to(buffer.device), group=self._group)
