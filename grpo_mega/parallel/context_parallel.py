"""Split of packed rows over context-parallel ranks, and the inverse.

Every segment of a row has a multiple of 2 cp tokens and is cut into 2 cp chunks of equal length. Rank r holds chunks r
and 2 cp - 1 - r of each segment, in this order, so that all ranks do the same amount of causal attention. This is the
order of Transformer Engine. Only this module knows the order. Labels are shifted, and positions counted, before the
split.
Asserted by tests/unit/parallel/test_context_parallel.py.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def rank_index(cu_seqlens: Tensor, cp: int, cp_rank: int) -> Tensor:
    """Return the row positions [T/cp] of the tokens that a rank holds, in the rank's order.

    Args:
        cu_seqlens: [B + 1], from 0 to T; every segment has a multiple of 2 cp tokens.
        cp: number of ranks that share the row.
        cp_rank: the rank.
    """
    return _rank_indices(tuple(cu_seqlens.tolist()), cp)[cp_rank]


def row_index(cu_seqlens: Tensor, cp: int) -> Tensor:
    """Return [T]: for each row position, the position of its token in the concatenation of all ranks' parts."""
    return _row_index(tuple(cu_seqlens.tolist()), cp)


@functools.lru_cache(maxsize=16)  # all layers of a row use the same index, forward and backward
def _rank_indices(cu_seqlens: tuple[int, ...], cp: int) -> tuple[Tensor, ...]:
    bounds = torch.tensor(cu_seqlens)
    lengths = bounds.diff()
    odd = (lengths % (2 * cp)).nonzero()
    assert not len(odd), f"a segment of {int(lengths[odd[0, 0]])} tokens must be a multiple of 2 x cp = {2 * cp}"
    places = torch.arange(cu_seqlens[-1])
    starts = torch.repeat_interleave(bounds[:-1], lengths)
    chunks = (places - starts) // torch.repeat_interleave(lengths // (2 * cp), lengths)
    owners = torch.minimum(chunks, 2 * cp - 1 - chunks)
    return tuple(places[owners == rank] for rank in range(cp))


@functools.lru_cache(maxsize=16)
def _row_index(cu_seqlens: tuple[int, ...], cp: int) -> Tensor:
    order = torch.cat(_rank_indices(cu_seqlens, cp))
    index = torch.empty_like(order)
    index[order] = torch.arange(len(order))
    return index


def gather_rows(share: Tensor, cu_seqlens: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather [T/cp, ...] from all ranks of `group` into the row [T, ...], in row order, on every rank. No gradient."""
    whole = share.new_empty(group.size() * share.size(0), *share.shape[1:])
    dist.all_gather_into_tensor(whole, share.contiguous(), group=group)
    return whole.index_select(0, row_index(cu_seqlens, group.size()).to(whole.device))


def sum_shares(row: Tensor, cu_seqlens: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum [T, ...] over all ranks and return this rank's part [T/cp, ...]: the backward pass of `gather_rows`."""
    order = torch.cat(_rank_indices(tuple(cu_seqlens.tolist()), group.size())).to(row.device)
    ordered = row.index_select(0, order)
    share = ordered.new_empty(ordered.size(0) // group.size(), *ordered.shape[1:])
    dist.reduce_scatter_tensor(share, ordered, group=group)
    return share


def whole_row(share: Tensor, cu_seqlens: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather a row with gradient, for a loss that every rank computes identically from the whole row.

    The gradient of a rank's part is that part of the row's gradient; nothing is summed over ranks.
    """
    row: Tensor = _WholeRow.apply(share, cu_seqlens, group)  # type: ignore[no-untyped-call]
    return row


class _WholeRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, cu_seqlens: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.index = rank_index(cu_seqlens, group.size(), group.rank()).to(share.device)
        return gather_rows(share, cu_seqlens, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.index), None, None
