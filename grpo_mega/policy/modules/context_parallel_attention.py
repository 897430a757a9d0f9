"""Core attention of a packed row that is split over context-parallel ranks, without Transformer Engine.

The attention of CPUs, and of what the flash kernel does not support (flash_context_attention.py).

Each rank has the queries, keys and values of its part of every sequence (parallel/context_parallel.py). Keys and
values of all ranks are gathered in the forward pass, and again in the backward pass, which returns to each rank the
summed gradient of its own keys and values.

Memory: queries are processed in slices whose mask has at most MASK_ELEMENTS; the backward pass recomputes a slice. No
[T, T] matrix exists. Asserted by
tests/unit/policy/modules/test_context_parallel_attention.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_mega.parallel.context_parallel import gather_rows, rank_index, sum_shares

MASK_ELEMENTS = 1 << 20


def add_sinks(q: Tensor, k: Tensor, sinks: Tensor, scale: float | None) -> tuple[Tensor, Tensor, float]:
    """Add a column to queries and keys that turns attention sinks into an additional key.

    Returns queries [T, n, d + 1], keys [T, m, d + 1] and the scale of the logits. `attend` puts the key (0, ..., 0, 1)
    before the others: its logit is `sinks` [n], and all other logits are unchanged.
    """
    scale = q.size(-1) ** -0.5 if scale is None else scale
    column = (sinks.to(q.dtype) / scale)[None, :, None].expand(q.size(0), -1, -1)
    return torch.cat([q, column], -1), torch.cat([k, k.new_zeros(*k.shape[:-1], 1)], -1), scale


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, *, sinks: bool) -> Tensor:
    """Return softmax(q k^T scale) v [B, n, L, e] over the keys that `mask` [B, n, L, S] (broadcast) allows.

    Args:
        q: [B, n, L, d]. k: [B, m, S, d], n a multiple of m. v: [B, m, S, e].
        mask: True where a query sees a key.
        scale: of the logits; None: 1 / sqrt(d).
        sinks: queries and keys come from `add_sinks`.
    """
    if sinks:
        key = torch.zeros_like(k[:, :, :1])
        key[..., -1] = 1.0
        k, v = torch.cat([key, k], 2), torch.cat([torch.zeros_like(v[:, :, :1]), v], 2)
        mask = torch.nn.functional.pad(mask, (1, 0), value=True)
    grouped = q.size(1) != k.size(1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
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
        v: [T/cp, m, e]; e may differ from d.
        cu_seqlens: [B + 1] of the whole row; every sequence has a multiple of 2 cp tokens.
        scale: of the logits; None: 1 / sqrt(d).
        group: the context-parallel ranks.
        sinks: [n] logits of an additional key with value 0 (attention sink); None: no sink.
        window: tokens that a query sees, itself included; 0: all before it.
    Returns:
        [T/cp, n, e].
    """
    if sinks is not None:
        q, k, scale = add_sinks(q, k, sinks, scale)
    row = RowLayout(cu_seqlens, scale, group, sinks is not None, window)
    out: Tensor = _ContextAttention.apply(q, k, v, row)  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True)
class RowLayout:
    """Arguments of `context_attention` that are the same for all tokens of a row."""

    cu_seqlens: Tensor
    scale: float | None
    group: dist.ProcessGroup
    sinks: bool
    window: int


