"""Attention of a packed row that is split over context-parallel ranks, with the flash kernel (CUDA only).

Each rank has two chunks of every sequence (parallel/context_parallel.py). A chunk sees all keys of its sequence up to
its own end, and the kernel aligns the mask at the end of queries and keys. So the chunks of a row are sequences of one
kernel launch, whose keys are prefixes of the sequences of the row: together (1 + 1 / 2 cp) T keys.

As in context_parallel_attention.py, keys and values of all ranks are gathered in the forward pass, and again in the
backward pass. Asserted by tests/unit/policy/modules/test_flash_context_attention.py against float64.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_mega.policy.modules.context_parallel_attention import gather_keys_and_values, sum_gradients
from grpo_mega.policy.modules.flash_attention import Spans, flash_backward, flash_forward, sink_gradient


def flash_context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float | None,
    group: dist.ProcessGroup,
    *,
    sinks: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """Causal attention inside each sequence of a packed row of T tokens, for the queries of this rank.

    Args:
        q: [T/cp, n, d], of this rank's tokens.
        k: [T/cp, m, d], n a multiple of m (grouped queries).
        v: [T/cp, m, d].
        cu_seqlens: [B + 1] of the whole row; every sequence has a multiple of 2 cp tokens.
        longest: tokens of the longest sequence.
        scale: of the logits; None: 1 / sqrt(d).
        group: the context-parallel ranks.
        sinks: [n] logits of an additional key with value 0 (attention sink); None: no sink.
        window: tokens that a query sees, itself included; 0: all before it.
    Returns:
        [T/cp, n, d].
    """
    chunks = (cu_seqlens, longest, scale, group, window)
    out: Tensor = _FlashContextAttention.apply(q, k, v, sinks, *chunks)  # type: ignore[no-untyped-call]
    return out


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


class _FlashContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, cu_seqlens: Tensor, longest: int,
        scale: float | None, group: dist.ProcessGroup, window: int,
    ) -> Tensor:  # fmt: skip
        spans, places = chunk_spans(cu_seqlens, longest, group.size(), group.rank(), q.size(0) * group.size())
        keys, values = (x.index_select(0, places) for x in gather_keys_and_values(k, v, cu_seqlens, group))
        out, log_sum = flash_forward(q, keys, values, spans, scale, sinks, window)
        ctx.save_for_backward(q, k, v, sinks, out, log_sum, cu_seqlens)
        ctx.row = longest, scale, group, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, log_sum, cu_seqlens = ctx.saved_tensors
        longest, scale, group, window = ctx.row
        spans, places = chunk_spans(cu_seqlens, longest, group.size(), group.rank(), q.size(0) * group.size())
        row = gather_keys_and_values(k, v, cu_seqlens, group)
        keys, values = (x.index_select(0, places) for x in row)
        grad_q, *grads = flash_backward(grad, q, keys, values, out, log_sum, spans, scale, window)
        # float32 even for bfloat16, because the gradient of a key is a sum over chunks and ranks
        grad_keys, grad_values = (
            torch.zeros_like(x, dtype=torch.float32).index_add_(0, places, part.float())
            for x, part in zip(row, grads, strict=True)
        )
        shares = sum_gradients(grad_keys, grad_values, k, v, cu_seqlens, group)
        return grad_q, *shares, sink_gradient(grad, out, log_sum, sinks), None, None, None, None, None
