"""Whole gradients for comparisons. The distributed optimizer leaves each rank only its shard of a reduced gradient.

Asserted by tests/parallel/test_update.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_gradients(buffer: Any) -> None:
    """Gather all reduced gradients of one of Megatron's flat buffers on every rank. Collective."""
    group = buffer.data_parallel_group
    for bucket in buffer.buckets:
        own = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
        dist.all_gather_into_tensor(bucket.grad_data, own, group=group)


def gradient_of(parameter: Tensor) -> Tensor:
    """Return the gradient, in the shape of the parameter; zeros for a tensor that has no gradient."""
    found: Tensor | None = getattr(parameter, "main_grad", None)
    return torch.zeros_like(parameter, dtype=torch.float32) if found is None else found
