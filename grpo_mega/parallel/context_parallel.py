"""Split of packed rows over context-parallel ranks, and the inverse.

Every segment of a row has a multiple of 2 cp tokens and is cut into 2 cp chunks of equal length. Rank r holds chunks r
and 2 cp - 1 - r of each segment, in this order, so that all ranks do the same amount of causal attention. This is the
order of Transformer Engine. Only this module knows the order. Labels are shifted, and positions counted, before the
split.
Asserted by tests/unit/parallel/test_context_parallel.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def rank_index(cu_seqlens: Tensor, cp: int, cp_rank: int, num_tokens: int | None = None) -> Tensor:
    """Return the row positions [T/cp] of the tokens that a rank holds, in the rank's order, on the device of the input.

    Args:
        cu_seqlens: [B + 1], from 0 to T; every segment has a multiple of 2 cp tokens.
        cp: number of ranks that share the row.
        cp_rank: the rank.
        num_tokens: T; None: it is read from `cu_seqlens`, which waits for a GPU.
    """
    num_tokens = int(cu_seqlens[-1]) if num_tokens is None else num_tokens
    bounds = _checked(cu_seqlens, cp)
    parts = bounds // cp  # boundaries of the segments in the rank's own order
    starts, part_starts, chunks = (
        torch.repeat_interleave(x, parts.diff(), output_size=num_tokens // cp)
        for x in (bounds[:-1], parts[:-1], parts.diff() // 2)
    )
    offsets = torch.arange(num_tokens // cp, device=bounds.device) - part_starts
    second = offsets >= chunks
    return starts + offsets + torch.where(second, (2 * cp - 2 - cp_rank) * chunks, cp_rank * chunks)


def row_index(cu_seqlens: Tensor, cp: int, num_tokens: int | None = None) -> Tensor:
    """Return [T]: for each row position, the position of its token in the concatenation of all ranks' parts.

    The arguments are those of `rank_index`, and so is the device of the result.
    """
    num_tokens = int(cu_seqlens[-1]) if num_tokens is None else num_tokens
    bounds = _checked(cu_seqlens, cp)
    lengths = bounds.diff()
    starts, chunks = (
        torch.repeat_interleave(x, lengths, output_size=num_tokens) for x in (bounds[:-1], lengths // (2 * cp))
    )
    offsets = torch.arange(num_tokens, device=bounds.device) - starts
    chunk = offsets // chunks
    owner = torch.minimum(chunk, 2 * cp - 1 - chunk)
    inside = offsets - chunk * chunks + torch.where(chunk == owner, 0, chunks)
    return owner * (num_tokens // cp) + starts // cp + inside


def _checked(cu_seqlens: Tensor, cp: int) -> Tensor:
    """Return the boundaries as int64, after checking that every segment has a multiple of 2 cp tokens.

    On a GPU the check does not wait for the device: it fails at a later operation.
    """
    bounds = cu_seqlens.long()
    odd = bounds.diff() % (2 * cp) != 0
    if bounds.device.type == "cpu":
        wrong = odd.nonzero()
        assert not len(wrong), (
            f"a segment of {int(bounds.diff()[wrong[0, 0]])} tokens must be a multiple of 2 x cp = {2 * cp}"
        )
    else:
        torch._assert_async(~odd.any(), f"a segment is not a multiple of 2 x cp = {2 * cp} tokens")
    return bounds


def gather_rows(share: Tensor, cu_seqlens: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather [T/cp, ...] from all ranks of `group` into the row [T, ...], in row order, on every rank. No gradient."""
    whole = share.new_empty(group.size() * share.size(0), *share.shape[1:])
    dist.all_gather_into_tensor(whole, share.contiguous(), group=group)
    return whole.index_select(0, row_index(cu_seqlens, group.size(), whole.size(0)))


def sum_shares(row: Tensor, cu_seqlens: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum [T, ...] over all ranks and return this rank's part [T/cp, ...]: the backward pass of `gather_rows`."""
    order = torch.cat([rank_index(cu_seqlens, group.size(), rank, row.size(0)) for rank in range(group.size())])
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
        ctx.index = rank_index(cu_seqlens, group.size(), group.rank(), share.size(0) * group.size())
        return gather_rows(share, cu_seqlens, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.index), None, None
