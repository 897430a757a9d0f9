"""Core attention of a packed row that is split over context-parallel ranks, without Transformer Engine.

The attention of CPUs, and of what the flash kernel does not support (flash_context_attention.py).

Keys and values are exchanged as gathered_attention.py says.

Memory: queries are processed in slices whose mask has at most MASK_ELEMENTS; the backward pass recomputes a slice. No
[T, T] matrix exists. Asserted by
tests/unit/policy/modules/test_context_parallel_attention.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from grpo_mega.parallel.context_parallel import rank_index
from grpo_mega.policy.modules.gathered_attention import ContextRow, RowGradients, gathered_attention

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


def context_attention(q: Tensor, k: Tensor, v: Tensor, row: ContextRow, *, sinks: Tensor | None = None) -> Tensor:
    """Return the attention of this rank's queries [T/cp, n, e]; see `gathered_attention`. e may differ from d."""
    if sinks is not None:
        q, k, scale = add_sinks(q, k, sinks, row.scale)
        row = replace(row, scale=scale)
    return gathered_attention(q, k, v, row, _MaskedSlices(sinks=sinks is not None))


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


@dataclass(frozen=True)
class _MaskedSlices:
    """Kernel of `gathered_attention`: torch's fused attention of slices of the queries, each with a mask."""

    sinks: bool
    """Queries and keys come from `add_sinks`."""

    def forward(
        self, q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None, row: ContextRow
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        assert sinks is None, "they are a column of the keys"
        out = q.new_empty(q.size(0), q.size(1), values.size(2))
        for batch in query_batches(row.cu_seqlens, row.group.size(), row.group.rank()):
            key_rows, value_rows = _take(keys, batch.keys), _take(values, batch.keys)
            for part, seen, mask in batch.slices(row.window):
                queries = _take(q, batch.queries[:, part])
                found = attend(
                    queries, key_rows[:, :, :seen], value_rows[:, :, :seen], mask, row.scale, sinks=self.sinks
                )
                real = batch.real[:, part]
                out[batch.queries[:, part][real]] = found.transpose(1, 2)[real]
        return out, ()

    def backward(
        self, grad: Tensor, q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None, kept: tuple[Tensor, ...],
        row: ContextRow,
    ) -> RowGradients:  # fmt: skip
        del sinks, kept
        grad_q = torch.zeros_like(q)
        grad_keys, grad_values = (torch.zeros_like(x, dtype=torch.float32) for x in (keys, values))
        for batch in query_batches(row.cu_seqlens, row.group.size(), row.group.rank()):
            key_rows, value_rows = _take(keys, batch.keys), _take(values, batch.keys)
            for part, seen, mask in batch.slices(row.window):
                index, real = batch.queries[:, part], batch.real[:, part]
                leaves = [
                    x.detach().requires_grad_()
                    for x in (_take(q, index), key_rows[:, :, :seen], value_rows[:, :, :seen])
                ]
                upstream = (grad[index] * real[:, :, None, None]).transpose(1, 2)
                with torch.enable_grad():
                    found = attend(leaves[0], leaves[1], leaves[2], mask, row.scale, sinks=self.sinks)
                part_q, part_k, part_v = torch.autograd.grad(found, leaves, upstream)
                grad_q[index[real]] = part_q.transpose(1, 2)[real]
                for total, part_grad in ((grad_keys, part_k), (grad_values, part_v)):
                    rows = part_grad.transpose(1, 2).flatten(0, 1).to(total.dtype)
                    total.index_add_(0, batch.keys[:, :seen].flatten(), rows)
        return RowGradients(grad_q, grad_keys, grad_values)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Return rows `index` [B, L] of x [T, n, d] as [B, n, L, d]."""
    return x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:]).transpose(1, 2)
