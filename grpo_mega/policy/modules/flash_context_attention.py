"""Attention of a packed row that is split over context-parallel ranks, with the flash kernel (CUDA only).

Each rank has two chunks of every sequence (parallel/context_parallel.py). A chunk sees all keys of its sequence up to
its own end, and the kernel aligns the mask at the end of queries and keys. So the chunks of a row are sequences of one
kernel launch, whose keys are prefixes of the sequences of the row: together (1 + 1 / 2 cp) T keys.

Keys and values are exchanged as gathered_attention.py says.
Asserted by tests/unit/policy/modules/test_flash_context_attention.py against float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_mega.policy.modules.flash_attention import Spans, flash_backward, flash_forward, sink_gradient
from grpo_mega.policy.modules.gathered_attention import ContextRow, RowGradients, gathered_attention


def flash_context_attention(q: Tensor, k: Tensor, v: Tensor, row: ContextRow, *, sinks: Tensor | None = None) -> Tensor:
    """Return the attention of this rank's queries [T/cp, n, d]; see `gathered_attention`. v has the width of k."""
    return gathered_attention(q, k, v, row, _FlashChunks(), sinks=sinks)


def chunk_spans(cu_seqlens: Tensor, longest: int, cp: int, cp_rank: int, num_tokens: int) -> tuple[Spans, Tensor]:
    """Return the chunks of a rank as sequences, and the row positions [S] of their keys. Does not wait for the device.

    Args:
        cu_seqlens: [B + 1] of the whole row; every sequence has a multiple of 2 cp tokens.
        longest: tokens of the longest sequence.
        cp: number of context-parallel ranks.
        cp_rank: the rank.
        num_tokens: T, of the whole row.
    """
    bounds = cu_seqlens.long()
    sizes = bounds.diff() // (2 * cp)
    seen = torch.stack([sizes * (cp_rank + 1), sizes * (2 * cp - cp_rank)], 1).flatten()  # of both chunks: [2 B]
    query_bounds, key_bounds = _bounds(sizes.repeat_interleave(2)), _bounds(seen)
    shifts = bounds[:-1].repeat_interleave(2) - key_bounds[:-1]
    num_keys = num_tokens + num_tokens // (2 * cp)
    keys = torch.arange(num_keys, device=bounds.device) + shifts.repeat_interleave(seen, output_size=num_keys)
    return Spans(query_bounds.int(), key_bounds.int(), longest // (2 * cp), longest), keys


def _bounds(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


class _FlashChunks:
    """Kernel of `gathered_attention`: one launch of the flash kernel for the chunks of this rank."""

    def forward(
        self, q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None, row: ContextRow
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        spans, places = _own_chunks(row, len(keys))
        chunk_keys, chunk_values = keys.index_select(0, places), values.index_select(0, places)
        out, log_sum = flash_forward(q, chunk_keys, chunk_values, spans, row.scale, sinks, row.window)
        return out, (out, log_sum)

    def backward(
        self, grad: Tensor, q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None, kept: tuple[Tensor, ...],
        row: ContextRow,
    ) -> RowGradients:  # fmt: skip
        out, log_sum = kept
        spans, places = _own_chunks(row, len(keys))
        chunk_keys, chunk_values = keys.index_select(0, places), values.index_select(0, places)
        grad_q, *grads = flash_backward(grad, q, chunk_keys, chunk_values, out, log_sum, spans, row.scale, row.window)
        grad_keys, grad_values = (
            torch.zeros_like(x, dtype=torch.float32).index_add_(0, places, part.float())
            for x, part in zip((keys, values), grads, strict=True)
        )
        return RowGradients(grad_q, grad_keys, grad_values, sink_gradient(grad, out, log_sum, sinks))


def _own_chunks(row: ContextRow, num_tokens: int) -> tuple[Spans, Tensor]:
    return chunk_spans(row.cu_seqlens, row.longest, row.group.size(), row.group.rank(), num_tokens)