@dataclass(frozen=True)
class QueryBatch:
    """Sequences of similar length, B of at most L tokens, C = L / cp of them with queries here.

    `queries` [B, C] index the tokens of this rank, `keys` [B, L] the row. Places after the end of a sequence repeat its
    last token, and `real` [B, C] is False there. `positions` [B, C] of the queries count from the start of their
    sequence.
    """

    queries: Tensor
    keys: Tensor
    positions: Tensor
    real: Tensor

    def slices(self, window: int = 0) -> Iterator[tuple[slice, int, Tensor]]:
        """Yield (slice of the C queries, number of keys that they see, mask [B, 1, c, keys])."""
        rows, num_queries = self.queries.shape
        size = max(1, MASK_ELEMENTS // (rows * self.keys.size(1)))
        for begin in range(0, num_queries, size):
            part = slice(begin, min(begin + size, num_queries))
            positions = self.positions[:, part]
            seen = int(positions.max()) + 1
            places = torch.arange(seen, device=positions.device)
            mask = places <= positions[:, :, None]
            if window:
                mask &= places > positions[:, :, None] - window
            yield part, seen, mask[:, None]


def query_batches(cu_seqlens: Tensor, cp: int, cp_rank: int) -> tuple[QueryBatch, ...]:
    """Split a row into batches whose longest sequence is less than twice as long as the shortest."""
    return _query_batches(tuple(cu_seqlens.tolist()), cp, cp_rank, cu_seqlens.device)


@functools.lru_cache(maxsize=16)  # used by all layers of a row and by the backward pass
def _query_batches(cu_seqlens: tuple[int, ...], cp: int, cp_rank: int, device: torch.device) -> tuple[QueryBatch, ...]:
    here = rank_index(torch.tensor(cu_seqlens, device=device), cp, cp_rank, cu_seqlens[-1])
    by_size: dict[int, list[tuple[int, int]]] = {}
    for start, end in pairwise(cu_seqlens):
        if end > start:
            by_size.setdefault((end - start).bit_length(), []).append((start, end))
    batches = []
    for _, spans in sorted(by_size.items()):
        starts = torch.tensor([s for s, _ in spans], device=device)[:, None]
        lengths = torch.tensor([e - s for s, e in spans], device=device)[:, None]
        places = torch.arange(max(e - s for s, e in spans), device=device)[None]
        shares = places[:, : places.size(1) // cp]
        queries = starts // cp + torch.minimum(shares, lengths // cp - 1)
        keys = starts + torch.minimum(places, lengths - 1)
        batches.append(QueryBatch(queries, keys, here[queries] - starts, shares < lengths // cp))
    return tuple(batches)


class _ContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, row: RowLayout) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.row = row
        cu_seqlens, group = row.cu_seqlens, row.group
        key_row, value_row = gather_keys_and_values(k, v, cu_seqlens, group)
        out = q.new_empty(q.size(0), q.size(1), v.size(2))
        for batch in query_batches(cu_seqlens, group.size(), group.rank()):
            keys, values = (_take(x, batch.keys) for x in (key_row, value_row))
            for part, seen, mask in batch.slices(row.window):
                queries = _take(q, batch.queries[:, part])
                found = attend(queries, keys[:, :, :seen], values[:, :, :seen], mask, row.scale, sinks=row.sinks)
                real = batch.real[:, part]
                out[batch.queries[:, part][real]] = found.transpose(1, 2)[real]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        row: RowLayout = ctx.row
        cu_seqlens, group = row.cu_seqlens, row.group
        key_row, value_row = gather_keys_and_values(k, v, cu_seqlens, group)
        grad_q = torch.zeros_like(q)
        # float32 even for bfloat16, because the gradient of a key is a sum over slices and ranks
        grad_keys, grad_values = (torch.zeros_like(x, dtype=torch.float32) for x in (key_row, value_row))
        for batch in query_batches(cu_seqlens, group.size(), group.rank()):
            keys, values = (_take(x, batch.keys) for x in (key_row, value_row))
            for part, seen, mask in batch.slices(row.window):
                index, real = batch.queries[:, part], batch.real[:, part]
                leaves = [
                    x.detach().requires_grad_() for x in (_take(q, index), keys[:, :, :seen], values[:, :, :seen])
                ]
                upstream = (grad[index] * real[:, :, None, None]).transpose(1, 2)
                with torch.enable_grad():
                    found = attend(leaves[0], leaves[1], leaves[2], mask, row.scale, sinks=row.sinks)
                part_q, part_k, part_v = torch.autograd.grad(found, leaves, upstream)
                grad_q[index[real]] = part_q.transpose(1, 2)[real]
                for total, part_grad in ((grad_keys, part_k), (grad_values, part_v)):
                    rows = part_grad.transpose(1, 2).flatten(0, 1).to(total.dtype)
                    total.index_add_(0, batch.keys[:, :seen].flatten(), rows)
        return grad_q, *sum_gradients(grad_keys, grad_values, k, v, cu_seqlens, group), None


def gather_keys_and_values(k: Tensor, v: Tensor, cu_seqlens: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Gather keys [T, m, d] and values [T, m, e] of the whole row in one message."""
    return split_keys_and_values(gather_rows(torch.cat([k.flatten(1), v.flatten(1)], 1), cu_seqlens, group), k, v)


def sum_gradients(
    grad_keys: Tensor, grad_values: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Sum the gradients of the keys and values of a row over the ranks; return those of this rank's k and v."""
    both = sum_shares(torch.cat([grad_keys.flatten(1), grad_values.flatten(1)], 1), cu_seqlens, group)
    grad_k, grad_v = split_keys_and_values(both, k, v)
    return grad_k.to(k.dtype), grad_v.to(v.dtype)


def split_keys_and_values(both: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values with the heads of k and v, from their concatenation [T, ...]."""
    keys, values = both.split([k[0].numel(), v[0].numel()], dim=1)
    return keys.reshape(-1, *k.shape[1:]), values.reshape(-1, *v.shape[1:])


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Return rows `index` [B, L] of x [T, n, d] as [B, n, L, d]."""
    return x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:]).transpose(1, 2)
