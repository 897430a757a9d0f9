"""Sums and means over each rollout of a packed row. Pure.

A loss always receives whole rollouts: all loss tokens of a rollout are in one row, and the row is not split. With
context parallelism the policy gathers the row's log-probs and entropies, two float32 numbers per token, before it calls
the loss. Nothing here has a gradient: a sequence-level factor is a constant factor of each token's own ratio.
Asserted by tests/unit/algorithm/test_rollout_sums.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_mega.types import Microbatch


@dataclass(frozen=True)
class Segments:
    """Segments of a packed row.

    Attributes:
        index: [T] int64, segment of each position.
        loss_mask: [T] bool, positions with loss.
        num_tokens: [B] float64, loss tokens of each segment.
    """

    index: Tensor
    loss_mask: Tensor
    num_tokens: Tensor

    @classmethod
    def of(cls, microbatch: Microbatch) -> Segments:
        """Return the segments of a row. The last one may be padding, which has no loss tokens."""
        lengths = microbatch.cu_seqlens.diff().long()
        index = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        num_tokens = torch.zeros(len(lengths), dtype=torch.float64, device=index.device)
        num_tokens.index_add_(0, index, microbatch.loss_mask.double())
        return cls(index, microbatch.loss_mask, num_tokens)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` [T] over each segment's loss tokens, [B] float64, without gradient."""
        total = torch.zeros_like(self.num_tokens)
        return total.index_add_(0, self.index, torch.where(self.loss_mask, values.detach(), 0.0).double())

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of `values` [T] over each segment's loss tokens, [B] float64; 0 without loss tokens."""
        return self.sum(values) / self.num_tokens.clamp(min=1.0)

    def spread(self, per_segment: Tensor, dtype: torch.dtype) -> Tensor:
        """Return [T] in which each position has the value of its segment, from `per_segment` [B]."""
        return per_segment[self.index].to(dtype)
