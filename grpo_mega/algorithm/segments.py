"""Means over each rollout of a packed row. Pure.

A loss always sees whole rollouts: all loss tokens of a rollout are in one row, and the row is not cut. Where ranks hold
parts of a row (context parallelism), the policy brings the row's log-probs and entropies together before it calls the
loss, two float32 numbers per token. Nothing here carries gradient: every sequence-level factor is a constant in front
of a token's own ratio (surrogate.py).
Asserted by tests/unit/algorithm/test_segments.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_mega.types import Microbatch


@dataclass(frozen=True)
class Segments:
    """`index[t]` is the segment of position t; `num_tokens[b]` its loss tokens, float64."""

    index: Tensor  # [T] int64
    loss_mask: Tensor  # [T] bool
    num_tokens: Tensor  # [B] float64

    @classmethod
    def of(cls, microbatch: Microbatch) -> Segments:
        """The segments of a row; the last may be padding, which has no loss token."""
        lengths = microbatch.cu_seqlens.diff().long()
        index = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        num_tokens = torch.zeros(len(lengths), dtype=torch.float64, device=index.device)
        num_tokens.index_add_(0, index, microbatch.loss_mask.double())
        return cls(index, microbatch.loss_mask, num_tokens)

    def sum(self, values: Tensor) -> Tensor:
        """Sum of `values` [T] over each segment's loss tokens, [B] float64, without gradient."""
        total = torch.zeros_like(self.num_tokens)
        return total.index_add_(0, self.index, torch.where(self.loss_mask, values.detach(), 0.0).double())

    def mean(self, values: Tensor) -> Tensor:
        """Mean of `values` [T] over each segment's loss tokens, [B] float64; 0 where there are none."""
        return self.sum(values) / self.num_tokens.clamp(min=1.0)

    def spread(self, per_segment: Tensor, dtype: torch.dtype) -> Tensor:
        """[B] -> [T]: each position gets the value of its segment."""
        return per_segment[self.index].to(dtype)
