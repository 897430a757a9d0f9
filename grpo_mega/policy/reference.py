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
    """A snapshot of the weights that Megatron's flat buffers hold now."""

    def __init__(self, buffers: Sequence[Any]) -> None:
        # the ranks that hold the same experts are others than those that hold the same dense layers
        self._buffers: list[tuple[Tensor, dist.ProcessGroup]] = [(b.param_data, b.data_parallel_group) for b in buffers]
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
        return [b.detach().view(g.size(), -1)[g.rank()].to("cpu", copy=True) for b, g in self._buffers]

    def _fill(self, parts: list[Tensor]) -> None:
        for (buffer, group), part in zip(self._buffers, parts, strict=True):
            if group.size() == 1:
                buffer.copy_(part)
            else:
                with torch.no_grad():
                    dist.all_gather_into_tensor(buffer, part.to(buffer.device), group=group)
